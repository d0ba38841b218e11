"""`train_heads`: a grid of heads × depths × seeds from one cache, cell by cell, resumable."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..cache.device import pick_device
from ..cache.errors import RunError
from ..cache.reader import FeatureCache, open_cache
from ..cache.version import __version__
from .data import Moments, Rows, feature_moments, ordered_batches, read_ahead, training_rows
from .heads import Head, HeadSpec, build_head, count_parameters
from .loop import Diverged, EpochRecord, best_epoch, predict_rows, train_head
from .metrics import score
from .pooled import pool
from .ridge import ALPHAS, solve_ridge
from .ridge import Moments as RidgeMoments
from .run import cell_folders, discard, find_runs, run_name, save_run
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
    """Cells whose loss was no longer finite; nothing of them is kept."""


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
    out = Path(out)
    opened = open_cache(cache)
    grid = grid_cells(settings)
    train, val = training_rows(opened, settings)
    config = _config(opened, settings, train, val)
    finished = _finished(out, config, settings)
    device = pick_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    if listener is not None:
        plan = {cell: 0 if cell in finished else 1 if cell.head in CLOSED_FORM else steps for cell in grid}
        listener.plan(grid, plan)
    result = GridResult(out)
    moments: dict[str | None, Moments] = {}
    for cell in grid:
        if cell in finished:
            result.cells[cell] = finished[cell]
            if listener is not None:
                listener.end(cell, "there already", finished[cell])
            continue
        if listener is not None:
            listener.start(cell)
        discard(out / f".{cell}.tmp")
        try:
            result.cells[cell] = _train_cell(cell, train, val, settings, config, moments, device, out, listener)
        except Diverged:
            result.diverged.append(cell)
            if listener is not None:
                listener.end(cell, "diverged", {})
        else:
            if listener is not None:
                listener.end(cell, "done", result.cells[cell])
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
    spec = HeadSpec(
        name=cell.head,
        hidden_size=train.split.cache.hidden_size,
        depth=cell.depth,
        latent_size=settings.latent_size,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
    )
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
    figures = score(val.target, predict_rows(head, val, device), config["label_range"])
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


def _fit_ridge(head: Head, train: Rows, val: Rows, label_range: tuple[float, float]) -> float:
    """Fit the head's linear layer; the penalty with the lowest validation NRMSE wins, and is returned."""
    batches = read_ahead(train, ordered_batches(train.lengths))
    pooled = ((pool(hidden, mask, head.pooling).numpy(), target.double().numpy()) for hidden, mask, target in batches)
    solutions = solve_ridge(RidgeMoments.of(pooled, head.hidden_size))
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


def _finished(out: Path, config: dict[str, Any], settings: TrainSettings) -> dict[CellName, dict[str, Any]]:
    """Cells that are there already.

    Raises:
        RunError: if any was trained on something else or in another way: a table of them would compare unlike things.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out takes a folder")
    if not cell_folders(out):
        if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise RunError(f"{out} holds other files and no runs; choose a new or empty folder")
        return {}
    runs = find_runs(out)
    for run in runs:
        have = {"layer": run.layer, "label_range": list(run.label_range), "train_rows": run.train_rows}
        pairs = [(have, {name: config[name] for name in have})]
        pairs += [(run.data, config["data"]), (run.identity.to_json(), config["identity"])]
        pairs += [(run.settings, {**config["settings"], "lr": _own_lr(settings, run.head.name)})]
        for there, here in pairs:
            for name, value in here.items():
                if there.get(name) != value:
                    raise RunError(
                        f"{out} holds runs of another training: {run.path.name} has {name} {there.get(name)!r}, this "
                        f"one {value!r}. Choose another --out, or the same settings to go on"
                    )
    return {CellName(run.head.name, run.head.depth, run.seed): run.metrics for run in runs}
