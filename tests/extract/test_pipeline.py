import json
import shutil

import numpy as np
import pytest
import torch

import relish
from relish.cache.errors import CacheError, DataError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.speed import SPEED, read_speeds, seconds_per_1000_rows
from relish.cache.verify import verify_cache
from relish.extract import pipeline
from relish.extract.backbone import Backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings

from ..heard import Heard

COUNT = 12


@pytest.fixture
def extract(tiny_model, tiny_rows):
    def run(folder, *, progress=None, **changes):
        options = {
            "model": tiny_model("llama"),
            "data": {"train": tiny_rows(COUNT)},
            "label_range": (0.0, 5.0),
            "device": "cpu",
            "shard_rows": 4,
        }
        return extract_cache(folder, ExtractSettings(**{**options, **changes}), progress=progress)

    return run


@pytest.fixture
def no_model(monkeypatch):
    """The weights must not be loaded."""
    monkeypatch.setattr(Backbone, "load", lambda _self: pytest.fail("the model was loaded"))


def message(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SPEED}


# A cache from end to end


def test_rows_become_a_cache(extract, tmp_path, tiny_rows):
    heard = Heard()
    summary = extract(tmp_path / "c", progress=heard)
    rows = tiny_rows(COUNT)
    cache = open_cache(tmp_path / "c")
    split = cache.split("train")
    assert split.ids == [row["id"] for row in rows]
    assert split.target.tolist() == [row["score"] for row in rows]
    assert split.read(range(COUNT)).hidden.abs().sum() > 0
    assert verify_cache(cache) == []
    assert (summary.folder, summary.rows, summary.tokens) == (tmp_path / "c", COUNT, int(split.lengths.sum()))
    assert summary.computed_tokens == summary.tokens == heard.tokens
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "c").glob("*.h5"))
    assert 1 <= summary.padding_overhead < 1.05
    assert heard.begun == [(COUNT, summary.tokens)]
    assert heard.rows == COUNT
    assert heard.notes == ["loading tiny-llama (float32, cpu)"]


def test_the_identity_says_what_made_it(extract, tmp_path, tiny_model):
    import transformers
    from transformers import AutoModel

    extract(tmp_path / "c", layers=(1, 1.0), max_length=100, dtype="float16", prompt="Film: {text}")
    identity = open_cache(tmp_path / "c").identity
    assert (identity.model, identity.revision, identity.prompt) == ("tiny-llama", None, "Film: {text}")
    assert (identity.layers, identity.hidden_size, identity.max_length) == ((1, 3), 32, 100)
    assert (identity.dtype, identity.compute_dtype, identity.truncate) == ("float16", "float32", False)
    assert identity.transformers == transformers.__version__
    made_by = load_manifest(tmp_path / "c").made_by
    parameters = AutoModel.from_pretrained(tiny_model("llama")).num_parameters()  # of all layers, whatever is kept
    assert made_by == {
        "relish": relish.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "parameters": f"{parameters:,}",
    }
    assert str(tiny_model("llama").parent) not in (tmp_path / "c" / "manifest.json").read_text()


def test_without_a_prompt_the_text_column_alone_is_read(extract, tmp_path):
    extract(tmp_path / "c")
    assert open_cache(tmp_path / "c").identity.prompt == "{text}"


def test_a_task_brings_prompt_columns_and_range(extract, tmp_path):
    rows = [{"sentence1": "a film", "sentence2": f"a play {n}", "score": str(n)} for n in range(3)]
    extract(tmp_path / "c", task="stsb", data={"test": rows}, label_range=None)
    cache = open_cache(tmp_path / "c")
    assert cache.label_range == (0.0, 5.0)
    assert cache.manifest.task == "stsb"
    assert cache.identity.prompt.startswith("How similar in meaning")
    assert cache.split("test").target.tolist() == [0, 1, 2]


