"""Trainings that are killed: the same command goes on, and the end is that of an unbroken run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..killed import run_script
from .conftest import write_cache

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def test_a_training_killed_at_any_step_or_moment_goes_on_and_loses_one_cell_at_most(tmp_path):
    cache = write_cache(tmp_path / "c", sizes={"train": 20, "dev": 8})
    killed, states = run_script("train", cache, tmp_path, 20)
    assert killed > 12  # each cell: a folder, four files, a rename
    assert states == "[0, 1, 2]"


def test_a_command_line_that_is_killed_can_be_run_again(cache, tmp_path):
    words = [
        sys.executable,
        "-m",
        "relish",
        "train",
        cache,
        "--out",
        tmp_path / "runs",
        "--depths",
        "1",
        "--seeds",
        "0-2",
    ]
    words = list(map(str, [*words, "--epochs", 2, "--latent-size", 32, "--num-heads", 4, "--device", "cpu"]))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("note: 12 steps per cell are few")
        assert process.stderr.readline().startswith("relish-L1-seed0: done")
        process.kill()
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "relish-L1-seed0: there already" in again.stderr
    assert not list(Path(tmp_path / "runs").glob(".*.tmp"))
