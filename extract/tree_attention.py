"""Attention of a tree on the CPU: each row's tokens against what they can see, instead of all tokens against all.

A dense mask hides most of a pass of many rows, and what it hides is computed all the same. Here rows of like length lie
below one another, and their tokens meet those before all rows and their own row's. The products are plain ones: torch's
fused attention takes several times as long over many small blocks, its gradient above all.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WORTH = 1.5
"""How many times as many pairs of tokens a dense mask must have: laying them out by rows takes time, and for a gradient
their scores stay in memory, which torch's fused attention computes again."""
_ALIKE = 0.7
"""Rows are padded to a longest one of which they have at least this share."""


def attention_by_rows(
    asking: np.ndarray, seen: np.ndarray, masks: Sequence[Tensor], *, everyone: int
) -> AbstractContextManager[Any]:
    """In this context scaled dot product attention under one of a few masks is computed by rows, where that is less.

    Args:
        asking: (n,) int64, the row of each token that asks, or `everyone` for one before all rows.
        seen: (m,) int64, the same of each token that is seen. Those before all rows see none but such, those of a row
            these and their own row's.
        masks: (1, 1, n, m) bool each, True = seen.
        everyone: the mark of tokens before all rows.
    """
    on_cpu = all(mask.device.type == "cpu" and mask.dtype == torch.bool for mask in masks)
    layout = _lay_out(asking, seen, masks, everyone) if on_cpu else None
    return _ByRows(layout, masks) if layout is not None else nullcontext()


@dataclass(frozen=True, eq=False)
class _Group:
    """R blocks of t tokens that ask; each sees s of its own besides the c that all see."""

    asks: tuple[int, int]
    """R and t."""
    sees: int
    """R · s"""
    hidden: dict[int, Tensor]
    """(R, 1, t, c + s) bool, True = not seen, by the address of the dense mask that says the same."""


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the n tokens that ask and the m that are seen lie in the blocks, one group after another."""

    groups: list[_Group]
    asking: Tensor
    """(Σ R · t,) int64, which token asks there; one of the block's own again where it is filled up."""
    filled: Tensor
    """(Σ R · t,) bool, True where a block is filled up."""
    asked: Tensor
    """(n,) int64, where each token asks."""
    seen: Tensor
    """(c + Σ R · s,) int64, which token is seen there: what all see, then each block's own, filled up as well."""
    shown: Tensor
    """(m,) int64, where each token is seen."""
    unseen: Tensor | None
    """(m,) bool, True for those of rows that ask nothing any more, which have no such place; None without any."""
    common: int
    """c"""


