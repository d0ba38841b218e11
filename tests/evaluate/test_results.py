import csv
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from relish.cache.errors import CacheError, DataError, RunError
from relish.cache.jsonfile import sealed_text
from relish.cache.reader import open_cache
from relish.cache.speed import add_speed
from relish.evaluate.results import evaluate_runs
from relish.train.diverged import DivergedCell, diverged_path, save_diverged
from relish.train.grid import train_heads
from relish.train.metrics import score
from relish.train.run import load_head, load_run
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache
from .conftest import SMALL


def test_figures_are_those_of_the_loaded_heads_on_the_split(cache, runs):
    results = evaluate_runs(runs)
    assert [(c.head, c.depth, c.seed) for c in results.cells] == [
        ("ridge", 0, 0),
        ("relish", 1, 0),
        ("relish", 1, 1),
        ("relish", 2, 0),
        ("relish", 2, 1),
    ]
    split = open_cache(cache).split("test")
    head = load_head(runs / "relish-L2-seed1")
    with torch.inference_mode():
        alone = np.array([head(*split.read([row])).item() for row in range(len(split))])
    np.testing.assert_allclose(results.predictions[4], alone, atol=1e-5)
    figures = score(split.target, alone, (0, 5))
    assert results.cells[4].metrics == pytest.approx(figures, abs=1e-5)
    assert results.ids == split.ids


def test_cells_carry_validation_figures_and_what_they_cost(cache, runs, tmp_path, monkeypatch):
    timed = shutil.copytree(cache, tmp_path / "cache")
    add_speed(timed, "cpu", rows=10, tokens=50, seconds=5.0)
    for cell in evaluate_runs(runs).cells:
        metrics = load_run(runs / f"{cell.head}-L{cell.depth}-seed{cell.seed}").metrics
        assert cell.extras["val_nrmse"] == metrics["val"]["nrmse"] > 0
        assert cell.extras["val_pearson"] == metrics["val"]["pearson"]
        assert cell.extras["train_seconds"] == metrics["seconds"] > 0
        assert cell.extras["seconds_per_1000_rows"] is None  # without the LLM's share it would mislead
    results = evaluate_runs(runs, cache=timed)
    tokens = open_cache(timed).manifest.splits["test"].tokens
    llm = 1000 * 0.1 * tokens / 32
    assert all(llm < cell.extras["seconds_per_1000_rows"] < llm + 1000 for cell in results.cells)
    ticks = itertools.count(step=0.25)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    for cell in evaluate_runs(runs, cache=timed).cells:
        own = cell.extras["seconds_per_1000_rows"] - llm
        assert own == pytest.approx(1000 * 0.25 / 32)


@pytest.mark.parametrize("older", ["ridge-L0-seed0", "relish-L1-seed0"])
def test_a_run_of_an_earlier_relish_may_lack_a_setting_that_others_have(runs, tmp_path, older):
    folder = shutil.copytree(runs, tmp_path / "runs")
    path = folder / older / "config.json"
    config = json.loads(path.read_text())
    del config["sha256"], config["settings"]["step_scale"]
    path.write_text(sealed_text(config))
    assert evaluate_runs(folder).meta["step scale"] == 0.1


def test_the_report_says_its_task_adapter_and_backbones_size(cache, runs, tmp_path):
    sized = shutil.copytree(cache, tmp_path / "cache")
    manifest = open_cache(sized).manifest
    replace(manifest, task="stsb", made_by={"parameters": "1,234"}).save(sized)
    meta = evaluate_runs(runs, cache=sized).meta
    assert (meta["task"], meta["adapter"], meta["backbone parameters"]) == ("stsb", None, "1,234")


