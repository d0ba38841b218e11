"""Each row of a split is there once, whatever the cut into shards: lost and doubled rows are refused and found."""

import json

import numpy as np
import pytest

from relish.cache import writer as writer_module
from relish.cache.errors import CacheError
from relish.cache.jsonfile import sealed_text
from relish.cache.manifest import MANIFEST
from relish.cache.reader import lost_or_doubled, open_cache
from relish.cache.repair import repair_cache
from relish.cache.verify import verify_cache

# With at most 3 rows a shard: 0 1 2, 3, 4 5 6, 7 8; with at most 4: 0 1 2 3, 4 5 6, 7 8.
LENGTHS = (30, 30, 30, 30, 9, 9, 9, 2, 2)


def begun_with(folder, old, new):
    return (
        f"the split 'train' of the cache {folder} was begun with --shard-rows {old}, and this is {new}; go on with "
        f"--shard-rows {old}"
    )


def edit(folder, change):
    path = folder / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["sha256"]
    change(value["splits"]["train"])
    path.write_text(sealed_text(value), encoding="utf-8")


@pytest.mark.parametrize("lost", ["none", "some", "all"])
def test_another_cut_is_refused_whatever_of_the_shards_is_left(make, tmp_path, lost):
    folder, rows = tmp_path / "c", make.rows(LENGTHS)
    make.write(folder, {"train": rows}, shard_rows=4)
    names = sorted(path.name for path in folder.glob("*.h5"))
    for name in {"none": [], "some": names[:1], "all": names}[lost]:
        (folder / name).unlink()
    repair_cache(folder)
    before = make.contents(folder)
    for other in (3, 5, 4096):
        with pytest.raises(CacheError) as caught:
            make.open_writer(folder).split("train", rows, shard_rows=other)
        assert str(caught.value) == begun_with(folder, 4, other)
    assert make.contents(folder) == before
    make.fill(make.open_writer(folder), "train", rows, shard_rows=4)
    assert verify_cache(open_cache(folder)) == []


def test_another_cut_is_refused_after_a_shard_that_was_skipped_whole(make, tmp_path):
    folder, rows = tmp_path / "c", make.rows(LENGTHS)
    split = make.open_writer(folder).split("train", rows, shard_rows=3)
    with split.shard(0) as shard:
        for position in range(3):
            shard.skip(position, "NaN")
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder).split("train", rows, shard_rows=4)
    assert str(caught.value) == begun_with(folder, 3, 4)


def test_a_cut_by_other_rules_is_refused(make, tmp_path, monkeypatch):
    folder, rows = tmp_path / "c", make.rows(LENGTHS)
    make.fill(make.open_writer(folder), "train", rows, stop_after=2)
    monkeypatch.setattr(writer_module, "OVERHEAD", 9.0)
    with pytest.raises(CacheError) as caught:
        make.open_writer(folder).split("train", rows, shard_rows=4)
    assert str(caught.value) == (
        f"the split 'train' of the cache {folder} was cut into other shards, by another version of relish; go on with "
        "that version, or extract into another folder"
    )


def test_rows_that_are_lost_or_doubled_are_refused_and_found(make, tmp_path, monkeypatch):
    """As if a program without the check had gone on with another cut."""
    folder, rows = tmp_path / "c", make.rows(LENGTHS)
    make.write(folder, {"train": rows}, shard_rows=3)
    (folder / "train-00000.h5").unlink()
    repair_cache(folder)
    edit(folder, lambda split: split.update(shard_rows=4))
    monkeypatch.setattr(writer_module, "_cut", lambda _split: {})
    monkeypatch.setattr(writer_module, "cut_into_shards", lambda _lengths, _rows: [[0, 1], [3], [4], [5]])
    edit(folder, lambda split: split.update(planned=4))
    make.fill(make.open_writer(folder), "train", rows, shard_rows=4)
    wrong = (
        "does not hold each of its 9 rows once: its shards have 8, 8 of them different; extract it into another folder"
    )
    assert verify_cache(open_cache(folder)) == [f"the split 'train' {wrong}"]
    with pytest.raises(CacheError) as caught:
        open_cache(folder).split("train")
    assert str(caught.value) == f"the split 'train' of the cache {folder} {wrong}"


@pytest.mark.parametrize("change", [{"row": 0}, {"row": 9}, {"row": 2**62}])
def test_a_skipped_row_that_is_elsewhere_or_nowhere_is_found(make, tmp_path, change):
    folder, rows = tmp_path / "c", make.rows(LENGTHS)
    writer = make.open_writer(folder)
    values = make.states(rows, make.identity())
    split = writer.split("train", rows, shard_rows=4)
    for number in split.pending():
        with split.shard(number) as shard:
            for position, row in enumerate(split.members(number)):
                if row == 5:
                    shard.skip(position, "NaN")
                else:
                    shard.write(position, values[row])
    assert verify_cache(open_cache(folder)) == []
    assert open_cache(folder).split("train").row.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    edit(folder, lambda split: split["skipped"][0].update(change))
    (found,) = verify_cache(open_cache(folder))
    assert found.startswith("the split 'train' does not hold each of its 9 rows once: its shards have 9, 8 of them")
    with pytest.raises(CacheError, match="does not hold each of its 9 rows once"):
        open_cache(folder).split("train")


def test_the_figures_of_what_is_wrong(make, tmp_path):
    record = open_cache(make.write(tmp_path / "c")).manifest.splits["train"]
    assert lost_or_doubled(record, np.arange(10)) == lost_or_doubled(record, np.arange(10)[::-1]) == ""
    for row, have, different in (
        ([], 0, 0),
        (range(9), 9, 9),
        ([*range(9), 0], 10, 9),
        ([*range(10), 9], 11, 10),
        (range(1, 11), 10, 9),
        ([*range(9), -1], 10, 9),
    ):
        found = lost_or_doubled(record, np.array(row, dtype=np.int64))
        assert f"its 10 rows once: its shards have {have}, {different} of them different" in found
