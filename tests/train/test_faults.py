"""Training under faults: nothing finished is lost, and no wrong number comes out in silence."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from relish.cache.errors import CacheError, DataError, RunError
from relish.cache.jsonfile import sealed_text
from relish.cache.lock import lock_folder
from relish.cache.reader import open_cache
from relish.train import loop
from relish.train.data import Rows
from relish.train.grid import train_heads
from relish.train.loop import Diverged
from relish.train.recipe import own_recipe
from relish.train.run import find_runs, load_head
from relish.train.settings import HEADS, TrainSettings

from ..disk import interrupted, read_only, small_disk
from .conftest import write_cache

SMALL = {"latent_size": 32, "num_heads": 4, "epochs": 1, "threads": 1, "device": "cpu"}
FAST = ["--epochs", 1, "--latent-size", 32, "--num-heads", 4, "--device", "cpu", "--threads", 1]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# one training at a time


def test_a_second_training_into_the_same_folder_is_refused(cache, tmp_path, run_cli):
    words = ["train", cache, "--out", tmp_path, *FAST]
    with lock_folder(tmp_path, RunError):
        result = run_cli(*words)
    assert result.exit_code == 2
    assert result.stderr == f"error: another process is writing into {tmp_path}; wait until it is done, or stop it\n"
    assert names(tmp_path) == []
    assert run_cli(*words).exit_code == 0
    with lock_folder(tmp_path, RunError):
        assert run_cli(*words).exit_code == 0  # reading what is there needs no lock


def test_the_lock_of_a_dead_process_and_what_it_left_do_no_harm(cache, tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom relish.cache.errors import RunError\n"
        "from relish.cache.lock import lock_folder\n"
        "with lock_folder(Path(sys.argv[1]), RunError):\n    os.kill(os.getpid(), 9)\n"
    )
    if hasattr(signal, "SIGKILL"):
        assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
        assert (tmp_path / ".lock").exists()
    left = tmp_path / ".relish-L1-seed7.tmp"  # of a cell that this grid does not even have
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".relish-L9-seed0.diverged.json.tmp").write_text("{")
    train_heads(cache, tmp_path, TrainSettings(depths=(1,), **SMALL))
    assert names(tmp_path) == ["relish-L1-seed0"]


# cells that diverge


def test_a_loss_that_is_no_longer_finite_ends_the_cell_within_the_epoch(cache, monkeypatch):
    opened = open_cache(cache)
    settings = TrainSettings(heads=("linear",), batch_size=1, standardise=False, **SMALL)
    train, val = Rows(opened.split("train"), np.arange(96)), Rows(opened.split("dev"), np.arange(32))
    from relish.train.heads import HeadSpec, build_head

    head = build_head(HeadSpec(name="linear", hidden_size=24, depth=0, latent_size=8, num_heads=2, dropout=0))
    steps = []

    def spoil(done):
        steps.append(done)
        if done == 3:
            with torch.no_grad():
                head.body.weight.fill_(float("nan"))

    with pytest.raises(Diverged, match="no longer finite by step 32"):
        loop.train_head(
            head,
            train,
            val,
            settings=settings,
            recipe=own_recipe(settings, "linear", len(train)),
            seed=0,
            label_range=(0, 5),
            device=torch.device("cpu"),
            on_epoch=lambda _: None,
            on_step=spoil,
        )
    assert len(steps) == 32 < 96


@pytest.fixture
def diverging(tmp_path):
    """Hidden states that only heads without standardised inputs choke on."""
    return write_cache(tmp_path / "huge", fill=3e38)


def test_a_diverged_cell_is_named_kept_in_mind_and_tried_again_when_asked(diverging, tmp_path, run_cli):
    runs = tmp_path / "runs"
    words = ["train", diverging, "--out", runs, "--head", "mlp,linear", "--no-standardise", *FAST]
    first = run_cli(*words)
    assert first.exit_code == 2
    assert "mlp-L0-seed0: diverged" in first.stderr
    assert (
        "error: mlp-L0-seed0, linear-L0-seed0 diverged: the loss was no longer finite by step 6. Against a loss that "
        "is not finite, try a lower --lr. To try a cell again with the same settings, delete its file "
        f"{runs / 'CELL.diverged.json'}\n"
    ) in first.stderr
    assert "next: relish evaluate" not in first.stdout
    mark = runs / "mlp-L0-seed0.diverged.json"
    assert names(runs) == ["linear-L0-seed0.diverged.json", mark.name]
    assert json.loads(mark.read_text())["reason"] == "the loss was no longer finite by step 6"
    when = mark.stat().st_mtime_ns
    again = run_cli(*words, "--json")
    assert (again.exit_code, json.loads(again.stdout)["diverged"]) == (2, ["mlp-L0-seed0", "linear-L0-seed0"])
    assert mark.stat().st_mtime_ns == when  # not trained again
    older = json.loads(mark.read_text())  # from before there was a choice
    del older["sha256"], older["training"]["settings"]["best_by"]
    mark.write_text(sealed_text(older))
    when = mark.stat().st_mtime_ns
    assert run_cli(*words).exit_code == 2
    assert mark.stat().st_mtime_ns == when
    mark.unlink()
    assert run_cli(*words).exit_code == 2
    assert mark.exists()
    # Other settings: nothing of the old ones is left, so the folder is free for them.
    other = run_cli(*words, "--lr", "1e-5", "--head", "mlp")
    assert (other.exit_code, names(runs)) == (2, [mark.name])
    assert json.loads(mark.read_text())["training"]["settings"]["lr"] == 1e-5
    lost = run_cli("evaluate", runs)
    assert "only 1 that diverged; make some with: relish train CACHE" in lost.stderr
    mark.write_text(mark.read_text().replace("mlp", "xlp"))
    damaged = run_cli(*words)
    assert (damaged.exit_code, "delete it, and that cell will be trained again" in damaged.stderr) == (2, True)


def test_the_rest_of_the_grid_goes_on(cache, tmp_path, run_cli, monkeypatch):
    real = loop.train_head

    def one_diverges(head, *rest, seed, **options):
        if seed == 0:
            raise Diverged("by step 1")
        return real(head, *rest, seed=seed, **options)

    monkeypatch.setattr("relish.train.cell.train_head", one_diverges)
    runs = tmp_path / "runs"
    result = run_cli("train", cache, "--out", runs, "--depths", 1, "--seeds", "0-1", *FAST)
    assert (result.exit_code, names(runs)) == (2, ["relish-L1-seed0.diverged.json", "relish-L1-seed1"])
    shown = run_cli("evaluate", runs)
    assert "relish, L = 1, seed 0, does not count: diverged in training: by step 1." in " ".join(shown.stdout.split())


@pytest.mark.parametrize("size", [1e31, 1e37])
def test_hidden_states_that_are_too_large_to_be_standardised_end_the_cell_with_the_reason(tmp_path, run_cli, size):
    """Divided by such a deviation, weights would lose their digits or vanish."""
    cache = write_cache(tmp_path / "c", times=size)
    runs = tmp_path / "runs"
    result = run_cli("train", cache, "--out", runs, "--head", "relish,mlp", "--depths", 1, *FAST)
    assert (result.exit_code, names(runs)) == (
        2,
        ["mlp-L0-seed0.diverged.json", "relish-L1-seed0.diverged.json"],
    )
    assert (
        "error: relish-L1-seed0, mlp-L0-seed0 diverged: the hidden states are too large to be standardised in float32; "
        "train on another layer, or with --no-standardise. "
    ) in result.stderr


def test_hidden_states_whose_squares_overflow_float32_are_learnt_from_as_any(tmp_path):
    figures = []
    for size in (1.0, 2.0**80):
        cache = write_cache(tmp_path / f"c{size}", times=size)
        settings = TrainSettings(depths=(1,), epochs=4, batch_size=16, latent_size=32, num_heads=4, threads=1)
        result = train_heads(cache, tmp_path / f"runs{size}", settings)
        figures += [metrics["val"]["pearson"] for metrics in result.cells.values()]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


# unusual rows


@pytest.mark.parametrize("head", HEADS)
def test_constant_targets_are_predicted_and_have_no_correlation(tmp_path, head):
    cache = write_cache(tmp_path / "c", label=2.5)
    settings = TrainSettings(heads=(head,), depths=(1,), **{**SMALL, "epochs": 8, "lr": 1e-3})
    (metrics,) = train_heads(cache, tmp_path / "r", settings).cells.values()
    assert metrics["val"]["pearson"] is None
    assert metrics["val"]["nrmse"] < 0.2
    (run,) = find_runs(tmp_path / "r")
    load_head(run)


@pytest.mark.parametrize(("split", "rows"), [("train", 96), ("dev", 32)])
def test_rows_without_a_label_are_refused(tmp_path, split, rows):
    cache = write_cache(tmp_path / "c", label=float("nan"))
    if split == "dev":
        whole = write_cache(tmp_path / "whole")
        for path in whole.glob("train-*.h5"):
            shutil.copy(path, cache)
        mine = json.loads((cache / "manifest.json").read_text())
        mine["splits"]["train"] = json.loads((whole / "manifest.json").read_text())["splits"]["train"]
        del mine["sha256"]
        from relish.cache.jsonfile import sealed_text

        (cache / "manifest.json").write_text(sealed_text(mine))
    with pytest.raises(DataError) as caught:
        train_heads(cache, tmp_path / "r", TrainSettings(**SMALL))
    assert str(caught.value) == (
        f"{rows} of {rows} rows of the split '{split}' of the cache {cache} have no label, first row 0 (id "
        f"'{split}-0'); all need one: fill them in, or leave those rows out, and extract into another folder"
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ({"train": 1}, "0 training rows of the cache {} are left after 1 of 1 was held out for validation"),
        ({"train": 2}, "1 training rows of the cache {} are left after 1 of 2 was held out for validation"),
        ({"train": 1, "dev": 4}, "1 training rows of the cache {}"),
    ],
)
def test_too_few_rows_are_refused(tmp_path, sizes, left):
    cache = write_cache(tmp_path / "c", sizes=sizes)
    with pytest.raises(DataError) as caught:
        train_heads(cache, tmp_path / "r", TrainSettings(**SMALL))
    assert str(caught.value) == f"{left.format(cache)}; at least 2 are needed: extract more rows"
    assert not (tmp_path / "r").exists()


def test_pearson_chooses_no_epoch_where_validation_labels_are_all_the_same(tmp_path):
    cache = write_cache(tmp_path / "c", sizes={"train": 8, "dev": 1})
    with pytest.raises(DataError) as caught:
        train_heads(cache, tmp_path / "r", TrainSettings(heads=("ridge", "relish"), **SMALL, best_by="pearson"))
    assert str(caught.value) == (
        f"no epoch is best by Pearson: the labels of the 1 validation rows of the cache {cache} are all the same. "
        "Leave best_by at nrmse, or extract more validation rows"
    )
    assert not (tmp_path / "r").exists()
    assert train_heads(cache, tmp_path / "r", TrainSettings(heads=("ridge",), **SMALL, best_by="pearson")).cells


@pytest.mark.parametrize("head", ["relish", "mlp", "ridge"])
@pytest.mark.parametrize("sizes", [{"train": 3}, {"train": 5, "dev": 1, "test": 1}])
def test_a_training_split_smaller_than_a_batch_and_single_rows_are_enough(tmp_path, run_cli, head, sizes):
    cache = write_cache(tmp_path / "c", sizes=sizes)
    result = run_cli("train", cache, "--out", tmp_path / "r", "--head", head, *FAST)
    assert result.exit_code == 0, result.stderr
    if "test" in sizes:
        shown = run_cli("evaluate", tmp_path / "r", "--json")
        (cell,) = json.loads(shown.stdout)["cells"]
        assert cell["pearson"] is None
        assert cell["rmse"] >= 0


# the disk


def test_a_full_disk_ends_with_one_sentence_and_keeps_what_is_finished(cache, tmp_path, run_cli):
    with small_disk(tmp_path / "disk", "160k") as disk:
        words = ["train", cache, "--out", disk / "runs", "--depths", 1, "--seeds", "0-4", *FAST]
        command = [sys.executable, "-m", "relish", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        note, *before, last = done.stderr.splitlines()
        assert note.startswith("note: 6 steps per cell are few")
        assert done.returncode == 2, done.stderr
        kept = names(disk / "runs")
        assert 0 < len(kept) < 5
        assert len(before) == len(kept)
        assert last.startswith(f"error: {disk / 'runs'}/relish-L1-seed{len(kept)}/")
        assert last.endswith(
            " cannot be written (No space left on device); finished cells are kept: free space, and run the "
            "same command again"
        )
        for run in find_runs(disk / "runs"):
            load_head(run)
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        again = run_cli(*words)
        assert (again.exit_code, again.stderr.count("there already")) == (0, len(kept))
        assert len(names(disk / "runs")) == 5


def test_a_file_system_without_room_for_a_folder_is_named_with_the_way_out(cache, tmp_path, run_cli):
    with small_disk(tmp_path / "disk", "1m,nr_inodes=1") as disk:
        result = run_cli("train", cache, "--out", disk / "runs", *FAST)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {disk / 'runs'} cannot be written (No space left on device); free space, or choose another one\n"
    )


def test_a_read_only_folder_is_named_and_its_runs_can_still_be_read(cache, tmp_path, run_cli):
    words = ["train", cache, "--out", tmp_path / "r", "--depths", 1, *FAST]
    assert run_cli(*words).exit_code == 0
    with read_only(tmp_path / "r"):
        result = run_cli(*words, "--seeds", "0-1")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"error: {tmp_path / 'r'} cannot be written (Read-only file system); make the")
        assert run_cli(*words).exit_code == 0
        assert run_cli("evaluate", tmp_path / "r").exit_code == 0


# flipped bits in the cache


def test_a_flipped_bit_in_a_shard_is_found_before_a_run_is_saved(tmp_path):
    cache = write_cache(tmp_path / "c", sizes={"train": 30, "dev": 10, "test": 10})
    settings = TrainSettings(heads=("relish", "ridge"), depths=(1,), **SMALL)
    train_heads(cache, tmp_path / "whole", settings)
    whole = (tmp_path / "whole/relish-L1-seed0/model.safetensors").read_bytes()
    found = 0
    for shard in sorted(cache.glob("train-*.h5")) + sorted(cache.glob("dev-*.h5")):
        content = shard.read_bytes()
        for place in np.linspace(0, len(content) - 1, 8).astype(int):
            changed = bytearray(content)
            changed[place] ^= 1 << int(place) % 8
            shard.write_bytes(changed)
            out = tmp_path / f"{shard.stem}-{place}"
            error = failure(cache, out, settings)
            if error is None:  # padding, which is never read
                assert (out / "relish-L1-seed0/model.safetensors").read_bytes() == whole
            else:
                assert shard.name in str(error)
                assert not list(out.glob("*/config.json"))
                assert not list(out.glob(".*.tmp"))
                found += 1
        shard.write_bytes(content)
    assert found > 8


def failure(cache, out, settings):
    try:
        train_heads(cache, out, settings)
    except CacheError as error:
        return error
    return None


# signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_an_interrupted_training_keeps_its_cells_and_says_how_to_go_on(cache, tmp_path, run_cli, number, code):
    words = ["train", cache, "--out", tmp_path / "r", "--depths", 1, *FAST, "--epochs", 2]
    slow = (
        "import relish.train.cell as cell\nreal = cell.train_head\n"
        "def slow(*rows, on_step, **more):\n"
        "    return real(*rows, on_step=lambda done: (on_step(done), time.sleep(0.05)), **more)\n"
        "cell.train_head = slow"
    )
    ended, said = interrupted(
        [*words, "--seeds", "0-9"], number, slow=slow, until=lambda line: line.startswith("relish-L1-seed0: done")
    )
    assert ended == code, said
    assert said.splitlines()[-1].startswith("interrupted; ")
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert "relish-L1-seed0" in names(tmp_path / "r")
    assert not [name for name in names(tmp_path / "r") if name.startswith(".")]
    assert "relish-L1-seed0: there already" in run_cli(*words).stderr


def test_a_relative_folder_after_a_change_of_folder(cache, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    class Wanderer:
        def plan(self, *_): ...
        def start(self, *_): ...
        def step(self, *_): ...
        def end(self, *_): ...

        def epoch(self, *_):
            os.chdir(tmp_path / "b")

    done = train_heads(cache, "runs", TrainSettings(depths=(1,), seeds=(0, 1), **SMALL), listener=Wanderer())
    assert done.folder == tmp_path / "a" / "runs"
    assert names(tmp_path / "a" / "runs") == ["relish-L1-seed0", "relish-L1-seed1"]
    assert names(tmp_path / "b") == []
