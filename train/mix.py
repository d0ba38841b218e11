"""A head on a learned mix of several layers: ELMo's scalar mix (Peters et al. 2018, arXiv 1802.05365, equation 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from .pooled import pool
from .scale import InputScale, TargetScale


class MixedHead(nn.Module):
    """A head that reads, in place of one layer, a mix of K layers; K parameters more.

        x = Σ_k s_k (h_k - mean_k) / scale_k,     s = softmax(w), equal at first

    Each layer is standardised by itself, since later layers are larger than earlier ones. ELMo's common factor γ is
    left out: the weights that read x take its place. A head that pools reads the mix of the layers' pooled vectors,
    standardised as the one vector of a single layer is; pooling is linear, so that is the pooled mix. With K = 1 the
    predictions are the head's own on that layer.
    """

    def __init__(self, head: Any, layers: int) -> None:
        super().__init__()
        self.hidden_size: int = head.hidden_size
        self.pooling: str | None = getattr(head, "pooling", None)
        self.input_scale = InputScale(layers, head.hidden_size)
        """Of the layers. The inner head's own stays the identity."""
        self.weights = nn.Parameter(torch.zeros(layers))
        """w; its softmax is `shares()`."""
        self.head = head

    @property
    def target_scale(self) -> TargetScale:
        """The inner head's."""
        return self.head.target_scale

    def shares(self) -> Tensor:
        """s (K,), what each layer has of the mix; they sum to 1."""
        return torch.softmax(self.weights, dim=0)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Predict.

        Args:
            hidden: (B, K, T, D) hidden states of any float type; what stands in the padding does not matter.
            mask: (B, T) bool or 0/1, True = real token; each row has at least one.

        Returns:
            (B,) predictions in the unit of the labels.
        """
        mask = mask.bool()
        if self.pooling is not None:  # the inner head then pools a single token
            vectors = [pool(layer, mask, self.pooling) for layer in hidden.unbind(dim=1)]
            hidden, mask = torch.stack(vectors, dim=1).unsqueeze(2), mask.any(dim=1, keepdim=True)
        return self.head(self._mix(hidden, mask), mask)

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, K, T, D) to (B, T, D) in the type of the weights."""
        # Padding may hold NaN, which 0 × NaN would bring into the gradient of the shares.
        hidden = hidden.masked_fill(~mask[:, None, :, None], 0.0)
        factors = self.shares().unsqueeze(1) / self.input_scale.scale
        mixed = -(factors * self.input_scale.mean).sum(dim=0)
        for layer, factor in zip(hidden.unbind(dim=1), factors, strict=True):
            mixed = torch.addcmul(mixed, layer, factor)  # keeps the layer in its own type for the way back
        return mixed
