"""Evaluating and predicting under faults: old results stay whole, damaged heads give no number."""

import json
import os
import re
import shutil
import signal
import sys

import pytest

from relish.cache.errors import RunError
from relish.cache.lock import lock_folder
from relish.evaluate import predict
from relish.evaluate.predict import predict_scores
from relish.evaluate.results import evaluate_runs
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from ..disk import fill, interrupted, read_only, small_disk
from .conftest import SMALL


def contents(folder):
    files = [path for path in folder.iterdir() if path.name not in (".lock", "filler")]
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "runs"
    train_heads(tiny_cache, out, TrainSettings(depths=(1,), **SMALL))
    return out / "relish-L1-seed0"


@pytest.fixture
def predict_words(run, tiny_model, tiny_rows, tmp_path):
    data = tmp_path / "data" / "new.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in tiny_rows(40, 3)), encoding="utf-8")
    return ["predict", run, "--model", tiny_model("llama"), "--data", data, "--device", "cpu", "--out"]


# damaged heads


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.json"])
def test_a_run_that_changed_gives_no_number(run, tiny_model, predict_words, tmp_path, run_cli, name):
    copy = shutil.copytree(run.parent, tmp_path / "runs") / run.name
    content = bytearray((copy / name).read_bytes())
    content[-40] ^= 1  # in the weights: the lowest bits of a mantissa
    (copy / name).write_bytes(content)
    predict_words[1] = copy
    out = tmp_path / "scores.csv"
    for result in (run_cli("evaluate", copy.parent), run_cli(*predict_words, out)):
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"error: {copy / name} is ")
        assert result.stderr.endswith(f"; restore it from a copy, or delete {copy} and train again\n")
    assert not out.exists()


# the disk


def test_a_full_disk_leaves_the_old_report_as_it_was(runs, tmp_path, run_cli):
    with small_disk(tmp_path / "disk", "4m") as disk:
        report = disk / "report"
        words = ["evaluate", runs, "--out", report]
        assert run_cli(*words, "--split", "dev").exit_code == 0
        old = contents(report)
        for leave in (0, 8_192, 65_536, 250_000):
            filler = fill(disk, leave)
            result = run_cli(*words)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1), leave
            assert result.stderr.startswith(
                f"error: {report} cannot be written (No space left on device); what the folder held before is kept: "
                "free space, and "
            )
            assert contents(report) == old
            filler.unlink()
        assert run_cli(*words).exit_code == 0
        assert contents(report).keys() == old.keys()
        assert all(contents(report)[name] != old[name] for name in old)


def test_a_read_only_report_folder_is_named(runs, tmp_path, run_cli):
    assert run_cli("evaluate", runs, "--out", tmp_path / "r", "--split", "dev").exit_code == 0
    old = contents(tmp_path / "r")
    with read_only(tmp_path / "r"):
        result = run_cli("evaluate", runs, "--out", tmp_path / "r")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stdout == ""  # told before the work
    assert result.stderr.startswith(f"error: {tmp_path / 'r'} cannot be written: no permission in {tmp_path / 'r'}, or")
    assert contents(tmp_path / "r") == old


def test_two_reports_into_one_folder_at_the_same_time(runs, tmp_path, run_cli):
    with lock_folder(tmp_path, RunError):
        result = run_cli("evaluate", runs, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"another process is writing into {tmp_path}" in result.stderr
    (tmp_path / ".report.tmp").mkdir()
    (tmp_path / ".report.tmp" / "report.html").write_text("half")  # of a dead process
    assert run_cli("evaluate", runs, "--out", tmp_path).exit_code == 0
    assert not (tmp_path / ".report.tmp").exists()


def test_a_folder_that_holds_something_else_is_refused_before_the_work(runs, tmp_path, run_cli):
    for place, other in ((runs, "relish-L1-seed0"), (tmp_path / "notes", "notes.txt")):
        if place != runs:
            place.mkdir()
            (place / other).write_text("mine")
        result = run_cli("evaluate", runs, "--out", place)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            f"error: {place} holds other files than a report's, such as {other}; choose a new or empty folder\n"
        )
        assert not (place / "report.html").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "depth.png").write_bytes(b"part of an earlier report")
    (tmp_path / "old" / ".hidden").write_text("")
    assert run_cli("evaluate", runs, "--out", tmp_path / "old").exit_code == 0


