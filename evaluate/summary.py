"""From predictions to results: figures for each cell, and groups over seeds.

A cell is one trained head (head kind, depth, seed); a group is the cells that differ in the seed alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import RelishError
from ..cache.manifest import TRAIN
from ..train.metrics import METRICS, score
from .bootstrap import intervals

EXTRAS: tuple[str, ...] = ("val_nrmse", "val_pearson", "train_seconds", "seconds_per_1000_rows")
"""What results.json says of each cell and group besides its figures: how to choose among them, and what they cost."""

BACKBONE_FILES = "backbone files"
"""What a report's `meta` calls the hashes of the LLM's files, short."""
TRAINED_ON = "training data"
VALIDATED_ON = "validation data"
LEARNED_FROM = ("training rows", TRAINED_ON, VALIDATED_ON)
"""What a report's `meta` says of what heads were trained on and chosen by; of the last two a hash of ids, filled
prompts, labels and tokens. Of a cache without heads it says the second, of the rows that examples are from, and
the third where the answers have validation figures."""


def flattering(split: str, validated_on: str) -> str:
    """A clause on figures of a split that heads learned from or were chosen by; empty for another split.

    Args:
        split: which the figures are of.
        validated_on: what a report's `meta` says of the rows that heads were chosen by; empty if it is not known.
    """
    if split != TRAIN and not validated_on.startswith(f"{split},"):
        return ""
    return (
        f"figures on the split {split} flatter the heads, which learned from its rows or were chosen by them; evaluate "
        "a split that had no part in that"
    )


class Estimate(TypedDict):
    """One metric of a group, in the metric's unit."""

    mean: float
    """Over the seeds."""
    sd: float
    """Sample standard deviation over the seeds (ddof = 1); NaN for one seed."""
    ci95: tuple[float, float]
    """Percentile bootstrap interval of the mean, over rows."""


@dataclass(frozen=True, eq=False)
class CellPredictions:
    """What one trained head predicts: the input of `summarise`."""

    head: str
    depth: int
    """Number of cross-attention steps L; 0 for a head that has no depth."""
    seed: int
    parameters: int
    values: NDArray[np.floating]
    """(N,) predicted scores, in the label's unit."""
    status: str = "ok"
    """Anything else says in words why the cell must not count, such as "diverged"."""
    answers: dict[str, Any] | None = None
    """Of the LLM's own answers: shots, and how many were no number, replaced and clipped; None for a trained head."""
    val_nrmse: float | None = None
    """On the validation rows; None where there are none, or it is not known."""
    val_pearson: float | None = None
    train_seconds: float | None = None
    """What training took; None where nothing was trained, or it is not known."""
    seconds_per_1000_rows: float | None = None
    """What predicting takes, the LLM included; None if it is not known."""
    note: str = ""
    """What a reader of the figures must know, such as how many answers were no number."""


@dataclass(frozen=True)
class Cell:
    """The figures of one trained head; all NaN unless `status` is "ok"."""

    head: str
    depth: int
    seed: int
    parameters: int
    metrics: dict[str, float]
    status: str = "ok"
    answers: dict[str, Any] | None = None
    """As in `CellPredictions`."""
    extras: dict[str, float | None] = field(default_factory=dict)
    """For each name in EXTRAS; None where it is not known."""
    note: str = ""

    @property
    def label(self) -> str:
        """How text and legends call it."""
        return group_label(self.head, self.depth)


@dataclass(frozen=True)
class Summary:
    """The figures of one head and depth over its seeds; cells whose status is not "ok" do not count."""

    head: str
    depth: int
    seeds: int
    """How many."""
    parameters: int
    metrics: dict[str, Estimate]
    extras: dict[str, float | None] = field(default_factory=dict)
    """Means over the seeds; None where it is not known of each."""
    note: str = ""
    """The notes of its cells."""
    averaged: dict[str, float] | None = None
    """The metrics of the mean prediction over the seeds, as `relish predict` gives it of several runs; None for one."""

    @property
    def label(self) -> str:
        """How text and legends call it."""
        return group_label(self.head, self.depth)


