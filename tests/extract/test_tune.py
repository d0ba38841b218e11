import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from relish.cache.errors import AdapterError
from relish.extract import tune_loop
from relish.extract.adapter import CHECKPOINT, read_adapter, read_tuned
from relish.extract.regression import HEAD
from relish.extract.tune import tune_adapter

from ..heard import Heard

METHODS = ("lora", "raft")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(folder):
    """All bytes of an adapter but tune.json's, which holds times."""
    return {
        name: content for name, content in contents(folder).items() if name.endswith(("safetensors", "config.json"))
    }


# What is learned


@pytest.mark.parametrize(("method", "lr"), [("lora", 1e-2), ("raft", 1e-2)])
def test_the_loss_falls_and_the_best_epoch_is_kept(tune_settings, tiny_rows, tmp_path, method, lr):
    data = {"train": tiny_rows(60), "dev": tiny_rows(20, 1)}
    summary = tune_adapter(tmp_path / "a", tune_settings(method, data=data, epochs=6, lr=lr))
    history = read_tuned(tmp_path / "a")["history"]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    best = min(history, key=lambda record: record["val_nrmse"])
    assert summary.best_epoch == best["epoch"]
    assert summary.val == {"nrmse": best["val_nrmse"], "pearson": best["val_pearson"]}
    assert best["val_nrmse"] < history[0]["val_nrmse"]


def test_what_is_kept_is_the_best_epoch_and_not_the_last(tune_settings, tmp_path, monkeypatch):
    """As if the first were the best: the adapter is that of a tuning with the same steps that ends there."""
    nrmse = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(tune_loop, "figures", lambda *_: (next(nrmse), 0.5))
    saved = []
    real = tune_loop.TuneState.keep_best
    monkeypatch.setattr(tune_loop.TuneState, "keep_best", lambda self: (real(self), saved.append(dict(self.best)))[0])
    summary = tune_adapter(tmp_path / "a", tune_settings(epochs=3))
    assert (summary.best_epoch, len(saved)) == (1, 1)
    written = load_file(tmp_path / "a" / FILES[1])
    head = load_file(tmp_path / "a" / "head.safetensors")
    for name, value in saved[0].items():
        there = head[name.removeprefix("head.")] if name.startswith("head.") else written[name.replace(".default", "")]
        assert torch.equal(there, value)
    assert any(name.startswith("head.") for name in saved[0])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2"])
def test_adapters_are_on_every_linear_layer_of_the_blocks_and_not_on_the_lm_head(tuned, tiny_model, arch):
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch))
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head"
    }
    written = load_file(tuned("lora", arch) / FILES[1])
    assert {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name) for name in written} == linear
    assert len(written) == 2 * len(linear)
    assert all(min(value.shape) == 8 for value in written.values())


@pytest.mark.parametrize("method", METHODS)
def test_only_adapter_and_head_change(tune_settings, tmp_path, monkeypatch, method):
    seen = {}

    def spy(model, state_method, state, *arguments, **options):
        frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
        trained = {name: value.detach().clone() for name, value in state.parameters.items()}
        real(model, state_method, state, *arguments, **options)
        seen["frozen"] = all(
            torch.equal(value, frozen[name]) for name, value in model.named_parameters() if name in frozen
        )
        seen["changed"] = {name for name, value in state.parameters.items() if not torch.equal(value, trained[name])}
        seen["trained"] = set(trained)

    real = tune_loop.tune
    monkeypatch.setattr("relish.extract.tune.tune", spy)
    tune_adapter(tmp_path / "a", tune_settings(method))
    assert seen["frozen"]
    assert seen["changed"] == seen["trained"]
    assert all("lora_" in name or name.startswith("head.") for name in seen["trained"])
    assert {name for name in seen["trained"] if "lora_" not in name} == (
        {"head.weight", "head.bias"} if method == "lora" else set()
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tuned, tune_settings, tmp_path, method):
    state = torch.random.get_rng_state()
    tune_adapter(tmp_path / "same", tune_settings(method))
    tune_adapter(tmp_path / "other", tune_settings(method, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator stays as it was
    assert weights(tmp_path / "same") == weights(tuned(method))
    assert weights(tmp_path / "other")[FILES[1]] != weights(tuned(method))[FILES[1]]


def test_losses_differ(tuned, tune_settings, tmp_path):
    tune_adapter(tmp_path / "a", tune_settings(loss="huber"))
    assert weights(tmp_path / "a")[FILES[1]] != weights(tuned())[FILES[1]]


def test_a_subset_of_the_rows_is_the_same_for_every_seed(tune_settings, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("relish.extract.tune.tune", lambda *given, **_: drawn.append(given[3].target.tolist()) or 1 / 0)
    for seed in (0, 1):
        with pytest.raises(ZeroDivisionError):
            tune_adapter(tmp_path / f"{seed}", tune_settings(rows=10, seed=seed))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 10


def test_without_a_validation_split_a_tenth_is_held_out(tune_settings, tiny_rows, tmp_path):
    summary = tune_adapter(tmp_path / "a", tune_settings(data={"train": tiny_rows(24), "test": tiny_rows(4, 1)}))
    assert (summary.train_rows, summary.val_rows) == (22, 2)


# What is written


@pytest.mark.parametrize("method", METHODS)
def test_what_tune_json_says(tuned, method):
    folder = tuned(method)
    text = (folder / "tune.json").read_text()
    value = json.loads(text)
    assert list(value)[:2] == ["format", "version"]
    assert (value["format"], value["version"]) == ("relish adapter", 2)
    assert value["base"]["model"] == "tiny-llama"
    assert value["texts"]["prompt"] == "Rate: {text}\nScore:"
    assert value["settings"]["method"] == method
    assert [record["epoch"] for record in value["history"]] == [1, 2]
    sizes = [value.numel() for value in load_file(folder / FILES[1]).values()]
    assert value["trainable_parameters"] == sum(sizes) + (33 if method == "lora" else 0)
    assert value["sha256_of_adapter"] == read_adapter(folder).sha256
    assert set(contents(folder)) == {".lock", "tune.json", *FILES, *([HEAD] if method == "lora" else [])}


def test_there_is_no_path_of_this_machine_in_any_file(tuned, tiny_model, tmp_path_factory):
    home = str(tmp_path_factory.getbasetemp())
    for name, content in contents(tuned()).items():
        assert home.encode() not in content, name
    assert json.loads((tuned() / FILES[0]).read_text())["base_model_name_or_path"] == "tiny-llama"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_it(tuned, tiny_model, method, arch):
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    folder = tuned(method, arch)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(arch)), folder)
    written, loaded = load_file(folder / FILES[1]), get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(written) == set(loaded)
    assert all(torch.equal(written[name], loaded[name]) for name in written)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 16, 0.05, "none")


