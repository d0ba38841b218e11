import csv

import numpy as np
import pytest
import torch

from relish.cache.reader import open_cache
from relish.cache.writer import cut_into_shards
from relish.evaluate.assets import rated_tweets
from relish.extract.backbone import Backbone
from relish.extract.files import find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.sources import load_texts

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def direct(gguf):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    return tokenizer, AutoModel.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cached_states_equal_a_direct_forward_of_each_row_alone(gguf, direct, tmp_path, dtype):
    rows = [{"text": text, "score": score} for text, score in rated_tweets()[:12]]
    settings = ExtractSettings(
        model=gguf, data={"train": rows}, prompt="Tweet: {text}", label_range=(-4, 4), layers=(10, 1.0), dtype=dtype
    )
    extract_cache(tmp_path / "cache", settings)
    tokenizer, model = direct
    for layer in (10, 30):
        split = open_cache(tmp_path / "cache").split("train", layer=layer)
        for number, row in enumerate(rows):
            inputs = tokenizer(f"Tweet: {row['text']}", return_tensors="pt")
            with torch.inference_mode():
                states = model(**inputs, output_hidden_states=True).hidden_states[layer]
            cached = split.read([number]).hidden
            assert np.array_equal(split.input_ids(number), inputs["input_ids"][0])
            # One bfloat16 step is 2⁻⁸ of the value; float32 leaves only the rounding of another batch shape.
            rtol, atol = (2**-8, 1e-2) if dtype == "bfloat16" else (1e-4, 1e-3)
            torch.testing.assert_close(cached.float(), states, rtol=rtol, atol=atol)


def test_padding_overhead_of_the_papers_data_sets_is_at_most_1_05(folder, shared_data):
    backbone = Backbone(
        find_backbone(folder, gguf_file=None, revision=None),
        layers=(),
        compute_dtype="float32",
        device="cpu",
        trust_remote_code=False,
    )
    files = {
        "stsb": shared_data / "stsb/train.csv",
        "sick": shared_data / "sick/test.tsv",
        **{f"wmt-{pair}": shared_data / f"wmt-mlqe-pe/{pair}/dev.tsv" for pair in ("en-zh", "ru-en", "si-en")},
    }
    for task, path in files.items():
        texts = load_texts(ExtractSettings(model=folder, task=task, data={"s": path}), None).splits["s"].texts
        tokens, _ = backbone.tokenize(texts, chat_template=False, max_length=8192, truncate=False)
        lengths = np.array([len(row) for row in tokens])
        shards = cut_into_shards(lengths, 4096)
        overhead = sum(len(shard) * lengths[shard].max() for shard in shards) / lengths.sum()
        assert overhead <= 1.05, task
        assert len(shards) < 60, task


def test_the_readers_see_the_same_rows_as_a_csv_module(shared_data):
    with (shared_data / "stsb/test.csv").open(encoding="utf-8", newline="") as file:
        expected = [row["sentence1"] for row in csv.DictReader(file)]
    settings = ExtractSettings(model="unused", task="stsb", data={"test": shared_data / "stsb/test.csv"})
    texts = load_texts(settings, None).splits["test"].texts
    assert all(sentence in text for sentence, text in zip(expected, texts, strict=True))
