"""`train_heads`: a grid of heads × depths × seeds from one cache, cell by cell, resumable."""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..cache.device import pick_device
from ..cache.errors import RunError
from ..cache.lock import LOCK, lock_folder
from ..cache.reader import FeatureCache, open_cache
from ..cache.version import __version__
from .data import Moments, Rows, feature_moments, ordered_batches, read_ahead, training_rows
from .diverged import DivergedCell, diverged_path, find_diverged, save_diverged
from .heads import Head, HeadSpec, build_head, count_parameters
from .loop import Diverged, EpochRecord, best_epoch, predict_rows, train_head
from .metrics import score
from .pooled import pool
from .ridge import ALPHAS, solve_ridge
from .ridge import Moments as RidgeMoments
from .run import Run, cell_folders, discard_unfinished, find_runs, run_name, save_run
from .saving import writing
from .settings import CLOSED_FORM, LEARNING_RATES, TrainSettings


@dataclass(frozen=True)
class CellName:
    """Where a cell stands in the grid; depth 0 for heads without one."""

    head: str
    depth: int
    seed: int

    def __str__(self) -> str:
        return run_name(self.head, self.depth, self.seed)


class Listener(Protocol):
    """What `train_heads` reports to while it works."""

    def plan(self, cells: list[CellName], steps: dict[CellName, int]) -> None:
        """The cells of the grid, and the most steps each may take (0 if it is there already)."""

    def start(self, cell: CellName) -> None:
        """A cell begins."""

    def step(self, cell: CellName, done: int) -> None:
        """So many steps of it are done."""

    def epoch(self, cell: CellName, record: EpochRecord) -> None:
        """An epoch of it is done."""

    def end(self, cell: CellName, status: str, metrics: dict[str, Any]) -> None:
        """It is done: "done", "there already" or "diverged"."""


@dataclass(frozen=True)
class GridResult:
    """What became of each cell."""

    folder: Path
    cells: dict[CellName, dict[str, Any]] = field(default_factory=dict)
    """Validation figures (metrics.json) of the cells that were trained or were there already."""
    diverged: list[CellName] = field(default_factory=list)
    """Cells whose loss was no longer finite, now or in an earlier training with the same settings. In place of a run
    folder they have a file `<cell>.diverged.json`; without it a cell is tried again."""


def train_heads(
    cache: str | Path, out: str | Path, settings: TrainSettings | None = None, *, listener: Listener | None = None
) -> GridResult:
    """Train every cell of a grid; cells that are there already are kept.

    On the CPU, with the same number of threads, a cell's weights are the same bit for bit whether it is trained alone
    or in a grid: each cell draws from a generator of its own, and cells share nothing but the statistics of the rows.

    Args:
        cache: folder of the cache.
        out: folder for the run folders.
        settings: grid and recipe; None for the defaults.
        listener: hears of progress; None for silence.

    Raises:
        CacheError: if the cache cannot be used.
        DataError: if rows have no label.
        RunError: if `out` holds runs of another cache or another recipe.
        SettingsError: if the device is not there.
    """
    settings = settings or TrainSettings()
    out = Path(out).absolute()  # so that a later chdir does not move it
    opened = open_cache(cache)
    grid = grid_cells(settings)
    train, val = training_rows(opened, settings)
    config = _config(opened, settings, train, val)
    device = pick_device(settings.device)
    known = _known(out, config, settings)  # before a folder is made
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    work = any(cell not in known for cell in grid)
    with lock_folder(out, RunError) if work else nullcontext():
        if work:
            known = _known(out, config, settings)  # another process may have been at work until now
            discard_unfinished(out)
            for cell in find_diverged(out):
                if cell.training != _training(config, settings, cell.head):
                    cell.path.unlink()  # of other settings, and no run is left of them
        return _train_grid(grid, known, train, val, settings, config, device, out, listener)


