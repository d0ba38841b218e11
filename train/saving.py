"""Writing results: whole and synced, or an error that names the file and says how to go on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cache.errors import RunError
from ..cache.fileio import way_to_write


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Turn an error of the file system while `path` is written into a sentence.

    Args:
        path: the file, under its final name.
        kept: what is safe, to go on the sentence: "finished cells are kept".

    Raises:
        RunError: naming the file.
    """
    try:
        yield
    except OSError as reason:
        raise RunError(
            f"{path} cannot be written ({reason.strerror or reason}); {kept}: {way_to_write(reason)}, and run the same "
            "command again"
        ) from reason


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
