"""How a latent state reads the hidden states of a batch without projecting any token to keys and values.

With c = W H + b (the input projection), multi-head attention of a single query r needs, per head h with
q_h = (W_q,h r + b_q,h) / √d_h and the query in the space of the tokens, k_h = W_k,hᵀ q_h,

    score_t = q_h · (W_k,h c_t + b_k,h) = k_h · c_t + const             (the softmax drops the constant)
    value   = Σ_t a_t (W_v,h c_t + b_v,h) = W_v,h (Σ_t a_t c_t) + b_v,h   (Σ_t a_t = 1)

A reader takes k (B, H, d) to the mixtures Σ_t a_t c_t (B, H, d), and back. There are two, equal up to rounding:
`Projected` computes c once for all steps. `Direct` goes on folding, and never computes it:

    score_t = (Wᵀ k_h) · h_t + const,     Σ_t a_t c_t = W (Σ_t a_t h_t) + b

Its products per step grow with the number of queries instead of the number of tokens, so it wins on long rows
where steps and threads are few.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

_CHUNK = 256  # tokens converted and projected together: they stay in the processor's cache
# Measured (benchmarks/reading.py), in multiply-adds of a large product: one of a product of H rows of one example, with
# the conversion of its operand, for each thread, since a second one made it no faster; one of B H rows.
_ROW, _QUERIES = 2.0, 1.5


class Reader(Protocol):
    """The tokens of one batch, for all L steps, forward and backward."""

    def read(self, k: Tensor) -> tuple[Tensor, Any]:
        """Queries (B, H, d) to mixtures (B, H, d), and what `read_backward` needs of this reading."""
        ...

    def read_backward(self, kept: Any, gradient: Tensor) -> Tensor:
        """Gradient of the mixtures (B, H, d) to that of the queries (B, H, d)."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor, "Tensor | None"]:
        """Gradients of W (d, D), of b (d,) and, where wanted, of the hidden states (B, T, D); after all the others."""
        ...


def reader_for(
    hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *, heads: int, depth: int, training: bool
) -> Reader:
    """The faster reader for a batch of this shape.

    Args:
        hidden: (B, T, D) of any float type; what stands in the padding does not matter.
        mask: (B, T) bool, True = real token.
        weight: W (d, D).
        bias: b (d,).
        heads: H.
        depth: L.
        training: whether gradients will be asked for.
    """
    if hidden.device.type != "cpu":
        return Projected(hidden, mask, weight, bias, dense=True)
    (B, _, D), d, N = hidden.shape, len(weight), int(mask.sum())
    # Multiply-adds. Forward and backward: 2 products with the tokens for Projected; for Direct 4 with the tokens and
    # 6 with the queries. Forward alone: 1, and 2 with each. The gradient of the tokens is one product more for either.
    tokens, queries, once = (4, 6, 2) if training else (2, 2, 1)
    direct = depth * heads * D * (_ROW * torch.get_num_threads() * tokens * N + _QUERIES * queries * B * d)
    if training and hidden.requires_grad:
        once, direct = once + 1, direct + 2 * depth * heads * N * D
    return (Direct if direct < once * N * D * d else Projected)(hidden, mask, weight, bias)