def _train_grid(
    grid: list[CellName],
    known: "dict[CellName, Run | DivergedCell]",
    train: Rows,
    val: Rows,
    settings: TrainSettings,
    config: dict[str, Any],
    device: torch.device,
    out: Path,
    listener: Listener | None,
) -> GridResult:
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    if listener is not None:
        plan = {cell: 0 if cell in known else 1 if cell.head in CLOSED_FORM else steps for cell in grid}
        listener.plan(grid, plan)
    result = GridResult(out)
    moments: dict[str | None, Moments] = {}
    for cell in grid:
        there = known.get(cell)
        if isinstance(there, Run):
            result.cells[cell] = there.metrics
            status = "there already"
        elif there is not None:
            result.diverged.append(cell)
            status = "diverged"
        else:
            if listener is not None:
                listener.start(cell)
            try:
                result.cells[cell] = _train_cell(cell, train, val, settings, config, moments, device, out, listener)
                status = "done"
            except Diverged as reason:
                _mark_diverged(out, cell, _spec(cell, train, settings), config, settings, str(reason))
                result.diverged.append(cell)
                status = "diverged"
        if listener is not None:
            listener.end(cell, status, result.cells.get(cell, {}))
    return result


def grid_cells(settings: TrainSettings) -> list[CellName]:
    """The cells of a grid: relish at each depth, others once per seed, ridge once, as seed 0."""
    cells = []
    for head in settings.heads:
        depths = settings.depths if head == "relish" else (0,)
        seeds = (0,) if head in CLOSED_FORM else settings.seeds
        cells += [CellName(head, depth, seed) for depth in depths for seed in seeds]
    return cells


