import csv

import numpy as np
import pytest
import torch

from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.readouts import load_readouts
from relish.evaluate.readouts import readout_cells
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings

pytestmark = pytest.mark.real


def rows(path, count):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[:count]


def test_an_llm_is_asked_about_sentence_pairs(folder, shared_data, tmp_path):
    data = {"train": rows(shared_data / "stsb/train.csv", 40), "test": rows(shared_data / "stsb/test.csv", 20)}
    settings = ExtractSettings(
        model=folder, task="stsb", data=data, layers=(1,), readouts=("greedy", "samples", "candidates"), shots=(0, 8)
    )
    extract_cache(tmp_path / "c", settings)
    found, wrong = load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "test")
    assert wrong == []
    assert [one.shots_used for one in found] == [0, 0, 0, 8, 8, 8]
    of = {one.name: one for one in found}
    numbers = sum(any(letter.isdigit() for letter in answer) for answer in of["greedy-8shot"].answers)
    assert numbers == 20  # it has seen how to answer

    # The likeliest candidate's probability by transformers alone, text in and out, without a cache.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pair = data["test"][0]
    prompt = (
        "How similar in meaning are these two sentences, on a scale from 0 to 5?\n"
        f"Sentence 1: {pair['sentence1']}\nSentence 2: {pair['sentence2']}\nScore:"
    )
    for score, text in enumerate(("0", "0.1", "0.2", "0.3")):
        begin = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {text}\n", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(log_p[place - 1, ids[0, place]].item() for place in range(begin, ids.shape[1]))
        assert of["candidates-0shot"].answers[0][score] == pytest.approx(expected, abs=1e-3)

    # It expects an answer as the examples have it: most of its probability is on the candidates.
    mass = np.exp(of["candidates-8shot"].answers).sum(axis=1)
    assert mass.mean() > 0.5

    cache = open_cache(tmp_path / "c")
    cells, _ = readout_cells(cache, cache.split("test"))
    assert all(np.isfinite(cell.values).all() for cell in cells)
    for cell in cells:
        print(cell.head, np.corrcoef(cell.values, cache.split("test").target)[0, 1].round(3), cell.answers)
