"""Read every byte of a cache and name each shard that is not as it was written."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import numpy as np

from .dtypes import storage_dtype
from .errors import CacheError
from .fileio import open_read, read_into
from .index import RowIndex, read_index
from .manifest import COPY, ShardRecord, load_manifest
from .reader import FeatureCache, lost_or_doubled
from .readouts import verify_readouts
from .shard import HiddenLayout, way_out


def verify_cache(cache: FeatureCache, progress: Callable[[int], None] | None = None) -> list[str]:
    """Check every shard that the manifest lists, and the readouts.

    Args:
        cache: an open cache.
        progress: called with the number of bytes just checked.

    Returns:
        What is wrong, a sentence per shard, unfinished split or readout; empty if all is well.
    """
    found = []
    if (cache.folder / COPY).exists():
        try:
            load_manifest(cache.folder, COPY)
        except CacheError as error:
            found.append(f"{str(error).partition(';')[0]}; run: relish cache repair {quote(str(cache.folder))}")
    identity = cache.identity
    for name, split in cache.manifest.splits.items():
        bad, rows = [], [np.zeros(0, dtype=np.int64)]
        for record in split.shards:
            layout = HiddenLayout(len(identity.layers), record.T, identity.hidden_size, storage_dtype(identity.dtype))
            wrong, index = _check(cache.folder, record, layout)
            bad += wrong
            rows += [index.row] if index is not None else []
            if progress is not None:
                progress(record.bytes)
        found += bad
        if split.complete and not bad:
            wrong = lost_or_doubled(split, np.concatenate(rows))
            found += [f"the split {name!r} {wrong}"] if wrong else []
        if not split.complete:
            found.append(
                f"the split {name!r} is not finished ({len(split.done)} of {split.planned} shards); "
                "run the same relish extract command again to go on"
            )
    return found + verify_readouts(cache.folder, cache.manifest)


def verify_shard(folder: Path, record: ShardRecord, *, layers: int, width: int, dtype: str) -> list[str]:
    """Read every byte of a shard; returns what is wrong with it, nothing if it is as it was written."""
    return _check(folder, record, HiddenLayout(layers, record.T, width, storage_dtype(dtype)))[0]


def _check(folder: Path, record: ShardRecord, layout: HiddenLayout) -> "tuple[list[str], RowIndex | None]":
    try:
        index = read_index(folder, record, layout)
    except CacheError as error:
        return [str(error)], None
    path = folder / record.file
    try:
        wrong = _changed_rows(path, record, layout, index)
    except OSError as error:
        return [f"the shard {path} cannot be read ({error.strerror}); {way_out(folder)}"], index
    return ([f"the shard {path} is damaged: {'; '.join(wrong[:5])}"] if wrong else []), index


def _changed_rows(path: Path, record: ShardRecord, layout: HiddenLayout, index: RowIndex) -> list[str]:
    wrong = []
    buffer = memoryview(bytearray(layout.row_bytes))
    descriptor = open_read(path)
    try:
        for position, length in enumerate(index.lengths.tolist()):
            read_into(descriptor, buffer, record.offset + layout.place(position, 0))
            crc, padding = 0, False
            for layer in range(layout.layers):
                begin = layer * layout.T * layout.token_bytes
                end = begin + length * layout.token_bytes
                crc = zlib.crc32(buffer[begin:end], crc)
                padding = padding or any(buffer[end : begin + layout.T * layout.token_bytes])
            if crc != index.checksum[position] or padding:
                where = "padding" if crc == index.checksum[position] else "hidden states"
                wrong.append(f"the {where} of row {index.row[position]} (id {index.ids[position].decode()!r}) changed")
    finally:
        os.close(descriptor)
    return wrong