@dataclass(frozen=True, eq=False)
class Results:
    """What the tables, plots and the report are made from. Cells and groups: other heads first, relish by depth."""

    split: str
    label_range: tuple[float, float]
    cells: list[Cell]
    groups: list[Summary]
    ids: list[str]
    row: NDArray[np.int64]
    """(N,) positions in the input file."""
    target: NDArray[np.float64]
    """(N,) gold scores."""
    predictions: NDArray[np.float64]
    """(cells, N), in the order of `cells`."""
    meta: dict[str, Any]
    """What made them (model, prompt, layers, …): shown in the report as it stands."""
    left_out: tuple[str, ...] = ()
    """A sentence for each readout that could not be used."""

    @property
    def rows(self) -> int:
        """N."""
        return len(self.target)

    @property
    def validated(self) -> bool:
        """Whether every group has validation figures to choose by."""
        return all(group.extras.get("val_nrmse") is not None for group in self.groups)

    @property
    def best(self) -> Summary | None:
        """The best of all groups, see `best_of`."""
        return self.best_of(self.groups)

    def best_of(self, groups: Sequence[Summary]) -> Summary | None:
        """That of the lowest validation NRMSE; where one of all groups has none, that of the highest mean Pearson on
        the rows at hand, or of the lowest NRMSE where no Pearson exists."""

        def key(group: Summary) -> tuple[float, float]:
            if self.validated:
                return (-(group.extras["val_nrmse"] or 0.0), 0.0)
            pearson = group.metrics["pearson"]["mean"]
            return (pearson if math.isfinite(pearson) else -2.0, -group.metrics["nrmse"]["mean"])

        return max(groups, key=key, default=None)

    @property
    def failed(self) -> list[Cell]:
        """The cells that do not count."""
        return [cell for cell in self.cells if cell.status != "ok"]

    def mean_prediction(self, group: Summary) -> NDArray[np.float64]:
        """(N,) predictions averaged over the group's seeds."""
        keep = [(c.head, c.depth, c.status) == (group.head, group.depth, "ok") for c in self.cells]
        return self.predictions[keep].mean(axis=0)


def summarise(
    split: str,
    label_range: Sequence[float],
    ids: Sequence[str],
    rows: Sequence[int] | NDArray[np.integer],
    targets: Sequence[float] | NDArray[np.floating],
    cells_with_predictions: Sequence[CellPredictions],
    meta: Mapping[str, Any],
    left_out: Sequence[str] = (),
) -> Results:
    """Compute every figure and interval of a split.

    A cell that predicts a value that is not finite keeps its place with the status "not finite" and counts in no group.

    Raises:
        RelishError: if there are no cells, two cells are the same, lengths differ, or targets or label range are wrong.
    """
    given = sorted(cells_with_predictions, key=lambda c: (c.head == "relish", c.head, c.depth, c.seed))
    if not given:
        raise RelishError("there are no trained heads to evaluate")
    target = np.asarray(targets, dtype=np.float64)
    for cell in given:
        if not len(ids) == len(rows) == len(target) == len(cell.values):
            raise RelishError(
                f"{group_label(cell.head, cell.depth)}, seed {cell.seed}, has {len(cell.values)} predictions for "
                f"{len(ids)} ids, {len(rows)} rows and {len(target)} targets"
            )
    for previous, cell in pairwise(given):
        if (previous.head, previous.depth, previous.seed) == (cell.head, cell.depth, cell.seed):
            raise RelishError(f"{group_label(cell.head, cell.depth)}, seed {cell.seed}, was given twice")

    predictions = np.stack([np.asarray(cell.values, dtype=np.float64) for cell in given])
    cells = []
    members: dict[tuple[str, int], list[int]] = {}
    for place, (cell, line) in enumerate(zip(given, predictions, strict=True)):
        status = cell.status if cell.status != "ok" or np.isfinite(line).all() else "not finite"
        metrics = score(target, line, label_range) if status == "ok" else dict.fromkeys(METRICS, math.nan)
        extras = {name: getattr(cell, name) for name in EXTRAS}
        about = {"status": status, "answers": cell.answers, "extras": extras, "note": cell.note}
        cells.append(Cell(cell.head, cell.depth, cell.seed, cell.parameters, metrics, **about))
        if status == "ok":
            members.setdefault((cell.head, cell.depth), []).append(place)

    groups = []
    for (head, depth), places in members.items():
        own = [cells[place] for place in places]
        figures = estimates([cell.metrics for cell in own], intervals(target, predictions[places], label_range))
        extras = {name: mean_if_known([cell.extras[name] for cell in own]) for name in EXTRAS}
        note = "; ".join(dict.fromkeys(cell.note for cell in own if cell.note))
        averaged = score(target, predictions[places].mean(axis=0), label_range) if len(places) > 1 else None
        groups.append(Summary(head, depth, len(places), own[0].parameters, figures, extras, note, averaged))
    return Results(
        split=split,
        label_range=(float(label_range[0]), float(label_range[1])),
        cells=cells,
        groups=groups,
        ids=[str(name) for name in ids],
        row=np.asarray(rows, dtype=np.int64),
        target=target,
        predictions=predictions,
        meta=dict(meta),
        left_out=tuple(left_out),
    )


def estimates(scores: Sequence[Mapping[str, float]], limits: Mapping[str, tuple[float, float]]) -> dict[str, Estimate]:
    """Mean and deviation of each of METRICS over the scores of several seeds, beside the interval of the mean."""
    found: dict[str, Estimate] = {}
    for name in METRICS:
        values = np.array([one[name] for one in scores])
        sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        found[name] = {"mean": float(values.mean()), "sd": sd, "ci95": limits[name]}
    return found


def mean_if_known(values: Sequence[float | None]) -> float | None:
    """The mean of values that are all known; else None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def sum_if_known(values: Sequence[Any]) -> Any:
    """The sum of numbers that are all known; else None."""
    return None if None in values else sum(values)


def group_label(head: str, depth: int) -> str:
    """`relish, L = 3`, or `ridge` for a head without depth."""
    return f"{head}, L = {depth}" if depth else head
