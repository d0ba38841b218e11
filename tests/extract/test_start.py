"""What all rows begin with is read once, and changes nothing but how many tokens go through the backbone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relish.cache.errors import BackboneError
from relish.cache.reader import open_cache
from relish.extract import backbone as backbone_module
from relish.extract import pipeline
from relish.extract.backbone import Backbone
from relish.extract.files import find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.start import common_prefix, slots

CAUSAL = ("llama", "qwen3", "gemma3", "gpt2")
PROMPT = "a film so bright, fresh and moving that nobody stayed to the end of it, and a play so stale: {text}\nScore:"


def make(folder, *, layers=(), compute_dtype="float32"):
    files = find_backbone(folder, gguf_file=None, revision=None)
    return Backbone(files, layers=layers, compute_dtype=compute_dtype, device="cpu", trust_remote_code=False)


def prompts_of(backbone, texts):
    filled = [PROMPT.format(text=text) for text in texts]
    return backbone.tokenize(filled, chat_template=False, max_length=256, truncate=False)[0]


def prompts(backbone, tiny_rows, count=6):
    return prompts_of(backbone, [row["text"] for row in tiny_rows(count)])


@pytest.fixture
def read(monkeypatch):
    """Tokens of each forward pass, padding included."""
    sizes = []
    real = Backbone._pad

    def pad(self, rows, token):
        found = real(self, rows, token)
        sizes.append(found[0].numel())
        return found

    monkeypatch.setattr(Backbone, "_pad", pad)
    return sizes


@pytest.mark.parametrize("arch", CAUSAL)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_states_are_those_of_whole_rows(tiny_model, tiny_rows, read, arch, dtype, tolerance):
    """At every layer, and beyond the window of layers that have one."""
    options = {"layers": (0, 1, 3), "compute_dtype": dtype}
    whole, ours = (make(tiny_model(arch), **options) for _ in range(2))
    rows = prompts(whole, tiny_rows)
    shared = common_prefix(rows)
    assert shared > 8
    assert len(set(map(len, rows))) > 1
    assert ours.read_start(rows) == shared
    read.clear()
    expected, got = whole.hidden_states(rows), ours.hidden_states(rows)
    longest = max(map(len, rows))
    assert read == [6 * longest, 6 * (longest - shared)]
    assert got.shape == expected.shape
    for number, row in enumerate(rows):
        states = [value[number, :, : len(row)].float() for value in (got, expected)]
        torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)


def test_gemmas_window_is_shorter_than_the_rows(tiny_model, tiny_rows):
    backbone = make(tiny_model("gemma3"))
    assert backbone.config.sliding_window < common_prefix(prompts(backbone, tiny_rows))


@pytest.mark.parametrize("arch", CAUSAL)
def test_rows_that_begin_otherwise_are_read_whole(tiny_model, tiny_rows, arch):
    backbone = make(tiny_model(arch))
    rows = prompts(backbone, tiny_rows)
    other = rows[0][5:]
    expected = backbone.hidden_states([other])
    shared = backbone.read_start(rows)
    assert torch.equal(backbone.hidden_states([other]), expected)
    nothing_more = rows[0][:shared]
    assert torch.equal(backbone.hidden_states([nothing_more]), backbone._states([nothing_more]))


def test_batches_do_not_change_what_later_ones_read(tiny_model, tiny_rows):
    backbone = make(tiny_model("llama"))
    rows = prompts(backbone, tiny_rows)
    assert backbone.read_start(rows)
    first = backbone.hidden_states(rows)
    backbone.hidden_states(rows[:2])
    assert torch.equal(backbone.hidden_states(rows), first)


def test_an_encoder_reads_every_row_as_a_whole(tiny_model, tiny_rows):
    backbone = make(tiny_model("bert"))
    rows = prompts(backbone, tiny_rows)
    assert common_prefix(rows) > 8
    expected = backbone.hidden_states(rows)
    assert backbone.read_start(rows) == 0
    assert torch.equal(backbone.hidden_states(rows), expected)


def test_a_short_start_or_a_single_row_is_not_worth_it(tiny_model, tiny_rows):
    backbone = make(tiny_model("llama"))
    rows = prompts(backbone, tiny_rows)
    shared = common_prefix(rows)
    assert backbone.read_start([row[shared - 8 :] for row in rows]) == 8
    assert backbone.read_start([row[shared - 7 :] for row in rows]) == 0
    assert backbone.read_start([np.concatenate([row[shared - 8 :], *[rows[0]] * 3]) for row in rows]) == 0
    assert backbone.read_start(rows[:1]) == 0


@pytest.mark.parametrize(("length", "read", "expected"), [(50, 0, 50), (50, 20, 30), (50, 40, 25), (51, 40, 26)])
def test_a_batch_has_at_most_twice_the_slots_in_memory(length, read, expected):
    assert slots(length, read) == expected


def test_a_backbone_that_goes_on_wrongly_is_found_out(tiny_model, tiny_rows, monkeypatch):
    backbone = make(tiny_model("llama"))
    rows = prompts(backbone, tiny_rows)
    expected = backbone.hidden_states(rows)

    def forget(past, count=1):
        past = real(past, count)
        past.layers[0].keys = past.layers[0].keys * 1.1
        return past

    real = backbone_module.fork
    monkeypatch.setattr(backbone_module, "fork", forget)
    assert backbone.read_start(rows) == 0
    assert torch.equal(backbone.hidden_states(rows), expected)


# Extraction


def settings(tiny_model, tiny_rows, **changes):
    options = {
        "model": tiny_model("llama"),
        "data": {"train": tiny_rows(20), "dev": tiny_rows(8, 1)},
        "prompt": PROMPT,
        "label_range": (0.0, 5.0),
        "device": "cpu",
        "shard_rows": 6,
    }
    return ExtractSettings(**{**options, **changes})


def test_a_cache_holds_the_same_and_takes_fewer_tokens(tiny_model, tiny_rows, tmp_path, monkeypatch, read):
    options = settings(tiny_model, tiny_rows, dtype="float32")
    extract_cache(tmp_path / "ours", options)
    ours = sum(read)
    read.clear()
    monkeypatch.setattr(backbone_module, "worth_reading_once", lambda *_: False)
    extract_cache(tmp_path / "whole", options)
    assert ours < 0.6 * sum(read)
    for name in ("train", "dev"):
        splits = [open_cache(tmp_path / folder).split(name) for folder in ("ours", "whole")]
        (got, mask), (expected, other) = (split.read(list(range(len(split)))) for split in splits)
        assert torch.equal(mask, other)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not got[~mask].any()


def test_an_interrupted_extraction_ends_byte_for_byte_as_an_unbroken_one(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """What all rows begin with is that of the whole split, not of the shards that are left."""
    texts = [f"{word} and so {'warm ' * (20 + n)}" for n, word in enumerate(["fresh", "warm", "dull", "noisy"] * 3)]
    texts += [f"a play so dull that {'it ' * n}ended" for n in range(1, 9)]
    rows = [{"text": text, "score": float(n % 5)} for n, text in enumerate(texts)]
    options = settings(tiny_model, tiny_rows, data={"train": rows})
    extract_cache(tmp_path / "whole", options)
    real, shards, read = pipeline._extract_shard, [], []

    def broken(*given):
        shards.append(given[4])
        read.append(given[-1])
        if len(shards) == 4:
            raise BackboneError("the power is out")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_extract_shard", broken)
        with pytest.raises(BackboneError, match="the power is out"):
            extract_cache(tmp_path / "resumed", options)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_extract_shard", lambda *given: read.append(given[-1]) or real(*given))
        extract_cache(tmp_path / "resumed", options)
    assert shards == [0, 1, 2, 3]
    assert len(set(read)) == 1
    left = prompts_of(make(tiny_model("llama")), texts[12:])
    assert common_prefix(left) > read[0]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.h5")} for name in ("whole", "resumed")]
    assert len(files[0]) == 5
    assert files[0] == files[1]


def test_it_is_said(tiny_model, tiny_rows, tmp_path):
    notes = []
    heard = SimpleNamespace(note=notes.append, begin=lambda *_: None, advance=lambda *_: None)
    extract_cache(tmp_path / "c", settings(tiny_model, tiny_rows), progress=heard)
    backbone = make(tiny_model("llama"))
    shared = common_prefix(prompts(backbone, tiny_rows, 20))
    assert f"train: the {shared} tokens that all rows begin with are read once" in notes
