"""Training steps on an NVIDIA GPU, recorded once for each shape of batch and then replayed (CUDA graphs).

A step is some hundred small operations, and starting them one by one takes the processor longer than the GPU takes to
run them. A recording starts them all at once. It works on fixed addresses and shapes: a batch is copied to where the
recording reads, and its rows are padded up to one of a few lengths, which changes no prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adamw import AdamW
from .data import TrainBatch
from .heads import Head
from .step import take_step

_SIZES = 8  # lengths per doubling: an eighth of padding at most, and few recordings
_WARM_UP = 2  # steps on a shape before it is recorded: libraries set themselves up in the first, rare shapes stay plain


@dataclass(frozen=True, eq=False)
class _Recording:
    graph: "torch.cuda.CUDAGraph"
    batch: TrainBatch
    """What it reads, on the GPU."""
    loss: Tensor
    """Where it leaves its loss, a scalar (), until the next replay of any recording."""


class RecordedSteps:
    """`take_step` for one head on a CUDA device, from recordings."""

    def __init__(self, head: Head, optimizer: AdamW, loss_of: nn.Module) -> None:
        """Record nothing yet.

        Args:
            head: on the device, in training mode. Neither it nor the loss may look at values on the host, nor make
                tensors whose shapes depend on values: neither can be recorded.
            optimizer: of its weights.
            loss_of: of standardised predictions and targets.
        """
        self._step: Callable[[TrainBatch, Tensor], Tensor] = lambda batch, lr: take_step(
            head, optimizer, loss_of, batch, lr=lr
        )
        self._device = head.target_scale.mean.device
        self._lr = torch.zeros((), device=self._device)
        self._pool: Any = None
        self._room: Tensor | None = None
        self._seen: dict[torch.Size, int] = {}
        self._recordings: dict[torch.Size, _Recording | None] = {}

    def __call__(self, batch: TrainBatch, *, lr: float) -> Tensor:
        """One step.

        Args:
            batch: hidden states (B, T, D) or (B, K, T, D), mask (B, T) and targets (B,), in pinned memory of the CPU.
            lr: learning rate.

        Returns:
            Its loss, a scalar () on the device.
        """
        self._lr.fill_(lr)
        *outer, T, D = batch.hidden.shape
        shape = torch.Size([*outer, _padded(T), D])
        if shape not in self._recordings:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] > _WARM_UP:
                self._recordings[shape] = self._try_to_record(batch, shape)
        recording = self._recordings.get(shape)
        if recording is None:
            return self._step(batch, self._lr)
        hidden, mask, target = recording.batch
        # What stands in the padding does not matter, so that only the mask is wiped.
        hidden[..., :T, :].copy_(batch.hidden, non_blocking=True)
        mask[:, T:].fill_(False)
        mask[:, :T].copy_(batch.mask, non_blocking=True)
        target.copy_(batch.target, non_blocking=True)
        recording.graph.replay()
        return recording.loss.clone()

    def _try_to_record(self, like: TrainBatch, shape: torch.Size) -> "_Recording | None":
        """A recording, or None where there is no memory for one: recordings keep theirs to themselves."""
        try:
            return self._record(like, shape)
        except torch.OutOfMemoryError:
            return None

    def _record(self, like: TrainBatch, shape: torch.Size) -> _Recording:
        """Record a step on a batch of that shape, without taking it."""
        mask = torch.zeros(shape[0], shape[-2], dtype=torch.bool, device=self._device)
        target = torch.zeros_like(like.target, device=self._device)
        batch = TrainBatch(self._room_for(shape, like.hidden.dtype), mask, target)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the one that reads ahead allocates pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._step(batch, self._lr)
        return _Recording(graph, batch, loss)

    def _room_for(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for the hidden states of a batch; batches of all shapes use the same, since they come one by one."""
        if self._room is None or len(self._room) < shape.numel():
            # Those recorded before keep theirs: by doubling they hold no more than the last one does.
            size = max(shape.numel(), 2 * len(self._room) if self._room is not None else 0)
            self._room = torch.zeros(size, dtype=dtype, device=self._device)
        return self._room[: shape.numel()].view(shape)


def _padded(T: int) -> int:
    """The least of the few lengths that holds T tokens."""
    unit = max(1, (1 << (T - 1).bit_length()) // 2 // _SIZES)
    return -(-T // unit) * unit
