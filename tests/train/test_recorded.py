"""Recorded steps on a GPU. Most of these tests need one; no machine of the continuous integration has one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relish.train.adamw import AdamW
from relish.train.data import TrainBatch
from relish.train.heads import Head, HeadSpec, build_head
from relish.train.recorded import RecordedSteps, _padded
from relish.train.settings import CLOSED_FORM, HEADS
from relish.train.step import take_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LEARNING = [name for name in HEADS if name not in CLOSED_FORM]
D = 24


@contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def head_named(name: str, layers: int | None, *, dropout: float = 0.0) -> Head:
    torch.manual_seed(0)
    spec = HeadSpec(
        name=name, hidden_size=D, depth=2, latent_size=16, num_heads=4, dropout=dropout, layers=layers, skip=1
    )
    head = build_head(spec)
    head.target_scale.set(2.0, 1.5)
    return head.cuda().train()


def batches(count: int, layers: int | None, *, rows: int = 6) -> list[TrainBatch]:
    """Of lengths that come again and again, and of which several are padded to the same."""
    torch.manual_seed(1)
    made = []
    for number in range(count):
        T = (33, 36, 35, 40, 18)[number % 5]
        lengths = torch.randint(1, T + 1, (rows,))
        lengths[0] = T
        mask = torch.arange(T) < lengths[:, None]
        hidden = torch.randn(rows, *([layers] if layers else []), T, D).bfloat16()
        hidden = hidden.masked_fill(~(mask if layers is None else mask[:, None]).unsqueeze(-1), float("nan"))
        made.append(TrainBatch(*(part.pin_memory() for part in (hidden, mask, torch.randn(rows)))))
    return made


@given(st.integers(1, 1 << 17))
def test_rows_are_padded_by_an_eighth_at_most(T: int) -> None:
    assert T <= _padded(T) <= T + max(0, (T - 1) // 8)
    assert _padded(_padded(T)) == _padded(T)


def test_there_are_few_lengths() -> None:
    assert len({_padded(T) for T in range(1, 8193)}) <= 8 * 11


def test_without_memory_for_a_recording_steps_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(*_: object) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    tried: list[int] = []
    monkeypatch.setattr(RecordedSteps, "_record", record)
    torch.manual_seed(0)
    plain = build_head(HeadSpec(name="linear", hidden_size=D, depth=0, latent_size=16, num_heads=4, dropout=0.0))
    recorded = copy.deepcopy(plain)
    optimizers = [AdamW(head, weight_decay=0.1) for head in (plain, recorded)]
    replayed = RecordedSteps(recorded, optimizers[1], nn.HuberLoss())
    batch = TrainBatch(torch.randn(4, 9, D), torch.ones(4, 9, dtype=torch.bool), torch.randn(4))
    for _ in range(6):
        theirs = take_step(plain, optimizers[0], nn.HuberLoss(), batch, lr=0.01)
        assert replayed(batch, lr=0.01).item() == pytest.approx(theirs.item(), rel=1e-5)
    assert tried == [1]


def test_batches_of_all_shapes_share_memory() -> None:
    head = build_head(HeadSpec(name="linear", hidden_size=D, depth=0, latent_size=16, num_heads=4, dropout=0.0))
    steps = RecordedSteps(head, AdamW(head, weight_decay=0.0), nn.HuberLoss())
    taken = [steps._room_for(torch.Size((4, T, D)), torch.bfloat16) for T in (8, 16, 12, 20, 40, 9, 72)]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in taken}
    assert [one.shape[1] for one in taken] == [8, 16, 12, 20, 40, 9, 72]
    assert sum(held.values()) <= 2 * max(held.values())


@needs_gpu
@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("name", LEARNING)
def test_recorded_steps_are_plain_steps(name: str, layers: int | None) -> None:
    plain = head_named(name, layers)
    recorded = copy.deepcopy(plain)
    optimizers = [AdamW(head, weight_decay=0.1) for head in (plain, recorded)]
    loss_of = nn.HuberLoss()
    replayed = RecordedSteps(recorded, optimizers[1], loss_of)
    losses = []
    for number, batch in enumerate(batches(25, layers)):
        lr = 1e-2 / (1 + number)
        losses.append((take_step(plain, optimizers[0], loss_of, batch, lr=lr), replayed(batch, lr=lr)))
    assert len(replayed._recordings) == 3  # 33, 35 and 36 share one
    theirs, ours = (torch.stack(values).cpu() for values in zip(*losses, strict=True))
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for (key, one), other in zip(plain.named_parameters(), recorded.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@needs_gpu
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("name", LEARNING)
def test_no_step_waits_for_the_device(name: str, layers: int | None) -> None:
    head = head_named(name, layers, dropout=0.1)
    step = RecordedSteps(head, AdamW(head, weight_decay=0.1), nn.HuberLoss())
    given = batches(5, layers)
    step(given[0], lr=1e-3)  # the libraries set themselves up
    with never_waiting():
        losses = [step(given[1], lr=1e-3)]
    for _ in range(3):
        losses += [step(batch, lr=1e-3) for batch in given]
    assert len(step._recordings) == 3
    with never_waiting():
        losses += [step(batch, lr=1e-3) for batch in given]
    assert torch.stack(losses).isfinite().all()


@needs_gpu
def test_dropout_is_drawn_anew_at_each_replay() -> None:
    head = head_named("relish", None, dropout=0.5)
    step = RecordedSteps(head, AdamW(head, weight_decay=0.0), nn.HuberLoss())
    batch = batches(1, None)[0]
    losses = torch.stack([step(batch, lr=0.0) for _ in range(8)][3:]).cpu()
    assert len(losses.unique()) > 1
