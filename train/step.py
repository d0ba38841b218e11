"""One training step, for every head."""

import torch
from torch import Tensor, nn

from .adamw import AdamW
from .data import TrainBatch
from .heads import Head


def take_step(head: Head, optimizer: AdamW, loss_of: nn.Module, batch: TrainBatch, *, lr: "float | Tensor") -> Tensor:
    """One step on one batch; gives its loss, a scalar () on the device of the head, which nobody waits for.

    Gradients are clipped at norm 1.

    Args:
        head: in training mode.
        optimizer: of its weights.
        loss_of: of standardised predictions and targets.
        batch: on any device; in pinned memory on the CPU, a CUDA device fetches it while it works.
        lr: learning rate; on a GPU it may be a tensor () there.
    """
    scale = head.target_scale
    hidden, mask, target = (fetch(part, scale.mean.device) for part in batch)
    loss = loss_of(scale.standardise(head(hidden, mask)), scale.standardise(target))
    optimizer.zero_grad()
    loss.backward()
    _clip(head)
    optimizer.step(lr=lr)
    return loss.detach()


def fetch(part: Tensor, device: torch.device) -> Tensor:
    """A part of a batch on a device. A CUDA device does not make the host wait, if the part lies in pinned memory."""
    # On mps such a copy may read memory that has been given away since: pinning is CUDA's.
    return part.to(device, non_blocking=device.type == "cuda")


def _clip(head: nn.Module) -> None:
    """Scale the gradients down to a norm of 1, if it is more."""
    parameters = list(head.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the CPU a look at the norm costs nothing, and most steps spare a pass over all gradients by it.
    if norm.device.type != "cpu" or not norm <= 1.0:
        nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
