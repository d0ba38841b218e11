"""The one training loop: every head that learns by gradient, at every depth and seed, goes through it."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .adamw import AdamW
from .average import AveragedWeights
from .data import Readable, read_ahead, shuffled_batches
from .heads import Head
from .metrics import score
from .mix import MixedHead
from .recipe import Recipe
from .recorded import RecordedSteps
from .settings import MIX_LEARNING_RATE, TrainSettings
from .step import fetch, take_step

_LARGEST = 1e30  # mean or deviation of a hidden state: float32 ends at 3e38, and 1 / 1e38 is no longer exact
_CHECK = 32  # steps between looks at the loss; on a GPU each look waits for the device


@dataclass(frozen=True)
class EpochRecord:
    """One line of history.jsonl."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Mean training loss, on standardised targets."""
    val_nrmse: float
    val_pearson: float
    """NaN where predictions are constant."""
    seconds: float
    """Of training and validation."""


class Diverged(Exception):
    """The loss is no longer finite."""


def train_head(
    head: Head,
    train: Readable,
    val: Readable,
    *,
    settings: TrainSettings,
    recipe: Recipe,
    seed: int,
    label_range: tuple[float, float],
    device: torch.device,
    on_epoch: Callable[[EpochRecord], None],
    on_step: Callable[[int], None],
) -> list[EpochRecord]:
    """Train a head in place and leave it with the averaged weights of its best epoch.

    AdamW; learning rate up in a straight line, then down along a cosine; gradients clipped at norm 1; Huber (δ = 1) or
    squared error on standardised targets. What predicts is the average of the weights over the latest steps. Stops
    early once the validation figure that `best_by` names has not improved for `patience` epochs.

    Args:
        head: with its scales set; on `device`.
        train: rows to learn from.
        val: rows that decide which epoch is best.
        settings: what all heads share of the recipe.
        recipe: the rest.
        seed: draws the order of the rows.
        label_range: for the NRMSE.
        device: where the head is.
        on_epoch: hears of each epoch.
        on_step: hears after each step how many steps are done.

    Raises:
        Diverged: when the loss is NaN or infinite, or the inputs' mean or scale is too large for float32.
    """
    # Divided by a larger deviation, weights lose their digits or vanish, without a word.
    if not all((values.abs() <= _LARGEST).all() for values in head.input_scale.buffers()):
        raise Diverged(
            "the hidden states are too large to be standardised in float32; train on another layer, or with "
            "--no-standardise"
        )
    generator = np.random.default_rng(seed)
    steps = recipe.epochs * math.ceil(len(train) / settings.batch_size)
    faster = {head.weights: MIX_LEARNING_RATE / recipe.lr} if isinstance(head, MixedHead) else None
    optimizer = AdamW(head, weight_decay=recipe.weight_decay, faster=faster)
    factor = _warmup_cosine(steps, settings.warmup)
    loss_of = nn.HuberLoss() if settings.loss == "huber" else nn.MSELoss()
    on_cuda = device.type == "cuda"
    step = RecordedSteps(head, optimizer, loss_of) if on_cuda else partial(take_step, head, optimizer, loss_of)
    average = AveragedWeights(head, power=recipe.averaging_power)
    history: list[EpochRecord] = []
    done, best_state = 0, head.state_dict()
    for epoch in range(1, recipe.epochs + 1):
        started = time.perf_counter()
        head.train()
        losses: list[Tensor] = []
        for batch in read_ahead(train, shuffled_batches(train, settings.batch_size, generator), pinned=on_cuda):
            losses.append(step(batch, lr=recipe.lr * factor(done)))
            done += 1
            average.look(done)
            on_step(done)
            if done % _CHECK == 0 and not torch.stack(losses[-_CHECK:]).isfinite().all():
                raise Diverged(f"the loss was no longer finite by step {done}")
        mean_loss = torch.stack(losses).mean().item()
        average.take(done)
        predictions = predict_rows(average.head, val, device)
        if not (math.isfinite(mean_loss) and np.isfinite(predictions).all()):
            raise Diverged(f"the loss was no longer finite by step {done}")
        figures = score(val.target, predictions, label_range)
        seconds = time.perf_counter() - started
        history.append(EpochRecord(epoch, mean_loss, figures["nrmse"], figures["pearson"], seconds))
        on_epoch(history[-1])
        best = best_epoch(history, recipe.best_by)
        if best == epoch:
            best_state = copy.deepcopy(average.head.state_dict())
        elif epoch - best >= recipe.patience:
            break
    head.load_state_dict(best_state)
    head.eval()
    return history


def best_epoch(history: list[EpochRecord], by: str) -> int:
    """The first epoch with the lowest validation NRMSE, or the highest Pearson, below which constant predictions are.

    Args:
        history: one epoch at least.
        by: of BEST_BY.
    """
    if by == "nrmse":
        return min(history, key=lambda record: record.val_nrmse).epoch
    return max(history, key=lambda record: -math.inf if math.isnan(record.val_pearson) else record.val_pearson).epoch


@torch.inference_mode()
def predict_rows(head: Head, rows: Readable, device: torch.device) -> np.ndarray:
    """Predictions (N,) float64 in the order of `rows`, in the unit of the labels."""
    head.eval()
    batches = rows.batches()
    found: list[Tensor] = []
    for hidden, mask, _ in read_ahead(rows, batches, pinned=device.type == "cuda"):
        found.append(head(fetch(hidden, device), fetch(mask, device)))
    predictions = np.empty(len(rows))
    for batch, values in zip(batches, found, strict=True):  # not before: each look would wait for the device
        predictions[batch] = values.cpu().double().numpy()  # mps has no float64
    return predictions


def _warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor
