import json
import shutil

import pytest
import torch

from relish.cache.errors import AdapterError, CacheError, MissingExtraError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.extract.adapter import open_adapter, read_adapter, read_tuned, tuning_kind
from relish.extract.backbone import Backbone
from relish.extract.files import BackboneFiles, find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.sources import load_texts
from relish.extract.tune import tune_adapter
from relish.extract.tune_rows import choose_rows
from relish.train.data import training_rows
from relish.train.settings import TrainSettings

from ..heard import Heard

TEXTS = ["a film so warm", "a play so dull, clumsy, noisy and bleak that nobody stayed", "fresh"]
PROMPT = "Rate: {text}\nScore:"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def open_backbone(model, adapter=None, layers=()):
    files = find_backbone(model, gguf_file=None, revision=None)
    merged = open_adapter(adapter, files) if adapter is not None else None
    return Backbone(
        files, layers=layers, compute_dtype="float32", device="cpu", trust_remote_code=False, adapter=merged
    )


def tokenize(backbone, texts=TEXTS):
    return backbone.tokenize(texts, chat_template=False, max_length=128, truncate=False)[0]


@pytest.fixture
def plain(tuned, tmp_path):
    """`plain("lora", "llama")`: a copy of an adapter as peft leaves one, without what relish adds."""

    def copy(method="lora", arch="llama", **config):
        folder = shutil.copytree(tuned(method, arch), tmp_path / f"{method}-{arch}")
        for name in ("tune.json", ".lock", "head.safetensors"):
            (folder / name).unlink(missing_ok=True)
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return copy


def extraction(tiny_model, tiny_rows, adapter, **changes):
    options = {
        "model": tiny_model("llama"),
        "adapter": adapter,
        "data": {"train": tiny_rows(6)},
        "prompt": PROMPT,
        "label_range": (0.0, 5.0),
        "device": "cpu",
    }
    return ExtractSettings(**{**options, **changes})


# What is extracted


@pytest.mark.parametrize("method", ["lora", "raft"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2"])
def test_states_are_those_of_pefts_own_unmerged_model_at_every_layer(tuned, tiny_model, arch, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if method == "raft" and arch != "llama":
        pytest.skip("the same weights' format")
    folder = tuned(method, arch)
    depth = 4 if arch == "gemma3" else 3
    backbone = open_backbone(tiny_model(arch), folder, layers=tuple(range(depth + 1)))
    rows = tokenize(backbone)
    states = backbone.hidden_states(rows)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(arch)), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(arch))
    for text, row, ours in zip(TEXTS, rows, states, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            theirs = model.base_model(**encoded, output_hidden_states=True).hidden_states
        for layer in range(depth + 1):
            torch.testing.assert_close(ours[layer, : len(row)], theirs[layer][0], rtol=1e-5, atol=1e-5)


def test_the_adapter_changes_the_states_and_a_middle_layer_too(tuned, tiny_model):
    rows = tokenize(open_backbone(tiny_model("llama")))
    bare = open_backbone(tiny_model("llama"), layers=(1, 3)).hidden_states(rows)
    adapted = open_backbone(tiny_model("llama"), tuned(), layers=(1, 3)).hidden_states(rows)
    for layer in (0, 1):
        assert (adapted[0, layer] - bare[0, layer])[: len(rows[0])].abs().max() > 1e-3


def test_the_causal_lm_has_the_adapter_merged_too(tuned, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backbone = open_backbone(tiny_model("llama"), tuned("raft"))
    ours = backbone.read_model("AutoModelForCausalLM")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), tuned("raft")).eval()
    ids = torch.from_numpy(tokenize(backbone)[1].astype("int64"))[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in ours.named_modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_an_adapter_of_peft_alone_is_taken(plain, tuned, tiny_model):
    rows = tokenize(open_backbone(tiny_model("llama")))
    states = [open_backbone(tiny_model("llama"), adapter).hidden_states(rows) for adapter in (plain(), tuned())]
    assert torch.equal(*states)


@pytest.fixture
def peft_adapter(tiny_model, tmp_path):
    """`peft_adapter(target_modules=[...])`: a folder that peft wrote, and what its own unmerged model computes."""

    def make(arch="llama", **config):
        import peft
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_model(arch))
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **config)).eval()
        for weights in wrapped.parameters():
            if weights.requires_grad:
                torch.nn.init.normal_(weights, std=0.1)
        with torch.no_grad():
            logits = wrapped(input_ids=torch.tensor([[5, 20, 33, 40]])).logits
        wrapped.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits

    return make


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_of_the_embeddings_or_the_lm_head_is_taken(peft_adapter, tiny_model, module):
    folder, expected = peft_adapter(target_modules=[module, "q_proj"])
    merged = open_backbone(tiny_model("llama"), folder).read_model("AutoModelForCausalLM")
    with torch.no_grad():
        found = merged(input_ids=torch.tensor([[5, 20, 33, 40]])).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*bias")
