import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relish.cache.errors import BackboneError
from relish.extract import candidates, generator
from relish.extract.backbone import Backbone
from relish.extract.candidates import answer_ids, candidate_scores, format_score
from relish.extract.files import find_backbone
from relish.extract.generator import NEW_TOKENS, Generator, refuse_encoder
from relish.extract.start import common_prefix
from relish.extract.tree import read_prefix, tree_logits

CAUSAL = ("llama", "qwen3", "gemma3", "gpt2")
HEAD = "a film so moving and a play so stale\nScore: 3.5\n\n"
TEXTS = [
    f"{HEAD}a film so warm\nScore:",
    f"{HEAD}a play so dull, clumsy, noisy and bleak\nScore:",
    f"{HEAD}fresh\nScore:",
    f"{HEAD}a film so bright and moving: 句子",
]


def open_backbone(folder):
    files = find_backbone(folder, gguf_file=None, revision=None)
    return Backbone(files, layers=(), compute_dtype="float32", device="cpu", trust_remote_code=False)


@cache
def make(folder):
    backbone = open_backbone(folder)
    return Generator(backbone), backbone.encode(TEXTS, special_tokens=True), backbone.tokenizer


def split_at(made, shared):
    """The prefix, read, and the rows without it."""
    rows = made[1]
    return made[0].read_prefix(rows[0][:shared]), [row[shared:] for row in rows]


def answer_by_hand(made, row, draws=(None,) * NEW_TOKENS):
    """One answer to one row, no cache, the whole sequence again for each token.

    The likeliest token each time; with draws, the one in which a draw falls in the cumulative distribution.
    """
    one, _, tokenizer = made
    ids, new = torch.from_numpy(row.astype(np.int64))[None], []
    with torch.inference_mode():
        for draw in draws:
            logits = one.model(input_ids=ids).logits[0, -1].double().numpy()
            p = np.exp(logits - logits.max())
            drawn = logits.argmax() if draw is None else np.searchsorted(np.cumsum(p / p.sum()), draw, side="right")
            new.append(int(drawn))
            text = tokenizer.decode(new, skip_special_tokens=True)
            if "\n" in text.lstrip() or new[-1] == tokenizer.eos_token_id:
                break
            if text.strip() and new[-1] in tokenizer.all_special_ids:
                break
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return tokenizer.decode(new, skip_special_tokens=True).lstrip().split("\n")[0].rstrip()


def uniform(rows, samples=5, seed=0):
    return np.stack([np.random.default_rng((seed, row)).random((samples, NEW_TOKENS)) for row in range(rows)])


def grid(tokenizer):
    return [answer_ids(tokenizer, TEXTS[0], format_score(y, (0, 5))) for y in candidate_scores((0, 5))]


@pytest.mark.parametrize("arch", CAUSAL)
def test_greedy_answers_are_those_of_each_row_alone_without_any_cache(tiny_model, arch):
    made = make(tiny_model(arch))
    shared = common_prefix(made[1])
    assert shared > 15
    prefix, rows = split_at(made, shared)
    expected = [answer_by_hand(made, row) for row in made[1]]
    assert made[0].greedy(rows, prefix) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("arch", CAUSAL)
