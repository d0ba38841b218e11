"""Duels: a contender of the RELISH family against one opponent, on the same rows of one place.

Who stands for RELISH in a place, and who is the best rival, is chosen by validation figures wherever there are any.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..train.metrics import HIGHER_IS_BETTER, PAPER_METRICS
from .compare_methods import CONTENDERS
from .compare_read import Entry, Place
from .significance import ALPHA, Array, Difference, differences, draw_rows, holm, pair_seeds, resampled_figures

BEST_RIVAL = "best rival"
"""The opponent of the duels that name the strongest method outside RELISH."""
BEST_FROZEN = "best rival, LLM frozen"
"""The same among the methods whose LLM is not fine-tuned, for RELISH on the frozen LLM; only where others are."""
_CRITERION = {"pearson": "val_pearson", "spearman": "val_pearson", "nrmse": "val_nrmse"}


@dataclass(frozen=True, eq=False)
class Choice:
    """One of several methods, picked in one place."""

    entry: Entry
    by: str
    """"validation"; "test" where a candidate has no validation figures; "only" where there was nothing to choose."""


@dataclass(frozen=True)
class Duel:
    """A contender against one opponent, in one place, by one metric."""

    dataset: str
    backbone: str
    contender: str
    """A value of CONTENDERS."""
    method: str
    """The contender's method in this place."""
    opponent: str
    """What the opponent is called over all places: a method, a value of CONTENDERS, BEST_RIVAL or BEST_FROZEN."""
    other: str
    """The opponent's method in this place."""
    by: str
    """How that was chosen, as `Choice.by` says it; empty if it was not."""
    metric: str
    ours: float
    """Mean over the seeds, or of the mean prediction over them."""
    theirs: float
    difference: Difference
    """Ours less theirs."""
    p_holm: float = math.nan
    """p of the permutation test, corrected over the data sets of this LLM (Holm)."""
    p_bootstrap_holm: float = math.nan
    """p of the bootstrap, corrected in the same way."""

    @property
    def outcome(self) -> str:
        """win, tie (p_holm above ALPHA) or loss, for the contender; empty where the metric is undefined for a side."""
        if math.isnan(self.p_holm):
            return ""
        if self.p_holm > ALPHA:
            return "tie"
        return "win" if (self.difference.value > 0) == HIGHER_IS_BETTER[self.metric] else "loss"


@dataclass(frozen=True)
class Count:
    """How a contender fares against one opponent over places."""

    contender: str
    opponent: str
    metric: str
    backbone: str | None
    """None: over all of them."""
    wins: int
    ties: int
    losses: int


def choose(candidates: Sequence[Entry], metric: str) -> Choice:
    """The best candidate by its validation figures: the NRMSE for "nrmse", Pearson for the other metrics.

    Candidates without validation figures stand against the best of the others by the metric itself, on the test rows.
    One whose validation predictions are constant has figures: no correlation is the worst.
    """
    criterion, worst = _CRITERION[metric], -math.inf
    judged = [
        (worst if e.extras[criterion] is None and e.extras["val_nrmse"] is not None else e.extras[criterion], e)
        for e in candidates
    ]
    known = [(value, entry) for value, entry in judged if value is not None]
    best = [max(known, key=lambda one: one[0] if HIGHER_IS_BETTER[metric] else -one[0])[1]] if known else []
    finalists = best + [entry for value, entry in judged if value is None]
    if len(candidates) == 1:
        return Choice(candidates[0], "only")
    if len(finalists) == 1:
        return Choice(finalists[0], "validation")

    def figure(entry: Entry) -> float:
        mean = entry.metrics[metric]["mean"]
        return -math.inf if math.isnan(mean) else mean if HIGHER_IS_BETTER[metric] else -mean

    return Choice(max(finalists, key=figure), "test")


def choose_contenders(place: Place) -> dict[str, Choice]:
    """One method of each family of CONTENDERS that is in a place, by validation NRMSE."""
    members = {family: [e for e in place.entries if e.method.family == family] for family in CONTENDERS}
    return {family: choose(entries, "nrmse") for family, entries in members.items() if entries}


def rivals_of(place: Place) -> list[Entry]:
    """Every method outside RELISH."""
    return [entry for entry in place.entries if entry.method.family not in CONTENDERS]


