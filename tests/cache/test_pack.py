"""Packing and unpacking: byte for byte, interrupted or not, and no damage goes through."""

import json
import os
import re
import shutil
import sys
from random import Random

import h5py
import hdf5plugin  # noqa: F401  (gives h5py the archive's filter)
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relish.cache import packed
from relish.cache.archive import load_archive
from relish.cache.errors import CacheError
from relish.cache.jsonfile import sealed_text
from relish.cache.manifest import load_manifest
from relish.cache.pack import pack_cache
from relish.cache.reader import open_cache
from relish.cache.unpack import unpack_cache
from relish.cache.verify import verify_cache


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """So that tiny shards have several, and a last one that is cut in every direction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_CHUNK_ROWS", 3)
        patch.setattr(packed, "_CHUNK_BYTES", 7 * 6 * 2)
        patch.setattr(packed, "_COLUMN_BYTES", 200)
        yield


@pytest.fixture(scope="module")
def cache(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack") / "c"
    return make.write(folder, {"train": make.rows(), "test": make.rows(seed=1)}, layers=(1, 3))


@pytest.fixture(scope="module")
def archive(cache):
    pack_cache(cache, cache.parent / "archive")
    return cache.parent / "archive"


@pytest.fixture
def own(archive, tmp_path):
    """An archive to damage."""
    return shutil.copytree(archive, tmp_path / "archive")


def message(call, *arguments):
    with pytest.raises(CacheError) as caught:
        call(*arguments)
    return str(caught.value)


# There and back


@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    layers=st.sampled_from([(3,), (1, 3), (0, 1, 2)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    shard_rows=st.integers(1, 12),
)
@settings(max_examples=30)
def test_what_was_packed_comes_back_byte_for_byte(make, tmp_path_factory, dtype, layers, lengths, shard_rows):
    home = tmp_path_factory.mktemp("trip")
    made = make.write(home / "c", {"a": make.rows(lengths)}, dtype=dtype, layers=layers, shard_rows=shard_rows)
    pack_cache(made, home / "archive")
    assert unpack_cache(home / "archive", home / "back") == ["a"]
    assert make.contents(home / "back") == make.contents(made)
    assert verify_cache(open_cache(home / "back")) == []
    shutil.rmtree(home)


def test_any_hdf5_tool_with_the_filter_reads_the_archive(cache, archive):
    for path in sorted(cache.glob("*.h5")):
        with h5py.File(path) as shard, h5py.File(archive / path.name) as small:
            assert set(shard) == set(small) - {"frame"}
            for name in shard:
                assert (shard[name].shape, shard[name].dtype) == (small[name].shape, small[name].dtype)
                assert np.array_equal(shard[name][()], small[name][()], equal_nan=name == "target")


def test_padding_and_repeated_beginnings_take_next_to_no_room(make, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(packed, "_CHUNK_ROWS", 64)
    rows = make.rows([40] * 50)
    writer = make.open_writer(tmp_path / "c", make.identity(hidden_size=64))
    split = writer.split("train", rows, shard_rows=100)
    same = torch.randn(1, 36, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with split.shard(0) as shard:
        for position in range(50):
            other = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(position)).bfloat16()
            shard.write(position, torch.cat([same, other], dim=1))
    done = pack_cache(tmp_path / "c", tmp_path / "archive")
    assert done.bytes < 0.3 * (tmp_path / "c" / "train-00000.h5").stat().st_size


@pytest.mark.parametrize("again", [False, True])
def test_progress_ends_at_the_size_of_the_cache(cache, tmp_path, again):
    size = sum(path.stat().st_size for path in cache.glob("*.h5"))
    for work, source, out in ((pack_cache, cache, tmp_path / "a"), (unpack_cache, tmp_path / "a", tmp_path / "c")):
        seen = []
        for _ in range(2 if again else 1):
            seen.clear()
            work(source, out, lambda count, total, seen=seen: seen.append((count, total)))
        assert sum(count for count, _ in seen) == size
        assert {total for _, total in seen} == {size}
        assert len(seen) == 8 if again else len(seen) > 8


def test_an_unfinished_cache_comes_back_unfinished_and_goes_on(make, tmp_path):
    make.fill(make.open_writer(tmp_path / "c"), "train", make.rows(), stop_after=2)
    pack_cache(tmp_path / "c", tmp_path / "archive")
    unpack_cache(tmp_path / "archive", tmp_path / "back")
    for folder in ("c", "back"):
        make.fill(make.open_writer(tmp_path / folder), "train", make.rows())
    assert make.contents(tmp_path / "back") == make.contents(tmp_path / "c")


def test_a_cache_whose_files_another_hdf5_laid_out_comes_back_too(make, tmp_path):
    """Bytes outside every dataset are kept as they are, not made anew."""
    folder = make.write(tmp_path / "c")
    path = folder / "train-00003.h5"
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "laid out otherwise"
    record = load_manifest(folder).splits["train"].shards[3]
    data = path.read_bytes()
    hidden = record.rows * record.T * make.WIDTH * 2
    value = json.loads((folder / "manifest.json").read_text())
    del value["sha256"]
    import hashlib

    outside = data[: record.offset] + data[record.offset + hidden :]
    value["splits"]["train"]["shards"][3].update(bytes=len(data), sha256=hashlib.sha256(outside).hexdigest())
    for name in ("manifest.json", "manifest.copy.json"):
        (folder / name).write_text(sealed_text(value))
    pack_cache(folder, tmp_path / "archive")
    unpack_cache(tmp_path / "archive", tmp_path / "back")
    assert make.contents(tmp_path / "back") == make.contents(folder)


# Damage


def test_a_flipped_bit_anywhere_in_an_archive_is_named(make, own, tmp_path):
    draw = Random(0)
    for path in sorted(own.iterdir()):
        if path.name == ".lock":
            continue
        data = path.read_bytes()
        places = {draw.randrange(len(data)) for _ in range(25)} | {0, len(data) - 1}
        for place in places:
            make.flip(path, place, draw.randrange(8))
            found = message(unpack_cache, own, tmp_path / path.name)
            assert str(path) in found
            assert not (tmp_path / path.name / "manifest.json").exists()
            path.write_bytes(data)


def test_a_damaged_shard_stops_there_and_those_before_it_are_kept(make, cache, own, tmp_path):
    path = own / "test-00001.h5"
    data = path.read_bytes()
    make.flip(path, len(data) // 2)
    assert message(unpack_cache, own, tmp_path / "back") == (
        f"the packed shard {path} is damaged (its hash differs); copy it again from where it was packed, or pack the "
        "cache into a new folder"
    )
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "back").iterdir()}
    kept = {name: moment for name, moment in there.items() if name.startswith("train-")}
    assert "train-00003.h5" in kept
    assert not {"test-00001.h5", ".test-00001.h5.tmp", "manifest.json"} & set(there)
    path.write_bytes(data)
    unpack_cache(own, tmp_path / "back")
    assert make.contents(tmp_path / "back") == make.contents(cache)
    assert all((tmp_path / "back" / name).stat().st_mtime_ns == moment for name, moment in kept.items())


@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_shard_that_was_not_copied_whole_is_named(own, tmp_path, fault):
    path = own / "train-00002.h5"
    size = path.stat().st_size
    path.unlink() if fault == "gone" else os.truncate(path, size - 5)
    what = (
        "cannot be read (No such file or directory)"
        if fault == "gone"
        else f"has {size - 5} bytes, {size} were written"
    )
    assert message(unpack_cache, own, tmp_path / "back").startswith(f"the packed shard {path} {what}; copy it again")


def test_an_archive_of_other_content_under_good_hashes_is_refused(make, archive, own, tmp_path):
    """As if somebody had made archive.json fit: what comes out is still only what the manifest says."""
    from relish.cache.archive import PackedShard, file_hash, save_shards

    shards = load_archive(own).shards
    for name, other in (("train-00000.h5", "test-00000.h5"), ("train-00001.h5", "train-00002.h5")):
        shutil.copyfile(archive / other, own / name)
        made_to_fit = PackedShard(name, (own / name).stat().st_size, file_hash(own / name), shards[name].shard)
        save_shards(own, {**shards, name: made_to_fit})
        found = message(unpack_cache, own, tmp_path / name)
        assert found.startswith(f"the packed shard {own / name} does not hold the shard of its manifest (")
        assert list((tmp_path / name).glob("*.h5")) == list((tmp_path / name).glob("train-00000.h5"))
        shutil.copyfile(archive / name, own / name)
    with h5py.File(own / "train-00000.h5", "r+") as file:
        values = file["hidden"][()]
        values[0, 0, 0, 0] += 1
        file["hidden"][()] = values
    path = own / "train-00000.h5"
    fits = PackedShard(path.name, path.stat().st_size, file_hash(path), shards[path.name].shard)
    save_shards(own, {**shards, path.name: fits})
    assert "(its hidden states are not those that were written)" in message(unpack_cache, own, tmp_path / "x")


@pytest.mark.parametrize("where", ["hidden", "padding", "target"])
def test_a_damaged_cache_is_not_packed(make, tmp_path, where):
    folder = make.write(tmp_path / "c")
    record = load_manifest(folder).splits["train"].shards[1]
    path = folder / record.file
    with h5py.File(path) as file:
        place = file["hidden"].id.get_offset() if where != "target" else file["target"].id.get_offset()
    if where == "padding":
        place += record.rows * record.T * make.WIDTH * 2 - 1
    make.flip(path, place)
    found = message(pack_cache, folder, tmp_path / "archive")
    assert found.startswith(f"the shard {path} is damaged")
    assert load_archive(tmp_path / "archive").shards.keys() == {"train-00000.h5"}
    assert not list((tmp_path / "archive").glob("*00001*"))
    make.flip(path, place)
    pack_cache(folder, tmp_path / "archive")
    unpack_cache(tmp_path / "archive", tmp_path / "back")


# Going on


def test_a_cache_that_grew_is_packed_where_it_is_new(make, tmp_path):
    folder = make.write(tmp_path / "c")
    pack_cache(folder, tmp_path / "archive")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "archive").glob("*.h5")}
    make.fill(make.open_writer(folder), "test", make.rows(seed=1))
    assert load_archive(tmp_path / "archive").missing == []
    pack_cache(folder, tmp_path / "archive")
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    assert unpack_cache(tmp_path / "archive", tmp_path / "back") == ["train", "test"]
    assert make.contents(tmp_path / "back") == make.contents(folder)


def test_packing_again_mends_an_archive(make, cache, archive, own):
    (own / "train-00000.h5").unlink()
    make.flip(own / "test-00000.h5", 300)
    kept = (own / "test-00001.h5").stat().st_mtime_ns
    pack_cache(cache, own)
    assert make.contents(own) == make.contents(archive)
    assert (own / "test-00001.h5").stat().st_mtime_ns == kept


def test_unpacking_again_mends_the_cache(make, cache, archive, tmp_path):
    unpack_cache(archive, tmp_path / "back")
    make.flip(tmp_path / "back" / "train-00001.h5", 3000)
    (tmp_path / "back" / "test-00000.h5").unlink()
    unpack_cache(archive, tmp_path / "back")
    assert make.contents(tmp_path / "back") == make.contents(cache)


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_ctrl_c_leaves_no_temporary_file_and_the_command_goes_on(make, cache, archive, tmp_path, monkeypatch, what):
    out, calls = tmp_path / "out", 0
    real = packed._raw_part

    def stopped(*arguments):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(packed, "_raw_part", stopped)
    work = (lambda: pack_cache(cache, out)) if what == "pack" else (lambda: unpack_cache(archive, out))
    with pytest.raises(KeyboardInterrupt):
        work()
    assert not list(out.glob(".*.tmp"))
    work()
    assert make.contents(out) == make.contents(archive if what == "pack" else cache)


def test_ctrl_c_inside_hdf5_is_raised_after_it(make, cache, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "write_at", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack_cache(cache, tmp_path / "out")
    assert sorted(make.contents(tmp_path / "out")) == ["archive.json", "manifest.packed.json"]


# What is refused


def test_an_archive_is_no_cache_and_says_so(run_cli, archive, tmp_path):
    sentence = f"{archive} is a packed cache; unpack it with: relish cache unpack {archive} CACHE"
    assert message(open_cache, archive) == sentence
    for words in (
        ("cache", "verify", archive),
        ("train", archive, "--out", tmp_path),
        ("cache", "merge", tmp_path / "m", archive),
    ):
        result = run_cli(*words)
        assert (result.exit_code, result.stderr.strip()) == (2, f"error: {sentence}")


def test_a_cache_is_no_archive_and_says_so(cache, tmp_path):
    tail = "Pack a cache with: relish cache pack CACHE ARCHIVE"
    assert message(unpack_cache, cache, tmp_path / "x") == f"{cache} is a cache, not a packed one. {tail}"
    assert message(unpack_cache, tmp_path, tmp_path / "x") == (
        f"{tmp_path} is not a packed cache: it has no archive.json. {tail}"
    )
    (tmp_path / "file").touch()
    found = message(unpack_cache, tmp_path / "file", tmp_path / "x")
    assert found == f"{tmp_path / 'file'} is a file, and a packed cache is a folder"


def test_where_not_to_pack_to(make, cache, archive, tmp_path):
    assert message(pack_cache, cache, cache) == f"{cache} is a cache; choose a new or empty folder for the packed one"
    (tmp_path / "file").touch()
    assert message(pack_cache, cache, tmp_path) == (
        f"{tmp_path} holds other files and is not a packed cache; choose a new or empty folder"
    )
    assert message(pack_cache, cache, tmp_path / "file") == (
        f"{tmp_path / 'file'} is a file; a packed cache is a folder. Choose another name"
    )
    other = make.write(tmp_path / "other", layers=(2,))
    assert message(pack_cache, other, archive) == (
        f"the packed cache {archive} was made with something else: layers is (1, 3) there and (2,) here. "
        "Pack into another folder."
    )


def test_where_not_to_unpack_to(make, archive, tmp_path):
    other = make.write(tmp_path / "other")
    assert message(unpack_cache, archive, other) == f"{other} holds another cache; choose a new or empty folder"
    assert message(unpack_cache, archive, archive) == (
        f"{archive} holds other files and is not a relish cache; choose a new or empty folder"
    )
    (tmp_path / "file").touch()
    assert message(unpack_cache, archive, tmp_path / "file") == (
        f"{tmp_path / 'file'} is a file; a cache is a folder. Choose another name"
    )


def test_shards_that_lost_their_manifest_are_not_unpacked_over(make, archive, tmp_path):
    folder = make.write(tmp_path / "c", {"train": make.rows(), "test": make.rows(seed=1)}, layers=(1, 3), shard_rows=2)
    for name in ("manifest.json", "manifest.copy.json"):
        (folder / name).unlink()
    before = make.contents(folder)
    assert "no manifest.json that lists them" in message(unpack_cache, archive, folder)
    assert make.contents(folder) == before


def test_a_shard_that_is_gone_is_told_as_the_caches_not_the_archives(cache, tmp_path):
    own = shutil.copytree(cache, tmp_path / "c")
    (own / "train-00000.h5").unlink()
    assert message(pack_cache, own, tmp_path / "archive").startswith(
        f"the shard {own / 'train-00000.h5'} cannot be opened (No such file or directory); "
    )


def test_an_archive_whose_packing_is_not_finished(cache, own, tmp_path):
    from relish.cache.archive import save_shards

    shards = load_archive(own).shards
    save_shards(own, {name: shard for name, shard in shards.items() if not name.startswith("test")})
    assert message(unpack_cache, own, tmp_path / "x") == (
        f"the packed cache {own} is not finished (4 shards are missing, the first is test-00000.h5); "
        "pack the cache again into it to go on"
    )


def test_an_archive_without_its_manifest_or_of_another_version(own, tmp_path):
    (own / "manifest.packed.json").rename(own / "aside")
    assert message(unpack_cache, own, tmp_path / "x").startswith(
        f"the packed cache {own} has lost its manifest.packed.json; copy it again"
    )
    (own / "archive.json").write_text(sealed_text({"format": "relish archive", "version": 2, "shards": []}))
    assert message(unpack_cache, own, tmp_path / "x") == (
        f"the relish archive {own} has format version 2, and this relish reads version 1; "
        "install the relish that wrote it, or pack the cache again"
    )


@pytest.mark.parametrize("shards", [None, [1], [{}], [{"file": "../x", "bytes": 1, "sha256": "", "shard": ""}]])
def test_a_list_with_something_else_in_it(own, tmp_path, shards):
    (own / "archive.json").write_text(sealed_text({"format": "relish archive", "version": 1, "shards": shards}))
    assert message(unpack_cache, own, tmp_path / "x").startswith(f"{own / 'archive.json'} is damaged (")


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_without_hdf5plugin(run_cli, cache, archive, tmp_path, monkeypatch, what):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    result = run_cli("cache", what, cache if what == "pack" else archive, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.strip() == (
        "error: A packed cache needs the package 'hdf5plugin', which is not installed; "
        "run: pip install 'relish-llm[pack]'"
    )
    assert not (tmp_path / "out").exists()


# The commands


def test_the_commands_say_what_they_did_and_what_is_next(run_cli, make, cache, tmp_path):
    before = sum(path.stat().st_size for path in cache.glob("*.h5"))
    result = run_cli("cache", "pack", cache, tmp_path / "archive")
    after = sum(path.stat().st_size for path in (tmp_path / "archive").glob("*.h5"))
    assert (result.exit_code, result.stdout) == (
        0,
        f"{tmp_path / 'archive'}: 8 shards, {before / 1e6:,.1f} MB packed into {after / 1e6:,.1f} MB "
        f"({after / before:.0%})\nnext: relish cache unpack {tmp_path / 'archive'} CACHE\n",
    )
    result = run_cli("cache", "unpack", tmp_path / "archive", tmp_path / "back")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'back'}: splits train, test\n")
    assert make.contents(tmp_path / "back") == make.contents(cache)
    result = run_cli("cache", "pack", cache, tmp_path / "archive", "--json")
    assert json.loads(result.stdout) == {"shards": 8, "bytes": before, "packed": after}


def test_info_shows_an_archive(run_cli, cache, own):
    result = run_cli("cache", "info", own)
    assert result.exit_code == 0
    assert re.search(r"^packed +8 of 8 shards, \d\.\d MB *$", result.stdout, re.MULTILINE)
    assert "relish cache unpack" in result.stdout
    figures = json.loads(run_cli("cache", "info", own, "--json").stdout)
    size = sum(path.stat().st_size for path in own.glob("*.h5"))
    assert figures.pop("packed") == {"shards": 8, "planned": 8, "bytes": size}
    assert figures == json.loads(run_cli("cache", "info", cache, "--json").stdout)
