"""The usual predictive heads: pool the hidden states to one vector, then a linear layer or an MLP."""

import torch
from torch import Tensor, nn

from .scale import InputScale, TargetScale


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool real tokens, in float32 at least.

    Args:
        hidden: (B, T, D).
        mask: (B, T), True = real token.
        pooling: "mean", or "last" for the last real token.

    Returns:
        (B, D).
    """
    mask = mask.bool()
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if pooling == "last":
        last = mask.long().cumsum(dim=1).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].to(dtype)
    kept = hidden.to(dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)


class PooledHead(nn.Module):
    """Pooling, then `body`: (B, D) to (B, 1)."""

    def __init__(self, hidden_size: int, pooling: str, body: nn.Module) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.pooling = pooling
        self.input_scale = InputScale(hidden_size)
        self.target_scale = TargetScale()
        self.body = body

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (B, T, D) and mask (B, T), True = real token, to predictions (B,) in the labels' unit."""
        vector = (pool(hidden, mask, self.pooling) - self.input_scale.mean) / self.input_scale.scale
        return self.target_scale(self.body(vector).squeeze(-1))


def mlp_body(hidden_size: int, parameters: int, dropout: float) -> nn.Module:
    """An MLP with one hidden layer, as wide as brings it closest to a number of parameters.

    With width w it has (D + 2) · w + 1 parameters.
    """
    width = max(1, round((parameters - 1) / (hidden_size + 2)))
    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1))
