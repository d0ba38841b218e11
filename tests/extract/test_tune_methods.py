from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relish.cache.errors import AdapterError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.readouts import load_readouts
from relish.extract import tune_methods
from relish.extract.adapter import read_adapter
from relish.extract.backbone import Backbone
from relish.extract.files import find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.tree import takes_trees
from relish.extract.tune import add_adapter
from relish.extract.tune_loop import _take_step
from relish.extract.tune_methods import (
    Answers,
    Method,
    RegressionHead,
    load_regression_head,
    raft_method,
    regression_method,
)
from relish.extract.tune_state import TuneState

RANGE = (0.0, 5.0)
PROMPT = "Rate: {text}\nScore:"


def open_backbone(folder):
    files = find_backbone(folder, gguf_file=None, revision=None)
    return Backbone(files, layers=(), compute_dtype="float32", device="cpu", trust_remote_code=False)


@pytest.fixture
def adapted(tiny_model, tune_settings):
    """`adapted("llama")`: backbone, causal LM with an adapter of random weights, and that adapter's weights."""
    import peft

    def make(arch):
        backbone = open_backbone(tiny_model(arch))
        model = backbone.place(backbone.read_model("AutoModelForCausalLM"))
        wrapped = add_adapter(peft, model, tune_settings())
        parameters = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in parameters.values():
                value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
        wrapped.eval()
        return backbone, model, parameters

    return make


def rows_of(backbone, tiny_rows, count=4):
    texts = [PROMPT.format(text=row["text"]) for row in tiny_rows(count)]
    return backbone.tokenize(texts, chat_template=False, max_length=128, truncate=False)[0]


# RAFT


