"""One packed shard: an HDF5 file with a shard's datasets, compressed, and the bytes that stood around them.

The codec was chosen by size and speed on real hidden states (benchmarks/cache_size.py). HDF5's byte shuffle brings
signs and exponents together, which zstd's entropy coder more than halves; mantissas are noise, which nothing
compresses. zstd at level 1 wins in size too, since higher levels spend bits on chance matches in that noise. Bit
shuffle and blosc2 lose on both. The chunks take few token slots of many rows: an LLM that reads left to right gives
rows with the same beginning, such as the instruction in the prompt, the same states there, and so near one another
even level 1 finds them.
"""

import hashlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CacheError, require_extra
from .fileio import open_read, read_into, write_at
from .index import COLUMNS, check_index, place_outside
from .manifest import ShardRecord
from .shard import HiddenLayout

_LEVEL = 1
_CHUNK_ROWS = 64
_CHUNK_BYTES = 1 << 15
"""Of one row in a chunk of `hidden`: enough that reading and writing the shard itself is fast."""
_COLUMN_BYTES = 1 << 22

Slab = tuple[slice, int, slice]
"""Rows, layer and token slots of one chunk of `hidden`."""


def zstd_filter() -> dict[str, Any]:
    """What makes an HDF5 dataset compressed, as arguments of h5py's create_dataset.

    Raises:
        MissingExtraError: if hdf5plugin is not installed.
    """
    return {"shuffle": True, **require_extra("hdf5plugin", "pack", "A packed cache").Zstd(clevel=_LEVEL)}


class _Spool(io.RawIOBase):
    """The file that HDF5 writes a packed shard into.

    An error of the disk, or Ctrl-C, is kept until `check`: met inside HDF5 it would crash the interpreter at exit.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._failed: BaseException | None = None
        self._place = 0

    def check(self) -> None:
        """Raise what was kept."""
        if self._failed is not None:
            raise self._failed

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        end = os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: end}[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        return read_into(self._descriptor, memoryview(buffer).cast("B"), self._place)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        try:
            if self._failed is None:
                write_at(self._descriptor, view, self._place)
        except BaseException as error:
            self._failed = error
        self._place += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        size = self._place if size is None else size
        try:
            if self._failed is None:
                os.truncate(self._descriptor, size)
        except BaseException as error:
            self._failed = error
        return size


def write_packed(
    shard: Path, target: int, record: ShardRecord, layout: HiddenLayout, progress: Callable[[int], None]
) -> bool:
    """Pack a shard, all of it checked but its hidden states.

    Args:
        shard: the file to pack.
        target: descriptor of the new file.
        record: the shard's.
        layout: that of its hidden states.
        progress: called with the number of its bytes just packed.

    Returns:
        Whether all padding was zero. The packed shard holds zeros there in any case.

    Raises:
        CacheError: if the shard is missing, or damaged outside its hidden states.
    """
    import h5py
    from h5py import h5t  # pyright: ignore[reportAttributeAccessIssue]

    compressed, clean, spool = zstd_filter(), True, _Spool(target)
    outside = check_index(shard, record, layout)
    descriptor = open_read(shard)
    try:
        with h5py.File(shard, "r") as source, h5py.File(spool, "w", libver="v110") as packed:
            columns: dict[str, Any] = {name: source[name] for name in COLUMNS}
            packed.attrs["relish_packed"] = 1
            for name, column in columns.items():
                _copy_column(name, column, packed, outside, record, layout, compressed)
            frame = _create(packed, "frame", outside.shape, h5t.STD_U8LE, (_COLUMN_BYTES,), compressed)
            _write(frame, (0,), outside.shape, outside)
            progress(len(outside))
            chunk = _chunk(record, layout)
            hidden = _create(packed, "hidden", layout.shape(record.rows), layout.dtype.hdf5, chunk, compressed)
            hidden.attrs["offset"] = record.offset
            lengths = columns["mask"][()].sum(axis=1, dtype=np.int64).tolist()
            for slab in _slabs(record, layout):
                states, slab_clean = _read_slab(descriptor, record, layout, slab, lengths)
                clean = clean and slab_clean
                _write(hidden, *_selection(layout, slab), states)
                spool.check()
                progress(states.size)
        spool.check()
    finally:
        os.close(descriptor)
    return clean


def restore(
    packed: Path,
    record: ShardRecord,
    layout: HiddenLayout,
    put: Callable[[memoryview, int], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Give all of a shard but its padding from a packed one, checked against the manifest's record.

    Args:
        packed: the packed shard; that its bytes are those that were written is for the caller to know.
        record: the shard's.
        layout: that of its hidden states.
        put: called with bytes and their place in the shard, hidden states before they are checked.
        progress: called with the number of the shard's bytes just given.

    Raises:
        CacheError: if it holds anything but that shard.
    """
    import h5py

    zstd_filter()
    try:
        with h5py.File(packed, "r") as file:
            datasets: dict[str, Any] = dict(file.items())
            outside = _raw(datasets["frame"])
            columns = {name: _raw(datasets[name]) for name in COLUMNS}
            for name, column in columns.items():
                place = place_outside(int(datasets[name].attrs["offset"]), record, layout)
                outside[place : place + len(column)] = column
            if hashlib.sha256(outside.data).hexdigest() != record.sha256:
                raise ValueError("its index is not that of the manifest")
            put(outside[: record.offset].data, 0)
            put(outside[record.offset :].data, record.offset + record.rows * layout.row_bytes)
            if progress is not None:
                progress(len(outside))
            hidden = datasets["hidden"]
            if hidden.shape != layout.shape(record.rows) or hidden.id.get_type().get_size() != layout.dtype.itemsize:
                raise ValueError("its shape is not that of the manifest")
            lengths = columns["mask"].reshape(record.rows, layout.T).sum(axis=1, dtype=np.int64).tolist()
            crcs = [0] * record.rows
            for slab in _slabs(record, layout):
                rows, layer, slots = slab
                states = _raw_part(hidden, *_selection(layout, slab)).reshape(rows.stop - rows.start, -1)
                for row, values in zip(range(rows.start, rows.stop), states, strict=True):
                    real = values[: max(0, lengths[row] - slots.start) * layout.token_bytes].data
                    crcs[row] = zlib.crc32(real, crcs[row])
                    if len(real):
                        put(real, record.offset + layout.place(row, layer) + slots.start * layout.token_bytes)
                if progress is not None:
                    progress(states.size)
            if crcs != columns["checksum"].view("<u4").tolist():
                raise ValueError("its hidden states are not those that were written")
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CacheError(f"the packed shard {packed} does not hold the shard of its manifest ({error})") from None


