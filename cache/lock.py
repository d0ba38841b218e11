"""One writer at a time: a lock on a folder, which the system gives back when the process ends, however it ends."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import RelishError
from .fileio import way_to_write

LOCK = ".lock"
_log = logging.getLogger("relish")  # which writes warnings to stderr, unless a program sets it up otherwise


@contextmanager
def lock_folder(folder: Path, error: type[RelishError]) -> Iterator[None]:
    """Hold a folder's lock; the folder is made if it is not there.

    Where the file system has no locks, as some network file systems, a warning says so and the block runs without one.

    Raises:
        RelishError: of the type `error`, if another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as reason:
        raise error(
            f"{folder} cannot be written ({reason.strerror or reason}); {way_to_write(reason)}, or choose another one"
        ) from reason
    try:
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            raise error(f"another process is writing into {folder}; wait until it is done, or stop it") from None
        except OSError:
            _log.warning("note: locks are not supported in %s; make sure that only one process writes there", folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
