"""Rows of a cache for training: which ones, in batches, read ahead in a thread; and their statistics."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..cache.errors import DataError
from ..cache.reader import FeatureCache, Split
from ..cache.validation import VALIDATION_NAMES, held_out
from .pooled import pool
from .settings import CLOSED_FORM, MIX, Layer, TrainSettings
from .shared import own_tokens

_AHEAD = 3  # batches read ahead
_SLOTS = 8192  # token slots of a batch that needs no gradient, over all layers
_SAMPLE = 1 << 16  # tokens, of whole rows, whose pooled vectors stand for all as well: training starts at once


class TrainBatch(NamedTuple):
    """B rows of a split."""

    hidden: Tensor
    """(B, T, D), or (B, K, T, D) for a mix of K layers, zero where padded: in the storage dtype, pooled in float32."""
    mask: Tensor
    """(B, T) bool, True = real token."""
    target: Tensor
    """(B,) float32."""


class Readable(Protocol):
    """N rows that a head is trained on or predicts."""

    @property
    def target(self) -> np.ndarray:
        """(N,) gold scores."""
        ...

    def batches(self) -> list[np.ndarray]:
        """Batches for prediction."""
        ...

    def read(self, batch: np.ndarray) -> TrainBatch:
        """The rows of a batch, of numbers within these rows."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Rows:
    """Some rows of a split."""

    split: Split
    index: np.ndarray
    """(N,) numbers of the rows in the split."""

    @property
    def target(self) -> np.ndarray:
        """(N,) gold scores."""
        return self.split.target[self.index]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) real tokens."""
        return self.split.lengths[self.index]

    def batches(self) -> list[np.ndarray]:
        """Batches for prediction (`ordered_batches`), as large in memory however many layers the split is open at."""
        return ordered_batches(self.lengths, _SLOTS // len(self.split.layers))

    def read(self, batch: np.ndarray) -> TrainBatch:
        """The rows of a batch, of numbers within these rows."""
        index = self.index[batch]
        hidden, mask = self.split.read(index)
        return TrainBatch(hidden, mask, torch.from_numpy(self.split.target[index]).float())

    def __len__(self) -> int:
        return len(self.index)


def open_split(cache: FeatureCache, name: str, layer: Layer | None) -> Split:
    """The rows of a split as heads read them: at one layer, or at all for a mix.

    Raises:
        CacheError: as `FeatureCache.split` does.
    """
    return cache.split(name, layer="all" if layer == MIX else layer)


def training_rows(cache: FeatureCache, settings: TrainSettings) -> tuple[Rows, Rows]:
    """The rows to learn from and the rows that early stopping looks at.

    Raises:
        CacheError: if a split is missing or unfinished.
        DataError: if there are too few rows, or rows without a label, or nothing to tell the best epoch by.
    """
    train = open_split(cache, "train", settings.layer)
    names = [settings.val_split] if settings.val_split is not None else list(VALIDATION_NAMES)
    found = next((name for name in names if name in cache.splits or name == settings.val_split), None)
    everything = np.arange(len(train))
    if found is not None:
        val = open_split(cache, found, settings.layer)
        chosen = Rows(train, everything), Rows(val, np.arange(len(val)))
    else:
        held = held_out(len(train), settings.val_fraction)
        chosen = Rows(train, np.setdiff1d(everything, held)), Rows(train, held)
    for rows in chosen:
        split = rows.split
        unlabelled = np.flatnonzero(np.isnan(split.target))  # of the whole split, whatever of it is held out
        if len(unlabelled):
            first = unlabelled[0]
            raise DataError(
                f"{len(unlabelled)} of {len(split)} rows of the split {split.name!r} of the cache {cache.folder} have "
                f"no label, first row {split.row[first]} (id {split.ids[first]!r}); all need one: fill them in, or "
                "leave those rows out, and extract into another folder"
            )
    if len(chosen[0]) < 2:
        held = f" are left after {len(chosen[1])} of {len(train)} was held out for validation" if found is None else ""
        raise DataError(
            f"{len(chosen[0])} training rows of the cache {cache.folder}{held}; at least 2 are needed: extract more "
            "rows"
        )
    learnt = any(head not in CLOSED_FORM for head in settings.heads)
    if learnt and settings.best_by == "pearson" and np.ptp(chosen[1].target) == 0:
        raise DataError(
            f"no epoch is best by Pearson: the labels of the {len(chosen[1])} validation rows of the cache "
            f"{cache.folder} are all the same. Leave best_by at nrmse, or extract more validation rows"
        )
    return chosen


def shuffled_batches(rows: Readable, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """One epoch's batches: numbers within `rows`, each once, in random order."""
    order = generator.permutation(len(rows))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def ordered_batches(lengths: np.ndarray, slots: int = _SLOTS) -> list[np.ndarray]:
    """Batches for prediction: rows of like length together, at most so many token slots in each."""
    order = np.argsort(-lengths, kind="stable")
    batches, begin = [], 0
    while begin < len(order):
        size = max(1, slots // int(lengths[order[begin]]))
        batches.append(order[begin : begin + size])
        begin += size
    return batches


def read_ahead(rows: Readable, batches: Sequence[np.ndarray], *, pinned: bool = False) -> Iterator[TrainBatch]:
    """Read batches in a thread, a few ahead of the one that is used.

    Args:
        rows: from which.
        batches: numbers within `rows`.
        pinned: into memory that a CUDA device fetches by itself.
    """

    def read(batch: np.ndarray) -> TrainBatch:
        whole = rows.read(batch)
        return TrainBatch(*(part.pin_memory() for part in whole)) if pinned else whole

    with ThreadPoolExecutor(1, thread_name_prefix="relish-read") as pool_:
        waiting = [pool_.submit(read, batch) for batch in batches[:_AHEAD]]
        for number in range(len(batches)):
            batch = waiting.pop(0).result()
            if number + _AHEAD < len(batches):
                waiting.append(pool_.submit(read, batches[number + _AHEAD]))
            yield batch


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and standard deviation (D,) in float32; both (K, D) where K layers are read, each by itself."""

    mean: Tensor
    std: Tensor


def sample_rows(rows: Rows, *, tokens: int, skip: int) -> Rows:
    """Some of the rows, always the same ones: as many as have so many tokens besides the first `skip` of each."""
    order = np.random.default_rng(0).permutation(len(rows))
    enough = int(np.searchsorted(np.cumsum(rows.lengths[order] - skip), tokens)) + 1
    return Rows(rows.split, np.sort(rows.index[order[:enough]]))


def feature_moments(rows: Rows, pooling: str | None, *, skip: int = 0) -> Moments:
    """Moments of what a head reads, estimated from a sample of the rows, always the same one.

    Args:
        rows: the training rows.
        pooling: None for the moments of each real token, otherwise those of the pooled vector of each row.
        skip: tokens at the beginning of each row that it does not read.
    """
    sample = sample_rows(rows, tokens=_SAMPLE, skip=skip)
    sums = [_Sums() for _ in sample.split.layers]
    stacked = sample.split.stacked
    for hidden, mask, _ in read_ahead(sample, sample.batches()):
        own = own_tokens(mask, skip)
        for layer, one in zip(hidden.unbind(dim=1) if stacked else (hidden,), sums, strict=True):
            one.add((layer[own] if pooling is None else pool(layer, own, pooling)).double())
    mean, std = (torch.stack(parts) for parts in zip(*(one.moments() for one in sums), strict=True))
    return Moments(mean, std) if stacked else Moments(mean[0], std[0])


class _Sums:
    """Running sums over values (N, D) in float64, less the mean of the first: far from 0, squares would lose digits."""

    def __init__(self) -> None:
        self._count = 0
        self._total = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)
        self._shift: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add values (N, D), which are overwritten."""
        if self._shift is None:
            self._shift = values.mean(dim=0)
        values -= self._shift
        self._count += len(values)
        self._total = self._total + values.sum(dim=0)
        self._squares = self._squares + values.square_().sum(dim=0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and standard deviation (D,) in float32."""
        assert self._shift is not None
        mean = self._total / self._count
        std = (self._squares / self._count - mean * mean).clamp_min(0.0).sqrt()
        return (mean + self._shift).float(), std.float()
