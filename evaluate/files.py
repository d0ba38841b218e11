"""Results as files for scripts: results.json, results.csv and predictions.csv."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.fileio import write_json_durably, write_text_durably
from ..train.metrics import METRICS
from .summary import Results


def results_json(results: Results) -> dict[str, Any]:
    """The content of results.json; NaN becomes None. A cell has "status" only where that is not "ok"."""
    cells = []
    for cell in results.cells:
        entry: dict[str, Any] = {"head": cell.head, "depth": cell.depth, "seed": cell.seed}
        entry |= {"parameters": cell.parameters, **cell.metrics}
        if cell.status != "ok":
            entry["status"] = cell.status
        cells.append(entry)
    groups = [
        {"head": g.head, "depth": g.depth, "seeds": g.seeds, "parameters": g.parameters, **g.metrics}
        for g in results.groups
    ]
    return _plain(
        {
            "split": results.split,
            "rows": results.rows,
            "label_range": results.label_range,
            "cells": cells,
            "groups": groups,
            "meta": results.meta,
        }
    )


def _plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_results(results: Results, folder: Path) -> None:
    """Write results.json, results.csv (a line for each cell) and predictions.csv (for each cell and row)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_durably(folder / "results.json", results_json(results))

    lines: list[list[object]] = [["head", "depth", "seed", "parameters", "status", *METRICS]]
    for cell in results.cells:
        figures = [_csv_number(cell.metrics[name]) for name in METRICS]
        lines.append([cell.head, cell.depth, cell.seed, cell.parameters, cell.status, *figures])
    write_text_durably(folder / "results.csv", _csv(lines))

    lines = [["head", "depth", "seed", "id", "row", "target", "prediction"]]
    rows = list(zip(results.ids, results.row.tolist(), results.target.tolist(), strict=True))
    for cell, values in zip(results.cells, results.predictions.tolist(), strict=True):
        name = (cell.head, cell.depth, cell.seed)
        lines += [[*name, *row, _csv_number(value)] for row, value in zip(rows, values, strict=True)]
    write_text_durably(folder / "predictions.csv", _csv(lines))


def _csv_number(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _csv(lines: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
