"""What all rows of a split begin with, such as a prompt's instructions: read once, and gone on from by every batch."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_SHORTEST, _SHARE = 8, 0.1
"""Fewer tokens, or a smaller share of all, save less than keys and values take to be kept and copied."""


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


def worth_reading_once(shared: int, rows: Sequence[np.ndarray]) -> bool:
    """Whether rows are read faster after what they begin with."""
    return len(rows) > 1 and shared >= _SHORTEST and shared * len(rows) >= _SHARE * sum(map(len, rows))


def slots(length: int, read: int) -> int:
    """What a row of so many tokens, of which some are read already, counts in the budget of a batch.

    Its own tokens are computed; but all of its states, keys and values are in memory.
    """
    return max(length - read, -(-length // 2))


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
    """Whether two (K, T, D) states are the same but for rounding, in each dimension by its own size."""
    import torch

    share = 1e-3 if states.dtype == torch.float32 else 0.1
    states, expected = states.float(), expected.float()
    off, size = ((value.abs().amax(dim=1)) for value in (states - expected, expected))
    return bool((off <= share * size).all())
