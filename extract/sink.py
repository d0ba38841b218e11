"""The writing side of extraction: a thread that takes hidden states from the device, checks them and writes them.

Copying, checking, hashing, writing and the commit of each shard happen while the backbone computes what comes next.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..cache.dtypes import StorageDtype
from ..cache.errors import DataError
from ..cache.shard import ShardWriter
from .batches import against_nan

if TYPE_CHECKING:
    import torch

_AHEAD = 2  # batches that may wait: enough to overlap, few enough to keep memory flat


@dataclass(frozen=True, eq=False)
class SinkShard:
    """A shard to be written."""

    open: Callable[[], AbstractContextManager[ShardWriter]]
    """Begins it; leaving the block commits it."""
    lengths: Sequence[int]
    """Real tokens of each of its rows."""
    names: Sequence[str]
    """How messages call each row, "row 17 (id 'a') of train"."""


_Batch = tuple[SinkShard, range, "list[torch.Tensor]"]


class ShardSink:
    """Writes shards in the background, one after another; leaving the block waits for the last commit.

    A shard is begun with its first batch and committed with its last. One that has not got all its rows when the block
    is left is dropped.
    """

    def __init__(self, *, skip: bool = False) -> None:
        """Args:
        skip: whether rows that cannot be stored are left out; if not, they are an error.
        """
        self._skip = skip
        self._queue: queue.Queue[_Batch | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="relish-shard-writer", daemon=True)

    def put(self, shard: SinkShard, rows: range, states: "torch.Tensor", stored: "torch.Tensor") -> None:
        """Hand over the hidden states (B, K, T, D) of a batch, on the device.

        The batches of a shard come in order, without those of another between them.

        Args:
            shard: the shard.
            rows: which of the shard.
            states: in the compute dtype.
            stored: the same in the storage dtype. Not made here, since that takes memory on the device, and this thread
                could not halve the batch when there is none.

        Raises:
            DataError: if an earlier batch held values that cannot be stored.
            CacheError: if an earlier batch or shard could not be written.
        """
        self._raise_error()
        self._queue.put((shard, rows, [states, stored]))

    def drain(self) -> None:
        """Wait until nothing that was handed over is held any more.

        Raises:
            DataError, CacheError: as `put` does.
        """
        self._queue.join()
        self._raise_error()

    def __enter__(self) -> "ShardSink":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def _work(self) -> None:
        batches = self._batches()
        try:
            for batch in batches:
                self._write_shard(batch, batches)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the batch
            self._error = error
        for _ in batches:
            pass  # so that neither `put` nor `drain` blocks

    def _batches(self) -> Iterator[_Batch]:
        while (batch := self._queue.get()) is not None:
            yield batch
            batch[2].clear()  # which would stay on the device until the next batch comes
            self._queue.task_done()

    def _write_shard(self, batch: _Batch, batches: Iterator[_Batch]) -> None:
        shard, rows, tensors = batch
        with shard.open() as writer:
            self._write(writer, shard, rows, *tensors)
            tensors.clear()  # a commit takes its time, and the device is needed
            while rows.stop < len(shard.lengths):
                following = next(batches, None)
                if following is None:
                    raise _Unfinished
                _, rows, tensors = following
                self._write(writer, shard, rows, *tensors)
                tensors.clear()

    def _write(
        self, writer: ShardWriter, shard: SinkShard, rows: range, states: "torch.Tensor", stored: "torch.Tensor"
    ) -> None:
        stored = stored.cpu()
        for number, row in enumerate(rows):
            values = stored[number, :, : shard.lengths[row]]
            if not _all_finite(values):
                why, instead = _why(states[number, :, : shard.lengths[row]].cpu(), writer.layout.dtype)
                if not self._skip:
                    raise DataError(
                        f"{shard.names[row]} has {why}; nothing of its shard was kept. "
                        f"Try {instead}, or --on-nonfinite skip to leave such rows out"
                    )
                writer.skip(row, why)
            else:
                writer.write(row, values)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class _Unfinished(Exception):
    """The extraction ended in the middle of a shard."""


def _all_finite(values: "torch.Tensor") -> bool:
    """Whether no value is NaN or infinite, of any of the three storage types.

    By numpy, which stays in this thread: torch would share the work out to threads of its own, and these, waiting for
    more, would take the cores from the forward pass (an eighth of an extraction's time on two).
    """
    import torch

    if values.dtype == torch.float32:
        return bool(np.isfinite(values.numpy()).all())
    exponent = 0x7F80 if values.dtype == torch.bfloat16 else 0x7C00
    bits = values.view(torch.int16).numpy()
    return not bool(((bits & exponent) == exponent).any())


def _why(values: "torch.Tensor", dtype: StorageDtype) -> tuple[str, str]:
    import torch

    if not values.isfinite().all():
        return "NaN or infinity in its hidden states", against_nan(values.dtype)
    largest, end = values.abs().max().item(), torch.finfo(dtype.torch).max
    shown = [f"{value:,.0f}" if value < 1e15 else f"{value:g}" for value in (largest, end)]
    wider = "bfloat16" if dtype.name == "float16" else "float32"
    return f"a hidden state of {shown[0]}, and {dtype.name} ends at {shown[1]}", f"--dtype {wider}"
