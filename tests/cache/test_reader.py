import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relish.cache import reader
from relish.cache.errors import CacheError
from relish.cache.jsonfile import sealed_text
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.shard import way_out


@pytest.fixture(scope="module")
def cache(make, tmp_path_factory):
    """Several layers, so that one row's hidden states lie in several places."""
    return make.write(tmp_path_factory.mktemp("reader") / "c", layers=(1, 3))


@pytest.fixture
def own(make, tmp_path):
    """A cache to damage."""
    return make.write(tmp_path / "c")


def record_of(folder, shard=0):
    return load_manifest(folder).splits["train"].shards[shard]


def change_manifest(folder, change):
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    value.pop("sha256", None)
    path.write_text(sealed_text(value))


def message(call):
    with pytest.raises(CacheError) as caught:
        call()
    return str(caught.value)


# Reading


@given(asked=st.lists(st.integers(0, 9), min_size=1, max_size=30), layer=st.sampled_from([1, 3]))
def test_any_rows_in_any_order_more_than_once(make, cache, asked, layer):
    rows = make.rows()
    states = make.states(rows, make.identity(layers=(1, 3)))
    split = open_cache(cache).split("train", layer=layer)
    hidden, mask = split.read(np.array(asked))
    T = max(len(rows.tokens[row]) for row in asked)
    assert hidden.shape == (len(asked), T, make.WIDTH)
    assert mask.dtype == torch.bool
    for got, real, row in zip(hidden, mask, asked, strict=True):
        assert int(real.sum()) == len(rows.tokens[row])
        assert torch.equal(got[real], states[row][(1, 3).index(layer)])
        assert not got[~real].any()
    split.close()


@given(asked=st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_all_layers_at_once_are_those_read_one_by_one(make, cache, asked):
    opened = open_cache(cache)
    split = opened.split("train", layer="all")
    assert (split.layers, split.stacked) == ((1, 3), True)
    for _ in range(2):  # checked against the checksum, and then not any more
        hidden, mask = split.read(asked)
        for place, layer in enumerate((1, 3)):
            single = opened.split("train", layer=layer)
            alone = single.read(asked)
            assert (single.layers, single.stacked) == ((layer,), False)
            assert torch.equal(hidden[:, place], alone.hidden)
            assert torch.equal(mask, alone.mask)
            single.close()
    split.close()


def test_all_layers_of_a_cache_of_one_layer(make, tmp_path):
    opened = open_cache(make.write(tmp_path / "c"))
    stacked, alone = opened.split("train", layer="all").read([2, 0]), opened.split("train").read([2, 0])
    assert torch.equal(stacked.hidden, alone.hidden.unsqueeze(1))
    assert alone.hidden.is_contiguous()


def test_a_split_says_what_its_rows_are(make, cache):
    opened = open_cache(str(cache))
    split, rows = opened.split("train", layer=1), make.rows()
    assert (opened.splits, opened.layers, opened.hidden_size, opened.label_range) == (
        ("train",),
        (1, 3),
        make.WIDTH,
        (0.0, 5.0),
    )
    assert opened.identity == make.identity(layers=(1, 3))
    assert split.ids == rows.ids
    assert np.array_equal(split.target, rows.target, equal_nan=True)
    assert split.input_ids(3).tolist() == rows.tokens[3].tolist()


@pytest.mark.parametrize("same", [0, 1, 3])
@pytest.mark.parametrize("shortest", [1, 3, 4, 9])
def test_the_tokens_that_all_rows_begin_with(make, tmp_path, same, shortest):
    """In several shards; each row keeps a token of its own, also where it is the beginning of all others."""
    lengths = (*range(10, 20), shortest)
    given = make.rows(lengths)
    shared = np.arange(2000, 2000 + same, dtype=np.int32)
    tokens = [np.append(shared, row)[:n] for n, row in zip(lengths, given.tokens, strict=True)]
    make.write(tmp_path / "c", {"train": make.rows(lengths, tokens=tokens)})
    found = open_cache(tmp_path / "c").split("train").shared_tokens()
    assert found.tolist() == shared[: shortest - 1].tolist()


def test_padding_on_disk_is_not_read(make, cache, monkeypatch):
    read = []
    whole = reader.read_into
    monkeypatch.setattr(
        reader, "read_into", lambda fd, place, offset: read.append(len(place)) or whole(fd, place, offset)
    )
    split = open_cache(cache).split("train", layer=3)
    split.read([1, 3])
    assert sorted(read) == [2 * make.WIDTH * n for n in (29, 29, 30, 30)]  # both layers, to check the row
    read.clear()
    split.read([1, 3])
    assert sorted(read) == [2 * make.WIDTH * n for n in (29, 30)]  # checked once is enough
    split.close()
    split = open_cache(cache).split("train", layer="all")
    for _ in range(2):
        read.clear()
        split.read([1, 3])
        assert sorted(read) == [2 * make.WIDTH * n for n in (29, 29, 30, 30)]
    split.close()


def test_few_files_are_open_at_once(make, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_OPEN_FILES", 2)
    rows = make.rows()
    split = open_cache(make.write(tmp_path / "c", {"train": rows}, shard_rows=1)).split("train")
    for _ in range(2):
        for row in range(10):
            assert torch.equal(split.read([row]).hidden[0], make.states(rows, make.identity())[row][0])
            assert len(split._files) <= 2
    split.close()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda split: pickle.loads(pickle.dumps(split))])
