"""The one tuning loop: every method goes through it, and an interrupted one goes on in it, step for step the same."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.errors import AdapterError, BackboneError
from .batches import Budget, out_of_memory, run_in_batches
from .progress import Progress
from .start import common_prefix
from .tune_methods import Method
from .tune_settings import TuneSettings
from .tune_state import EpochRecord, TuneState

WARMUP = 0.05
"""Share of all steps in which the learning rate rises; then it falls to 0 along a cosine."""
SAVE_SECONDS = 180.0
"""Between two checkpoints within an epoch; each epoch ends with one."""


@dataclass(frozen=True, eq=False)
class Examples:
    """N rows."""

    tokens: list[np.ndarray]
    """Token ids of each."""
    target: np.ndarray
    """(N,) float64 gold scores."""

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, rows: Iterable[int]) -> list[np.ndarray]:
        """Token ids of some."""
        return [self.tokens[row] for row in rows]


def tune(
    model: nn.Module,
    method: Method,
    state: TuneState,
    train: Examples,
    val: Examples,
    *,
    settings: TuneSettings,
    label_range: tuple[float, float],
    device: torch.device,
    slots: int,
    save: Callable[[], None],
    listener: Progress | None,
) -> None:
    """Train from the step that `state` is at to the last one.

    AdamW without weight decay; learning rate up in a straight line, then down along a cosine; gradients clipped at
    norm 1. After each epoch the validation rows are predicted, and the weights with the lowest NRMSE are kept in
    `state.best`.

    Args:
        model: the causal LM, its adapter inside.
        method: what it is trained for.
        state: on `device`, changed in place.
        train: rows to learn from.
        val: rows that decide which epoch is best.
        settings: the recipe.
        label_range: for the NRMSE.
        device: where the model is.
        slots: tokens of one pass, besides what its rows begin with; a step's rows go through in as many passes as they
            need, their gradients summed up.
        save: makes `state` durable; called after each epoch, and every few minutes in between.
        listener: hears of epochs and progress.

    Raises:
        AdapterError: when the loss or a prediction is no longer finite.
        BackboneError: when a single row, or the optimizer, does not fit the memory.
    """
    per_epoch = math.ceil(len(train) / settings.batch_size)
    steps = settings.epochs * per_epoch
    if listener is not None:
        _announce(listener, state, train, val, settings, per_epoch)
    budget = Budget(slots)
    saved = lap = time.perf_counter()
    while state.step < steps:
        epoch, begin = divmod(state.step, per_epoch)
        model.train()
        for batch in epoch_batches(len(train), settings.batch_size, settings.seed, epoch)[begin:]:
            for group in state.optimizer.param_groups:
                group["lr"] = settings.lr * warmup_cosine(state.step, steps)
            torch.manual_seed(_seed_of(settings.seed, state.step))
            target = torch.from_numpy(train.target[batch]).float().to(device)
            rows = train.of(batch)
            loss = _take_step(method, state, rows, target, loss=settings.own_loss, budget=budget)
            state.step += 1
            state.loss_sum += loss * len(batch)
            now = time.perf_counter()
            state.epoch_seconds, lap = state.epoch_seconds + now - lap, now
            if listener is not None:
                listener.advance(len(batch), sum(map(len, rows)))
            if now - saved >= SAVE_SECONDS and state.step % per_epoch:
                save()
                saved = time.perf_counter()
        predictions = predict(model, method, val, budget, listener)
        if not np.isfinite(predictions).all():
            raise _diverged(state.step)
        nrmse, pearson = figures(val.target, predictions, label_range)
        now = time.perf_counter()
        seconds, lap = state.epoch_seconds + now - lap, now
        record = EpochRecord(epoch + 1, state.loss_sum / len(train), nrmse, pearson, round(seconds, 3))
        state.history.append(record)
        if state.best_epoch is record:
            state.keep_best()
        state.loss_sum = state.epoch_seconds = 0.0
        save()
        saved = time.perf_counter()
        if listener is not None:
            listener.note(describe(record, settings.epochs))


def predict(
    model: nn.Module, method: Method, rows: Examples, budget: Budget, listener: Progress | None = None
) -> np.ndarray:
    """Predictions (N,) float64, in the unit of the labels."""
    model.eval()
    order, lengths = _longest_first(rows.tokens, method)

    def forward(batch: range) -> Any:
        # Not inference_mode: what a model keeps of such a pass could not take part in training any more.
        with torch.no_grad():
            return method.predict(rows.of(order[batch.start : batch.stop])).cpu().double().numpy()

    predictions = np.empty(len(rows))
    tokens = [len(rows.tokens[row]) for row in order]
    for batch, values in run_in_batches(lengths, budget, forward, tokens=tokens, shorten=method.shorten):
        chosen = order[batch.start : batch.stop]
        predictions[chosen] = values
        if listener is not None:
            listener.advance(len(batch), sum(map(len, rows.of(chosen))))
    return predictions


def _longest_first(rows: list[np.ndarray], method: Method) -> tuple[list[int], list[int]]:
    """An order for passes without much padding, and how many tokens each row adds to a pass, in that order."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    shared = common_prefix(rows) if method.trees and len(rows) > 1 else 0
    return order, [len(rows[row]) - shared + method.more for row in order]


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches: each of `count` rows once, in an order that depends on seed and epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[begin : begin + batch_size] for begin in range(0, count, batch_size)]