# Going on


class Stop(BaseException):
    pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stops", [[1], [3], [4], [2, 5]])
def test_a_tuning_that_was_stopped_goes_on_to_the_same_adapter(
    tuned, tune_settings, tmp_path, monkeypatch, method, stops
):
    """Stopped after some steps, without a word; every step is a checkpoint but those that end an epoch."""
    monkeypatch.setattr(tune_loop, "SAVE_SECONDS", 0.0)
    real = tune_loop._take_step
    for stop in stops:

        def step(method, state, *given, stop=stop, **options):
            if state.step == stop:
                raise Stop
            return real(method, state, *given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tune_loop, "_take_step", step)
            with pytest.raises(Stop):
                tune_adapter(tmp_path / "a", tune_settings(method))
        assert (tmp_path / "a" / CHECKPOINT).exists()
        with pytest.raises(AdapterError, match="is not finished; run its relish tune command again to go on"):
            read_adapter(tmp_path / "a")
    heard = Heard()
    tune_adapter(tmp_path / "a", tune_settings(method), listener=heard)
    assert f"going on after step {stops[-1]}" in heard.notes
    (begun,) = heard.begun
    assert begun == (heard.rows, heard.tokens)
    assert weights(tmp_path / "a") == weights(tuned(method))
    assert not (tmp_path / "a" / CHECKPOINT).exists()
    histories = [
        [{**record, "seconds": 0} for record in read_tuned(folder)["history"]]
        for folder in (tmp_path / "a", tuned(method))
    ]
    assert histories[0] == histories[1]


def test_a_finished_adapter_is_left_alone(tuned, tune_settings):
    before = contents(tuned())
    summary = tune_adapter(tuned(), tune_settings())
    assert summary.already
    assert contents(tuned()) == before


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"lr": 0.5}, "lr is 0.01 there and 0.5 here"),
        ({"rank": 4}, "rank is 8 there and 4 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"epochs": 5}, "epochs is 2 there and 5 here"),
        ({"loss": "huber"}, "loss is 'mse' there and 'huber' here"),
        ({"rows": 10}, "train_rows is 24 there and 10 here"),
        ({"prompt": "Say: {text}"}, "prompt is 'Rate: {text}\\nScore:' there and 'Say: {text}' here"),
        ({"label_range": (0.0, 6.0)}, "label_range is [0.0, 5.0] there and [0.0, 6.0] here"),
        ({"max_length": 100}, "max_length is 128 there and 100 here"),
        ({"arch": "qwen3"}, "weights is '"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(tuned, tune_settings, tmp_path, monkeypatch, changes, difference, finished):
    folder = tuned()
    if not finished:
        folder = tmp_path / "a"
        with monkeypatch.context() as patch:
            patch.setattr("relish.extract.tune._finish", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tune_adapter(folder, tune_settings())
    before = contents(folder)
    with pytest.raises(AdapterError) as caught:
        tune_adapter(folder, tune_settings(**changes))
    text = str(caught.value)
    assert text.startswith(f"the adapter {folder} was begun with something else: ")
    assert difference in text
    assert text.endswith(". Tune into another folder, or use the same settings to go on.")
    assert contents(folder) == before


def test_other_rows_are_refused(tuned, tune_settings, tiny_rows):
    with pytest.raises(AdapterError, match=r"something else: train is '.*' there and '.*' here\. Tune"):
        tune_adapter(tuned(), tune_settings(data={"train": tiny_rows(24, 5), "dev": tiny_rows(8, 1)}))


# What is heard


def test_notes_say_what_was_taken_and_what_is_not_used(tune_settings, tiny_rows, tmp_path):
    heard = Heard()
    data = {"train": tiny_rows(24), "dev": tiny_rows(8, 1), "test": tiny_rows(4, 2)}
    tune_adapter(tmp_path / "a", tune_settings(data=data, label_range=None, epochs=1), listener=heard)
    assert heard.notes[:3] == [
        "label range 0 to 5, taken from the training split (--label-range sets it)",
        "not used: test",
        "loading tiny-llama (float32, cpu)",
    ]
    assert np.isfinite(read_tuned(tmp_path / "a")["val"]["nrmse"])