class Projected:
    """Projects each token once; the steps read the projections."""

    def __init__(self, hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *, dense: bool = False) -> None:
        """Args:
        hidden: (B, T, D).
        mask: (B, T).
        weight: W (d, D).
        bias: b (d,).
        dense: whether padding is projected too. For a GPU, where finding the real tokens would make the host wait.
        """
        self._hidden, self._mask, self._weight = hidden, mask, weight
        B, T, _ = hidden.shape
        self._dense = dense
        self._index: Tensor | None = None
        self._padding: Tensor | None = None
        if dense or not bool(mask.all()):
            self._padding = weight.new_zeros(B, 1, T).masked_fill_(~mask.unsqueeze(1), float("-inf"))
            if not dense:
                self._index = mask.reshape(-1).nonzero().squeeze(1)
        count = B * T if self._index is None else len(self._index)
        packed = weight.new_empty(count, len(weight))
        for begin, x in self._chunks():
            torch.addmm(bias, x, weight.T, out=packed[begin : begin + len(x)])
        self._tokens = self._unpack(packed)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def read(self, k: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Reader."""
        scores = torch.bmm(k, self._tokens.transpose(1, 2))
        if self._padding is not None:
            scores += self._padding
        attention = torch.softmax(scores, dim=-1)
        return torch.bmm(attention, self._tokens), (k, attention)

    def read_backward(self, kept: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
        """See Reader."""
        k, attention = kept
        along = torch.bmm(gradient, self._tokens.transpose(1, 2))
        scores = _softmax_backward(along, attention)
        self._seen += [(scores, k), (attention, gradient)]
        return torch.bmm(scores, self._tokens)

    def gradients(self) -> tuple[Tensor, Tensor, "Tensor | None"]:
        """See Reader."""
        # One product for all steps: the tokens' gradient has 2 L H terms.
        weights, vectors = (torch.cat(parts, dim=1) for parts in zip(*self._seen, strict=True))
        self._seen = []
        tokens = torch.bmm(weights.transpose(1, 2), vectors).reshape(-1, len(self._weight))
        if self._index is not None:
            tokens = tokens.index_select(0, self._index)
        weight = torch.zeros_like(self._weight)
        for begin, x in self._chunks():
            weight.addmm_(tokens[begin : begin + len(x)].T, x)
        hidden = None
        if self._hidden.requires_grad:
            hidden = self._unpack(tokens @ self._weight).to(self._hidden.dtype)
        return weight, tokens.sum(dim=0), hidden

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Real tokens as (n, D) in the type of the weights, and the number of the first."""
        flat = self._hidden.detach().reshape(-1, self._hidden.shape[-1])
        if self._dense:
            # Padding may hold anything, and 0 × NaN is NaN: it must be zero, not only unattended.
            yield 0, flat.to(self._weight.dtype).masked_fill(~self._mask.reshape(-1, 1), 0.0)
            return
        buffer = self._weight.new_empty(_CHUNK, flat.shape[1])
        for begin in range(0, len(flat) if self._index is None else len(self._index), _CHUNK):
            chosen = slice(begin, begin + _CHUNK)
            x = flat[chosen] if self._index is None else flat.index_select(0, self._index[chosen])
            yield begin, x if x.dtype == buffer.dtype else buffer[: len(x)].copy_(x)

    def _unpack(self, packed: Tensor) -> Tensor:
        """Real tokens (N, n) to (B, T, n), zero where padded."""
        B, T = self._mask.shape
        if self._index is None:
            return packed.view(B, T, packed.shape[1])
        return packed.new_zeros(B * T, packed.shape[1]).index_copy_(0, self._index, packed).view(B, T, packed.shape[1])


class Direct:
    """Reads the hidden states themselves, row by row, without padding."""

    def __init__(self, hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._hidden = hidden
        lengths, first = mask.sum(dim=1), mask.int().argmax(dim=1)
        ends, places = first + lengths, torch.arange(mask.shape[1])
        whole = bool((mask == (places >= first[:, None]) & (places < ends[:, None])).all())
        self._real: list[slice | Tensor] = (
            list(map(slice, first.tolist(), ends.tolist())) if whole else list(mask.unbind())
        )
        self._rows = [row[real] for row, real in zip(hidden.detach(), self._real, strict=True)]
        self._weight, self._bias = weight, bias
        self._buffer = weight.new_empty(int(lengths.max()), hidden.shape[-1])
        self._seen: list[tuple[Tensor, Tensor]] = []
        # What each token's gradient is made of, by row: shares (H, n) and vectors (H, D) that they are shares of.
        self._parts: list[tuple[list[Tensor], Tensor]] = []

    def read(self, k: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, list[Tensor], Tensor]]:
        """See Reader."""
        B, H, d = k.shape
        queries = (k.reshape(-1, d) @ self._weight).view(B, H, -1)
        mixture, attention = torch.empty_like(queries), []
        for number, x in self._converted():
            attention.append(torch.softmax(queries[number] @ x.T, dim=-1))
            if len(x):
                torch.mm(attention[-1], x, out=mixture[number])
            else:
                mixture[number].fill_(float("nan"))  # as the softmax over nothing is in `Projected`
        mixed = torch.addmm(self._bias, mixture.view(B * H, -1), self._weight.T)
        return mixed.view(B, H, d), (k, queries, attention, mixture)

    def read_backward(self, kept: tuple[Tensor, Tensor, list[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """See Reader."""
        k, read_with, attention, mixture = kept
        B, H, d = gradient.shape
        gradient, k = gradient.reshape(-1, d), k.reshape(-1, d)
        along = (gradient @ self._weight).view(B, H, -1)
        queries, scores = torch.empty_like(along), []
        for number, x in self._converted():
            scores.append(_softmax_backward(along[number] @ x.T, attention[number]))
            torch.mm(scores[-1], x, out=queries[number])
        if self._hidden.requires_grad:
            self._parts += [(scores, read_with), (attention, along)]
        queries = queries.view(B * H, -1)
        self._seen += [(k, queries), (gradient, mixture.view(B * H, -1))]
        return (queries @ self._weight.T).view(B, H, d)

    def gradients(self) -> tuple[Tensor, Tensor, "Tensor | None"]:
        """See Reader."""
        weight, bias = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        for left, right in self._seen:
            weight.addmm_(left.T, right)
        for mixed, _ in self._seen[1::2]:  # every attention sums to 1
            bias += mixed.sum(dim=0)
        hidden = None
        if self._hidden.requires_grad:
            hidden = torch.zeros_like(self._hidden)
            shares, vectors = zip(*self._parts, strict=True)
            vectors = torch.cat(vectors, dim=1)
            for number, real in enumerate(self._real):
                gradient = torch.cat([step[number] for step in shares]).T @ vectors[number]
                hidden[number, real] = gradient.to(hidden.dtype)
        self._seen, self._parts = [], []
        return weight, bias, hidden

    def _converted(self) -> Iterator[tuple[int, Tensor]]:
        """Each row's number and its hidden states (n, D) in the type of the weights; only until the next is taken."""
        for number, row in enumerate(self._rows):
            yield number, row if row.dtype == self._buffer.dtype else self._buffer[: len(row)].copy_(row)


def _softmax_backward(gradient: Tensor, attention: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(gradient, attention, -1, attention.dtype)
