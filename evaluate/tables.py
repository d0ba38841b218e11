"""Results as tables for people: terminal, Markdown and LaTeX."""

import math
import os
from typing import TYPE_CHECKING

import numpy as np

from ..train.metrics import HIGHER_IS_BETTER, METRIC_NAMES, METRICS, PAPER_METRICS
from .readouts import answers_note
from .summary import VALIDATED_ON, Estimate, Results, flattering

if TYPE_CHECKING:
    from rich.console import Console


def format_depth(depth: int) -> str:
    """The depth as a column shows it."""
    return str(depth) if depth else "–"


def format_number(value: float) -> str:
    """Three decimals, a true minus, and a dash for NaN."""
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "–"


def format_estimate(estimate: Estimate) -> tuple[str, str, str]:
    """The parts (mean, "± sd" or "", "[low, high]" or "") of a table's cell."""
    low, high = estimate["ci95"]
    spread = f"± {format_number(estimate['sd'])}" if math.isfinite(estimate["sd"]) else ""
    interval = f"[{format_number(low)}, {format_number(high)}]" if math.isfinite(low) else ""
    return format_number(estimate["mean"]), spread, interval


def best_means(results: Results) -> dict[str, float]:
    """The best mean of each metric, to set it in bold; NaN where no group has one, or there is but one group."""
    best = {}
    for name in METRICS:
        means = [group.metrics[name]["mean"] for group in results.groups]
        means = [mean for mean in means if math.isfinite(mean)]
        pick = max if HIGHER_IS_BETTER[name] else min
        best[name] = pick(means) if means and len(results.groups) > 1 else math.nan
    return best


def failure_notes(results: Results) -> list[str]:
    """One sentence for each cell that does not count."""
    return [f"{c.label}, seed {c.seed}, does not count: {' '.join(c.status.split())}." for c in results.failed]


def answer_notes(results: Results) -> list[str]:
    """What must be known of the LLM's own answers: a sentence for each such line, and for each that was left out."""
    notes = [answers_note(cell.label, cell.answers) for cell in results.cells if cell.answers is not None]
    return [*filter(None, notes), *results.left_out]


def warning_notes(results: Results) -> list[str]:
    """What makes figures mislead: rows that heads have seen, cells that do not count, seeds without a correlation."""
    seen = flattering(results.split, str(results.meta.get(VALIDATED_ON, "")))
    constant = [
        f"{cell.label}, seed {cell.seed}, predicts one score for all rows: no correlation exists, and no mean of them."
        for cell, values in zip(results.cells, results.predictions, strict=True)
        if cell.status == "ok" and np.ptp(values) == 0
    ]
    return [*([f"Beware: {seen}."] if seen else []), *failure_notes(results), *constant]


def choice_notes(results: Results) -> list[str]:
    """Which depth of RELISH the validation rows choose; none where there is but one."""
    depths = [group for group in results.groups if group.head == "relish"]
    known = [(nrmse, group) for group in depths if (nrmse := group.extras.get("val_nrmse")) is not None]
    if len(depths) < 2 or len(known) < len(depths):
        return []
    nrmse, best = min(known, key=lambda one: one[0])
    return [f"Of the depths L = {best.depth} has the lowest validation NRMSE, {format_number(nrmse)}."]


def average_notes(results: Results) -> list[str]:
    """How good the mean prediction over seeds is, of the group of which it has the lowest NRMSE; none of one seed."""
    several = [(group, group.averaged) for group in results.groups if group.averaged is not None]
    if not several:
        return []
    best, figures = min(several, key=lambda one: one[1]["nrmse"])
    told = ", ".join(f"{METRIC_NAMES[name]} {format_number(figures[name])}" for name in PAPER_METRICS)
    return [f"Averaged over seeds, the predictions of {best.label} ({best.seeds} seeds) have the lowest NRMSE: {told}."]


def notes(results: Results) -> list[str]:
    """All sentences below a table, after its caption."""
    return [*warning_notes(results), *choice_notes(results), *average_notes(results), *answer_notes(results)]


def caption(results: Results) -> str:
    """What the numbers of a table mean."""
    low, high = results.label_range
    return (
        f"Split {results.split}, {results.rows:,} rows, labels from {low:g} to {high:g}. Mean over seeds ± standard "
        "deviation over seeds [95 % bootstrap interval over rows]."
    )


