"""Training steps on an NVIDIA GPU, recorded once for each shape of batch and then replayed (CUDA graphs).

A step is some hundred small operations, and starting them one by one takes the processor longer than the GPU takes to
run them. A recording starts them all at once. It works on fixed addresses and shapes: a batch is copied to where the
recording reads, and its rows are padded up to one of a few lengths, which changes no prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    """Where it leaves its loss, until the next replay of any recording."""


class RecordedSteps:
    """`take_step` for one head in training mode on a CUDA device, from recordings."""

    def __init__(self, head: Head, optimizer: AdamW, loss_of: nn.Module) -> None:
        self._step: Callable[[TrainBatch, Tensor], Tensor] = lambda batch, lr: take_step(
            head, optimizer, loss_of, batch, lr=lr
        )
        self._device = head.target_scale.mean.device
        self._lr = torch.zeros((), device=self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: dict[torch.Size, int] = {}
        self._recordings: dict[torch.Size, _Recording] = {}

    def __call__(self, batch: TrainBatch, *, lr: float) -> Tensor:
        """One step on a batch of the CPU in pinned memory; gives its loss, a scalar () on the device."""
        self._lr.fill_(lr)
        *outer, T, D = batch.hidden.shape
        shape = torch.Size([*outer, _padded(T), D])
        recording = self._recordings.get(shape)
        if recording is None:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= _WARM_UP:
                return self._step(batch, self._lr)
            recording = self._recordings[shape] = self._record(batch, shape)
        hidden, mask, target = recording.batch
        # What stands in the padding does not matter, so that only the mask is wiped.
        hidden[..., :T, :].copy_(batch.hidden, non_blocking=True)
        mask[:, T:].fill_(False)
        mask[:, :T].copy_(batch.mask, non_blocking=True)
        target.copy_(batch.target, non_blocking=True)
        recording.graph.replay()
        return recording.loss.clone()

    def _record(self, like: TrainBatch, shape: torch.Size) -> _Recording:
        """Record a step on a batch of that shape, without taking it."""
        hidden = torch.zeros(shape, dtype=like.hidden.dtype, device=self._device)
        mask = torch.zeros(shape[0], shape[-2], dtype=torch.bool, device=self._device)
        batch = TrainBatch(hidden, mask, torch.zeros_like(like.target, device=self._device))
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: the one that reads ahead allocates pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._step(batch, self._lr)
        return _Recording(graph, batch, loss)


def _padded(T: int) -> int:
    """The least of the few lengths that holds T tokens."""
    unit = max(1, (1 << (T - 1).bit_length()) // 2 // _SIZES)
    return -(-T // unit) * unit
