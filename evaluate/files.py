"""Results as files for scripts: results.json, results.csv and predictions.csv; and how a report folder changes."""

import csv
import io
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import RunError
from ..cache.fileio import sync_folder, write_json_durably, write_text_durably
from ..cache.lock import lock_folder
from ..train.metrics import METRICS
from ..train.saving import writing
from .summary import EXTRAS, Results

COMPARISON_FILES = ("comparison.json", "comparison.md", "depth.png", "comparison.html")
REPORT_FILES = ("results.json", "results.csv", "predictions.csv", "scatter.png", "depth.png", "report.html")
_STAGE = ".report.tmp"


def refuse_read_only(wanted: Path, folder: Path) -> None:
    """Refuse what would have to be written where nothing can be.

    Args:
        wanted: the file or folder, for people.
        folder: where new files are to lie; it and its parents need not be there yet.

    Raises:
        RunError: naming both.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"{wanted} cannot be written: {there} is a file, and no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{wanted} cannot be written: no permission in {there}, or a read-only disk; choose another one")


def check_report_folder(folder: Path, files: Sequence[str] = REPORT_FILES) -> None:
    """Refuse a place that is no folder for a report: new, empty, or with an earlier report's files alone.

    Args:
        folder: the place.
        files: what a report of this kind is made of.

    Raises:
        RunError: naming a file that is none of a report's, or a folder that cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; the report needs a folder")
    refuse_read_only(folder, folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    others = [name for name in names if name not in files and not name.startswith(".")]
    if others:
        kind = "report" if "report.html" in files else "comparison"
        raise RunError(f"{folder} holds other files than a {kind}'s, such as {others[0]}; choose a new or empty folder")


@contextmanager
def changing_report(folder: Path, files: Sequence[str] = REPORT_FILES) -> Iterator[Path]:
    """Give a hidden folder to write a report's files into; they move into `folder` once all are complete.

    So a full disk or a killed process leaves the old report as it was, unless it is killed between two renames: then
    some files are old and some new, each of them whole, and evaluating again puts that right.

    Raises:
        RunError: if another process is at it, or naming the folder, if it cannot be written.
    """
    kept = "what the folder held before is kept"
    with writing(folder, kept), lock_folder(folder, RunError):
        stage = folder / _STAGE
        shutil.rmtree(stage, ignore_errors=True)
        try:
            stage.mkdir()
            yield stage
            for path in stage.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            for name in files:
                if (stage / name).exists():
                    (stage / name).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)  # an old plot would show other results
            sync_folder(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def results_json(results: Results) -> dict[str, Any]:
    """The content of results.json; NaN becomes None.

    A cell has "status" only where that is not "ok", "note" only if there is one, and "answers" only where the LLM
    itself answered.
    """
    cells = []
    for cell in results.cells:
        entry: dict[str, Any] = {"head": cell.head, "depth": cell.depth, "seed": cell.seed}
        entry |= {"parameters": cell.parameters, **cell.metrics, **cell.extras}
        if cell.status != "ok":
            entry["status"] = cell.status
        if cell.note:
            entry["note"] = cell.note
        if cell.answers is not None:
            entry["answers"] = cell.answers
        cells.append(entry)
    groups = [
        {"head": g.head, "depth": g.depth, "seeds": g.seeds, "parameters": g.parameters, **g.metrics, **g.extras}
        | ({"averaged": g.averaged} if g.averaged is not None else {})
        | ({"note": g.note} if g.note else {})
        for g in results.groups
    ]
    return plain(
        {
            "split": results.split,
            "rows": results.rows,
            "label_range": results.label_range,
            "cells": cells,
            "groups": groups,
            "meta": results.meta,
        }
    )


def plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_results(results: Results, folder: Path) -> None:
    """Write results.json, results.csv (a line for each cell) and predictions.csv (for each cell and row).

    Ids may repeat, within a split and across splits; `row`, the position in the input file, tells such rows apart.
    Cells that diverged in training have a line in results.csv and none in predictions.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json_durably(folder / "results.json", results_json(results))

    lines: list[list[object]] = [["head", "depth", "seed", "parameters", "status", *METRICS, *EXTRAS]]
    for cell in results.cells:
        figures = [_csv_number(cell.metrics[name]) for name in METRICS]
        extras = ["" if (value := cell.extras.get(name)) is None else value for name in EXTRAS]
        lines.append([cell.head, cell.depth, cell.seed, cell.parameters, cell.status, *figures, *extras])
    write_text_durably(folder / "results.csv", _csv(lines))

    lines = [["head", "depth", "seed", "id", "row", "target", "prediction"]]
    rows = list(zip(results.ids, results.row.tolist(), results.target.tolist(), strict=True))
    for cell, values in zip(results.cells, results.predictions.tolist(), strict=True):
        if np.isnan(values).all():
            continue
        name = (cell.head, cell.depth, cell.seed)
        lines += [[*name, *row, _csv_number(value)] for row, value in zip(rows, values, strict=True)]
    write_text_durably(folder / "predictions.csv", _csv(lines))


def _csv_number(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _csv(lines: list[list[object]]) -> str:
    written = []
    for line in lines:
        # Of the writer's own line ends a field is quoted where it holds one: a lone carriage return too.
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\r\n").writerow(line)
        written.append(text.getvalue().removesuffix("\r\n") + "\n")
    return "".join(written)
