import base64
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from relish.cache.errors import MissingExtraError
from relish.evaluate.report import comparison, headline, worst_rows, write_report
from relish.evaluate.summary import CellPredictions, summarise

ROWS = 60
GRID = [("relish", depth, seed) for depth in (1, 2) for seed in (0, 1)] + [("ridge", 0, 0)]
META = {"model": "org/model", "prompt": "Score: {text}", "train rows": 5749, "commit": None}


def make(cells=GRID, meta=META, ids=None, split="test", constant=False):
    rng = np.random.default_rng(0)
    target = np.round(rng.uniform(0, 5, ROWS), 1)
    given = []
    for head, depth, seed, *rest in cells:
        values = np.full(ROWS, 2.5) if constant else target + (1.5 - 0.5 * depth) * rng.normal(size=ROWS)
        given.append(CellPredictions(head, depth, seed, 12345, values, *rest))
    return summarise(split, (0, 5), ids or [f"id{i}" for i in range(ROWS)], range(ROWS), target, given, meta)


class Page(HTMLParser):
    """Collects tags, and fails where they are not nested."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def written(tmp_path, results):
    path = write_report(results, tmp_path)
    assert path == tmp_path / "report.html"
    return Page(path.read_text("utf-8"))


def squeezed(page):
    return re.sub(r"\s+", " ", page.text)


def test_the_report_holds_its_figures_and_loads_nothing(tmp_path):
    page = written(tmp_path, make())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.png", "report.html", "scatter.png"]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for attributes, name in zip(images, ("scatter.png", "depth.png"), strict=True):
        kind, _, data = attributes["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()
        assert attributes["alt"]
    html = re.sub(r'"data:[^"]*"', "", (tmp_path / "report.html").read_text("utf-8"))
    assert "http" not in html
    assert not re.search(r"url\(|@import|<script|<link|src=(?!\s)\"", html)


def test_what_the_report_says(tmp_path):
    results = make()
    text = squeezed(written(tmp_path, results))
    assert headline(results) in text
    assert "That is" in comparison(results)
    assert comparison(results) in text
    for group in results.groups:
        assert f"{group.metrics['spearman']['mean']:.3f}" in text
    assert "org/model" in text
    assert "5,749" in text
    assert "commit" not in text
    assert "5 heads, a line for each seed" in text
    for row in worst_rows(results):
        assert row.id in text


def test_headline_names_the_best_group_and_its_figures():
    results = make()
    pearson = results.best.metrics["pearson"]
    assert headline(results) == (
        "RELISH with L = 2, the best of 3 on these rows (which flatters it), reaches a Pearson correlation of "
        f"{pearson['mean']:.3f} (95 % interval {pearson['ci95'][0]:.3f} to {pearson['ci95'][1]:.3f}) on the 60 rows of "
        "test, averaged over 2 seeds; it is "
        f"{results.best.metrics['mae']['mean']:.3f} off on average, on a scale from 0 to 5."
    )


def test_where_there_are_validation_figures_these_choose():
    results = make()
    given = zip(results.cells, results.predictions, strict=True)
    val = {("relish", 1): 0.1, ("relish", 2): 0.2, ("ridge", 0): 0.3, ("mlp", 0): 0.15}
    cells = [CellPredictions(c.head, c.depth, c.seed, 9, p, val_nrmse=val[c.head, c.depth]) for c, p in given]
    better = next(cell.values for cell in cells if cell.depth == 2)
    cells.append(CellPredictions("mlp", 0, 0, 9, better, val_nrmse=0.15))
    chosen = summarise("test", (0, 5), results.ids, range(ROWS), results.target, cells, {})
    assert chosen.best.label == "relish, L = 1"
    assert headline(chosen).startswith("RELISH with L = 1, which the validation rows choose, reaches a Pearson")
    figures = {group.label: group.metrics["pearson"]["mean"] for group in chosen.groups}
    gap = figures["mlp"] - figures["relish, L = 1"]
    assert gap > 0
    assert comparison(chosen) == (
        f"That is {gap:.3f} below the best head of another kind on the validation rows, mlp ({figures['mlp']:.3f})."
    )


def test_worst_rows_are_the_largest_errors_in_order():
    results = make()
    errors = np.abs(results.mean_prediction(results.best) - results.target)
    worst = worst_rows(results)
    assert [abs(row.error) for row in worst] == pytest.approx(np.sort(errors)[::-1][: len(worst)])
    assert worst[0].id == f"id{errors.argmax()}"
    assert worst[0].row == errors.argmax()


def test_a_single_seed_and_depth(tmp_path):
    results = make([("relish", 3, 0)])
    page = written(tmp_path, results)
    assert "with one seed" in page.text
    assert comparison(results) == ""
    assert not (tmp_path / "depth.png").exists()
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "1 head, a line" in page.text


def test_correlations_that_do_not_exist(tmp_path):
    page = written(tmp_path, make(constant=True))
    assert "predicts a constant on test (60 rows)" in page.text
    assert not re.search(r"\bnan\b", page.text, re.IGNORECASE)
    seeds = make([("relish", 3, 0), ("relish", 3, 1)], constant=True)
    assert " predicts a constant with at least one of its seeds on test (60 rows)" in headline(seeds)
    same = summarise(
        "test",
        (0, 5),
        ["a", "b"],
        range(2),
        np.full(2, 3.0),
        [CellPredictions("ridge", 0, 0, 1, np.array([1.0, 2.0]))],
        META,
    )
    assert headline(same).startswith(
        "The head ridge has no correlation with labels that are all the same, on test (2 rows)"
    )


def test_failed_cells_are_named(tmp_path):
    page = written(tmp_path, make([("relish", 1, 0), ("relish", 2, 0, "diverged")]))
    assert "relish, L = 2, seed 0, does not count: diverged." in page.text


def test_nothing_usable(tmp_path):
    page = written(tmp_path, make([("relish", 2, 0, "diverged")]))
    assert "No head gave usable predictions on the 60 rows of test." in page.text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_everything_from_outside_is_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>&\"'"
    results = make(
        [(evil, 0, 0), ("relish", 2, 0, evil)],
        meta={"model": evil, evil: "{{ 7 * 7 }}"},
        ids=[f"{evil}{i}" for i in range(ROWS)],
        split=evil,
    )
    page = written(tmp_path, results)
    assert [attributes["src"][:11] for tag, attributes in page.tags if tag == "img"] == ["data:image/"]
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count(evil) > 15
    assert "{{ 7 * 7 }}" in page.text


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra(tmp_path, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"'{missing}.*pip install 'relish-llm\[report\]'"):
        write_report(make(), tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_large_negative_error_has_a_true_minus(tmp_path):
    target = np.array([5.0, 1.0, 2.0])
    cell = CellPredictions("relish", 3, 0, 1, target - [4, 0, 0])
    page = written(tmp_path, summarise("dev", (0, 5), ["a", "b", "c"], [0, 1, 2], target, [cell], {}))
    assert "−4.000" in page.text
