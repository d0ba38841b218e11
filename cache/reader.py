"""The one reader: rows of a cache in any order, straight from the shards, nothing held but the row index."""

import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .dtypes import storage_dtype
from .errors import CacheError
from .fileio import open_read, read_into, read_soon
from .identity import Identity
from .index import read_columns, read_index
from .manifest import Manifest, ShardRecord, SplitRecord, load_manifest
from .shard import HiddenLayout, way_out

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 64  # macOS allows a process 256


class Batch(NamedTuple):
    """B rows, padded to the longest of them: T token slots."""

    hidden: "torch.Tensor"
    """(B, T, D) in the storage dtype, zero where padded; (B, K, T, D) of a split that is open at all K layers."""
    mask: "torch.Tensor"
    """(B, T) bool, True = real token."""


class FeatureCache:
    """An open cache. `cache.split("train")` gives the rows of a split."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def identity(self) -> Identity:
        """What made the hidden states."""
        return self.manifest.identity

    @property
    def hidden_size(self) -> int:
        """D, the width of a hidden state."""
        return self.identity.hidden_size

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers each row has, counted as transformers does."""
        return self.identity.layers

    @property
    def label_range(self) -> tuple[float, float]:
        """Smallest and largest score that the labels may have."""
        return self.manifest.label_range

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.manifest.splits)

    def split(self, name: str, *, layer: int | Literal["all"] | None = None) -> "Split":
        """Open one split at one layer, or at all of them.

        Args:
            name: such as "train".
            layer: one of `layers`, which may be left out when there is but one; "all" for hidden states (B, K, T, D) of
                the K `layers` in their order.

        Raises:
            CacheError: if the split is missing, incomplete or damaged, or has not each row once, or the layer is not in
                the cache.
        """
        record = self.manifest.splits.get(name)
        if record is None:
            raise CacheError(
                f"the cache {self.folder} has no split {name!r}, only {', '.join(self.splits) or 'none'}; "
                f"add it with: relish extract {self.folder} … --data {name}=FILE"
            )
        if not record.complete:
            raise CacheError(
                f"the split {name!r} of the cache {self.folder} is not finished ({len(record.done)} of "
                f"{record.planned} shards); run the same relish extract command again to go on"
            )
        if not record.shards:
            raise CacheError(f"the split {name!r} of the cache {self.folder} is empty: every row of it was skipped")
        split = Split(self, name, record.shards, None if layer == "all" else self.layer_position(layer))
        wrong = lost_or_doubled(record, split.row)
        if wrong:
            raise CacheError(f"the split {name!r} of the cache {self.folder} {wrong}")
        return split

    def layer_position(self, layer: int | None) -> int:
        """Which of the K stored layers that is, 0..K-1.

        Raises:
            CacheError: if the cache has not that layer, or has several and none is named.
        """
        if layer is None:
            if len(self.layers) > 1:
                raise CacheError(f"the cache {self.folder} holds the layers {_listed(self.layers)}; name one (--layer)")
            return 0
        if layer not in self.layers:
            raise CacheError(f"the cache {self.folder} holds the layers {_listed(self.layers)}, not {layer}")
        return self.layers.index(layer)


