"""What all training rows begin with, such as a prompt's instructions: no head reads it, for there is nothing to learn.

Attention and means would be made of it by half where texts are short.
"""

import torch
from torch import Tensor


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
    return mask & (mask.cumsum(dim=1) > skipped)


def without_shared(skip: int, _head: torch.nn.Module, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states and mask as a head is given them, to those it reads: a forward pre-hook, once it knows `skip`."""
    hidden, mask = given
    return hidden, own_tokens(mask.bool(), skip)
