"""Unusual texts and ids, from file to cache to predictions: what goes in comes out under the same id and row."""

import csv
import json
import sys

import numpy as np
import pytest

from relish.cache.reader import open_cache
from relish.evaluate.results import evaluate_runs
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.train.grid import train_heads
from relish.train.settings import TrainSettings

from .conftest import SMALL

ODD = {
    "plain": "a film so warm",
    "nul": "a film\0so dull",
    "right to left": "סרט כל כך יפה \u202eabc\u202c فيلم",
    "emoji": "👩‍👩‍👧‍👦 🎬 so 😀",
    "only special tokens": "<s></s><pad>",
    "a pad token": "<pad>",
    "line breaks": 'one\r\ntwo\rthree\nfour\u2028five, "six"',
    "combining": "e\u0301 ﬁ Å",
    "one character": "x",
    "white space kept": "  warm\t ",
    "repeated": "a film so warm",
}
IDS = [f"id {name}" if name != "repeated" else "id plain" for name in ODD]  # the last repeats the first
IDS[2] = "שלום\u202e"
IDS[3] = "👩‍👧"
IDS[6] = 'a\rb,"c"\nd'


def rows():
    return [
        {"id": row_id, "text": text, "score": number % 6}
        for number, (row_id, text) in enumerate(zip(IDS, ODD.values(), strict=True))
    ]


def write(path, given, ascii=False):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in given), encoding="utf-8", newline="\n"
    )
    return path


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_model):
    """A cache whose three splits hold the same odd rows, and a head trained on it."""
    home = tmp_path_factory.mktemp("odd")
    path = write(home / "odd.jsonl", rows())
    data = dict.fromkeys(("train", "dev", "test"), path)
    settings = {"prompt": "{text}", "label_range": (0.0, 5.0), "device": "cpu", "shard_rows": 4}
    extract_cache(home / "cache", ExtractSettings(model=tiny_model("llama"), data=data, **settings))
    train_heads(home / "cache", home / "runs", TrainSettings(depths=(1,), **SMALL))
    return home


def test_ids_rows_and_targets_come_out_as_they_went_in(odd, tmp_path):
    evaluate_runs(odd / "runs", out=tmp_path)
    found = read(tmp_path / "predictions.csv")
    assert [row["id"] for row in found] == IDS
    assert [int(row["row"]) for row in found] == list(range(len(ODD)))
    assert [float(row["target"]) for row in found] == [row["score"] for row in rows()]
    same = [found[0]["prediction"], found[-1]["prediction"]]  # equal texts, equal ids, two rows
    np.testing.assert_allclose(float(same[0]), float(same[1]), atol=5e-3)


def test_each_text_went_through_the_tokenizer_alone_and_whole(odd, tiny_model):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    split = open_cache(odd / "cache").split("test")
    for number, text in enumerate(ODD.values()):
        assert split.input_ids(number).tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_predict_gives_each_row_back_with_its_own_score(odd, tmp_path, tiny_model, run_cli, suffix):
    if suffix == "csv" and sys.version_info < (3, 11):
        pytest.skip("csv in Python 3.10 refuses NUL")
    path = tmp_path / f"new.{suffix}"
    given = [{"id": row["id"], "text": row["text"], "note": row["text"]} for row in rows()]
    if suffix == "jsonl":
        write(path, given, ascii=True)
    elif suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(given[0]))
            writer.writeheader()
            writer.writerows(given)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(given), path)
    out = tmp_path / "scores.csv"
    run = odd / "runs/relish-L1-seed0"
    result = run_cli("predict", run, "--model", tiny_model("llama"), "--data", path, "--out", out, "--batch-tokens", 40)
    assert result.exit_code == 0, result.stderr
    found = read(out)
    assert [{name: row[name] for name in ("id", "text", "note")} for row in found] == given
    expected = evaluate_runs(run).predictions[0]
    np.testing.assert_allclose([float(row["score"]) for row in found], expected, rtol=0, atol=5e-3)


LONG = "warm clever " * 8334  # 100,008 characters


def test_a_text_of_100_000_characters_is_refused_or_cut_as_asked(tmp_path, tiny_model, tiny_rows, run_cli):
    given = [{**row, "text": LONG if number == 3 else row["text"]} for number, row in enumerate(tiny_rows(12, 0))]
    path = write(tmp_path / "long.jsonl", given)
    words = ["extract", tmp_path / "c", "--model", tiny_model("llama"), "--prompt", "{text}", "--label-range", "0,5"]
    words += ["--data", f"train={path}", "--data", f"test={path}", "--device", "cpu"]
    refused = run_cli(*words)
    assert (refused.exit_code, "1 of 12 rows of train are longer than 128 tokens" in refused.stderr) == (2, True)
    assert run_cli(*words, "--truncate").exit_code == 0
    split = open_cache(tmp_path / "c").split("test")
    assert (len(split.input_ids(3)), split.ids) == (128, [row["id"] for row in given])
    train_heads(tmp_path / "c", tmp_path / "r", TrainSettings(depths=(1,), **SMALL))
    out = tmp_path / "scores.csv"
    new = write(tmp_path / "new.jsonl", [{"id": row["id"], "text": row["text"]} for row in given])
    result = run_cli(
        "predict", tmp_path / "r/relish-L1-seed0", "--model", tiny_model("llama"), "--data", new, "--out", out
    )
    assert result.exit_code == 0, result.stderr
    assert [row["text"] for row in read(out)] == [row["text"] for row in given]


BAD = [
    ({"text": ""}, "row 1 of bad.jsonl has an empty text in column 'text'"),
    ({"text": " \t\u3000\n"}, "row 1 of bad.jsonl has an empty text in column 'text'"),
    ({"text": None}, "row 1 of bad.jsonl has no text in column 'text'"),
    ({"text": 7}, "row 1 of bad.jsonl has 7 in column 'text', which is not text"),
    ({"text": "so \ud83d warm"}, r"row 1 of bad.jsonl holds '\ud83d' in column 'text', half of a surrogate pair"),
]


@pytest.mark.parametrize(("cells", "message"), BAD)
def test_texts_that_cannot_be_used_are_named_by_extract_and_by_predict(
    odd, tmp_path, tiny_model, run_cli, cells, message
):
    good = {"id": "1", "text": "fine", "score": 1}
    path = write(tmp_path / "bad.jsonl", [good, {**good, **cells}], ascii=True)
    words = ["extract", tmp_path / "c", "--model", tiny_model("llama"), "--prompt", "{text}", "--data", f"train={path}"]
    first = run_cli(*words, "--label-range", "0,5", "--device", "cpu")
    run, out = odd / "runs/relish-L1-seed0", tmp_path / "scores.csv"
    second = run_cli("predict", run, "--model", tiny_model("llama"), "--data", path, "--out", out)
    for result in (first, second):
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.jsonl"]


@pytest.mark.parametrize("row", ['{"text": "fine", "note": "\\udc00"}', '{"text": "fine", "no\\ud800te": "x"}'])
def test_half_a_surrogate_pair_beside_the_text_is_named_before_any_work(odd, tmp_path, tiny_model, run_cli, row):
    path = tmp_path / "bad.jsonl"
    path.write_text(row + "\n", encoding="utf-8")
    out = tmp_path / "scores.csv"
    words = ["predict", odd / "runs/relish-L1-seed0", "--model", tiny_model("llama"), "--data", path, "--out", out]
    result = run_cli(*words)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "row 0 of bad.jsonl holds" in result.stderr
    assert not out.exists()
