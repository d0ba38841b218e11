from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.extract import candidates as candidates_module
from relish.extract.candidates import answer_ids, candidate_scores, format_score, score_candidates, trained_scores
from relish.extract.tree import read_prefix, takes_trees

CAUSAL = ("llama", "qwen3", "gemma3", "gpt2")
LABELS = (0.0, 5.0)


@cache
def load(folder, attention="sdpa"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


# The grids


@pytest.mark.parametrize(
    ("label_range", "expected"),
    [
        ((0, 5), [n / 10 for n in range(51)]),
        ((1, 5), [n / 10 for n in range(10, 51)]),
        ((0, 100), [float(n) for n in range(101)]),
        ((-4, 4), [n / 10 for n in range(-40, 41)]),
        ((0, 1), [n / 100 for n in range(101)]),
        ((0, 20), [float(n) for n in range(21)]),
        ((0, 1000), [10.0 * n for n in range(101)]),
        ((0.3, 4.7), [n / 10 for n in range(3, 48)]),
        ((1.3333, 4.0), [n / 10 for n in range(13, 41)]),
    ],
)
def test_candidates_are_all_that_is_written(label_range, expected):
    assert candidate_scores(label_range) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("label_range", "expected"),
    [
        ((0, 5), [0.5 * n for n in range(11)]),
        ((1, 5), [1 + n / 5 for n in range(21)]),
        ((0, 100), [5.0 * n for n in range(21)]),
        ((-4, 4), [-4 + n / 2 for n in range(17)]),
        ((1, 6), [1 + n / 2 for n in range(11)]),
        ((0, 1), [n / 20 for n in range(21)]),
        ((0, 33), [*range(0, 33, 2), 33]),
        ((0.3, 4.7), [0.3, *(n / 2 for n in range(1, 10)), 4.7]),
        ((-0.7, 0.7), [-0.7, *(n / 10 for n in range(-6, 8))]),
        ((1.3333, 4.0), [1.3, *(n / 5 for n in range(7, 21))]),
    ],
)
def test_the_grid_of_raft_is_even_has_nice_steps_and_holds_both_ends(label_range, expected):
    assert trained_scores(label_range) == pytest.approx(expected)


RANGES = st.builds(
    lambda low, width, divisor: (low / divisor, (low + width) / divisor),
    st.integers(-1000, 1000),
    st.integers(1, 2000),
    st.sampled_from([1, 2, 10, 100]),
)


@given(RANGES, st.sampled_from([(candidate_scores, 10, 101, (1,)), (trained_scores, 8, 21, (1, 2, 5))]))
def test_a_grid_is_within_the_range_and_each_value_reads_back_as_itself(label_range, of):
    scores, fewest, most, digits = of
    grid = scores(label_range)
    assert grid == sorted(set(grid))
    assert fewest <= len(grid) <= most
    step = max(np.diff(grid))
    assert label_range[0] - step / 2 <= grid[0]
    assert grid[-1] <= label_range[1] + step / 2
    assert [float(format_score(value, label_range)) for value in grid] == grid
    inner = np.diff(grid)[1:-1]
    assert inner == pytest.approx(np.full(len(inner), step))
    digit = Fraction(repr(float(step))).limit_denominator(10**6)
    while digit >= 10:
        digit /= 10
    while digit < 1:
        digit *= 10
    assert digit in digits


@given(RANGES, st.floats(0, 1))
def test_what_an_example_answers_is_a_candidate(label_range, share):
    low, high = label_range
    label = min(max(low + share * (high - low), low), high)
    assert float(format_score(label, label_range)) in candidate_scores(label_range)


@pytest.mark.parametrize(
    ("value", "label_range", "expected"),
    [
        (3.5, (0, 5), "3.5"),
        (3.0, (0, 5), "3"),
        (3.8, (0, 5), "3.8"),
        (2.77, (1, 5), "2.8"),
        (0.04, (0, 5), "0"),
        (-0.04, (-4, 4), "0"),
        (-3.5, (-4, 4), "-3.5"),
        (67.3, (0, 100), "67"),
        (100, (0, 100), "100"),
        (0.05, (0, 1), "0.05"),
        (0.5, (0, 1), "0.5"),
        (10, (0, 20), "10"),
        (10.4, (0, 20), "10"),
        (1234, (0, 1000), "1230"),
        (-4, (-100, 0), "-4"),
    ],
)
def test_how_a_score_is_written(value, label_range, expected):
    assert format_score(value, label_range) == expected


