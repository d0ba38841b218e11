import pytest
import torch
from torch import nn

from relish.train.attention import FoldedCrossAttention


def both(d: int, heads: int, dtype: torch.dtype) -> tuple[FoldedCrossAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(d, heads, batch_first=True, dtype=dtype)
    nn.init.normal_(plain.in_proj_bias)
    nn.init.normal_(plain.out_proj.bias)
    folded = FoldedCrossAttention(d, heads).to(dtype)
    folded.load_state_dict(plain.state_dict())
    return folded, plain


@pytest.mark.parametrize(("d", "heads", "T"), [(8, 1, 1), (16, 4, 7), (256, 8, 33)])
def test_folded_attention_is_multihead_attention_in_values_and_gradients(d, heads, T):
    folded, plain = both(d, heads, torch.float64)
    B = 5
    query, tokens = torch.randn(B, d, dtype=torch.float64), torch.randn(B, T, d, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))
    bias = torch.zeros(B, 1, T, dtype=torch.float64).masked_fill(~mask.unsqueeze(1), float("-inf"))
    upstream = torch.randn(B, d, dtype=torch.float64)

    q1, t1 = query.clone().requires_grad_(), tokens.clone().requires_grad_()
    ours = folded(q1, t1, bias)
    (ours * upstream).sum().backward()
    q2, t2 = query.clone().requires_grad_(), tokens.clone().requires_grad_()
    theirs = plain(q2.unsqueeze(1), t2, t2, key_padding_mask=~mask, need_weights=False)[0].squeeze(1)
    (theirs * upstream).sum().backward()

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(q1.grad, q2.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(t1.grad, t2.grad, rtol=0, atol=1e-9)
    for (name, a), (_, b) in zip(folded.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9, msg=name)


def test_parameters_have_the_names_shapes_and_starting_values_of_multihead_attention():
    torch.manual_seed(3)
    plain = nn.MultiheadAttention(32, 4, batch_first=True)
    torch.manual_seed(3)
    folded = FoldedCrossAttention(32, 4)
    theirs = plain.state_dict()
    assert {name: value.shape for name, value in folded.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }
    for name in ("in_proj_bias", "out_proj.bias"):
        assert torch.equal(folded.state_dict()[name], theirs[name])
    assert folded.in_proj_weight.std().item() == pytest.approx(plain.in_proj_weight.std().item(), rel=0.05)
