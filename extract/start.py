"""What all rows of a split begin with, such as a prompt's instructions: read once, and gone on from by every batch."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SHORTEST = 8
"""Tokens below which reading them once saves less than it takes."""


@dataclass(frozen=True, eq=False)
class Start:
    """P tokens that a model has read."""

    ids: np.ndarray
    """(P,) token ids."""
    past: Any
    """Their keys and values, a DynamicCache of transformers."""
    states: "torch.Tensor"
    """(1, K, P, D) hidden states."""

    def __len__(self) -> int:
        return len(self.ids)

    def begins(self, rows: Sequence[np.ndarray]) -> bool:
        """Whether all rows begin with it, and go on."""
        P = len(self)
        return all(len(row) > P and np.array_equal(row[:P], self.ids) for row in rows)


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with; one less than the shortest row at most, so that each has one of its own."""
    length = min(len(row) for row in rows) - 1
    for row in rows[1:]:
        different = np.flatnonzero(rows[0][:length] != row[:length])
        if len(different):
            length = int(different[0])
    return length


def fork(past: Any, rows: int = 1) -> Any:
    """A cache of transformers that may grow without changing the first one; keys and values are shared until then.

    Args:
        past: a DynamicCache of one row.
        rows: how many rows go on from it.
    """
    past = copy.copy(past)
    past.layers = [copy.copy(layer) for layer in past.layers]
    for layer in past.layers if rows > 1 else ():
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return past


def close(states: "torch.Tensor", expected: "torch.Tensor") -> bool:
    """Whether two (1, K, T, D) states are the same but for rounding, in each dimension by its own size."""
    import torch

    share = 1e-3 if states.dtype == torch.float32 else 0.1
    states, expected = states.float(), expected.float()
    off, size = ((value.abs().amax(dim=2)) for value in (states - expected, expected))
    return bool((off <= share * size).all())
