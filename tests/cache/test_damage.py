"""Files of a finished cache that are cut, deleted, edited, or have one bit flipped: found by verify and when opened."""

import json
import os
import shutil
from contextlib import suppress
from random import Random

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relish.cache.errors import CacheError, DamagedCacheError, RelishError
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
        lambda value: value.update(version=2),
        lambda value: value.update(format="another cache"),
    ],
)
def test_a_manifest_that_was_edited_by_hand(own, edit):
    path = own / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    value["sha256"] = value.pop("sha256")
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with pytest.raises(CacheError) as caught:
        open_cache(own)
    assert str(caught.value) == (
        f"{path} is not as relish wrote it: it was edited or damaged; run: relish cache repair {own}"
    )


def test_a_flipped_bit_anywhere_in_the_manifest(own):
    """Also in its format and version: the way out is always to take the copy."""
    path, draw = own / MANIFEST, Random(0)
    data = path.read_bytes()
    places = {draw.randrange(len(data)) for _ in range(300)} | set(range(60)) | set(range(len(data) - 90, len(data)))
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DamagedCacheError) as caught:
            open_cache(own)
        assert str(caught.value).startswith((f"{path} is not as relish wrote it: ", f"{path} cannot be read ("))
        assert str(caught.value).endswith(f"; run: relish cache repair {own}")
    repair_cache(own)
    read_all(own)


def test_a_manifest_of_another_version_or_program_is_not_called_damaged(own):
    path = own / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["sha256"]
    for change, sentence in (
        (
            {"version": 7},
            f"the relish cache {own} has format version 7, and this relish reads version 1; install the relish that "
            "wrote it, or extract into another folder",
        ),
        ({"format": "a web app"}, f"{path} is not that of a relish cache"),
    ):
        for text in (sealed_text({**value, **change}), json.dumps({**value, **change})):
            path.write_text(text, encoding="utf-8")
            with pytest.raises(CacheError) as caught:
                open_cache(own)
            assert str(caught.value) == sentence
            assert not isinstance(caught.value, DamagedCacheError)


@pytest.mark.parametrize("name", [MANIFEST, COPY, "train-00001.h5"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(own, run_cli, name):
    (own / name).unlink()
    os.mkfifo(own / name)
    result = run_cli("cache", "verify", own)
    assert result.exit_code == 1
    assert f"{own / name} cannot be " in result.stdout
    assert "(not a regular file); " in result.stdout
    assert result.stdout.endswith(f"run: relish cache repair {own}\n")


def both_manifests_gone(folder, shards):
    return (
        f"{folder} holds {shards} shards (test-00000.h5 …) and no manifest.json that lists them; restore it, or "
        "manifest.copy.json, from elsewhere, or extract into another folder"
    )


def test_shards_that_have_lost_both_manifests_are_not_written_over(make, own, run_cli):
    for name in (MANIFEST, COPY):
        (own / name).unlink()
    before = make.contents(own)
    for call in (open_cache, make.open_writer, repair_cache):
        with pytest.raises(CacheError) as caught:
            call(own)
        assert str(caught.value) == both_manifests_gone(own, len(before))
    assert run_cli("cache", "verify", own).exit_code == 1
    assert make.contents(own) == before


def test_one_shard_without_a_manifest_is_what_a_killed_first_run_leaves(make, own):
    whole = make.contents(own)
    for path in own.iterdir():
        if path.name != "train-00000.h5":
            path.unlink()
    for name, seed in (("train", 0), ("test", 1)):
        make.fill(make.open_writer(own, make.identity(hidden_size=24)), name, make.rows(seed=seed))
    assert make.contents(own) == whole


def test_a_lost_manifest_whose_copy_is_damaged(make, own, run_cli):
    (own / MANIFEST).unlink()
    make.flip(own / COPY, 200)
    with pytest.raises(CacheError) as caught:
        make.open_writer(own)
    assert str(caught.value) == (
        f"{own / COPY} is not as relish wrote it: it was edited or damaged; restore it from a copy, or extract into "
        "another folder"
    )
    with pytest.raises(CacheError, match=f"the cache {own} has lost its manifest.json; run: relish cache repair {own}"):
        open_cache(own)
    result = run_cli("cache", "repair", own)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: the manifest of the cache {own} cannot be brought back, since its copy is no help either. the cache "
        f"{own} has lost its manifest.json; {own / COPY} is not as relish wrote it: it was edited or damaged. Restore "
        "one of them from elsewhere, or extract into another folder\n"
    )


@pytest.mark.parametrize("fault", ["flip", "delete"])
def test_verify_reports_a_bad_manifest_as_it_does_a_bad_shard(make, own, run_cli, fault):
    if fault == "delete":
        (own / MANIFEST).unlink()
        problem = f"the cache {own} has lost its manifest.json; run: relish cache repair {own}"
    else:
        make.flip(own / MANIFEST, 20)
        problem = (
            f"{own / MANIFEST} is not as relish wrote it: it was edited or damaged; run: relish cache repair {own}"
        )
    result = run_cli("cache", "verify", own)
    assert (result.exit_code, result.stdout, result.stderr) == (1, f"{problem}\n", "")
    result = run_cli("cache", "verify", own, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, {"shards": 0, "problems": [problem]})


# Fuzzing: whatever is in the files, the answer is right or an error of this package.


def found_good(folder):
    """What verify says, which must be what reading says; of padding, which is never read, verify alone knows."""
    try:
        good = not verify_cache(open_cache(folder))
    except RelishError:
        good = False
    try:
        read_all(folder)
    except RelishError:
        assert not good
    return good


@given(data=st.data())
@settings(max_examples=150)
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
    assert found_good(folder) is not changed
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
@settings(max_examples=250)
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
    found_good(folder)
    try:
        repair_cache(folder)
    except RelishError:
        pass
    else:
        found_good(folder)
    shutil.rmtree(folder)


EDGES = (None, True, -1, 0, 2**70, 10**400, -(10**400), 1.5, 1e308, "", "x/../y", "\0", [], [1, 2], {}, {"a": 1})


def test_every_field_of_the_manifest_with_every_kind_of_value_under_a_good_seal(own):
    """Each place is tried, where the fuzzing above draws some."""
    path = own / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["sha256"]
    for place in [place for place in places_of(value) if place]:
        *before, key = place
        inner = value
        for step in before:
            inner = inner[step]
        kept = inner[key]
        for edge in EDGES:
            inner[key] = edge
            path.write_text(sealed_text(value), encoding="utf-8")
            try:
                cache = open_cache(own)
            except CacheError as error:
                assert str(path) in str(error) or str(own) in str(error), place  # noqa: PT017  (most edges are no error)
            else:
                for name in cache.splits:
                    with suppress(RelishError):
                        cache.split(name).close()
        inner[key] = kept


def test_an_unknown_field_of_the_identity_names_the_file_and_the_way_out(own):
    path = own / MANIFEST
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["sha256"]
    value["identity"]["quantised"] = True
    path.write_text(sealed_text(value), encoding="utf-8")
    with pytest.raises(CacheError) as caught:
        open_cache(own)
    assert str(caught.value) == (
        f"{path} cannot be used: the cache's identity has other fields than this version of relish knows, "
        "['quantised']; install the relish that wrote it"
    )


def test_a_good_cache_is_read(good):
    assert found_good(good)
    assert load_manifest(good) == load_manifest(good, COPY)