def test_rows_without_a_label_are_kept(extract, tmp_path):
    extract(tmp_path / "c", data={"test": [{"text": "a film", "score": ""}, {"text": "a play", "score": 3}]})
    assert np.array_equal(open_cache(tmp_path / "c").split("test").target, [np.nan, 3], equal_nan=True)


def test_two_runs_give_the_same_bytes(extract, tmp_path):
    extract(tmp_path / "a")
    extract(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_small_batches_give_the_same_numbers(extract, tmp_path):
    extract(tmp_path / "a", dtype="float32")
    extract(tmp_path / "b", dtype="float32", batch_tokens=1)
    found = [open_cache(tmp_path / name).split("train").read(range(COUNT)).hidden for name in "ab"]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# Lengths


def test_too_long_rows_stop_before_the_model_is_loaded(extract, tmp_path, no_model):
    rows = [{"text": "a film", "score": 1}, {"text": "dull " * 70, "score": 2}, {"text": "dull " * 90, "score": 3}]
    found = message(lambda: extract(tmp_path / "c", data={"train": rows}, max_length=32), DataError)
    assert found.startswith("2 of 3 rows of train are longer than 32 tokens (the longest has ")
    assert found.endswith("); --truncate cuts them, a larger --max-length keeps them whole")
    assert not (tmp_path / "c").exists()


def test_rows_beyond_the_context_stop_as_well(extract, tmp_path, no_model):
    rows = [{"text": "dull " * 200, "score": 2}]
    found = message(lambda: extract(tmp_path / "c", data={"train": rows}), DataError)
    assert found.startswith("1 of 1 rows of train are longer than 128 tokens")


def test_a_max_length_beyond_the_context_is_refused(extract, tmp_path, no_model):
    assert message(lambda: extract(tmp_path / "c", max_length=500), DataError) == (
        "--max-length 500 is beyond the context of tiny-llama, 128 tokens"
    )


def test_a_backbone_without_a_context_needs_a_max_length(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "context", None)
    assert message(lambda: extract(tmp_path / "c"), DataError) == (
        "tiny-llama does not say how long its context is; give --max-length"
    )
    extract(tmp_path / "c", max_length=64)


def test_special_tokens_that_cannot_be_cut_are_not_told_to_be(extract, tiny_model, tmp_path):
    found = message(lambda: extract(tmp_path / "c", model=tiny_model("bert"), max_length=1, truncate=True), DataError)
    assert found == (
        f"{COUNT} of {COUNT} rows of train are longer than 1 tokens even when they are cut, since the tokenizer's "
        "special tokens stay; a larger --max-length keeps them whole"
    )


def test_cutting_is_recorded(extract, tmp_path):
    rows = [{"text": "a film", "score": 1}, {"text": "dull " * 70, "score": 2}]
    extract(tmp_path / "c", data={"train": rows}, max_length=16, truncate=True)
    cache = open_cache(tmp_path / "c")
    assert cache.identity.truncate
    assert cache.manifest.splits["train"].truncated == 1
    assert cache.split("train").lengths.max() == 16


def test_a_row_of_no_token_is_named(extract, tmp_path, monkeypatch, no_model):
    monkeypatch.setattr(
        Backbone, "tokenize", lambda *_, **__: ([np.array([1], dtype=np.int32), np.array([], dtype=np.int32)], 0)
    )
    rows = [{"text": "a", "score": 1}, {"text": "b", "score": 2}]
    assert message(lambda: extract(tmp_path / "c", data={"train": rows}), DataError) == (
        "row 1 of train gives no token at all; take it out"
    )


# Going on, and adding


def test_a_split_can_be_added_later(extract, tmp_path, tiny_rows):
    extract(tmp_path / "c")
    before = contents(tmp_path / "c")
    summary = extract(tmp_path / "c", data={"test": tiny_rows(COUNT, 1)}, label_range=None)
    after = contents(tmp_path / "c")
    assert open_cache(tmp_path / "c").splits == ("train", "test")
    assert summary.rows == COUNT
    assert all(after[name] == before[name] for name in before if name.endswith(".h5"))
    extract(tmp_path / "both", data={"train": tiny_rows(COUNT), "test": tiny_rows(COUNT, 1)})
    assert contents(tmp_path / "both") == after


def test_an_interrupted_run_goes_on_where_it_stopped(extract, tmp_path, monkeypatch):
    whole = extract(tmp_path / "whole")
    calls = []
    forward = Backbone.hidden_states

    def stop_at_third(self, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, rows)

    monkeypatch.setattr(Backbone, "hidden_states", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "c")
    done = len(load_manifest(tmp_path / "c").splits["train"].shards)
    assert done == 2
    assert not list((tmp_path / "c").glob(".*.tmp"))
    monkeypatch.setattr(Backbone, "hidden_states", forward)
    summary = extract(tmp_path / "c")
    assert 0 < summary.computed_tokens < summary.tokens == whole.tokens
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_what_is_there_is_not_computed_again(extract, tmp_path, monkeypatch):
    extract(tmp_path / "c")
    monkeypatch.setattr(Backbone, "load", lambda _self: pytest.fail("the model was loaded"))
    heard = Heard()
    summary = extract(tmp_path / "c", progress=heard)
    assert (summary.computed_tokens, summary.rows) == (0, COUNT)
    assert (heard.begun, heard.notes) == ([], [])


def test_the_speed_is_summed_over_extractions_and_never_a_reason_to_fail(extract, tmp_path, tiny_rows):
    assert read_speeds(tmp_path / "c") == {}
    first = extract(tmp_path / "c")
    one = read_speeds(tmp_path / "c")["cpu"]
    assert (one.rows, one.tokens) == (COUNT, first.tokens)
    assert 0 < one.seconds <= first.seconds
    extract(tmp_path / "c")  # computes nothing
    assert read_speeds(tmp_path / "c") == {"cpu": one}
    second = extract(tmp_path / "c", data={"test": tiny_rows(5, 1)})
    both = read_speeds(tmp_path / "c")["cpu"]
    assert (both.rows, both.tokens) == (COUNT + 5, first.tokens + second.tokens)
    assert both.seconds > one.seconds
    manifest = load_manifest(tmp_path / "c")
    expected = 1000 * both.seconds / both.tokens * second.tokens / 5
    assert seconds_per_1000_rows(tmp_path / "c", manifest, "test") == pytest.approx(expected)
    for harm in ("", "{", "[]", '{"cpu": {"rows": 1}}', '{"cpu": {"rows": 1, "tokens": 0, "seconds": 1.0}}'):
        (tmp_path / "c" / SPEED).write_text(harm)
        assert verify_cache(open_cache(tmp_path / "c")) == []
        assert seconds_per_1000_rows(tmp_path / "c", manifest, "test") is None
    third = extract(tmp_path / "c", data={"dev": tiny_rows(4, 2)})
    assert read_speeds(tmp_path / "c")["cpu"].tokens == third.tokens
    (tmp_path / "c" / SPEED).unlink()
    (tmp_path / "c" / SPEED).mkdir()
    extract(tmp_path / "c", data={"more": tiny_rows(4, 3)})
    assert seconds_per_1000_rows(tmp_path / "c", manifest, "test") is None


def test_a_shard_that_fails_leaves_the_cache_as_it_was(extract, tmp_path, monkeypatch):
    real = pipeline._forward
    monkeypatch.setattr(pipeline, "_forward", lambda *given: tuple(values / 0 for values in real(*given)))
    found = message(lambda: extract(tmp_path / "c"), DataError)
    assert found.startswith("row ")
    assert " of train (id '0-" in found
    assert ") has NaN or infinity in its hidden states; nothing of its shard was kept. " in found
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]


