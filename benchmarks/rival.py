"""The rival in training: the published architecture in its plainest form, in a plain loop.

`nn.MultiheadAttention` with a key padding mask, every slot of the batch projected, no folding, torch's default AdamW
(decay on the matrices only, as relish has it).
Same parameters as `RelishHead`, drawn the same way; benchmarks/grid.py compares what the two have learnt.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from relish.train.settings import STEP_SCALE


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
        up, down = nn.Linear(latent_size, 4 * latent_size), nn.Linear(4 * latent_size, latent_size)
        self.ffn = nn.Sequential(up, nn.GELU(), down)
        self.norm2 = nn.LayerNorm(latent_size)
        with torch.no_grad():
            self.attention.out_proj.weight.mul_(STEP_SCALE)
            down.weight.mul_(STEP_SCALE)

    def forward(self, state: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        read, _ = self.attention(state, tokens, tokens, key_padding_mask=padding, need_weights=False)
        state = self.norm1(state + read)
        return self.norm2(state + self.ffn(state))


def train_plainly(
    head: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    lr: float = 3e-4,
    weight_decay: float = 1.0,
    *,
    steps: int | None = None,
    warmup: float = 0.05,
) -> Callable[[], float]:
    """A function that takes one step on the next batch (hidden, mask, standardised target) and gives the loss.

    With `steps`, the learning rate rises over a share `warmup` of them and falls along a cosine; without, it stays.
    """
    vectors = [parameter for name, parameter in head.named_parameters() if parameter.ndim < 2 or name == "latent"]
    matrices = [parameter for name, parameter in head.named_parameters() if parameter.ndim >= 2 and name != "latent"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )
    rising = max(1, round(warmup * (steps or 1)))

    def factor(step: int) -> float:
        if steps is None:
            return 1.0
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss_of = nn.MSELoss()
    head.train()
    source = iter(batches)

    def step() -> float:
        hidden, mask, target = next(source)
        loss = loss_of(head(hidden.float(), mask), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step