def test_a_copy_or_a_split_in_another_process_opens_and_checks_its_own_files(own, tmp_path, copied):
    split = open_cache(own).split("train")
    rows = list(range(len(split)))
    expected = split.read(rows)
    other = copied(split)
    del split  # closes its files, whose numbers are given to the next
    (tmp_path / "other").write_bytes(bytes(1 << 16))
    taken = [(tmp_path / "other").open("rb") for _ in range(8)]
    for found, wanted in zip(other.read(rows), expected, strict=True):
        assert torch.equal(found, wanted)
    for file in taken:
        file.close()
    shard = own / record_of(own).file
    data = bytearray(shard.read_bytes())
    data[record_of(own).offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="damaged"):
        copied(other).read(rows)


def test_a_cache_can_be_moved_and_copied_in_part(make, tmp_path):
    rows = make.rows(seed=1)
    folder = make.write(tmp_path / "c", {"train": make.rows(), "test": rows})
    moved = folder.rename(tmp_path / "moved")
    for path in moved.glob("train-*.h5"):
        path.unlink()
    assert len(open_cache(moved).split("test").read(range(10)).hidden) == 10
    with pytest.raises(CacheError, match="train-00000.h5 cannot be opened"):
        open_cache(moved).split("train")


def test_a_relative_path_holds_after_a_change_of_folder(make, own, monkeypatch):
    monkeypatch.chdir(own.parent)
    split = open_cache("c").split("train")
    monkeypatch.chdir("/")
    assert len(split.read([0]).hidden) == 1


# What cannot be opened


def test_a_missing_split_is_named_with_those_that_are_there(make, tmp_path):
    folder = make.write(tmp_path / "c", {"train": make.rows(), "dev": make.rows(seed=1)})
    assert message(lambda: open_cache(folder).split("test")) == (
        f"the cache {folder} has no split 'test', only train, dev; "
        f"add it with: relish extract {folder} … --data test=FILE"
    )


def test_an_unfinished_split_is_refused_with_what_to_do(make, tmp_path):
    folder = tmp_path / "c"
    make.fill(make.open_writer(folder), "train", make.rows(), stop_after=1)
    assert message(lambda: open_cache(folder).split("train")) == (
        f"the split 'train' of the cache {folder} is not finished (1 of 4 shards); "
        "run the same relish extract command again to go on"
    )


def test_a_layer_that_is_not_there_or_not_named(cache):
    opened = open_cache(cache)
    assert message(lambda: opened.split("train")) == f"the cache {cache} holds the layers 1, 3; name one (--layer)"
    assert message(lambda: opened.split("train", layer=2)) == f"the cache {cache} holds the layers 1, 3, not 2"


def test_a_folder_that_is_no_cache(tmp_path):
    assert message(lambda: open_cache(tmp_path)) == (
        f"{tmp_path} is not a relish cache: it has no manifest.json. Make one with: relish extract {tmp_path} …"
    )
    assert "is not a relish cache" in message(lambda: open_cache(tmp_path / "absent"))


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("x")
    assert message(lambda: open_cache(tmp_path / "file")).endswith("file is a file, and a cache is a folder")


def test_another_format_version(own):
    change_manifest(own, lambda value: value.update(version=2))
    assert message(lambda: open_cache(own)) == (
        f"the relish cache {own} has format version 2, and this relish reads version 1; "
        "install the relish that wrote it, or extract into another folder"
    )


def test_the_manifest_of_something_else(own):
    (own / "manifest.json").write_text('{"name": "app"}')
    assert message(lambda: open_cache(own)) == f"{own / 'manifest.json'} is not that of a relish cache"