class _ByRows(TorchFunctionMode):
    def __init__(self, layout: _Layout, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.layout = layout
        self.masks = {_address(mask): mask for mask in masks}  # kept: nothing else comes to lie there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3 and not given.get("dropout_p"):
            query, key, value = args
            mask, shape = given.get("attn_mask"), (1, 1, len(self.layout.asked), len(self.layout.shown))
            fits = (len(query), len(key), query.shape[2], key.shape[2]) == shape
            if fits and mask is not None and mask.shape == shape and _address(mask) in self.masks:
                return _attend(query, key, value, self.layout, _address(mask), given.get("scale"))
        return func(*args, **given)


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, mask: int, scale: float | None) -> Tensor:
    """What `scaled_dot_product_attention` gives for (1, H, n, ·), (1, K, m, ·) and (1, K, m, ·), H a multiple of K."""
    heads, kinds = query.shape[1], key.shape[1]
    queries = _take(query, layout.asking, layout.asked, None).split(
        [R * t for R, t in (one.asks for one in layout.groups)]
    )
    pairs = [_take(x, layout.seen, layout.shown, layout.unseen) for x in (key, value)]
    sizes = [layout.common, *(one.sees for one in layout.groups)]
    (all_keys, *keys), (all_values, *values) = (x.split(sizes) for x in pairs)
    found = []
    for group, q, own_keys, own_values in zip(layout.groups, queries, keys, values, strict=True):
        R, t = group.asks
        q = q.view(R, t, kinds, heads // kinds, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (R, K, H/K · t, ·)
        k, v = (_beside(*parts, R) for parts in ((all_keys, own_keys), (all_values, own_values)))
        # Scores in float32 at least, as within the fused attention.
        kind = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(kind) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.to(kind).transpose(2, 3)
        scores = scores.view(R, heads, t, -1).masked_fill(group.hidden[mask], -torch.inf)
        mixed = scores.softmax(-1).to(v.dtype).view(*q.shape[:3], -1) @ v
        found.append(mixed.view(R, heads, t, -1).transpose(1, 2).flatten(0, 1))
    return _Take.apply(torch.cat(found), layout.asked, layout.asking, layout.filled).transpose(0, 1)[None]


def _beside(all_see: Tensor, own: Tensor, R: int) -> Tensor:
    """(c, K, ·) and (R · s, K, ·) to (R, K, c + s, ·)."""
    own = own.view(R, len(own) // R, *own.shape[1:])
    return torch.cat([all_see.expand(R, *all_see.shape), own], dim=1).transpose(1, 2)


def _take(x: Tensor, index: Tensor, inverse: Tensor, without: Tensor | None) -> Tensor:
    """(1, H, n, ·) to (len(index), H, ·)."""
    return _Take.apply(x[0].transpose(0, 1), index, inverse, without)


class _Take(torch.autograd.Function):
    """x[index], where each place's gradient is that of one result, or 0: torch's own adds up all, one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, without: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.without = without
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        result = gradient.index_select(0, inverse)
        if ctx.without is not None:
            result[ctx.without] = 0
        return result, None, None, None


def _lay_out(asking: np.ndarray, seen: np.ndarray, masks: Sequence[Tensor], everyone: int) -> _Layout | None:
    """Blocks for each row, and one for what comes before all; None where a dense mask costs little more."""
    common, first = np.flatnonzero(seen == everyone), np.flatnonzero(asking == everyone)
    rows = [
        (np.flatnonzero(asking == row), np.flatnonzero(seen == row)) for row in np.unique(asking[asking != everyone])
    ]
    groups = [[(first, common[:0])]] if len(first) else []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        longest = groups[-1][0][0] if groups else first
        if longest is first or len(row[0]) < _ALIKE * len(longest):
            groups.append([])
        groups[-1].append(row)
    shapes = [(len(group), len(group[0][0]), max(len(sees) for _, sees in group)) for group in groups]
    if len(asking) * len(seen) <= _WORTH * sum(R * t * (len(common) + s) for R, t, s in shapes):
        return None
    asks = [_padded([asks for asks, _ in group], t) for group, (_, t, _) in zip(groups, shapes, strict=True)]
    sees = [_padded([sees for _, sees in group], s) for group, (_, _, s) in zip(groups, shapes, strict=True)]
    query, filled = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*asks, strict=True))
    key, empty = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*sees, strict=True))
    key, empty = np.concatenate([common, key]), np.concatenate([np.zeros(len(common), dtype=bool), empty])
    shown = _inverse(key, empty, len(seen))
    unseen = torch.from_numpy(shown < 0)
    return _Layout(
        [
            _Group((R, t), R * s, {_address(mask): _hidden(mask[0, 0], common, ask, *see) for mask in masks})
            for (R, t, s), (ask, _), see in zip(shapes, asks, sees, strict=True)
        ],
        asking=torch.from_numpy(query),
        filled=torch.from_numpy(filled),
        asked=torch.from_numpy(_inverse(query, filled, len(asking))),
        seen=torch.from_numpy(key),
        shown=torch.from_numpy(shown).clamp(min=0),
        unseen=unseen if unseen.any() else None,
        common=len(common),
    )


def _padded(pieces: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, size) places of a block each, filled up with the last of them, and where it is filled up."""
    places = np.zeros((len(pieces), size), dtype=np.int64)
    for row, piece in enumerate(pieces):
        if len(piece):
            places[row] = piece[-1]
            places[row, : len(piece)] = piece
    return places, np.arange(size) >= np.array([len(piece) for piece in pieces])[:, None]


def _hidden(mask: Tensor, common: np.ndarray, query: np.ndarray, key: np.ndarray, empty: np.ndarray) -> Tensor:
    """(R, 1, t, c + s): what the tokens of each block do not see, by a mask of (n, m)."""
    seen = np.concatenate([np.broadcast_to(common, (len(key), len(common))), key], axis=1)
    hidden = ~mask[torch.from_numpy(query)[:, :, None], torch.from_numpy(seen)[:, None]]
    hidden[:, :, len(common) :] |= torch.from_numpy(empty)[:, None]
    return hidden[:, None]


def _inverse(places: np.ndarray, filled: np.ndarray, size: int) -> np.ndarray:
    """Where each of `size` places lies, which is at most once where nothing is filled up; -1 for nowhere."""
    at = np.flatnonzero(~filled)
    found = np.full(size, -1, dtype=np.int64)
    found[places[at]] = at
    return found


def _address(mask: Tensor) -> int:
    return mask.data_ptr()
