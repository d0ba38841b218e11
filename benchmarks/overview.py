"""The tables of RESULTS.md that show a comparison at a glance: every data set a column, an LLM a table."""

from collections.abc import Sequence
from typing import Any

from measure import table

METRICS = {"pearson": "†", "spearman": "§", "nrmse": "¶"}
"""Those shown, and the mark of a method that is significantly better than RELISH."""
_ANSWERS = {
    "greedy-0shot": "greedy decoding, 0-shot",
    "greedy-128shot": "greedy decoding, many-shot",
    "rail-samples-0shot": "RAIL from 16 samples, 0-shot",
    "rail-samples-128shot": "RAIL from 16 samples, many-shot",
    "rail-0shot": "RAIL over the candidates, 0-shot",
    "rail-128shot": "RAIL over the candidates, many-shot",
}
_HEADS = {
    "ridge": "ridge, last token",
    "ridge-mean": "ridge, mean",
    "linear": "linear, mean",
    "linear-last": "linear, last token",
    "mlp": "MLP, mean",
    "mlp-last": "MLP, last token",
    "attention": "attention pooling",
    **{f"relish, L = {depth}": f"RELISH, L = {depth}" for depth in range(1, 6)},
}
NAMES = {
    **_ANSWERS,
    "rail-sum-0shot": "Σ p(y) y, 0-shot",
    "rail-sum-128shot": "Σ p(y) y, many-shot",
    **_HEADS,
    "RELISH, chosen": "RELISH, its depth by validation",
    "rail-sum-0shot on raft": "RAFT, Σ p(y) y",
    **{f"{method} on raft": f"RAFT, then {name}" for method, name in {**_ANSWERS, **_HEADS}.items()},
    "tuned-head on lora": "LoRA and its linear head",
    **{f"{method} on lora": f"LoRA, then {name}" for method, name in _HEADS.items()},
    "RELISH hybrid, chosen": "RELISH on tuned states, which by validation",
}
"""Methods as `relish compare` calls them, and as people do, in the order of the tables."""
TITLES = {
    "gemma-3-270m": "Gemma 3 270M",
    "sick": "SICK",
    "stsb": "STS-B",
    **{f"wmt-{pair}": f"WMT {pair}" for pair in ("en-zh", "ru-en", "si-en")},
}
"""Data sets and LLMs, likewise."""
LEFT_OUT = ("rail-median", "rail-samples-median")
"""How names of methods begin that are in comparison.md alone: those for the absolute error. Any other that has no name
here is shown as it is called."""


def overview(comparison: dict[str, Any]) -> str:
    """Markdown from comparison.json: Pearson / Spearman / NRMSE on the test rows, the best of all methods in bold.

    How often RELISH is ahead, a table for each LLM, one of the averages over all data sets, and one for each kind of
    best rival.
    """
    parts = ["Each method predicts the mean over its seeds.\n"] if comparison["average_seeds"] else []
    parts += [f"Wins / ties / losses, against the best rival:\n\n{_counts(comparison['counts'])}\n"]
    for backbone in comparison["backbones"]:
        places = [place for place in comparison["places"] if place["backbone"] == backbone]
        columns = [_column(place, comparison) for place in places]
        heads = ["Method", *(_title(place["dataset"]) for place in places)]
        parts.append(f"**{_title(backbone)}**\n\n{table(heads, _rows(columns), figures=True)}\n")
    if len(comparison["datasets"]) > 1:
        parts.append(f"Macro averages × 100, of what was run everywhere:\n\n{_macro(comparison['macro'])}\n")
    for pair in dict.fromkeys((duel["contender"], duel["opponent"]) for duel in comparison["best_rival"]):
        duels = _of(comparison["best_rival"], contender=pair[0], opponent=pair[1])
        parts.append(
            f"{NAMES.get(pair[0], pair[0])}, against the {pair[1]}; bold is significantly ahead:\n\n{_duels(duels)}\n"
        )
    return "\n".join(parts)


def _counts(counts: Sequence[dict[str, Any]]) -> str:
    """A line for each kind of best rival, over all LLMs."""
    found = [count for count in counts if count["backbone"] is None and count["opponent"].startswith("best")]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for count in found:
        tally = f"{count['wins']} / {count['ties']} / {count['losses']}"
        lines.setdefault((count["contender"], count["opponent"]), {})[count["metric"]] = tally
    return table(
        ["", "against the", "Pearson", "Spearman", "NRMSE"],
        [[NAMES.get(who, who), rival, *map(tallies.get, METRICS)] for (who, rival), tallies in lines.items()],
    )


