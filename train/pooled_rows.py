"""What rows pool to, computed once: heads that pool read nothing else of them, in every step and epoch again."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .data import Rows, TrainBatch, ordered_batches, read_ahead
from .pooled import pool
from .saving import writing
from .shared import own_tokens


@dataclass(frozen=True)
class PooledRows:
    """Rows of a single token, the pooled hidden states, which a head that pools predicts the same of."""

    vectors: np.ndarray
    """(N, D) float32, or (N, K, D) where a mix of K layers is read, in some order; in a file without a name."""
    place: np.ndarray
    """(N,) where each row is among them."""
    target: np.ndarray
    """(N,) gold scores."""

    def batches(self) -> list[np.ndarray]:
        """Batches for prediction."""
        return ordered_batches(np.full(len(self), self.vectors[0].size // self.vectors.shape[-1]))

    def read(self, batch: np.ndarray) -> TrainBatch:
        """The rows of a batch, of numbers within these rows: hidden states (B, 1, D) or (B, K, 1, D)."""
        vectors = torch.from_numpy(np.asarray(self.vectors[self.place[batch]])).unsqueeze(-2)
        mask = torch.ones(len(batch), 1, dtype=torch.bool)
        return TrainBatch(vectors, mask, torch.from_numpy(self.target[batch]).float())

    def __len__(self) -> int:
        return len(self.vectors)


def pooled_rows(rows: Rows, pooling: str, *, skip: int, folder: Path) -> PooledRows:
    """Pool rows in one pass.

    Args:
        rows: at one layer, or at several, each pooled by itself.
        pooling: as `pool` takes it.
        skip: tokens at the beginning of each row that are left out.
        folder: on a disk with room for the vectors; the file there has no name, and goes with its last user.

    Raises:
        CacheError: if a shard is damaged.
        RunError: if the disk is full.
    """
    order = rows.batches()
    place = np.empty(len(rows), dtype=np.int64)
    place[np.concatenate(order)] = np.arange(len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    shape = ()
    with (
        writing(folder / "pooled hidden states", "finished cells are kept"),
        tempfile.TemporaryFile(dir=folder, prefix=".pooled-") as file,
    ):
        for hidden, mask, _ in read_ahead(rows, order):
            own = own_tokens(mask, skip)
            layers = hidden.unbind(dim=1) if rows.split.stacked else (hidden,)
            vectors = torch.stack([pool(layer, own, pooling) for layer in layers], dim=1).numpy()
            shape = vectors.shape[1:] if rows.split.stacked else vectors.shape[2:]
            file.write(vectors.tobytes())
        file.flush()
        stored = np.memmap(file, dtype=np.float32, mode="r", shape=(len(rows), *shape))
    return PooledRows(stored, place, rows.target)
