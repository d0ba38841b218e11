"""One cell of a grid: a head trained, scored on the validation rows, and saved as a run or marked as diverged."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache.device import pick_device
from ..cache.reader import FeatureCache, open_cache
from ..cache.version import __version__
from .data import Moments, Readable, Rows, feature_moments, training_rows
from .diverged import DivergedCell, diverged_path, save_diverged
from .heads import Head, HeadSpec, build_head, count_parameters
from .known import comparable
from .loop import Diverged, EpochRecord, best_epoch, predict_rows, train_head
from .metrics import score
from .mix import MixedHead
from .pooled_rows import PooledRows, pooled_rows
from .principal import begin_with, principal_axes
from .progress import CellName, Listener
from .recipe import own_recipe, own_settings
from .ridge import ALPHAS, solve_ridge
from .ridge import Moments as RidgeMoments
from .run import save_run
from .saving import writing
from .scale import InputScale
from .settings import MIX, TrainSettings
from .shared import shared_tokens


@dataclass(frozen=True)
class Training:
    """What the cells of a grid share: rows, recipe, device, where runs go, and the moments of what heads read."""

    train: Rows
    val: Rows
    settings: TrainSettings
    config: dict[str, Any]
    """What every run's config.json says alike."""
    device: torch.device
    out: Path
    skip: int
    """Tokens that all rows begin with, to learn from and to validate; no head reads them."""
    moments: dict[str | None, Moments] = field(default_factory=dict)
    """By pooling; filled by whoever needs them first."""
    pooled: dict[str, tuple[PooledRows, PooledRows]] = field(default_factory=dict)
    """What the training and validation rows pool to, by pooling; filled by whoever needs them first."""

    def steps(self, cell: CellName) -> int:
        """The most steps a cell may take."""
        recipe = own_recipe(self.settings, cell.head, len(self.train))
        if recipe is None:
            return 1
        return recipe.epochs * -(-len(self.train) // self.settings.batch_size)

    def spec(self, cell: CellName) -> HeadSpec:
        """The shape of a cell's head."""
        return HeadSpec(
            name=cell.head,
            hidden_size=self.train.split.cache.hidden_size,
            depth=cell.depth,
            latent_size=self.settings.latent_size,
            num_heads=self.settings.num_heads,
            dropout=self.settings.dropout,
            layers=len(self.train.split.layers) if self.settings.layer == MIX else None,
            skip=self.skip,
        )

    def moments_for(self, head: Head) -> Moments | None:
        """Moments of what a head reads, from a sample of the training rows the first time; None if it needs none."""
        if not self.settings.standardise:
            return None
        pooling = getattr(head, "pooling", None)
        if pooling not in self.moments:
            self.moments[pooling] = feature_moments(self.train, pooling, skip=self.skip)
        return self.moments[pooling]

    def rows_for(self, head: Head) -> tuple[Readable, Readable]:
        """The training and validation rows as a head reads them: pooled, in one pass the first time, where it pools."""
        pooling = getattr(head, "pooling", None)
        if pooling is None:
            return self.train, self.val
        if pooling not in self.pooled:
            named = {"train": self.train, "val": self.val}
            train, val = (
                pooled_rows(rows, pooling, skip=self.skip, file=self.out / f".pooled-{pooling}-{name}.tmp")
                for name, rows in named.items()
            )
            self.pooled[pooling] = train, val
        return self.pooled[pooling]

    @cached_property
    def axes(self) -> Tensor | None:
        """Principal axes of what relish reads, of the training rows; None where they cannot be had.

        Each process finds them for itself: with as many threads they come out the same to the last bit.
        """
        moments = self.moments[None]
        scale = InputScale(*moments.mean.shape)
        scale.set(moments.mean, moments.std)
        return principal_axes(self.train, scale, skip=self.skip, count=self.settings.latent_size)


def open_training(cache: str | Path, out: Path, settings: TrainSettings) -> Training:
    """Open a cache for training.

    Raises:
        CacheError: if the cache cannot be used.
        DataError: if rows have no label, or nothing tells the best epoch.
        SettingsError: if the device is not there.
    """
    opened = open_cache(cache)
    train, val = training_rows(opened, settings)
    skip = shared_tokens(train.split, val.split)
    config = _config(opened, settings, train, val, skip)
    return Training(train, val, settings, config, pick_device(settings.device), out, skip)


def train_cell(training: Training, cell: CellName, listener: Listener | None) -> dict[str, Any] | None:
    """Train one cell and save it.

    Returns:
        Its metrics.json; None if it diverged, and is marked so.

    Raises:
        CacheError: if a shard is damaged.
        RunError: if the run cannot be written.
    """
    if listener is not None:
        listener.start(cell)
    try:
        return _train(training, cell, listener)
    except Diverged as reason:
        _mark_diverged(training, cell, str(reason))
        return None


def _train(training: Training, cell: CellName, listener: Listener | None) -> dict[str, Any]:
    started = time.perf_counter()
    device, settings = training.device, training.settings
    label_range = training.config["label_range"]
    spec = training.spec(cell)
    # A generator per cell, in a fork: what a cell draws depends on its seed alone, and the caller's stays as it was.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cell.seed)
        head = build_head(spec)
        train, val = training.rows_for(head)
        target = train.target
        recipe = own_recipe(settings, cell.head, len(train))
        history: list[EpochRecord] = []
        if recipe is None:
            alpha = _fit_ridge(head, train, val, label_range)
            extra: dict[str, Any] = {"alpha": alpha}
            head.to(device)
        else:
            head.target_scale.set(float(target.mean()), float(target.std()))
            moments = training.moments_for(head)
            if moments is not None:
                head.input_scale.set(moments.mean, moments.std)
            if recipe.principal_axes and training.axes is not None:
                begin_with((head.head if isinstance(head, MixedHead) else head).input_projection, training.axes)
            head.to(device)
            history = train_head(
                head,
                train,
                val,
                settings=settings,
                recipe=recipe,
                seed=cell.seed,
                label_range=label_range,
                device=device,
                on_epoch=lambda record: listener.epoch(cell, record) if listener is not None else None,
                on_step=lambda done: listener.step(cell, done) if listener is not None else None,
            )
            extra = {"best_epoch": best_epoch(history, recipe.best_by), "epochs": len(history)}
            if isinstance(head, MixedHead):
                extra["layer_mix"] = dict(
                    zip(map(str, training.train.split.layers), head.shares().tolist(), strict=True)
                )
    predictions = predict_rows(head, val, device)
    if not np.isfinite(predictions).all():
        raise Diverged("its predictions are not finite")
    figures = score(val.target, predictions, label_range)
    metrics = {
        "val_split": training.val.split.name,
        "val_rows": len(val),
        "val": {name: value if np.isfinite(value) else None for name, value in figures.items()},
        **extra,
        "seconds": round(time.perf_counter() - started, 3),
    }
    own = {
        "head": {name: value for name, value in asdict(spec).items() if value is not None and name != "skip"},
        "seed": cell.seed,
        "parameters": count_parameters(head),
        "settings": own_settings(training.config, settings, cell.head),
    }
    save_run(training.out / str(cell), head, config={**training.config, **own}, history=history, metrics=metrics)
    return metrics


def _mark_diverged(training: Training, cell: CellName, reason: str) -> None:
    with torch.random.fork_rng(devices=[]):
        parameters = count_parameters(build_head(training.spec(cell)))
    path = diverged_path(training.out, cell)
    same = comparable(training.config, training.settings, cell.head)
    with writing(path, "finished cells are kept"):
        save_diverged(DivergedCell(path, cell.head, cell.depth, cell.seed, parameters, reason, same))


def _fit_ridge(head: Head, train: Readable, val: Readable, label_range: tuple[float, float]) -> float:
    """Fit the head's linear layer to pooled rows; gives the penalty with the lowest validation NRMSE, which wins."""

    def vectors(rows: Readable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for hidden, _, target in map(rows.read, rows.batches()):
            yield hidden.squeeze(1).numpy(), target.double().numpy()

    sums = RidgeMoments.of(vectors(train), head.hidden_size)
    if not np.isfinite(sums.xx).all():
        raise Diverged("the pooled hidden states are not finite")
    solutions = solve_ridge(sums)
    features = np.concatenate([features for features, _ in vectors(val)]).astype(np.float64)
    target = val.target[np.concatenate(val.batches())]
    errors = [score(target, features @ weights + intercept, label_range)["nrmse"] for weights, intercept in solutions]
    best = int(np.argmin(errors))
    weights, intercept = solutions[best]
    with torch.no_grad():
        head.body.weight.copy_(torch.from_numpy(weights))
        head.body.bias.fill_(intercept)
    return ALPHAS[best]


def _config(cache: FeatureCache, settings: TrainSettings, train: Rows, val: Rows, skip: int) -> dict[str, Any]:
    recipe = asdict(settings)
    for grid_or_machine in ("heads", "depths", "seeds", "layer", "device", "threads", "workers"):
        del recipe[grid_or_machine]
    splits = cache.manifest.splits
    return {
        "relish": __version__,
        "cache": str(cache.folder),
        "identity": cache.identity.to_json(),
        "task": cache.manifest.task,
        "layer": MIX if settings.layer == MIX else cache.layers[cache.layer_position(settings.layer)],
        "label_range": list(cache.label_range),
        "train_rows": len(train),
        "data": {
            "train": splits["train"].fingerprint,
            "val_split": val.split.name,
            "val": splits[val.split.name].fingerprint,
        },
        "settings": {**recipe, "skipped_tokens": skip},
    }
