"""`relish tune` on the command line."""

import csv
import json
import re

import pytest

from relish.extract.adapter import read_tuned
from relish.extract.tune_settings import TuneSettings


@pytest.fixture
def files(tmp_path, tiny_rows):
    for name, rows in (("train", tiny_rows(24)), ("dev", tiny_rows(8, 1))):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return [word for name in ("train", "dev") for word in ("--data", f"{name}={tmp_path / name}.csv")]


def test_the_command_from_tables_to_a_cache(run_cli, files, tiny_model, tmp_path):
    more = ("--label-range", "0,5", "--device", "cpu", "--epochs", "1", "--prompt", "Rate: {text}\nScore:")
    words = ("tune", tmp_path / "a", "--model", tiny_model("llama"), "--method", "lora", *files, *more)
    result = run_cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures.pop("seconds") > 0
    assert figures.pop("val").keys() == {"nrmse", "pearson"}
    tuned = read_tuned(tmp_path / "a")
    assert figures == {
        "adapter": str(tmp_path / "a"),
        "method": "lora",
        "epochs": 1,
        "best_epoch": 1,
        "train_rows": 24,
        "val_rows": 8,
        "trainable_parameters": tuned["trainable_parameters"],
        "backbone_parameters": tuned["backbone_parameters"],
        "sha256": tuned["sha256_of_adapter"],
        "already": False,
    }
    assert "epoch 1 of 1: loss " in result.stderr
    again = run_cli(*words)
    assert again.exit_code == 0
    first, middle, last = again.stdout.splitlines()
    assert re.match(
        rf"{tmp_path / 'a'}: lora, [\d,]+ trainable parameters \([\d.]+ % of the backbone's\), best epoch", first
    )
    assert middle == "it was finished already"
    assert last == f"next: relish extract CACHE --model {tiny_model('llama')} … --adapter {tmp_path / 'a'}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "stsb", "--method", "dora"], "method must be one of lora, raft, not 'dora'"),
        (
            ["--task", "stsb", "--method", "raft", "--loss", "mse"],
            "the method raft has a loss of its own; leave --loss out",
        ),
        (["--task", "stsb", "--method", "lora", "--loss", "l1"], "loss must be one of huber, mse, not 'l1'"),
        (
            ["--task", "stsb", "--method", "raft", "--truncate"],
            "raft asks at the end of the prompt, where truncate cuts; leave --truncate out",
        ),
        (["--task", "stsb", "--method", "lora", "--rank", "0"], "rank must be at least 1, not 0"),
        (["--task", "stsb", "--method", "lora", "--lr", "-1"], "lr must be a number above 0, not -1.0"),
        (["--task", "stsb", "--method", "lora", "--dropout", "1"], "dropout must be at least 0 and below 1, not 1.0"),
        (["--task", "stsb", "--method", "lora", "--seed", "-1"], "a seed is at least 0 and below 2**63, not -1"),
        (
            ["--task", "stsb", "--method", "lora", "--seed", str(2**63)],
            "a seed is at least 0 and below 2**63, not 9223372036854775808",
        ),
        (["--method", "lora"], "no rows to read: give --data SPLIT=FILE, --hub ID, or a --task preset"),
    ],
)
def test_wrong_input_is_one_sentence(run_cli, tmp_path, words, sentence):
    result = run_cli("tune", tmp_path / "a", "--model", "m", *words)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {sentence}\n")


def test_the_commands_defaults_are_the_settings(run_cli, files, tiny_model, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("relish.extract.tune.tune_adapter", lambda _, settings, **__: given.append(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("tune", tmp_path / "a", "--model", "m", "--method", "raft", "--task", "stsb")
    assert given == [TuneSettings(model="m", method="raft", task="stsb")]
