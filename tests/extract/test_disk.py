"""Real `relish extract` processes on a small file system that is really full: before a shard, inside one, while the
manifest is written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from relish.cache.speed import SPEED

from ..disk import fill, small_disk


@pytest.fixture
def disk(tmp_path):
    """A folder that holds a megabyte."""
    with small_disk(tmp_path / "disk", "1m") as place:
        yield place


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model, tiny_rows):
    table = tmp_path_factory.mktemp("rows") / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(240)), encoding="utf-8")

    def arguments(folder):
        fixed = ("--label-range", "0,5", "--device", "cpu", "--shard-rows", "80", "--json")
        return ("extract", folder, "--model", tiny_model("llama"), "--data", f"train={table}", *fixed)

    return arguments


@pytest.fixture(scope="module")
def whole(command, relish_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "c"
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    return files(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SPEED}


def shard_names(whole):
    return sorted(name for name in whole if name.endswith(".h5"))


def pages(size):
    """What a file of that size takes on the disk."""
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-size // page) * page


@pytest.mark.parametrize(
    ("kept", "share"),
    [
        (0, 0.0),  # before a shard: there is no room for its first byte
        (0, 0.5),  # inside it
        (1, 0.5),  # inside the second
    ],
)
def test_a_disk_that_fills_up(command, whole, relish_process, disk, kept, share):
    folder = disk / "c"
    folder.mkdir()
    names = shard_names(whole)
    # Each manifest is written beside the one before it.
    room = sum(pages(len(whole[name])) + 4 * pages(1) for name in names[:kept])
    fill(disk, room + int(share * len(whole[names[kept]])))
    done = relish_process.run(*command(folder))
    assert (done.code, done.stdout) == (2, ""), done.stderr
    stopped = re.search(
        r"error: (.*) cannot be written \(No space left on device\); finished shards are kept: ", done.stderr
    )
    assert stopped is not None, done.stderr
    if not kept:
        assert stopped[1] == str(folder / names[0])
    assert (folder / names[0]).exists() == bool(kept)
    assert "Traceback" not in done.stderr
    left = files(folder)
    assert {name: whole[name] for name in left if name.endswith(".h5")} == {
        name: data for name, data in left.items() if name.endswith(".h5")
    }
    assert not [name for name in left if name.endswith(".tmp")]
    (disk / "filler").unlink()
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    assert files(folder) == whole


@pytest.mark.parametrize("more", [0, 1])
def test_a_disk_that_is_full_when_the_manifest_is_written(command, whole, relish_process, disk, more):
    """Room for the first shard, to the page, and then for none or one of the two small files after it."""
    folder = disk / "c"
    folder.mkdir()
    first = shard_names(whole)[0]
    fill(disk, pages(len(whole[first])) + more * pages(1))
    done = relish_process.run(*command(folder))
    assert (done.code, done.stdout) == (2, ""), done.stderr
    name = ("manifest.copy.json", "manifest.json")[more]
    assert f"error: {folder / name} cannot be written (No space left on device); finished shards" in done.stderr
    assert sorted(files(folder)) == sorted([".lock", first, *(["manifest.copy.json"] if more else [])])
    (disk / "filler").unlink()
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    assert files(folder) == whole


def test_a_disk_that_fills_up_below_the_writer(command, whole, relish_process, disk, tmp_path):
    """Without reservation, as where posix_fallocate is missing: the writing itself meets the full disk."""
    folder = disk / "c"
    folder.mkdir()
    fill(disk, 60_000)
    done = relish_process.run(*command(folder), without="posix_fallocate")
    assert (done.code, done.stdout) == (2, ""), done.stderr
    assert "cannot be written (No space left on device)" in done.stderr
    assert sorted(files(folder)) == [".lock"]
    (disk / "filler").unlink()
    assert relish_process.run(*command(folder)).code == 0
    assert files(folder) == whole


def test_the_code_is_that_of_a_fresh_interpreter_too(command, disk):
    """No crash at the interpreter's exit, which a forked process would skip."""
    (disk / "c").mkdir()
    fill(disk, 40_000)
    done = subprocess.run(
        [sys.executable, "-m", "relish", *map(str, command(disk / "c"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written (No space left on device)" in done.stderr
    assert Path(disk / "c" / ".lock").exists()