# Answers as tokens


@pytest.mark.parametrize("arch", CAUSAL)
@pytest.mark.parametrize("end", ["\n", "\n\n", "</s>"])
def test_an_answers_tokens_are_those_after_the_prompts_and_one_end_marker(tiny_model, arch, end):
    _, tokenizer = load(tiny_model(arch))
    answers = [answer_ids(tokenizer, "a film so warm\nScore:", format_score(y, LABELS), end=end) for y in (1, 1.5, 5)]
    for ids, text in zip(answers, ("1", "1.5", "5"), strict=True):
        assert tokenizer.decode(ids) == f" {text}{end}"[: len(tokenizer.decode(ids))]
        assert tokenizer.decode(ids[:-1]) == f" {text}"
    assert answers[0][-1] == answers[1][-1]
    # No answer is the beginning of another, so that the candidates are different events.
    assert answers[0].tolist() != answers[1][: len(answers[0])].tolist()


def test_an_end_that_goes_on_is_cut_as_it_is_there(tiny_model):
    _, tokenizer = load(tiny_model("llama"))
    alone, whole = (tokenizer(f"Score: 4\n\n{more}", add_special_tokens=False)["input_ids"] for more in ("", "a film"))
    stopped = answer_ids(tokenizer, "Score:", "4", end="\n\n")
    going_on = answer_ids(tokenizer, "Score:", "4", end="\n\n", after="a film")
    assert tokenizer.decode(stopped) == " 4\n\n"  # this tokenizer has a token of both, and uses it where a text stops
    assert tokenizer.decode(going_on) == " 4\n"
    assert alone[-len(stopped) :] == stopped.tolist()
    begin = len(alone) - len(stopped)
    assert whole[begin : begin + len(going_on)] == going_on.tolist()


def test_no_space_goes_after_white_space_and_a_lead_can_be_told(tiny_model):
    _, tokenizer = load(tiny_model("llama"))
    assert tokenizer.decode(answer_ids(tokenizer, "Score:\n", "4")) == "4\n"
    assert tokenizer.decode(answer_ids(tokenizer, "Score: ", "4")) == "4\n"
    assert tokenizer.decode(answer_ids(tokenizer, "Score:", "4", lead="")) == "4\n"


def test_a_prompt_keeps_its_tokens_where_an_answer_would_melt_into_its_last(tiny_model):
    # This tokenizer has a token "so", and a prompt that ends in "s" is followed by an answer that begins with "o".
    _, tokenizer = load(tiny_model("llama"))
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a film s", "a film so\n"))
    assert whole[: len(before)] != before
    ids = answer_ids(tokenizer, "a film s", "o", lead="")
    assert ids.tolist() == tokenizer("o\n", add_special_tokens=False)["input_ids"]


# Their probabilities


def by_hand(model, prompt, candidate):
    """log p(candidate | prompt) from the log-softmax of the whole sequence alone."""
    ids = torch.from_numpy(np.concatenate([prompt, candidate]).astype(np.int64))
    log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(log_p[place - 1, ids[place]] for place in range(len(prompt), len(ids)))


TEXTS = ("a film so warm and a play so dull\nScore:", "fresh\nScore:", "a film so noisy\nScore:")


def sample(tokenizer, label_range=LABELS):
    prompts = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for text in TEXTS]
    grid = [answer_ids(tokenizer, TEXTS[0], format_score(y, label_range)) for y in trained_scores(label_range)]
    return prompts, grid


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", CAUSAL)
def test_one_pass_gives_what_each_candidate_has_alone(tiny_model, arch, attention):
    model, tokenizer = load(tiny_model(arch), attention)
    prompts, grid = sample(tokenizer)
    assert takes_trees(model)
    with torch.inference_mode():
        scores = score_candidates(model, prompts, grid, pad=0)
        expected = torch.stack([torch.stack([by_hand(model, p, c) for c in grid]) for p in prompts])
    assert scores.shape == (3, 11)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert (scores.exp().sum(1) < 1).all()


