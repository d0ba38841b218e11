"""`compare_reports`: several reports in one comparison, with tests on the same rows, counts and averages."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..cache.errors import SettingsError
from ..train.metrics import PAPER_METRICS
from .compare_duels import (
    Choice,
    Count,
    Duel,
    against_best,
    choose_contenders,
    correct,
    count_outcomes,
    duels_in,
    pairings,
)
from .compare_load import load_places
from .compare_methods import CONTENDERS, Method
from .compare_read import Entry, Place, Source
from .significance import ALPHA

PAPER = {
    "RELISH": {"pearson": 0.763, "spearman": 0.740, "nrmse": 0.133},
    "RAFT": {"pearson": 0.715, "spearman": 0.690, "nrmse": 0.166},
    "LoRA + MLP": {"pearson": 0.648, "spearman": 0.617, "nrmse": 0.167},
}
"""The paper's macro averages over five data sets and four LLMs of 8 to 32 billion parameters (arXiv 2604.01206)."""
MOST_RESAMPLES = 100_000
"""Each takes a byte a row."""


@dataclass(frozen=True)
class MacroRow:
    """One method, averaged over places with equal weight."""

    label: str
    family: str
    values: dict[str, float]
    """For each of PAPER_METRICS; NaN if it is undefined in one of the places."""


@dataclass(frozen=True)
class Macro:
    """Averages over the data sets of one LLM, or over all places."""

    backbone: str | None
    """None: over all of them."""
    places: int
    rows: list[MacroRow]
    missing: dict[str, list[str]]
    """Methods that some places lack, and which."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the tables and the page are made from."""

    places: list[Place]
    """LLM by LLM."""
    choices: list[dict[str, Choice]]
    """For each place the chosen method of each family of CONTENDERS that is there."""
    duels: list[Duel]
    """Each contender against every method outside RELISH, and against the other contender."""
    rivals: list[Duel]
    """Each contender against the best rival, and RELISH on the frozen LLM against the best frozen one."""
    counts: list[Count]
    """Of `rivals`, then of `duels`."""
    macros: list[Macro]
    resamples: int
    average_seeds: bool
    """Whether each method predicts the mean over its seeds; if not, figures are means over the seeds' own."""

    @property
    def datasets(self) -> list[str]:
        """Names, in the order of the tables."""
        return list(dict.fromkeys(place.dataset for place in self.places))

    @property
    def backbones(self) -> list[str]:
        """Names, in the order of the tables."""
        return list(dict.fromkeys(place.backbone for place in self.places))


def compare_reports(
    sources: Sequence[Source],
    *,
    average_seeds: bool = False,
    resamples: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Put reports side by side, and test RELISH against everything else on the same rows.

    Args:
        sources: report folders of `evaluate_runs`; one for each data set × LLM, and for each adapter or variant of it.
        average_seeds: whether a method predicts the mean over its seeds, as one would for new texts, instead of being
            judged by the mean of their figures.
        resamples: how many times rows are drawn by the bootstrap, and predictions swapped by the permutation test
            (standardised for Pearson, ranks for Spearman).
        progress: called with comparisons done and comparisons in all.

    Raises:
        RunError: if a report cannot be used, or they do not fit together.
        SettingsError: if there are too few resamples to tell anything, or far too many.
    """
    if resamples < 100:
        raise SettingsError(f"{resamples} resamples are too few to tell a difference at 5 %; take 100 or more")
    if resamples > MOST_RESAMPLES:
        raise SettingsError(f"{resamples:,} resamples take too much memory; take {MOST_RESAMPLES:,} at most")
    places = load_places(sources, average=average_seeds)
    most = max(Counter(place.backbone for place in places).values())
    if most > ALPHA * (resamples + 1):
        raise SettingsError(
            f"{resamples} resamples are too few to tell a difference at 5 % on {most} data sets, for which p is "
            f"corrected; take {math.ceil(most / ALPHA)} or more"
        )
    choices = [choose_contenders(place) for place in places]
    total = sum(len(pairings(place, chosen)) for place, chosen in zip(places, choices, strict=True))
    done = 0
    duels: list[Duel] = []
    rivals: list[Duel] = []
    for place, chosen in zip(places, choices, strict=True):
        own: list[Duel] = []
        for found in duels_in(place, chosen, resamples):
            own += found
            done += 1
            if progress is not None:
                progress(done, total)
        duels += own
        rivals += against_best(place, own)
    duels, rivals = correct(duels), correct(rivals)
    return Comparison(
        places=places,
        choices=choices,
        duels=duels,
        rivals=rivals,
        counts=[*count_outcomes(rivals), *count_outcomes(duels)],
        macros=average(places, choices),
        resamples=resamples,
        average_seeds=average_seeds,
    )


def average(places: Sequence[Place], choices: Sequence[dict[str, Choice]]) -> list[Macro]:
    """The macro averages of each LLM over its data sets; before them, where there are several LLMs, over all places."""
    backbones = list(dict.fromkeys(place.backbone for place in places))
    found = []
    for scope in [None, *backbones] if len(backbones) > 1 else backbones:
        own = [number for number, place in enumerate(places) if scope in (None, place.backbone)]
        found.append(_macro(scope, [places[n] for n in own], [choices[n] for n in own]))
    return found


def _macro(backbone: str | None, places: list[Place], choices: list[dict[str, Choice]]) -> Macro:
    rows, missing = [], {}
    for label, family, have in _lines(places, choices):
        lacking = [place for n, place in enumerate(places) if n not in have]
        if lacking:
            missing[label] = [f"{p.dataset} with {p.backbone}" if backbone is None else p.dataset for p in lacking]
            continue
        sums = {name: sum(entry.metrics[name]["mean"] for entry in have.values()) for name in PAPER_METRICS}
        rows.append(MacroRow(label, family, {name: value / len(places) for name, value in sums.items()}))
    return Macro(backbone, len(places), rows, missing)


def _lines(places: list[Place], choices: list[dict[str, Choice]]) -> list[tuple[str, str, dict[int, Entry]]]:
    """(label, family, entries by the place's number) of every method; the chosen ones after their family."""
    entries: dict[Method, dict[int, Entry]] = {}
    for number, place in enumerate(places):
        for entry in place.entries:
            entries.setdefault(entry.method, {})[number] = entry
    methods = sorted(entries, key=lambda method: method.order)
    found = []
    for number, method in enumerate(methods):
        found.append((method.label, method.family, entries[method]))
        last = number + 1 == len(methods) or methods[number + 1].family != method.family
        several = sum(other.family == method.family for other in methods) > 1
        if last and several and method.family in CONTENDERS:
            chosen = {n: choice[method.family].entry for n, choice in enumerate(choices) if method.family in choice}
            found.append((CONTENDERS[method.family], method.family, chosen))
    return found
