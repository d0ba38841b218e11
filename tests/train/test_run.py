import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from relish.cache.errors import RunError
from relish.cache.jsonfile import sealed_text
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
    with pytest.raises(
        RunError, match="is no run folder: it has no config.json; name one or several of its 1 runs, such as .*seed0"
    ):
        load_run(run.parent)
    with pytest.raises(RunError, match="there is no trained head in .*nowhere; make some with: relish train"):
        find_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("left", ["model.safetensors", None])
def test_a_cell_without_its_settings_is_named_with_the_way_out(run, tmp_path, run_cli, left):
    for path in run.iterdir():
        if path.name != left:
            path.unlink()
    sentence = f"the run {run} has no config.json; restore it from a copy, or delete {run} and train again"
    for call in (lambda: load_run(run), lambda: find_runs(run.parent)):
        with pytest.raises(RunError) as caught:
            call()
        assert str(caught.value) == sentence
    assert run_cli("evaluate", run.parent).stderr == f"error: {sentence}\n"
    with pytest.raises(RunError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no run folder: it has no config.json; name one that relish train made, such as "
        "runs/relish-L3-seed0"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are Unicode")
def test_a_cache_whose_path_is_no_unicode_can_be_trained_on(cache, tmp_path, run_cli):
    moved = shutil.copytree(cache, tmp_path / os.fsdecode(b"caf\xe9"))
    runs = tmp_path / os.fsdecode(b"runs-\xe9")
    train_heads(moved, runs, TrainSettings(heads=("ridge",), device="cpu"))
    assert load_run(runs / "ridge-L0-seed0").cache == moved
    assert run_cli("evaluate", runs, "--json").exit_code == 0


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def seal(run, content):
    """Put a file in the place of the weights and make config.json vouch for it, as only forgery would."""
    (run / "model.safetensors").write_bytes(content)
    config = json.loads((run / "config.json").read_text())
    del config["sha256"]
    config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (run / "config.json").write_text(sealed_text(config), encoding="utf-8")


def test_weights_that_are_damaged_are_refused(run):
    path = run / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        RunError, match="model.safetensors is damaged: .*; restore it from a copy, or delete .*seed0 and"
    ):
        load_head(run)
    path.unlink()
    with pytest.raises(RunError, match=r"model.safetensors cannot be read \(No such file"):
        load_head(run)


def test_any_flipped_bit_in_the_weights_is_found(run):
    path = run / "model.safetensors"
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        content = bytearray(whole)
        content[place] ^= 1  # the lowest bit of a mantissa as well, where no NaN shows it
        path.write_bytes(content)
        with pytest.raises(RunError, match="model.safetensors is damaged"):
            load_head(run)
    path.write_bytes(whole)
    load_head(run)


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_any_flipped_bit_in_the_settings_and_the_figures_is_found(run, name):
    whole = (run / name).read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 7
        (run / name).write_bytes(content)
        with pytest.raises(RunError, match="seed0"):
            load_run(run)


def test_weights_of_another_shape_or_with_nan_are_refused_even_if_vouched_for(run):
    state = load_file(run / "model.safetensors")
    seal(run, save({**state, "latent": torch.full_like(state["latent"], float("nan"))}))
    with pytest.raises(RunError, match="model.safetensors holds NaN"):
        load_head(run)
    seal(run, save({**state, "latent": torch.zeros(31)}))
    with pytest.raises(RunError, match="model.safetensors does not fit the settings in config.json"):
        load_head(run)
    seal(run, save({name: value for name, value in state.items() if name != "latent"}))
    with pytest.raises(RunError, match="model.safetensors does not fit the settings in config.json"):
        load_head(run)
    seal(run, b"\xff" * 100)
    with pytest.raises(RunError, match="model.safetensors is no safetensors file"):
        load_head(run)


def test_pickle_is_never_loaded(run, tmp_path):
    whole = (run / "model.safetensors").read_bytes()
    evil = pickle.dumps(Evil(tmp_path / "owned"))
    zipped = io.BytesIO()
    torch.save(Evil(tmp_path / "owned"), zipped)
    for content in (evil, zipped.getvalue()):
        seal(run, content)
        with pytest.raises(RunError, match="model.safetensors is no safetensors file"):
            load_head(run)
    seal(run, whole)
    for name in ("model.bin", "pytorch_model.bin", "model.pt", "model.pkl"):
        (run / name).write_bytes(zipped.getvalue())
    load_head(run)
    (run / "model.safetensors").unlink()  # nothing beside it takes its place
    with pytest.raises(RunError, match="cannot be read"):
        load_head(run)
    assert not (tmp_path / "owned").exists()
    pickle.loads(evil)
    assert (tmp_path / "owned").exists()  # the pickle would have done something


def test_configs_that_are_damaged_or_of_another_version_are_refused(run):
    path = run / "config.json"
    whole = path.read_text()
    value = json.loads(whole)
    del value["sha256"]
    path.write_text(sealed_text({**value, "version": 9}), encoding="utf-8")
    with pytest.raises(RunError, match="has format version 9, and this relish reads version 1"):
        load_run(run)
    path.write_text(whole.replace("5.0", "9.0"))
    with pytest.raises(RunError, match="config.json is not as relish wrote it: it was edited or damaged"):
        load_run(run)
    config = json.loads(whole)
    del config["sha256"], config["layer"]
    path.write_text(sealed_text(config))
    with pytest.raises(RunError, match="is damaged: its config.json lacks 'layer'"):
        load_run(run)
    path.write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        load_run(run)
    path.write_text(whole)
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match="has no metrics.json; restore it"):
        load_run(run)
