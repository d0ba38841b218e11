"""The rival in training: the published architecture in its plainest form, in a plain loop.

`nn.MultiheadAttention` with a key padding mask, every slot of the batch projected, no folding, torch's default AdamW.
Same parameters as `RelishHead`, same numbers to rounding (tests/train/test_head.py compares the two).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class PlainRelish(nn.Module):
    """Hidden states (B, T, D) and mask (B, T), True = real token, to (B,)."""

    def __init__(self, hidden_size: int, depth: int, latent_size: int = 256, num_heads: int = 8) -> None:
        super().__init__()
        self.input_projection = nn.Linear(hidden_size, latent_size)
        self.latent = nn.Parameter(torch.randn(1, 1, latent_size) * 0.02)
        self.steps = nn.ModuleList(PlainStep(latent_size, num_heads) for _ in range(depth))
        self.regressor = nn.Linear(latent_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        tokens = self.input_projection(hidden)
        state = self.latent.expand(len(hidden), -1, -1)
        for step in self.steps:
            state = step(state, tokens, ~mask)
        return self.regressor(state[:, 0]).squeeze(-1)


class PlainStep(nn.Module):
    def __init__(self, latent_size: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(latent_size, num_heads, batch_first=True)
        self.norm1 = nn.LayerNorm(latent_size)
        self.ffn = nn.Sequential(
            nn.Linear(latent_size, 4 * latent_size), nn.GELU(), nn.Linear(4 * latent_size, latent_size)
        )
        self.norm2 = nn.LayerNorm(latent_size)

    def forward(self, state: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        read, _ = self.attention(state, tokens, tokens, key_padding_mask=padding, need_weights=False)
        state = self.norm1(state + read)
        return self.norm2(state + self.ffn(state))


def train_plainly(
    head: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]], lr: float = 3e-4, weight_decay: float = 1.0
) -> Callable[[], float]:
    """A function that takes one step on the next batch (hidden, mask, standardised target) and gives the loss."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    loss_of = nn.HuberLoss()
    head.train()
    source = iter(batches)

    def step() -> float:
        hidden, mask, target = next(source)
        loss = loss_of(head(hidden.float(), mask), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step
