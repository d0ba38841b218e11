"""Rows into forward passes: length-sorted batches under a token budget, halved when memory runs out.

And what a person may do about passes that fail.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cache.errors import BackboneError

if TYPE_CHECKING:
    import torch

# What a plain RuntimeError says when memory ran out: the CPU's allocator (Windows' too), CUDA and its libraries, mps.
_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Invalid buffer size",
)

CUT = "--max-length with --truncate"
"""What makes rows shorter."""


@dataclass
class Budget:
    """How many token slots, padding included, a forward pass may have; shrinks when memory runs out, and stays so."""

    slots: int


def run_in_batches(
    lengths: Sequence[int],
    budget: Budget,
    forward: Callable[[range], Any],
    release: Callable[[], None] = lambda: None,
    *,
    tokens: Sequence[int] | None = None,
    shorten: str = CUT,
) -> Iterator[tuple[range, Any]]:
    """Run `forward` over all rows, in order, in batches within a budget.

    Args:
        lengths: slots of each row, longest first, so that the first batch is the largest there will be.
        budget: of a batch; a row that is longer goes alone.
        forward: runs the rows of a range. When it is out of memory the range is halved and tried again, and later
            batches stay at the size that fitted.
        release: gives back the memory that earlier batches still hold, before a range is tried again.
        tokens: of each row, for people; None where they are its slots.
        shorten: what makes a row shorter, for people; "" where nothing does.

    Yields:
        The rows of each batch, and what `forward` returned for them.

    Raises:
        BackboneError: if a single row does not fit the memory; names its length.
    """
    begin = 0
    released = False
    while begin < len(lengths):
        rows = min(max(1, budget.slots // max(1, lengths[begin])), len(lengths) - begin)
        batch = range(begin, begin + rows)
        fitted = True
        try:
            result = forward(batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if rows == 1 and released:
                cut = f"{shorten}, " if shorten else ""
                raise BackboneError(
                    f"out of memory on a single row of {(tokens or lengths)[begin]:,} tokens; use {cut}a smaller "
                    "--compute-dtype, or a device with more memory"
                ) from None
            fitted = False
        if fitted:
            yield batch, result  # pyright: ignore[reportPossiblyUnboundVariable]
            result = None  # or it would stay in memory during the next pass
            begin += rows
            released = False
        else:
            # After the except block, whose traceback keeps the failed pass's tensors alive.
            if rows > 1:
                budget.slots = rows // 2 * lengths[begin]
            release()
            _free_cached_memory()
            released = True


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, of whatever device."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def against_nan(dtype: "torch.dtype") -> str:
    """What a person may try where an LLM that ran in a type gave NaN or infinity."""
    import torch

    return "--compute-dtype float32" if dtype != torch.float32 else "another copy of the weights"


def _free_cached_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