def test_the_report_folder_holds_what_the_design_says(runs, tmp_path):
    evaluate_runs(runs, out=tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").glob("[!.]*")) == [
        "depth.png",
        "predictions.csv",
        "report.html",
        "results.csv",
        "results.json",
        "scatter.png",
    ]
    figures = json.loads((tmp_path / "report/results.json").read_text())
    assert (figures["split"], len(figures["cells"]), len(figures["groups"])) == ("test", 5, 3)
    with (tmp_path / "report/predictions.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 5 * 32


def test_a_cache_of_another_label_range_is_refused(cache, runs, tmp_path, run_cli):
    """NRMSE divides by the range, so the figures of two ranges do not compare."""
    other = write_cache(tmp_path / "percent", label_range=(0.0, 100.0))
    result = run_cli("evaluate", runs, "--cache", other, "--out", tmp_path / "report")
    assert (result.exit_code, result.stdout, (tmp_path / "report").exists()) == (2, "", False)
    assert result.stderr == (
        f"error: the head relish-L1-seed0 was trained on labels from 0 to 5, and those of the cache {other} go from 0 "
        "to 100; give the cache it was trained on with --cache\n"
    )


def test_label_ranges_that_hardly_differ_are_told_apart(runs, tmp_path):
    other = write_cache(tmp_path / "other", label_range=(0.0, 5.0000001))
    with pytest.raises(CacheError, match=r"labels from 0 to 5, and those of the cache .* go from 0 to 5\.0000001;"):
        evaluate_runs(runs, cache=other)


def test_another_split_and_a_cache_that_has_moved(cache, runs, tmp_path):
    assert evaluate_runs(runs, split="dev").rows == 32
    moved = shutil.copytree(cache, tmp_path / "moved")
    assert evaluate_runs(runs, cache=moved).rows == 32


def test_one_run_alone(runs):
    assert len(evaluate_runs(runs / "relish-L1-seed0").cells) == 1


def test_a_cache_of_another_hidden_size_is_refused(runs, tmp_path):
    other = write_cache(tmp_path / "other", hidden=16)
    message = r"the head relish-L1-seed0 reads hidden states of size 24, and those of the cache .*other have 16"
    with pytest.raises(RunError, match=message):
        evaluate_runs(runs, cache=other)


def test_a_cache_of_another_identity_is_refused(runs, tmp_path):
    other = write_cache(tmp_path / "other")
    manifest = open_cache(other).manifest
    replace(manifest, identity=replace(manifest.identity, prompt="Rate: {text}")).save(other)
    with pytest.raises(CacheError, match=r"prompt is '\{text\}' there and 'Rate: \{text\}' here"):
        evaluate_runs(runs, cache=other)


def test_a_missing_split_a_missing_cache_and_unlabelled_rows_are_refused(runs, tmp_path):
    with pytest.raises(CacheError, match="has no split 'nope', only train, dev, test"):
        evaluate_runs(runs, split="nope")
    cache = write_cache(tmp_path / "c", sizes={"train": 30, "dev": 10})
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    shutil.rmtree(cache)
    with pytest.raises(RunError, match="the cache of these runs is no longer at .*; say where it is with --cache"):
        evaluate_runs(tmp_path / "r")
    unlabelled = write_cache(tmp_path / "u", label=float("nan"))
    with pytest.raises(DataError, match="32 of 32 rows of the split 'test' have no label to compare with"):
        evaluate_runs(runs, cache=unlabelled)


def test_cells_that_diverged_are_named_in_table_and_report_and_count_nowhere(cache, runs, tmp_path, run_cli):
    some = shutil.copytree(runs, tmp_path / "runs")
    run = load_run(some / "relish-L2-seed1")
    shutil.rmtree(run.path)
    cell = DivergedCell(
        diverged_path(some, "relish-L2-seed1"), "relish", 2, 1, run.parameters, "by step 32", {"settings": {}}
    )
    save_diverged(cell)
    shown = run_cli("evaluate", some, "--out", tmp_path / "report")
    sentence = "relish, L = 2, seed 1, does not count: diverged in training: by step 32."
    assert (shown.exit_code, sentence in " ".join(shown.stdout.split())) == (0, True)
    assert sentence in (tmp_path / "report/report.html").read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "report/results.json").read_text())
    assert [c["status"] for c in figures["cells"] if "status" in c] == ["diverged in training: by step 32"]
    assert [g["seeds"] for g in figures["groups"]] == [1, 2, 1]
    with (tmp_path / "report/predictions.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 4 * 32
    for path in some.glob("*-seed*/config.json"):
        path.parent.rename(tmp_path / path.parent.name)
    with pytest.raises(RunError, match="only 1 that diverged; make some with: relish train CACHE --out .* --lr X"):
        evaluate_runs(some)


def test_a_plot_of_an_earlier_report_does_not_stay_beside_the_new_figures(runs, tmp_path):
    evaluate_runs(runs, out=tmp_path)
    evaluate_runs(runs / "relish-L1-seed0", out=tmp_path)
    assert not (tmp_path / "depth.png").exists()


def test_training_and_evaluating_never_import_transformers(cache, tmp_path):
    code = (
        "import sys, relish\n"
        "from relish.train.settings import TrainSettings\n"
        "s = TrainSettings(depths=(1,), epochs=1, latent_size=32, num_heads=4, device='cpu')\n"
        f"relish.train_heads({str(cache)!r}, {str(tmp_path / 'r')!r}, s)\n"
        f"relish.evaluate_runs({str(tmp_path / 'r')!r}, out={str(tmp_path / 'report')!r})\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_rows": 7},
            "relish-L2-seed1 was trained or validated on other rows than .*relish-L1-seed0, and one",
        ),
        ({"data": {"train": "x", "val_split": "dev", "val": "y"}}, "was trained or validated on other rows than"),
        ({"settings": {"loss": "huber"}}, "with another loss than .*relish-L1-seed0 .huber and mse., and is no seed"),
    ],
)
def test_runs_of_other_trainings_are_no_seeds_of_one_head(runs, tmp_path, change, message):
    copy = shutil.copytree(runs, tmp_path / "runs")
    config = json.loads((copy / "relish-L2-seed1" / "config.json").read_text(encoding="utf-8"))
    config |= {**change, "settings": {**config["settings"], **change.get("settings", {})}}
    (copy / "relish-L2-seed1" / "config.json").write_text(sealed_text(config), encoding="utf-8")
    with pytest.raises(RunError, match=message):
        evaluate_runs(copy)


def test_results_name_the_files_of_the_llm(cache, runs):
    identity = open_cache(cache).identity
    files = f"weights {identity.weights[:12]}, config {identity.config[:12]}, tokenizer {identity.tokenizer[:12]}"
    assert evaluate_runs(runs).meta["backbone files"] == files
