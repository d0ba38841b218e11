import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

from relish.cache.reader import open_cache
from relish.extract.backbone import Backbone


@pytest.fixture
def table(tmp_path, tiny_rows):
    """`table("train.csv", rows)` writes a CSV file and gives its path."""

    def write(name="train.csv", rows=None):
        rows = rows if rows is not None else tiny_rows(12)
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture
def extract(run_cli, tmp_path, tiny_model):
    def run(*arguments, model=None, cache="c"):
        return run_cli("extract", tmp_path / cache, "--model", model or tiny_model("llama"), *arguments)

    return run


def refused(result, sentence):
    """Exit code 2, and on stderr this one sentence and nothing else."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {sentence}\n"


# When all is well


def test_a_table_becomes_a_cache(extract, table, tmp_path):
    result = extract("--data", f"train={table()}", "--target-column", "score", "--json")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    cache = open_cache(tmp_path / "c")
    assert figures.pop("seconds") > 0
    assert figures == {
        "cache": str(tmp_path / "c"),
        "rows": 12,
        "tokens": int(cache.split("train").lengths.sum()),
        "bytes": sum(path.stat().st_size for path in (tmp_path / "c").glob("*.h5")),
        "padding_overhead": pytest.approx(1.0, abs=0.05),
        "computed_tokens": int(cache.split("train").lengths.sum()),
        "skipped": [],
        "readouts": [],
    }
    assert "label range 0 to 5, taken from the training split (--label-range sets it)\n" in result.stderr


def test_the_answer_says_what_to_do_next(extract, table, tmp_path):
    result = extract("--data", f"train={table()}", "--label-range", "0,5")
    assert result.exit_code == 0
    first, last = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'c'}: 12 rows, ")
    assert first.endswith(" tokens/s")
    assert last == f"next: relish train {tmp_path / 'c'} --out runs"


def test_no_training_is_suggested_where_there_is_nothing_to_learn_from(extract, table):
    unlabelled = table("unlabelled.csv", rows=[{"id": "a", "text": "a film so good", "score": ""}])
    for data in (f"test={table()}", f"train={unlabelled}"):
        result = extract("--data", data, "--label-range", "0,5", cache=data.partition("=")[0])
        assert result.exit_code == 0
        assert "next:" not in result.stdout


def test_a_training_split_that_is_elsewhere_does_not_spoil_another(extract, table, tmp_path):
    assert extract("--data", f"train={table()}", "--label-range", "0,5").exit_code == 0
    for shard in (tmp_path / "c").glob("train-*.h5"):
        shard.unlink()
    result = extract("--data", f"test={table('test.csv')}", "--label-range", "0,5")
    assert (result.exit_code, "next:" in result.stdout) == (0, False)


def test_a_second_run_says_that_all_was_there(extract, table):
    data = f"train={table()}"
    extract("--data", data)
    result = extract("--data", data)
    assert result.exit_code == 0
    assert "everything was there already" in result.stdout.splitlines()


def test_several_splits_formats_and_layers(extract, table, tmp_path, tiny_rows):
    lines = "".join(json.dumps(row) + "\n" for row in tiny_rows(5, 1))
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    result = extract(
        *("--data", f"train={table()}", "--data", f"test={tmp_path / 'test.jsonl'}"),
        *("--prompt", "Film: {text}", "--layers", "0.5,last", "--dtype", "float32", "--shard-rows", "3"),
    )
    assert result.exit_code == 0
    cache = open_cache(tmp_path / "c")
    assert (cache.splits, cache.layers, cache.identity.dtype) == (("train", "test"), (2, 3), "float32")
    assert all(shard.rows <= 3 for shard in cache.manifest.splits["train"].shards)


def test_an_interruption_says_how_to_go_on(extract, table, monkeypatch):
    def interrupt(_self, _rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(Backbone, "hidden_states", interrupt)
    result = extract("--data", f"train={table()}", "--label-range", "0,5")
    assert result.exit_code == 130
    assert "interrupted; what is finished is kept: run the same command again to go on" in result.stderr


# Wrong input


def test_a_missing_column(extract, table):
    refused(
        extract("--data", f"train={table()}", "--prompt", "{essay}"),
        "the prompt names the column 'essay', but train.csv has: id, text, score",
    )
    refused(
        extract("--data", f"train={table()}", "--target-column", "points"),
        "--target-column names the column 'points', but train.csv has: id, text, score",
    )


def test_an_empty_text(extract, table):
    path = table(rows=[{"text": "a film", "score": "1"}, {"text": "  ", "score": "2"}])
    refused(extract("--data", f"train={path}"), "row 1 of train.csv has an empty text in column 'text'")


def test_a_target_that_is_no_number(extract, table):
    path = table(rows=[{"text": "a film", "score": "1"}, {"text": "a play", "score": "good"}])
    refused(
        extract("--data", f"train={path}"),
        "row 1 of train.csv has the target 'good' in column 'score', which is not a number; "
        "leave the cell blank if the row has no label",
    )


def test_a_label_outside_the_range(extract, table):
    path = table(rows=[{"text": "a film", "score": "1"}, {"text": "a play", "score": "7"}])
    refused(
        extract("--data", f"train={path}", "--label-range", "0,5"),
        "row 1 of train.csv has the target 7 in column 'score', outside the label range [0, 5]; "
        "if the target is right, give its range with --label-range, in a new folder if the cache has another one",
    )


def test_an_unknown_task(extract, table):
    refused(
        extract("--task", "sts", "--data", f"train={table()}"),
        "there is no task 'sts'; the tasks are stsb, sick, wmt-en-zh, wmt-ru-en, wmt-si-en",
    )


def test_no_such_model(extract, table, tmp_path):
    path = tmp_path / "absent"
    refused(
        extract("--data", f"train={table()}", model=path),
        f"no such model: {str(path)!r} is no folder or GGUF file on this machine, and no hub id",
    )


def test_no_such_data(extract, tmp_path):
    refused(extract("--data", f"train={tmp_path / 'a.csv'}"), f"{tmp_path / 'a.csv'} does not exist")


def test_no_rows_at_all(extract):
    refused(extract(), "no rows to read: give --data SPLIT=FILE, --hub ID, or a --task preset")


def test_a_gguf_without_the_package_that_reads_it(extract, table, tmp_path, monkeypatch):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(
        extract("--data", f"train={table()}", model=tmp_path / "small.gguf"),
        "Reading a GGUF file needs the package 'gguf', which is not installed; run: pip install 'relish-llm[extract]'",
    )


def test_without_transformers(extract, table, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(
        extract("--data", f"train={table()}", "--label-range", "0,5"),
        "Running a backbone needs the package 'transformers', which is not installed; "
        "run: pip install 'relish-llm[extract]'",
    )


def test_a_cache_made_with_another_prompt(extract, table, tiny_cache, tmp_path):
    shutil.copytree(tiny_cache, tmp_path / "c")
    refused(
        extract("--data", f"more={table()}", "--prompt", "Film: {text}"),
        f"the cache {tmp_path / 'c'} was made with something else: prompt is '{{text}}' there and 'Film: {{text}}' "
        "here. Extract into another folder, or use the same settings to go on.",
    )


def test_a_folder_that_holds_something_else(extract, table, tmp_path):
    refused(
        extract("--data", f"train={table()}", "--label-range", "0,5", cache="."),
        f"{tmp_path} holds other files and is not a relish cache; choose a new or empty folder",
    )


def test_too_long_rows(extract, table):
    result = extract("--data", f"train={table()}", "--label-range", "0,5", "--max-length", "8")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert " of 12 rows of train are longer than 8 tokens (the longest has 14); --truncate cuts them" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--layers", "first"), "--layers takes 'last', indices or fractions such as 12,0.5; not 'first'"),
        (("--layers", "9"), "layer 9 was asked for, and the backbone has 3 (0 is the embeddings)"),
        (("--label-range", "0,inf"), "the label range must go from a smaller to a larger number, not from 0.0 to inf"),
        (("--dtype", "int8"), "dtype must be one of bfloat16, float16, float32, not 'int8'"),
        (("--shard-rows", "0"), "shard_rows must be at least 1, not 0"),
        (("--data", "b.csv"), "--data takes SPLIT=FILE such as train=train.csv; not 'b.csv'"),
        (("--hub", "org/data"), "rows come either from files (data) or from the hub, not from both"),
        (
            ("--prompt", "no field"),
            "the prompt 'no field' has no field; put the text's column in braces, such as {text}",
        ),
    ],
)
def test_an_option_that_cannot_be(extract, table, arguments, sentence):
    given = () if "--label-range" in arguments else ("--label-range", "0,5")
    refused(extract("--data", f"train={table()}", *given, *arguments), sentence)


@pytest.mark.parametrize("name", ["../up", "a b"])
def test_a_split_name_that_is_no_file_name(extract, table, name):
    refused(
        extract("--data", f"{name}={table()}", "--label-range", "0,5"),
        f"a split's name may hold letters, digits, '.', '-' and '_'; got {name!r}",
    )


# The real process


def process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "relish", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_real_command_extracts_and_refuses(table, tiny_model, tmp_path):
    base = ("extract", tmp_path / "c", "--model", tiny_model("llama"), "--data", f"train={table()}")
    done = process(*base, "--label-range", "0,5", "--json")
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, 12), done.stderr
    refusal = process(*base, "--label-range", "9,5")
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr == ("error: the label range must go from a smaller to a larger number, not from 9.0 to 5.0\n")
