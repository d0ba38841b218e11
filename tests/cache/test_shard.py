import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relish.cache import shard as shard_module
from relish.cache.dtypes import STORAGE_DTYPES, storage_dtype
from relish.cache.errors import CacheError, SettingsError
from relish.cache.reader import open_cache


@given(
    lengths=st.lists(st.integers(1, 9) | st.integers(57, 60), min_size=1, max_size=25),
    width=st.integers(1, 9),
    dtype=st.sampled_from(STORAGE_DTYPES),
    layers=st.sets(st.integers(0, 40), min_size=1, max_size=4),
    shard_rows=st.integers(1, 30),
    data=st.data(),
)
@settings(max_examples=40)
def test_what_is_written_is_read(make, tmp_path_factory, lengths, width, dtype, layers, shard_rows, data):
    layers = tuple(sorted(layers))
    rows = make.rows(tuple(lengths))
    folder = tmp_path_factory.mktemp("round") / "c"
    what = {"hidden_size": width, "dtype": dtype, "layers": layers}
    make.write(folder, {"train": rows}, shard_rows=shard_rows, **what)
    states = make.states(rows, make.identity(**what))
    position = data.draw(st.integers(0, len(layers) - 1))
    split = open_cache(folder).split("train", layer=layers[position])

    assert len(split) == len(lengths)
    assert split.lengths.tolist() == lengths
    assert split.ids == rows.ids
    assert np.array_equal(split.target, rows.target, equal_nan=True)
    assert split.row.tolist() == list(range(len(lengths)))
    asked = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=30))
    batch = split.read(asked)
    assert batch.hidden.dtype == storage_dtype(dtype).torch
    for got, mask, row in zip(batch.hidden, batch.mask, asked, strict=True):
        assert torch.equal(got[: lengths[row]], states[row][position])
        assert not got[lengths[row] :].any()
        assert mask.tolist() == [slot < lengths[row] for slot in range(max(lengths[one] for one in asked))]
    split.close()


def test_a_type_of_another_name_is_refused():
    with pytest.raises(SettingsError, match=r"^dtype must be one of bfloat16, float16, float32, not 'int8'$"):
        storage_dtype("int8")


@pytest.mark.parametrize("step", ["allocate", "write_at", "fsync", "replace_durably"])
def test_a_disk_that_is_full_leaves_nothing_behind(make, tmp_path, monkeypatch, step):
    """Neither a shard under its final name, nor a temporary file of its size, nor an open descriptor."""

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else shard_module, step, full)
    before = open_descriptors()
    with pytest.raises(CacheError, match=r"train-00000.h5 cannot be written \(No space left on device\)"):
        make.fill(make.open_writer(tmp_path / "c"), "train", make.rows((2, 1)))
    assert list((tmp_path / "c").iterdir()) == []
    assert open_descriptors() == before


def open_descriptors():
    listed = Path("/proc/self/fd")
    return len(list(listed.iterdir())) if listed.is_dir() else None