def test_relative_paths_after_a_change_of_folder(runs, run, predict_words, tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "runs").symlink_to(runs)
    (tmp_path / "run").symlink_to(run)
    monkeypatch.chdir(tmp_path)

    def wander(*_):
        os.chdir(tmp_path / "b")

    evaluate_runs("runs", out="report", device="cpu", progress=wander)
    assert (tmp_path / "report" / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    model = os.path.relpath(predict_words[3])
    monkeypatch.setattr(predict, "_CHUNK", 7)
    predict_scores("run", model=model, data="data/new.jsonl", out="s.csv", device="cpu", progress=wander)
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 41
    assert list((tmp_path / "b").iterdir()) == []


# memory


def test_predict_halves_its_batches_when_memory_runs_out(predict_words, room, tmp_path, run_cli):
    assert run_cli(*predict_words, tmp_path / "one-by-one.csv", "--batch-tokens", 1).exit_code == 0
    tried = room(1)
    result = run_cli(*predict_words, tmp_path / "scores.csv", "--batch-tokens", 4096)
    assert result.exit_code == 0, result.stderr
    assert tried == [40, 20, 10, 5, 2, *[1] * 40]
    assert (tmp_path / "scores.csv").read_bytes() == (tmp_path / "one-by-one.csv").read_bytes()


def test_predict_names_the_length_of_a_single_row_that_does_not_fit(predict_words, room, tmp_path, run_cli):
    tried = room(0)
    result = run_cli(*predict_words, tmp_path / "scores.csv", "--batch-tokens", 4096)
    assert (result.exit_code, result.stdout, tried) == (2, "", [40, 20, 10, 5, 2, 1])
    assert re.fullmatch(
        r"error: out of memory on a single row of \d+ tokens; use --max-length with --truncate, a smaller "
        "--compute-dtype, or a device with more memory\n",
        result.stderr,
    )
    assert not (tmp_path / "scores.csv").exists()


# two at once


def test_two_predictions_into_one_file_leave_the_whole_scores_of_one(predict_words, tmp_path, relish_process):
    out = tmp_path / "scores.csv"
    both = [relish_process.start(*predict_words, out, "--batch-tokens", 1, pause=0.01) for _ in range(2)]
    done = [relish_process.wait(pid) for pid in both]
    assert [(one.code, one.stderr) for one in done] == [(0, "")] * 2
    assert len(out.read_text().splitlines()) == 41
    assert contents(tmp_path).keys() == {"data", "scores.csv"}


def test_a_score_that_is_not_finite_is_named_by_its_row(predict_words, tmp_path, run_cli, monkeypatch):
    real, seen = predict.Backbone.hidden_states, []

    def spoiled(self, rows):
        states = real(self, rows).clone()
        seen.extend(rows)
        if len(seen) == 10:  # one row at a time, the longest of each chunk first
            states[:] = float("nan")
        return states

    monkeypatch.setattr(predict.Backbone, "hidden_states", spoiled)
    monkeypatch.setattr(predict, "_CHUNK", 7)
    result = run_cli(*predict_words, tmp_path / "scores.csv", "--batch-tokens", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    found = re.fullmatch(
        rf"error: the score of row (\d+) of new.jsonl is not finite with {predict_words[1].name}; take the row out\n",
        result.stderr,
    )
    assert found is not None
    # The tenth pass is the third of the second chunk.
    texts = [json.loads(line)["text"] for line in predict_words[5].read_text(encoding="utf-8").splitlines()]
    words = [len(text.split()) for text in texts]
    third = sorted(range(7, 14), key=lambda row: -words[row])[2]
    assert words[int(found[1])] == words[third]
    assert not (tmp_path / "scores.csv").exists()


def test_a_full_disk_leaves_the_old_scores_as_they_were(predict_words, tmp_path, run_cli):
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "scores.csv"
        out.write_text("old")
        filler = fill(disk, 0)
        result = run_cli(*predict_words, out)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert result.stderr.startswith(
            f"error: {out} cannot be written (No space left on device); no scores were written: free space, and "
        )
        assert contents(disk) == {"scores.csv": b"old"}
        filler.unlink()
        assert run_cli(*predict_words, out).exit_code == 0
        assert len(out.read_text().splitlines()) == 41


def test_scores_into_a_read_only_folder(predict_words, tmp_path, run_cli):
    with read_only(tmp_path / "r"):
        result = run_cli(*predict_words, tmp_path / "r" / "scores.csv")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    out = tmp_path / "r"
    assert result.stderr.startswith(f"error: {out / 'scores.csv'} cannot be written: no permission in {out}, or a")
    assert "loading" not in result.stderr
    (tmp_path / "file").touch()
    result = run_cli(*predict_words, tmp_path / "file" / "below" / "scores.csv")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"scores.csv cannot be written: {tmp_path / 'file'} is a file, and no folder; choose" in result.stderr


# signals

SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
SLOW = """
def slow(real):
    def call(*arguments, **options):
        result = real(*arguments, **options)
        print("at work", file=sys.stderr, flush=True)
        time.sleep(30)
        return result
    return call
"""


def check_interrupted(ended, said, code):
    assert ended == code, said
    assert said.splitlines()[-1].startswith("interrupted; ")
    assert "run the same command again" in said
    assert "Traceback" not in said


@SIGNALS
@pytest.mark.parametrize("step", ["results.predict_rows", "report.plot_scatter"])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_an_interrupted_evaluation_leaves_the_old_report(runs, tmp_path, number, code, step):
    module, name = step.split(".")
    (tmp_path / "report.html").write_text("old")
    slow = f"{SLOW}\nimport relish.evaluate.{module} as module\nmodule.{name} = slow(module.{name})"
    words = ["evaluate", runs, "--out", tmp_path]
    check_interrupted(*interrupted(words, number, slow=slow, until=lambda line: line == "at work\n"), code)
    assert contents(tmp_path) == {"report.html": b"old"}


@SIGNALS
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_an_interrupted_prediction_leaves_the_old_scores(predict_words, tmp_path, number, code):
    out = tmp_path / "out" / "scores.csv"
    out.parent.mkdir()
    out.write_text("old")
    slow = f"{SLOW}\nfrom relish.evaluate.predict import Backbone as b\nb.hidden_states = slow(b.hidden_states)"
    check_interrupted(
        *interrupted([*predict_words, out], number, slow=slow, until=lambda line: line == "at work\n"), code
    )
    assert contents(out.parent) == {"scores.csv": b"old"}
