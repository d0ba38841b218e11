"""What all rows begin with, such as a prompt's instructions: no head reads it, for there is nothing to learn.

Attention and means would be made of it by half where texts are short.
"""

from torch import Tensor, nn


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
