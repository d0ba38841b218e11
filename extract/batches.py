"""Rows into forward passes: length-sorted batches under a token budget, halved when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..cache.errors import BackboneError


def run_in_batches(lengths: Sequence[int], budget: int, forward: Callable[[range], Any]) -> Iterator[tuple[range, Any]]:
    """Run `forward` over all rows, in order, in batches of at most `budget` token slots.

    Args:
        lengths: tokens of each row, longest first, so that the first batch is the largest there will be.
        budget: token slots of a batch, padding included; a row longer than that goes alone.
        forward: runs the rows of a range. When it is out of memory the range is halved and tried again, and later
            batches stay at the size that fitted.

    Yields:
        The rows of each batch, and what `forward` returned for them.

    Raises:
        BackboneError: if a single row does not fit the memory; names its length.
    """
    begin = 0
    while begin < len(lengths):
        rows = min(max(1, budget // max(1, lengths[begin])), len(lengths) - begin)
        batch = range(begin, begin + rows)
        try:
            result = forward(batch)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            if rows == 1:
                raise BackboneError(
                    f"out of memory on a single row of {lengths[begin]:,} tokens; use --max-length with --truncate, "
                    "a smaller --compute-dtype, or a device with more memory"
                ) from None
            budget = (rows // 2) * lengths[begin]
            _free_cached_memory()
            continue
        yield batch, result
        begin += rows


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _free_cached_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
