import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from relish.cache.errors import RunError
from relish.cache.jsonfile import sealed_text
from relish.cache.reader import open_cache
from relish.train.data import Rows
from relish.train.grid import grid_cells, train_heads
from relish.train.loop import EpochRecord, best_epoch, predict_rows
from relish.train.run import load_head, load_run
from relish.train.settings import HEADS, TrainSettings

from .conftest import write_cache

SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 3, "threads": 1, "device": "cpu"}


def weights(run):
    return load_file(run / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_grid_holds_relish_at_each_depth_others_once_per_seed_and_ridge_once():
    settings = TrainSettings(heads=("relish", "mlp", "ridge"), depths=(1, 3), seeds=(0, 7))
    assert [str(cell) for cell in grid_cells(settings)] == [
        "relish-L1-seed0",
        "relish-L1-seed7",
        "relish-L3-seed0",
        "relish-L3-seed7",
        "mlp-L0-seed0",
        "mlp-L0-seed7",
        "ridge-L0-seed0",
    ]


def test_a_cell_has_the_same_weights_bit_for_bit_alone_or_in_a_grid(cache, tmp_path):
    grid = TrainSettings(heads=("linear", "relish"), depths=(1, 2), seeds=(0, 1), dropout=0.1, **SMALL)
    train_heads(cache, tmp_path / "grid", grid)
    torch.manual_seed(99)  # what the process drew before must not matter
    train_heads(cache, tmp_path / "alone", TrainSettings(depths=(2,), seeds=(1,), dropout=0.1, **SMALL))
    assert same(weights(tmp_path / "grid/relish-L2-seed1"), weights(tmp_path / "alone/relish-L2-seed1"))
    assert not same(weights(tmp_path / "grid/relish-L2-seed0"), weights(tmp_path / "alone/relish-L2-seed1"))


def test_training_leaves_the_callers_random_state_as_it_was(cache, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_and_predicts_after_loading_what_it_predicted_before(cache, tmp_path, head):
    settings = TrainSettings(heads=(head,), depths=(1,), **{**SMALL, "epochs": 20, "lr": 1e-2, "patience": 20})
    result = train_heads(cache, tmp_path / "r", settings)
    (cell, metrics), *_ = result.cells.items()
    run = tmp_path / "r" / str(cell)
    one_token = head in ("ridge", "linear-last", "mlp-last")  # which says little here
    assert metrics["val"]["pearson"] > (0.2 if one_token else 0.6)
    dev = open_cache(cache).split("dev")
    rows = Rows(dev, np.arange(len(dev)))
    predictions = predict_rows(load_head(run), rows, torch.device("cpu"))
    rmse = float(np.sqrt(np.mean((predictions - dev.target) ** 2)))
    assert rmse == pytest.approx(metrics["val"]["rmse"], abs=1e-9)
    assert json.loads((run / "metrics.json").read_text())["val"] == metrics["val"]
    assert load_run(run).head.name == head


@pytest.mark.parametrize(("best_by", "sign"), [("nrmse", 1), ("pearson", -1)])
def test_the_best_epochs_weights_are_kept_and_training_stops_early(cache, tmp_path, best_by, sign):
    settings = TrainSettings(depths=(2,), **{**SMALL, "epochs": 60, "lr": 3e-3, "patience": 2, "best_by": best_by})
    result = train_heads(cache, tmp_path / "r", settings)
    (metrics,) = result.cells.values()
    history = [json.loads(line) for line in (tmp_path / "r/relish-L2-seed0/history.jsonl").read_text().splitlines()]
    best = min(history, key=lambda record: sign * record[f"val_{best_by}"])
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["val"][best_by] == pytest.approx(best[f"val_{best_by}"], abs=1e-12)
    assert len(history) == best["epoch"] + 2 < 60


def test_constant_predictions_are_no_epochs_best_by_pearson():
    history = [EpochRecord(epoch, 1.0, 0.3, r, 0.0) for epoch, r in enumerate((math.nan, -0.2, 0.1, 0.1), 1)]
    assert best_epoch(history, "pearson") == 3
    assert best_epoch(history[:2], "pearson") == 2
    assert best_epoch(history[:1], "pearson") == 1


def test_runs_from_before_the_choice_of_best_by_go_on(cache, tmp_path):
    settings = TrainSettings(depths=(1,), **SMALL)
    train_heads(cache, tmp_path / "r", settings)
    path = tmp_path / "r/relish-L1-seed0/config.json"
    config = json.loads(path.read_text())
    del config["settings"]["best_by"]
    del config["sha256"]
    path.write_text(sealed_text(config))
    assert len(train_heads(cache, tmp_path / "r", replace(settings, seeds=(0, 1))).cells) == 2
    with pytest.raises(RunError, match="relish-L1-seed0 has best_by 'nrmse', this one 'pearson'"):
        train_heads(cache, tmp_path / "r", replace(settings, best_by="pearson"))


def test_on_few_rows_the_default_is_more_epochs_and_runs_say_how_many(cache, tmp_path):
    """The same grid again, or with the same number written out, is the same training."""
    settings = TrainSettings(heads=("linear", "ridge"), batch_size=64, **{**SMALL, "epochs": None})
    result = train_heads(cache, tmp_path / "r", settings)
    epochs = math.ceil(10_000 / len(open_cache(cache).split("train")))
    assert epochs > 5
    config = json.loads((tmp_path / "r/linear-L0-seed0/config.json").read_text())
    assert config["settings"]["epochs"] == epochs
    assert config["settings"]["patience"] == math.ceil(3 / 5 * epochs)
    for again in (settings, replace(settings, epochs=epochs)):
        assert train_heads(cache, tmp_path / "r", again).cells == result.cells
    with pytest.raises(RunError, match=f"has epochs {epochs}, this one 7"):
        train_heads(cache, tmp_path / "r", replace(settings, epochs=7))


def test_what_a_ridge_does_not_learn_by_does_not_matter(cache, tmp_path):
    settings = TrainSettings(heads=("ridge",), **SMALL)
    first = train_heads(cache, tmp_path / "r", settings)
    config = json.loads((tmp_path / "r/ridge-L0-seed0/config.json").read_text())["settings"]
    learnt = ("lr", "weight_decay", "epochs", "patience", "best_by", "step_scale", "principal_axes")
    assert [config[name] for name in learnt] == [None] * 7
    again = replace(settings, epochs=7, patience=2, best_by="pearson", lr=0.5, weight_decay=0.5)
    assert train_heads(cache, tmp_path / "r", again).cells == first.cells


def test_runs_that_began_with_larger_steps_are_another_training(cache, tmp_path, monkeypatch):
    settings = TrainSettings(heads=("relish",), depths=(1,), **SMALL)
    monkeypatch.setattr("relish.train.recipe.STEP_SCALE", None)  # as runs from before it have it: not at all
    train_heads(cache, tmp_path / "r", settings)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"relish-L1-seed0 has step_scale None, this one 0\.1"):
        train_heads(cache, tmp_path / "r", replace(settings, depths=(1, 2)))


def test_an_interrupted_grid_goes_on_with_the_missing_cells_only(cache, tmp_path):
    settings = TrainSettings(depths=(1, 2), seeds=(0, 1), **SMALL)
    train_heads(cache, tmp_path / "whole", settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/relish-L2-seed0")
    (tmp_path / "part/.relish-L2-seed0.tmp").mkdir()  # what a killed process leaves
    kept = (tmp_path / "part/relish-L1-seed0/model.safetensors").stat().st_mtime_ns
    result = train_heads(cache, tmp_path / "part", settings)
    assert len(result.cells) == 4
    assert (tmp_path / "part/relish-L1-seed0/model.safetensors").stat().st_mtime_ns == kept
    assert not (tmp_path / "part/.relish-L2-seed0.tmp").exists()
    for cell in result.cells:
        assert same(weights(tmp_path / "whole" / str(cell)), weights(tmp_path / "part" / str(cell)))


def test_a_folder_of_another_training_is_refused(cache, tmp_path):
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    with pytest.raises(
        RunError, match=r"holds runs of another training: relish-L1-seed0 has lr 0.0003, this one 0.01\."
    ):
        train_heads(cache, tmp_path / "r", TrainSettings(depths=(2,), **SMALL, lr=0.01))
    other = write_cache(tmp_path / "other", sizes={"train": 40, "dev": 10})
    with pytest.raises(RunError, match="has train_rows 96, this one 40"):
        train_heads(other, tmp_path / "r", TrainSettings(depths=(2,), **SMALL))
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/thesis.tex").touch()
    with pytest.raises(RunError, match="papers holds other files and no runs; choose a new or empty folder"):
        train_heads(cache, tmp_path / "papers", TrainSettings(**SMALL))


def test_another_validation_split_is_refused(tmp_path):
    cache = write_cache(tmp_path / "c", sizes={"train": 40, "dev": 10})
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    write_cache(cache, sizes={"train": 40, "dev": 10, "validation": 12})
    with pytest.raises(RunError, match="has val_split 'dev', this one 'validation'"):
        train_heads(cache, tmp_path / "r", TrainSettings(depths=(2,), **SMALL))


def test_ridge_is_one_cell_whatever_the_seeds(cache, tmp_path):
    train_heads(cache, tmp_path / "r", TrainSettings(heads=("ridge",), **SMALL))
    train_heads(cache, tmp_path / "r", TrainSettings(heads=("ridge",), **{**SMALL, "seeds": (3,)}))
    assert [path.name for path in (tmp_path / "r").glob("[!.]*")] == ["ridge-L0-seed0"]


def test_history_is_a_line_of_json_per_epoch_and_nothing_for_ridge(cache, tmp_path):
    train_heads(cache, tmp_path / "r", TrainSettings(heads=("ridge", "linear"), **SMALL))
    assert (tmp_path / "r/ridge-L0-seed0/history.jsonl").read_text() == ""
    lines = (tmp_path / "r/linear-L0-seed0/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_damaged_run_is_named_and_not_taken_for_another_folder(cache, tmp_path):
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    config = tmp_path / "r/relish-L1-seed0/config.json"
    config.write_text(config.read_text()[:-40])
    with pytest.raises(
        RunError, match="config.json cannot be read .*; restore it from a copy, or delete .* and train again"
    ):
        train_heads(cache, tmp_path / "r", TrainSettings(depths=(2,), **SMALL))


def test_a_cell_that_diverges_is_marked_and_the_others_go_on(tmp_path):
    cache = write_cache(tmp_path / "c", fill=3e38)
    settings = TrainSettings(heads=("linear", "mlp", "ridge-mean"), standardise=False, **{**SMALL, "epochs": 1})
    result = train_heads(cache, tmp_path / "r", settings)
    assert [str(cell) for cell in result.diverged] == ["linear-L0-seed0", "mlp-L0-seed0", "ridge-mean-L0-seed0"]
    assert sorted(path.name for path in (tmp_path / "r").glob("[!.]*")) == [
        "linear-L0-seed0.diverged.json",
        "mlp-L0-seed0.diverged.json",
        "ridge-mean-L0-seed0.diverged.json",
    ]


def test_several_layers_one_is_picked(tmp_path):
    cache = write_cache(tmp_path / "c", layers=(1, 3))
    train_heads(cache, tmp_path / "r", TrainSettings(depths=(1,), layer=3, **SMALL))
    assert load_run(tmp_path / "r/relish-L1-seed0").layer == 3
