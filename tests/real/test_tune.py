import json
from itertools import islice

import pytest
import torch
from typer.testing import CliRunner

from relish.cache.reader import open_cache
from relish.cli import app
from relish.extract.adapter import read_adapter, read_tuned

pytestmark = pytest.mark.real


def relish(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("method", ["lora", "raft"])
def test_a_real_llm_is_tuned_and_its_states_are_pefts(method, folder, shared_data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = []
    for split, count in (("train", 32), ("dev", 8)):
        with (shared_data / f"stsb/{split}.csv").open(encoding="utf-8", newline="") as file:
            (tmp_path / f"{split}.csv").write_text("".join(islice(file, count + 1)), encoding="utf-8", newline="")
        data += ["--data", f"{split}={tmp_path / split}.csv"]
    adapter = tmp_path / "adapter"
    words = ("tune", adapter, "--model", folder, "--task", "stsb", *data, "--method", method, "--epochs", "1")
    summary = json.loads(relish(*words, "--batch-size", "8", "--device", "cpu", "--json").stdout)
    assert 0 < summary["val"]["nrmse"] < 1
    # r · (in + out) of the seven linear layers in each of 30 blocks of width 576: q, o; k, v; gate, up, down.
    per_block = 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert summary["trainable_parameters"] == 30 * per_block + (577 if method == "lora" else 0)
    assert summary["backbone_parameters"] == 134_515_008
    assert "lm_head" not in " ".join(read_adapter(adapter).config["target_modules"])
    assert read_tuned(adapter)["base"]["model"] == folder.name

    cache = tmp_path / "cache"
    relish(
        *("extract", cache, "--model", folder, "--task", "stsb", "--data", f"dev={tmp_path / 'dev.csv'}"),
        *("--layers", "15,last", "--dtype", "float32", "--adapter", adapter, "--device", "cpu"),
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    for layer in (15, 30):
        split = open_cache(cache).split("dev", layer=layer)
        for row in range(2):
            ids = torch.from_numpy(split.input_ids(row).astype("int64"))[None]
            with torch.inference_mode():
                states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
            torch.testing.assert_close(split.read([row]).hidden, states, rtol=1e-4, atol=1e-3)


def test_the_gguf_itself_is_tuned(gguf, shared_data, tmp_path):
    with (shared_data / "stsb/train.csv").open(encoding="utf-8", newline="") as file:
        (tmp_path / "train.csv").write_text("".join(islice(file, 13)), encoding="utf-8", newline="")
    adapter = tmp_path / "adapter"
    words = ("tune", adapter, "--model", gguf, "--task", "stsb", "--data", f"train={tmp_path / 'train.csv'}")
    relish(*words, "--method", "lora", "--epochs", "1", "--batch-size", "4", "--device", "cpu")
    assert read_adapter(adapter).config["base_model_name_or_path"] == gguf.name
