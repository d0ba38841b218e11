import pytest
import torch

from relish.extract.token_scores import token_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 2**19 + 1])  # rows all at once; one at a time
def test_scores_and_their_gradient_are_those_of_log_softmax(dtype, vocabulary):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, vocabulary, generator=draw)).to(dtype).requires_grad_()
    # The third row is not asked, the last column and the same token of two rows are.
    row, token = torch.tensor([0, 0, 1, 3, 4]), torch.tensor([2, vocabulary - 1, 2, 0, 5])
    weights = torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0])
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1)[row, token]
    scores = token_scores(logits, row, token)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype), rtol=max(torch.finfo(dtype).eps, 1e-4), atol=1e-7)
    assert not logits.grad[2].any()


def test_logits_stay_as_they_are():
    logits = torch.randn(3, 11)
    before = logits.clone()
    token_scores(logits, torch.tensor([0, 2]), torch.tensor([1, 1]))
    assert torch.equal(logits, before)


def test_a_score_far_below_all_others_is_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    score = token_scores(logits, torch.tensor([0]), torch.tensor([1]))
    score.backward()
    assert score.item() == -2e4
    assert logits.grad.tolist() == [[-1.0, 1.0, 0.0]]
