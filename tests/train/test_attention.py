"""Attention pooling against torch's own attention, and against the mean where the query is 0."""

import pytest
import torch
from torch import Tensor, nn

from relish.train.attention import AttentionHead
from relish.train.heads import count_parameters
from relish.train.pooled import PooledHead

D = 12


def a_head(dtype=torch.float64) -> AttentionHead:
    torch.manual_seed(0)
    head = AttentionHead(D).to(dtype)
    nn.init.normal_(head.query)
    head.input_scale.set(torch.randn(D), torch.rand(D) + 0.5)
    head.target_scale.set(3.0, 2.0)
    return head


def a_batch(padding="right", dtype=torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    if padding == "left":
        mask = mask.flip(1)
    return torch.randn(4, 9, D, dtype=dtype), mask


def plainly(head: AttentionHead, hidden: Tensor, mask: Tensor) -> Tensor:
    tokens = (hidden - head.input_scale.mean) / head.input_scale.scale
    query = head.query.expand(len(hidden), 1, -1)
    pooled = nn.functional.scaled_dot_product_attention(query, tokens, tokens, attn_mask=mask.unsqueeze(1))
    return 3.0 + 2.0 * head.regressor(pooled[:, 0])[:, 0]


def gradients(prediction: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 2, len(prediction), dtype=prediction.dtype)
    return torch.autograd.grad((prediction * upstream).sum(), of)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_values_and_gradients_are_those_of_torchs_attention(padding):
    head, (hidden, mask) = a_head(), a_batch(padding)
    hidden.requires_grad_()
    ours, theirs = head(hidden, mask), plainly(head, hidden, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    of = (hidden, *head.parameters())
    for a, b in zip(gradients(ours, *of), gradients(theirs, *of), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_with_a_query_of_0_it_is_the_linear_head_on_the_mean():
    head, (hidden, mask) = a_head(), a_batch()
    mean = PooledHead(D, "mean", head.regressor).double()
    mean.input_scale, mean.target_scale = head.input_scale, head.target_scale
    assert not torch.allclose(head(hidden, mask), mean(hidden, mask))
    nn.init.zeros_(head.query)
    torch.testing.assert_close(head(hidden, mask), mean(hidden, mask), rtol=0, atol=1e-12)
    assert not AttentionHead(D).query.any()  # so it begins


def test_what_stands_in_the_padding_reaches_neither_values_nor_gradients():
    head, (hidden, mask) = a_head(), a_batch()
    clean = head(hidden, mask)
    expected = gradients(clean, *head.parameters())
    hidden[~mask] = float("nan")
    dirty = head(hidden, mask)
    assert torch.equal(dirty, clean)
    assert all(map(torch.equal, gradients(dirty, *head.parameters()), expected))


def test_half_precision_is_read_in_float32():
    head, (hidden, mask) = a_head(torch.float32), a_batch(dtype=torch.bfloat16)
    assert torch.equal(head(hidden, mask), head(hidden.float(), mask))


def test_it_has_a_query_and_a_linear_layer():
    assert count_parameters(AttentionHead(4096)) == 4096 + 4096 + 1
