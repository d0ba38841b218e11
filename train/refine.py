"""The L refinement steps as one function with a gradient of its own.

autograd would keep a node for each of some hundred operations, and add up the tokens' gradient in 2 L passes. Here each
step keeps what its way back needs, and the tokens' gradient is one product. Values and gradients are those of
`nn.MultiheadAttention`, `nn.LayerNorm` and so on, which the tests compare to 1e-9 in float64.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from .reading import Reader, reader_for


class StepWeights(NamedTuple):
    """Parameters of one step, in the order and shapes of nn.MultiheadAttention, nn.LayerNorm and nn.Linear."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


@dataclass
class _Kept:
    """What the way back of one step needs."""

    before: Tensor
    q: Tensor
    read: Any
    mixed: Tensor
    value: Tensor
    drop1: "Tensor | None"
    norm1: "_Norm"
    middle: Tensor
    up: Tensor
    active: Tensor
    drop2: "Tensor | None"
    norm2: "_Norm"


class _Norm(NamedTuple):
    x: Tensor
    mean: Tensor
    rstd: Tensor


def refine(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    latent: Tensor,
    steps: list[StepWeights],
    *,
    mean: Tensor,
    scale: Tensor,
    heads: int,
    dropout: float,
) -> Tensor:
    """The latent state after L steps of reading and thinking.

        c = W_p (H - mean) / scale + b_p
        r = LayerNorm(r + CrossAttention_l(r, c, c));  r = LayerNorm(r + FFN_l(r))      for l = 1..L

    Args:
        hidden: (B, T, D) of any float type; what stands in the padding does not matter.
        mask: (B, T) bool, True = real token; each row has at least one.
        weight: W_p (d, D).
        bias: b_p (d,).
        latent: r⁰ (d,).
        steps: weights of the L steps.
        mean: (D,), no gradient.
        scale: (D,), no gradient.
        heads: H, attention heads.
        dropout: share of the attention's and the FFN's output that is dropped; 0 outside training.

    Returns:
        (B, d).
    """
    flat = [tensor for step in steps for tensor in step]
    training = torch.is_grad_enabled()
    with _in_own_type(hidden):
        return _Refine.apply(hidden, mask, mean, scale, heads, dropout, training, weight, bias, latent, *flat)


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        mask: Tensor,
        mean: Tensor,
        scale: Tensor,
        heads: int,
        dropout: float,
        training: bool,
        weight: Tensor,
        bias: Tensor,
        latent: Tensor,
        *flat: Tensor,
    ) -> Tensor:
        steps = _grouped(flat)
        # Standardising folds into W_p. The shift is a difference of large numbers: no type below float32 will do.
        folded = weight / scale
        shift = bias - folded @ mean
        reader = reader_for(hidden, mask, folded, shift, heads=heads, depth=len(steps), training=training)
        state = latent.expand(len(hidden), -1)
        kept = []
        for step in steps:
            state, one = _forward(state, reader, step, heads, dropout)
            if training:
                kept.append(one)
        if training:
            ctx.reader, ctx.kept, ctx.heads = reader, kept, heads
            # The reader reads hidden and weight, the first step latent: saved, a change of them in between is noticed.
            ctx.save_for_backward(hidden, weight, latent, mean, scale, *flat)
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> "tuple[Tensor | None, ...]":
        _, _, _, mean, scale, *flat = ctx.saved_tensors
        steps, found = _grouped(flat), []
        with _in_own_type(gradient):
            for step, kept in zip(reversed(steps), reversed(ctx.kept), strict=True):
                gradient, weights = _backward(gradient, kept, ctx.reader, step, ctx.heads)
                found.append(weights)
            weight, bias, hidden = ctx.reader.gradients()
            weight = weight.addr_(bias, mean, alpha=-1).div_(scale)
        per_step = [tensor for weights in reversed(found) for tensor in weights]
        return hidden, None, None, None, None, None, None, weight, bias, gradient.sum(dim=0), *per_step


def _in_own_type(like: Tensor) -> torch.autocast:
    """Keep a surrounding autocast out: a head is too small to gain from it, and its sums would lose digits."""
    return torch.autocast(like.device.type, enabled=False)


def _grouped(flat: "tuple[Tensor, ...] | list[Tensor]") -> list[StepWeights]:
    size = len(StepWeights._fields)
    return [StepWeights(*flat[begin : begin + size]) for begin in range(0, len(flat), size)]