@pytest.mark.parametrize("text", ["", "{", '{"format": "relish-cac', "\ud800"])
def test_a_manifest_that_is_no_json(own, text):
    (own / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    found = message(lambda: open_cache(own))
    assert found.startswith(f"{own / 'manifest.json'} cannot be read (")
    assert found.endswith(f"); run: relish cache repair {own}")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("identity"),
        lambda value: value.pop("splits"),
        lambda value: value.update(label_range=[0]),
        lambda value: value.update(label_range=None),
        lambda value: value.update(splits=[]),
        lambda value: value["splits"]["train"].pop("planned"),
        lambda value: value["splits"]["train"].update(more=1),
        lambda value: value["splits"]["train"]["shards"][0].pop("offset"),
        lambda value: value["splits"]["train"]["shards"][0].update(rows="4"),
        lambda value: value["splits"]["train"]["shards"][0].update(T=-1),
        lambda value: value["splits"]["train"]["shards"][0].update(file="../../train-00000.h5"),
        lambda value: value["splits"]["train"]["shards"][0].update(sha256=None),
    ],
)
def test_a_manifest_with_a_part_missing_or_wrong(own, change):
    change_manifest(own, change)
    found = message(lambda: open_cache(own))
    assert found.startswith(f"{own / 'manifest.json'} is damaged (")
    assert found.endswith(f"); run: relish cache repair {own}")


def test_a_split_name_that_leaves_the_folder(own):
    change_manifest(own, lambda value: value["splits"].update({"../x": value["splits"].pop("train")}))
    assert message(lambda: open_cache(own)) == (
        f"{own / 'manifest.json'} is damaged (ValueError(\"the split name '../x'\")); run: relish cache repair {own}"
    )


# Damage


def test_a_flipped_bit_in_hidden_states_is_found_on_the_first_read(make, own):
    record = record_of(own)
    make.flip(own / record.file, record.offset + (1 * record.T + 7) * make.WIDTH * 2 + 3, bit=6)
    split = open_cache(own).split("train")
    split.read([2, 0, 7])  # other rows of the same shard are good
    damaged = int(np.flatnonzero(split.lengths == 59)[0])
    text = (
        f"the shard {own / record.file} is damaged: the hidden states of row {damaged} "
        f"(id {split.ids[damaged]!r}) are not the ones that were written; {way_out(own)}"
    )
    assert message(lambda: split.read([damaged])) == text
    assert message(lambda: split.read([0, damaged])) == text
    split.close()


@pytest.mark.parametrize("layer", [3, "all"])
def test_a_flipped_bit_of_another_layer_is_found_too(make, tmp_path, layer):
    folder = make.write(tmp_path / "c", layers=(1, 3))
    record = record_of(folder)
    make.flip(folder / record.file, record.offset)
    split = open_cache(folder).split("train", layer=layer)
    assert "the hidden states of row 2 (id '0-2') are not" in message(lambda: split.read([2]))
    split.close()


@pytest.mark.parametrize("name", ["mask", "input_ids", "target", "row", "id", "checksum"])
def test_a_flipped_bit_elsewhere_is_found_at_open(make, own, name):
    import h5py

    record = record_of(own, 1)
    with h5py.File(own / record.file, "r") as file:
        place = file[name].id.get_offset()
    make.flip(own / record.file, place)
    assert message(lambda: open_cache(own).split("train")) == (
        f"the shard {own / record.file} is damaged outside its hidden states (its hash differs); {way_out(own)}"
    )


def test_a_truncated_shard_is_found_at_open(own):
    record = record_of(own)
    os.truncate(own / record.file, record.bytes - 100)
    assert message(lambda: open_cache(own).split("train")) == (
        f"the shard {own / record.file} has {record.bytes - 100} bytes, {record.bytes} were written; {way_out(own)}"
    )


def test_a_shard_truncated_while_it_is_open_gives_an_error_and_no_crash(own):
    split = open_cache(own).split("train")
    record = record_of(own)
    os.truncate(own / record.file, record.offset + 10)
    assert message(lambda: split.read([2])) == (f"the shard {own / record.file} ends too early; {way_out(own)}")
    split.close()


def test_a_deleted_shard_is_named(own):
    record = record_of(own)
    split = open_cache(own).split("train")
    (own / record.file).unlink()
    assert message(lambda: open_cache(own).split("train")) == (
        f"the shard {own / record.file} cannot be opened (No such file or directory); {way_out(own)}"
    )
    assert message(lambda: split.read([2])) == (
        f"the shard {own / record.file} cannot be opened (No such file or directory); {way_out(own)}"
    )


def test_a_file_that_is_no_hdf5_but_has_the_right_hash_is_named(own):
    """A manifest made to agree with a file of something else."""
    import hashlib

    record = record_of(own)
    path = own / record.file
    path.write_bytes(bytes(record.bytes))
    hidden = record.rows * record.T * 6 * 2
    digest = hashlib.sha256(bytes(record.bytes - hidden)).hexdigest()
    change_manifest(own, lambda value: value["splits"]["train"]["shards"][0].update(sha256=digest))
    found = message(lambda: open_cache(own).split("train"))
    assert found.startswith(f"{path} is not a shard this relish can read (")
