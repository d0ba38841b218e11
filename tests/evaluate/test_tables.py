import csv
import io
import json
import math
import os
import re

import numpy as np
import pytest
from rich.console import Console

from relish.cache.errors import RelishError
from relish.evaluate import tables
from relish.evaluate.files import results_json, write_results
from relish.evaluate.summary import EXTRAS, CellPredictions, summarise
from relish.evaluate.tables import print_table, to_latex, to_markdown
from relish.train.metrics import METRICS, score

ROWS = 40


def make(cells=None, meta=None, split="test"):
    """Results of ridge (one seed) and relish L = 1 and 2 (two seeds), given in no order; `cells` replaces them."""
    rng = np.random.default_rng(0)
    target = np.round(rng.uniform(0, 5, ROWS), 1)
    if cells is None:
        cells = [("relish", 2, 1), ("relish", 1, 0), ("relish", 2, 0), ("ridge", 0, 0), ("relish", 1, 1)]
    given = []
    for head, depth, seed, *rest in cells:
        values = target + (1.5 - 0.5 * depth) * rng.normal(size=ROWS)
        status = rest[0] if rest else "ok"
        given.append(CellPredictions(head, depth, seed, 100 * (depth + 1), values.astype(np.float32), status))
    ids = [f"r{i}" for i in range(ROWS)]
    return summarise(split, (0, 5), ids, range(ROWS), target, given, meta or {})


def collapsed():
    """One seed that predicts a constant: correlations are NaN."""
    target = np.arange(ROWS) / 8
    cell = CellPredictions("relish", 3, 0, 10, np.full(ROWS, 2.5))
    return summarise("test", (0, 5), [str(i) for i in range(ROWS)], range(ROWS), target, [cell], {})


def printed(results, width=80, **options):
    file = io.StringIO()
    print_table(results, Console(file=file, width=width, **options))
    return file.getvalue()


def test_other_heads_come_first_and_relish_goes_by_depth():
    results = make()
    assert [(g.head, g.depth, g.seeds) for g in results.groups] == [("ridge", 0, 1), ("relish", 1, 2), ("relish", 2, 2)]
    order = [(c.head, c.depth, c.seed) for c in results.cells]
    assert order == [("ridge", 0, 0), ("relish", 1, 0), ("relish", 1, 1), ("relish", 2, 0), ("relish", 2, 1)]


def test_figures_are_those_of_the_cells():
    results = make()
    for cell, values in zip(results.cells, results.predictions, strict=True):
        assert cell.metrics == score(results.target, values, (0, 5))
    group = results.groups[2]
    two = [cell.metrics["pearson"] for cell in results.cells if cell.depth == 2]
    estimate = group.metrics["pearson"]
    assert estimate["mean"] == pytest.approx(np.mean(two))
    assert estimate["sd"] == pytest.approx(np.std(two, ddof=1))
    assert estimate["ci95"][0] < estimate["mean"] < estimate["ci95"][1]
    assert math.isnan(results.groups[0].metrics["pearson"]["sd"])
    assert results.best is group
    np.testing.assert_allclose(results.mean_prediction(group), results.predictions[3:].mean(axis=0))


def test_json_has_the_documented_keys():
    text = json.loads(json.dumps(results_json(make(meta={"model": "m"})), allow_nan=False))
    assert set(text) == {"split", "rows", "label_range", "cells", "groups", "meta"}
    assert (text["split"], text["rows"], text["label_range"], text["meta"]) == ("test", ROWS, [0, 5], {"model": "m"})
    for cell in text["cells"]:
        assert list(cell) == ["head", "depth", "seed", "parameters", *METRICS, *EXTRAS]
        assert all(isinstance(cell[name], float) for name in METRICS)
    for group in text["groups"]:
        together = ["averaged"] if group["seeds"] > 1 else []
        assert list(group) == ["head", "depth", "seeds", "parameters", *METRICS, *EXTRAS, *together]
        for name in METRICS:
            assert set(group[name]) == {"mean", "sd", "ci95"}
            assert len(group[name]["ci95"]) == 2