def pairings(place: Place, chosen: dict[str, Choice]) -> list[tuple[str, str, Entry]]:
    """(family of the contender, what its opponent is called, the opponent) of every comparison in a place."""
    found = []
    for family in chosen:
        found += [(family, entry.method.label, entry) for entry in rivals_of(place)]
        found += [(family, CONTENDERS[other], chosen[other].entry) for other in chosen if other != family]
    return found


def duels_in(place: Place, chosen: dict[str, Choice], resamples: int) -> Iterator[list[Duel]]:
    """Fight the pairings of a place one after another: the duels of each, one for each of PAPER_METRICS."""
    draws = draw_rows(len(place.target), resamples)
    drawn: dict[str, Array] = {}

    def resampled(entry: Entry) -> Array:
        label = entry.method.label
        if label not in drawn:
            figures = resampled_figures(place.target, entry.predictions, place.label_range, draws)
            drawn[label] = figures.mean(axis=0)
        return drawn[label]

    for family, opponent, theirs in pairings(place, chosen):
        ours = chosen[family].entry
        our_seeds, their_seeds = pair_seeds(ours.seeds, theirs.seeds)
        found = differences(
            place.target,
            ours.predictions[our_seeds],
            theirs.predictions[their_seeds],
            place.label_range,
            our_resamples=resampled(ours),
            their_resamples=resampled(theirs),
            permutations=resamples,
        )
        yield [
            Duel(
                dataset=place.dataset,
                backbone=place.backbone,
                contender=CONTENDERS[family],
                method=ours.method.label,
                opponent=opponent,
                other=theirs.method.label,
                by="",
                metric=metric,
                ours=ours.metrics[metric]["mean"],
                theirs=theirs.metrics[metric]["mean"],
                difference=difference,
            )
            for metric, difference in found.items()
        ]


def against_best(place: Place, duels: Sequence[Duel]) -> list[Duel]:
    """Of the duels of one place those against BEST_RIVAL and BEST_FROZEN, who are chosen for each metric."""
    rivals = rivals_of(place)
    frozen = [entry for entry in rivals if not entry.method.adapter]
    found = _against(BEST_RIVAL, rivals, duels)
    if len(frozen) < len(rivals):
        own = [duel for duel in duels if duel.contender == CONTENDERS["relish"]]
        found += _against(BEST_FROZEN, frozen, own)
    return found


def _against(name: str, rivals: Sequence[Entry], duels: Sequence[Duel]) -> list[Duel]:
    best = {metric: choose(rivals, metric) for metric in PAPER_METRICS} if rivals else {}
    return [
        replace(duel, opponent=name, by=choice.by)
        for metric, choice in best.items()
        for duel in duels
        if (duel.metric, duel.opponent) == (metric, choice.entry.method.label)
    ]


def correct(duels: Sequence[Duel]) -> list[Duel]:
    """The same with p corrected: for two methods and a metric, the tests on all data sets of one LLM are a family."""
    families: dict[tuple[str, str, str, str], list[int]] = {}
    for number, duel in enumerate(duels):
        families.setdefault((duel.backbone, duel.contender, duel.opponent, duel.metric), []).append(number)
    corrected = list(duels)
    for numbers in families.values():
        family = [duels[number].difference for number in numbers]
        permuted, drawn = holm([one.p for one in family]), holm([one.p_bootstrap for one in family])
        for number, p, p_bootstrap in zip(numbers, permuted, drawn, strict=True):
            corrected[number] = replace(duels[number], p_holm=p, p_bootstrap_holm=p_bootstrap)
    return corrected


def count_outcomes(duels: Sequence[Duel]) -> list[Count]:
    """Wins, ties and losses against each opponent by each metric: over all LLMs, and for each if there are several."""
    backbones = list(dict.fromkeys(duel.backbone for duel in duels))
    scopes = [None, *backbones] if len(backbones) > 1 else [None]
    outcomes: dict[tuple[str, str, str, str | None], list[str]] = {}
    for duel in duels:
        for scope in scopes:
            if scope in (None, duel.backbone):
                outcomes.setdefault((duel.contender, duel.opponent, duel.metric, scope), []).append(duel.outcome)
    return [
        Count(*name, *(found.count(outcome) for outcome in ("win", "tie", "loss"))) for name, found in outcomes.items()
    ]
