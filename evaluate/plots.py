"""The figures of a report folder, as PNG files.

Drawn on Figure objects with the Agg canvas and never through pyplot, which would keep figures alive and look for a
display. Colours are Okabe and Ito's, told apart by colour-blind readers too.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import RelishError, require_extra
from ..train.metrics import METRIC_NAMES
from .summary import Results, Summary
from .tables import format_number

_BLUE, _ORANGE, _INK, _GREY = "#0072B2", "#D55E00", "#222222", "#8a8a8a"
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#7a6a00", "#56B4E9", "#222222")
_DASHES = ((5, 2), (2, 1.5), (6, 1.5, 1.5, 1.5), (1, 1.2))
_DPI = 160
_BINS = 10


def plot_scatter(results: Results, path: Path) -> None:
    """Draw predicted against gold for the best group, its predictions averaged over the seeds.

    The line of dots is the mean prediction within tenths of the label range: flatter than the diagonal where the head
    shrinks towards the mean. The title gives the group's figures as the tables have them (mean over seeds).

    Raises:
        RelishError: if no cell has predictions to show.
        MissingExtraError: if matplotlib is not installed.
    """
    group = results.best
    if group is None:
        raise RelishError("no trained head has finite predictions, so there is nothing to plot")
    gold, predicted = results.target, results.mean_prediction(group)
    low, high = results.label_range
    margin = 0.03 * (high - low)

    figure = draw_figure((5.8, 6.1))
    axes = figure.add_subplot()
    set_style(axes)
    alpha = float(np.clip(300 / len(gold), 0.08, 0.75))
    axes.scatter(gold, predicted, s=14, color=_BLUE, alpha=alpha, linewidths=0, label="one row", zorder=2)
    axes.plot(
        [low, high], [low, high], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="gold = predicted", zorder=3
    )
    centres, means = _tenths(gold, predicted, low, high)
    style: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot(centres, means, color=_ORANGE, linewidth=1.8, label="mean prediction", zorder=4, **style)

    axes.set_xlim(low - margin, high + margin)
    bottom, top = min(low, float(predicted.min())), max(high, float(predicted.max()))
    axes.set_ylim(bottom - margin, top + margin)
    if top - bottom < 1.5 * (high - low):
        axes.set_aspect("equal", adjustable="box")
    axes.set_xlabel("Gold score")
    seeds = f", mean of {group.seeds} seeds" if group.seeds > 1 else ""
    axes.set_ylabel(f"Predicted score{seeds}")
    set_title(axes, f"{group.label} on {results.split}", _figures_line(group))
    legend = axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8.5)
    legend.legend_handles[0].set_alpha(0.9)
    save_figure(figure, path)


def plot_depth(results: Results, path: Path) -> bool:
    """Draw Pearson, Spearman and NRMSE against the depth of the RELISH head; other heads are horizontal lines.

    The line is the mean over the seeds, the band one standard deviation to either side, each small dot one seed.

    Returns:
        Whether a figure was made: it takes at least two depths.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    curve = [group for group in results.groups if group.head == "relish"]
    others = [group for group in results.groups if group.head != "relish"]
    if len(curve) < 2:
        return False
    figure = draw_figure((10.4, 3.7))
    for place, name in enumerate(("pearson", "spearman", "nrmse")):
        axes = figure.add_subplot(1, 3, place + 1)
        set_style(axes)
        _draw_depth(axes, name, results, curve)
        for index, group in enumerate(others):
            colour, dashes = _line_style(index)
            mean = group.metrics[name]["mean"]
            axes.axhline(mean, color=colour, linewidth=1.6, linestyle=(0, dashes), label=group.label, zorder=2)
        better = "lower is better" if name == "nrmse" else "higher is better"
        set_title(axes, METRIC_NAMES[name], better)
        axes.set_xlabel("Depth L")
        axes.set_xticks([group.depth for group in curve])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    save_figure(figure, path)
    return True


def _line_style(index: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of the other heads: neighbours differ in both, and the first 24 are all different."""
    colour = index % len(_COLOURS)
    return _COLOURS[colour], _DASHES[(index // len(_COLOURS) + colour) % len(_DASHES)]


def _draw_depth(axes: Any, name: str, results: Results, curve: list[Summary]) -> None:
    depths = np.array([group.depth for group in curve])
    means = np.array([group.metrics[name]["mean"] for group in curve])
    spread = np.array([group.metrics[name]["sd"] for group in curve])
    if np.isfinite(spread).any():
        band = {"color": _BLUE, "alpha": 0.18, "linewidth": 0, "zorder": 1}
        axes.fill_between(depths, means - spread, means + spread, label="± sd over seeds", **band)
    cells = [cell for cell in results.cells if cell.head == "relish" and cell.status == "ok"]
    values = [cell.metrics[name] for cell in cells]
    if len(cells) > len(curve):
        axes.scatter([c.depth for c in cells], values, s=11, color=_BLUE, alpha=0.5, linewidths=0, zorder=3)
    style: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot(depths, means, color=_BLUE, linewidth=1.9, label="relish", zorder=4, **style)


def _tenths(gold: np.ndarray, predicted: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean gold and mean predicted score in each tenth of the label range that holds five rows or more."""
    place = np.clip(((gold - low) / (high - low) * _BINS).astype(int), 0, _BINS - 1)
    count = np.bincount(place, minlength=_BINS)
    some = count >= 5
    centres = np.bincount(place, gold, minlength=_BINS)[some] / count[some]
    return centres, np.bincount(place, predicted, minlength=_BINS)[some] / count[some]


def _figures_line(group: Summary) -> str:
    parts = []
    for name in ("pearson", "spearman", "nrmse"):
        estimate = group.metrics[name]
        spread = f" ± {format_number(estimate['sd'])}" if math.isfinite(estimate["sd"]) else ""
        parts.append(f"{METRIC_NAMES[name]} {format_number(estimate['mean'])}{spread}")
    return "   ".join(parts)


def draw_figure(size: tuple[float, float]) -> Any:
    """An empty figure of this many inches, its canvas Agg."""
    module = require_extra("matplotlib.figure", "report", "Drawing figures")
    agg = require_extra("matplotlib.backends.backend_agg", "report", "Drawing figures")
    figure = module.Figure(figsize=size, layout="constrained", facecolor="white")
    agg.FigureCanvasAgg(figure)
    return figure


def set_style(axes: Any) -> None:
    """The look of every axes: two spines, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9, color=_GREY)
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_size(10)
    axes.yaxis.label.set_size(10)


def set_title(axes: Any, first: str, second: str) -> None:
    """A title and a smaller line below it."""
    # parse_math off: a head or a split whose name holds a dollar sign is no formula.
    axes.set_title(first, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=23, parse_math=False)
    where: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 8), "textcoords": "offset points"}
    axes.annotate(second, (0, 1), fontsize=9, color="#555555", in_layout=False, **where)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")
