"""Rows into forward passes: length-sorted batches under a token budget, halved when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.errors import BackboneError


@dataclass
class Budget:
    """How many token slots, padding included, a forward pass may have; shrinks when memory runs out, and stays so."""

    slots: int


def run_in_batches(
    lengths: Sequence[int], budget: Budget, forward: Callable[[range], Any]
) -> Iterator[tuple[range, Any]]:
    """Run `forward` over all rows, in order, in batches within a budget.

    Args:
        lengths: tokens of each row, longest first, so that the first batch is the largest there will be.
        budget: of a batch; a row that is longer goes alone.
        forward: runs the rows of a range. When it is out of memory the range is halved and tried again, and later
            batches stay at the size that fitted.

    Yields:
        The rows of each batch, and what `forward` returned for them.

    Raises:
        BackboneError: if a single row does not fit the memory; names its length.
    """
    begin = 0
    while begin < len(lengths):
        rows = min(max(1, budget.slots // max(1, lengths[begin])), len(lengths) - begin)
        batch = range(begin, begin + rows)
        fitted = True
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
            fitted = False
        if fitted:
            yield batch, result  # pyright: ignore[reportPossiblyUnboundVariable]
            begin += rows
        else:
            # After the except block, whose traceback keeps the failed pass's tensors alive.
            budget.slots = (rows // 2) * lengths[begin]
            _free_cached_memory()


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator, cuBLAS and mps raise a plain RuntimeError.
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _free_cached_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