def test_an_adapter_that_peft_cannot_merge_is_refused(peft_adapter, tiny_model):
    folder, _ = peft_adapter(target_modules=["q_proj"], lora_bias=True)
    text = refused(folder, tiny_model("llama"))
    assert text.startswith("the adapter peft cannot be merged into tiny-llama: ")
    assert "bias" in text


# The identity


def test_the_adapter_is_part_of_the_identity(tuned, tiny_model, tiny_rows, tmp_path):
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tuned()))
    found = open_cache(tmp_path / "c").identity.adapter
    assert found == read_adapter(tuned()).sha256
    for adapter, here in ((None, "None"), (tuned("raft"), f"'{read_adapter(tuned('raft')).sha256}'")):
        with pytest.raises(CacheError) as caught:
            extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, adapter))
        assert f"was made with something else: adapter is '{found}' there and {here} here. " in str(caught.value)
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tuned(), data={"test": tiny_rows(4, 1)}))


def test_the_cache_says_what_the_adapter_took(tuned, tiny_model, tiny_rows, tmp_path):
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tuned()))
    extract_cache(tmp_path / "frozen", extraction(tiny_model, tiny_rows, None))
    made_by = open_cache(tmp_path / "c").manifest.made_by
    frozen = open_cache(tmp_path / "frozen").manifest.made_by
    facts = json.loads((tuned() / "tune.json").read_text())
    assert made_by["adapter_method"] == facts["settings"]["method"]
    assert made_by["adapter_recipe"].startswith(f"lr {facts['settings']['lr']:g}, {facts['settings']['epochs']} epochs")
    assert made_by["adapter_rows"] == "24"
    assert int(made_by["adapter_parameters"].replace(",", "")) == facts["trainable_parameters"]
    assert float(made_by["adapter_seconds"].replace(",", "")) == facts["seconds"]
    assert made_by["parameters"] == frozen["parameters"]  # the adapter is merged
    assert not [name for name in frozen if name.startswith("adapter")]


def test_what_differs_in_the_seed_alone_is_of_one_kind(tuned, tune_settings, tiny_model, tiny_rows, tmp_path):
    kind = tuning_kind(read_tuned(tuned()))
    for name, change in (("seed", {"seed": 1}), ("lr", {"lr": 5e-4}), ("rows", {"rows": 16})):
        tune_adapter(tmp_path / name, tune_settings(**change))
        assert (tuning_kind(read_tuned(tmp_path / name)) == kind) == (name == "seed")
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tmp_path / "seed"))
    made_by = open_cache(tmp_path / "c").manifest.made_by
    assert (made_by["adapter_kind"], made_by["adapter_seed"]) == (kind[:16], "1")


def test_a_copy_under_another_name_is_the_same_adapter(tuned, plain, tiny_model, tiny_rows, tmp_path):
    copy = shutil.copytree(tuned(), tmp_path / "elsewhere")
    assert read_adapter(copy).sha256 == read_adapter(tuned()).sha256
    assert read_adapter(plain(r=8.0)).sha256 != read_adapter(tuned()).sha256


def test_a_cache_without_an_adapter_says_so(tiny_cache):
    assert load_manifest(tiny_cache).identity.adapter is None


# Notes


def test_another_prompt_is_noted(tuned, tiny_model, tiny_rows, tmp_path):
    heard = Heard()
    extract_cache(tmp_path / "same", extraction(tiny_model, tiny_rows, tuned()), progress=heard)
    assert not any("tuned with" in text for text in heard.notes)
    settings = extraction(tiny_model, tiny_rows, tuned(), prompt="{text}", chat_template=True)
    extract_cache(tmp_path / "other", settings, progress=heard)
    assert [text for text in heard.notes if "tuned with" in text] == [
        "note: the adapter lora-llama was tuned with prompt 'Rate: {text}\\nScore:', and this is '{text}', so that "
        "rows which it has learned are not known again",
        "note: the adapter lora-llama was tuned with chat template False, and this is True",
    ]


