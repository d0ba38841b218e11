"""NaN, infinity and values beyond the storage type in one token of one row, from the backbone to the cache."""

import json
import shutil

import pytest

from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.speed import SPEED
from relish.cache.verify import verify_cache
from relish.extract.backbone import Backbone

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "large": 70000.0}


@pytest.fixture
def extract(run_cli, tiny_model, tiny_rows, tmp_path):
    table = tmp_path / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12)), encoding="utf-8")

    def run(folder, *more):
        fixed = ("--label-range", "0,5", "--device", "cpu", "--shard-rows", "4")
        return run_cli("extract", folder, "--model", tiny_model("llama"), "--data", f"train={table}", *fixed, *more)

    return run


@pytest.fixture
def spoil(monkeypatch, tiny_rows):
    """`spoil(value, 5)`: the backbone gives that value in one token of the rows of that number, whatever the batch."""
    real, tokenize, known = Backbone.hidden_states, Backbone.tokenize, {}

    def remember(self, texts, **options):
        rows, cut = tokenize(self, texts, **options)
        known.update({row.tobytes(): number for number, row in enumerate(rows)})
        return rows, cut

    def begin(value, *numbers):
        def spoiled(self, rows):
            states = real(self, rows).clone()
            for position, row in enumerate(rows):
                if known[row.tobytes()] in numbers:
                    states[position, -1, len(row) // 2, 3] = value
            return states

        monkeypatch.setattr(Backbone, "hidden_states", spoiled)

    monkeypatch.setattr(Backbone, "tokenize", remember)
    return begin


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", BAD)
def test_the_row_is_named_before_its_shard_is_kept(extract, spoil, tiny_rows, tmp_path, bad, dtype):
    spoil(BAD[bad], 5)
    result = extract(tmp_path / "c", "--dtype", dtype)
    if bad == "large" and dtype != "float16":
        assert result.exit_code == 0
        hidden = open_cache(tmp_path / "c").split("train").read([5]).hidden
        assert hidden.abs().max() > 65504
        return
    assert (result.exit_code, result.stdout) == (2, "")
    what = (
        "a hidden state of 70,000, and float16 ends at 65,504; nothing of its shard was kept. Try --dtype bfloat16"
        if bad == "large"
        else "NaN or infinity in its hidden states; nothing of its shard was kept. Try another copy of the weights"
    )
    name = f"row 5 of train (id {tiny_rows(12)[5]['id']!r})"
    assert f"error: {name} has {what}, or --on-nonfinite skip to leave such rows out\n" in result.stderr
    manifest = tmp_path / "c" / "manifest.json"
    listed = load_manifest(tmp_path / "c").splits["train"].shards if manifest.exists() else ()
    assert sorted(path.name for path in (tmp_path / "c").glob("*.h5")) == [record.file for record in listed]
    assert not list((tmp_path / "c").glob(".*.tmp"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_such_rows_can_be_skipped_and_are_named(extract, spoil, tiny_rows, tmp_path, dtype):
    rows = tiny_rows(12)
    spoil(float("nan"), 5, 8)
    result = extract(tmp_path / "c", "--dtype", dtype, "--on-nonfinite", "skip")
    assert result.exit_code == 0, result.stderr
    assert "skipped 2 rows: " in result.stdout
    for number in (5, 8):
        assert f"row {number} of train (id {rows[number]['id']!r})" in result.stdout
    cache = open_cache(tmp_path / "c")
    assert verify_cache(cache) == []
    assert cache.split("train").row.tolist() == [n for n in range(12) if n not in (5, 8)]
    assert cache.split("train").read(range(10)).hidden.isfinite().all()
    figures = json.loads(extract(tmp_path / "c", "--dtype", dtype, "--json").stdout)
    assert (figures["rows"], figures["computed_tokens"]) == (10, 0)
    assert {(one["split"], one["row"], one["id"], one["why"]) for one in figures["skipped"]} == {
        ("train", n, rows[n]["id"], "NaN or infinity in its hidden states") for n in (5, 8)
    }


def test_values_beyond_float16_can_be_skipped(extract, spoil, tmp_path):
    spoil(70000.0, 5)
    assert extract(tmp_path / "c", "--dtype", "float16", "--on-nonfinite", "skip").exit_code == 0
    skipped = load_manifest(tmp_path / "c").splits["train"].skipped
    assert [(one.row, one.why) for one in skipped] == [(5, "a hidden state of 70,000, and float16 ends at 65,504")]


def test_a_run_that_stopped_at_a_row_goes_on_and_skips_it(extract, spoil, tmp_path):
    spoil(float("inf"), 5, 8)
    extract(tmp_path / "whole", "--on-nonfinite", "skip")
    assert extract(tmp_path / "c").exit_code == 2
    half = shutil.copytree(tmp_path / "c", tmp_path / "half")
    for folder in (tmp_path / "c", half):
        assert extract(folder, "--on-nonfinite", "skip").exit_code == 0
        for path in (path for path in (tmp_path / "whole").iterdir() if path.name != SPEED):
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_another_word_is_refused(extract, tmp_path):
    result = extract(tmp_path / "c", "--on-nonfinite", "ignore")
    assert (result.exit_code, result.stderr) == (2, "error: on_nonfinite must be one of error, skip, not 'ignore'\n")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_split_of_which_every_row_is_skipped_is_said_plainly(extract, spoil, run_cli, tmp_path, form):
    spoil(float("nan"), *range(12))
    for computed in (True, False):  # and when it is run again
        result = extract(tmp_path / "c", "--on-nonfinite", "skip", *form)
        assert result.exit_code == 2
        assert result.stderr.endswith(
            "error: every row of train was skipped, so there is nothing to train on or to score; try --compute-dtype "
            "float32, or a wider --dtype, in another folder\n"
        )
        if form:
            assert len(json.loads(result.stdout)["skipped"]) == 12
        else:
            assert "skipped 12 rows: row " in result.stdout
            assert ("everything was there already" in result.stdout) is not computed
            assert "next:" not in result.stdout
    assert run_cli("cache", "verify", tmp_path / "c").exit_code == 0