def test_what_seeds_predict_together_is_scored_and_told_of_the_best():
    results = make()
    assert results.groups[0].averaged is None
    for group, places in zip(results.groups[1:], ((1, 2), (3, 4)), strict=True):
        assert group.averaged == score(results.target, results.predictions[list(places)].mean(axis=0), (0, 5))
    figures = score(results.target, results.predictions[3:].mean(axis=0), (0, 5))
    assert figures["nrmse"] < results.groups[2].metrics["nrmse"]["mean"]
    told = (
        "Averaged over seeds, the predictions of relish, L = 2 (2 seeds) have the lowest NRMSE: "
        f"Pearson {figures['pearson']:.3f}, Spearman {figures['spearman']:.3f}, NRMSE {figures['nrmse']:.3f}."
    )
    assert told in to_markdown(results)
    assert f"% {told}" in to_latex(results)
    assert told in " ".join(printed(results).split())
    assert "averaged" not in to_markdown(make(cells=[("relish", 1, 0), ("ridge", 0, 0)]))


def test_json_has_null_for_what_does_not_exist():
    text = json.loads(json.dumps(results_json(collapsed()), allow_nan=False))
    assert text["cells"][0]["pearson"] is None
    assert text["groups"][0]["pearson"] == {"mean": None, "sd": None, "ci95": [None, None]}
    assert text["groups"][0]["rmse"]["sd"] is None


def test_validation_figures_costs_and_notes_go_from_cells_to_groups():
    target = np.arange(4.0)
    given = [
        CellPredictions("relish", 1, 0, 9, target, val_nrmse=0.2, val_pearson=0.8, train_seconds=4.0, note="one."),
        CellPredictions("relish", 1, 1, 9, target, val_nrmse=0.4, seconds_per_1000_rows=2.0, note="one."),
        CellPredictions("relish", 1, 2, 9, target * np.nan, val_nrmse=9.0, note="does not count"),
    ]
    results = summarise("test", (0, 5), list("abcd"), range(4), target, given, {})
    text = results_json(results)
    assert [text["cells"][0][name] for name in EXTRAS] == [0.2, 0.8, 4.0, None]
    (group,) = text["groups"]
    assert group["val_nrmse"] == pytest.approx(0.3)
    assert [group[name] for name in EXTRAS[1:]] == [None] * 3  # not known of every seed
    assert [cell["note"] for cell in text["cells"]] == ["one.", "one.", "does not count"]
    assert group["note"] == "one."
    assert "note" not in results_json(make())["cells"][0]


def test_json_takes_any_meta(tmp_path):
    meta = {"lr": math.nan, "rows": np.int64(3), "layers": (1, 2), "path": tmp_path, "none": None, "nested": {1: True}}
    expected = {"lr": None, "rows": 3, "layers": [1, 2], "path": str(tmp_path), "none": None, "nested": {"1": True}}
    assert results_json(make(meta=meta))["meta"] == expected


def test_files(tmp_path):
    results = make()
    write_results(results, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.csv", "results.csv", "results.json"]
    assert json.loads((folder / "results.json").read_text("utf-8")) == results_json(results)

    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == ["head", "depth", "seed", "parameters", "status", *METRICS, *EXTRAS]
    assert len(cells) == 5
    assert (cells[0]["val_nrmse"], cells[0]["train_seconds"]) == ("", "")
    assert float(cells[4]["nrmse"]) == results.cells[4].metrics["nrmse"]

    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["head", "depth", "seed", "id", "row", "target", "prediction"]
    assert len(rows) == 5 * ROWS
    last = rows[-1]
    assert (last["head"], last["depth"], last["seed"], last["id"], last["row"]) == ("relish", "2", "1", "r39", "39")
    again = [float(row["prediction"]) for row in rows[-ROWS:]]
    np.testing.assert_array_equal(again, results.predictions[-1])


@pytest.mark.parametrize("done", [0, 1, 2])
def test_files_are_replaced_whole(tmp_path, monkeypatch, done):
    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    old, new = make(), make([("relish", 3, 0)])
    for name, results in (("old", old), ("new", new), ("report", old)):
        write_results(results, tmp_path / name)
    real, left = os.replace, done

    def replace(*names):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("disk full")
        real(*names)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        write_results(new, tmp_path / "report")
    before, after, wanted = (contents(tmp_path / name) for name in ("old", "report", "new"))
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] not in (before[name], wanted[name])] == []
    assert [after[name] == wanted[name] for name in before].count(True) == done


