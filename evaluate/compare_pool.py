"""Several tunings of an LLM, which differ in the seed alone, as one: heads on all of them are seeds of one method."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .compare_methods import Method
from .compare_read import Array, Entry, Place, figures_of
from .summary import EXTRAS, mean_if_known, sum_if_known


def pool_tunings(tunings: dict[int, Place], *, average: bool) -> Place:
    """What several tunings hold, method by method.

    Args:
        tunings: the reports of each at one layer, by the seed of the tuning.
        average: whether a method predicts the mean over its seeds: then over those of all tunings, and costs them all.
    """
    tunings = dict(sorted(tunings.items()))  # so that the order of the reports has no part in anything
    first = next(iter(tunings.values()))
    members: dict[Method, dict[int, Entry]] = {}
    notes: dict[str, list[int]] = {}
    for seed, place in tunings.items():
        for entry in place.entries:
            members.setdefault(entry.method, {})[seed] = entry
        told = [*place.notes, *(_constant(place) if average else [])]
        for note in dict.fromkeys(told):
            notes.setdefault(note, []).append(seed)
    pool = _averaged if average else _side_by_side
    return replace(
        first,
        entries=[pool(own, first.target, first.label_range) for own in members.values()],
        notes=[_of_tunings(note, seeds, len(tunings)) for note, seeds in notes.items()],
        adapters={name: tuple(sorted({p.adapters[name][0] for p in tunings.values()})) for name in first.adapters},
        tuning=None,
    )


def _constant(place: Place) -> list[str]:
    """What averages over seeds say of a seed, of methods that have one in each tuning."""
    return [
        f"{entry.method.label} predicts one score for all rows, and is part of the mean"
        for entry in place.entries
        if entry.averaged_seeds == 1 and np.ptp(entry.predictions) == 0
    ]


def _side_by_side(entries: dict[int, Entry], target: Array, label_range: tuple[float, float]) -> Entry:
    own = list(entries.values())
    predictions = np.concatenate([entry.predictions for entry in own])
    return replace(
        own[0],
        seeds=tuple((tuning, seed) for tuning, entry in entries.items() for seed in entry.seeds),
        predictions=predictions,
        metrics=figures_of(target, predictions, label_range),
        extras=_mean_extras(own),
        note=_notes(entries),
        tunings=len(own),
    )


def _averaged(entries: dict[int, Entry], target: Array, label_range: tuple[float, float]) -> Entry:
    own = list(entries.values())
    seeds = [entry.averaged_seeds for entry in own]
    predictions = np.average([entry.predictions for entry in own], axis=0, weights=seeds)
    costs = {
        "train_seconds": sum_if_known([entry.extras["train_seconds"] for entry in own]),
        "seconds_per_1000_rows": None,
    }
    return replace(
        own[0],
        seeds=(0,),
        predictions=predictions,
        metrics=figures_of(target, predictions, label_range),
        parameters=sum_if_known([entry.parameters for entry in own]),
        extras={**_mean_extras(own), **costs},
        averaged_seeds=sum(seeds),
        note=_notes(entries),
        tunings=len(own),
    )


def _mean_extras(entries: Sequence[Entry]) -> dict[str, float | None]:
    heads = [entry for entry in entries for _ in range(entry.seed_count)]
    return {name: mean_if_known([entry.extras[name] for entry in heads]) for name in EXTRAS}


def _notes(entries: dict[int, Entry]) -> str:
    notes: dict[str, list[int]] = {}
    for seed, entry in entries.items():
        if entry.note:
            notes.setdefault(entry.note, []).append(seed)
    return "; ".join(_of_tunings(note, seeds, len(entries)) for note, seeds in notes.items())


def _of_tunings(note: str, seeds: Sequence[int], tunings: int) -> str:
    """A note that all tunings have, as it stands; another with those that it is of."""
    return note if len(seeds) == tunings else f"tuning with seed {', '.join(map(str, seeds))}: {note}"