def _duels(duels: Sequence[dict[str, Any]]) -> str:
    """A line for each data set and LLM, with both sides' figures; another metric may have another best rival."""
    lines = []
    for place in dict.fromkeys((duel["dataset"], duel["backbone"]) for duel in duels):
        here = _of(duels, dataset=place[0], backbone=place[1])
        sides = []
        for side, name, ahead in (("ours", "method", "win"), ("theirs", "opponent_method", "loss")):
            by_method = {}
            for method in dict.fromkeys(duel[name] for duel in here):
                texts = {duel["metric"]: _text(duel[side] if duel[name] == method else None) for duel in here}
                best = {metric: text for metric, text in texts.items() if _of(here, metric=metric, outcome=ahead)}
                by_method[NAMES.get(method, method)] = _joined(texts, best)
            sides.append("; ".join(f"{method} {figures}" for method, figures in by_method.items()))
        lines.append([*map(_title, place), *sides])
    return table(["data", "LLM", "RELISH", "rival"], lines)


def _rows(columns: Sequence[dict[str, str]]) -> list[list[str]]:
    """A line for each method of any column."""
    held = dict.fromkeys(method for column in columns for method in column)
    named = [method for method in NAMES if method in held]
    others = [method for method in held if method not in NAMES and not method.startswith(LEFT_OUT)]
    return [
        [NAMES.get(method, method), *(column.get(method, "–") for column in columns)] for method in [*named, *others]
    ]


def _macro(averages: Sequence[dict[str, Any]]) -> str:
    """A column for each LLM, and one for all; a method that was not run everywhere has none."""
    ordered = sorted(averages, key=lambda average: average["backbone"] is None)
    columns = []
    for average in ordered:
        methods = average["methods"]
        best = {metric: _text(_best([method[metric] for method in methods], metric), 100) for metric in METRICS}
        texts = {method["method"]: {metric: _text(method[metric], 100) for metric in METRICS} for method in methods}
        columns.append({name: _joined(figures, best) for name, figures in texts.items()})
    heads = ["Method", *(_title(average["backbone"] or "all") for average in ordered)]
    return table(heads, _rows(columns), figures=True)


def _column(place: dict[str, Any], comparison: dict[str, Any]) -> dict[str, str]:
    """A cell for each method of a place."""
    here = {"dataset": place["dataset"], "backbone": place["backbone"]}
    chosen = [one["method"] for one in _of(comparison["chosen"], **here, family="relish")]
    methods = place["methods"]
    best = {metric: _text(_best([method[metric]["mean"] for method in methods], metric)) for metric in METRICS}
    cells = {}
    for method in methods:
        duels = _of(comparison["tests"], **here, contender="RELISH, chosen", opponent_method=method["method"])
        outcomes = {duel["metric"]: duel["outcome"] for duel in duels}
        texts = {metric: _text(method[metric]["mean"]) for metric in METRICS}
        marks = {metric: mark for metric, mark in METRICS.items() if outcomes.get(metric) == "loss"}
        behind = r"\*" if outcomes.get("nrmse") == "win" else ""
        cells[method["method"]] = _joined(texts, best, marks) + behind + (" ‡" if method["method"] in chosen else "")
    return cells


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _best(values: Sequence[float | None], metric: str) -> float | None:
    defined = [value for value in values if value is not None]
    return (min if metric == "nrmse" else max)(defined) if defined else None


def _text(value: float | None, times: int = 1) -> str:
    """A figure; a correlation of predictions that are all the same has none."""
    if value is None:
        return "–"
    return (f"{value:.3f}" if times == 1 else f"{times * value:.1f}").replace("-", "−")


def _joined(texts: dict[str, str], best: dict[str, str], marks: dict[str, str] | None = None) -> str:
    """Three figures as one cell."""
    bold = {metric: f"**{text}**" if text == best.get(metric) != "–" else text for metric, text in texts.items()}
    return " / ".join(text + (marks or {}).get(metric, "") for metric, text in bold.items())


def _of(entries: Sequence[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]
