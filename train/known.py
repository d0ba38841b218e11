"""What a folder holds already: cells that are done or diverged in the same training; another training is refused."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..cache.errors import RunError
from ..cache.lock import LOCK
from .diverged import DivergedCell, find_diverged
from .progress import CellName
from .run import Run, cell_folders, find_runs
from .settings import CLOSED_FORM, EPOCHS, LEARNING_RATES, LEAST_SEEN, STEP_SCALE, WEIGHT_DECAYS, TrainSettings


@dataclass(frozen=True)
class Recipe:
    """What settings leave to the head and to the number of rows. A head that is solved has none of it."""

    lr: float
    weight_decay: float
    epochs: int
    patience: int
    step_scale: float | None
    """Of relish, see STEP_SCALE: runs from before it did not begin the same way."""


_LEARNT = {field.name for field in fields(Recipe)}


def own_recipe(settings: TrainSettings, head: str, rows: int) -> Recipe | None:
    """What a head is trained with on so many rows; None if it is solved instead."""
    if head in CLOSED_FORM:
        return None
    epochs = settings.epochs or max(EPOCHS, math.ceil(LEAST_SEEN / rows))
    return Recipe(
        lr=settings.lr or LEARNING_RATES[head],
        weight_decay=settings.weight_decay if settings.weight_decay is not None else WEIGHT_DECAYS[head],
        epochs=epochs,
        patience=settings.patience or math.ceil(3 / 5 * epochs),
        step_scale=STEP_SCALE if head == "relish" else None,
    )


def own_settings(config: dict[str, Any], settings: TrainSettings, head: str) -> dict[str, Any]:
    """What a run's config.json says of the settings of one head."""
    recipe = own_recipe(settings, head, config["train_rows"])
    own = asdict(recipe) if recipe is not None else dict.fromkeys(_LEARNT)
    return {**config["settings"], **own}


def comparable(config: dict[str, Any], settings: TrainSettings, head: str) -> dict[str, Any]:
    """What two trainings must agree in for their cells to stand in one table, as JSON gives it back."""
    parts = {
        "rows": {name: config[name] for name in ("layer", "label_range", "train_rows")},
        "data": config["data"],
        "identity": config["identity"],
        "settings": {
            name: value
            for name, value in own_settings(config, settings, head).items()
            if head not in CLOSED_FORM or name not in _LEARNT
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