def _forward(state: Tensor, reader: Reader, w: StepWeights, heads: int, dropout: float) -> tuple[Tensor, _Kept]:
    B, d = state.shape
    width = d // heads
    q = torch.addmm(w.in_bias[:d], state, w.in_weight[:d].T).mul_(1 / math.sqrt(width)).view(B, heads, width)
    k = torch.bmm(q.transpose(0, 1), w.in_weight[d : 2 * d].view(heads, width, d)).transpose(0, 1)
    mixed, read = reader.read(k)
    value = torch.bmm(mixed.transpose(0, 1), w.in_weight[2 * d :].view(heads, width, d).transpose(1, 2))
    value = value.transpose(0, 1).reshape(B, d).add_(w.in_bias[2 * d :])
    seen = torch.addmm(w.out_bias, value, w.out_weight.T)
    drop1 = _noise(seen, dropout)
    middle, norm1 = _norm(
        seen.add_(state) if drop1 is None else seen.mul_(drop1).add_(state), w.norm1_weight, w.norm1_bias
    )
    up = torch.addmm(w.up_bias, middle, w.up_weight.T)
    active = gelu(up)
    thought = torch.addmm(w.down_bias, active, w.down_weight.T)
    drop2 = _noise(thought, dropout)
    after, norm2 = _norm(
        thought.add_(middle) if drop2 is None else thought.mul_(drop2).add_(middle), w.norm2_weight, w.norm2_bias
    )
    return after, _Kept(state, q, read, mixed, value, drop1, norm1, middle, up, active, drop2, norm2)


def _backward(gradient: Tensor, kept: _Kept, reader: Reader, w: StepWeights, heads: int) -> tuple[Tensor, StepWeights]:
    B, d = gradient.shape
    width = d // heads
    onward, norm2_weight, norm2_bias = _norm_backward(gradient, kept.norm2, w.norm2_weight, w.norm2_bias)
    thought = onward if kept.drop2 is None else onward * kept.drop2
    up = torch.ops.aten.gelu_backward(thought @ w.down_weight, kept.up)
    middle = onward.addmm(up, w.up_weight)
    onward, norm1_weight, norm1_bias = _norm_backward(middle, kept.norm1, w.norm1_weight, w.norm1_bias)
    seen = onward if kept.drop1 is None else onward * kept.drop1
    value = seen @ w.out_weight
    in_weight, in_bias = torch.empty_like(w.in_weight), torch.zeros_like(w.in_bias)  # the keys' bias has no effect
    in_bias[2 * d :] = value.sum(dim=0)
    by_head = value.view(B, heads, width).transpose(0, 1)
    torch.bmm(by_head.transpose(1, 2), kept.mixed.transpose(0, 1), out=in_weight[2 * d :].view(heads, width, d))
    mixed = torch.bmm(by_head, w.in_weight[2 * d :].view(heads, width, d)).transpose(0, 1)
    k = reader.read_backward(kept.read, mixed).transpose(0, 1)
    torch.bmm(kept.q.permute(1, 2, 0), k, out=in_weight[d : 2 * d].view(heads, width, d))
    q = torch.bmm(k, w.in_weight[d : 2 * d].view(heads, width, d).transpose(1, 2)).transpose(0, 1).reshape(B, d)
    q.mul_(1 / math.sqrt(width))
    in_bias[:d] = q.sum(dim=0)
    torch.mm(q.T, kept.before, out=in_weight[:d])
    return onward.addmm(q, w.in_weight[:d]), StepWeights(
        in_weight=in_weight,
        in_bias=in_bias,
        out_weight=seen.T @ kept.value,
        out_bias=seen.sum(dim=0),
        norm1_weight=norm1_weight,
        norm1_bias=norm1_bias,
        up_weight=up.T @ kept.middle,
        up_bias=up.sum(dim=0),
        down_weight=thought.T @ kept.active,
        down_bias=thought.sum(dim=0),
        norm2_weight=norm2_weight,
        norm2_bias=norm2_bias,
    )


def _noise(like: Tensor, dropout: float) -> "Tensor | None":
    """Factors 0 or 1 / (1 - dropout), or None for no dropout."""
    if dropout == 0:
        return None
    return torch.empty_like(like).bernoulli_(1 - dropout).div_(1 - dropout)


_EPS = 1e-5  # nn.LayerNorm's


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, _Norm]:
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, _EPS)
    return y, _Norm(x, mean, rstd)


def _norm_backward(gradient: Tensor, norm: _Norm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(
        gradient.contiguous(), norm.x, norm.x.shape[-1:], norm.mean, norm.rstd, weight, bias, [True, True, True]
    )
