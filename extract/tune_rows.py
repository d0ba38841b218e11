"""The rows that an adapter learns from, and those that decide which of its epochs is best."""

from collections.abc import Sequence
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


def check_room(
    split: str, tokens: Sequence[np.ndarray], max_length: int, *, context: int | None, model: str, answer: int
) -> None:
    """Refuse rows that are too long with an answer behind them; RAFT asks at a row's end, and cuts none.

    Args:
        split: its name.
        tokens: token ids of each row.
        max_length: the most a row may have.
        context: the most the LLM takes; None for any number.
        model: the LLM's name.
        answer: tokens of the longest answer.

    Raises:
        DataError: saying how many rows, and how long the longest is.
    """
    room = context - answer if context is not None else max_length
    most, longest = min(max_length, room), max(map(len, tokens))
    if longest > most:
        raise DataError(
            f"{sum(len(row) > most for row in tokens)} of {len(tokens)} rows of {split} are longer than {most} tokens "
            f"(the longest has {longest})"
            + (
                f": RAFT reads answers of up to {answer} tokens after each, and the context of {model} holds "
                f"{context}; leave these rows out, or take a backbone with a longer context"
                if room <= max_length
                else "; a larger --max-length keeps them whole"
            )
        )
