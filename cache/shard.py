"""One shard: an HDF5 file with the hidden states of some rows. README.md in this folder gives its bytes."""

import hashlib
import io
import math
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import StorageDtype
from .errors import CacheError
from .fileio import allocate, open_read, read_into, replace_durably, temporary_name, write_at, writing_cache
from .manifest import ShardRecord

if TYPE_CHECKING:
    import torch

COLUMNS = ("mask", "input_ids", "target", "row", "id", "checksum")
"""The datasets beside `hidden`."""
_TYPES = {"mask": "<u1", "input_ids": "<i4", "target": "<f8", "row": "<i8", "checksum": "<u4"}
_PIECE = 1 << 22


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


@dataclass(frozen=True)
class HiddenLayout:
    """Where each row's hidden states lie: (N, T, D), or (N, K, T, D) for K > 1 layers, C-contiguous."""

    layers: int
    T: int
    width: int
    dtype: StorageDtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token at one layer."""
        return self.width * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, padding included."""
        return self.layers * self.T * self.token_bytes

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the dataset `hidden`."""
        return (rows, self.T, self.width) if self.layers == 1 else (rows, self.layers, self.T, self.width)

    def place(self, position: int, layer: int) -> int:
        """Byte of a row's first token at a layer (0..K-1), from the beginning of the dataset."""
        return position * self.row_bytes + layer * self.T * self.token_bytes


