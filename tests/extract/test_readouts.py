"""`relish extract --readouts`, from rows to files, and through kills and mistakes."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from relish.cache.errors import BackboneError, CacheError, DataError, SettingsError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.readouts import PART_ROWS, load_readouts, part_files
from relish.evaluate.results import evaluate_runs
from relish.extract import candidates, generator, readouts
from relish.extract.generator import NEW_TOKENS, Generator
from relish.extract.pipeline import extract_cache
from relish.extract.readouts import SAMPLES
from relish.extract.settings import ExtractSettings, parse_readouts, parse_shots

from ..heard import Heard
from ..waiting import wait_until

PROMPT = "{text}\nScore:"
KINDS = ("greedy", "samples", "candidates")


@pytest.fixture
def settings(tiny_model, tiny_rows):
    """`settings(readouts=…)`: an extraction of train (40 rows) and test (20 rows)."""
    data = {"train": tiny_rows(40, 0), "test": tiny_rows(20, 1)}

    def make(**changes):
        fixed = {"model": tiny_model("llama"), "data": data, "prompt": PROMPT, "label_range": (0, 5), "device": "cpu"}
        return ExtractSettings(**{**fixed, **changes})

    return make


@pytest.fixture
def small_parts(monkeypatch):
    """Six rows in a part."""
    monkeypatch.setattr("relish.cache.readouts.PART_ROWS", 6)


def read(folder, split="test"):
    found, wrong = load_readouts(folder, load_manifest(folder), split)
    assert wrong == []
    return {one.name: one for one in found}


def end_text(settings, readout):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings().model).decode([readout.settings["end_token"]])


def same_answers(one, other):
    assert one.keys() == other.keys()
    for name, readout in one.items():
        assert readout.ids == other[name].ids
        if readout.kind == "candidates":
            np.testing.assert_allclose(readout.answers, other[name].answers, atol=1e-4)
        else:
            assert readout.answers == other[name].answers


def test_every_split_but_train_is_asked_about(settings, tiny_rows, tmp_path):
    data = {**settings().data, "dev": tiny_rows(10, 2)}
    summary = extract_cache(tmp_path / "c", settings(data=data, readouts=KINDS, shots=(0, 1)))
    assert [(one.split, one.name, one.rows, one.computed) for one in summary.readouts] == [
        (split, f"{kind}-{shots}shot", rows, rows)
        for split, rows in (("test", 20), ("dev", 10))
        for shots in (0, 1)
        for kind in KINDS
    ]
    assert load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "train") == ([], [])
    found = read(tmp_path / "c")
    assert found["greedy-0shot"].ids == tuple(open_cache(tmp_path / "c").split("test").ids)
    assert SAMPLES == 16  # as the paper has it
    assert all(len(answers) == SAMPLES for answers in found["samples-0shot"].answers)
    assert found["candidates-0shot"].settings["candidates"] == [n / 10 for n in range(51)]
    assert all(len(log_p) == 51 and max(log_p) < 0 for log_p in found["candidates-1shot"].answers)
    # A blank line between examples begins with a new line of its own: what follows it cuts it in two.
    assert [end_text(settings, found[f"candidates-{shots}shot"]) for shots in (0, 1)] == ["\n", "\n"]
    assert found["greedy-1shot"].settings["examples"] is not None
    assert all(one.seconds > 0 for one in found.values())


def test_rows_with_the_same_text_have_draws_of_their_own(settings, tiny_rows, tmp_path):
    row = tiny_rows(2)[0]
    data = {**settings().data, "test": [{**row, "id": str(number)} for number in range(3)]}
    extract_cache(tmp_path / "c", settings(data=data, readouts=("samples",)))
    first, second, third = read(tmp_path / "c")["samples-0shot"].answers
    assert first != second != third != first


def test_answers_are_those_of_each_row_alone_in_any_batches(settings, tmp_path, small_parts):
    extract_cache(tmp_path / "a", settings(readouts=KINDS, shots=(0, 1)))
    extract_cache(tmp_path / "b", settings(readouts=KINDS, shots=(0, 1), batch_tokens=1))
    assert len(part_files(tmp_path / "a")) == 6 * 4
    same_answers(read(tmp_path / "a"), read(tmp_path / "b"))


def test_a_chat(settings, tmp_path):
    extract_cache(tmp_path / "c", settings(readouts=KINDS, shots=(0, 1), chat_template=True))
    found = read(tmp_path / "c")
    assert end_text(settings, found["candidates-1shot"]) == "</s>"
    assert len(found) == 6


def test_what_prompts_begin_with_is_read_once_for_all_readouts(settings, tiny_rows, tmp_path, monkeypatch):
    real, lengths = Generator.read_prefix, []

    def read_prefix(self, ids):
        lengths.append(len(ids))
        time.sleep(0.2)
        return real(self, ids)

    monkeypatch.setattr(Generator, "read_prefix", read_prefix)
    data = {**settings().data, "dev": tiny_rows(10, 2)}
    extract_cache(tmp_path / "a", settings(data=data, readouts=KINDS, shots=(0, 1)))
    assert len(lengths) == 4
    assert lengths[1] > lengths[0]
    for kind in KINDS:
        extract_cache(tmp_path / "b", settings(data=data, readouts=(kind,), shots=(0, 1)))
    for split in ("test", "dev"):
        # Each says what it would have taken alone.
        assert min(one.seconds for one in read(tmp_path / "a", split).values()) > 0.2
        same_answers(read(tmp_path / "a", split), read(tmp_path / "b", split))


def test_readouts_are_added_to_a_finished_cache_and_add_up(settings, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    extract_cache(folder, settings())
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    monkeypatch.setattr("relish.extract.backbone.Backbone.hidden_states", None)  # which nobody needs
    extract_cache(folder, settings(readouts=("greedy",)))
    extract_cache(folder, settings(readouts=("greedy", "candidates"), shots=(1,)))
    assert sorted(read(folder)) == ["candidates-1shot", "greedy-0shot", "greedy-1shot"]
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before
    monkeypatch.setattr(readouts, "Generator", None)
    summary = extract_cache(folder, settings(readouts=("candidates", "greedy"), shots=(1,)))
    assert [(one.name, one.computed) for one in summary.readouts] == [("candidates-1shot", 0), ("greedy-1shot", 0)]


def test_killed_and_resumed(settings, tmp_path, small_parts, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "c"
    extract_cache(whole, settings(readouts=KINDS))
    real, calls = readouts.save_part, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(readouts, "save_part", dies)
    with pytest.raises(KeyboardInterrupt):
        extract_cache(folder, settings(readouts=KINDS))
    kept = {path.name: path.read_bytes() for path in part_files(folder)}
    assert len(kept) == 6
    monkeypatch.setattr(readouts, "save_part", real)
    slow = Generator.read_prefix
    monkeypatch.setattr(Generator, "read_prefix", lambda *arguments: time.sleep(3) or slow(*arguments))
    summary = extract_cache(folder, settings(readouts=KINDS))
    assert summary.readouts[1].seconds < 3  # what prompts begin with was counted in the part that was there
    assert summary.readouts[2].seconds > 3
    assert [one.computed for one in summary.readouts] == [0, 8, 20]
    assert kept.items() <= {path.name: path.read_bytes() for path in part_files(folder)}.items()
    same_answers(read(folder), read(whole))


def test_a_killed_process_leaves_whole_parts_and_the_same_command_goes_on(
    tiny_model, tiny_rows, relish_process, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    many = [{**row, "id": str(number)} for number, row in enumerate(tiny_rows(30, 1) * 18)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    folder = tmp_path / "c"
    command = [
        *("extract", folder, "--model", tiny_model("llama"), "--data", f"test={rows}", "--label-range", "0,5"),
        *("--device", "cpu", "--readouts", "greedy", "--json"),
    ]
    pid = relish_process.start(*command)
    wait_until(lambda: len(part_files(folder)) >= 1)
    os.kill(pid, signal.SIGKILL)
    relish_process.wait(pid)
    kept = {path: path.stat().st_mtime_ns for path in part_files(folder)}
    done = relish_process.run(*command)
    assert done.code == 0, done.stderr
    (summary,) = json.loads(done.stdout)["readouts"]
    assert summary["computed"] <= len(many) - PART_ROWS
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert read(folder)["greedy-0shot"].rows == tuple(range(len(many)))


def test_as_many_examples_as_fit_are_used_and_said(settings, tmp_path):
    summary = extract_cache(tmp_path / "c", settings(readouts=("greedy",), shots=(0, 30)))
    used = summary.readouts[1].shots_used
    assert 0 < used < 30
    found = read(tmp_path / "c")
    assert (found["greedy-30shot"].shots, found["greedy-30shot"].shots_used) == (30, used)
    note = next(cell.note for cell in evaluate_runs(tmp_path / "c").cells if cell.head == "greedy-30shot")
    assert note.startswith(f"{used} examples, since the context or the training split has no more; ")


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt2"])
def test_other_architectures(settings, tmp_path, tiny_model, arch):
    extract_cache(tmp_path / "a", settings(model=tiny_model(arch), readouts=KINDS, shots=(0, 1)))
    extract_cache(tmp_path / "b", settings(model=tiny_model(arch), readouts=KINDS, shots=(0, 1), batch_tokens=1))
    same_answers(read(tmp_path / "a"), read(tmp_path / "b"))


def test_running_out_of_memory_halves_the_batches(settings, tmp_path, monkeypatch):
    import torch

    extract_cache(tmp_path / "a", settings(readouts=("greedy",)))
    real, tried = Generator.greedy, []

    def greedy(self, rows, prefix):
        tried.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows, prefix)

    monkeypatch.setattr(Generator, "greedy", greedy)
    extract_cache(tmp_path / "b", settings(readouts=("greedy",)))
    assert tried[0] > 2 >= tried[-1]
    same_answers(read(tmp_path / "a"), read(tmp_path / "b"))


@pytest.mark.parametrize(
    ("shots", "advice"), [(2, "use fewer --shots, a smaller --compute-dtype"), (0, "use a smaller --compute-dtype")]
)
def test_a_prompt_that_does_not_fit_the_memory_is_told_whole(settings, tmp_path, monkeypatch, shots, advice):
    import torch
    from transformers import AutoTokenizer

    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Generator, "greedy", greedy)
    asked = settings(readouts=("greedy",), shots=(shots,))
    with pytest.raises(BackboneError) as caught:
        extract_cache(tmp_path / "c", asked)
    found = re.match(rf"out of memory on a single row of (\d+) tokens; {advice}", str(caught.value))
    assert found is not None, caught.value
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    alone = max(len(tokenizer(PROMPT.format(text=row["text"]))["input_ids"]) for row in asked.data["test"])
    assert int(found[1]) == alone if shots == 0 else int(found[1]) > 2 * alone


def test_an_llm_that_takes_no_trees_answers_alike_within_the_budget(settings, tmp_path, monkeypatch):
    asked = {"readouts": KINDS, "shots": (2,), "batch_tokens": 200}
    extract_cache(tmp_path / "a", settings(**asked))
    for module in (generator, candidates):
        monkeypatch.setattr(module, "takes_trees", lambda _model: False)
    real, passes = Generator.candidates, []

    def counted(self, rows, prefix, grid):
        passes.append((len(rows), prefix.length + max(map(len, rows))))
        return real(self, rows, prefix, grid)

    monkeypatch.setattr(Generator, "candidates", counted)
    heard = Heard()
    extract_cache(tmp_path / "b", settings(**asked), progress=heard)
    assert all(count * length <= 200 or count == 1 for count, length in passes)
    assert any("every answer is computed from its first token on" in note for note in heard.notes)
    assert not any("read once for all rows" in note for note in heard.notes)
    same_answers(read(tmp_path / "a"), read(tmp_path / "b"))


# What is refused


def test_an_encoder_is_refused_before_the_work(settings, tiny_model, tmp_path):
    with pytest.raises(
        BackboneError, match=r"tiny-bert is an encoder \(bert\), which answers nothing; leave --readouts"
    ):
        extract_cache(tmp_path / "c", settings(model=tiny_model("bert"), readouts=("greedy",)))
    assert not (tmp_path / "c").exists()


def test_examples_need_a_training_split_and_readouts_another(settings, tmp_path):
    data = settings().data
    with pytest.raises(DataError, match="--shots 8 takes its examples from a split called train, which was not given"):
        extract_cache(tmp_path / "c", settings(data={"test": data["test"]}, readouts=("greedy",), shots=(0, 8)))
    with pytest.raises(DataError, match="readouts are of all splits but train, and no other was given"):
        extract_cache(tmp_path / "c", settings(data={"train": data["train"]}, readouts=("greedy",)))
    assert not (tmp_path / "c").exists()


def test_rows_that_were_cut_or_leave_no_room_are_refused(settings, tmp_path):
    with pytest.raises(DataError, match="20 rows of test are cut by --truncate, and what they ask with them"):
        extract_cache(tmp_path / "c", settings(readouts=("greedy",), max_length=12, truncate=True))
    assert not (tmp_path / "c").exists()  # refused before the work
    rows = {"test": [{"text": "x" * 112, "score": 1}]}
    with pytest.raises(DataError, match=f"row 0 of test has 1.. tokens, which with {NEW_TOKENS} for the answer do not"):
        extract_cache(tmp_path / "d", settings(data=rows, readouts=("greedy",)))
    assert not (tmp_path / "d").exists()


def test_readouts_of_other_examples_are_refused(settings, tiny_rows, tmp_path, monkeypatch):
    extract_cache(tmp_path / "c", settings(readouts=("greedy",), shots=(1,)))
    monkeypatch.setattr("relish.extract.shots.SEED", 1)
    with pytest.raises(
        CacheError, match=r"greedy-1shot-00000.json was made with something else: examples is '\w+' there"
    ):
        extract_cache(tmp_path / "c", settings(readouts=("greedy",), shots=(1,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readouts": ("greedy", "beam")}, "a readout must be one of greedy, samples, candidates, regression, not 'b"),
        ({"readouts": ("greedy",), "shots": (-1,)}, "shots must be numbers from 0 on"),
        ({"readouts": ("greedy",), "shots": ()}, "shots must be numbers from 0 on"),
        ({"shots": (8,)}, "shots are the examples of readouts; say which with --readouts"),
        (
            {"shots": (8,), "adapter": "a", "readouts": ("regression",)},
            "shots are the examples of readouts; say which with --readouts greedy,samples,candidates",
        ),
        (
            {"readouts": ("greedy", "regression")},
            "the readout regression is what the head of a tuned adapter predicts; give its folder with --adapter",
        ),
    ],
)
def test_settings_are_checked(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        settings(**changes)


def test_lists_on_the_command_line():
    assert parse_readouts("greedy, samples,greedy") == ("greedy", "samples")
    assert parse_shots("0,128") == (0, 128)
    with pytest.raises(SettingsError, match="--shots takes numbers such as 0,128; not 'many'"):
        parse_shots("many")


# The command line


def test_the_command_line(tiny_model, tiny_rows, tmp_path, run_cli):
    files = []
    for name, rows in {"train": tiny_rows(40, 0), "test": tiny_rows(20, 1)}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files += ["--data", f"{name}={path}"]
    command = [
        "extract",
        tmp_path / "c",
        "--model",
        tiny_model("llama"),
        *files,
        "--label-range",
        "0,5",
        "--device",
        "cpu",
    ]
    result = run_cli(*command, "--readouts", "greedy,candidates", "--shots", "0,30")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "test: greedy-0shot, 20 rows, 20 asked now" in lines
    assert any(line.startswith("test: candidates-30shot, 20 rows, 20 asked now, ") for line in lines)
    again = run_cli(*command, "--readouts", "greedy", "--json")
    (one,) = json.loads(again.stdout)["readouts"]
    assert (one["name"], one["computed"], one["rows"]) == ("greedy-0shot", 0, 20)
    assert "all hidden states were there already" in run_cli(*command, "--readouts", "greedy").stdout
    wrong = run_cli(*command, "--readouts", "beam")
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        "error: a readout must be one of greedy, samples, candidates, regression, not 'beam'\n",
    )
    shown = run_cli("cache", "info", tmp_path / "c").stdout
    assert "candidates-30shot" in shown
    assert Path(tmp_path / "c" / "readouts").is_dir()
