"""A head on a learned mix of several layers: ELMo's scalar mix (Peters et al. 2018, arXiv 1802.05365, equation 1)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .pooled import pool
from .scale import InputScale, TargetScale


class MixedHead(nn.Module):
    """A head that reads, in place of one layer, a mix of K layers; K parameters more.

        x = Σ_k s_k (h_k - mean_k) / scale_k,     s = softmax(w), equal at first

    Each layer is standardised by itself, since later layers are larger than earlier ones. ELMo's common factor γ is
    left out: the weights that read x take its place. A head that pools reads the mix of the layers' pooled vectors,
    standardised as the one vector of a single layer is; pooling is linear, so that is the pooled mix. With K = 1 the
    predictions are the head's own on that layer.
    """

    def __init__(self, head: Any, layers: int) -> None:
        super().__init__()
        self.hidden_size: int = head.hidden_size
        self.pooling: str | None = getattr(head, "pooling", None)
        self.input_scale = InputScale(layers, head.hidden_size)
        """Of the layers. The inner head's own stays the identity."""
        self.weights = nn.Parameter(torch.zeros(layers))
        """w; its softmax is `shares()`."""
        self.head = head

    @property
    def target_scale(self) -> TargetScale:
        """The inner head's."""
        return self.head.target_scale

    def shares(self) -> Tensor:
        """s (K,), what each layer has of the mix; they sum to 1."""
        return torch.softmax(self.weights, dim=0)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Predict.

        Args:
            hidden: (B, K, T, D) hidden states of any float type; what stands in the padding does not matter.
            mask: (B, T) bool or 0/1, True = real token; each row has at least one.

        Returns:
            (B,) predictions in the unit of the labels.
        """
        mask = mask.bool()
        if self.pooling is not None:  # the inner head then pools a single token
            vectors = torch.stack([pool(layer, mask, self.pooling) for layer in hidden.unbind(dim=1)])
            mask = mask.any(dim=1, keepdim=True)
            mixed = self._mix(vectors.unsqueeze(0), mask.T)  # (1, K, B, D): the rows of the batch as tokens
            return self.head(mixed.transpose(0, 1), mask)
        return self.head(self._mix(hidden, mask), mask)

    def _mix(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, K, T, D) to (B, T, D) in the type of the weights."""
        factors = self.shares().unsqueeze(1) / self.input_scale.scale
        shift = -(factors * self.input_scale.mean).sum(dim=0)
        if hidden.device.type == "cpu" and not hidden.requires_grad:
            return _Mix.apply(hidden, mask, factors, shift)
        # Padding may hold NaN, which 0 × NaN would bring into the gradient of the shares.
        hidden = hidden.masked_fill(~mask[:, None, :, None], 0.0)
        mixed = shift
        for layer, factor in zip(hidden.unbind(dim=1), factors, strict=True):
            mixed = torch.addcmul(mixed, layer, factor)  # keeps the layer in its own type for the way back
        return mixed


class _Mix(torch.autograd.Function):
    """Σ_k factors_k h_k + shift, row by row without padding: a row stays in the processor's cache, and is cheap there.

    Gradients are those of the factors and the shift alone, and have none themselves.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mask: Tensor, factors: Tensor, shift: Tensor) -> Tensor:
        B, K, T, D = hidden.shape
        mixed = factors.new_zeros(B, T, D)
        for layers, into in _real_tokens(hidden, mask, mixed, factors.dtype):
            torch.addcmul(shift, layers[0], factors[0], out=into)
            for k in range(1, K):
                into.addcmul_(layers[k], factors[k])
        ctx.save_for_backward(hidden, mask, factors)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> "tuple[None, None, Tensor, Tensor]":  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, mask, factors = ctx.saved_tensors
        found, shift = torch.zeros_like(factors), torch.zeros_like(factors[0])
        for layers, own in _real_tokens(hidden, mask, gradient, factors.dtype):
            shift += own.sum(dim=0)
            found += layers.mul_(own).sum(dim=1)
        return None, None, found, shift


def _real_tokens(hidden: Tensor, mask: Tensor, other: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row its real tokens in the type given, (K, n, D), until the next is taken, and those of (B, T, D).

    Where real tokens have padding among them, that is zero, and given as well.
    """
    B, K, T, D = hidden.shape
    if mask.numel() == 0:
        return
    buffer = hidden.new_empty((K, T, D), dtype=dtype)
    lengths, first = mask.sum(dim=1).tolist(), mask.int().argmax(dim=1).tolist()
    last = (T - 1 - mask.flip(1).int().argmax(dim=1)).tolist()
    for row in range(B):
        if lengths[row] == 0:
            continue
        span = slice(first[row], last[row] + 1)
        layers = buffer[:, : last[row] + 1 - first[row]]
        layers.copy_(hidden[row, :, span])
        if lengths[row] < layers.shape[1]:
            layers.masked_fill_(~mask[row, span, None], 0.0)
        yield layers, other[row, span]
