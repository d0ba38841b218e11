import os
from random import Random

import h5py
import pytest

from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.verify import verify_cache


@pytest.fixture(scope="module", params=[(3,), (1, 3)], ids=str)
def good(request, make, tmp_path_factory):
    return make.write(tmp_path_factory.mktemp("verify") / "c", layers=request.param)


@pytest.fixture
def damaged(good):
    """`damaged(shard, place)` flips one bit there and gives what is found; everything is put back afterwards."""

    def found(record, place, bit):
        path = good / record.file
        byte = path.read_bytes()[place]
        with path.open("rb+") as file:
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
            file.flush()
            try:
                return verify_cache(open_cache(good))
            finally:
                file.seek(place)
                file.write(bytes([byte]))

    return found


def test_a_good_cache_has_nothing_wrong_and_every_byte_is_counted(good):
    done = []
    assert verify_cache(open_cache(good), done.append) == []
    assert sum(done) == sum(path.stat().st_size for path in good.glob("*.h5"))


def test_one_flipped_bit_anywhere_is_found_and_the_shard_named(good, damaged):
    draw = Random(0)
    records = load_manifest(good).splits["train"].shards
    for _ in range(120):
        record = draw.choice(records)
        place, bit = draw.randrange(record.bytes), draw.randrange(8)
        found = damaged(record, place, bit)
        assert len(found) == 1, (record.file, place, bit)
        assert found[0].startswith(f"the shard {good / record.file} ")


def test_the_first_and_the_last_byte_count(good, damaged):
    for record in load_manifest(good).splits["train"].shards:
        assert len(damaged(record, 0, 0)) == len(damaged(record, record.bytes - 1, 7)) == 1


def test_hidden_states_and_padding_are_told_apart_and_the_row_named(good, damaged, make):
    record = load_manifest(good).splits["train"].shards[0]
    with h5py.File(good / record.file, "r") as file:
        lengths = file["mask"][()].sum(axis=1)
        row_bytes = file["hidden"].size // len(lengths) * 2
        row, name = file["row"][1], file["id"].asstr()[1]
    assert lengths[1] < record.T
    begin = record.offset + row_bytes
    padding = begin + int(lengths[1]) * make.WIDTH * 2
    for place, what in ((begin, "hidden states"), (padding - 1, "hidden states"), (padding, "padding")):
        assert damaged(record, place, 3) == [
            f"the shard {good / record.file} is damaged: the {what} of row {row} (id {name!r}) changed"
        ]


def test_every_bad_shard_is_named(make, tmp_path):
    folder = make.write(tmp_path / "c", {"train": make.rows(), "test": make.rows(seed=1)})
    make.flip(folder / "train-00000.h5", 3000)
    os.truncate(folder / "train-00001.h5", 1000)
    (folder / "test-00002.h5").unlink()
    found = verify_cache(open_cache(folder))
    assert len(found) == 3
    for name, sentence in zip(("train-00000", "train-00001", "test-00002"), found, strict=True):
        assert str(folder / f"{name}.h5") in sentence


def test_an_unfinished_split_is_said(make, tmp_path):
    folder = tmp_path / "c"
    make.fill(make.open_writer(folder), "train", make.rows(), stop_after=2)
    assert verify_cache(open_cache(folder)) == [
        "the split 'train' is not finished (2 of 4 shards); run the same relish extract command again to go on"
    ]
