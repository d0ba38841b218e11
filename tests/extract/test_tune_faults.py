"""What a tuning refuses, and what it says of damage, of numbers that are none and of memory that runs out."""

import re
import shutil

import pytest
import torch
from transformers import LlamaModel

from relish.cache.errors import AdapterError, BackboneError, DataError, MissingExtraError
from relish.extract.adapter import CHECKPOINT
from relish.extract.regression import HEAD, RegressionHead
from relish.extract.tune import tune_adapter

METHODS = ("lora", "raft")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def test_a_damaged_checkpoint_is_named(tune_settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("relish.extract.tune._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune_adapter(tmp_path / "a", tune_settings())
    path = tmp_path / "a" / CHECKPOINT
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) // 2, 40):
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(AdapterError, match=rf"{path} (is damaged|cannot be read).*; delete .*/a and tune again$"):
            tune_adapter(tmp_path / "a", tune_settings())
    path.write_bytes(whole)
    tune_adapter(tmp_path / "a", tune_settings())


def test_a_finished_adapter_without_its_head_is_not_called_finished(tuned, tmp_path, tune_settings):
    folder = shutil.copytree(tuned(), tmp_path / "a")
    head = folder / HEAD
    content = head.read_bytes()
    head.write_bytes(content[:-1])
    with pytest.raises(AdapterError, match=f"^{head} is damaged: it is not the file that was saved; restore it"):
        tune_adapter(folder, tune_settings())
    head.unlink()
    with pytest.raises(AdapterError, match=f"^{head} cannot be read"):
        tune_adapter(folder, tune_settings())


def test_a_damaged_adapter_is_named(tuned, tmp_path, tune_settings):
    folder = shutil.copytree(tuned(), tmp_path / "a")
    data = bytearray((folder / FILES[1]).read_bytes())
    data[-1] ^= 1
    (folder / FILES[1]).write_bytes(data)
    with pytest.raises(AdapterError) as caught:
        tune_adapter(folder, tune_settings())
    assert str(caught.value) == (
        f"the adapter {folder} is not as relish wrote it: it was edited or damaged; restore it from a copy, or delete "
        f"{folder} and tune again"
    )


def test_a_folder_of_other_files_is_refused(tune_settings, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError) as caught:
        tune_adapter(tmp_path, tune_settings())
    assert str(caught.value) == f"{tmp_path} holds other files and no adapter of relish; choose a new or empty folder"
    with pytest.raises(AdapterError, match="notes.txt is a file, and an adapter is a folder; choose a new one"):
        tune_adapter(tmp_path / "notes.txt", tune_settings())


def test_an_encoder_is_refused(tune_settings, tmp_path):
    with pytest.raises(BackboneError) as caught:
        tune_adapter(tmp_path / "a", tune_settings(arch="bert"))
    assert str(caught.value) == "tiny-bert is an encoder (bert), and only causal LMs can be tuned"


def test_an_architecture_that_peft_refuses_is_said(tune_settings, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

    config = MambaConfig(vocab_size=321, hidden_size=16, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "mamba")
    with pytest.raises(BackboneError) as caught:
        tune_adapter(tmp_path / "a", tune_settings(model=tmp_path / "mamba", max_length=64))
    said = r"peft puts no LoRA adapter on an LLM of the kind mamba \(.*Mamba-based models \(.*\)\); tune another LLM$"
    assert re.match(said, str(caught.value))


def test_without_peft_the_extra_is_named(tune_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError) as caught:
        tune_adapter(tmp_path / "a", tune_settings())
    assert str(caught.value) == (
        "Tuning a backbone needs the package 'peft', which is not installed; run: pip install 'relish-llm[tune]'"
    )


def test_rows_that_cannot_be_used_are_refused_before_the_model_is_found(tune_settings, tiny_rows, tmp_path):
    rows = tiny_rows(6)
    rows[2]["score"] = None
    for data, message in (
        ({"train": rows}, "1 of 6 rows of the split 'train' have no label, first row 2 (id "),
        ({"dev": tiny_rows(6)}, "an adapter learns from the split train, and there is only dev"),
        ({"train": tiny_rows(4)[:2]}, "1 training rows are left, and at least 2 are needed"),
    ):
        with pytest.raises(DataError) as caught:
            tune_adapter(tmp_path / "a", tune_settings(data=data, model="no/such-model"))
        assert message in str(caught.value)
    with pytest.raises(DataError) as caught:
        tune_adapter(tmp_path / "a", tune_settings(rows=30, model="no/such-model"))
    assert str(caught.value) == "--rows asks for 30 training rows, and there are 24"


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_too_long_are_refused(tune_settings, tmp_path, method):
    rows = [{"text": "warm " * n, "score": 1.0 + n / 200} for n in (1, 2, 200)]
    with pytest.raises(DataError, match="1 of 3 rows of train are longer than"):
        tune_adapter(tmp_path / "a", tune_settings(method, data={"train": rows, "dev": rows[:2]}))


@pytest.mark.parametrize(
    ("words", "changes", "ending"),
    [
        (
            120,
            {},
            "RAFT reads answers of up to 5 tokens after each, and the context of tiny-llama holds 128; leave these "
            "rows out, or take a backbone with a longer context",
        ),
        (60, {"max_length": 40}, "a larger --max-length keeps them whole"),
    ],
)
def test_raft_says_what_to_do_with_rows_that_are_too_long(tune_settings, tmp_path, words, changes, ending):
    rows = [{"text": "warm " * n, "score": 1.0} for n in (1, 2, words)]
    with pytest.raises(DataError) as caught:
        tune_adapter(tmp_path / "a", tune_settings("raft", data={"train": rows, "dev": rows[:2]}, **changes))
    assert str(caught.value).startswith("1 of 3 rows of train are longer than ")
    assert str(caught.value).endswith(ending)


@pytest.mark.parametrize(("training", "step"), [(True, 0), (False, 3)])
def test_a_loss_or_a_prediction_that_is_not_finite_ends_it(tune_settings, tmp_path, monkeypatch, training, step):
    def forward(self, hidden, mask):
        return real(self, hidden, mask) * (float("nan") if torch.is_grad_enabled() is training else 1)

    real = RegressionHead.forward
    monkeypatch.setattr(RegressionHead, "forward", forward)
    with pytest.raises(AdapterError) as caught:
        tune_adapter(tmp_path / "a", tune_settings())
    later = f"the loss was no longer finite after step {step}; tune into another folder with a lower --lr"
    first = (
        "the first loss is not finite, before any step; tune with --compute-dtype float32, or, if this is what it had, "
        "from another copy of the weights"
    )
    assert str(caught.value) == (later if step else first)


@pytest.mark.parametrize(
    ("method", "most", "sentence"),
    [
        ("lora", 10, "a single row of N tokens; use --max-length with --truncate, a smaller --compute-dtype"),
        # What raft asks stands at the end, and may not be cut.
        ("raft", 10, "a single row of N tokens; use a smaller --compute-dtype"),
        ("lora", 0, "N tokens beside the LLM's weights; use a smaller --compute-dtype"),
        ("raft", 0, "N tokens beside the LLM's weights; use a smaller --compute-dtype"),
    ],
)
def test_memory_that_runs_out_is_said(tune_settings, tmp_path, monkeypatch, method, most, sentence):
    def forward(self, *given, input_ids, **options):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *given, input_ids=input_ids, **options)

    real = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(BackboneError) as caught:
        tune_adapter(tmp_path / "a", tune_settings(method))
    assert re.sub(r"\b\d+ tokens|ten tokens", "N tokens", str(caught.value)) == (
        f"out of memory on {sentence}, or a device with more memory"
    )


def test_memory_that_runs_out_on_moving_the_weights_is_said(tune_settings, tmp_path, monkeypatch):
    def step(_self, *_given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(BackboneError) as caught:
        tune_adapter(tmp_path / "a", tune_settings())
    assert str(caught.value) == (
        "out of memory on moving the adapter's weights after step 0; use a smaller --compute-dtype or --rank, or a "
        "device with more memory"
    )
