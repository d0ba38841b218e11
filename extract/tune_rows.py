"""The rows that an adapter learns from, and those that decide which of its epochs is best."""

from dataclasses import dataclass

import numpy as np

from ..cache.errors import DataError
from ..cache.validation import VALIDATION_NAMES, held_out
from .rows import SplitData
from .sources import TextData

_HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class TuneRows:
    """Some rows of a split."""

    name: str
    split: SplitData
    index: np.ndarray
    """(N,) numbers of the rows in the split, ascending."""

    @property
    def texts(self) -> list[str]:
        """N filled prompts."""
        return [self.split.texts[row] for row in self.index]

    @property
    def target(self) -> np.ndarray:
        """(N,) float64 gold scores."""
        return self.split.targets[self.index]

    def __len__(self) -> int:
        return len(self.index)


def choose_rows(data: TextData, count: int | None) -> tuple[TuneRows, TuneRows]:
    """Training and validation rows: the first split called validation, val, dev or trial, or a tenth of train held out.

    Args:
        data: all splits.
        count: how many training rows to keep; the same ones each time.

    Raises:
        DataError: if there is no split train, there are too few rows, or rows without a label.
    """
    if "train" not in data.splits:
        raise DataError(f"an adapter learns from the split train, and there is only {', '.join(data.splits)}")
    train = data.splits["train"]
    everything = np.arange(len(train.texts))
    name = next((name for name in VALIDATION_NAMES if name in data.splits), None)
    if name is not None:
        val = TuneRows(name, data.splits[name], np.arange(len(data.splits[name].texts)))
    else:
        held = held_out(len(everything), _HELD_OUT)
        everything = np.setdiff1d(everything, held)
        val = TuneRows("train", train, held)
    if count is not None:
        if count > len(everything):
            raise DataError(f"--rows asks for {count:,} training rows, and there are {len(everything):,}")
        everything = np.sort(np.random.default_rng(0).permutation(everything)[:count])
    chosen = TuneRows("train", train, everything)
    if len(chosen) < 2:
        raise DataError(f"{len(chosen)} training rows are left, and at least 2 are needed")
    for rows in (chosen, val):
        split = rows.split
        unlabelled = np.flatnonzero(np.isnan(split.targets))
        if len(unlabelled):
            raise DataError(
                f"{len(unlabelled)} of {len(split.targets)} rows of the split {rows.name!r} have no label, first row "
                f"{unlabelled[0]} (id {split.ids[unlabelled[0]]!r}); all need one: fill them in, or leave those "
                "rows out"
            )
    return chosen, val