def test_a_cell_that_failed_keeps_its_place_and_counts_in_no_group(tmp_path):
    cells = [("relish", 2, 0), ("relish", 2, 1, "diverged at\nepoch 2"), ("relish", 2, 2), ("mlp", 0, 0, "diverged")]
    results = make(cells)
    assert [(g.label, g.seeds) for g in results.groups] == [("relish, L = 2", 2)]
    assert [cell.label for cell in results.failed] == ["mlp", "relish, L = 2"]
    note = "relish, L = 2, seed 1, does not count: diverged at epoch 2."
    assert note in to_markdown(results)
    assert f"% {note}" in to_latex(results)
    assert "does not count" in printed(results)
    entries = results_json(results)["cells"]
    assert entries[0]["status"] == "diverged"
    assert entries[0]["pearson"] is None
    assert "status" not in entries[1]
    write_results(results, tmp_path)
    assert (tmp_path / "results.csv").read_text("utf-8").splitlines()[1] == "mlp,0,0,100,diverged" + 10 * ","


def test_predictions_that_are_not_finite_make_a_failed_cell():
    values = np.full(3, math.nan)
    cell = CellPredictions("relish", 3, 0, 10, values)
    results = summarise("test", (0, 1), list("abc"), [0, 1, 2], [0, 0.5, 1], [cell], {})
    assert results.cells[0].status == "not finite"
    assert results.groups == []
    assert results.best is None
    assert "does not count: not finite" in to_markdown(results)


def test_markdown():
    lines = to_markdown(make()).splitlines()
    assert lines[0].startswith("| Head | L | Parameters | Seeds | Pearson ↑ |")
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:5]}
    assert widths == {11}
    assert lines[2].startswith("| ridge | – | 100 | 1 | ")
    assert re.search(r"\| \*\*\d\.\d{3}\*\* ± \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] \|", lines[4])
    assert "±" not in lines[2]
    assert "Split test, 40 rows, labels from 0 to 5." in lines[-1]


def test_the_best_of_each_column_is_bold():
    results = make()
    lines = to_markdown(results).splitlines()[2:5]
    columns = list(zip(*([c.strip() for c in re.split(r"(?<!\\)\|", line)[5:-1]] for line in lines), strict=True))
    for name, column in zip(METRICS, columns, strict=True):
        means = [group.metrics[name]["mean"] for group in results.groups]
        best = np.argmin(means) if name in ("nrmse", "rmse", "mae") else np.argmax(means)
        assert [text.startswith("**") for text in column] == [place == best for place in range(3)]


def test_markdown_escapes_a_bar():
    assert "a\\|b" in to_markdown(make([("a|b", 0, 0)]))


def test_latex():
    text = to_latex(make([("my_head & co", 0, 0), ("relish", 2, 0), ("relish", 2, 1)]))
    assert r"\begin{tabular}{lrrrrrrrrr}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"my\_head \& co & -- & 100 & 1 & " in text
    assert re.search(r"\\textbf\{\d\.\d{3}\} \{\\scriptsize \$\\pm\$ \d\.\d{3}\} &", text)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3
    assert all(len(re.findall(r"(?<!\\)&", line)) == 9 for line in body)
    assert all(line.isascii() for line in body)


def test_one_group_has_no_best():
    results = make([("relish", 2, 0)])
    assert "**" not in to_markdown(results)
    assert "textbf" not in to_latex(results)