def test_raft_by_hand(monkeypatch):
    """Σ p(c) · c: 0.2 · 2.5 + 0.3 · 5 = 2 and 0.25 · 2.5 + 0.25 · 5 = 1.875; not divided by the sum of p, 0.6 and 1.

    Against 3 and 1 on a range of 5: ((1 / 5)² + (0.875 / 5)²) / 2 = 0.0353125.
    """
    log_p = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.25, 0.25]]).log().requires_grad_()
    monkeypatch.setattr(tune_methods, "score_candidates", lambda *_, **__: log_p)
    backbone = SimpleNamespace(pad_token=lambda _: 0, device=torch.device("cpu"))
    answers = Answers(None, [0.0, 2.5, 5.0], [])  # type: ignore[arg-type]
    method = raft_method(None, backbone, answers, RANGE)  # type: ignore[arg-type]
    rows = [np.array([1]), np.array([2])]
    torch.testing.assert_close(method.predict(rows), torch.tensor([2.0, 1.875]))
    weight = torch.nn.Parameter(torch.zeros(1))
    state = TuneState({"w": weight}, torch.optim.AdamW([weight]))
    loss = _take_step(method, state, rows, torch.tensor([3.0, 1.0]), loss="mse")
    assert loss == pytest.approx(0.0353125)
    # d loss / d log p(c) = 2 · (ŷ − y) / 25 / 2 · c · p(c)
    expected = [[-1 / 25 * c * p for c, p in ((0, 0.1), (2.5, 0.2), (5, 0.3))]]
    expected += [[0.875 / 25 * c * p for c, p in ((0, 0.5), (2.5, 0.25), (5, 0.25))]]
    torch.testing.assert_close(log_p.grad, torch.tensor(expected))


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2"])
def test_raft_equals_each_candidate_scored_alone_in_values_and_gradients(adapted, tiny_rows, arch):
    backbone, model, parameters = adapted(arch)
    assert takes_trees(model)
    answers = Answers.over(RANGE, backbone=backbone, prompt=PROMPT, chat_template=False)
    assert len(answers.values) == 11
    rows = rows_of(backbone, tiny_rows)
    target = torch.tensor([0.5, 4.0, 2.0, 5.0])

    predictions = raft_method(model, backbone, answers, RANGE).predict(rows)
    loss = ((predictions - target) / 5).square().mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))

    plain = []
    for row in rows:
        expected = torch.zeros(())
        for value, answer in zip(answers.values, answers.tokens, strict=True):
            ids = torch.tensor([*row.tolist(), *answer.tolist()])
            log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            score = sum(log_p[len(row) + n - 1, token] for n, token in enumerate(answer.tolist()))
            expected = expected + value * torch.exp(score)
        plain.append(expected)
    plain_loss = ((torch.stack(plain) - target) / 5).square().mean()
    plain_gradients = torch.autograd.grad(plain_loss, list(parameters.values()))

    # A random LLM finds every number unlikely, so that all this is small.
    torch.testing.assert_close(predictions, torch.stack(plain), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    scale = max(gradient.abs().max().item() for gradient in plain_gradients)
    assert scale > 0
    for name, ours, theirs in zip(parameters, gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_a_chats_answer_ends_its_turn(tiny_model):
    backbone = open_backbone(tiny_model("llama"))
    answers = Answers.over(RANGE, backbone=backbone, prompt=PROMPT, chat_template=True)
    assert [backbone.tokenizer.decode(ids) for ids in answers.tokens[:2]] == [" 0</s>", " 0.5</s>"]
    (row,) = answers.prompts.tokens(["Rate: warm\nScore:"], 0)
    assert backbone.tokenizer.decode(row) == "<s>user: Rate: warm\nScore:</s><s>assistant:"


# The regression head


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


def test_the_first_prediction_is_the_mean_of_the_labels(adapted, tiny_rows):
    backbone, model, _ = adapted("llama")
    method = regression_method(model, backbone, np.array([1.0, 2.0, 4.0]))
    assert method.predict(rows_of(backbone, tiny_rows)).tolist() == pytest.approx([7 / 3] * 4)
    assert method.unit == pytest.approx(np.std([1.0, 2.0, 4.0]))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_batch_mates_change_nothing(adapted, tiny_rows, arch):
    backbone, model, _ = adapted(arch)
    method = regression_method(model, backbone, np.array([1.0, 2.0]))
    with torch.no_grad():
        method.head.weight.copy_(torch.linspace(-1, 1, 32))
    rows = rows_of(backbone, tiny_rows)
    assert len(set(map(len, rows))) > 1
    alone = torch.cat([method.predict([row]) for row in rows])
    torch.testing.assert_close(method.predict(rows), alone, rtol=1e-5, atol=1e-5)


def test_huber_and_mse_on_standardised_targets():
    prediction = torch.tensor([1.0, 6.0]).requires_grad_()
    method = Method(lambda _: prediction, unit=2.0)
    weight = torch.nn.Parameter(torch.zeros(1))
    rows = [np.array([1])] * 2
    losses = {}
    for loss in ("huber", "mse"):
        state = TuneState({"w": weight}, torch.optim.AdamW([weight]))
        losses[loss] = _take_step(method, state, rows, torch.tensor([2.0, 2.0]), loss=loss)
    # Errors of -0.5 and 2 deviations.
    assert losses == {"huber": pytest.approx((0.125 + 1.5) / 2), "mse": pytest.approx((0.25 + 4) / 2)}


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
    head = load_regression_head(adapter)
    with torch.no_grad():
        predictions = head(*split.read(list(range(8)))).double().numpy()
    nrmse = np.sqrt(np.mean((predictions - split.target) ** 2)) / 5
    assert nrmse == pytest.approx(adapter.tuned["val"]["nrmse"], rel=1e-4)
    assert np.corrcoef(predictions, split.target)[0, 1] == pytest.approx(adapter.tuned["val"]["pearson"], rel=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_readouts_with_the_adapter_give_rafts_validation_figures(tuned, tiny_model, tiny_rows, tmp_path, arch):
    """What was measured while tuning comes out again from the cached log-probabilities of the merged LLM."""
    adapter = read_adapter(tuned("raft", arch))
    rows = tiny_rows(8, 1)
    settings = ExtractSettings(
        model=tiny_model(arch),
        adapter=adapter.folder,
        data={"dev": rows},
        prompt=PROMPT,
        label_range=RANGE,
        device="cpu",
        readouts=("candidates",),
    )
    extract_cache(tmp_path / "c", settings)
    (readout,), wrong = load_readouts(tmp_path / "c", load_manifest(tmp_path / "c"), "dev")
    assert (wrong, readout.identity.adapter) == ([], adapter.sha256)
    predictions = np.exp(np.array(readout.answers)) @ np.array(readout.settings["candidates"])
    target = np.array([row["score"] for row in rows])
    assert np.sqrt(np.mean((predictions - target) ** 2)) / 5 == pytest.approx(adapter.tuned["val"]["nrmse"], rel=1e-4)
    assert np.corrcoef(predictions, target)[0, 1] == pytest.approx(adapter.tuned["val"]["pearson"], rel=1e-2)


def test_a_head_that_is_not_there_or_damaged_is_named(tuned, tmp_path):
    import shutil

    with pytest.raises(AdapterError) as caught:
        load_regression_head(read_adapter(tuned("raft")))
    assert str(caught.value) == ("the adapter raft-llama has no regression head; relish tune --method lora makes one")
    folder = shutil.copytree(tuned("lora"), tmp_path / "a")
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="is damaged: it is not the file that was saved; tune again"):
        load_regression_head(read_adapter(folder))
    path.unlink()
    with pytest.raises(AdapterError, match="head.safetensors cannot be read"):
        load_regression_head(read_adapter(folder))
