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
    first = next(iter(tunings.values()))
    members: dict[Method, dict[int, Entry]] = {}
    for seed, place in tunings.items():
        for entry in place.entries:
            members.setdefault(entry.method, {})[seed] = entry
    pool = _averaged if average else _side_by_side
    adapters = {name: tuple(sorted({p.adapters[name][0] for p in tunings.values()})) for name in first.adapters}
    return replace(
        first,
        entries=[replace(pool(own, first.target, first.label_range), tunings=len(tunings)) for own in members.values()],
        notes=[f"tuning with seed {seed}: {note}" for seed, place in tunings.items() for note in place.notes],
        adapters=adapters,
        tuning=None,
    )


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
    )


def _mean_extras(entries: Sequence[Entry]) -> dict[str, float | None]:
    heads = [entry for entry in entries for _ in range(entry.seed_count)]
    return {name: mean_if_known([entry.extras[name] for entry in heads]) for name in EXTRAS}


def _notes(entries: dict[int, Entry]) -> str:
    """One that all tunings have, as it stands; others with the tuning that they are of."""
    notes = [entry.note for entry in entries.values()]
    if len(set(notes)) == 1:
        return notes[0]
    return "; ".join(f"tuning with seed {seed}: {entry.note}" for seed, entry in entries.items() if entry.note)
