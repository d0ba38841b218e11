"""The same rows on disk in the forms that people keep hidden states in, and how each reads a batch of them.

A form has a folder, `write` to make it, and `open`, which gives a function from row numbers to (hidden, mask):
(B, T, D) bfloat16, zero where padded, and (B, T) bool. All pad in the same way: an empty tensor, the rows, zeros after
each.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caches import cache_of

Batch = tuple[torch.Tensor, torch.Tensor]
Reader = Callable[[np.ndarray], Any]
_POOL = 1 << 24
_RECORD_ROWS = 32


@dataclass(frozen=True)
class Rows:
    """N rows of random bfloat16 words, each cut out of one pool of them, so that making gigabytes takes no time."""

    lengths: np.ndarray
    """(N,) tokens of each row."""
    width: int
    """D."""
    pool: np.ndarray
    """uint16."""

    @property
    def begins(self) -> np.ndarray:
        """(N,) first token of each row if all were written one after the other."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]])

    @property
    def bytes(self) -> int:
        return int(self.lengths.sum()) * self.width * 2

    def words(self, row: int) -> np.ndarray:
        """(n, D) uint16."""
        count = int(self.lengths[row]) * self.width
        begin = row * 7919 % (len(self.pool) - count)
        return self.pool[begin : begin + count].reshape(-1, self.width)

    def states(self, row: int) -> torch.Tensor:
        """(1, n, D) bfloat16."""
        return torch.from_numpy(self.words(row)).view(torch.bfloat16)[None]


def random_rows(lengths: np.ndarray, width: int) -> Rows:
    draw = torch.Generator().manual_seed(0)
    count = max(_POOL, 2 * int(lengths.max()) * width)
    pool = torch.randn(count, generator=draw).bfloat16().view(torch.uint16).numpy()
    return Rows(lengths, width, pool)


def empty(lengths: np.ndarray, width: int) -> tuple[torch.Tensor, np.ndarray]:
    """(B, T, D) bfloat16 without values, and a view of it as (B, T * D) uint16."""
    hidden = torch.empty(len(lengths), int(lengths.max()), width, dtype=torch.bfloat16)
    return hidden, hidden.view(torch.uint16).numpy().reshape(len(lengths), -1)


def mask_of(lengths: np.ndarray) -> torch.Tensor:
    return torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]


def copying(all_rows: Rows, row_of: Callable[[int], np.ndarray]) -> Reader:
    """A reader that copies the words of one row after the other into the batch."""

    def read(rows: np.ndarray) -> Batch:
        lengths = all_rows.lengths[rows]
        hidden, words = empty(lengths, all_rows.width)
        for row, length, values in zip(rows.tolist(), lengths.tolist(), words, strict=True):
            end = length * all_rows.width
            values[:end] = row_of(row)
            values[end:] = 0
        return hidden, mask_of(lengths)

    return read


class Form:
    """One form: where it lies, and the rows in it."""

    name: str

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.folder = folder
        self.rows = rows


class Relish(Form):
    name = "relish"

    def write(self) -> None:
        cache_of(self.folder, self.rows.lengths.tolist(), self.rows.width, self.rows.states)

    def open(self) -> Reader:
        from relish.cache.reader import open_cache

        return open_cache(self.folder).split("train").read


class Floor(Form):
    """os.preadv of the rows' bytes in relish's shards: into the same memory again and again, or into a new batch."""

    def __init__(self, folder: Path, rows: Rows, *, batch: bool) -> None:
        super().__init__(folder, rows)
        self.batch = batch

    def open(self) -> Reader:
        import h5py

        from relish.cache.manifest import load_manifest

        split = load_manifest(self.folder).splits["train"]
        place: list[tuple[int, int]] = [(-1, -1)] * len(self.rows.lengths)
        for record in split.shards:
            path = self.folder / record.file
            with h5py.File(path, "r") as file:
                numbers: Any = file["row"]
                numbers = numbers[()].tolist()
            descriptor = os.open(path, os.O_RDONLY)
            for position, row in enumerate(numbers):
                place[row] = descriptor, record.offset + position * record.T * self.rows.width * 2
        return self._batches(place) if self.batch else self._bytes(place)

    def _bytes(self, place: list[tuple[int, int]]) -> Reader:
        token = self.rows.width * 2
        memory = memoryview(bytearray(64 * int(self.rows.lengths.max()) * token))

        def read(rows: np.ndarray) -> None:
            begin = 0
            for row, length in zip(rows.tolist(), self.rows.lengths[rows].tolist(), strict=True):
                descriptor, offset = place[row]
                os.preadv(descriptor, [memory[begin : begin + length * token]], offset)
                begin += length * token

        return read

    def _batches(self, place: list[tuple[int, int]]) -> Reader:
        def read(rows: np.ndarray) -> Batch:
            lengths = self.rows.lengths[rows]
            hidden, words = empty(lengths, self.rows.width)
            for row, length, values in zip(rows.tolist(), lengths.tolist(), words, strict=True):
                descriptor, offset = place[row]
                end = length * self.rows.width
                os.preadv(descriptor, [values[:end].data], offset)
                values[end:] = 0
            return hidden, mask_of(lengths)

        return read


