"""The writing side of extraction: a thread that takes hidden states from the device, checks them and writes them.

Copying, checking, hashing and writing happen while the backbone computes the next batch.
"""

import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..cache.errors import DataError
from ..cache.shard import ShardWriter

if TYPE_CHECKING:
    import torch

_AHEAD = 2  # batches that may wait: enough to overlap, few enough to keep memory flat


class ShardSink:
    """Writes the batches of one shard in the background; leaving the block waits for the last one."""

    def __init__(
        self, writer: ShardWriter, *, lengths: Sequence[int], names: Sequence[str], skip: bool = False
    ) -> None:
        """Args:
        writer: the shard.
        lengths: real tokens of each of its rows.
        names: how messages call each row, "row 17 (id 'a') of train".
        skip: whether rows that cannot be stored are left out; if not, they are an error.
        """
        self._writer = writer
        self._lengths = lengths
        self._names = names
        self._skip = skip
        self._dropped = False
        self._queue: queue.Queue[tuple[range, Any, Any] | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="relish-shard-writer", daemon=True)

    def put(self, rows: range, states: "torch.Tensor", stored: "torch.Tensor") -> None:
        """Hand over the hidden states (B, K, T, D) of a batch, on the device.

        Args:
            rows: which of the shard.
            states: in the compute dtype.
            stored: the same in the storage dtype. Not made here, since that takes memory on the device, and this thread
                could not halve the batch when there is none.

        Raises:
            DataError: if an earlier batch held values that cannot be stored.
        """
        self._raise_error()
        self._queue.put((rows, states, stored))

    def drain(self) -> None:
        """Wait until nothing that was handed over is held any more."""
        self._queue.join()

    def __enter__(self) -> "ShardSink":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._dropped = kind is not None  # then what waits in the queue need not be written
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise_error()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if (
                self._error is None and not self._dropped
            ):  # after an error the queue is only drained, so that `put` never blocks
                try:
                    self._write(*item)
                except BaseException as error:
                    self._error = error
            del item  # which would stay on the device until the next batch comes
            self._queue.task_done()

    def _write(self, rows: range, states: "torch.Tensor", stored: "torch.Tensor") -> None:
        stored = stored.cpu()
        for number, row in enumerate(rows):
            values = stored[number, :, : self._lengths[row]]
            # A sum is finite only if all its terms are, and is one pass where isfinite().all() is two.
            if not values.sum(dtype=values.new_empty(0).float().dtype).isfinite() and not values.isfinite().all():
                why, instead = self._why(states[number, :, : self._lengths[row]].cpu())
                if not self._skip:
                    raise DataError(
                        f"{self._names[row]} has {why}; nothing of its shard was kept. "
                        f"Try {instead}, or --on-nonfinite skip to leave such rows out"
                    )
                self._writer.skip(row, why)
            else:
                self._writer.write(row, values)

    def _why(self, values: "torch.Tensor") -> tuple[str, str]:
        import torch

        if not values.isfinite().all():
            return "NaN or infinity in its hidden states", "--compute-dtype float32"
        dtype = self._writer.layout.dtype
        largest, end = values.abs().max().item(), torch.finfo(dtype.torch).max
        shown = [f"{value:,.0f}" if value < 1e15 else f"{value:g}" for value in (largest, end)]
        wider = "bfloat16" if dtype.name == "float16" else "float32"
        return f"a hidden state of {shown[0]}, and {dtype.name} ends at {shown[1]}", f"--dtype {wider}"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
