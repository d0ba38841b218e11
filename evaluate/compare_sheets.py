"""What a comparison says, as tables without a form: terminal, Markdown, LaTeX and the page print the same sheets."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..train.metrics import HIGHER_IS_BETTER, METRIC_NAMES, PAPER_METRICS
from .compare import PAPER, Comparison
from .compare_methods import CONTENDERS, FAMILIES
from .compare_read import Entry
from .compare_words import count, count_places
from .significance import ALPHA
from .tables import format_number, heading

WORSE, BETTER, CHOSEN = "*", "†", "‡"
"""Marks of a figure: significantly worse than RELISH, significantly better, and RELISH as it was chosen."""
_NONE = "–"


@dataclass(frozen=True)
class Figure:
    """One cell of a table."""

    text: str
    soft: str = ""
    """What stands smaller beside it, or is left out where room is short."""
    bold: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table."""

    title: str
    columns: tuple[str, ...]
    groups: list[tuple[str, list[list[Figure]]]]
    """Headings, and the lines below each."""
    caption: str = ""
    texts: int = 1
    """How many columns from the left hold words rather than numbers."""


def sheets(comparison: Comparison, *, paper: bool = False) -> list[Sheet]:
    """Every table of a comparison, the most general first.

    Args:
        comparison: what to show.
        paper: whether the paper's own averages stand below those found here.
    """
    found = [_macro(comparison, number, paper=paper) for number in range(len(comparison.macros))]
    if comparison.rivals:
        found.append(_rivals(comparison))
    if comparison.counts:
        found.append(_counts(comparison))
    for backbone in comparison.backbones:
        found += [_glance(comparison, backbone, metric) for metric in PAPER_METRICS]
        if _has_medians(comparison, backbone):
            found.append(_glance(comparison, backbone, "mae"))
    return found + [_costs(comparison, backbone) for backbone in comparison.backbones]


def _macro(comparison: Comparison, number: int, *, paper: bool) -> Sheet:
    macro = comparison.macros[number]
    rows = {row.label: row.values for row in macro.rows}
    best = {metric: _best([values[metric] for values in rows.values()], metric) for metric in PAPER_METRICS}
    lines: dict[str, list[list[Figure]]] = {family: [] for family in FAMILIES.values()}
    for row in macro.rows:
        figures = [Figure(_times_100(row.values[m]), bold=row.values[m] == best[m]) for m in PAPER_METRICS]
        lines[FAMILIES[row.family]].append([Figure(row.label), *figures])
    groups = [(family, own) for family, own in lines.items() if own]
    if paper and number == 0:
        own = [[Figure(name), *(Figure(_times_100(v[m])) for m in PAPER_METRICS)] for name, v in PAPER.items()]
        groups.append(("The paper's own (its five data sets, four LLMs of 8–32B)", own))
    missing = [f"{label} (not on {', '.join(places)})" for label, places in macro.missing.items()]
    over = count("data set", macro.places)
    if macro.backbone is None and len(comparison.backbones) > 1:
        over = f"{macro.places} pairs of data set and LLM"
    of = ", of the mean prediction over a method's seeds" if comparison.average_seeds else ""
    caption = f"Figures × 100{of}, mean over {over} with equal weight."
    if missing:
        caption += f" Left out: {'; '.join(missing)}."
    name = f"Macro average, {macro.backbone}" if macro.backbone is not None else "Macro average"
    return Sheet(name, ("Method", *map(heading, PAPER_METRICS)), groups, caption)


