"""Bytes to and from disk: positioned reads and writes, preallocation, and durable replacement of a file.

Where the platform lacks `preadv`, `pwrite` or `posix_fallocate` (macOS, Windows), a seek and a plain read or write does
the same.
"""

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CacheError, RelishError

_POSITIONED = hasattr(os, "preadv") and hasattr(os, "pwrite")
_seek_lock = threading.Lock()  # without preadv, two threads on one descriptor would move each other's position


def open_read(path: Path) -> int:
    """Open a file for `read_into`; the caller closes the descriptor with os.close.

    Raises:
        OSError: if it cannot be opened, or is no regular file: one would wait for ever for a pipe under a shard's name.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def create(path: Path) -> int:
    """Make a file, empty, for `write_at` and `read_into`; the caller closes the descriptor with os.close."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)


def read_whole(path: Path) -> bytes:
    """All of a small file.

    Raises:
        OSError: as `open_read` does.
    """
    with os.fdopen(open_read(path), "rb") as file:
        return file.read()


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` (bytes) from `offset` on; returns how many bytes the file had, fewer only at its end."""
    done = 0
    while done < len(buffer):
        if _POSITIONED:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                piece = os.read(descriptor, len(buffer) - done)
            count = len(piece)
            buffer[done : done + count] = piece
        if count == 0:
            break
        done += count
    return done


def read_soon(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to begin reading, so that a disk works at several places at once; macOS and Windows cannot."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError, OverflowError):  # what is wrong shows when it is read
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`."""
    done = 0
    while done < len(data):
        if _POSITIONED:
            done += os.pwrite(descriptor, data[done:], offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                done += os.write(descriptor, data[done:])


def allocate(descriptor: int, size: int) -> None:
    """Reserve `size` bytes of disk, so that a full disk shows here and not in the middle of the writing.

    Raises:
        OSError: if the disk has not that much room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "put its folder back"),
    errno.EISDIR: "take away the folder of that name",
}


def way_to_write(reason: OSError) -> str:
    """What to do about a file that cannot be written, to go on a sentence."""
    return _WAYS_OUT.get(reason.errno or 0, "see to that")


@contextmanager
def writing_cache(
    path: Path, kept: str = "finished shards are kept", error: type[RelishError] = CacheError
) -> Iterator[None]:
    """Turn an error of the file system while a cache's file is written into one that says how to go on.

    Args:
        path: the file, under its final name.
        kept: what is safe, to go on the sentence.
        error: the type of error to raise, for other files that are written in this way.

    Raises:
        RelishError: of the type `error`, naming the file.
    """
    try:
        yield
    except OSError as reason:
        raise error(
            f"{path} cannot be written ({reason.strerror or reason}); {kept}: {way_to_write(reason)}, and run the same "
            "command again"
        ) from reason


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; does nothing on Windows, where a folder cannot be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(temporary: Path, final: Path) -> None:
    """Give a finished, already synced file its name, and make the name durable."""
    temporary.replace(final)
    sync_folder(final.parent)


def temporary_name(final: Path) -> Path:
    """The name a file is written under before it is complete: hidden, in the same folder."""
    return final.with_name(f".{final.name}.tmp")


def write_text_durably(final: Path, text: str) -> None:
    """`write_durably` for text."""
    write_durably(final, text.encode("utf-8"))


def write_durably(final: Path, content: bytes) -> None:
    """Write a file so that a reader finds either the old content or the new, whole, at any moment."""
    temporary = temporary_name(final)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, final)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_json_durably(final: Path, value: Any) -> None:
    """`write_text_durably` for JSON, indented for people; NaN is refused since JSON has none."""
    write_text_durably(final, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
