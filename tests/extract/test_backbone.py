import json
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relish.cache.errors import BackboneError, SettingsError
from relish.cache.reader import open_cache
from relish.extract.backbone import Backbone, resolve_layers
from relish.extract.files import find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings

ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "bert")
TEXTS = [
    "a film so warm",
    "a play so dull, clumsy, noisy and bleak that nobody stayed to the end of it",
    "fresh",
    "a film so bright and moving: 句子",
    "a play so stale",
]


def make(folder, *, layers=(), compute_dtype="float32"):
    files = find_backbone(folder, gguf_file=None, revision=None)
    return Backbone(files, layers=layers, compute_dtype=compute_dtype, device="cpu", trust_remote_code=False)


def tokenize(backbone, texts=TEXTS, **options):
    return backbone.tokenize(texts, **{"chat_template": False, "max_length": 128, "truncate": False, **options})


@cache
def load(folder):
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def alone(folder, text):
    """All hidden states of one text, as transformers gives them: (depth + 1, n, D)."""
    model, tokenizer = load(folder)
    encoded = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        return torch.cat(model(**encoded, output_hidden_states=True).hidden_states)


# The hidden states


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_holds_what_the_backbone_gives_for_each_row_alone(tiny_model, tmp_path, arch, dtype):
    folder = tiny_model(arch)
    depth = 4 if arch == "gemma3" else 3
    rows = [{"text": text, "score": number} for number, text in enumerate(TEXTS)]
    extract_cache(
        tmp_path / "c",
        ExtractSettings(
            model=folder,
            data={"train": rows},
            layers=tuple(range(depth + 1)),
            dtype=dtype,
            label_range=(0, 5),
            batch_tokens=1000,
        ),
    )
    written = open_cache(tmp_path / "c")
    assert written.layers == tuple(range(depth + 1))
    for layer in written.layers:
        split = written.split("train", layer=layer)
        for row, text in enumerate(TEXTS):
            expected = alone(folder, text)[layer]
            got = split.read([row]).hidden[0]
            assert got.shape == expected.shape
            # Half a step of bfloat16 is 2^-9 of the value.
            bound = {"float32": (1e-5, 1e-5), "bfloat16": (2**-8, 1e-5)}[dtype]
            torch.testing.assert_close(got.float(), expected, rtol=bound[0], atol=bound[1])
        split.close()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batch_mates_and_padding_change_nothing(tiny_model, arch):
    backbone = make(tiny_model(arch), layers=(0, 1, 2, 1.0))
    rows, _ = tokenize(backbone)
    together = backbone.hidden_states(rows)
    assert together.shape == (len(TEXTS), len(backbone.layers), max(map(len, rows)), 32)
    for row, states in zip(rows, together, strict=True):
        torch.testing.assert_close(states[:, : len(row)], backbone.hidden_states([row])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_side_on_which_a_tokenizer_pads_does_not_matter(tiny_model, arch, side):
    backbone = make(tiny_model(arch))
    rows, _ = tokenize(backbone)
    backbone.tokenizer.padding_side = side
    torch.testing.assert_close(backbone.hidden_states(rows[:1])[0], backbone.hidden_states(rows)[0, :, : len(rows[0])])
    assert rows[0].tolist() == tokenize(backbone, TEXTS[:1])[0][0].tolist()


def test_a_row_of_any_token_is_read_when_there_is_no_pad_token(tiny_model):
    backbone = make(tiny_model("gpt2"))
    assert backbone.tokenizer.pad_token_id is None
    row = np.zeros(4, dtype=np.int32)
    together = backbone.hidden_states([row, np.arange(1, 9, dtype=np.int32)])
    torch.testing.assert_close(together[0, :, :4], backbone.hidden_states([row])[0], rtol=1e-5, atol=1e-5)


# Only what is needed is run


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("top", [1, 2])
def test_blocks_above_the_highest_layer_are_not_run(tiny_model, arch, top):
    whole = make(tiny_model(arch), layers=(1.0,))
    whole.load()
    block = type(next(module for module in whole._model.modules() if isinstance(module, torch.nn.ModuleList))[0])
    calls = []
    forward = block.forward
    backbone = make(tiny_model(arch), layers=(0, top))
    rows, _ = tokenize(backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
        states = backbone.hidden_states(rows[:1])
    assert len(calls) == top
    assert sum(isinstance(module, block) for module in backbone._model.modules()) == top
    torch.testing.assert_close(states[0], alone(tiny_model(arch), TEXTS[0])[[0, top]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2"])
def test_there_is_no_lm_head(tiny_model, arch):
    backbone = make(tiny_model(arch))
    backbone.load()
    assert not any("lm_head" in name for name, _ in backbone._model.named_modules())
    assert not any(parameter.requires_grad for parameter in backbone._model.parameters())
    assert not backbone._model.training


def test_weights_are_loaded_only_when_there_is_something_to_run(tiny_model, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    backbone = make(tiny_model("llama"))
    tokenize(backbone)
    assert (backbone.depth, backbone.hidden_size, backbone.context) == (3, 32, 128)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_backbone_runs_in_the_type_that_is_asked_for(tiny_model, name):
    backbone = make(tiny_model("llama"), compute_dtype=name)
    assert backbone.hidden_states(tokenize(backbone)[0][:1]).dtype == getattr(torch, name)


# Which layers


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        ((), (4,)),
        ((1.0,), (4,)),
        ((0,), (0,)),
        ((0.0, 0.5), (0, 2)),
        ((3, 1, 3), (1, 3)),
        ((1.0, 4, 2), (2, 4)),
        ((1,), (1,)),
    ],
)
def test_layers_are_indices_or_fractions_of_the_depth(layers, indices):
    assert resolve_layers(layers, 4) == indices


def test_a_layer_beyond_the_depth_is_refused(tiny_model):
    with pytest.raises(SettingsError) as caught:
        make(tiny_model("llama"), layers=(2, 7))
    assert str(caught.value) == "layer 7 was asked for, and the backbone has 3 (0 is the embeddings)"


# Tokens


def test_a_chat_template_makes_the_text_a_users_turn(tiny_model):
    backbone = make(tiny_model("llama"))
    rows, _ = tokenize(backbone, ["a film so warm"], chat_template=True)
    decode = backbone.tokenizer.decode
    assert decode(rows[0].tolist()) == "<s>user: a film so warm</s><s>assistant:"
    assert decode(tokenize(backbone, ["a film so warm"])[0][0].tolist()) == "<s>a film so warm"


def test_without_a_chat_template_the_option_is_refused(tiny_model):
    with pytest.raises(BackboneError) as caught:
        tokenize(make(tiny_model("qwen3")), chat_template=True)
    assert str(caught.value) == "the tokenizer of tiny-qwen3 has no chat template; leave --chat-template out"


def test_cutting_keeps_the_special_tokens_that_must_stay_at_the_end(tiny_model):
    backbone = make(tiny_model("bert"))
    whole, cut = tokenize(backbone)
    assert cut == 0
    rows, cut = tokenize(backbone, max_length=8, truncate=True)
    assert cut == sum(len(row) > 8 for row in whole) > 0
    for row, full in zip(rows, whole, strict=True):
        if len(full) <= 8:
            assert row.tolist() == full.tolist()
        else:
            assert row.tolist() == [*full[:7], full[-1]]


def test_the_end_is_cut_whatever_the_tokenizer_says(tiny_model, tmp_path):
    own = shutil.copytree(tiny_model("llama"), tmp_path / "own")
    path = own / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    rows, cut = tokenize(make(own), max_length=6, truncate=True)
    whole, _ = tokenize(make(tiny_model("llama")))
    assert cut
    for row, full in zip(rows, whole, strict=True):
        assert row.tolist() == full[:6].tolist()


def test_many_rows_come_out_in_their_order(tiny_model):
    backbone = make(tiny_model("qwen3"))
    rows, _ = tokenize(backbone, [f"film {number}" for number in range(2500)])
    assert backbone.tokenizer.decode(rows[2345].tolist()) == "film 2345"
    assert len(rows) == 2500


def test_the_context_is_the_smaller_of_the_models_and_the_tokenizers(tiny_model):
    backbone = make(tiny_model("llama"))
    for limit, context in ((64, 64), (10**30, 128), (500, 128)):
        backbone.tokenizer.model_max_length = limit
        assert backbone.context == context


def test_the_context_ends_where_longer_rows_would_change_the_positions_of_others(tiny_model, monkeypatch):
    backbone = make(tiny_model("llama"))
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    monkeypatch.setattr(backbone._text_config, "rope_parameters", rope)
    assert backbone.context == 40
    monkeypatch.setattr(backbone._text_config, "rope_parameters", rope | {"rope_type": "default"})
    assert backbone.context == 128


def test_a_backbone_that_does_not_say_its_context(tiny_model):
    backbone = make(tiny_model("llama"))
    backbone.tokenizer.model_max_length = 10**30
    backbone._text_config = SimpleNamespace()
    assert backbone.context is None


# What is refused


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(BackboneError) as caught:
        make(tmp_path / "t5")
    assert str(caught.value) == "t5 is an encoder-decoder (t5); a causal LM or an encoder is needed"


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"^transformers cannot load broken \(AutoConfig\): "):
        make(tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "data", "factory"),
    [
        ("model.safetensors", b"not safetensors", "AutoModel"),
        ("tokenizer.json", b"{}", "AutoTokenizer"),
        ("config.json", b"{", "AutoConfig"),
    ],
)
def test_files_that_cannot_be_read_are_named(tiny_model, tmp_path, name, data, factory):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "broken")
    (folder / name).write_bytes(data)
    with pytest.raises(BackboneError, match=rf"^transformers cannot load broken \({factory}\): .") as caught:
        make(folder).load()
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused(tiny_model):
    files = find_backbone(tiny_model("llama"), gguf_file=None, revision=None)
    with pytest.raises(SettingsError, match="the device 'tpu' is not available here; it may be one of auto, cpu, cuda"):
        Backbone(files, layers=(), compute_dtype="auto", device="tpu", trust_remote_code=False)
