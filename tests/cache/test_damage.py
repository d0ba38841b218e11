"""Files of a finished cache that are cut, deleted, edited, or have one bit flipped: found by verify and when opened."""

import json
import os
import shutil
from random import Random

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relish.cache.errors import CacheError, RelishError
from relish.cache.jsonfile import sealed_text
from relish.cache.manifest import COPY, MANIFEST, load_manifest
from relish.cache.reader import open_cache
from relish.cache.repair import repair_cache
from relish.cache.verify import verify_cache


@pytest.fixture(scope="module")
def good(make, tmp_path_factory):
    """Shards of more than 4 KiB."""
    folder = tmp_path_factory.mktemp("damage") / "c"
    return make.write(folder, {"train": make.rows(), "test": make.rows(seed=1)}, hidden_size=24)


@pytest.fixture
def own(good, tmp_path):
    return shutil.copytree(good, tmp_path / "c")


def read_all(folder):
    """What training does: open every split and read every row."""
    cache = open_cache(folder)
    for name in cache.splits:
        split = cache.split(name)
        try:
            for row in range(len(split)):
                split.read([row])
        finally:
            split.close()


def check_found(folder, good, shard):
    """verify names the file, reading stops, and repair and extracting again (here: a copy) bring it back."""
    found = verify_cache(open_cache(folder))
    assert len(found) == 1
    assert str(folder / shard) in found[0]
    assert found[0].endswith(f"run: relish cache repair {folder}") or "damaged: the" in found[0]
    with pytest.raises(CacheError, match=shard):
        read_all(folder)
    assert [record.file for record in repair_cache(folder).dropped] == [shard]


@pytest.mark.parametrize("fault", ["1 byte", "4 KiB", "to zero", "deleted", "a folder", "longer"])
def test_a_shard_that_is_cut_or_gone(own, good, fault):
    path = own / "train-00001.h5"
    size = path.stat().st_size
    assert size > 4096
    if fault == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif fault in ("deleted", "a folder"):
        path.unlink()
        if fault == "a folder":
            path.mkdir()
    else:
        os.truncate(path, {"1 byte": size - 1, "4 KiB": size - 4096, "to zero": 0}[fault])
    check_found(own, good, path.name)


@pytest.mark.parametrize("name", ["hidden", "mask", "target", "input_ids", "row", "id", "checksum", "header"])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_in_a_shard(make, own, good, name, bit):
    path = own / "test-00000.h5"
    with h5py.File(path, "r") as file:
        place = 20 if name == "header" else file[name].id.get_offset() + file[name].id.get_storage_size() // 3
    make.flip(path, place, bit)
    check_found(own, good, path.name)


def test_two_shards_that_changed_places(own):
    first, second = own / "train-00000.h5", own / "test-00000.h5"
    first.rename(own / "aside")
    second.rename(first)
    (own / "aside").rename(second)
    assert len(verify_cache(open_cache(own))) == 2
    with pytest.raises(CacheError):
        read_all(own)


@pytest.mark.parametrize("keep", [0, 1, 100, -4096, -1])
def test_a_manifest_that_is_cut(own, keep):
    path = own / MANIFEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError) as caught:
        open_cache(own)
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).endswith(f"; run: relish cache repair {own}")
    repair_cache(own)
    read_all(own)


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value.update(label_range=[0.0, 50.0]),
        lambda value: value["identity"].update(prompt="Another: {text}"),
        lambda value: value["splits"]["train"]["shards"][0].update(tokens=1),
        lambda value: value["splits"].update(dev=value["splits"].pop("test")),
        lambda value: value["splits"].pop("test"),
    ],
)
def test_a_manifest_that_was_edited_by_hand(own, edit):
    path = own / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(CacheError) as caught:
        open_cache(own)
    assert str(caught.value) == (
        f"{path} is not as relish wrote it: it was edited or damaged; run: relish cache repair {own}"
    )


def test_a_flipped_bit_anywhere_in_the_manifest(own):
    path, draw = own / MANIFEST, Random(0)
    data = path.read_bytes()
    places = {draw.randrange(len(data)) for _ in range(300)} | set(range(60)) | set(range(len(data) - 90, len(data)))
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CacheError):
            open_cache(own)


# Fuzzing: whatever is in the files, the answer is right or an error of this package.


def read_or_refuse(folder):
    try:
        verify_cache(open_cache(folder))
        read_all(folder)
    except RelishError:
        return False
    return True


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_open_cache_with_mutated_bytes(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(good, folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != COPY)
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        path = folder / data.draw(st.sampled_from(names), label="file")
        old = path.read_bytes()
        begin = data.draw(st.integers(0, len(old)), label="begin")
        length = data.draw(st.integers(0, 300), label="length")
        put = data.draw(st.binary(max_size=300), label="put")
        path.write_bytes(old[:begin] + put + old[begin + length :])
    changed = any((folder / name).read_bytes() != (good / name).read_bytes() for name in names)
    assert read_or_refuse(folder) is not changed
    shutil.rmtree(folder)


def places_of(value, path=()):
    """Every path into a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places_of(value[key], (*path, key))


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.lists(st.integers(-3, 3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.none(), max_size=2)
)


@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_open_cache_with_a_mutated_manifest_under_a_good_seal(good, tmp_path_factory, data):
    """As if another program had written it: the seal alone must not be what keeps a wrong field out."""
    folder = tmp_path_factory.mktemp("fuzz") / "c"
    shutil.copytree(good, folder)
    value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del value["sha256"]
    *before, key = data.draw(st.sampled_from([path for path in places_of(value) if path]), label="place")
    inner = value
    for step in before:
        inner = inner[step]
    if data.draw(st.booleans(), label="delete"):
        del inner[key]
    else:
        inner[key] = data.draw(JUNK, label="put")
    (folder / MANIFEST).write_text(sealed_text(value), encoding="utf-8")
    read_or_refuse(folder)
    try:
        repair_cache(folder)
    except RelishError:
        pass
    else:
        read_or_refuse(folder)
    shutil.rmtree(folder)


def test_a_good_cache_is_read(good):
    assert read_or_refuse(good)
    assert load_manifest(good) == load_manifest(good, COPY)