# The label range


def test_a_range_taken_from_the_training_split_is_said_aloud(extract, tmp_path, tiny_rows):
    heard = Heard()
    extract(tmp_path / "c", label_range=None, progress=heard)
    assert heard.notes[0] == "label range 0 to 5, taken from the training split (--label-range sets it)"
    assert open_cache(tmp_path / "c").label_range == (0.0, 5.0)


def test_a_label_outside_the_taken_range_is_refused(extract, tmp_path, tiny_rows, no_model):
    data = {"train": tiny_rows(COUNT), "test": [{"id": "x", "text": "a film", "score": 7}]}
    assert message(lambda: extract(tmp_path / "c", data=data, label_range=None), DataError) == (
        "the split test has the label 7, outside [0, 5] that the training split spans; "
        "give the real range with --label-range LOW,HIGH"
    )


def test_without_a_training_split_there_is_no_range(extract, tmp_path, tiny_rows, no_model):
    assert message(lambda: extract(tmp_path / "c", data={"test": tiny_rows(3)}, label_range=None), DataError) == (
        "no label range: give --label-range LOW,HIGH, or a split named train to take it from"
    )


def test_the_range_of_the_cache_holds_for_a_split_that_is_added(extract, tmp_path):
    extract(tmp_path / "c")
    rows = [{"text": "a film", "score": 7}]
    assert message(lambda: extract(tmp_path / "c", data={"test": rows}, label_range=None), DataError).startswith(
        "row 0 of the rows of test has the target 7 in column 'score', outside the label range [0, 5]"
    )
    assert "has the label range (0.0, 5.0), not (0.0, 9.0)" in message(
        lambda: extract(tmp_path / "c", data={"test": rows}, label_range=(0.0, 9.0)), CacheError
    )