def _chunk(record: ShardRecord, layout: HiddenLayout) -> tuple[int, ...]:
    rows, slots = min(_CHUNK_ROWS, record.rows), min(layout.T, max(1, _CHUNK_BYTES // layout.token_bytes))
    return (rows, slots, layout.width) if layout.layers == 1 else (rows, 1, slots, layout.width)


def _slabs(record: ShardRecord, layout: HiddenLayout) -> Iterator[Slab]:
    """The chunks, those of one row in the order in which its checksum takes them."""
    rows, *_, slots, _ = _chunk(record, layout)
    for row in range(0, record.rows, rows):
        for layer in range(layout.layers):
            for slot in range(0, layout.T, slots):
                yield slice(row, min(row + rows, record.rows)), layer, slice(slot, min(slot + slots, layout.T))


def _selection(layout: HiddenLayout, slab: Slab) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows, layer, slots = slab
    start = (rows.start, slots.start, 0) if layout.layers == 1 else (rows.start, layer, slots.start, 0)
    count = (rows.stop - rows.start, slots.stop - slots.start, layout.width)
    return start, count if layout.layers == 1 else (count[0], 1, *count[1:])


def _read_slab(
    descriptor: int, record: ShardRecord, layout: HiddenLayout, slab: Slab, lengths: list[int]
) -> tuple[np.ndarray, bool]:
    rows, layer, slots = slab
    states = np.zeros((rows.stop - rows.start, (slots.stop - slots.start) * layout.token_bytes), dtype=np.uint8)
    clean = True
    for row, values in zip(range(rows.start, rows.stop), states, strict=True):
        place = record.offset + layout.place(row, layer) + slots.start * layout.token_bytes
        read_into(descriptor, values.data, place)
        padding = values[max(0, lengths[row] - slots.start) * layout.token_bytes :]
        if padding.any():
            clean = False
            padding[:] = 0
    return states, clean


def _copy_column(
    name: str,
    source: Any,
    packed: Any,
    outside: np.ndarray,
    record: ShardRecord,
    layout: HiddenLayout,
    compressed: dict[str, Any],
) -> None:
    """Move a small dataset out of the bytes around it; zeros stay there, and compress to nothing."""
    place = source.id.get_offset()
    begin = place_outside(place, record, layout)
    values = outside[begin : begin + source.id.get_storage_size()]
    chunk = (max(1, _COLUMN_BYTES * record.rows // len(values)), *source.shape[1:])
    dataset = _create(packed, name, source.shape, source.id.get_type(), chunk, compressed)
    dataset.attrs["offset"] = place
    _write(dataset, (0,) * source.ndim, source.shape, values)
    values[:] = 0


def _create(
    packed: Any, name: str, shape: tuple[int, ...], kind: Any, chunk: tuple[int, ...], compressed: dict[str, Any]
) -> Any:
    import h5py

    chunk = tuple(min(size, most) for size, most in zip(chunk, shape, strict=True))
    return packed.create_dataset(name, shape, h5py.Datatype(kind), chunks=chunk, track_times=False, **compressed)


def _write(dataset: Any, start: tuple[int, ...], count: tuple[int, ...], values: np.ndarray) -> None:
    memory, place = _spaces(dataset, start, count)
    dataset.id.write(memory, place, values, dataset.id.get_type())  # its own type: HDF5 converts nothing


def _raw(dataset: Any) -> np.ndarray:
    return _raw_part(dataset, (0,) * dataset.ndim, dataset.shape)


def _raw_part(dataset: Any, start: tuple[int, ...], count: tuple[int, ...]) -> np.ndarray:
    memory, place = _spaces(dataset, start, count)
    kind = dataset.id.get_type()
    values = np.empty(math.prod(count) * kind.get_size(), dtype=np.uint8)
    dataset.id.read(memory, place, values, kind)
    return values


def _spaces(dataset: Any, start: tuple[int, ...], count: tuple[int, ...]) -> tuple[Any, Any]:
    from h5py import h5s  # pyright: ignore[reportAttributeAccessIssue]

    place = dataset.id.get_space()
    place.select_hyperslab(start, count)
    return h5s.create_simple(count), place
