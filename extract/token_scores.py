"""log p of a few next tokens each, from logits over a whole vocabulary, without a float32 copy of these."""

from typing import Any

import torch
from torch import Tensor


def token_scores(logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """log softmax(logits[row])[token], differentiable once.

    torch's own logsumexp keeps several float32 tensors as large as the logits, and its gradient as many again, each in
    fresh memory: with Gemma's vocabulary of 262,144 that took as long as most of the LLM.

    Args:
        logits: (R, V) in any floating dtype.
        row: (K,) int64, of the logits.
        token: (K,) int64; no pair of row and token comes twice.

    Returns:
        (K,) float32.
    """
    return _TokenScores.apply(logits, row, token)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, token: Tensor) -> Tensor:
        total = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for part, out in zip(_parts(logits), total.split(_rows(logits)), strict=True):
            values = part.to(torch.float32, copy=True)
            largest = values.amax(-1)
            torch.add(values.sub_(largest[:, None]).exp_().sum(-1).log_(), largest, out=out)
        scores = logits[row, token].float() - total[row]
        ctx.save_for_backward(logits, row, token, total, scores)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, row, token, total, scores = ctx.saved_tensors
        weight = torch.zeros_like(total).index_add_(0, row, gradient)
        result = torch.empty_like(logits)
        size = _rows(logits)
        for out, part, sums, share in zip(
            _parts(result), _parts(logits), total.split(size), weight.split(size), strict=True
        ):
            values = part.to(torch.float32, copy=True)
            out.copy_(values.sub_(sums[:, None]).exp_().mul_(-share[:, None]))
        result[row, token] = (gradient - weight[row] * scores.exp()).to(result.dtype)
        return result, None, None


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(_rows(values))


def _rows(values: Tensor) -> int:
    """Rows at once: on the CPU so few that what is made of them stays in its caches."""
    return max(1, 2 ** (20 if values.device.type == "cpu" else 26) // values.shape[1])