def heading(name: str) -> str:
    """A metric's column heading, with an arrow for the better direction."""
    return f"{METRIC_NAMES[name]} {'↑' if HIGHER_IS_BETTER[name] else '↓'}"


def to_markdown(results: Results) -> str:
    """A GitHub table with its caption; the best mean of each column in bold."""
    best = best_means(results)
    lines = [
        "| " + " | ".join(["Head", "L", "Parameters", "Seeds", *map(heading, METRICS)]) + " |",
        "| --- |" + " ---: |" * (3 + len(METRICS)),
    ]
    for group in results.groups:
        columns = [group.head.replace("|", "\\|"), format_depth(group.depth), f"{group.parameters:,}", str(group.seeds)]
        for name in METRICS:
            mean, *rest = format_estimate(group.metrics[name])
            mean = f"**{mean}**" if group.metrics[name]["mean"] == best[name] else mean
            columns.append(" ".join(part for part in (mean, *rest) if part))
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, "", " ".join([caption(results), *notes(results)]), ""])


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "−": "$-$", "–": "--"}
_LATEX |= {"*": "$^*$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "<": "$<$"}


def latex(text: str) -> str:
    """The text with everything that LaTeX would take for its own."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(results: Results) -> str:
    """A booktabs tabular: mean ± standard deviation over seeds, the best mean of each column in bold.

    The intervals are left to the other forms: with them the table would be wider than a page.
    """
    best = best_means(results)
    lines = [
        r"% needs \usepackage{booktabs}",
        "% " + caption(results).partition(" [")[0],
        *(f"% {note}" for note in notes(results)),
        rf"\begin{{tabular}}{{l{'r' * (3 + len(METRICS))}}}",
        r"\toprule",
        " & ".join(["Head", "$L$", "Parameters", "Seeds", *(latex(heading(name)) for name in METRICS)]) + r" \\",
        r"\midrule",
    ]
    for group in results.groups:
        columns = [group.head, format_depth(group.depth), f"{group.parameters:,}", str(group.seeds)]
        columns = [latex(column) for column in columns]
        for name in METRICS:
            mean, spread, _ = (latex(part) for part in format_estimate(group.metrics[name]))
            mean = rf"\textbf{{{mean}}}" if group.metrics[name]["mean"] == best[name] else mean
            columns.append(rf"{mean} {{\scriptsize {spread}}}" if spread else mean)
        lines.append(" & ".join(columns) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


_PLAIN = str.maketrans({"↑": "^", "↓": "v", "±": "+-", "−": "-", "–": "-", "†": "+", "‡": "#", "×": "x", "≤": "<="})


_PIPED = 200
"""Columns of a table that no terminal limits."""


def fit(text: str, console: "Console") -> str:
    """The text in the terminal's encoding: Python raises for a character that it lacks, as Windows' lack the arrows."""
    return text if console.encoding.lower().startswith("utf") else text.translate(_PLAIN)


def table_console() -> "Console":
    """Of stdout; so wide on a pipe that names of methods stay whole, for whoever searches them."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED
    return console


def print_table(results: Results, console: "Console") -> None:
    """Print a line for each head and depth: the paper's three metrics, which fit a terminal of 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def shown(text: str) -> str:
        return fit(text, console)

    best = best_means(results)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.caption = Text(shown(" ".join([caption(results), *notes(results)])))
    table.add_column("head", overflow="fold")
    for title in ("L", "parameters", "seeds", *map(heading, PAPER_METRICS)):
        table.add_column(shown(title), justify="right", no_wrap=True)
    for group in results.groups:
        columns = [Text(group.head), shown(format_depth(group.depth)), f"{group.parameters:,}", str(group.seeds)]
        for name in PAPER_METRICS:
            mean, spread, interval = map(shown, format_estimate(group.metrics[name]))
            text = Text(mean, style="bold" if group.metrics[name]["mean"] == best[name] else "")
            text.append(f" {spread}" if spread else "", style="not bold")
            text.append(f"\n{interval}" if interval else "", style="not bold dim")
            columns.append(text)
        table.add_row(*columns)
    console.print(table)