def _rivals(comparison: Comparison) -> Sheet:
    groups: dict[str, list[list[Figure]]] = {}
    for duel in comparison.rivals:
        low, high = duel.difference.ci95
        interval = f"[{format_number(low)}, {format_number(high)}]" if math.isfinite(low) else ""
        title = f"{duel.contender}, against the {duel.opponent}"
        title += f" ({duel.backbone})" if len(comparison.backbones) > 1 else ""
        groups.setdefault(title, []).append(
            [
                Figure(duel.dataset),
                Figure(METRIC_NAMES[duel.metric]),
                Figure(format_number(duel.ours), soft=duel.method, bold=duel.outcome == "win"),
                Figure(format_number(duel.theirs), soft=duel.other, bold=duel.outcome == "loss"),
                Figure(_signed(duel.difference.value), soft=interval),
                Figure(
                    _p(duel.p_holm),
                    soft=f"{_p(duel.difference.p)} before correction; bootstrap {_p(duel.p_bootstrap_holm)}",
                ),
                Figure(duel.outcome or _NONE),
            ]
        )
    difference = "Difference" if comparison.average_seeds else "Difference of the means over seeds"
    caption = (
        "RELISH is chosen by validation NRMSE, the best rival for each metric by validation (Pearson for Pearson and "
        f"Spearman, NRMSE for NRMSE). {difference} [95 % paired bootstrap interval over rows]; p "
        f"of the paired permutation test, {comparison.resamples:,} draws each, corrected over the data sets of the LLM "
        "(Holm; a single one needs no correction), and beside it of the bootstrap, likewise corrected. A win or a loss "
        f"has p ≤ {ALPHA:g} by the first. The tests are about other rows; trainings are taken as they are."
    )
    columns = ("Data set", "Metric", "RELISH", "Best rival", "Difference", "p", "Outcome")
    return Sheet("RELISH against the best rival", columns, list(groups.items()), caption, texts=2)


def _counts(comparison: Comparison) -> Sheet:
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for found in comparison.counts:
        if found.backbone is None:
            tally = f"{found.wins}/{found.ties}/{found.losses}"
            lines.setdefault((found.contender, found.opponent), {})[found.metric] = tally
    groups: dict[str, list[list[Figure]]] = {}
    for (contender, opponent), tallies in lines.items():
        line = [Figure(opponent), *(Figure(tallies[metric]) for metric in PAPER_METRICS)]
        groups.setdefault(contender, []).append(line)
    caption = (
        f"Over {count_places(comparison)}, wherever the opponent is. Wins and losses have p ≤ {ALPHA:g} after Holm's "
        "correction over the data sets of an LLM, ties more; what is undefined for one side counts nowhere."
    )
    columns = ("Opponent", *(METRIC_NAMES[metric] for metric in PAPER_METRICS))
    return Sheet("Wins/ties/losses of RELISH", columns, list(groups.items()), caption)


def _has_medians(comparison: Comparison, backbone: str) -> bool:
    """Whether answers are there that are meant for the absolute error."""
    own = [place for place in comparison.places if place.backbone == backbone]
    return any("-median-" in entry.method.head for place in own for entry in place.entries)


def _glance(comparison: Comparison, backbone: str, metric: str) -> Sheet:
    columns = [
        (place, chosen)
        for place, chosen in zip(comparison.places, comparison.choices, strict=True)
        if place.backbone == backbone
    ]
    marks = _marks(comparison, backbone, metric)
    best = [_best([entry.metrics[metric]["mean"] for entry in place.entries], metric) for place, _ in columns]
    have: dict[str, dict[int, Entry]] = {}
    for number, (place, chosen) in enumerate(columns):
        for entry in place.entries:
            have.setdefault(entry.method.label, {})[number] = entry
            if any(choice.entry is entry for choice in chosen.values()):
                marks[place.dataset, entry.method.label] = marks.get((place.dataset, entry.method.label), "") + CHOSEN
    lines: dict[str, list[list[Figure]]] = {family: [] for family in FAMILIES.values()}
    for label, entries in sorted(have.items(), key=lambda one: next(iter(one[1].values())).method.order):
        line = [Figure(label)]
        for number, (place, _) in enumerate(columns):
            line.append(
                _mean(entries[number], metric, best[number], marks.get((place.dataset, label), ""))
                if number in entries
                else Figure(_NONE)
            )
        lines[FAMILIES[next(iter(entries.values())).method.family]].append(line)
    what = "Mean over seeds, ± standard deviation over seeds where there is room"
    if comparison.average_seeds:
        what = "Of the mean prediction over a method's seeds"
    caption = f"{what}; the best of a column in bold. {CHOSEN} RELISH as chosen by validation"
    if metric in PAPER_METRICS:
        caption += f"; {WORSE} significantly worse than it on the frozen LLM, {BETTER} significantly better "
        caption += "(permutation test, Holm). Of RELISH's other rows only those chosen by validation are tested."
    else:
        caption += ". In the unit of the labels, for which the medians are meant; not tested."
    title = f"{heading(metric)}, {backbone}"
    return Sheet(
        title, ("Method", *(place.dataset for place, _ in columns)), [g for g in lines.items() if g[1]], caption
    )