def test_values_that_do_not_exist_are_dashes():
    line = to_markdown(collapsed()).splitlines()[2]
    assert line.startswith("| relish | 3 | 10 | 1 | – | – | – | 0.")
    assert " & -- & -- & -- & 0." in to_latex(collapsed())
    assert "nan" not in printed(collapsed()).lower()


def test_negative_correlations_have_a_true_minus():
    assert tables.format_number(-0.25) == "−0.250"
    assert tables.format_number(math.nan) == "–"


def test_the_printed_table_fits_80_columns():
    text = printed(make())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert re.search(r"relish +2 +300 +2 +0\.\d{3} ± 0\.\d{3} +0\.\d{3} ± 0\.\d{3}", text)
    assert re.search(r"\[\d\.\d{3}, \d\.\d{3}\] +\[\d\.\d{3}, \d\.\d{3}\]", text)


def test_the_printed_table_takes_a_terminal_without_unicode():
    class Legacy(io.StringIO):
        encoding = "ascii"

    file = Legacy()
    print_table(make(), Console(file=file, width=80))
    assert file.getvalue().isascii()
    assert "Pearson ^" in file.getvalue()


def test_the_printed_table_takes_markup_in_names():
    assert "[bold]x" in printed(make([("[bold]x", 0, 0)]))


def test_wrong_input():
    target = [1.0, 2.0]
    cell = CellPredictions("relish", 3, 0, 1, np.zeros(2))
    with pytest.raises(RelishError, match="no trained heads"):
        summarise("test", (0, 5), ["a", "b"], [0, 1], target, [], {})
    with pytest.raises(RelishError, match="relish, L = 3, seed 0, was given twice"):
        summarise("test", (0, 5), ["a", "b"], [0, 1], target, [cell, cell], {})
    with pytest.raises(RelishError, match="has 2 predictions for 1 ids, 2 rows and 2 targets"):
        summarise("test", (0, 5), ["a"], [0, 1], target, [cell], {})
    with pytest.raises(RelishError, match="1 of 2 targets are not finite"):
        summarise("test", (0, 5), ["a", "b"], [0, 1], [1.0, math.nan], [cell], {})
    with pytest.raises(RelishError, match="label range"):
        summarise("test", (5, 0), ["a", "b"], [0, 1], target, [cell], {})


@pytest.mark.parametrize(("split", "said"), [("train", True), ("dev", True), ("devtest", False), ("test", False)])
def test_figures_on_rows_that_heads_have_seen_are_said_to_flatter(split, said):
    results = make(split=split, meta={"validation data": "dev, 9801"})
    told = f"Beware: figures on the split {split} flatter the heads, which learned from its rows or were chosen by"
    assert (told in to_markdown(results), told in " ".join(printed(results, width=400).split())) == (said, said)


def test_a_seed_that_predicts_a_constant_is_named():
    target = np.arange(ROWS) / 8
    values = [target + 1, np.full(ROWS, 2.5)]
    cells = [CellPredictions("relish", 3, seed, 10, line) for seed, line in enumerate(values)]
    results = summarise("test", (0, 5), [str(i) for i in range(ROWS)], range(ROWS), target, cells, {})
    told = "relish, L = 3, seed 1, predicts one score for all rows: no correlation exists, and no mean of them."
    assert told in to_markdown(results)
    assert "seed 0, predicts" not in to_markdown(results)


def test_the_depth_that_validation_chooses_is_told():
    target = np.arange(ROWS) / 8
    noise = np.random.default_rng(0).normal(size=ROWS)

    def told(*val_nrmse):
        cells = [
            CellPredictions("relish", depth, 0, 10, target + noise / depth, val_nrmse=value)
            for depth, value in enumerate(val_nrmse, 1)
        ]
        results = summarise("test", (0, 5), [str(i) for i in range(ROWS)], range(ROWS), target, cells, {})
        return re.findall("Of the depths .*?, [0-9.]*[0-9]", to_markdown(results))

    assert told(0.3, 0.125, 0.2) == ["Of the depths L = 2 has the lowest validation NRMSE, 0.125"]
    assert told(0.3) == told(0.3, None) == []