def _train_cell(
    cell: CellName,
    train: Rows,
    val: Rows,
    settings: TrainSettings,
    config: dict[str, Any],
    moments: dict[str | None, Moments],
    device: torch.device,
    out: Path,
    listener: Listener | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    spec = _spec(cell, train, settings)
    # A generator per cell, in a fork: what a cell draws depends on its seed alone, and the caller's stays as it was.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cell.seed)
        head = build_head(spec)
        target = train.target
        lr = _own_lr(settings, cell.head)
        history: list[EpochRecord] = []
        if cell.head in CLOSED_FORM:
            alpha = _fit_ridge(head, train, val, config["label_range"])
            extra: dict[str, Any] = {"alpha": alpha}
            head.to(device)
        else:
            assert lr is not None
            head.target_scale.set(float(target.mean()), float(target.std()))
            if settings.standardise:
                pooling = getattr(head, "pooling", None)
                if pooling not in moments:
                    moments[pooling] = feature_moments(train, pooling)
                head.input_scale.set(moments[pooling].mean, moments[pooling].std)
            head.to(device)
            history = train_head(
                head,
                train,
                val,
                settings=settings,
                lr=lr,
                seed=cell.seed,
                label_range=config["label_range"],
                device=device,
                on_epoch=lambda record: listener.epoch(cell, record) if listener is not None else None,
                on_step=lambda done: listener.step(cell, done) if listener is not None else None,
            )
            extra = {"best_epoch": best_epoch(history), "epochs": len(history)}
    predictions = predict_rows(head, val, device)
    if not np.isfinite(predictions).all():
        raise Diverged("its predictions are not finite")
    figures = score(val.target, predictions, config["label_range"])
    metrics = {
        "val_split": val.split.name,
        "val_rows": len(val),
        "val": {name: value if np.isfinite(value) else None for name, value in figures.items()},
        **extra,
        "seconds": round(time.perf_counter() - started, 3),
    }
    own = {
        "head": asdict(spec),
        "seed": cell.seed,
        "parameters": count_parameters(head),
        "settings": {**config["settings"], "lr": lr},
    }
    save_run(out / str(cell), head, config={**config, **own}, history=history, metrics=metrics)
    return metrics


def _spec(cell: CellName, train: Rows, settings: TrainSettings) -> HeadSpec:
    return HeadSpec(
        name=cell.head,
        hidden_size=train.split.cache.hidden_size,
        depth=cell.depth,
        latent_size=settings.latent_size,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
    )


def _mark_diverged(
    out: Path, cell: CellName, spec: HeadSpec, config: dict[str, Any], settings: TrainSettings, reason: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        parameters = count_parameters(build_head(spec))
    path = diverged_path(out, cell)
    with writing(path, "finished cells are kept"):
        save_diverged(
            DivergedCell(
                path, cell.head, cell.depth, cell.seed, parameters, reason, _training(config, settings, cell.head)
            )
        )


def _fit_ridge(head: Head, train: Rows, val: Rows, label_range: tuple[float, float]) -> float:
    """Fit the head's linear layer; the penalty with the lowest validation NRMSE wins, and is returned."""
    batches = read_ahead(train, ordered_batches(train.lengths))
    pooled = ((pool(hidden, mask, head.pooling).numpy(), target.double().numpy()) for hidden, mask, target in batches)
    sums = RidgeMoments.of(pooled, head.hidden_size)
    if not np.isfinite(sums.xx).all():
        raise Diverged("the pooled hidden states are not finite")
    solutions = solve_ridge(sums)
    order = ordered_batches(val.lengths)
    features = (
        torch.cat([pool(hidden, mask, head.pooling) for hidden, mask, _ in read_ahead(val, order)]).double().numpy()
    )
    target = val.target[np.concatenate(order)]
    errors = [score(target, features @ weights + intercept, label_range)["nrmse"] for weights, intercept in solutions]
    best = int(np.argmin(errors))
    weights, intercept = solutions[best]
    with torch.no_grad():
        head.body.weight.copy_(torch.from_numpy(weights))
        head.body.bias.fill_(intercept)
    return ALPHAS[best]


def _config(cache: FeatureCache, settings: TrainSettings, train: Rows, val: Rows) -> dict[str, Any]:
    recipe = asdict(settings)
    for grid_or_machine in ("heads", "depths", "seeds", "layer", "device", "threads"):
        del recipe[grid_or_machine]
    splits = cache.manifest.splits
    return {
        "relish": __version__,
        "cache": str(cache.folder),
        "identity": cache.identity.to_json(),
        "task": cache.manifest.task,
        "layer": cache.layers[cache.layer_position(settings.layer)],
        "label_range": list(cache.label_range),
        "train_rows": len(train),
        "data": {
            "train": splits["train"].fingerprint,
            "val_split": val.split.name,
            "val": splits[val.split.name].fingerprint,
        },
        "settings": recipe,
    }


def _own_lr(settings: TrainSettings, head: str) -> float | None:
    return None if head in CLOSED_FORM else settings.lr or LEARNING_RATES[head]


def _training(config: dict[str, Any], settings: TrainSettings, head: str) -> dict[str, Any]:
    """What two trainings must agree in for their cells to stand in one table, as JSON gives it back."""
    parts = {
        "rows": {name: config[name] for name in ("layer", "label_range", "train_rows")},
        "data": config["data"],
        "identity": config["identity"],
        "settings": {**config["settings"], "lr": _own_lr(settings, head)},
    }
    return json.loads(json.dumps(parts))


def _known(out: Path, config: dict[str, Any], settings: TrainSettings) -> "dict[CellName, Run | DivergedCell]":
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
        if cell.training == _training(config, settings, cell.head)
    }
    if not cell_folders(out):
        ours = {LOCK, *(cell.path.name for cell in diverged)}
        if out.exists() and any(not entry.name.startswith(".") and entry.name not in ours for entry in out.iterdir()):
            raise RunError(f"{out} holds other files and no runs; choose a new or empty folder")
        return known
    for run in find_runs(out):
        rows = {"layer": run.layer, "label_range": list(run.label_range), "train_rows": run.train_rows}
        there = {"rows": rows, "data": run.data, "identity": run.identity.to_json(), "settings": run.settings}
        for part, values in _training(config, settings, run.head.name).items():
            for name, value in values.items():
                if there[part].get(name) != value:
                    raise RunError(
                        f"{out} holds runs of another training: {run.path.name} has {name} "
                        f"{there[part].get(name)!r}, this one {value!r}. Choose another --out, or the same settings to "
                        "go on"
                    )
        known[CellName(run.head.name, run.head.depth, run.seed)] = run
    return known