@pytest.mark.parametrize("shared", [0, 1, None])
def test_reading_the_common_beginning_once_changes_no_answer(tiny_model, arch, shared):
    made = make(tiny_model(arch))
    one, whole, tokenizer = made
    prefix, rows = split_at(made, common_prefix(whole) if shared is None else shared)
    nothing = one.read_prefix(whole[0][:0])
    assert one.greedy(rows, prefix) == one.greedy(whole, nothing)
    assert one.samples(rows, prefix, uniform(4)) == one.samples(whole, nothing, uniform(4))
    found, expected = (one.candidates(*given, grid(tokenizer)) for given in ((rows, prefix), (whole, nothing)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_states_after_a_beginning_read_before_are_those_of_the_whole_row(tiny_model, arch):
    made = make(tiny_model(arch))
    shared = common_prefix(made[1])
    prefix, rows = split_at(made, shared)
    for whole, row in zip(made[1], rows, strict=True):
        with torch.inference_mode():
            alone = made[0].model(input_ids=torch.from_numpy(whole.astype(np.int64))[None]).logits[0, shared:]
            step = generator.Tokens.of(row, position=np.arange(shared, len(whole)), row=0, branches=1)
            got = tree_logits(made[0].model, step, range(len(row)), seen=prefix.fork())
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_batch_mates_change_no_answer(tiny_model, arch):
    made = make(tiny_model(arch))
    prefix, rows = split_at(made, common_prefix(made[1]))
    one, _, tokenizer = made
    draws = uniform(4)
    assert one.greedy(rows, prefix) == [one.greedy([row], prefix)[0] for row in rows]
    alone = [one.samples([row], prefix, draws[n : n + 1])[0] for n, row in enumerate(rows)]
    assert one.samples(rows, prefix, draws) == alone
    assert one.samples(rows[::-1], prefix, draws[::-1]) == alone[::-1]
    scores = [one.candidates([row], prefix, grid(tokenizer))[0] for row in rows]
    np.testing.assert_allclose(one.candidates(rows, prefix, grid(tokenizer)), scores, rtol=1e-5, atol=1e-5)


def test_a_batch_leaves_the_beginning_as_it_was(tiny_model):
    made = make(tiny_model("llama"))
    prefix, rows = split_at(made, common_prefix(made[1]))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.past.layers]
    first = made[0].samples(rows, prefix, uniform(4))
    made[0].greedy(rows, prefix)
    assert prefix.length == common_prefix(made[1])
    for (keys, values), layer in zip(before, prefix.past.layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)
    assert made[0].samples(rows, prefix, uniform(4)) == first


def test_architectures_that_cannot_take_trees_give_the_same_answers(tiny_model, monkeypatch):
    made = make(tiny_model("llama"))
    one, _, tokenizer = made
    prefix, rows = split_at(made, common_prefix(made[1]))

    def answers():
        return one.greedy(rows, prefix), one.samples(rows, prefix, uniform(4, 2)), one.candidates(
            rows, prefix, grid(tokenizer)
        )  # fmt: skip

    expected = answers()
    for module in (generator, candidates):
        monkeypatch.setattr(module, "takes_trees", lambda _model: False)
    got = answers()
    assert got[:2] == expected[:2]
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5, atol=1e-5)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, float("-inf"), 2.0]])
    p = logits.softmax(-1)[0].double()
    draws = torch.linspace(0, 1, 20001, dtype=torch.float64)[:-1]
    drawn = generator._draw(logits.expand(20000, 5), draws)
    share = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(share.double(), p, rtol=0, atol=2e-4)
    assert generator._draw(logits, torch.tensor([1.0 - 1e-17], dtype=torch.float64)) == 4
    assert share[3] == 0


@pytest.mark.parametrize("arch", CAUSAL)
def test_samples_are_those_of_a_plain_loop(tiny_model, arch):
    made = make(tiny_model(arch))
    prefix, rows = split_at(made, common_prefix(made[1]))
    draws = uniform(len(rows))
    expected = [[answer_by_hand(made, row, own) for own in lines] for row, lines in zip(made[1], draws, strict=True)]
    assert made[0].samples(rows, prefix, draws) == expected


def test_different_rows_and_samples_have_draws_of_their_own(tiny_model):
    made = make(tiny_model("llama"))
    prefix, rows = split_at(made, common_prefix(made[1]))
    found = made[0].samples(rows, prefix, uniform(4, 16))
    assert {len(answers) for answers in found} == {16}
    assert all(len(set(answers)) > 8 for answers in found)


