"""A report folder, read back: the methods of one data set and LLM, for `relish compare`.

Reports that an earlier relish wrote lack validation figures, costs and the data set's name; everything else is there.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import RunError
from ..train.metrics import METRICS, label_width, score
from .bootstrap import intervals
from .compare_methods import Method, name_states
from .significance import Seed
from .summary import BACKBONE_FILES, EXTRAS, LEARNED_FROM, VALIDATED_ON, Estimate, estimates, sum_if_known

Array = NDArray[np.float64]
_LONGEST = 2**31 - 1  # characters of an id


@dataclass(frozen=True)
class Source:
    """A report folder, and what its user calls its parts; an empty name leaves what the report says."""

    path: Path
    dataset: str = ""
    backbone: str = ""
    variant: str = ""


@dataclass(frozen=True, eq=False)
class Entry:
    """One method in one place."""

    method: Method
    seeds: tuple[Seed, ...]
    """Of its cells that count; 0 alone for the mean over them."""
    predictions: Array
    """(S, N), in the order of `seeds`."""
    metrics: dict[str, Estimate]
    """Means over the seeds, for each name in METRICS; or of the mean prediction over them."""
    parameters: int | None
    """All that were trained, those of the adapter too; None where the report does not say how many these are."""
    extras: dict[str, float | None]
    """For each name in EXTRAS; the validation figures are means over the seeds."""
    averaged_seeds: int
    """How many seeds each prediction is the mean over; 1 where each seed stands for itself."""
    note: str
    layer: str
    """Which of the backbone's layers it reads, as the report says it."""
    validated_on: str = ""
    """Which rows its validation figures are of, as the report says it."""
    tunings: int = 1
    """How many of the LLM, which differ in the seed alone, its predictions are of; 1 for a frozen LLM too."""
    rejected: tuple["Entry", ...] = ()
    """The same method at layers of other reports, where its validation figures are worse."""

    @property
    def seed_count(self) -> int:
        """How many seeds its figures are of, be they means over seeds or of the mean prediction over them."""
        return max(len(self.seeds), self.averaged_seeds)


@dataclass(frozen=True)
class Tuning:
    """Of the adapter of one report, as far as the report says it."""

    seed: int
    about: str
    """All that the report says but that seed and what depends on it: the recipes of tuning and heads, rows, layer."""


@dataclass(frozen=True, eq=False)
class Place:
    """One data set with one LLM, and every method there."""

    dataset: str
    backbone: str
    split: str
    label_range: tuple[float, float]
    ids: list[str]
    row: list[int]
    """Positions in the input file, N of them."""
    target: Array
    """(N,) gold scores."""
    backbone_parameters: int | None
    """None where the report does not say."""
    entries: list[Entry]
    notes: list[str]
    """Sentences on what does not count, or must be known."""
    source: Path
    """The first report of the place, for messages."""
    learned_from: dict[str, Any]
    """What reports say of the rows that heads were trained on and chosen by."""
    adapters: dict[str, tuple[str, ...]]
    """What methods on tuned states are told apart by ("lora", "lora (3e-4)"), to the hashes of the adapters that stand
    for it: one, or several that differ in the seed alone."""
    backbone_files: str = ""
    """Hashes of the LLM's files, short; empty where the report does not say."""
    tuning: Tuning | None = None
    """Of a single report; None for a frozen LLM, and where the report does not say."""


