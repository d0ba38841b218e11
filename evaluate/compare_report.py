"""A comparison's folder: comparison.json, comparison.md, and comparison.html, one file that loads nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import require_extra
from ..cache.fileio import write_json_durably, write_text_durably
from ..train.metrics import METRIC_NAMES, PAPER_METRICS
from .compare import Comparison
from .compare_json import comparison_json
from .compare_read import Entry, Place
from .compare_sheets import sheets
from .compare_tables import sheets_to_markdown
from .compare_words import headline, remarks
from .files import COMPARISON_FILES, changing_report, check_report_folder
from .plots import draw_figure, save_figure, set_style, set_title
from .report import data_uri, render_page

_LINES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#7a6a00", "v"),
    ("#56B4E9", "P"),
    ("#222222", "X"),
)


def check_comparison_folder(folder: Path) -> None:
    """See before the work whether it can be saved.

    Raises:
        RunError: if the folder holds anything but an earlier comparison.
        MissingExtraError: if matplotlib or jinja2 is not installed.
    """
    check_report_folder(folder, COMPARISON_FILES)
    for module in ("matplotlib", "jinja2"):
        require_extra(module, "report", "The comparison")


def save_comparison(comparison: Comparison, folder: Path, *, paper: bool = False) -> None:
    """Write the folder's files, all or none; depth.png only if RELISH was trained at two depths somewhere.

    Args:
        comparison: what to write.
        folder: new, empty, or an earlier comparison.
        paper: whether the paper's own averages are added.

    Raises:
        RunError: if it cannot be written, or another process is at it.
        MissingExtraError: if matplotlib or jinja2 is not installed.
    """
    with changing_report(folder, COMPARISON_FILES) as stage:
        tables, said, title = sheets(comparison, paper=paper), remarks(comparison), headline(comparison)
        write_json_durably(stage / "comparison.json", comparison_json(comparison, paper=paper))
        write_text_durably(stage / "comparison.md", sheets_to_markdown(f"# Comparison\n\n{title}", tables, said))
        drawn = plot_depths(comparison, stage / "depth.png")
        html = render_page(
            "compare.html",
            headline=title,
            remarks=said,
            sheets=tables,
            figure=data_uri(stage / "depth.png") if drawn else None,
            places=comparison.places,
            resamples=comparison.resamples,
            average_seeds=comparison.average_seeds,
        )
        write_text_durably(stage / "comparison.html", html)


def plot_depths(comparison: Comparison, path: Path) -> bool:
    """Draw Pearson, Spearman and NRMSE against RELISH's depth on the frozen LLM, at one layer in each place.

    A row of axes for each LLM, a line for each data set, bars of one standard deviation over the seeds.

    Returns:
        Whether a figure was made: it takes two depths in some place.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    drawn = [place for place in comparison.places if len(_depths(place)) > 1]
    if not drawn:
        return False
    backbones = list(dict.fromkeys(place.backbone for place in drawn))
    figure = draw_figure((10.4, 3.5 * len(backbones) + 0.3))
    for line, backbone in enumerate(backbones):
        places = [place for place in drawn if place.backbone == backbone]
        for column, metric in enumerate(PAPER_METRICS):
            axes = figure.add_subplot(len(backbones), 3, 3 * line + column + 1)
            set_style(axes)
            for place in places:
                _draw(axes, place, metric, comparison.datasets.index(place.dataset))
            better = "lower is better" if metric == "nrmse" else "higher is better"
            set_title(axes, METRIC_NAMES[metric], f"{backbone}, {better}")
            axes.set_xlabel("Depth L")
            axes.set_xticks(sorted({entry.method.depth for place in places for entry in _depths(place)}))
    found = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 6), frameon=False, fontsize=9
    )
    save_figure(figure, path)
    return True


def _depths(place: Place) -> list[Entry]:
    """The plain RELISH head on the frozen LLM, no variant of it, by depth; all at one layer, that of the most depths.

    Each at the layer that validation chose for it would show the layers' differences as the depths'.
    """
    plain = [e for e in place.entries if (e.method.head, e.method.adapter, e.method.variant) == ("relish", "", "")]
    by_layer: dict[str, list[Entry]] = {}
    for entry in [every for chosen in plain for every in (chosen, *chosen.rejected)]:
        by_layer.setdefault(entry.layer, []).append(entry)
    return max(by_layer.values(), key=len, default=[])


def _draw(axes: Any, place: Place, metric: str, number: int) -> None:
    colour, marker = _LINES[number % len(_LINES)]
    curve = _depths(place)
    axes.errorbar(
        [entry.method.depth for entry in curve],
        [entry.metrics[metric]["mean"] for entry in curve],
        yerr=np.nan_to_num([entry.metrics[metric]["sd"] for entry in curve]),
        color=colour,
        marker=marker,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=1.7,
        elinewidth=1,
        capsize=2,
        label=place.dataset,
    )