def test_more_candidates_than_a_word_has_bits(tiny_model):
    model, tokenizer = load(tiny_model("llama"))
    prompts, _ = sample(tokenizer)
    grid = [answer_ids(tokenizer, TEXTS[0], format_score(y, (0, 100))) for y in candidate_scores((0, 100))]
    start = np.array(tokenizer("a film so moving\nScore: 35\n\n")["input_ids"])
    with torch.inference_mode():
        scores = score_candidates(model, prompts, grid, prefix=read_prefix(model, start), pad=0)
        whole = [np.concatenate([start, prompt]) for prompt in prompts]
        expected = torch.stack([torch.stack([by_hand(model, p, c) for c in grid]) for p in whole])
    assert scores.shape == (3, 101)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", CAUSAL)
def test_what_all_prompts_begin_with_may_be_read_before(tiny_model, arch):
    model, tokenizer = load(tiny_model(arch))
    prompts, grid = sample(tokenizer)
    start = np.array(tokenizer("a film so moving and a play so stale\nScore: 3.5\n\n")["input_ids"])
    with torch.inference_mode():
        prefix = read_prefix(model, start)
        twice = [score_candidates(model, prompts, grid, prefix=prefix, pad=0) for _ in range(2)]
        expected = score_candidates(model, [np.concatenate([start, prompt]) for prompt in prompts], grid, pad=0)
    torch.testing.assert_close(twice[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(twice[0], twice[1])
    assert prefix.length == len(start)


@pytest.mark.parametrize("arch", CAUSAL)
def test_gradients_go_through(tiny_model, arch):
    model, tokenizer = load(tiny_model(arch))
    prompts, grid = sample(tokenizer)
    weights = next(model.parameters())
    score_candidates(model, prompts, grid, pad=0).exp().sum().backward()
    got, weights.grad = weights.grad, None
    sum(by_hand(model, p, c).exp() for p in prompts for c in grid).backward()
    expected, weights.grad = weights.grad, None
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)
    model.zero_grad()


def test_an_architecture_that_cannot_take_trees_is_scored_one_by_one(tiny_model, monkeypatch):
    model, tokenizer = load(tiny_model("llama"))
    prompts, grid = sample(tokenizer)
    start = np.array(tokenizer("a film so moving\n")["input_ids"])
    with torch.inference_mode():
        expected = score_candidates(model, prompts, grid, prefix=read_prefix(model, start), pad=0)
        monkeypatch.setattr(candidates_module, "takes_trees", lambda _model: False)
        got = score_candidates(model, prompts, grid, prefix=read_prefix(model, start), pad=0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_a_model_cannot_take_is_found_out_and_its_mode_is_put_back():
    from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, LlamaConfig, MambaConfig

    size = {"vocab_size": 64, "hidden_size": 16}
    configs = [
        BloomConfig(**size, n_layer=2, n_head=2),  # alibi: no position_ids
        MambaConfig(**size, num_hidden_layers=2, state_size=4),  # recurrent
        # A window that counts places in the pass, and is wider than what is tried.
        GPTNeoConfig(**size, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=32),
        LlamaConfig(**size, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    ]
    found = []
    for config in configs:
        model = AutoModelForCausalLM.from_config(config).train()
        model.get_input_embeddings().eval()
        found.append(takes_trees(model))
        assert model.training
        assert not model.get_input_embeddings().training
    assert found == [False, False, False, True]


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_windows_of_architectures_whose_layers_all_have_one(kind):
    from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config

    size = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": 4,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    config = {"mistral": MistralConfig, "phi3": Phi3Config}[kind](**size)
    model = AutoModelForCausalLM.from_config(config).eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 64, n) for n in (9, 3)]
    grid = [np.array(c) for c in ([5, 6, 7, 1], [5, 6, 1], [9, 1])]
    with torch.inference_mode():
        scores = score_candidates(model, prompts, grid, pad=0)
        expected = torch.stack([torch.stack([by_hand(model, p, c) for c in grid]) for p in prompts])
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
