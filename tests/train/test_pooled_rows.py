"""Rows pooled once: the same vectors, the same predictions, one pass over the cache, and nothing left behind."""

import numpy as np
import pytest
import torch

from relish.cache.errors import RunError
from relish.cache.reader import Split, open_cache
from relish.train import cell
from relish.train.data import Rows, open_split
from relish.train.grid import train_heads
from relish.train.heads import HeadSpec, build_head
from relish.train.loop import predict_rows
from relish.train.pooled_rows import PooledRows, pooled_rows
from relish.train.settings import MIX, TrainSettings

from ..disk import fill, small_disk
from .conftest import HIDDEN, write_cache

SMALL = {"latent_size": 32, "num_heads": 4, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("pooled") / "cache", layers=(1, 2))


def some_rows(cache, layer) -> Rows:
    split = open_split(open_cache(cache), "train", layer)
    return Rows(split, np.arange(90, 10, -3))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [2, MIX])
def test_each_row_is_what_its_own_tokens_pool_to(layers, tmp_path, pooling, layer):
    rows = some_rows(layers, layer)
    pooled = pooled_rows(rows, pooling, skip=1, file=tmp_path / "pooled")
    assert len(pooled) == len(rows)
    np.testing.assert_array_equal(pooled.target, rows.target)
    batch = np.array([5, 0, 26, 3])
    hidden, mask, target = pooled.read(batch)
    assert (hidden.shape, mask.shape) == ((4, 1, HIDDEN) if layer == 2 else (4, 2, 1, HIDDEN), (4, 1))
    assert mask.all()
    np.testing.assert_allclose(target, rows.target[batch], rtol=1e-6)
    for number, found in zip(batch, hidden.reshape(4, -1, HIDDEN), strict=True):
        own = rows.split.read([rows.index[number]]).hidden.reshape(len(found), -1, HIDDEN).float()[:, 1:]
        torch.testing.assert_close(found, own.mean(dim=1) if pooling == "mean" else own[:, -1])
    assert sorted(np.concatenate(pooled.batches()).tolist()) == list(range(len(rows)))


@pytest.mark.parametrize("name", ["linear", "linear-last", "mlp", "mlp-last"])
@pytest.mark.parametrize("layer", [2, MIX])
def test_a_head_that_pools_predicts_the_same_of_them(layers, tmp_path, name, layer):
    rows, count = some_rows(layers, layer), 2 if layer == MIX else None
    spec = HeadSpec(
        name=name, hidden_size=HIDDEN, depth=0, latent_size=8, num_heads=2, dropout=0.0, layers=count, skip=1
    )
    torch.manual_seed(0)
    head = build_head(spec)
    whole = predict_rows(head, rows, torch.device("cpu"))
    pooled = pooled_rows(rows, head.pooling, skip=1, file=tmp_path / "pooled")
    np.testing.assert_allclose(predict_rows(head, pooled, torch.device("cpu")), whole, rtol=0, atol=1e-6)


def test_heads_of_one_pooling_read_the_cache_once_however_many_epochs_and_seeds(layers, tmp_path, monkeypatch):
    real, read = Split.read, []
    monkeypatch.setattr(Split, "read", lambda split, rows: read.append((split.name, len(rows))) or real(split, rows))

    def rows_read(out, **settings) -> int:
        read.clear()
        own = TrainSettings(layer=MIX, patience=9, workers=1, **SMALL, **settings)
        train_heads(layers, tmp_path / out, own)
        return sum(count for name, count in read if name == "train")

    once = rows_read("one", heads=("linear",), seeds=(0,), epochs=1)
    assert rows_read("more", heads=("linear", "mlp"), seeds=(0, 1, 2), epochs=4) == once
    assert rows_read("relish", heads=("relish",), depths=(1,), seeds=(0,), epochs=4) > once + 2 * 96


def test_batches_for_prediction_are_small(tmp_path):
    pooled = PooledRows(tmp_path / "pooled", (2000, 3, HIDDEN), np.arange(2000), np.zeros(2000))
    assert max(map(len, pooled.batches())) == 512 // 3


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_of_them(layers, tmp_path, workers, monkeypatch):
    made, real = [], cell.pooled_rows
    monkeypatch.setattr(cell, "pooled_rows", lambda *args, **named: made.append(named["file"]) or real(*args, **named))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".pooled-mean-train.tmp").write_bytes(b"of a training that was killed")
    settings = TrainSettings(heads=("linear", "ridge"), layer=2, epochs=1, seeds=(0, 1), workers=workers, **SMALL)
    train_heads(layers, tmp_path / "runs", settings)
    assert [path.name for path in made] == [f".pooled-{p}-{s}.tmp" for p in ("mean", "last") for s in ("train", "val")]
    left = {path.name for path in (tmp_path / "runs").iterdir()} - {".lock"}
    assert left == {"linear-L0-seed0", "linear-L0-seed1", "ridge-L0-seed0"}


def test_a_full_disk_is_said_in_one_sentence(layers, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, leave=4096)
        with pytest.raises(RunError, match=r"/pooled cannot be written \(No space left on device\); finished cells"):
            pooled_rows(some_rows(layers, MIX), "mean", skip=0, file=disk / "pooled")
