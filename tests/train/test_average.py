import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.train import loop
from relish.train.average import AveragedWeights
from relish.train.grid import train_heads
from relish.train.heads import HeadSpec, build_head
from relish.train.run import load_head
from relish.train.settings import AVERAGE_EVERY, TrainSettings


def small_head():
    return build_head(HeadSpec(name="relish", hidden_size=4, depth=1, latent_size=8, num_heads=2, dropout=0))


def set_to(head, value):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(value)


def value_of(average):
    values = torch.cat([parameter.flatten() for parameter in average.head.parameters()])
    assert torch.allclose(values, values[0])
    return values[0].item()


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(-3, 3)), min_size=1, max_size=12), st.sampled_from([3.0, 8.0]))
def test_each_look_counts_by_the_power_of_the_steps_up_to_it(looks, power):
    head = small_head()
    average, steps = AveragedWeights(head, power=power), np.cumsum([gap for gap, _ in looks])
    for step, (_, value) in zip(steps, looks, strict=True):
        set_to(head, value)
        average.take(int(step))
    counts = np.diff(steps.astype(float) ** (power + 1), prepend=0)
    expected = counts @ np.array([value for _, value in looks]) / counts.sum()
    assert value_of(average) == pytest.approx(expected, abs=1e-4)


def test_some_steps_are_looked_at_and_none_twice():
    head = small_head()
    average, seen = AveragedWeights(head, power=8), []
    for step in range(1, 3 * AVERAGE_EVERY + 1):
        set_to(head, float(step))
        before = value_of(average) if seen else None
        average.look(step)
        if step % AVERAGE_EVERY == 0:
            seen.append(step)
        elif before is not None:
            assert value_of(average) == before
    assert seen[-2] < value_of(average) < seen[-1]
    before = value_of(average)
    set_to(head, 1e6)
    average.take(3 * AVERAGE_EVERY)
    assert value_of(average) == before


def test_what_learns_is_not_changed_by_it():
    head = small_head()
    average = AveragedWeights(head, power=8)
    set_to(head, 2.0)
    average.take(5)
    average.take(9)
    assert all(bool((parameter == 2.0).all()) for parameter in head.parameters())
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_the_average_is_what_is_validated_and_kept(cache, tmp_path, monkeypatch):
    kept = []

    class Noted(AveragedWeights):
        def take(self, steps):
            super().take(steps)
            kept.append([parameter.clone() for parameter in self.head.parameters()])

    monkeypatch.setattr(loop, "AveragedWeights", Noted)
    settings = TrainSettings(depths=(1,), latent_size=32, num_heads=4, epochs=1, workers=1, threads=1, device="cpu")
    train_heads(cache, tmp_path / "r", settings)
    for average, saved in zip(kept[-1], load_head(tmp_path / "r/relish-L1-seed0").parameters(), strict=True):
        assert torch.equal(average, saved)