def load_report(source: Source, *, average: bool = False) -> Place:
    """Read results.json and predictions.csv of one report folder.

    Args:
        source: the folder.
        average: whether a method predicts the mean over its seeds, as one would for new texts; it then costs the
            weights and the training of them all.

    Raises:
        RunError: if it is no report folder, is damaged, says no data set, or its two files do not belong together.
    """
    path = source.path
    results = _read_results(path)
    try:
        meta = results["meta"]
        dataset = source.dataset or meta.get("task")
        if not dataset:
            raise RunError(
                f"{path / 'results.json'} does not say what its data set is called; name it: NAME={path}"
                + ("" if "task" in meta else " (reports say it since they name their task; evaluating again helps too)")
            )
        adapter = adapter_name(meta)
        tuned = tuning_costs(meta)
        groups = {(g["head"], g["depth"]): g for g in results["groups"]}
        low, high = results["label_range"]
        label_width((low, high))
        predictions = _read_predictions(path / "predictions.csv")
        entries, notes = [], []
        for (head, depth), group in groups.items():
            method = Method(head, depth, adapter, source.variant)
            cells = [c for c in results["cells"] if (c["head"], c["depth"], "status" in c) == (head, depth, False)]
            lines = [predictions.values[head, depth, cell["seed"]] for cell in cells]
            for cell, line in zip(cells, lines, strict=True):
                _refuse_other_figures(path, cell, line, predictions.target, (low, high))
            values = np.stack(lines)
            together = len(lines) if average else 1
            metrics = {name: _estimate(group[name]) for name in METRICS}
            if together > 1:
                notes += [
                    f"{method.label}: seed {cell['seed']} predicts one score for all rows, and is part of the mean"
                    for cell, line in zip(cells, lines, strict=True)
                    if np.ptp(line) == 0
                ]
                values = values.mean(axis=0, keepdims=True)
                metrics = figures_of(predictions.target, values, (low, high))
            seconds = _head_seconds(group)
            entries.append(
                Entry(
                    method=method,
                    seeds=tuple(cell["seed"] for cell in cells) if together == 1 else (0,),
                    predictions=values,
                    metrics=metrics,
                    parameters=sum_if_known([together * group["parameters"], tuned["parameters"]]),
                    extras={
                        **{name: group.get(name) for name in EXTRAS},
                        **({"seconds_per_1000_rows": None} if together > 1 else {}),
                        "train_seconds": sum_if_known(
                            [together * seconds if seconds is not None else None, tuned["seconds"]]
                        ),
                    },
                    averaged_seeds=together,
                    note=group.get("note", ""),
                    layer=str(meta.get("layer", "")),
                    validated_on=str(meta.get(VALIDATED_ON, "")),
                )
            )
        learned, tuned_on = meta.get("training rows"), _integer(meta.get("adapter rows"))
        if None not in (learned, tuned_on) and learned != tuned_on:
            name = name_states(adapter, source.variant)
            notes.append(f"{name}: the LLM was tuned on {tuned_on:,} rows, and heads on its states on {learned:,}")
        for cell in results["cells"]:
            if "status" in cell:
                label = Method(cell["head"], cell["depth"], adapter, source.variant).label
                status = " ".join(cell["status"].split())
                notes.append(f"{label}, seed {cell['seed']}, does not count: {status}")
        return Place(
            dataset=dataset,
            backbone=source.backbone or meta["model"],
            split=results["split"],
            label_range=(float(low), float(high)),
            ids=predictions.ids,
            row=predictions.row,
            target=predictions.target,
            backbone_parameters=_integer(meta.get("backbone parameters")),
            entries=entries,
            notes=notes,
            source=path,
            learned_from={name: meta[name] for name in LEARNED_FROM if name in meta},
            adapters={name_states(adapter, source.variant): (str(meta["adapter"]),)} if adapter else {},
            backbone_files=str(meta.get(BACKBONE_FILES, "")),
            tuning=_tuning(meta),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(path, repr(error)) from None


def adapter_name(meta: dict[str, Any]) -> str:
    """What tables call the adapter of a report; empty if its LLM is frozen."""
    if not meta.get("adapter"):
        return ""
    return str(meta.get("adapter method") or "tuned")


def tuning_costs(meta: dict[str, Any]) -> dict[str, int | float | None]:
    """What the adapter adds to what a head costs: "parameters" and "seconds"; 0 without one, None if not known."""
    if not meta.get("adapter"):
        return {"parameters": 0, "seconds": 0}
    seconds = meta.get("adapter seconds")
    return {
        "parameters": _integer(meta.get("adapter parameters")),
        "seconds": float(str(seconds).replace(",", "")) if seconds is not None else None,
    }


_MAY_DIFFER = ("adapter", "adapter recipe", "adapter seed", "adapter seconds", "relish", "torch", "device")
_NAMES = ("task", "model", "revision")  # of the same rows and files, of which there are hashes


def _tuning(meta: dict[str, Any]) -> Tuning | None:
    kind, seed = meta.get("adapter kind"), meta.get("adapter seed")
    if not meta.get("adapter") or None in (kind, seed):
        return None
    about = {
        name: value
        for name, value in meta.items()
        if name not in (*_MAY_DIFFER, *_NAMES) and not name.startswith("layer mix of ")
    }
    return Tuning(int(str(seed)), json.dumps(about, sort_keys=True))


def _head_seconds(group: dict[str, Any]) -> float | None:
    return 0.0 if group["parameters"] == 0 else group.get("train_seconds")


def _read_results(path: Path) -> dict[str, Any]:
    file = path / "results.json"
    if path.is_file():
        raise RunError(f"{path} is a file; name the folder of the report, as in relish compare {path.parent}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        trained = any(path.glob("*-seed*/config.json"))
        way = f"relish evaluate {path} --out REPORT" if trained else f"relish evaluate RUNS --out {path}"
        raise RunError(f"{path} is no report folder: it has no results.json; make one with: {way}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str((isinstance(error, OSError) and error.strerror) or error)) from None
    if not isinstance(results, dict):
        raise _damaged(path, "results.json is no object")
    return results


@dataclass(frozen=True, eq=False)
class _Predictions:
    ids: list[str]
    row: list[int]
    target: Array
    values: dict[tuple[str, int, int], Array]
    """(head, depth, seed) to (N,)."""


def _read_predictions(path: Path) -> _Predictions:
    """Read predictions.csv, whose cells follow one another, each with the same rows.

    Raises:
        RunError: if it is missing.
        ValueError: if it is not so.
    """
    rows: list[tuple[str, str, str]] = []
    values: dict[tuple[str, int, int], list[float]] = {}
    csv.field_size_limit(_LONGEST)
    try:
        for (head, depth, seed), row, value in _csv_lines(path):
            cell = values.setdefault((head, int(depth), int(seed)), [])
            if len(values) == 1:
                rows.append(row)
            elif row != rows[len(cell)]:
                raise ValueError(f"{path.name} has other rows for {head}, seed {seed}")
            cell.append(float(value) if value else math.nan)
    except csv.Error as error:
        raise ValueError(f"{path.name}: {error}") from None
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror or error}); evaluate again with --out {path.parent}"
        ) from None
    if any(len(cell) != len(rows) for cell in values.values()):
        raise ValueError(f"{path.name} is cut off")
    return _Predictions(
        ids=[name for name, _, _ in rows],
        row=[int(row) for _, row, _ in rows],
        target=np.array([float(target) for _, _, target in rows]),
        values={name: np.array(cell) for name, cell in values.items()},
    )