def test_another_configuration_or_tokenizer_of_the_same_weights_is_noted(tuned, tiny_model, tiny_rows, tmp_path):
    heard = Heard()
    other = shutil.copytree(tiny_model("llama"), tmp_path / "other")
    for name, what in (("config.json", {"rms_norm_eps": 0.5}), ("tokenizer_config.json", {"model_max_length": 99})):
        (other / name).write_text(json.dumps({**json.loads((other / name).read_text()), **what}))
        extract_cache(tmp_path / name, extraction(tiny_model, tiny_rows, tuned(), model=other), progress=heard)
    start = "note: the adapter lora-llama was tuned with another"
    assert [text for text in heard.notes if text.startswith(start)] == [
        f"{start} {what} of other than this one, and may not fit" for what in ("config", "config and tokenizer")
    ]


def test_an_adapter_that_knows_most_of_train_says_what_may_be_held_out(tune_settings, tiny_model, tiny_rows, tmp_path):
    rows = {"train": tiny_rows(24)}
    tune_adapter(tmp_path / "a", tune_settings(data=rows, epochs=1))
    heard = Heard()
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, tmp_path / "a", data=rows), progress=heard)
    assert (
        "note: relish train holds out the tenth of train that the adapter a has not learned; with another "
        "--val-fraction than 0.1 its validation figures will flatter"
    ) in heard.notes


def test_heads_hold_out_the_rows_that_the_adapter_did(tune_settings, tiny_model, tiny_rows, tmp_path):
    rows = {"train": tiny_rows(37)}
    settings = tune_settings(data=rows)
    train, val = choose_rows(load_texts(settings, None), None)
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, None, data=rows))
    learned, held = training_rows(open_cache(tmp_path / "c"), TrainSettings())
    assert (list(learned.index), list(held.index)) == (list(train.index), list(val.index))
    assert len(held.index) == 4


def test_another_label_range_is_noted(tuned, tiny_model, tiny_rows, tmp_path):
    heard = Heard()
    settings = extraction(tiny_model, tiny_rows, tuned(), data={"test": tiny_rows(4, 2)}, label_range=(-1, 6))
    extract_cache(tmp_path / "c", settings, progress=heard)
    assert "note: the adapter lora-llama was tuned with label range 0 to 5, and this is -1 to 6" in heard.notes


def test_a_local_backbone_of_another_name_is_noted(plain, tiny_model, tiny_rows, tmp_path):
    heard = Heard()
    adapter = plain(base_model_name_or_path="/home/someone/models/llama-a")
    extract_cache(tmp_path / "c", extraction(tiny_model, tiny_rows, adapter), progress=heard)
    expected = "the adapter lora-llama says that it was made on /home/someone/models/llama-a, and this is tiny-llama"
    assert f"note: {expected}" in heard.notes


# What is refused


def refused(adapter, model):
    with pytest.raises(AdapterError) as caught:
        open_backbone(model, adapter).load()
    return str(caught.value)


def test_an_adapter_that_was_tuned_on_another_base_is_refused_naming_both(tuned, tiny_model):
    here = find_backbone(tiny_model("qwen3"), gguf_file=None, revision=None).hashes()["weights"]
    there = find_backbone(tiny_model("llama"), gguf_file=None, revision=None).hashes()["weights"]
    assert refused(tuned(), tiny_model("qwen3")) == (
        f"the adapter lora-llama was tuned on tiny-llama (weights {there[:12]}…), and this is tiny-qwen3 (weights "
        f"{here[:12]}…); give its own backbone with --model"
    )


@pytest.mark.parametrize("method", ["lora", "raft"])
def test_only_rafts_adapter_needs_the_candidates_of_its_own_label_range(tuned, tiny_model, tiny_rows, tmp_path, method):
    data, asked = {"test": tiny_rows(4, 2)}, {"readouts": ("candidates",), "label_range": (0.0, 5.5)}
    settings = extraction(tiny_model, tiny_rows, tuned(method), data=data, **asked)
    if method == "lora":
        extract_cache(tmp_path / "c", settings)
        return
    with pytest.raises(AdapterError) as caught:
        extract_cache(tmp_path / "c", settings)
    assert str(caught.value) == (
        "the adapter raft-llama was tuned on the scores from 0 to 5, and the label range here is 0 to 5.5; give its "
        "own with --label-range 0,5"
    )
    assert not (tmp_path / "c").exists()


