import os
import subprocess
import sys
from pathlib import Path

import pytest

# Forks once for every system call of a write, and kills the child right before that call.
SCRIPT = """
import os, runpy, signal, sys
from pathlib import Path

from relish.cache.reader import open_cache
from relish.cache.verify import verify_cache

conftest, home = sys.argv[1], Path(sys.argv[2])
make = runpy.run_path(conftest)
CALLS = ("open", "posix_fallocate", "pwrite", "fsync", "close", "replace", "rename", "mkdir")


def write(folder, kill_before):
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
    make["fill"](make["open_writer"](folder), "train", ROWS)


ROWS = make["rows"]((5, 5, 3))
whole = make["contents"](make["write"](home / "whole", {"train": ROWS}, shard_rows=4))
killed, states = 0, set()
while True:
    folder = home / f"killed-{killed}"
    child = os.fork()
    if child == 0:
        try:
            write(folder, killed + 1)
        finally:
            os._exit(0)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        break
    # What is listed is whole, whenever the process died.
    if (folder / "manifest.json").exists():
        cache = open_cache(folder)
        assert all("is not finished" in sentence for sentence in verify_cache(cache)), killed
        states.add(len(cache.manifest.splits["train"].shards))
    else:
        states.add(0)
    make["fill"](make["open_writer"](folder), "train", ROWS)
    assert make["contents"](folder) == whole, killed
    killed += 1
assert make["contents"](folder) == whole
print(killed, sorted(states))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_killed_at_any_step_can_be_run_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, Path(__file__).with_name("conftest.py"), tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    killed, _, states = done.stdout.partition(" ")
    assert int(killed) > 30
    assert states.strip() == "[0, 1, 2]"
