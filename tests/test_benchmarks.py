"""The benchmarks run: each in its smallest form, as a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, out: Path) -> tuple[dict, str]:
    command = [sys.executable, BENCHMARKS / name, "--small", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_grid(tmp_path):
    result, shown = run("grid.py", tmp_path / "grid.json")
    assert result["machine"]["torch"]
    assert not result["rival"]["extrapolated"]
    assert result["factor"] == pytest.approx(result["rival"]["wall_s"] / result["relish"]["wall_s"])
    for mine, other in zip(result["relish"]["cells"], result["rival"]["cells"], strict=True):
        # The same weights, batches and recipe on both sides: any difference but rounding is a mistake in one of them.
        assert (mine["depth"], mine["seed"]) == (other["depth"], other["seed"])
        assert mine["pearson"] == pytest.approx(other["pearson"], abs=1e-3)
        assert mine["nrmse"] == pytest.approx(other["nrmse"], abs=1e-3)
    assert "2 cells, 96 training rows, 2 epochs" in shown


def test_scaling(tmp_path):
    result, shown = run("scaling.py", tmp_path / "scaling.json")
    assert [one["varied"] for one in result["series"]] == ["D", "T", "L", "rows", "cells"]
    assert all(second > 0 for one in result["series"] for second in one["seconds"])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert shown.count("\n") == 7
