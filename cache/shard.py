"""One shard: an HDF5 file with the hidden states of some rows. README.md in this folder gives its bytes."""

import hashlib
import io
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import StorageDtype
from .fileio import allocate, create, read_into, replace_durably, temporary_name, write_at, writing_cache
from .manifest import ShardRecord

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 22


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
                self._descriptor = create(self._temporary)
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


def way_out(folder: Path) -> str:
    """What to do about a bad shard of a cache, to end a message."""
    return f"restore it from a copy, or run: relish cache repair {quote(str(folder))}"


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
