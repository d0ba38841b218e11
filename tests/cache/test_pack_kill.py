"""Packing and unpacking that a kill or a full disk ends, in real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..disk import fill, small_disk

# Forks once for every system call that changes a file, and kills the child right before that call.
KILL = """
import os, runpy, signal, sys
from pathlib import Path

import h5py, hdf5plugin
from relish.cache.archive import load_archive
from relish.cache.errors import CacheError
from relish.cache.pack import pack_cache
from relish.cache.reader import open_cache
from relish.cache.unpack import unpack_cache
from relish.cache.verify import verify_cache

conftest, home = sys.argv[1], Path(sys.argv[2])
make = runpy.run_path(conftest)
CALLS = ("open", "posix_fallocate", "pwrite", "fsync", "close", "replace", "rename", "mkdir", "truncate", "unlink")


def killed(work, kill_before):
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = kill_before
    def counted(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, counted(getattr(os, name)))
    try:
        work()
    finally:
        os._exit(0)


files = make["contents"]
cache = make["write"](home / "c", {"train": make["rows"]((5, 5, 3))}, shard_rows=2)
pack_cache(cache, home / "archive")
whole = files(home / "archive")
counts, states = [], [set(), set()]
for what in (0, 1):
    count = 0
    while True:
        folder = home / f"{what}-{count}"
        work = (lambda: pack_cache(cache, folder)) if what == 0 else (lambda: unpack_cache(home / "archive", folder))
        if not killed(work, count + 1):
            break
        # What has its final name is whole, whenever the process died.
        there = files(folder) if folder.exists() else {}
        final = {name: data for name, data in there.items() if name.endswith(".h5") and name[0] != "."}
        assert all(data == (whole, files(cache))[what][name] for name, data in final.items()), (what, count)
        states[what].add(len(final))
        if "archive.json" in there:
            try:
                unpack_cache(folder, home / f"back-{count}")
            except CacheError as error:
                assert "is not finished" in str(error), error
            else:
                assert files(home / f"back-{count}") == files(cache)
        if "manifest.json" in there:
            assert verify_cache(open_cache(folder)) == [] and there == files(cache) | {
                name: data for name, data in there.items() if name.startswith(".")}
        work()
        assert {n: d for n, d in files(folder).items() if n[0] != "."} == (whole, files(cache))[what], (what, count)
        count += 1
    counts.append(count)
print(*counts, *(sorted(state) for state in states))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_killed_at_any_step_can_be_run_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILL, Path(__file__).with_name("conftest.py"), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = re.match(r"(\d+) (\d+) \[0, 1, 2\] \[0, 1, 2\]$", done.stdout)
    assert counts is not None, done.stdout
    assert int(counts[1]) > 30
    assert int(counts[2]) > 20


# A full disk, in real processes: a fault inside HDF5 shows at the interpreter's exit


@pytest.fixture(scope="module")
def big(make, relish_process, tmp_path_factory):
    """Shards of 96 KiB, packed by a process of the same kind."""
    folder = tmp_path_factory.mktemp("big") / "c"
    make.write(folder, {"train": make.rows([64] * 24)}, hidden_size=96, shard_rows=8)
    assert relish_process.run("cache", "pack", folder, folder.parent / "archive").code == 0
    return folder


@pytest.mark.parametrize("what", ["pack", "unpack"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.97, 1.5])
def test_a_disk_that_fills_up(make, big, relish_process, tmp_path, what, share):
    source, whole = (big, big.parent / "archive") if what == "pack" else (big.parent / "archive", big)
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "out"
        room = int(share * (whole / "train-00000.h5").stat().st_size)
        filler = fill(disk, room + 3 * 4096)
        done = relish_process.run("cache", what, source, out)
        assert (done.code, done.stdout) == (2, ""), done.stderr
        assert re.match(
            rf"error: {re.escape(str(out))}/\S+ cannot be written \(No space left on device\); "
            r"finished shards are kept: .* run the same command again\n$",
            done.stderr,
        ), done.stderr
        assert not list(out.glob(".*.tmp"))
        filler.unlink()
        done = relish_process.run("cache", what, source, out)
        assert done.code == 0, done.stderr
        assert make.contents(out) == make.contents(whole)
