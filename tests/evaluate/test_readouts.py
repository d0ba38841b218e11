import csv
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.readouts import Readout, save_part
from relish.evaluate.readouts import (
    answers_note,
    posterior_mean,
    posterior_median,
    readout_cells,
    unnormalised_sum,
)
from relish.evaluate.results import evaluate_runs
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache

ROWS = 32
GRID = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def add(folder, kind, answers, *, shots=0, used=None, split="test", settings=None):
    manifest = load_manifest(folder)
    part = Readout(
        identity=manifest.identity,
        split=split,
        fingerprint=manifest.splits[split].fingerprint,
        kind=kind,
        shots=shots,
        shots_used=shots if used is None else used,
        settings=settings or {},
        rows=tuple(range(len(answers))),
        ids=tuple(map(str, range(len(answers)))),
        answers=tuple(answers),
        seconds=0.8,
    )
    save_part(folder, part)


@pytest.fixture
def folder(tmp_path):
    return write_cache(tmp_path / "c")


def cells_of(folder):
    cache = open_cache(folder)
    cells, left_out = readout_cells(cache, cache.split("test"))
    return {cell.head: cell for cell in cells}, left_out


# The arithmetic


def test_mean_sum_and_median_of_a_case_by_hand():
    # p = 0.2, 0.1, 0.1 on the scores 0, 2, 5: together 0.4, so normalised 0.5, 0.25, 0.25.
    log_p = np.log([[0.2, 0.1, 0.1]])
    assert posterior_mean(log_p, [0, 2, 5]) == pytest.approx([0.25 * 2 + 0.25 * 5])
    assert unnormalised_sum(log_p, [0, 2, 5]) == pytest.approx([0.1 * 2 + 0.1 * 5])
    assert posterior_median(log_p, [0, 2, 5]) == [0]
    assert posterior_median(np.log([[0.19, 0.1, 0.1]]), [0, 2, 5]) == [2]
    assert posterior_median(np.log([[0.1, 0.1, 0.3]]), [0, 2, 5]) == [5]


@given(st.lists(st.lists(st.floats(-30, 0), min_size=6, max_size=6), min_size=1, max_size=4))
def test_mean_and_sum_as_plain_python_gives_them(log_p):
    for got, line in zip(posterior_mean(log_p, GRID), log_p, strict=True):
        p = [math.exp(value) for value in line]
        assert got == pytest.approx(sum(y * value for y, value in zip(GRID, p, strict=True)) / sum(p))
    for got, line in zip(unnormalised_sum(log_p, GRID), log_p, strict=True):
        assert got == pytest.approx(sum(y * math.exp(value) for y, value in zip(GRID, line, strict=True)))


@given(st.lists(st.floats(-8, 0), min_size=6, max_size=6))
def test_mean_and_median_have_the_least_expected_error(line):
    p = np.exp(line) / np.exp(line).sum()
    squared = optimize.minimize_scalar(lambda v: float(p @ (np.array(GRID) - v) ** 2), bounds=(0, 5), method="bounded")
    assert posterior_mean([line], GRID)[0] == pytest.approx(squared.x, abs=1e-3)
    absolute = [float(p @ np.abs(np.array(GRID) - v)) for v in GRID]
    chosen = GRID.index(posterior_median([line], GRID)[0])
    assert absolute[chosen] == pytest.approx(min(absolute), abs=1e-9)


def test_log_probabilities_far_below_zero_do_not_vanish():
    assert posterior_mean([[-2000.0, -2000.0 + math.log(3)]], [0, 4]) == pytest.approx([3])


# From readouts to cells


def test_each_readout_becomes_its_cells(folder):
    greedy = [f"{row % 6}" for row in range(ROWS)]
    add(folder, "greedy", greedy)
    add(folder, "greedy", greedy, shots=8, used=5)
    add(folder, "samples", [["1", "2", "5", "2"]] * ROWS)
    add(folder, "candidates", [np.log([0.1, 0.1, 0.1, 0.1, 0.1, 0.3]).tolist()] * ROWS, settings={"candidates": GRID})
    add(folder, "regression", [row / 2 for row in range(ROWS)])
    cells, left_out = cells_of(folder)
    assert left_out == []
    assert sorted(cells) == [
        "greedy-0shot",
        "greedy-8shot",
        "rail-0shot",
        "rail-median-0shot",
        "rail-samples-0shot",
        "rail-samples-median-0shot",
        "rail-sum-0shot",
        "tuned-head",
    ]
    values = {name: cell.values[3] for name, cell in cells.items()}
    assert values == pytest.approx(
        {
            "greedy-0shot": 3,
            "greedy-8shot": 3,
            "rail-0shot": (0.1 * 10 + 0.3 * 5) / 0.8,
            "rail-median-0shot": 3,
            "rail-samples-0shot": 2.5,
            "rail-samples-median-0shot": 2,
            "rail-sum-0shot": 2.5,
            "tuned-head": 1.5,
        }
    )
    assert {(cell.depth, cell.seed, cell.parameters) for cell in cells.values()} == {(0, 0, 0)}
    assert cells["greedy-8shot"].answers == {
        "shots": 8,
        "shots_used": 5,
        "seconds_per_1000_rows": 25.0,
        "answers": 32,
        "no_number": 0,
        "replaced_rows": 0,
        "replaced_by": pytest.approx(open_cache(folder).split("train").target.mean()),
        "replaced_by_what": "the mean label of the training split",
        "clipped": 0,
    }
    assert {cell.seconds_per_1000_rows for cell in cells.values()} == {25.0}
    assert cells["tuned-head"].answers is None
    assert cells["rail-0shot"].answers == {"shots": 0, "shots_used": 0, "seconds_per_1000_rows": 25.0}