class Split:
    """The N rows of one split at one layer or at all, numbered in the order of the input file."""

    def __init__(self, cache: FeatureCache, name: str, shards: tuple[ShardRecord, ...], position: int | None) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        # Not __del__: at the interpreter's exit the modules it needs may be gone.
        weakref.finalize(self, _close_all, self._files)
        self.cache = cache
        self.name = name
        self.layers = cache.layers if position is None else (cache.layers[position],)
        """The layers that `read` gives, counted as transformers does."""
        self.stacked = position is None
        """Whether `read` gives all layers, (B, K, T, D)."""
        self._wanted = tuple(range(len(cache.layers))) if position is None else (position,)
        self._shards = shards
        dtype = storage_dtype(cache.identity.dtype)
        self._layouts = [HiddenLayout(len(cache.layers), shard.T, cache.hidden_size, dtype) for shard in shards]
        self._dtype = dtype
        for shard in shards:
            _read_index_soon(cache.folder / shard.file, shard)
        indexes = [read_index(cache.folder, shard, layout) for shard, layout in zip(shards, self._layouts, strict=True)]
        rows = np.concatenate([index.row for index in indexes])
        order = np.argsort(rows, kind="stable")
        self.row = rows[order]
        """(N,) int64, position in the input file."""
        self.lengths = np.concatenate([index.lengths for index in indexes])[order]
        """(N,) int64, real tokens."""
        self.target = np.concatenate([index.target for index in indexes])[order]
        """(N,) float64, NaN if unlabelled."""
        self._ids = np.concatenate([index.ids for index in indexes])[order]
        self._checksum = np.concatenate([index.checksum for index in indexes])[order]
        self._checked = np.zeros(len(order), dtype=bool)
        counts = [shard.rows for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)[order]
        self._position = np.concatenate([np.arange(count) for count in counts])[order]
        first = [
            [shard.offset + layout.place(0, layer) for layer in self._wanted]
            for shard, layout in zip(shards, self._layouts, strict=True)
        ]
        row_bytes = np.array([layout.row_bytes for layout in self._layouts])
        self._begin = np.array(first)[self._shard_of] + (self._position * row_bytes[self._shard_of])[:, None]

    def __getstate__(self) -> dict[str, Any]:
        # A descriptor's number means another file in another process, and what was checked there was not checked here.
        return {**self.__dict__, "_files": OrderedDict(), "_checked": np.zeros_like(self._checked)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, _close_all, self._files)

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def ids(self) -> list[str]:
        """N ids."""
        return [value.decode() for value in self._ids.tolist()]

    def read(self, rows: "Sequence[int] | np.ndarray") -> Batch:
        """Read the hidden states of B rows; padding on disk is not read.

        Args:
            rows: their numbers, in any order, or a mask (N,) of bool.

        Raises:
            CacheError: naming the shard, if it cannot be read or a row's bytes are not the ones that were written.
        """
        import torch

        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        lengths = self.lengths[rows]
        T = int(lengths.max(initial=0))
        hidden = torch.empty(len(rows), len(self._wanted), T, self.cache.hidden_size, dtype=self._dtype.torch)
        token_bytes = self._layouts[0].token_bytes
        memory = hidden.view(torch.uint8).numpy().reshape(len(rows), len(self._wanted), T * token_bytes)
        for row in rows[~self._checked[rows]].tolist():  # those read before are likely to be in memory
            shard = int(self._shard_of[row])
            begin = self._shards[shard].offset + self._layouts[shard].place(int(self._position[row]), 0)
            read_soon(self._file(shard), begin, self._layouts[shard].row_bytes)
        where = (rows, self._shard_of[rows], self._begin[rows], lengths * token_bytes, self._checked[rows])
        for row, shard, begins, end, checked, values in zip(*(x.tolist() for x in where), memory, strict=True):
            places = [layer[:end].data for layer in values]
            if checked:
                for place, begin in zip(places, begins, strict=True):
                    self._fill(shard, place, begin)
            else:
                self._fill_and_check(row, shard, places)
            values[:, end:] = 0
        mask = torch.arange(T) < torch.from_numpy(lengths)[:, None]
        return Batch(hidden if self.stacked else hidden[:, 0], mask)

    def input_ids(self, row: int) -> np.ndarray:
        """Token ids of one row, (n,) int32, to show tokens beside what was computed from them."""
        shard = int(self._shard_of[row])
        (input_ids,) = read_columns(self._path(shard), self._shards[shard], self._layouts[shard], ("input_ids",))
        return input_ids[self._position[row], : self.lengths[row]]

    def shared_tokens(self) -> np.ndarray:
        """Token ids that all rows begin with, (P,) int32: at most all but one of the shortest row's.

        Raises:
            CacheError: naming the shard, if it cannot be read.
        """
        shared = None
        for shard, layout in zip(self._shards, self._layouts, strict=True):
            (input_ids,) = read_columns(self.cache.folder / shard.file, shard, layout, ("input_ids",))
            shared = input_ids[0, : self.lengths.min() - 1] if shared is None else shared
            same = (input_ids[:, : len(shared)] == shared).all(axis=0)
            shared = shared[: np.argmin(np.append(same, False))]
        assert shared is not None  # a split has a shard
        return shared

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        _close_all(self._files)

    def _fill_and_check(self, row: int, shard: int, places: list[memoryview]) -> None:
        record, layout, position = self._shards[shard], self._layouts[shard], int(self._position[row])
        into = dict(zip(self._wanted, places, strict=True))
        # A row's CRC-32 covers all its layers, so the first read of a row takes them all.
        crc = 0
        for layer in range(layout.layers):
            target = into[layer] if layer in into else memoryview(bytearray(len(places[0])))
            self._fill(shard, target, record.offset + layout.place(position, layer))
            crc = zlib.crc32(target, crc)
        if crc != self._checksum[row]:
            raise CacheError(
                f"the shard {self._path(shard)} is damaged: the hidden states of row {self.row[row]} "
                f"(id {self.ids[row]!r}) are not the ones that were written; {way_out(self.cache.folder)}"
            )
        self._checked[row] = True

    def _fill(self, shard: int, place: memoryview, offset: int) -> None:
        try:
            count = read_into(self._file(shard), place, offset)
        except OSError as error:
            raise CacheError(
                f"the shard {self._path(shard)} cannot be read ({error.strerror}); {way_out(self.cache.folder)}"
            ) from None
        if count != len(place):
            raise CacheError(f"the shard {self._path(shard)} ends too early; {way_out(self.cache.folder)}")

    def _path(self, shard: int) -> Path:
        return self.cache.folder / self._shards[shard].file

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[shard] = open_read(self._path(shard))
        except OSError as error:
            raise CacheError(
                f"the shard {self._path(shard)} cannot be opened ({error.strerror}); {way_out(self.cache.folder)}"
            ) from None
        return self._files[shard]


def open_cache(path: "str | os.PathLike[str]") -> FeatureCache:
    """Open a cache for reading.

    Raises:
        CacheError: if there is none, its manifest is damaged, or another format version wrote it.
    """
    folder = Path(path).resolve()  # so that a later chdir does not move a relative path
    return FeatureCache(folder, load_manifest(folder))


def lost_or_doubled(record: SplitRecord, row: np.ndarray) -> str:
    """What is wrong with the rows of a complete split, to go on a sentence; empty if each is there once.

    Args:
        record: says how many there must be, and which were skipped.
        row: (N,) positions in the input file of those that the shards hold.
    """
    there = np.concatenate([row, np.array([skipped.row for skipped in record.skipped], dtype=np.int64)])
    if len(there) == record.rows and np.array_equal(np.sort(there), np.arange(record.rows)):
        return ""
    different = len(np.unique(there[(there >= 0) & (there < record.rows)]))
    return (
        f"does not hold each of its {record.rows} rows once: its shards have {len(there)}, {different} of them "
        "different; extract it into another folder"
    )


def _read_index_soon(path: Path, shard: ShardRecord) -> None:
    with suppress(OSError):  # read_index says what is wrong
        descriptor = open_read(path)
        read_soon(descriptor, 0, shard.offset)
        os.close(descriptor)


def _close_all(files: "OrderedDict[int, int]") -> None:
    while files:
        os.close(files.popitem()[1])


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
