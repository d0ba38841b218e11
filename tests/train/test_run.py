import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from relish.cache.errors import RunError
from relish.train.grid import train_heads
from relish.train.run import find_runs, load_head, load_run
from relish.train.settings import TrainSettings


@pytest.fixture
def run(cache, tmp_path):
    settings = TrainSettings(depths=(1,), latent_size=32, num_heads=4, epochs=1, threads=1, device="cpu")
    train_heads(cache, tmp_path / "runs", settings)
    return tmp_path / "runs" / "relish-L1-seed0"


def test_a_run_folder_holds_what_the_design_says(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "history.jsonl",
        "metrics.json",
        "model.safetensors",
    ]
    loaded = load_run(run)
    assert (loaded.head.name, loaded.head.depth, loaded.seed, loaded.layer) == ("relish", 1, 0, 2)
    assert loaded.parameters == sum(p.numel() for p in load_head(run).parameters())
    assert find_runs(run) == find_runs(run.parent)


def test_folders_that_hold_no_run_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="is no run folder: it has no config.json; it holds 1 runs, name one: .*seed0"):
        load_run(run.parent)
    with pytest.raises(RunError, match="there is no trained head in .*nowhere; make some with: relish train"):
        find_runs(tmp_path / "nowhere")


def test_weights_that_are_damaged_are_refused(run):
    path = run / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(RunError, match="model.safetensors is damaged"):
        load_head(run)
    path.unlink()
    with pytest.raises(RunError, match="has no model.safetensors"):
        load_head(run)
    path.write_bytes(whole)
    state = load_file(path)
    save_file({**state, "latent": torch.full_like(state["latent"], float("nan"))}, path)
    with pytest.raises(RunError, match="holds NaN"):
        load_head(run)
    save_file({**state, "latent": torch.zeros(31)}, path)
    with pytest.raises(RunError, match="does not fit the settings in config.json"):
        load_head(run)


def test_configs_that_are_damaged_or_of_another_version_are_refused(run):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "version": 9}))
    with pytest.raises(RunError, match="has format version 9, and this relish reads version 1"):
        load_run(run)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "layer"}))
    with pytest.raises(RunError, match="is damaged: its config.json lacks 'layer'"):
        load_run(run)
    path.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        load_run(run)
