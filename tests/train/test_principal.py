"""The axes that relish begins with, against numpy's singular vectors of all tokens."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from relish.cache.reader import open_cache
from relish.train import principal
from relish.train.data import Rows, feature_moments, open_split
from relish.train.grid import train_heads
from relish.train.principal import begin_with, principal_axes
from relish.train.run import load_head
from relish.train.scale import InputScale
from relish.train.settings import TrainSettings

from .conftest import HIDDEN, write_cache


def rows_of(cache, layer=None):
    split = open_split(open_cache(cache), "train", layer)
    return Rows(split, np.arange(len(split)))


def scale_of(rows, *, skip=0, times=1.0):
    moments = feature_moments(rows, None, skip=skip)
    scale = InputScale(*moments.mean.shape)
    scale.set(moments.mean, moments.std * times)
    return scale


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("layer", [2, "mix"])
def test_they_are_those_of_all_tokens(tmp_path, layer, skip):
    rows = rows_of(write_cache(tmp_path / "c", layers=(2, 4)), layer)
    scale = scale_of(rows, skip=skip, times=1.5 ** torch.arange(HIDDEN))  # so that no two axes are alike
    hidden, mask = rows.split.read(rows.index)
    own = torch.arange(mask.shape[1]) >= torch.minimum(torch.tensor(skip), mask.sum(1) - 1)[:, None]
    layers = hidden.unbind(1) if layer == "mix" else [hidden]
    means, scales = scale.mean.view(-1, HIDDEN), scale.scale.view(-1, HIDDEN)
    tokens = sum(
        (one[mask & own].double() - mean) / by for one, mean, by in zip(layers, means, scales, strict=True)
    ) / len(layers)
    _, _, expected = np.linalg.svd((tokens - tokens.mean(0)).numpy(), full_matrices=False)
    axes = principal_axes(rows, scale, skip=skip, count=10)
    assert axes.shape == (10, HIDDEN)
    torch.testing.assert_close(axes @ axes.T, torch.eye(10), rtol=0, atol=1e-5)
    # Up to their sign: |cos| between each and its own is 1.
    cosines = (axes.double().numpy() * expected[:10]).sum(axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)


def test_a_sample_shows_them_too(tmp_path, monkeypatch):
    """Of some rows, never the same as the first ones."""
    rows = rows_of(write_cache(tmp_path / "c", sizes={"train": 400}))
    scale = scale_of(rows, times=1.5 ** torch.arange(HIDDEN))
    whole = principal_axes(rows, scale, skip=0, count=2)
    monkeypatch.setattr(principal, "_SAMPLE", 1000)
    read = []
    real = principal.read_ahead
    monkeypatch.setattr(principal, "read_ahead", lambda rows, batches: read.append(rows.index) or real(rows, batches))
    some = principal_axes(rows, scale, skip=0, count=2)
    (index,) = read
    assert 1000 <= rows.split.lengths[index].sum() < 1012
    assert index[-1] > len(index)
    assert not torch.equal(some, whole)
    assert (some * whole).sum(dim=1).abs().min() > 0.95


def test_always_the_same_and_nobody_elses_draws_are_disturbed(cache):
    rows = rows_of(cache)
    torch.manual_seed(7)
    first = principal_axes(rows, scale_of(rows), skip=0, count=5)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(principal_axes(rows, scale_of(rows), skip=0, count=5), first)


def test_no_more_than_there_are_dimensions_or_tokens(cache, tmp_path):
    rows = rows_of(cache)
    assert principal_axes(rows, scale_of(rows), skip=0, count=1000).shape == (HIDDEN, HIDDEN)
    few = rows_of(write_cache(tmp_path / "few", sizes={"train": 2}))
    tokens = int(few.lengths.sum())
    assert principal_axes(few, scale_of(few), skip=0, count=1000).shape == (min(tokens, HIDDEN), HIDDEN)


def test_there_are_none_of_states_that_are_not_finite(tmp_path):
    rows = rows_of(write_cache(tmp_path / "c", fill=float("inf")))
    assert principal_axes(rows, InputScale(HIDDEN), skip=0, count=5) is None


def test_there_are_none_of_states_that_are_too_large(tmp_path):
    rows = rows_of(write_cache(tmp_path / "c", times=1e37))
    assert principal_axes(rows, InputScale(HIDDEN), skip=0, count=5) is None


@pytest.mark.parametrize("size", [6, 9])
def test_a_projection_keeps_what_lies_along_them_and_loses_the_rest(size):
    axes = torch.linalg.qr(torch.randn(12, 6))[0].T
    projection = nn.Linear(12, size)
    begin_with(projection, axes)
    along = torch.randn(5, 6) @ axes
    torch.testing.assert_close((along @ projection.weight.T).norm(dim=1), along.norm(dim=1) / math.sqrt(3))
    rest = torch.randn(5, 12)
    rest -= rest @ axes.T @ axes
    assert (rest @ projection.weight.T).abs().max() < 1e-5
    before = projection.weight.clone()
    begin_with(projection, axes)
    assert not torch.allclose(projection.weight, before)


def test_relish_begins_with_them_unless_it_reads_raw_states(tmp_path):
    """After one step at a rate of next to nothing, it still does."""
    cache = write_cache(tmp_path / "c", layers=(2, 4))
    small = {"depths": (1,), "latent_size": 8, "num_heads": 2, "epochs": 1, "batch_size": 96, "lr": 1e-9}
    for layer in (2, "mix"):
        rows = rows_of(cache, layer)
        axes = principal_axes(rows, scale_of(rows), skip=0, count=8)
        for standardise in (True, False):
            out = tmp_path / f"{layer}-{standardise}"
            train_heads(cache, out, TrainSettings(layer=layer, standardise=standardise, workers=1, **small))
            head = load_head(out / "relish-L1-seed0")
            weight = (head.head if layer == "mix" else head).input_projection.weight
            outside = (weight - weight @ axes.T @ axes).norm() / weight.norm()
            assert (outside < 1e-3) == standardise
