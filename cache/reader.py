"""The one reader: rows of a cache in any order, straight from the shards, nothing held but the row index."""

import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .dtypes import storage_dtype
from .errors import CacheError
from .fileio import open_read, read_into
from .identity import Identity
from .manifest import Manifest, ShardRecord, SplitRecord, load_manifest
from .shard import HiddenLayout, read_index, way_out

if TYPE_CHECKING:
    import torch

_OPEN_FILES = 64  # macOS allows a process 256


class Batch(NamedTuple):
    """B rows, padded to the longest of them: T token slots."""

    hidden: "torch.Tensor"
    """(B, T, D) in the storage dtype, zero where padded."""
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

    def split(self, name: str, *, layer: int | None = None) -> "Split":
        """Open one split at one layer.

        Args:
            name: such as "train".
            layer: one of `layers`; may be left out when there is but one.

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
        split = Split(self, name, record.shards, self.layer_position(layer))
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
    """The N rows of one split at one layer, numbered in the order of the input file."""

    def __init__(self, cache: FeatureCache, name: str, shards: tuple[ShardRecord, ...], layer: int) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        # Not __del__: at the interpreter's exit the modules it needs may be gone.
        weakref.finalize(self, _close_all, self._files)
        self.cache = cache
        self.name = name
        self._layer = layer
        self._shards = shards
        dtype = storage_dtype(cache.identity.dtype)
        self._layouts = [HiddenLayout(len(cache.layers), shard.T, cache.hidden_size, dtype) for shard in shards]
        self._dtype = dtype
        indexes = [read_index(cache.folder, shard, layout) for shard, layout in zip(shards, self._layouts, strict=True)]
        rows = np.concatenate([index.row for index in indexes])
        order = np.argsort(rows, kind="stable")
        self.row = rows[order]
        """(N,) int64, position in the input file."""
        self.lengths = np.concatenate([index.lengths for index in indexes])[order]
        """(N,) int64, real tokens."""
        self.target = np.concatenate([index.target for index in indexes])[order]
        """(N,) float64, NaN if unlabelled."""
        self.ids: list[str] = np.concatenate([index.ids for index in indexes])[order].tolist()
        """N ids."""
        self._checksum = np.concatenate([index.checksum for index in indexes])[order]
        self._checked = np.zeros(len(order), dtype=bool)
        counts = [shard.rows for shard in shards]
        self._shard_of = np.repeat(np.arange(len(shards)), counts)[order]
        self._position = np.concatenate([np.arange(count) for count in counts])[order]

    def __len__(self) -> int:
        return len(self.row)

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
        hidden = torch.empty(len(rows), T, self.cache.hidden_size, dtype=self._dtype.torch)
        place = hidden.view(torch.uint8).numpy().data.cast("B")
        token_bytes = self._layouts[0].token_bytes
        for number, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
            begin = number * T * token_bytes
            end = begin + length * token_bytes
            self._read_row(row, place[begin:end])
            place[end : begin + T * token_bytes] = bytes(T * token_bytes - (end - begin))
        mask = torch.arange(T) < torch.from_numpy(lengths)[:, None]
        return Batch(hidden, mask)

    def input_ids(self, row: int) -> np.ndarray:
        """Token ids of one row, (n,) int32, to show tokens beside what was computed from them."""
        shard = int(self._shard_of[row])
        index = read_index(self.cache.folder, self._shards[shard], self._layouts[shard])
        return index.input_ids[self._position[row], : self.lengths[row]]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        _close_all(self._files)

    def _read_row(self, row: int, place: memoryview) -> None:
        shard, position = int(self._shard_of[row]), int(self._position[row])
        record, layout = self._shards[shard], self._layouts[shard]
        if self._checked[row]:
            self._fill(shard, place, layout.place(position, self._layer))
            return
        # A row's CRC-32 covers all its layers, so the first read of a row takes them all.
        crc = 0
        for layer in range(layout.layers):
            target = place if layer == self._layer else memoryview(bytearray(len(place)))
            self._fill(shard, target, layout.place(position, layer))
            crc = zlib.crc32(target, crc)
        if crc != self._checksum[row]:
            raise CacheError(
                f"the shard {self.cache.folder / record.file} is damaged: the hidden states of row {self.row[row]} "
                f"(id {self.ids[row]!r}) are not the ones that were written; {way_out(self.cache.folder)}"
            )
        self._checked[row] = True

    def _fill(self, shard: int, place: memoryview, offset: int) -> None:
        path = self.cache.folder / self._shards[shard].file
        try:
            count = read_into(self._file(shard), place, self._shards[shard].offset + offset)
        except OSError as error:
            raise CacheError(
                f"the shard {path} cannot be read ({error.strerror}); {way_out(self.cache.folder)}"
            ) from None
        if count != len(place):
            raise CacheError(f"the shard {path} ends too early; {way_out(self.cache.folder)}")

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        path = self.cache.folder / self._shards[shard].file
        try:
            self._files[shard] = open_read(path)
        except OSError as error:
            raise CacheError(
                f"the shard {path} cannot be opened ({error.strerror}); {way_out(self.cache.folder)}"
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


def _close_all(files: "OrderedDict[int, int]") -> None:
    while files:
        os.close(files.popitem()[1])


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