def test_samples_that_are_the_same_so_far_are_read_once(tiny_model, monkeypatch):
    """Two that share all draws, one that shares the first three, and one that shares none."""
    made = make(tiny_model("llama"))
    prefix, rows = split_at(made, common_prefix(made[1]))
    draws = uniform(4, 4, seed=2)  # without a special token among the first nine, which would end an answer
    draws[:, 1] = draws[:, 0]
    draws[:, 2, :3] = draws[:, 0, :3]
    real, read = generator.tree_logits, []
    monkeypatch.setattr(
        generator,
        "tree_logits",
        lambda model, tokens, keep, **more: read.append(len(tokens.ids)) or real(model, tokens, keep, **more),
    )
    found = made[0].samples(rows, prefix, draws)
    assert read[1:4] == [8, 8, 8]
    assert set(read[4:9]) == {12}
    for branch in range(4):
        alone = made[0].samples(rows, prefix, draws[:, branch : branch + 1])
        assert [answers[branch] for answers in found] == [answers[0] for answers in alone]


class Scripted:
    """An LLM that says given tokens, whatever it reads."""

    def __init__(self, tokenizer, text):
        self.tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.said = 0

    def __call__(self, _model, _tokens, keep, **_):
        logits = torch.zeros(len(list(keep)), 400)
        logits[:, self.tokens[self.said]] = 1
        self.said += 1
        return logits


@pytest.mark.parametrize(
    ("says", "heard", "steps"),
    [
        (" 3.5\n\nNext:", " 3.5\n", None),
        ("\n\n 4\nand more", "\n\n 4\n", None),
        ("4</s> and more", "4</s>", None),
        ("4<s>5", "4<s>", None),
        ("<s>4\n", "<s>4\n", None),
        ("\n<s>4\n", "\n<s>4\n", None),
        ("12345678901234567890", None, NEW_TOKENS),
    ],
)
def test_an_answer_is_its_first_line_and_ends_there(tiny_model, monkeypatch, says, heard, steps):
    one, whole, tokenizer = make(tiny_model("llama"))
    script = Scripted(tokenizer, says)
    monkeypatch.setattr(generator, "tree_logits", script)
    (answer,) = one.greedy(whole[:1], one.read_prefix(whole[0][:0]))
    if steps is None:
        assert answer == re.sub("</?s>", "", heard).strip()
        assert script.said == len(tokenizer(heard, add_special_tokens=False)["input_ids"])
    else:
        assert script.said == steps
        assert answer == tokenizer.decode(script.tokens[:steps])


def test_nan_is_an_error_and_not_an_answer(tiny_model, monkeypatch):
    one, whole, tokenizer = make(tiny_model("llama"))
    monkeypatch.setattr(generator, "tree_logits", lambda *_, **__: torch.full((1, 400), torch.nan))
    nothing = one.read_prefix(whole[0][:0])
    message = "tiny-llama gives NaN or infinity in float32; try another copy of the weights"
    with pytest.raises(BackboneError, match=message):
        one.greedy(whole[:1], nothing)
    monkeypatch.setattr(generator, "score_candidates", lambda *_, **__: torch.full((1, 11), torch.nan))
    with pytest.raises(BackboneError, match=message):
        one.candidates(whole[:1], nothing, grid(tokenizer))


@pytest.mark.parametrize("kind", ["bert", "t5_gemma_of_tomorrow"])
def test_an_llm_that_cannot_answer_is_refused(tiny_model, kind):
    backbone = open_backbone(tiny_model("bert"))
    backbone.config = SimpleNamespace(model_type=kind)
    with pytest.raises(BackboneError, match=rf"tiny-bert is an encoder \({kind}\), which answers nothing"):
        refuse_encoder(backbone)
    backbone.config = SimpleNamespace(model_type="x", auto_map={"AutoModelForCausalLM": "x.X"})
    refuse_encoder(backbone)


def test_an_empty_beginning_costs_no_pass(tiny_model):
    one, whole, _ = make(tiny_model("llama"))
    calls = []
    handle = one.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        read_prefix(one.model, whole[0][:0])
    finally:
        handle.remove()
    assert calls == []


def test_a_beginning_that_does_not_fit_the_memory_is_told(tiny_model, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(generator, "read_prefix", fail)
    with pytest.raises(
        BackboneError, match="^out of memory on the 7 tokens that all prompts begin with; use fewer --shots"
    ):
        make(tiny_model("llama"))[0].read_prefix(np.arange(7))
