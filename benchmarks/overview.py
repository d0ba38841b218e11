"""The tables of RESULTS.md that show a comparison at a glance: every data set a column, an LLM a table."""

from collections.abc import Sequence
from typing import Any

from measure import table

METRICS = {"pearson": "†", "spearman": "§", "nrmse": "¶"}
"""Those shown, and the mark of a method that is significantly better than RELISH."""
NAMES = {
    "greedy-0shot": "greedy decoding, 0-shot",
    "greedy-128shot": "greedy decoding, many-shot",
    "rail-samples-0shot": "RAIL from 16 samples, 0-shot",
    "rail-samples-128shot": "RAIL from 16 samples, many-shot",
    "rail-0shot": "RAIL over the grid, 0-shot",
    "rail-128shot": "RAIL over the grid, many-shot",
    "ridge": "ridge, last token",
    "ridge-mean": "ridge, mean",
    "linear": "linear, mean",
    "linear-last": "linear, last token",
    "mlp": "MLP, mean",
    "mlp-last": "MLP, last token",
    "attention": "attention pooling",
    **{f"relish, L = {depth}": f"RELISH, L = {depth}" for depth in range(1, 6)},
    "rail-sum-0shot on raft": "RAFT, Σ p(y) y",
    "tuned-head on lora": "LoRA and its linear head",
    "linear-last on lora": "LoRA, then linear, last token",
    "mlp-last on lora": "LoRA, then MLP, last token",
    "attention on lora": "LoRA, then attention pooling",
    **{f"relish, L = {depth} on raft": f"RAFT, then RELISH, L = {depth}" for depth in (1, 3, 5)},
    **{f"relish, L = {depth} on lora": f"LoRA, then RELISH, L = {depth}" for depth in (1, 3, 5)},
}
"""Methods as `relish compare` calls them, and as people do; others are in comparison.md."""


def overview(comparison: dict[str, Any]) -> str:
    """Markdown from comparison.json: Pearson / Spearman / NRMSE on the test rows, the best of a column in bold."""
    parts = []
    for backbone in comparison["backbones"]:
        places = [place for place in comparison["places"] if place["backbone"] == backbone]
        columns = [_column(place, comparison) for place in places]
        rows = [[name, *(column.get(method, "–") for column in columns)] for method, name in NAMES.items()]
        shown = [row for row in rows if set(row[1:]) != {"–"}]
        parts.append(f"**{backbone}**\n\n{table(['Method', *(place['dataset'] for place in places)], shown)}\n")
    return "\n".join(parts)


def _column(place: dict[str, Any], comparison: dict[str, Any]) -> dict[str, str]:
    """A cell for each method of a place."""
    here = {"dataset": place["dataset"], "backbone": place["backbone"]}
    chosen = [one["method"] for one in _of(comparison["chosen"], **here, family="relish")]
    shown = [method for method in place["methods"] if method["method"] in NAMES]
    ends = {"pearson": max, "spearman": max, "nrmse": min}
    defined = {metric: [m[metric]["mean"] for m in shown if m[metric]["mean"] is not None] for metric in METRICS}
    best = {metric: f"{end(defined[metric]):.3f}" for metric, end in ends.items() if defined[metric]}
    cells = {}
    for method in shown:
        duels = _of(comparison["tests"], **here, contender="RELISH, chosen", opponent_method=method["method"])
        outcomes = {duel["metric"]: duel["outcome"] for duel in duels}
        figures = []
        for metric, mark in METRICS.items():
            mean = method[metric]["mean"]
            text = f"{mean:.3f}" if mean is not None else "–"
            bold = f"**{text}**" if text == best.get(metric) else text
            figures.append(bold.replace("-", "−") + (mark if outcomes.get(metric) == "loss" else ""))
        behind = r"\*" if outcomes.get("nrmse") == "win" else ""
        cells[method["method"]] = " / ".join(figures) + behind + (" ‡" if method["method"] in chosen else "")
    return cells


def _of(entries: Sequence[dict[str, Any]], **wanted: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]
