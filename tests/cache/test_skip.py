"""Rows that are left out of a shard since their hidden states could not be stored."""

import numpy as np
import pytest
import torch

from relish.cache.errors import CacheError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.repair import repair_cache
from relish.cache.verify import verify_cache


def fill(make, folder, rows, bad, *, stop_after=None, **changes):
    writer = make.open_writer(folder, make.identity(**changes))
    split, values = writer.split("train", rows, shard_rows=4), make.states(rows, make.identity(**changes))
    for number in split.pending()[:stop_after]:
        with split.shard(number) as shard:
            for position, row in enumerate(split.members(number)):
                if row in bad:
                    shard.skip(position, "NaN")
                else:
                    shard.write(position, values[row])
    return folder


# The longest row of all and the shortest of its shard, and one in the middle of the next.
BAD = {2, 1, 7}


@pytest.mark.parametrize("layers", [(3,), (1, 3)], ids=str)
def test_the_others_are_whole_and_the_manifest_says_which_are_missing(make, tmp_path, layers):
    rows = make.rows()
    folder = fill(make, tmp_path / "c", rows, BAD, layers=layers)
    cache = open_cache(folder)
    assert verify_cache(cache) == []
    split = cache.split("train", layer=3)
    kept = [row for row in range(len(rows.ids)) if row not in BAD]
    assert split.row.tolist() == kept
    assert split.ids == [rows.ids[row] for row in kept]
    values = make.states(rows, cache.identity)
    batch = split.read(range(len(kept)))
    for got, row in zip(batch.hidden, kept, strict=True):
        assert torch.equal(got[: len(rows.tokens[row])], values[row][-1])
    assert np.array_equal(split.target, rows.target[kept], equal_nan=True)
    record = load_manifest(folder).splits["train"]
    assert {(row.row, row.id, row.why) for row in record.skipped} == {(row, rows.ids[row], "NaN") for row in BAD}
    assert (record.rows, sum(shard.rows for shard in record.shards)) == (10, 7)
    assert record.shards[0].T == 59  # not the 60 of the row that is gone
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resuming_gives_the_bytes_of_an_unbroken_run(make, tmp_path, stop_after):
    rows = make.rows()
    whole = fill(make, tmp_path / "whole", rows, BAD)
    folder = fill(make, tmp_path / "c", rows, BAD, stop_after=stop_after)
    fill(make, folder, rows, BAD)
    assert make.contents(folder) == make.contents(whole)


def test_a_shard_of_which_no_row_is_left_has_no_file(make, tmp_path):
    rows = make.rows()
    shards = make.open_writer(tmp_path / "c").split("train", rows, shard_rows=4)._shards
    folder = fill(make, tmp_path / "c", rows, set(shards[1].tolist()))
    assert not (folder / "train-00001.h5").exists()
    cache = open_cache(folder)
    assert verify_cache(cache) == []
    assert len(cache.split("train")) == 10 - len(shards[1])
    assert list(make.open_writer(folder).split("train", rows, shard_rows=4).pending()) == []


def test_a_split_of_which_no_row_is_left_says_so(make, tmp_path):
    folder = fill(make, tmp_path / "c", make.rows(), set(range(10)))
    with pytest.raises(CacheError, match=r"the split 'train' of the cache .* is empty: every row of it was skipped"):
        open_cache(folder).split("train")
    assert verify_cache(open_cache(folder)) == []


def test_a_repaired_shard_skips_its_rows_once_more(make, tmp_path):
    rows = make.rows()
    folder = fill(make, tmp_path / "c", rows, BAD)
    whole = make.contents(folder)
    (folder / "train-00000.h5").unlink()
    repair_cache(folder)
    assert {row.row for row in load_manifest(folder).splits["train"].skipped} == {1}
    fill(make, folder, rows, BAD)
    assert {name: data for name, data in make.contents(folder).items() if name != ".lock"} == whole


def test_a_split_with_skipped_rows_is_merged(make, tmp_path):
    from relish.cache.merge import merge_caches

    folder = fill(make, tmp_path / "c", make.rows(), BAD)
    merge_caches(tmp_path / "all", [folder])
    assert make.contents(tmp_path / "all") == make.contents(folder)


def test_info_says_how_many_were_skipped(make, tmp_path, run_cli):
    folder = fill(make, tmp_path / "c", make.rows(), BAD)
    assert "10 (3 skipped)" in run_cli("cache", "info", folder).stdout
