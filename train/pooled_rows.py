"""What rows pool to, computed once: heads that pool read nothing else of them, in every step, epoch and seed again."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from .data import Rows, TrainBatch, ordered_batches, read_ahead
from .pooled import pool
from .saving import writing
from .shared import own_tokens

_ROWS = 512  # of a batch for prediction, over all layers: an MLP's middle is several times as wide as its input


@dataclass(frozen=True)
class PooledRows:
    """Rows of a single token, the pooled hidden states, of which a head that pools predicts the same."""

    file: Path
    shape: tuple[int, ...]
    """Of what is in the file, float32: (N, D), or (N, K, D) where a mix of K layers is read."""
    place: np.ndarray
    """(N,) where each row is in it."""
    target: np.ndarray
    """(N,) gold scores."""

    @cached_property
    def vectors(self) -> np.ndarray:
        """What is in the file."""
        # Mapped, so that it takes no memory of its own: the file is the training's, and nobody else shortens it.
        return np.memmap(self.file, dtype=np.float32, mode="r", shape=self.shape)

    def batches(self) -> list[np.ndarray]:
        """Batches for prediction."""
        layers = self.shape[1] if len(self.shape) > 2 else 1
        return ordered_batches(np.full(len(self), layers), _ROWS)

    def read(self, batch: np.ndarray) -> TrainBatch:
        """The rows of a batch, of numbers within these rows: hidden states (B, 1, D) or (B, K, 1, D) in float32."""
        vectors = torch.from_numpy(np.asarray(self.vectors[self.place[batch]])).unsqueeze(-2)
        mask = torch.ones(len(batch), 1, dtype=torch.bool)
        return TrainBatch(vectors, mask, torch.from_numpy(self.target[batch]).float())

    def __len__(self) -> int:
        return self.shape[0]


def pooled_rows(rows: Rows, pooling: str, *, skip: int, file: Path) -> PooledRows:
    """Pool rows in one pass over the cache.

    Args:
        rows: at one layer, or at several, each pooled by itself.
        pooling: as `pool` takes it.
        skip: tokens at the beginning of each row that are left out.
        file: where the vectors go: N × D × 4 bytes a layer.

    Raises:
        CacheError: if a shard is damaged.
        RunError: if the file cannot be written.
    """
    order = rows.batches()
    place = np.empty(len(rows), dtype=np.int64)
    place[np.concatenate(order)] = np.arange(len(rows))
    shape = ()
    with writing(file, "finished cells are kept"), file.open("wb") as stored:
        for hidden, mask, _ in read_ahead(rows, order):
            own = own_tokens(mask, skip)
            layers = hidden.unbind(dim=1) if rows.split.stacked else (hidden,)
            vectors = torch.stack([pool(layer, own, pooling) for layer in layers], dim=1).numpy()
            shape = vectors.shape[1:] if rows.split.stacked else vectors.shape[2:]
            stored.write(vectors.tobytes())
    return PooledRows(file, (len(rows), *shape), place, rows.target)
