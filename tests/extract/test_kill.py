"""Real `relish extract` processes that are killed or interrupted, and the same command run again."""

import json
import os
import signal
import time
from random import Random

import pytest

from relish.cache.manifest import load_manifest
from relish.cache.reader import open_cache
from relish.cache.speed import SPEED
from relish.cache.verify import verify_cache

from ..waiting import wait_until


@pytest.fixture(scope="module")
def command(tmp_path_factory, tiny_model, tiny_rows):
    """`command(folder)`: the arguments of an extraction into several shards."""
    table = tmp_path_factory.mktemp("rows") / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(24)), encoding="utf-8")

    def arguments(folder, *more):
        fixed = ("--label-range", "0,5", "--device", "cpu", "--shard-rows", "6", "--json")
        return ("extract", folder, "--model", tiny_model("llama"), "--data", f"train={table}", *fixed, *more)

    return arguments


@pytest.fixture(scope="module")
def whole(command, relish_process, tmp_path_factory):
    """The files of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    return files(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SPEED}


def shards(folder):
    """Numbers of the listed shards and when each was written; all that is listed is whole."""
    if not (folder / "manifest.json").exists():
        return {}
    assert all("is not finished" in sentence for sentence in verify_cache(open_cache(folder)))
    records = load_manifest(folder).splits["train"].shards
    return {record.file: (folder / record.file).stat().st_mtime_ns for record in records}


def check_little_was_lost(folder, before):
    """Nothing listed was touched, and at most one shard was at work that is not listed."""
    after = shards(folder)
    assert before.items() <= after.items()
    unlisted = {path.name for path in folder.glob("*.h5")} - set(after)
    unlisted |= {path.name[1:].removesuffix(".tmp") for path in folder.glob(".*.h5.tmp")}
    assert len(unlisted) <= 1
    return after


def test_killed_at_every_step_of_a_commit(command, whole, relish_process, tmp_path):
    step, seen = 0, set()
    while True:
        step += 1
        folder = tmp_path / f"step-{step}"
        done, before = relish_process.run(*command(folder), kill_before=step), {}
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.stderr
        seen.add(tuple(sorted(path.name for path in folder.iterdir() if path.name != ".lock")))
        before = check_little_was_lost(folder, before)
        if step % 3 == 0:  # a second death on top, elsewhere in the next shard
            assert relish_process.run(*command(folder), kill_before=1 + step % 20).code == -signal.SIGKILL
            before = check_little_was_lost(folder, before)
        done = relish_process.run(*command(folder))
        assert done.code == 0, done.stderr
        check_little_was_lost(folder, before)
        assert files(folder) == whole, step
        if len(before) >= 2:
            break
    assert step > 18
    # Laid out; renamed but not listed; the manifest's copy begun, there, and the manifest begun; listed.
    shard, copy, manifest = "train-00000.h5", "manifest.copy.json", "manifest.json"
    for state in (
        (f".{shard}.tmp",),
        (shard,),
        (f".{copy}.tmp", shard),
        (copy, shard),
        (f".{manifest}.tmp", copy, shard),
        (copy, manifest, shard),
    ):
        assert state in seen


def test_killed_at_twenty_random_moments(command, whole, relish_process, tmp_path):
    draw = Random(0)
    started = time.monotonic()
    relish_process.run(*command(tmp_path / "timed"), pause=0.02)
    span = time.monotonic() - started
    kills, caches = 0, 0
    while kills < 20:
        assert caches < 40, f"only {kills} kills hit"
        folder, before = tmp_path / f"c-{caches}", {}
        while True:
            pid = relish_process.start(*command(folder), pause=0.02)
            if kills < 20:
                time.sleep(draw.uniform(0, 1.1 * span))
                os.kill(pid, signal.SIGKILL)  # does nothing if it has ended: it was not waited for
            done = relish_process.wait(pid)
            before = check_little_was_lost(folder, before) if folder.exists() else before
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done.stderr
            kills += 1
        assert files(folder) == whole
        caches += 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drops_the_shard_at_work_and_says_how_to_go_on(command, whole, relish_process, tmp_path, number, code):
    folder = tmp_path / "c"
    # A row at a time: the third shard, of five rows, is begun with its first, and the others are still to come.
    pid = relish_process.start(*command(folder, "--batch-tokens", "1"), pause=0.3)
    wait_until((folder / ".train-00002.h5.tmp").exists)
    os.kill(pid, number)
    done = relish_process.wait(pid)
    assert (done.code, done.stdout) == (code, "")
    assert done.stderr.endswith("interrupted; what is finished is kept: run the same command again to go on\n")
    assert "Traceback" not in done.stderr
    kept = ["train-00000.h5", "train-00001.h5"]
    assert sorted(files(folder)) == [".lock", "manifest.copy.json", "manifest.json", *kept]
    done = relish_process.run(*command(folder))
    assert done.code == 0, done.stderr
    assert files(folder) == whole


def test_a_signal_before_the_first_shard_leaves_nothing(command, relish_process, tmp_path):
    pid = relish_process.start(*command(tmp_path / "c"), pause=5)
    wait_until((tmp_path / "c" / ".lock").exists)
    os.kill(pid, signal.SIGTERM)
    assert relish_process.wait(pid).code == 143
    assert sorted(files(tmp_path / "c")) == [".lock"]


def test_of_two_writers_the_second_is_refused(command, whole, relish_process, tmp_path):
    folder = tmp_path / "c"
    first = relish_process.start(*command(folder), pause=0.5)
    wait_until((folder / "manifest.json").exists)
    second = relish_process.run(*command(folder))
    assert (second.code, second.stdout) == (2, "")
    message = f"error: another process is writing into {folder}; wait until it is done, or stop it\n"
    assert second.stderr.endswith(message)
    assert relish_process.wait(first).code == 0
    assert files(folder) == whole


def test_two_writers_at_the_same_moment_leave_one_whole_cache(command, whole, relish_process, tmp_path):
    folder = tmp_path / "c"
    both = [relish_process.start(*command(folder)) for _ in range(2)]
    done = [relish_process.wait(pid) for pid in both]
    assert sorted(one.code for one in done) in ([0, 0], [0, 2])
    for one in done:
        assert one.code == 0 or "another process" in one.stderr
    assert files(folder) == whole


def test_a_reader_during_writing_sees_whole_shards_only(command, whole, relish_process, tmp_path):
    folder, seen = tmp_path / "c", set()
    pid = relish_process.start(*command(folder), pause=0.2)

    def three_states_were_seen():
        if (folder / "manifest.json").exists():
            cache = open_cache(folder)
            seen.add(len(cache.manifest.splits["train"].shards))
            assert all("is not finished" in sentence for sentence in verify_cache(cache))
        return len(seen) >= 3

    wait_until(three_states_were_seen)
    assert relish_process.wait(pid).code == 0
    assert files(folder) == whole
