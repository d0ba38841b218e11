import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from relish.cache.errors import MissingExtraError, RelishError
from relish.evaluate import plots
from relish.evaluate.plots import plot_depth, plot_scatter
from relish.evaluate.summary import CellPredictions, summarise
from relish.train.settings import HEADS

ROWS = 60


def make(cells, constant=False, split="test", spread=1.0):
    rng = np.random.default_rng(0)
    target = np.round(rng.uniform(0, 5, ROWS), 1)
    given = []
    for head, depth, seed in cells:
        values = np.full(ROWS, 2.5) if constant else target + spread * rng.normal(size=ROWS)
        given.append(CellPredictions(head, depth, seed, 10, values))
    return summarise(split, (0, 5), [str(i) for i in range(ROWS)], range(ROWS), target, given, {})


GRID = [("relish", depth, seed) for depth in (1, 2, 4) for seed in (0, 1)] + [("ridge", 0, 0), ("mlp", 0, 0)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into what was drawn."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def size(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_scatter(tmp_path, drawn):
    results = make(GRID)
    plot_scatter(results, tmp_path / "new" / "scatter.png")
    assert min(size(tmp_path / "new" / "scatter.png")) > 800
    (axes,) = drawn[0].axes
    assert results.best.label in axes.get_title(loc="left")
    assert f"Pearson {results.best.metrics['pearson']['mean']:.3f}" in axes.texts[0].get_text()
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], results.target)
    np.testing.assert_allclose(points[:, 1], results.mean_prediction(results.best))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0], [5, 5]])
    low, high = axes.get_xlim()
    assert -0.5 < low <= 0
    assert 5 <= high < 5.5
    assert axes.get_ylim()[0] < points[:, 1].min()
    assert axes.get_ylim()[1] > points[:, 1].max()


def test_scatter_line_of_means(tmp_path, drawn):
    results = make([("relish", 3, 0)])
    plot_scatter(results, tmp_path / "scatter.png")
    for x, y in drawn[0].axes[0].lines[1].get_xydata():
        tenth = np.minimum(np.floor(results.target * 2), 9) == min(math.floor(x * 2), 9)
        assert x == pytest.approx(results.target[tenth].mean())
        assert y == pytest.approx(results.predictions[0][tenth].mean())


def test_depth(tmp_path, drawn):
    results = make(GRID)
    assert plot_depth(results, tmp_path / "depth.png") is True
    width, height = size(tmp_path / "depth.png")
    assert width > 2 * height
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Pearson", "Spearman", "NRMSE"]
    for axes, name in zip(drawn[0].axes, ("pearson", "spearman", "nrmse"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"relish", "ridge", "mlp"}
        means = {group.label: group.metrics[name]["mean"] for group in results.groups}
        np.testing.assert_allclose(lines["relish"].get_xdata(), [1, 2, 4])
        np.testing.assert_allclose(lines["relish"].get_ydata(), [means[f"relish, L = {depth}"] for depth in (1, 2, 4)])
        assert lines["ridge"].get_ydata()[0] == means["ridge"]
        assert list(axes.get_xticks()) == [1, 2, 4]
        band, seeds = axes.collections
        sd = results.groups[-1].metrics[name]["sd"]
        edges = band.get_paths()[0].vertices
        last = edges[edges[:, 0] == 4][:, 1]
        assert (last.min(), last.max()) == pytest.approx((means["relish, L = 4"] - sd, means["relish, L = 4"] + sd))
        assert len(seeds.get_offsets()) == 6


def test_depth_with_one_seed_has_no_band(tmp_path, drawn):
    assert plot_depth(make([("relish", 1, 0), ("relish", 2, 0)]), tmp_path / "depth.png") is True
    assert not drawn[0].axes[0].collections


@pytest.mark.parametrize("cells", [[("relish", 3, 0), ("relish", 3, 1)], [("ridge", 0, 0), ("mlp", 2, 0)]])
def test_depth_needs_two_depths(tmp_path, cells):
    assert plot_depth(make(cells), tmp_path / "depth.png") is False
    assert not (tmp_path / "depth.png").exists()


def test_constant_predictions(tmp_path):
    results = make(GRID, constant=True)
    plot_scatter(results, tmp_path / "scatter.png")
    assert plot_depth(results, tmp_path / "depth.png") is True


def test_predictions_far_outside_the_range(tmp_path):
    plot_scatter(make([("relish", 3, 0)], spread=500.0), tmp_path / "scatter.png")
    assert min(size(tmp_path / "scatter.png")) > 800


def test_a_dollar_sign_is_no_formula(tmp_path):
    plot_scatter(make([("relish", 3, 0)], split="$\\frac$"), tmp_path / "scatter.png")


def test_no_usable_predictions(tmp_path):
    cell = CellPredictions("relish", 3, 0, 10, np.full(2, math.nan))
    results = summarise("test", (0, 5), ["a", "b"], [0, 1], [1, 2], [cell], {})
    with pytest.raises(RelishError, match="nothing to plot"):
        plot_scatter(results, tmp_path / "scatter.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'relish-llm\[report\]'"):
        plot_scatter(make([("relish", 3, 0)]), tmp_path / "scatter.png")


def test_importing_draws_in_nothing_heavy():
    code = (
        "import sys, relish.evaluate.report\n"
        "heavy = {'matplotlib', 'jinja2', 'torch', 'transformers', 'scipy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pyplot_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_scatter(make(GRID), tmp_path / "scatter.png")
    assert plot_depth(make(GRID), tmp_path / "depth.png") is True


def test_as_many_heads_as_there_are_have_lines_that_differ(tmp_path, drawn):
    others = [head for head in HEADS if head != "relish"] + ["greedy-0shot", "rail-0shot", "rail-128shot"]
    plot_depth(make([("relish", 1, 0), ("relish", 2, 0), *((head, 0, 0) for head in others)]), tmp_path / "depth.png")
    lines = [line for line in drawn[0].axes[0].lines if line.get_label() in others]
    styles = {(line.get_color(), line._unscaled_dash_pattern[1]) for line in lines}
    assert len(lines) == len(styles) == len(others) == 10
