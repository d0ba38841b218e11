import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.cache.errors import CacheError, DataError
from relish.cache.reader import open_cache
from relish.train.data import Rows, feature_moments, ordered_batches, read_ahead, shuffled_batches, training_rows
from relish.train.settings import TrainSettings

from .conftest import write_cache


def all_rows(cache, split="train"):
    opened = open_cache(cache).split(split)
    return Rows(opened, np.arange(len(opened)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_prediction_batches_hold_every_row_once_within_the_budget(lengths, slots):
    lengths = np.array(lengths)
    batches = ordered_batches(lengths, slots)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= slots for batch in batches)


def test_an_epoch_holds_every_row_once_in_an_order_drawn_by_the_seed(cache):
    rows = all_rows(cache)
    first = shuffled_batches(rows, 7, np.random.default_rng(1))
    again = shuffled_batches(rows, 7, np.random.default_rng(1))
    other = shuffled_batches(rows, 7, np.random.default_rng(2))
    assert sorted(np.concatenate(first).tolist()) == list(range(96))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_read_ahead_gives_the_batches_in_order_with_their_targets(cache):
    rows = Rows(all_rows(cache).split, np.arange(50, 90))
    batches = shuffled_batches(rows, 6, np.random.default_rng(0))
    for batch, (hidden, mask, target) in zip(batches, read_ahead(rows, batches), strict=True):
        direct = rows.split.read(50 + batch)
        assert torch.equal(hidden, direct.hidden)
        assert torch.equal(mask, direct.mask)
        np.testing.assert_allclose(target, rows.target[batch], rtol=1e-6)


def test_read_ahead_passes_an_error_of_the_reader_on(tmp_path):
    cache = write_cache(tmp_path / "c")
    rows = all_rows(cache)
    shard = cache / "train-00000.h5"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="train-00000.h5 is damaged"):
        list(read_ahead(rows, ordered_batches(rows.lengths)))


@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_moments_are_those_of_all_real_tokens_or_pooled_rows(cache, pooling):
    rows = all_rows(cache)
    found = feature_moments(rows, pooling)
    read = [rows.split.read([row]).hidden[0].double() for row in range(len(rows))]
    values = {
        None: torch.cat(read),
        "mean": torch.stack([tokens.mean(dim=0) for tokens in read]),
        "last": torch.stack([tokens[-1] for tokens in read]),
    }[pooling]
    torch.testing.assert_close(found.mean.double(), values.mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std.double(), values.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)


def test_moments_come_from_a_sample_of_the_rows_always_the_same(cache, monkeypatch):
    rows = all_rows(cache)
    monkeypatch.setattr("relish.train.data._SAMPLE", 100)
    read = []
    original = rows.split.read
    monkeypatch.setattr(rows.split, "read", lambda index: read.extend(index) or original(index))
    first = feature_moments(rows, None)
    sampled = list(read)
    assert 100 <= rows.split.lengths[sampled].sum() < 200
    again = feature_moments(rows, None)
    assert read == sampled * 2
    assert torch.equal(first.mean, again.mean)
    values = torch.cat([original([row]).hidden[0].double() for row in sampled])
    torch.testing.assert_close(first.std.double(), values.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)


def test_moments_of_huge_values_do_not_overflow(tmp_path, monkeypatch):
    rows = all_rows(write_cache(tmp_path / "c"))
    original = rows.split.read
    monkeypatch.setattr(
        rows.split, "read", lambda index: original(index)._replace(hidden=original(index).hidden.float() * 1e25)
    )
    assert feature_moments(rows, None).std.isfinite().all()


def test_the_validation_split_is_used_where_there_is_one(cache):
    train, val = training_rows(open_cache(cache), TrainSettings())
    assert (len(train), val.split.name, len(val)) == (96, "dev", 32)
    _, named = training_rows(open_cache(cache), TrainSettings(val_split="test"))
    assert named.split.name == "test"


def test_without_a_validation_split_the_same_rows_are_held_out_for_every_cell(tmp_path):
    cache = open_cache(write_cache(tmp_path / "c", sizes={"train": 50}))
    train, val = training_rows(cache, TrainSettings(val_fraction=0.2))
    _, again = training_rows(cache, TrainSettings(val_fraction=0.2, seeds=(5,)))
    assert (len(train), len(val)) == (40, 10)
    assert not set(train.index) & set(val.index)
    assert np.array_equal(val.index, again.index)


def test_unlabelled_rows_are_counted_over_the_whole_split_whatever_is_held_out(tmp_path):
    cache = open_cache(write_cache(tmp_path / "c", sizes={"train": 50}, label=float("nan")))
    with pytest.raises(DataError, match="^50 of 50 rows of the split 'train'"):
        training_rows(cache, TrainSettings())


def test_unlabelled_rows_and_missing_splits_are_refused(tmp_path, cache):
    unlabelled = open_cache(write_cache(tmp_path / "c", label=float("nan")))
    with pytest.raises(DataError, match="96 of 96 rows of the split 'train' of the cache .* have no label"):
        training_rows(unlabelled, TrainSettings())
    with pytest.raises(CacheError, match="has no split 'nope', only train, dev, test"):
        training_rows(open_cache(cache), TrainSettings(val_split="nope"))