def _csv_lines(path: Path) -> Iterator[tuple[tuple[str, str, str], tuple[str, str, str], str]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if next(lines, None) != ["head", "depth", "seed", "id", "row", "target", "prediction"]:
            raise ValueError(f"{path.name} has other columns")
        for head, depth, seed, name, row, target, value in lines:
            yield (head, depth, seed), (name, row, target), value


def _integer(value: object) -> int | None:
    """Of a number as a cache's made_by has it: "134,515,008"."""
    return int(str(value).replace(",", "")) if value is not None else None


def _estimate(value: dict[str, Any]) -> Estimate:
    def number(item: float | None) -> float:
        return math.nan if item is None else float(item)

    low, high = value["ci95"]
    return {"mean": number(value["mean"]), "sd": number(value["sd"]), "ci95": (number(low), number(high))}


def figures_of(target: Array, values: Array, label_range: tuple[float, float]) -> dict[str, Estimate]:
    """Of predictions (S, N) of S seeds."""
    scores = [score(target, line, label_range) for line in values]
    return estimates(scores, intervals(target, values, label_range))


def _refuse_other_figures(
    path: Path, cell: dict[str, Any], line: Array, target: Array, label_range: tuple[float, float]
) -> None:
    nrmse = math.sqrt(float(np.mean((line - target) ** 2))) / label_width(label_range)
    if not math.isclose(nrmse, cell["nrmse"], rel_tol=1e-6, abs_tol=1e-9):
        raise _damaged(path, "results.json and predictions.csv are of different evaluations")


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"the report {path} cannot be used ({why}); evaluate again with --out {path}")
