"""Heads on a learned mix of layers, evaluated and used on new texts."""

import csv
import json

import numpy as np
import pytest

from relish.cache.errors import CacheError, RunError
from relish.evaluate.results import evaluate_runs
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.train.grid import train_heads
from relish.train.run import load_run
from relish.train.settings import TrainSettings

from ..train.conftest import write_cache
from .conftest import SMALL


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The runs of a grid on a mix of three layers."""
    folder = tmp_path_factory.mktemp("mixed")
    cache = write_cache(folder / "cache", layers=(1, 2, 5))
    settings = TrainSettings(heads=("relish", "linear-last"), depths=(1,), seeds=(0, 1), layer="mix", **SMALL)
    train_heads(cache, folder / "runs", settings)
    return folder / "runs"


def test_figures_and_the_shares_of_the_layers(mixed, tmp_path):
    results = evaluate_runs(mixed, split="dev", out=tmp_path / "report")
    for cell in results.cells:
        val = load_run(mixed / f"{cell.head}-L{cell.depth}-seed{cell.seed}").metrics["val"]
        assert cell.metrics == pytest.approx(val, abs=1e-6)
    runs = [load_run(mixed / f"relish-L1-seed{seed}").metrics["layer_mix"] for seed in (0, 1)]
    means = [(runs[0][layer] + runs[1][layer]) / 2 for layer in ("1", "2", "5")]
    assert results.meta["layer"] == "mix"
    assert results.meta["layer mix of relish, L = 1"] == "1: {:.2f}, 2: {:.2f}, 5: {:.2f}".format(*means)
    assert "layer mix of linear-last" in results.meta
    assert "layer mix of relish, L = 1" in (tmp_path / "report/report.html").read_text(encoding="utf-8")


def test_a_cache_that_lacks_a_layer_is_refused(mixed, tmp_path, run_cli):
    other = write_cache(tmp_path / "other", layers=(1, 5))
    with pytest.raises(CacheError, match=r"layers is \(1, 2, 5\) there and \(1, 5\) here"):
        evaluate_runs(mixed, cache=other)
    result = run_cli("evaluate", mixed, "--cache", other)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_mix_and_a_single_layer_do_not_stand_in_one_table(mixed, tmp_path):
    cache = mixed.parent / "cache"
    train_heads(cache, tmp_path / "runs", TrainSettings(heads=("linear",), layer=5, **SMALL))
    run = mixed / "relish-L1-seed0"
    (tmp_path / "runs" / run.name).symlink_to(run, target_is_directory=True)
    with pytest.raises(RunError, match="was trained on another layer or label range"):
        evaluate_runs(tmp_path / "runs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, tiny_rows):
    """Heads of the tiny llama's layers 0, 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    data = {"train": tiny_rows(60, 0), "dev": tiny_rows(20, 1), "test": tiny_rows(20, 2)}
    extract_cache(
        folder / "cache",
        ExtractSettings(
            model=tiny_model("llama"),
            data=data,
            prompt="{text}",
            label_range=(0.0, 5.0),
            device="cpu",
            layers=(0, 2, 3),
        ),
    )
    settings = TrainSettings(heads=("relish", "mlp-last"), depths=(1,), layer="mix", **SMALL)
    train_heads(folder / "cache", folder / "runs", settings)
    return folder / "runs"


@pytest.mark.parametrize("cell", ["relish-L1-seed0", "mlp-last-L0-seed0"])
def test_scores_of_new_texts_are_evaluates_numbers(trained, cell, tiny_model, tiny_rows, tmp_path, run_cli):
    data, out = tmp_path / "new.jsonl", tmp_path / "scores.csv"
    data.write_text("\n".join(json.dumps({"text": row["text"]}) for row in tiny_rows(20, 2)), encoding="utf-8")
    words = ["predict", trained / cell, "--model", tiny_model("llama"), "--data", data, "--out", out]
    result = run_cli(*words, "--layer", "mix")
    assert result.exit_code == 0, result.stderr
    with out.open(encoding="utf-8", newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    expected = evaluate_runs(trained / cell).predictions[0]
    assert np.ptp(expected) > 0.1
    # Another batch may round a hidden state to the neighbouring bfloat16.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-3)
    other = run_cli(*words, "--layer", "3")
    assert (other.exit_code, "was trained with the layer 'mix', not 3; leave --layer out" in other.stderr) == (2, True)
    wrong = run_cli(*words, "--layer", "top")
    assert wrong.stderr == "error: --layer takes an index such as 15, or mix; not 'top'\n"
