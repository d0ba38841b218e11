from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relish.extract import tree_attention
from relish.extract.tree import Tokens, last_tokens, plant, tree_states
from relish.extract.tree_attention import attention_by_rows

ALL = -1
attend = torch.nn.functional.scaled_dot_product_attention


def tree(before, trunk, rows, draw):
    """Rows of tokens that ask and that are seen, and a mask: some tokens before, a trunk, then each row's own."""
    asking = np.concatenate([np.full(trunk, ALL), *(np.full(length, row) for row, length in enumerate(rows))])
    seen = np.concatenate([np.full(before, ALL), asking])
    order = np.arange(len(seen)) - before
    sees = ((seen == ALL) | (seen == asking[:, None])) & (order <= np.arange(len(asking))[:, None])
    # Of what a token may see it need not see all: candidates, windows.
    sees &= (draw.random(sees.shape) < 0.8) | (order == np.arange(len(asking))[:, None])
    return asking, seen, torch.from_numpy(sees)[None, None]


def states(asking, seen, heads, kinds, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(1, heads, len(asking), 8), (1, kinds, len(seen), 8), (1, kinds, len(seen), 6)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def by_rows(asking, seen, mask):
    """Whether a pass is computed by rows."""
    return not isinstance(attention_by_rows(asking, seen, [mask], everyone=ALL), nullcontext)


@settings(max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(0, 9),
    st.lists(st.integers(1, 7), min_size=16, max_size=40),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_a_dense_mask(before, trunk, rows, heads, scale, seed):
    asking, seen, mask = tree(before, trunk, rows, np.random.default_rng(seed))
    assume(by_rows(asking, seen, mask))
    query, key, value = states(asking, seen, *heads)
    options = {"attn_mask": mask, "scale": scale, "enable_gqa": heads[0] != heads[1]}
    expected = attend(query, key, value, **options)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (query, key, value), weight)
    with attention_by_rows(asking, seen, [mask], everyone=ALL):
        found = attend(query, key, value, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (query, key, value), weight), gradients)


def test_rows_of_like_length_are_computed_by_rows_and_a_long_one_is_not():
    draw = np.random.default_rng(0)
    assert by_rows(*tree(0, 4, [5, 6, 5, 4] * 4, draw))
    assert not by_rows(*tree(0, 200, [5, 6, 5, 4] * 4, draw))  # most of it is for all rows
    assert by_rows(*tree(0, 4, [30, 25], draw))
    assert not by_rows(*tree(0, 4, [30, 5], draw))
    assert not by_rows(*tree(0, 4, [30], draw))
    assert not by_rows(*tree(0, 12, [], draw))


def test_a_slice_of_the_mask_is_known_and_another_mask_is_not():
    asking, seen, mask = tree(0, 4, [5, 6, 5, 4] * 4, np.random.default_rng(0))
    query, key, value = states(asking, seen, 2, 2)
    with attention_by_rows(asking, seen, [mask], everyone=ALL):
        same = attend(query, key, value, attn_mask=mask[:, :, :, : len(seen)])
        causal = attend(query, key, value, is_causal=True)
        other = attend(query, key, value, attn_mask=torch.ones_like(mask))
    dense = attend(query, key, value, attn_mask=mask)
    assert not torch.equal(same, dense)  # by rows, which adds up in another order
    torch.testing.assert_close(same, dense)
    assert torch.equal(causal, attend(query, key, value, is_causal=True))
    assert torch.equal(other, attend(query, key, value, attn_mask=torch.ones_like(mask)))


def test_two_masks_are_told_apart():
    asking, seen, mask = tree(0, 4, [5, 6, 5, 4] * 4, np.random.default_rng(0))
    near = mask & (torch.arange(len(seen)) > torch.arange(len(asking))[:, None] - 3)
    query, key, value = states(asking, seen, 2, 2)
    with attention_by_rows(asking, seen, [mask, near], everyone=ALL):
        for one in (mask, near):
            found = attend(query, key, value, attn_mask=one)
            torch.testing.assert_close(found, attend(query, key, value, attn_mask=one.clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_dense_form(dtype):
    asking, seen, mask = tree(0, 4, [5, 6, 5, 4] * 4, np.random.default_rng(0))
    exact = states(asking, seen, 4, 2, torch.float32)
    halves = [x.detach().to(dtype) for x in exact]
    expected = attend(*[x.float() for x in halves], attn_mask=mask, enable_gqa=True)
    dense = attend(*halves, attn_mask=mask, enable_gqa=True).float()
    with attention_by_rows(asking, seen, [mask], everyone=ALL):
        found = attend(*halves, attn_mask=mask, enable_gqa=True)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().mean() <= 1.5 * (dense - expected).abs().mean()


def test_rows_see_what_they_asked_before_and_rows_that_are_finished_are_left_out():
    # Three tokens before all rows, six of each of 24 rows, and then one more of those that are not finished.
    alive = np.setdiff1d(np.arange(24), [3, 11])
    asking = alive
    seen = np.concatenate([np.full(3, ALL), np.repeat(np.arange(24), 6), asking])
    mask = torch.from_numpy((seen == ALL) | (seen == asking[:, None]))[None, None]
    assert by_rows(asking, seen, mask)
    query, key, value = states(asking, seen, 4, 2)
    expected = attend(query, key, value, attn_mask=mask, enable_gqa=True)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (query, key, value), weight)
    with attention_by_rows(asking, seen, [mask], everyone=ALL):
        found = attend(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (query, key, value), weight), gradients)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_real_model_takes_this_way_and_gives_the_same(tiny_model, arch, monkeypatch):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_model(arch), attn_implementation="sdpa").double()
    draw = np.random.default_rng(0)
    rows = [np.concatenate([[3, 4], draw.integers(5, 20, size=size)]) for size in (6, 5, 5, 4) * 5]
    trunk, own = plant(rows)
    tokens, keep = Tokens.join([trunk, *own]), last_tokens(trunk, own)

    def run():
        model.zero_grad()
        states = tree_states(model, tokens, keep)
        states.square().sum().backward()
        return states, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    calls = []
    by_row = tree_attention._attend
    monkeypatch.setattr(tree_attention, "_attend", lambda *given: calls.append(1) or by_row(*given))
    ours = run()
    assert len(calls) == model.config.num_hidden_layers
    monkeypatch.setattr(tree_attention, "_lay_out", lambda *_: None)
    dense = run()
    assert len(calls) == model.config.num_hidden_layers
    torch.testing.assert_close(ours, dense, rtol=1e-6, atol=1e-8)
