"""File systems that are full or read-only, really mounted; tests skip where that is not allowed, but fail in CI."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes; it is gone afterwards."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[Path]:
    """The folder cannot be written, not even by root, whom permissions do not bind."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("--bind", place, place)
    try:
        _mount("-o", "remount,bind,ro", place)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """Write a file that leaves only so many bytes."""
    path = place / "filler"
    with path.open("wb") as file:
        file.write(bytes(max(0, os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - leave)))
    return path


def interrupted(words: list[object], number: signal.Signals, *, slow: str, until: Callable[[str], bool]) -> tuple:
    """Run the command line in a process, send it a signal once a line of stderr is the one; code and rest of stderr.

    Args:
        words: the command.
        number: the signal.
        slow: Python that runs first, to make the work last.
        until: whether the line is the one.
    """
    code = f"import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{slow}\n"
    code += "from relish.cli import main\nsys.argv[0] = 'relish'\nmain()\n"
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if until(line):
                break
        else:
            raise AssertionError("".join(lines))
        process.send_signal(number)
        rest = process.stderr.read()
        return process.wait(60), rest


def _mount(*arguments: object) -> None:
    try:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    except OSError:
        _give_up("there is no mount command here")
    else:
        if done.returncode != 0:
            _give_up(f"a file system cannot be mounted here: {done.stderr.strip()}")


def _give_up(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