# What is refused once there is a cache


@pytest.mark.parametrize("change", ["order", "twice", "text", "score", "id"])
def test_other_rows_under_the_same_split_are_refused(extract, tmp_path, tiny_rows, monkeypatch, change):
    extract(tmp_path / "c")
    before = contents(tmp_path / "c")
    monkeypatch.setattr(Backbone, "load", lambda _self: pytest.fail("the model was loaded"))
    rows = [dict(row) for row in tiny_rows(COUNT)]
    if change == "order":
        rows.reverse()
    elif change == "twice":
        rows.append(rows[0])
    else:
        rows[3][change] = {"text": "another film", "score": 2.25, "id": "another"}[change]
    found = message(lambda: extract(tmp_path / "c", data={"train": rows}), CacheError)
    assert found.startswith(f"the split 'train' of the cache {tmp_path / 'c'} was made from other rows (12 there, ")
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"prompt": "Film: {text}"}, "prompt is '{text}' there and 'Film: {text}' here"),
        ({"layers": (1,)}, "layers is (3,) there and (1,) here"),
        ({"dtype": "float32"}, "dtype is 'bfloat16' there and 'float32' here"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype is 'float32' there and 'bfloat16' here"),
        ({"max_length": 64}, "max_length is 128 there and 64 here"),
        ({"truncate": True}, "truncate is False there and True here"),
        ({"chat_template": True}, "chat_template is False there and True here"),
    ],
)
def test_other_settings_are_refused_by_name(extract, tmp_path, tiny_cache, tiny_rows, changes, difference):
    folder = shutil.copytree(tiny_cache, tmp_path / "c")
    assert message(
        lambda: extract(folder, data={"more": tiny_rows(3)}, **{"prompt": "{text}", **changes}), CacheError
    ) == (
        f"the cache {folder} was made with something else: {difference}. "
        "Extract into another folder, or use the same settings to go on."
    )


def test_a_model_that_changed_is_refused(extract, tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    extract(tmp_path / "c", model=folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    found = message(lambda: extract(tmp_path / "c", model=folder), CacheError)
    assert "config is '" in found


def test_a_model_that_was_moved_is_the_same(extract, tmp_path, tiny_model):
    extract(tmp_path / "c")
    moved = shutil.copytree(tiny_model("llama"), tmp_path / "renamed")
    assert extract(tmp_path / "c", model=moved).computed_tokens == 0
