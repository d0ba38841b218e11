"""What a shard says about its rows: all of it but the hidden states, read and checked."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheError
from .fileio import open_read, read_into
from .manifest import ShardRecord
from .shard import HiddenLayout, way_out

COLUMNS = ("mask", "input_ids", "target", "row", "id", "checksum")
"""The datasets beside `hidden`."""
_TYPES = {"mask": "<u1", "input_ids": "<i4", "target": "<f8", "row": "<i8", "checksum": "<u4"}


@dataclass(frozen=True)
class RowIndex:
    """What a shard says about its N rows."""

    lengths: np.ndarray
    """(N,) int64, real tokens; they come first, the rest of the T slots is padding."""
    target: np.ndarray
    """(N,) float64, NaN if unlabelled."""
    row: np.ndarray
    """(N,) int64, position in the input file."""
    ids: np.ndarray
    """(N,) bytes, UTF-8."""
    checksum: np.ndarray
    """(N,) uint32, CRC-32 of the hidden states of the row's real tokens (layer by layer)."""


def read_index(folder: Path, record: ShardRecord, layout: HiddenLayout) -> RowIndex:
    """Read what a shard says about its rows, after checking its size and the hash of all but the hidden states.

    Raises:
        CacheError: naming the shard, if it is missing, truncated or changed.
    """
    mask, target, row, ids, checksum = read_columns(
        folder / record.file, record, layout, ("mask", "target", "row", "id", "checksum")
    )
    return RowIndex(np.count_nonzero(mask, axis=1), target, row, ids, checksum)


def read_columns(path: Path, record: ShardRecord, layout: HiddenLayout, names: Sequence[str]) -> list[np.ndarray]:
    """Read small datasets of a shard, after checking its size and the hash of all but the hidden states.

    Raises:
        CacheError: naming the shard, if it is missing, truncated or changed.
    """
    from h5py import h5f  # pyright: ignore[reportAttributeAccessIssue]

    outside = check_index(path, record, layout)
    try:
        # h5py's own files and datasets take longer than all else of opening a cache: HDF5 only says where they are.
        file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY)
        try:
            hidden = _open_dataset(file, "hidden")
            if (hidden.shape, hidden.get_offset()) != (layout.shape(record.rows), record.offset):
                raise ValueError("its shape is not that of the manifest")
            return [_column(file, name, outside, record, layout) for name in names]
        finally:
            file.close()
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CacheError(f"{path} is not a shard this relish can read ({error}); {way_out(path.parent)}") from None


def check_index(path: Path, record: ShardRecord, layout: HiddenLayout) -> np.ndarray:
    """Read all bytes of a shard but the hidden states, and check the shard's size and their hash.

    Returns:
        Those bytes: the first `record.offset` of them come before the hidden states, the others after them.

    Raises:
        CacheError: naming the shard and what is wrong with it.
    """
    hidden = record.rows * layout.row_bytes
    try:
        descriptor = open_read(path)
    except OSError as error:
        raise CacheError(f"the shard {path} cannot be opened ({error.strerror}); {way_out(path.parent)}") from None
    try:
        size = os.fstat(descriptor).st_size
        if size != record.bytes:
            raise CacheError(f"the shard {path} has {size} bytes, {record.bytes} were written; {way_out(path.parent)}")
        outside = np.zeros(max(0, size - hidden), dtype=np.uint8)
        read_into(descriptor, outside[: record.offset].data, 0)
        read_into(descriptor, outside[record.offset :].data, record.offset + hidden)
    except OSError as error:
        raise CacheError(f"the shard {path} cannot be read ({error.strerror}); {way_out(path.parent)}") from None
    finally:
        os.close(descriptor)
    if hashlib.sha256(outside.data).hexdigest() != record.sha256:
        raise CacheError(
            f"the shard {path} is damaged outside its hidden states (its hash differs); {way_out(path.parent)}"
        )
    return outside


def place_outside(place: int, record: ShardRecord, layout: HiddenLayout) -> int:
    """Where a byte of a shard lies in what `check_index` returns."""
    return place if place < record.offset else place - record.rows * layout.row_bytes


def _column(file: Any, name: str, outside: np.ndarray, record: ShardRecord, layout: HiddenLayout) -> np.ndarray:
    dataset = _open_dataset(file, name)
    dtype, shape, place = dataset.dtype, dataset.shape, dataset.get_offset()
    if shape != ((record.rows, layout.T) if name in ("mask", "input_ids") else (record.rows,)) or place is None:
        raise ValueError("its shape is not that of the manifest")
    if dtype.kind != "S" if name == "id" else dtype != _TYPES[name]:
        raise ValueError(f"{name} is of the type {dtype}")
    begin = place_outside(place, record, layout)
    values = outside[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    if name == "id" and not values.tobytes().isascii():
        for value in values.tolist():
            value.decode("utf-8")  # so that nobody who takes one later meets one that is no text
    return values


def _open_dataset(file: Any, name: str) -> Any:
    from h5py import h5d  # pyright: ignore[reportAttributeAccessIssue]

    return h5d.open(file, name.encode())