def test_answers_that_are_no_number_are_replaced_and_counted(folder):
    add(folder, "greedy", ["four", "-3", "7", *["2"] * (ROWS - 3)])
    add(folder, "samples", [["x", "y"], ["x", "4"], ["9", "1"], *[["2", "2"]] * (ROWS - 3)])
    cells, _ = cells_of(folder)
    mean = open_cache(folder).split("train").target.mean()
    assert cells["greedy-0shot"].values[:4] == pytest.approx([mean, 0, 5, 2])
    answers = cells["greedy-0shot"].answers
    assert (answers["no_number"], answers["replaced_rows"], answers["clipped"]) == (1, 1, 2)
    assert cells["rail-samples-0shot"].values[:4] == pytest.approx([mean, 4, 3, 2])
    answers = cells["rail-samples-0shot"].answers
    assert (answers["answers"], answers["no_number"], answers["replaced_rows"], answers["clipped"]) == (64, 3, 1, 1)


def test_without_a_training_split_the_middle_of_the_range_takes_their_place(tmp_path):
    folder = write_cache(tmp_path / "c", sizes={"test": ROWS}, label_range=(0.0, 7.0))
    add(folder, "greedy", ["?"] * ROWS)
    cells, _ = cells_of(folder)
    assert cells["greedy-0shot"].values[0] == 3.5
    assert cells["greedy-0shot"].answers["replaced_by_what"] == "the middle of the label range"


def test_notes_say_what_was_lost_and_how_many_examples_there_were():
    about = {"shots": 128, "shots_used": 96}
    counts = {"answers": 1379, "no_number": 12, "replaced_rows": 12, "replaced_by": 2.6134, "clipped": 3}
    answers = {**about, **counts, "replaced_by_what": "the mean label of the training split"}
    assert answers_note("greedy-128shot", answers) == (
        "greedy-128shot: 96 examples, since the context or the training split has no more; 12 of 1,379 answers were no "
        "number, and 12 rows got 2.61, "
        "the mean label of the training split; 3 outside the label range were clipped."
    )
    assert answers_note("rail-0shot", {"shots": 0, "shots_used": 0}) == ""
    assert answers_note("rail-8shot", {"shots": 8, "shots_used": 2}) == (
        "rail-8shot: 2 examples, since the context or the training split has no more."
    )
    assert "and 1 row got 2.61" in answers_note("g", {**answers, "replaced_rows": 1})
    assert answers_note("g", {**answers, "replaced_rows": 0, "no_number": 0, "shots_used": 128}) == (
        "g: 0 of 1,379 answers were no number; 3 outside the label range were clipped."
    )


# In the table


@pytest.fixture
def runs(folder, tmp_path):
    train_heads(folder, tmp_path / "runs", TrainSettings(heads=("ridge",), device="cpu"))
    return tmp_path / "runs"


