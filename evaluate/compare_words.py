"""What a comparison says in sentences: where RELISH stands, and what must be known to read the tables."""

import math

import numpy as np

from ..train.metrics import HIGHER_IS_BETTER, METRIC_NAMES, PAPER_METRICS
from .compare import Comparison
from .compare_duels import BEST_RIVAL, Duel
from .compare_methods import CONTENDERS
from .compare_read import Entry, Place
from .significance import Seed
from .summary import flattering


def headline(comparison: Comparison) -> str:
    """Where RELISH stands, in one or two sentences."""
    label = CONTENDERS["relish"]
    if not any("relish" in chosen for chosen in comparison.choices):
        return f"{count_places(comparison)}; no RELISH head on the frozen LLM is among the methods."
    if not any(duel.contender == label for duel in comparison.rivals):
        return f"{count_places(comparison)}; there is no other method than RELISH."
    firsts, tallies = [], []
    for metric in PAPER_METRICS:
        own = [d for d in comparison.rivals if (d.contender, d.opponent, d.metric) == (label, BEST_RIVAL, metric)]
        first = sum(_is_first(comparison, duel) for duel in own)
        firsts.append(f"{METRIC_NAMES[metric]} in {first} of {len(own)}")
        tally = [sum(duel.outcome == outcome for duel in own) for outcome in ("win", "tie", "loss")]
        tallies.append(f"{METRIC_NAMES[metric]} {'/'.join(map(str, tally))}")
    return (
        f"{count_places(comparison)}: RELISH has the best {', '.join(firsts)}. Wins/ties/losses against the best "
        f"rival: {', '.join(tallies)}."
    )


def remarks(comparison: Comparison) -> list[str]:
    """Sentences that must be known to read the tables: how was chosen, what does not count, what methods note."""
    found = []
    if comparison.average_seeds:
        found.append(
            "Each method predicts the mean over its seeds; one of a single seed and tuning, such as a closed form, an "
            "LLM that answers, or the head that was tuned with it, predicts as it does alone. Layers, depths and "
            "rivals are chosen by the means of the seeds' own validation figures."
        )
    if any(len(adapters) == 1 for place in comparison.places for adapters in place.adapters.values()):
        found.append(
            "An adapter is one training of the LLM: deviations and tests are over heads on its states, seeds and rows, "
            "and say nothing of another training."
        )
    for place, chosen in zip(comparison.places, comparison.choices, strict=True):
        where = f"{place.dataset} with {place.backbone}"
        found += [
            f"{where}: {choice.entry.method.label} was chosen by its test NRMSE, which favours it, since not every "
            "candidate has validation figures (evaluate again: reports have them now)."
            for choice in chosen.values()
            if choice.by == "test"
        ]
        flattered = {flattering(place.split, entry.validated_on) for entry in place.entries} - {""}
        found += [f"{where}: {clause}." for clause in flattered]
        found += [f"{where}: {note.rstrip('.')}." for note in place.notes]
        found += [
            f"{where}: methods on {name} are of {len(adapters)} tunings of the LLM that differ in the seed alone; each "
            "head on the states of each counts as a seed."
            for name, adapters in place.adapters.items()
            if len(adapters) > 1
        ]
        found += [f"{where}: {sentence}" for sentence in _fewer(place)]
        by_note: dict[str, list[str]] = {}  # means and medians of the same answers have the same one
        for entry in place.entries:
            by_note.setdefault(entry.note.rstrip("."), []).append(entry.method.label)
        found += [f"{where}: {', '.join(labels)}: {note}." for note, labels in by_note.items() if note]
        for entry in place.entries:
            label, seeds = entry.method.label, constant_seeds(entry)
            if seeds:
                which = f" of seed {', '.join(map(_seed_words, seeds))}" if len(entry.seeds) > 1 else ""
                found.append(f"{where}: {label} has no correlation: all predictions{which} are the same.")
    by_test = sorted({(d.dataset, d.backbone) for d in comparison.rivals if d.by == "test"})
    if by_test:
        found.append(
            "The best rival was chosen with the help of test figures, which favours the rival, where some rivals have "
            f"no validation figures: {', '.join(f'{dataset} with {backbone}' for dataset, backbone in by_test)}."
        )
    return found


def _fewer(place: Place) -> list[str]:
    """Which methods stand on fewer seeds, or tunings, than others."""
    pooled = {states: len(adapters) for states, adapters in place.adapters.items() if len(adapters) > 1}
    groups: dict[str, list[Entry]] = {}  # of each LLM that was tuned several times, and of all others
    for entry in place.entries:
        groups.setdefault(entry.method.states if entry.method.states in pooled else "", []).append(entry)
    found = []
    for states, entries in groups.items():
        most = max(entry.seed_count for entry in entries)
        seeds = [(e, e.seed_count) for e in entries if e.seed_count < most and e.method.has_seeds]
        tunings = [(e, e.tunings) for e in entries if e.tunings < pooled.get(states, 1)]
        found += [
            f"fewer {what} than {of} stand behind {', '.join(f'{e.method.label} ({number})' for e, number in fewer)}."
            for what, of, fewer in (("seeds", most, seeds), ("tunings", pooled.get(states, 1), tunings))
            if fewer
        ]
    return found


def _seed_words(seed: Seed) -> str:
    return f"{seed[1]} on the tuning with seed {seed[0]}" if isinstance(seed, tuple) else str(seed)


def constant_seeds(entry: Entry) -> list[Seed]:
    """The seeds that predict one score for all rows, which is why a method has no correlation."""
    return [seed for seed, values in zip(entry.seeds, entry.predictions, strict=True) if np.ptp(values) == 0]


def count_places(comparison: Comparison) -> str:
    """`5 data sets, 2 LLMs`."""
    return f"{count('data set', len(comparison.datasets))}, {count('LLM', len(comparison.backbones))}"


def count(what: str, number: int) -> str:
    """`1 LLM`, `2 LLMs`."""
    return f"{number} {what}{'s' if number > 1 else ''}"


def _is_first(comparison: Comparison, duel: Duel) -> bool:
    """Whether the contender's figure is at least that of every method outside RELISH, chosen by no figures at all.

    One without a correlation is behind if all its seeds predict a constant; where some do not, nothing can be said.
    """
    if math.isnan(duel.ours):
        return False
    undecided = [
        entry
        for place in comparison.places
        for entry in place.entries
        if (place.dataset, place.backbone) == (duel.dataset, duel.backbone)
        and entry.method.family not in CONTENDERS
        and math.isnan(entry.metrics[duel.metric]["mean"])
        and len(constant_seeds(entry)) < len(entry.seeds)
    ]
    if undecided:
        return False
    same = [
        other
        for other in comparison.duels
        if (other.dataset, other.backbone, other.contender, other.metric)
        == (duel.dataset, duel.backbone, duel.contender, duel.metric)
        and other.opponent not in CONTENDERS.values()
    ]
    up = HIGHER_IS_BETTER[duel.metric]
    return all(math.isnan(o.theirs) or (o.ours >= o.theirs if up else o.ours <= o.theirs) for o in same)
