"""What all rows begin with, such as a prompt's instructions: no head reads it, for there is nothing to learn.

Attention and means would be made of it by half where texts are short.
"""

import numpy as np
from torch import Tensor, nn

from ..cache.reader import Split

_ROUNDING = 0.1  # share of a half-precision value by which batches of other shapes may change it


def shared_tokens(*splits: Split) -> int:
    """How many tokens all rows of all these splits begin with, and have the same hidden states of.

    An encoder's states of the same tokens differ with what comes after them: there it is none. (A few, such as [CLS] at
    an early layer, may differ by little; but where a causal LM has any token in common, it has all of them.)

    Raises:
        CacheError: if a shard cannot be read, or is damaged.
    """
    splits = tuple(dict.fromkeys(splits))
    found = [split.shared_tokens() for split in splits]
    shortest = min(map(len, found))
    same = np.logical_and.reduce([tokens[:shortest] == found[0][:shortest] for tokens in found])
    shared, first = _leading(same), None
    for split in splits if shared else ():
        lengths = split.lengths
        hidden = split.read(np.unique([0, len(split) - 1, int(lengths.argmin()), int(lengths.argmax())])).hidden.float()
        begins = hidden[..., :shared, :]
        first = begins[:1] if first is None else first
        # Each dimension by its own size: some are hundreds of times larger than others.
        size = hidden.abs().amax(dim=(0, -2)).unsqueeze(-2)
        same = ((begins - first).abs() <= _ROUNDING * size).all(dim=-1).flatten(0, -2).all(dim=0)
        if not same.all():
            return 0
    return shared


def own_tokens(mask: Tensor, skip: int) -> Tensor:
    """A mask without the first `skip` real tokens of each row; a row that has no more keeps its last one.

    Args:
        mask: (B, T) bool, True = real token.
        skip: tokens.

    Returns:
        (B, T) bool.
    """
    if not skip:
        return mask
    skipped = (mask.sum(dim=1, keepdim=True) - 1).clamp(max=skip)
    return mask & (mask.long().cumsum(dim=1) > skipped)


def without_shared(
    skip: int, _head: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a head is given, to what it reads: a forward pre-hook, once it knows `skip`."""

    def read(hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return hidden, own_tokens(mask.bool(), skip)

    return read(*args, **named), {}


def _leading(same: np.ndarray) -> int:
    """How many come before the first that is False."""
    return int(np.argmin(np.append(same, False)))