def _marks(comparison: Comparison, backbone: str, metric: str) -> dict[tuple[str, str], str]:
    """(data set, method) to its mark: what RELISH on the frozen LLM wins or loses against it."""
    signs = {"win": WORSE, "loss": BETTER}
    return {
        (duel.dataset, duel.other): signs[duel.outcome]
        for duel in comparison.duels
        if (duel.backbone, duel.metric, duel.contender) == (backbone, metric, CONTENDERS["relish"])
        and duel.outcome in signs
    }


def _mean(entry: Entry, metric: str, best: float, mark: str) -> Figure:
    estimate = entry.metrics[metric]
    spread = f"± {format_number(estimate['sd'])}" if math.isfinite(estimate["sd"]) else ""
    return Figure(format_number(estimate["mean"]) + mark, soft=spread, bold=estimate["mean"] == best)


def _costs(comparison: Comparison, backbone: str) -> Sheet:
    own = [place for place in comparison.places if place.backbone == backbone]
    sizes = {place.backbone_parameters for place in own if place.backbone_parameters is not None}
    size = sizes.pop() if len(sizes) == 1 else None
    have: dict[str, list[Entry]] = {}
    for place in own:
        for entry in place.entries:
            have.setdefault(entry.method.label, []).append(entry)
    lines: dict[str, list[list[Figure]]] = {family: [] for family in FAMILIES.values()}
    for label, entries in sorted(have.items(), key=lambda one: one[1][0].method.order):
        counts = [entry.parameters for entry in entries if entry.parameters is not None]
        parameters = max(counts) if len(counts) == len(entries) else None
        lines[FAMILIES[entries[0].method.family]].append(
            [
                Figure(label),
                Figure(_from_to([entry.seed_count for entry in entries])),
                Figure(f"{parameters:,}" if parameters is not None else _NONE),
                Figure(f"{100 * parameters / size:.3g} %" if parameters is not None and size else _NONE),
                Figure(_seconds(entry.extras["seconds_per_1000_rows"] for entry in entries)),
                Figure(_seconds(entry.extras["train_seconds"] for entry in entries)),
            ]
        )
    about = f"The LLM has {size:,} parameters. " if size else ""
    over, trained, together = "data sets and seeds", "one seed", ""
    if comparison.average_seeds:
        over, trained = "data sets", "all seeds"
        together = " (not known where seeds are averaged: the LLM once for each tuning, and each head)"
    caption = (
        f"{about}Means over {over}, of the parameters the largest; seconds are wall time on the machines that ran each "
        f"step, beside whatever else they ran. Per 1,000 rows: the LLM's forward passes and the head, or decoding"
        f"{together}; a head on a middle layer is charged for all layers that were extracted with it. Parameters and "
        f"training are those of {trained}, the latter without the LLM's passes over the training rows, which all heads "
        "share; what else heads share, such as scales, is in the time of the first of a grid that needs it."
    )
    if any(entry.method.adapter for entries in have.values() for entry in entries):
        caption += " With a tuned LLM its adapter's are added, and the head that was tuned with it."
    columns = ("Method", "Seeds", "Trained parameters", "Share of the LLM", "s per 1,000 rows", "Training, s")
    return Sheet(f"Costs, {backbone}", columns, [group for group in lines.items() if group[1]], caption)


def _best(values: Sequence[float], metric: str) -> float:
    known = [value for value in values if math.isfinite(value)]
    pick = max if HIGHER_IS_BETTER[metric] else min
    return pick(known) if len(known) > 1 else math.nan


def _times_100(value: float) -> str:
    return f"{100 * value:.1f}".replace("-", "−") if math.isfinite(value) else _NONE


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)


def _p(value: float) -> str:
    return _NONE if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _from_to(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"


def _seconds(values: Iterable[float | None]) -> str:
    """The mean, with three digits; a dash if any is unknown."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    if len(known) < len(listed):
        return _NONE
    mean = sum(known) / len(known)
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"
