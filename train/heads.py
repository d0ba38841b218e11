"""The heads by name. All take hidden states (B, T, D) and a mask (B, T), and give (B,) in the unit of the labels.

Each can read a learned mix of K layers instead, (B, K, T, D).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..cache.errors import SettingsError
from .attention import AttentionHead
from .head import RelishHead
from .mix import MixedHead
from .pooled import PooledHead, mlp_body
from .settings import HEADS
from .shared import without_shared

Head = Any
"""A module with `hidden_size`, `input_scale`, `target_scale` and `head(hidden, mask) -> (B,)`."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """All that a head's predictions depend on besides its weights, with which it is stored."""

    name: str
    hidden_size: int
    depth: int
    """Refinement steps; 0 for heads that have none."""
    latent_size: int
    num_heads: int
    dropout: float
    layers: int | None = None
    """K, for a head that reads a learned mix of K layers, (B, K, T, D); None for one that reads a single layer."""
    skip: int = 0
    """Tokens at the beginning of each row that it does not read (train/shared.py)."""


def build_head(spec: HeadSpec) -> Head:
    """Make a head with random weights, drawn from torch's global generator.

    Raises:
        SettingsError: for an unknown name or an impossible shape.
    """
    if spec.name not in HEADS:
        raise SettingsError(f"there is no head {spec.name!r}; there are {', '.join(HEADS)}")
    head = _BUILDERS[spec.name](spec)
    head = head if spec.layers is None else MixedHead(head, spec.layers)
    if spec.skip:
        head.register_forward_pre_hook(partial(without_shared, spec.skip), with_kwargs=True)
    return head


def count_parameters(head: nn.Module) -> int:
    """Trainable numbers of a head."""
    return sum(parameter.numel() for parameter in head.parameters())


def _relish(spec: HeadSpec) -> Head:
    return RelishHead(
        hidden_size=spec.hidden_size,
        depth=spec.depth,
        latent_size=spec.latent_size,
        num_heads=spec.num_heads,
        dropout=spec.dropout,
    )


def _linear(pooling: str) -> Callable[[HeadSpec], Head]:
    return lambda spec: PooledHead(spec.hidden_size, pooling, nn.Linear(spec.hidden_size, 1))


def _mlp(pooling: str) -> Callable[[HeadSpec], Head]:
    return lambda spec: PooledHead(
        spec.hidden_size, pooling, mlp_body(spec.hidden_size, _relish_parameters(spec), dropout=spec.dropout)
    )


def _relish_parameters(spec: HeadSpec) -> int:
    """Parameters of a RELISH head at the paper's depth of 3: W_p, r⁰, the steps and the regressor."""
    d, D = spec.latent_size, spec.hidden_size
    step = (3 * d * d + 3 * d) + (d * d + d) + 4 * d + (8 * d * d + 5 * d)
    return (D * d + d) + d + 3 * step + (d + 1)


_BUILDERS: dict[str, Callable[[HeadSpec], Head]] = {
    "relish": _relish,
    "linear": _linear("mean"),
    "linear-last": _linear("last"),
    "mlp": _mlp("mean"),
    "mlp-last": _mlp("last"),
    "attention": lambda spec: AttentionHead(spec.hidden_size),
    "ridge": _linear("last"),
    "ridge-mean": _linear("mean"),
}
