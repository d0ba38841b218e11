"""A comparison's folder: comparison.json, comparison.md, and comparison.html, one file that loads nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import require_extra
from ..cache.fileio import write_json_durably, write_text_durably
from ..train.metrics import METRIC_NAMES, PAPER_METRICS
from .compare import Comparison
from .compare_json import comparison_json
from .compare_read import Place
from .compare_sheets import sheets
from .compare_tables import sheets_to_markdown
from .compare_words import headline, remarks
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


def write_comparison(comparison: Comparison, folder: Path, *, paper: bool = False) -> None:
    """Write the folder's files; depth.png only if RELISH was trained at two depths somewhere.

    Raises:
        MissingExtraError: if matplotlib or jinja2 is not installed.
    """
    require_extra("jinja2", "report", "Writing the comparison")
    folder.mkdir(parents=True, exist_ok=True)
    write_json_durably(folder / "comparison.json", comparison_json(comparison, paper=paper))
    tables, said = sheets(comparison, paper=paper), remarks(comparison)
    title = headline(comparison)
    write_text_durably(folder / "comparison.md", sheets_to_markdown(f"# Comparison\n\n{title}", tables, said))
    drawn = plot_depths(comparison, folder / "depth.png")
    html = render_page(
        "compare.html",
        headline=title,
        remarks=said,
        sheets=tables,
        figure=data_uri(folder / "depth.png") if drawn else None,
        places=comparison.places,
        resamples=comparison.resamples,
    )
    write_text_durably(folder / "comparison.html", html)


def plot_depths(comparison: Comparison, path: Path) -> bool:
    """Draw Pearson, Spearman and NRMSE against RELISH's depth on the frozen LLM: a line for each data set, a row of axes
    for each LLM, bars of one standard deviation over the seeds.

    Returns:
        Whether a figure was made: it takes two depths in some place.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    curves = {
        (place.backbone, place.dataset): curve
        for place in comparison.places
        if len(curve := _curve(place)["depth"]) > 1
    }
    if not curves:
        return False
    backbones = [name for name in comparison.backbones if any(backbone == name for backbone, _ in curves)]
    figure = draw_figure((10.4, 3.5 * len(backbones) + 0.3))
    for line, backbone in enumerate(backbones):
        for column, metric in enumerate(PAPER_METRICS):
            axes = figure.add_subplot(len(backbones), 3, 3 * line + column + 1)
            set_style(axes)
            for place in comparison.places:
                if (place.backbone, place.dataset) in curves:
                    _draw(axes, place, metric, comparison.datasets.index(place.dataset))
            better = "lower is better" if metric == "nrmse" else "higher is better"
            set_title(axes, METRIC_NAMES[metric], f"{backbone}, {better}")
            axes.set_xlabel("Depth L")
            axes.set_xticks(sorted({depth for (name, _), own in curves.items() if name == backbone for depth in own}))
    found = {text: h for axes in figure.axes for h, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(len(found), 6), frameon=False, fontsize=9
    )
    save_figure(figure, path)
    return True


def _curve(place: Place, metric: str = "pearson") -> dict[str, np.ndarray]:
    """Depths, means and standard deviations of the plain RELISH head on the frozen LLM, no variant of it."""
    own = [e for e in place.entries if (e.method.head, e.method.adapter, e.method.variant) == ("relish", "", "")]
    return {
        "depth": np.array([entry.method.depth for entry in own]),
        "mean": np.array([entry.metrics[metric]["mean"] for entry in own]),
        "sd": np.nan_to_num(np.array([entry.metrics[metric]["sd"] for entry in own])),
    }


def _draw(axes: Any, place: Place, metric: str, number: int) -> None:
    colour, marker = _LINES[number % len(_LINES)]
    curve = _curve(place, metric)
    axes.errorbar(
        curve["depth"],
        curve["mean"],
        yerr=curve["sd"],
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
