"""The head that is trained with an adapter: in a cache's hidden states, and as a readout."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from relish.cache.errors import AdapterError, DataError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.readouts import load_readouts, part_files
from relish.extract import regression
from relish.extract.adapter import read_adapter
from relish.extract.pipeline import extract_cache
from relish.extract.regression import RegressionHead, load_regression_head
from relish.extract.settings import ExtractSettings

RANGE = (0.0, 5.0)
PROMPT = "Rate: {text}\nScore:"


def test_the_head_reads_the_last_real_token():
    head = RegressionHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([1.0, 10.0]))
        head.bias.fill_(0.5)
    head.mean.fill_(3.0)
    head.std.fill_(2.0)
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # Rows end in (2, 3) and (10, 11): 2 + 30 + 0.5 and 10 + 110 + 0.5, times 2, plus 3.
    assert head(hidden, mask).tolist() == [68.0, 244.0]


def test_the_saved_head_gives_the_validation_figures_from_a_cache(tuned, tiny_model, tiny_rows, tmp_path):
    """What was measured while tuning comes out again from the hidden states of the merged backbone."""
    adapter = read_adapter(tuned("lora"))
    settings = ExtractSettings(
        model=tiny_model("llama"),
        adapter=adapter.folder,
        data={"dev": tiny_rows(8, 1)},
        prompt=PROMPT,
        label_range=RANGE,
        device="cpu",
        dtype="float32",
    )
    extract_cache(tmp_path / "c", settings)
    split = open_cache(tmp_path / "c").split("dev")
    head, _ = load_regression_head(adapter)
    with torch.no_grad():
        predictions = head(*split.read(list(range(8)))).double().numpy()
    nrmse = np.sqrt(np.mean((predictions - split.target) ** 2)) / 5
    assert nrmse == pytest.approx(adapter.tuned["val"]["nrmse"], rel=1e-4)
    assert np.corrcoef(predictions, split.target)[0, 1] == pytest.approx(adapter.tuned["val"]["pearson"], rel=1e-3)


@pytest.mark.parametrize("trees", [True, False])
def test_the_saved_heads_readout_gives_the_validation_figures(
    tuned, tiny_model, tiny_rows, tmp_path, monkeypatch, trees
):
    monkeypatch.setattr("relish.cache.readouts.PART_ROWS", 3)
    if not trees:
        monkeypatch.setattr(regression, "takes_trees", lambda _model: False)
    adapter = read_adapter(tuned("lora"))
    rows = tiny_rows(8, 1)
    settings = ExtractSettings(
        model=tiny_model("llama"),
        adapter=adapter.folder,
        data={"dev": rows, "train": tiny_rows(4, 2)},
        prompt=PROMPT,
        label_range=RANGE,
        device="cpu",
        readouts=("regression",),
    )
    summary = extract_cache(tmp_path / "c", settings)
    assert [(one.name, one.rows, one.computed) for one in summary.readouts] == [("regression-0shot", 8, 8)]
    (readout,), wrong = load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "dev")
    assert (wrong, readout.settings) == ([], {"head": adapter.tuned["sha256_of_head"]})
    predictions, target = np.array(readout.answers), np.array([row["score"] for row in rows])
    assert np.sqrt(np.mean((predictions - target) ** 2)) / 5 == pytest.approx(adapter.tuned["val"]["nrmse"], rel=1e-4)
    assert np.corrcoef(predictions, target)[0, 1] == pytest.approx(adapter.tuned["val"]["pearson"], rel=1e-3)
    part_files(tmp_path / "c")[1].unlink()
    again = extract_cache(tmp_path / "c", replace(settings, readouts=("greedy", "regression"), shots=(0, 1)))
    assert [(one.name, one.computed) for one in again.readouts] == [
        ("greedy-0shot", 8),
        ("greedy-1shot", 8),
        ("regression-0shot", 3),
    ]
    found = {one.name: one for one in load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "dev")[0]}
    assert found["regression-0shot"].answers == readout.answers


def test_a_cut_text_has_a_prediction_and_no_answer(tuned, tiny_model, tiny_rows, tmp_path):
    settings = ExtractSettings(
        model=tiny_model("llama"),
        adapter=tuned("lora"),
        data={"dev": tiny_rows(8, 1)},
        prompt=PROMPT,
        label_range=RANGE,
        device="cpu",
        max_length=6,
        truncate=True,
        dtype="float32",
        readouts=("regression",),
    )
    extract_cache(tmp_path / "c", settings)
    (readout,), _ = load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "dev")
    split = open_cache(tmp_path / "c").split("dev")
    with torch.no_grad():
        expected = load_regression_head(read_adapter(tuned("lora")))[0](*split.read(list(range(8))))
    assert split.read([0])[0].shape[1] == 6
    with pytest.raises(DataError, match="8 rows of dev are cut by --truncate"):
        extract_cache(tmp_path / "c", replace(settings, readouts=("greedy",)))
    np.testing.assert_allclose(readout.answers, expected.numpy(), atol=1e-4)


def test_an_adapter_without_a_head_predicts_nothing(tuned, tiny_model, tiny_rows, tmp_path):
    fixed = {"model": tiny_model("llama"), "data": {"dev": tiny_rows(8, 1)}, "prompt": PROMPT, "label_range": RANGE}
    with pytest.raises(AdapterError, match="raft-llama has no regression head; relish tune --method lora makes one"):
        extract_cache(tmp_path / "c", ExtractSettings(**fixed, adapter=tuned("raft"), readouts=("regression",)))
    assert not (tmp_path / "c").exists()


def test_a_head_that_is_not_there_or_damaged_is_named(tuned, tmp_path):
    import shutil

    with pytest.raises(AdapterError) as caught:
        load_regression_head(read_adapter(tuned("raft")))
    assert str(caught.value) == ("the adapter raft-llama has no regression head; relish tune --method lora makes one")
    folder = shutil.copytree(tuned("lora"), tmp_path / "a")
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        AdapterError, match="is damaged: it is not the file that was saved; restore it from a copy, or tune"
    ):
        load_regression_head(read_adapter(folder))
    path.unlink()
    with pytest.raises(
        AdapterError,
        match=r"head.safetensors cannot be read \(.*\); restore it from a copy, or tune again into another",
    ):
        load_regression_head(read_adapter(folder))
