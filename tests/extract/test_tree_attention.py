from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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


@settings(max_examples=60, deadline=None)
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
    # Scores are float32 where they are computed by rows.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, (query, key, value), weight), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_many_rows_are_computed_by_rows_and_few_long_ones_are_not():
    draw = np.random.default_rng(0)
    assert by_rows(*tree(0, 4, [5, 6, 5, 4] * 4, draw))
    assert not by_rows(*tree(0, 90, [5, 6, 5, 4] * 4, draw))  # most of it is for all rows
    assert not by_rows(*tree(0, 4, [30, 25], draw))
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
    assert not torch.equal(same, dense)  # by rows, in float32
    torch.testing.assert_close(same, dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(causal, attend(query, key, value, is_causal=True))
    assert torch.equal(other, attend(query, key, value, attn_mask=torch.ones_like(mask)))


def test_two_masks_are_told_apart():
    asking, seen, mask = tree(0, 4, [5, 6, 5, 4] * 4, np.random.default_rng(0))
    near = mask & (torch.arange(len(seen)) > torch.arange(len(asking))[:, None] - 3)
    query, key, value = states(asking, seen, 2, 2)
    with attention_by_rows(asking, seen, [mask, near], everyone=ALL):
        for one in (mask, near):
            found = attend(query, key, value, attn_mask=one)
            torch.testing.assert_close(found, attend(query, key, value, attn_mask=one.clone()), rtol=1e-4, atol=1e-5)


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