class Chunked(Form):
    name = "h5py, a row a chunk"

    def write(self) -> None:
        """Rows sorted by length, in datasets that are each padded to their longest, as in relish's shards."""
        import h5py

        order = np.argsort(-self.rows.lengths, kind="stable")
        with h5py.File(self.folder / "rows.h5", "w") as file:
            for number, part in enumerate(np.array_split(order, max(1, len(order) // 400))):
                T = int(self.rows.lengths[part[0]])
                shape = (len(part), T, self.rows.width)
                dataset = file.create_dataset(str(number), shape, "<u2", chunks=(1, *shape[1:]))
                dataset.attrs["rows"] = part
                padded = np.zeros(shape[1:], dtype="<u2")
                for position, row in enumerate(part.tolist()):
                    words = self.rows.words(row)
                    padded[: len(words)], padded[len(words) :] = words, 0
                    dataset[position] = padded

    def open(self) -> Reader:
        import h5py

        file = h5py.File(self.folder / "rows.h5", "r")
        place: dict[int, tuple[Any, int]] = {}
        for dataset in file.values():
            for position, row in enumerate(np.asarray(dataset.attrs["rows"]).tolist()):
                place[row] = dataset, position

        def read(rows: np.ndarray) -> Batch:
            lengths = self.rows.lengths[rows]
            hidden, words = empty(lengths, self.rows.width)
            into = words.reshape(hidden.shape)
            for number, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
                dataset, position = place[row]
                dataset.read_direct(into, np.s_[position, :length], np.s_[number, :length])
                into[number, length:] = 0
            return hidden, mask_of(lengths)

        return read


class Safetensors(Form):
    name = "safetensors, a file a row"

    def write(self) -> None:
        from safetensors.torch import save_file

        for row in range(len(self.rows.lengths)):
            save_file({"hidden": self.rows.states(row)[0].contiguous()}, self.folder / f"{row}.safetensors")

    def open(self) -> Reader:
        from safetensors.torch import load_file

        def row_of(row: int) -> np.ndarray:
            return load_file(self.folder / f"{row}.safetensors")["hidden"].view(torch.uint16).numpy().ravel()

        return copying(self.rows, row_of)


class MemoryMap(Form):
    name = "np.memmap"

    def write(self) -> None:
        with (self.folder / "rows.bin").open("wb") as file:
            for row in range(len(self.rows.lengths)):
                file.write(self.rows.words(row).data)

    def open(self) -> Reader:
        words = np.memmap(self.folder / "rows.bin", "<u2", "r")
        begins = (self.rows.begins * self.rows.width).tolist()
        counts = (self.rows.lengths * self.rows.width).tolist()
        return copying(self.rows, lambda row: words[begins[row] : begins[row] + counts[row]])


class Arrow(Form):
    name = "Arrow IPC, memory-mapped"

    def write(self) -> None:
        import pyarrow as pa

        schema = pa.schema([("hidden", pa.large_binary())])
        with pa.OSFile(str(self.folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for begin in range(0, len(self.rows.lengths), _RECORD_ROWS):
                end = min(begin + _RECORD_ROWS, len(self.rows.lengths))
                values = [self.rows.words(row).tobytes() for row in range(begin, end)]
                writer.write(pa.record_batch([pa.array(values, pa.large_binary())], schema=schema))

    def open(self) -> Reader:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "rows.arrow")))
        columns: dict[int, Any] = {}

        def row_of(row: int) -> np.ndarray:
            number = row // _RECORD_ROWS
            if number not in columns:  # not before: Arrow asks the system to read ahead what it opens
                columns[number] = reader.get_batch(number).column(0)
            return np.frombuffer(columns[number][row % _RECORD_ROWS].as_buffer(), "<u2")

        return copying(self.rows, row_of)


FORMS: tuple[type[Form], ...] = (Relish, Chunked, Safetensors, MemoryMap, Arrow)
"""Those that are written; the floor reads what relish wrote."""
