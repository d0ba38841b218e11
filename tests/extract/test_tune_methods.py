from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relish.cache.errors import AdapterError
from relish.cache.manifest import load_manifest
from relish.cache.readouts import load_readouts
from relish.extract import regression, tune_methods
from relish.extract.adapter import read_adapter
from relish.extract.backbone import Backbone
from relish.extract.batches import Budget
from relish.extract.files import find_backbone
from relish.extract.pipeline import extract_cache
from relish.extract.settings import ExtractSettings
from relish.extract.start import common_prefix
from relish.extract.tree import takes_trees
from relish.extract.tune_loop import _take_step
from relish.extract.tune_lora import add_adapter
from relish.extract.tune_methods import (
    Answers,
    Method,
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
    log_p = torch.nn.Parameter(torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.25, 0.25]]).log())
    monkeypatch.setattr(tune_methods, "score_candidates", lambda *_, **__: log_p)
    monkeypatch.setattr(tune_methods, "takes_trees", lambda _: True)
    backbone = SimpleNamespace(pad_token=lambda _: 0, device=torch.device("cpu"))
    answers = Answers(None, [0.0, 2.5, 5.0], [])  # type: ignore[arg-type]
    method = raft_method(None, backbone, answers, RANGE)  # type: ignore[arg-type]
    rows = [np.array([1]), np.array([2])]
    torch.testing.assert_close(method.predict(rows), torch.tensor([2.0, 1.875]))
    state = TuneState({"log_p": log_p}, torch.optim.AdamW([log_p]))
    loss = _take_step(method, state, rows, torch.tensor([3.0, 1.0]), loss="mse", budget=Budget(512))
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


# A step in several passes


def methods_of(backbone, model):
    answers = Answers.over(RANGE, backbone=backbone, prompt=PROMPT, chat_template=False)
    lora = regression_method(model, backbone, np.array([1.0, 4.0]))
    with torch.no_grad():
        lora.head.weight.copy_(torch.linspace(-1, 1, 32))
    return {"lora": lora, "raft": raft_method(model, backbone, answers, RANGE)}


def gradients_of_a_step(method, parameters, rows, slots):
    """Loss and clipped gradients; a learning rate of 0 leaves the weights."""
    state = TuneState(parameters, torch.optim.AdamW(list(parameters.values()), lr=0.0, weight_decay=0.0))
    target = torch.tensor([0.5, 4.0, 2.0, 5.0])
    loss = _take_step(method, state, rows, target, loss="huber", budget=Budget(slots))
    return loss, [parameter.grad.clone() for parameter in parameters.values()]


@pytest.mark.parametrize("name", ["lora", "raft"])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_a_step_is_the_same_in_any_number_of_passes(adapted, tiny_rows, arch, name):
    backbone, model, parameters = adapted(arch)
    method, rows = methods_of(backbone, model)[name], rows_of(backbone, tiny_rows)
    passes = []

    def counted(some):
        passes.append(len(some))
        return method.predict(some)

    found = [gradients_of_a_step(replace(method, predict=counted), parameters, rows, slots) for slots in (4096, 1)]
    assert passes == [4, 1, 1, 1, 1]
    # A pass holds so many rows as have that many tokens without what they begin with.
    passes.clear()
    own = max(map(len, rows)) - common_prefix(rows) + method.more
    gradients_of_a_step(replace(method, predict=counted), parameters, rows, 2 * own)
    assert passes[0] == 2
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_pass_that_does_not_fit_the_memory_is_halved_and_leaves_no_gradient(adapted, tiny_rows):
    """Memory runs out in the middle of going backward, when the first gradients are there already."""
    backbone, model, parameters = adapted("llama")
    method, rows = methods_of(backbone, model)["lora"], rows_of(backbone, tiny_rows)
    expected = gradients_of_a_step(method, parameters, rows, 4096)
    tried = []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            ctx.rows = len(states)
            return states.clone()

        @staticmethod
        def backward(ctx, *gradients):
            tried.append(ctx.rows)
            if ctx.rows > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return gradients[0]

    def predict(some):
        # Made first, so that going backward comes to it last.
        full = Full.apply(last.expand(len(some))) * 0
        return method.predict(some) + full

    last = torch.zeros((), requires_grad=True)
    got = gradients_of_a_step(replace(method, predict=predict), {**parameters, "last": last}, rows, 4096)
    assert tried == [4, 2, 2]
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_the_regression_reads_what_all_rows_begin_with_once(adapted, tiny_rows, monkeypatch, arch):
    """The same as padded rows, in values and gradients, in fewer tokens than they have together."""
    backbone, model, parameters = adapted(arch)
    method, rows = methods_of(backbone, model)["lora"], rows_of(backbone, tiny_rows)
    read = []
    real = regression.tree_states
    monkeypatch.setattr(
        regression, "tree_states", lambda body, tokens, keep: read.append(len(tokens.ids)) or real(body, tokens, keep)
    )
    ours = method.predict(rows)
    shared = common_prefix(rows)
    assert shared > 1
    assert read == [sum(map(len, rows)) - 3 * shared]
    theirs = method.head(*backbone.last_states(model.base_model, rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(scores.square().sum(), list(parameters.values())) for scores in (ours, theirs)]
    scale = max(gradient.abs().max().item() for gradient in gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_an_architecture_that_cannot_take_trees_is_padded(adapted, tiny_rows, monkeypatch):
    backbone, model, _ = adapted("llama")
    method, rows = methods_of(backbone, model)["lora"], rows_of(backbone, tiny_rows)
    expected = method.predict(rows)
    monkeypatch.setattr(regression, "takes_trees", lambda _model: False)
    torch.testing.assert_close(method.predict(rows), expected, rtol=1e-5, atol=1e-5)


# The method lora


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
    rows = [np.array([1])] * 2
    losses = {}
    for loss in ("huber", "mse"):
        prediction = torch.nn.Parameter(torch.tensor([1.0, 6.0]))
        method = Method(lambda _, prediction=prediction: prediction * 1, unit=2.0)
        state = TuneState({"w": prediction}, torch.optim.AdamW([prediction]))
        losses[loss] = _take_step(method, state, rows, torch.tensor([2.0, 2.0]), loss=loss, budget=Budget(512))
    # Errors of -0.5 and 2 deviations.
    assert losses == {"huber": pytest.approx((0.125 + 1.5) / 2), "mse": pytest.approx((0.25 + 4) / 2)}


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


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    states = []
    for name in ("old", "new"):
        weights = {key: torch.nn.Parameter(torch.ones(2)) for key in (name, "same")}
        states.append(TuneState(weights, torch.optim.AdamW(list(weights.values()))))
    states[0].save(tmp_path / "checkpoint", {})
    with pytest.raises(
        AdapterError, match=r"is of other weights \(new is on one side alone\).*delete .* and tune again"
    ):
        states[1].load(tmp_path / "checkpoint")
    states[0].load(tmp_path / "checkpoint")