def test_one_weight_that_differs_is_another_base(tuned, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model("llama"), tmp_path / "tiny-llama")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert "was tuned on tiny-llama (weights " in refused(tuned(), other)


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_an_adapter_of_peft_whose_shapes_do_not_fit_is_refused(plain, tiny_model, arch):
    text = refused(plain("lora", "llama"), tiny_model(arch))
    assert text.startswith(f"the adapter lora-llama does not fit tiny-{arch}: ")
    assert text.endswith("; give the backbone that it was made on, tiny-llama, with --model")


def test_one_of_another_hub_model_is_refused_by_its_name(plain, tiny_model):
    adapter = read_adapter(plain(base_model_name_or_path="org/one"))
    with pytest.raises(AdapterError) as caught:
        adapter.refuse_other_base(BackboneFiles(tiny_model("llama"), None, "org/other", "abc"))
    assert str(caught.value) == (
        "the adapter lora-llama was made on org/one, and this is org/other; give its own backbone with --model"
    )
    adapter.refuse_other_base(BackboneFiles(tiny_model("llama"), None, "mirror/one", "abc"))


def test_weights_too_many_and_too_few(plain, tiny_model):
    from safetensors.torch import load_file, save_file

    folder = plain()
    weights = load_file(folder / WEIGHTS)
    first = min(weights)
    save_file({name: value for name, value in weights.items() if name != first}, folder / WEIGHTS)
    way_out = "give the backbone that it was made on, tiny-llama, with --model"
    assert refused(folder, tiny_model("llama")) == (
        f"the adapter lora-llama does not fit tiny-llama: it lacks {first}; {way_out}"
    )
    save_file({**weights, "base_model.model.score.weight": torch.zeros(1, 32)}, folder / WEIGHTS)
    assert refused(folder, tiny_model("llama")) == (
        "the adapter lora-llama does not fit tiny-llama: nothing takes its base_model.model.score.weight; " + way_out
    )


def test_what_is_no_adapter_is_refused(plain, tiny_model, tmp_path):
    model = tiny_model("llama")
    file = tmp_path / "rows.csv"
    file.touch()
    assert refused(file, model) == f"{file} is a file, and an adapter is a folder with {CONFIG} and {WEIGHTS}"
    gone = tmp_path / "gone"
    assert refused(gone, model) == (
        f"{gone} is no adapter: it has no {CONFIG}; make one with: relish tune {gone} --method lora …"
    )
    folder = plain(peft_type="IA3")
    assert refused(folder, model) == (
        f"{folder} is an adapter of the type 'IA3', and LORA is what can be merged here; make one with: relish tune "
        "ADAPTER --method lora …"
    )
    (folder / WEIGHTS).unlink()
    assert refused(folder, model) == (
        f"{folder} is no adapter that can be used: it has no {WEIGHTS}, and pickle is never read"
    )
    (folder / CONFIG).write_text("[")
    assert refused(folder, model).startswith(f"{folder / CONFIG} cannot be read (")


def test_an_edited_tune_json_is_refused(tuned, tiny_model, tmp_path):
    folder = shutil.copytree(tuned(), tmp_path / "a")
    (folder / "tune.json").write_text((folder / "tune.json").read_text().replace("tiny-llama", "tiny-l1ama"))
    assert "tune.json is not as relish wrote it: it was edited or damaged" in refused(folder, tiny_model("llama"))


def test_without_peft_the_extra_is_named(tuned, tiny_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"Using an adapter needs .*'relish-llm\[tune\]'"):
        open_backbone(tiny_model("llama"), tuned()).load()


def test_the_command_takes_it(run_cli, tuned, tiny_model, tmp_path):
    table = tmp_path / "train.csv"
    table.write_text("text,score\nwarm,1\nfresh,2\n", encoding="utf-8")
    words = ("extract", tmp_path / "c", "--model", tiny_model("llama"), "--data", f"train={table}")
    result = run_cli(*words, "--label-range", "0,5", "--adapter", tuned())
    assert result.exit_code == 0, result.stderr
    shown = run_cli("cache", "info", tmp_path / "c").stdout
    assert f"{read_adapter(tuned()).sha256[:16]}…" in shown
    result = run_cli(*words, "--label-range", "0,5", "--adapter", tmp_path)
    assert (result.exit_code, result.stderr.startswith(f"error: {tmp_path} is no adapter: ")) == (2, True)