class ShardWriter:
    """Writes one shard under a temporary name; `commit` gives it its own.

    HDF5 only lays the file out, in memory. The bytes are written directly: through HDF5 a killed process would leave a
    shard that opens and reads zeros, and a full disk would crash the interpreter at exit.
    """

    def __init__(
        self,
        final: Path,
        *,
        layers: int,
        width: int,
        dtype: StorageDtype,
        input_ids: list[np.ndarray],
        target: np.ndarray,
        row: np.ndarray,
        ids: list[str],
        temporary: Path | None = None,
    ) -> None:
        self._final = final
        self._temporary = temporary or temporary_name(final)
        self._rows = (input_ids, target, row, ids)
        self.skipped: dict[int, str] = {}
        """Positions of the rows to leave out, and why."""
        self._lengths = np.array([len(tokens) for tokens in input_ids], dtype=np.int64)
        self.layout = HiddenLayout(layers, int(self._lengths.max()), width, dtype)
        self._checksum = np.zeros(len(input_ids), dtype="<u4")
        self._descriptor: int | None = None
        columns, places, frame = _lay_out(self.layout, input_ids, target, row, ids)
        self._hidden = places.pop("hidden")
        self._checksum_place = places.pop("checksum")
        try:
            with writing_cache(final):
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
                self._descriptor = os.open(self._temporary, flags, 0o666)
                allocate(self._descriptor, frame.size)
                for place, piece in frame.pieces.items():
                    write_at(self._descriptor, memoryview(piece), place)
                for name, place in places.items():
                    write_at(self._descriptor, columns[name].data.cast("B"), place)
        except BaseException:
            self.abandon()
            raise

    def write(self, position: int, states: "torch.Tensor") -> None:
        """Write one row's real tokens.

        Args:
            position: which row of the shard.
            states: (K, n, D) in the storage dtype, on the CPU, n the row's number of real tokens.
        """
        import torch

        assert self._descriptor is not None
        crc = 0
        for layer, values in enumerate(states):
            data = values.contiguous().view(torch.uint8).numpy().data.cast("B")
            with writing_cache(self._final):
                write_at(self._descriptor, data, self._hidden + self.layout.place(position, layer))
            crc = zlib.crc32(data, crc)
        self._checksum[position] = crc

    def skip(self, position: int, why: str) -> None:
        """Leave one row out: the shard will be the one that there were without it."""
        self.skipped[position] = why

    def commit(self) -> ShardRecord | None:
        """Make the shard durable under its own name, and return its record for the manifest; None if no row is left."""
        assert self._descriptor is not None
        if self.skipped:
            return self._commit_the_others()
        rows = len(self._lengths)
        with writing_cache(self._final):
            write_at(self._descriptor, self._checksum.data.cast("B"), self._checksum_place)
            os.fsync(self._descriptor)
            size = os.fstat(self._descriptor).st_size
            digest = _hash_around(self._descriptor, size, self._hidden, rows * self.layout.row_bytes)
            os.close(self._descriptor)
            self._descriptor = None
            replace_durably(self._temporary, self._final)
        return ShardRecord(
            file=self._final.name,
            rows=rows,
            bytes=size,
            tokens=int(self._lengths.sum()),
            T=self.layout.T,
            offset=self._hidden,
            sha256=digest,
        )

    def _commit_the_others(self) -> ShardRecord | None:
        keep = [position for position in range(len(self._lengths)) if position not in self.skipped]
        record = None
        if keep:
            input_ids, target, row, ids = self._rows
            smaller = ShardWriter(
                self._final,
                layers=self.layout.layers,
                width=self.layout.width,
                dtype=self.layout.dtype,
                input_ids=[input_ids[position] for position in keep],
                target=target[keep],
                row=row[keep],
                ids=[ids[position] for position in keep],
                temporary=temporary_name(self._temporary),
            )
            try:
                for position, old in enumerate(keep):
                    self._copy_row(old, smaller, position)
                record = smaller.commit()
            except BaseException:
                smaller.abandon()
                raise
        self.abandon()
        return record

    def _copy_row(self, old: int, other: "ShardWriter", position: int) -> None:
        assert self._descriptor is not None
        assert other._descriptor is not None
        data = memoryview(bytearray(int(self._lengths[old]) * self.layout.token_bytes))
        with writing_cache(self._final):
            for layer in range(self.layout.layers):
                read_into(self._descriptor, data, self._hidden + self.layout.place(old, layer))
                write_at(other._descriptor, data, other._hidden + other.layout.place(position, layer))
        other._checksum[position] = self._checksum[old]

    def abandon(self) -> None:
        """Drop the temporary file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):  # the first error is the one to tell; a run that goes on writes over the file
            self._temporary.unlink(missing_ok=True)


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


def way_out(folder: Path) -> str:
    """What to do about a bad shard of a cache, to end a message."""
    return f"restore it from a copy, or run: relish cache repair {folder}"


def _hash_around(descriptor: int, size: int, start: int, length: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_PIECE, max(size, 1))))
    for low, high in ((0, start), (start + length, size)):
        while low < high:
            piece = buffer[: min(len(buffer), high - low)]
            count = read_into(descriptor, piece, low)
            if count == 0:
                break
            digest.update(piece[:count])
            low += count
    return digest.hexdigest()


class _Frame(io.RawIOBase):
    """Stands for the file while HDF5 lays it out: keeps the little that HDF5 writes, and where."""

    def __init__(self) -> None:
        self.pieces: dict[int, bytes] = {}
        self.size = self._place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        return self._place

    def write(self, data: Any, /) -> int:
        self.pieces.pop(self._place, None)  # so that pieces stay in the order they were written
        self.pieces[self._place] = bytes(data)
        self.seek(len(data), os.SEEK_CUR)
        self.size = max(self.size, self._place)
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._place if size is None else size
        return self.size


def _lay_out(
    layout: HiddenLayout,
    input_ids: list[np.ndarray],
    target: np.ndarray,
    row: np.ndarray,
    ids: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, int], _Frame]:
    """Lay the file out with empty datasets; return the small columns, each dataset's place, and what HDF5 wrote."""
    import h5py
    from h5py import h5d, h5p, h5s, h5t  # pyright: ignore[reportAttributeAccessIssue]

    rows, slots = len(ids), layout.T
    mask = np.zeros((rows, slots), dtype=np.uint8)
    tokens = np.zeros((rows, slots), dtype="<i4")
    for position, values in enumerate(input_ids):
        mask[position, : len(values)] = 1
        tokens[position, : len(values)] = values
    encoded = [value.encode("utf-8") for value in ids]
    width = max(1, *(len(value) for value in encoded))
    columns = {
        "mask": mask,
        "input_ids": tokens,
        "target": np.ascontiguousarray(target, dtype="<f8"),
        "row": np.ascontiguousarray(row, dtype="<i8"),
        "id": np.frombuffer(b"".join(value.ljust(width, b"\0") for value in encoded), dtype=np.uint8),
    }
    text = h5t.C_S1.copy()
    text.set_size(width)
    text.set_strpad(h5t.STR_NULLPAD)
    text.set_cset(h5t.CSET_UTF8)
    types: list[tuple[str, tuple[int, ...], Any]] = [
        ("mask", (rows, slots), h5t.STD_U8LE),
        ("input_ids", (rows, slots), h5t.STD_I32LE),
        ("target", (rows,), h5t.IEEE_F64LE),
        ("row", (rows,), h5t.STD_I64LE),
        ("id", (rows,), text),
        ("checksum", (rows,), h5t.STD_U32LE),
        ("hidden", layout.shape(rows), layout.dtype.hdf5),
    ]
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # a time stamp would make two equal shards differ
    places = {}
    frame = _Frame()
    with h5py.File(frame, "w", libver="v108", alignment_interval=8) as file:
        file.attrs["relish_cache"] = 1
        for name, shape, kind in types:
            dataset = h5d.create(file.id, name.encode(), kind, h5s.create_simple(shape), creation)
            places[name] = dataset.get_offset()
    return columns, places, frame