def test_the_table_the_files_and_the_report_hold_them(folder, runs, run_cli, tmp_path):
    pytest.importorskip("matplotlib")
    add(folder, "greedy", ["four", *["2", "3"] * 15, "2"])
    add(folder, "greedy", ["4"] * ROWS, split="dev")
    add(folder, "candidates", [np.log([0.1] * 5 + [0.3]).tolist()] * ROWS, settings={"candidates": GRID})
    out = tmp_path / "report"
    result = run_cli("evaluate", runs, "--out", out)
    assert result.exit_code == 0
    assert "1 of 32 answers were no number" in " ".join(result.stdout.split())
    figures = json.loads((out / "results.json").read_text())
    assert [cell["head"] for cell in figures["cells"]] == [
        "greedy-0shot", "rail-0shot", "rail-median-0shot", "rail-sum-0shot", "ridge"
    ]  # fmt: skip
    greedy, rail, *_, ridge = figures["cells"]
    assert greedy["answers"]["no_number"] == 1
    assert (greedy["parameters"], greedy["seed"], greedy["depth"]) == (0, 0, 0)
    assert rail["answers"]["shots_used"] == 0
    assert "answers" not in ridge
    with (out / "predictions.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["head"] == "greedy-0shot"]
    assert [float(line["prediction"]) for line in lines[1:4]] == [2, 3, 2]
    assert "1 of 32 answers were no number" in (out / "report.html").read_text(encoding="utf-8")
    assert "1 of 32 answers were no number" in run_cli("evaluate", runs, "--format", "markdown").stdout


def test_answers_to_the_validation_split_give_validation_figures(folder, runs):
    dev = open_cache(folder).split("dev").target
    add(folder, "regression", np.linspace(0, 5, ROWS).tolist())
    add(folder, "greedy", ["2"] * ROWS)
    assert {cell.extras["val_nrmse"] for cell in evaluate_runs(runs).cells if cell.head != "ridge"} == {None}
    add(folder, "regression", (dev + 0.5).tolist(), split="dev")
    add(folder, "greedy", ["2"] * len(dev), split="dev")
    found = {cell.head: cell.extras for cell in evaluate_runs(runs).cells}
    assert found["tuned-head"]["val_nrmse"] == pytest.approx(0.1)
    assert found["tuned-head"]["val_pearson"] == pytest.approx(1)
    assert found["greedy-0shot"]["val_nrmse"] == pytest.approx(np.sqrt(np.mean((dev - 2) ** 2)) / 5)
    assert found["greedy-0shot"]["val_pearson"] is None


def test_without_good_answers_to_the_same_validation_rows_there_are_no_figures_and_it_is_said(folder, runs, tmp_path):
    add(folder, "greedy", ["2"] * ROWS)
    add(folder, "greedy", ["2"] * (ROWS - 1), split="dev")
    shutil.copytree(folder, tmp_path / "missing")
    next((tmp_path / "missing").glob("**/dev-*.h5")).unlink()
    other = write_cache(tmp_path / "other", sizes={"train": 96, "dev": 20, "test": ROWS})
    for split in ("test", "dev"):
        add(other, "greedy", ["2"] * len(open_cache(other).split(split)), split=split)
    for cache, said in (
        (folder, "Left out: .* was made from other rows than the split 'dev'"),
        (tmp_path / "missing", r"Answers have no validation figures: .*dev-0000\d.h5"),
        (other, "Answers have no validation figures: the cache's split 'dev' has other rows than these heads"),
    ):
        results = evaluate_runs(runs, cache=cache)
        assert {cell.extras["val_nrmse"] for cell in results.cells if cell.head == "greedy-0shot"} == {None}
        (sentence,) = results.left_out
        assert re.match(said, sentence), sentence


def test_a_cache_alone_is_evaluated_by_its_answers(folder, runs, run_cli, tmp_path):
    result = run_cli("evaluate", folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {folder} is a cache whose LLM was not asked about test; train heads from it: relish train {folder} "
        "--out RUNS, or ask with relish extract --readouts\n"
    )
    assert run_cli("evaluate", folder, "--split", "train").stderr == (
        f"error: {folder} is a cache whose LLM was not asked about train; train heads from it: relish train {folder} "
        "--out RUNS\n"
    )
    dev = open_cache(folder).split("dev").target
    for split, count in (("test", ROWS), ("dev", len(dev))):
        add(folder, "greedy", ["2", "3"] * (count // 2), split=split)
    result = run_cli("evaluate", folder, "--out", tmp_path / "report", "--json")
    assert result.exit_code == 0
    alone = json.loads(result.stdout)
    beside = json.loads(run_cli("evaluate", runs, "--json").stdout)
    assert alone["cells"] == [cell for cell in beside["cells"] if cell["head"] == "greedy-0shot"]
    assert alone["cells"][0]["val_nrmse"] is not None
    assert not {"layer", "training rows", "epochs"} & set(alone["meta"])
    # Examples are from the rows that heads learn from.
    learned = ("model", "training data", "validation data")
    assert [alone["meta"][name] for name in learned] == [beside["meta"][name] for name in learned]
    assert (tmp_path / "report" / "report.html").exists()
    refused = run_cli("evaluate", folder, "--cache", folder)
    assert refused.stderr == (
        f"error: {folder} is a cache itself; leave --cache out, or give the folder of its heads\n"
    )


def test_an_unfinished_readout_is_named_and_left_out(folder, runs):
    add(folder, "greedy", ["4"] * (ROWS - 1))
    results = evaluate_runs(runs)
    assert [cell.head for cell in results.cells] == ["ridge"]
    assert len(results.left_out) == 1
    assert "was made from other rows than the split 'test'" in results.left_out[0]


def test_rows_without_hidden_states_are_matched_by_their_number(folder):
    add(folder, "greedy", [f"{row % 6}" for row in range(ROWS)])
    cache = open_cache(folder)
    split = cache.split("test")
    some = np.array([0, 4, 5, 9])
    split.row = split.row[some]
    cells, _ = readout_cells(cache, split)
    assert cells[0].values.tolist() == [0, 4, 5, 3]


def test_readouts_of_another_cache_are_left_out(folder):
    add(folder, "greedy", ["4"] * ROWS)
    manifest = load_manifest(folder)
    replace(manifest, identity=replace(manifest.identity, prompt="Rate: {text}")).save(folder)
    cells, left_out = cells_of(folder)
    assert cells == {}
    assert "prompt is 'Rate: {text}' there and '{text}' here" in left_out[0]
