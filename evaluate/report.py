"""The report: one HTML file that holds its figures and loads nothing, to be opened, mailed or printed."""

import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import require_extra
from ..cache.fileio import write_text_durably
from ..train.metrics import METRIC_NAMES, METRICS
from .plots import plot_depth, plot_scatter
from .summary import Results, Summary
from .tables import (
    answer_notes,
    average_notes,
    best_means,
    choice_notes,
    format_depth,
    format_estimate,
    format_number,
    heading,
    warning_notes,
)

_WORST = 15


@dataclass(frozen=True)
class WorstRow:
    """One row that the best group gets wrong, in the label's unit."""

    id: str
    row: int
    gold: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted minus gold."""
        return self.predicted - self.gold


def write_report(results: Results, folder: Path) -> Path:
    """Write report.html, and beside it the figures it holds: scatter.png, and depth.png if two depths were trained.

    Returns:
        The path of report.html.

    Raises:
        MissingExtraError: if matplotlib or jinja2 is not installed.
    """
    require_extra("jinja2", "report", "Writing the report")  # before anything is drawn
    folder.mkdir(parents=True, exist_ok=True)
    best = results.best
    figures = []
    if best is not None:
        plot_scatter(results, folder / "scatter.png")
        figures.append(("scatter", f"Predicted against gold scores of {best.label}", folder / "scatter.png"))
    if plot_depth(results, folder / "depth.png"):
        figures.append(("depth", "Pearson, Spearman and NRMSE against the depth of the head", folder / "depth.png"))

    html = render_page(
        "report.html",
        results=results,
        best=best,
        headline=headline(results),
        comparison=comparison(results),
        best_means=best_means(results),
        notes=warning_notes(results),
        table_notes=[*choice_notes(results), *average_notes(results), *answer_notes(results)],
        metrics=METRICS,
        names=METRIC_NAMES,
        heading=heading,
        figures={name: {"alt": alt, "source": data_uri(path)} for name, alt, path in figures},
        worst=worst_rows(results),
        meta=_shown(results.meta),
    )
    path = folder / "report.html"
    write_text_durably(path, html)
    return path


def render_page(template: str, **values: Any) -> str:
    """Fill one of the templates beside this file; everything from outside is escaped.

    Raises:
        MissingExtraError: if jinja2 is not installed.
    """
    jinja2 = require_extra("jinja2", "report", "Writing the report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "depth": format_depth, "parts": format_estimate}
    return environment.get_template(template).render(**values)


def headline(results: Results) -> str:
    """The result in one sentence."""
    best = results.best
    if best is None:
        return f"No head gave usable predictions on the {results.rows:,} rows of {results.split}."
    low, high = results.label_range
    seeds = f"averaged over {best.seeds} seeds" if best.seeds > 1 else "with one seed"
    error = format_number(best.metrics["mae"]["mean"])
    off = f"it is {error} off on average, on a scale from {low:g} to {high:g}"
    name = f"RELISH with L = {best.depth}" if best.head == "relish" else f"The head {best.label}"
    if len(results.groups) > 1 and results.validated:
        name += ", which the validation rows choose,"
    elif len(results.groups) > 1:
        name += f", the best of {len(results.groups)} on these rows (which flatters it),"
    pearson = best.metrics["pearson"]
    if not math.isfinite(pearson["mean"]):
        if np.ptp(results.target) == 0:
            found = "has no correlation with labels that are all the same,"
        else:
            found = "predicts a constant" + (" with at least one of its seeds" if best.seeds > 1 else "")
        return f"{name} {found} on {results.split} ({results.rows:,} rows): {off}."
    interval = " to ".join(format_number(bound) for bound in pearson["ci95"])
    return (
        f"{name} reaches a Pearson correlation of {format_number(pearson['mean'])} (95 % interval {interval}) on "
        f"the {results.rows:,} rows of {results.split}, {seeds}; {off}."
    )


def comparison(results: Results) -> str:
    """How the best group stands to the best head of another kind; empty if there is none."""
    best = results.best
    if best is None or not math.isfinite(_pearson(best)):
        return ""
    second = results.best_of([g for g in results.groups if g.head != best.head and math.isfinite(_pearson(g))])
    if second is None:
        return ""
    gap = _pearson(best) - _pearson(second)
    return (
        f"That is {format_number(abs(gap))} {'below' if gap < 0 else 'above'} the best head of another kind"
        f"{' on the validation rows' if results.validated else ''}, {second.label} ({format_number(_pearson(second))})."
    )


def worst_rows(results: Results) -> list[WorstRow]:
    """The rows with the largest absolute error of the best group's predictions averaged over its seeds, worst first."""
    best = results.best
    if best is None:
        return []
    predicted = results.mean_prediction(best)
    order = np.argsort(-np.abs(predicted - results.target), kind="stable")[:_WORST].tolist()
    return [WorstRow(results.ids[i], int(results.row[i]), float(results.target[i]), float(predicted[i])) for i in order]


def _pearson(group: Summary) -> float:
    return group.metrics["pearson"]["mean"]


def _shown(meta: dict[str, Any]) -> dict[str, str]:
    """What made the results as text; entries that are None are left out."""
    return {name: f"{v:,}" if type(v) is int else str(v) for name, v in meta.items() if v is not None}


def data_uri(path: Path) -> str:
    """A PNG as the source of an image, so that a page loads nothing."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
