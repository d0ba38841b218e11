import json
import os

import pytest

from relish.cache.errors import CacheError
from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.repair import repair_cache
from relish.cache.verify import verify_cache


@pytest.fixture
def folder(make, tmp_path):
    return make.write(tmp_path / "c", {"train": make.rows(), "test": make.rows(seed=1)})


def again(make, folder):
    """Extract again; gives the numbers of the shards that were computed."""
    computed = {}
    for name, seed in (("train", 0), ("test", 1)):
        writer = make.open_writer(folder)
        computed[name] = list(writer.split(name, make.rows(seed=seed), shard_rows=4).pending())
        make.fill(writer, name, make.rows(seed=seed))
    return computed


def damage(folder):
    records = load_manifest(folder).splits["train"].shards
    path = folder / records[0].file
    data = bytearray(path.read_bytes())
    data[records[0].offset] ^= 1
    path.write_bytes(data)
    (folder / "train-00002.h5").unlink()
    os.truncate(folder / "test-00001.h5", 9)


def test_only_bad_and_missing_shards_are_computed_again(make, folder, run_cli):
    whole = make.contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    damage(folder)
    result = run_cli("cache", "repair", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"the shard {folder / 'train-00000.h5'} is damaged: the hidden states of row ")
    assert lines[3] == "dropped: train-00000.h5, train-00002.h5, test-00001.h5"
    assert lines[4] == "next: run the same relish extract command again; it computes 3 shards"
    found = verify_cache(open_cache(folder))
    assert found == [
        f"the split {name!r} is not finished ({count} of 4 shards); run the same relish extract command again to go on"
        for name, count in (("train", 2), ("test", 3))
    ]
    with pytest.raises(CacheError, match=r"is not finished \(2 of 4 shards\)"):
        open_cache(folder).split("train")
    assert again(make, folder) == {"train": [0, 2], "test": [1]}
    assert make.contents(folder) == whole
    untouched = {"train-00001.h5", "train-00003.h5", "test-00000.h5", "test-00002.h5", "test-00003.h5"}
    assert {name: (folder / name).stat().st_mtime_ns for name in untouched} == {n: times[n] for n in untouched}


def test_a_good_cache_is_left_as_it_is(make, folder, run_cli):
    before = make.contents(folder)
    assert run_cli("cache", "repair", folder).stdout == f"{folder}: nothing to repair\n"
    assert make.contents(folder) == before


def test_repair_as_json(folder, run_cli):
    (folder / "train-00001.h5").unlink()
    figures = json.loads(run_cli("cache", "repair", folder, "--json").stdout)
    assert (figures["dropped"], figures["pending"], len(figures["found"])) == (["train-00001.h5"], 1, 1)


@pytest.mark.parametrize("fault", ["delete", "empty", "cut", "edit", "flip"])
def test_a_manifest_is_brought_back_from_its_copy(make, folder, fault):
    before, path = make.contents(folder), folder / "manifest.json"
    text = path.read_text(encoding="utf-8")
    if fault == "delete":
        path.unlink()
    elif fault == "flip":
        make.flip(path, len(text) // 2)
    else:
        path.write_text({"empty": "", "cut": text[:-1], "edit": text.replace('"task": null', '"task": "sick"')}[fault])
    with pytest.raises(CacheError, match=f"run: relish cache repair {folder}$"):
        open_cache(folder)
    done = repair_cache(folder)
    assert done.found == (f"{path} was missing or damaged; its copy took its place",)
    assert (done.dropped, done.pending) == ((), 0)
    assert make.contents(folder) == before


def test_a_bad_copy_is_found_and_written_anew(make, folder, run_cli):
    before, path = make.contents(folder), folder / "manifest.copy.json"
    make.flip(path, 100)
    result = run_cli("cache", "verify", folder)
    assert result.exit_code == 1
    assert str(path) in result.stdout
    repair_cache(folder)
    assert make.contents(folder) == before


def test_without_any_good_manifest_the_way_out_is_said(folder):
    for name in ("manifest.json", "manifest.copy.json"):
        (folder / name).write_text("{")
    with pytest.raises(CacheError, match=r"cannot be brought back.* Restore one of them from elsewhere, or extract"):
        repair_cache(folder)


def test_a_folder_that_is_no_cache_is_refused_and_left_alone(tmp_path, run_cli):
    result = run_cli("cache", "repair", tmp_path)
    assert result.exit_code == 2
    assert "is not a relish cache: it has no manifest.json" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_being_written_is_not_repaired(make, folder):
    with make.open_writer(folder).writing(), pytest.raises(CacheError, match="another process is writing into"):
        repair_cache(folder)


def test_extracting_again_finds_a_lost_manifest_by_itself(make, folder):
    before = make.contents(folder)
    (folder / "manifest.json").unlink()
    writer = make.open_writer(folder)
    assert writer.lost_manifest
    assert list(writer.split("train", make.rows(), shard_rows=4).pending()) == []
    with writer.writing():
        pass
    assert make.contents(folder) == before
