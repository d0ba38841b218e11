"""The benchmarks of extraction and start-up run: each in its smallest form, as a process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name, out):
    command = [sys.executable, BENCHMARKS / name, "--small", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_extract(tmp_path):
    result, shown = run("extract.py", tmp_path / "extract.json")
    assert {"relish", "relish, layer 1", "floor", "padded to 256", "padded to the longest", "pipeline"} <= set(
        result["rivals"]
    )
    for one in result["rivals"].values():
        assert one["tokens_per_s"] > 0
    assert set(result["peak_mb_by_rows"]) == {"16", "64"}
    assert "the forward passes waited" in shown


def test_end_to_end(tmp_path):
    result, shown = run("end_to_end.py", tmp_path / "end_to_end.json")
    cost = result["seconds_a_row"]
    assert min(cost.values()) > 0
    assert result["break_even_cells"]["5"] == pytest.approx((cost["x"] + cost["m"]) / (5 * cost["f"]))
    fifteen = result["stsb"]["grids"][-1]
    assert fifteen["recompute_s"] == pytest.approx(5749 * 15 * 5 * (cost["f"] + cost["t"]))
    assert "the cache pays from" in shown


def test_startup(tmp_path):
    result, _ = run("startup.py", tmp_path / "startup.json")
    stages = result["first_step_stages_s"]
    assert list(stages) == ["imported", "opened", "begun", "step"]
    assert list(stages.values()) == sorted(stages.values())
    assert result["commands"]["relish train, first step"]["median_s"] == pytest.approx(stages["step"])