def warmup_cosine(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step, counted from 0."""
    rising = max(1, round(WARMUP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def figures(target: np.ndarray, prediction: np.ndarray, label_range: tuple[float, float]) -> tuple[float, float | None]:
    """NRMSE, the root mean squared error by the width of the label range, and Pearson, None if either is constant."""
    nrmse = float(np.sqrt(np.mean((prediction - target) ** 2))) / (label_range[1] - label_range[0])
    if np.ptp(target) == 0 or np.ptp(prediction) == 0:
        return nrmse, None
    return nrmse, float(np.corrcoef(target, prediction)[0, 1])


def describe(record: EpochRecord, epochs: int) -> str:
    """A line for people."""
    pearson = f"{record.val_pearson:.4f}" if record.val_pearson is not None else "–"
    return (
        f"epoch {record.epoch} of {epochs}: loss {record.loss:.4f}, val NRMSE {record.val_nrmse:.4f}, "
        f"val Pearson {pearson}"
    )


def _take_step(
    method: Method, state: TuneState, rows: list[np.ndarray], target: Tensor, *, loss: str, budget: Budget
) -> float:
    loss_of = (nn.HuberLoss if loss == "huber" else nn.MSELoss)(reduction="sum")
    parameters = list(state.parameters.values())
    order, lengths = _longest_first(rows, method)

    def backward(batch: range) -> float:
        chosen = order[batch.start : batch.stop]
        predictions = method.predict([rows[row] for row in chosen])
        value = loss_of(predictions / method.unit, target[chosen] / method.unit) / len(rows)
        if not value.isfinite():
            raise _diverged(state.step)
        # Not backward(): where memory runs out half-way it would leave half of a pass's gradients, and a pass is tried
        # again.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return value.item()

    state.optimizer.zero_grad()
    tokens = [len(rows[row]) for row in order]
    passes = run_in_batches(lengths, budget, backward, tokens=tokens, shorten=method.shorten)
    total = sum(value for _, value in passes)
    try:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        state.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BackboneError(
            f"out of memory on moving the adapter's weights after step {state.step}; use a smaller --compute-dtype or "
            "--rank, or a device with more memory"
        ) from None
    return total


def _diverged(step: int) -> AdapterError:
    if step == 0:
        return AdapterError(
            "the first loss is not finite, before any step; tune with --compute-dtype float32, or, if this is what it "
            "had, from another copy of the weights"
        )
    return AdapterError(f"the loss was no longer finite after step {step}; tune into another folder with a lower --lr")


def _seed_of(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _announce(
    listener: Progress, state: TuneState, train: Examples, val: Examples, settings: TuneSettings, per_epoch: int
) -> None:
    done, begin = divmod(state.step, per_epoch)
    left = settings.epochs - done
    gone = [
        row for batch in epoch_batches(len(train), settings.batch_size, settings.seed, done)[:begin] for row in batch
    ]
    rows = left * (len(train) + len(val)) - len(gone)
    lengths = [sum(map(len, part)) for part in (train.tokens, val.tokens, train.of(gone))]
    if rows:
        listener.begin(rows, left * (lengths[0] + lengths[1]) - lengths[2])
