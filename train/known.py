"""What a folder holds already: cells that are done or diverged in the same training; another training is refused."""

import json
from pathlib import Path
from typing import Any

from ..cache.errors import RunError
from ..cache.lock import LOCK
from .diverged import DivergedCell, find_diverged
from .progress import CellName
from .recipe import LEARNT, own_settings
from .run import Run, cell_folders, find_runs
from .settings import CLOSED_FORM, TrainSettings


def comparable(config: dict[str, Any], settings: TrainSettings, head: str) -> dict[str, Any]:
    """What two trainings must agree in for their cells to stand in one table, as JSON gives it back."""
    parts = {
        "rows": {name: config[name] for name in ("layer", "label_range", "train_rows")},
        "data": config["data"],
        "identity": config["identity"],
        "settings": {
            name: value
            for name, value in own_settings(config, settings, head).items()
            if head not in CLOSED_FORM or name not in LEARNT
        },
    }
    return json.loads(json.dumps(parts))


def known_cells(out: Path, config: dict[str, Any], settings: TrainSettings) -> dict[CellName, Run | DivergedCell]:
    """Cells that are there already, and those that diverged with the same settings.

    Raises:
        RunError: if any was trained on something else or in another way: a table of them would compare unlike things.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out takes a folder")
    diverged = find_diverged(out)
    known: dict[CellName, Run | DivergedCell] = {
        CellName(cell.head, cell.depth, cell.seed): cell
        for cell in diverged
        if cell.training == comparable(config, settings, cell.head)
    }
    if not cell_folders(out):
        ours = {LOCK, *(cell.path.name for cell in diverged)}
        if out.exists() and any(not entry.name.startswith(".") and entry.name not in ours for entry in out.iterdir()):
            raise RunError(f"{out} holds other files and no runs; choose a new or empty folder")
        return known
    for run in find_runs(out):
        rows = {"layer": run.layer, "label_range": list(run.label_range), "train_rows": run.train_rows}
        there = {"rows": rows, "data": run.data, "identity": run.identity.to_json(), "settings": run.settings}
        for part, values in comparable(config, settings, run.head.name).items():
            for name, value in values.items():
                if there[part].get(name) != value:
                    raise RunError(
                        f"{out} holds runs of another training: {run.path.name} has {name} "
                        f"{there[part].get(name)!r}, this one {value!r}. Choose another --out, or the same settings to "
                        "go on"
                    )
        known[CellName(run.head.name, run.head.depth, run.seed)] = run
    return known


def discard_other_diverged(out: Path, config: dict[str, Any], settings: TrainSettings) -> None:
    """Remove marks of cells that diverged with other settings, of which no run is left."""
    for cell in find_diverged(out):
        if cell.training != comparable(config, settings, cell.head):
            cell.path.unlink()
