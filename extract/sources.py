"""From the settings to rows: which splits there are, their columns, prompt and label range."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import DataError
from ..cache.exact import exact
from ..cache.validation import VALIDATION_NAMES
from .rows import SplitData, guess_text_column, label_range_of, load_split, resolve_columns
from .settings import Source, TextSettings
from .tables import hub_splits, read_hub, read_rows
from .tasks import Task, get_task


@dataclass(frozen=True)
class TextData:
    """The texts of all splits, prompts filled in."""

    splits: dict[str, SplitData]
    prompt: str
    label_range: tuple[float, float]
    range_was_taken: bool
    """Whether the label range was taken from the training split, which a person should be told."""


def load_texts(settings: TextSettings, known_range: tuple[float, float] | None) -> TextData:
    """Read every split.

    Args:
        settings: says which.
        known_range: label range of the cache that is added to, None for a new one.

    Raises:
        DataError: naming file and row, if columns are missing or rows cannot be used.
    """
    task = get_task(settings.task) if settings.task is not None else None
    label_range = settings.label_range or (task.label_range if task else known_range)
    splits: dict[str, SplitData] = {}
    prompt = settings.prompt or (task.prompt if task else None)
    for split, (name, rows) in _open_sources(settings, task).items():
        first, rows = _peek(rows, name)
        if prompt is None:
            prompt = f"{{{guess_text_column(first, source=name)}}}"
        columns = resolve_columns(
            first,
            prompt=prompt,
            task=task,
            target_column=settings.target_column,
            id_column=settings.id_column,
            source=name,
        )
        splits[split] = load_split(rows, columns, prompt, source=name, label_range=label_range)
        if split in ("train", *VALIDATION_NAMES):
            _check_labels(split, splits[split])
    taken = label_range is None
    if label_range is None:
        if "train" not in splits:
            raise DataError("no label range: give --label-range LOW,HIGH, or a split named train to take it from")
        label_range = label_range_of(splits["train"].targets)
        for split, data in splits.items():
            _check_range(split, data, label_range)
    assert prompt is not None
    return TextData(splits, prompt, label_range, taken)


def _open_sources(settings: TextSettings, task: Task | None) -> dict[str, tuple[str, Iterable[Mapping[str, Any]]]]:
    if settings.data:
        return {split: _open_source(split, source) for split, source in settings.data.items()}
    hub = settings.hub or (task.hub if task else None)
    assert hub is not None
    preset = task if task is not None and hub == task.hub else None
    config = settings.hub_config or (preset.hub_config if preset else None)
    revision = settings.hub_revision or (preset.hub_revision if preset else None)
    there = hub_splits(hub, config, revision)
    for split in settings.hub_splits:
        if split not in there:
            raise DataError(f"the data set {hub} has no split {split!r}; it has {', '.join(there)}")
    return {
        split: (f"{hub} ({split})", read_hub(hub, split, config, revision)) for split in settings.hub_splits or there
    }


def _open_source(split: str, source: Source) -> tuple[str, Iterable[Mapping[str, Any]]]:
    if isinstance(source, (str, Path)):
        return Path(source).name, read_rows(Path(source).expanduser())
    return f"the rows of {split}", source


def _peek(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[str], Iterable[Mapping[str, Any]]]:
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise DataError(f"{name} holds no rows")
    for column in first:
        if not isinstance(column, str):
            raise DataError(f"{name} has a column called {column!r}, which is no text; rename it")
    return list(first), chain([first], iterator)


def _check_labels(split: str, data: SplitData) -> None:
    """Refuse texts that no head could learn from, before the LLM reads them; without any label they may be for more."""
    unlabelled = np.flatnonzero(np.isnan(data.targets))
    if 0 < len(unlabelled) < len(data.targets):
        raise DataError(
            f"{len(unlabelled)} of {len(data.targets)} rows of the split {split!r} have no label, first row "
            f"{unlabelled[0]} (id {data.ids[unlabelled[0]]!r}), and heads learn from labelled rows alone; fill them "
            "in, or leave those rows out"
        )


def _check_range(split: str, data: SplitData, label_range: tuple[float, float]) -> None:
    low, high = label_range
    outside = (data.targets < low) | (data.targets > high)
    if outside.any():
        value = data.targets[outside][0]
        raise DataError(
            f"the split {split} has the label {exact(value)}, outside [{exact(low)}, {exact(high)}] that the training "
            "split spans; give the real range with --label-range LOW,HIGH"
        )
