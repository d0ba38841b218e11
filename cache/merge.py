"""Join caches of one identity: their splits come together in a new cache."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .errors import CacheError
from .fileio import replace_durably, temporary_name
from .identity import Identity, refuse_differences
from .manifest import ShardRecord
from .reader import open_cache
from .shard import way_out
from .verify import verify_shard


def merge_caches(out: Path, caches: list[Path], progress: Callable[[int, int], None] | None = None) -> None:
    """Copy the splits of several caches into a new one, checking every byte.

    A split may stand in several caches if it was made from the same rows; a complete one is taken before an unfinished
    one, and one with more rows before one with fewer.

    Raises:
        CacheError: if `out` exists, identities or label ranges differ, a split was made from different rows, or a shard
            is damaged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CacheError(f"{out} exists and is not an empty folder; merge into a new one")
    opened = [open_cache(path) for path in caches]
    first = opened[0].manifest
    chosen = {}
    for cache in opened:
        manifest = cache.manifest
        refuse_differences(
            first.identity,
            manifest.identity,
            what=f"the cache {caches[0]}, against {cache.folder},",
            advice="Only caches of one identity can be merged.",
        )
        if manifest.label_range != first.label_range:
            raise CacheError(
                f"{cache.folder} has the label range {manifest.label_range}, {caches[0]} has {first.label_range}; "
                "only caches of one label range can be merged"
            )
        for name, split in manifest.splits.items():
            have = chosen.get(name)
            if have is not None and have[1].fingerprint != split.fingerprint:
                raise CacheError(
                    f"the split {name!r} is in {have[0]} and in {cache.folder}, made from different rows; "
                    "extract one of them under another split name"
                )
            if have is None or (split.complete, split.covered) > (have[1].complete, have[1].covered):
                chosen[name] = (cache.folder, split)
    out.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    total = sum(record.bytes for _, split in chosen.values() for record in split.shards)
    try:
        for folder, split in chosen.values():
            for record in split.shards:
                made += [temporary_name(out / record.file), out / record.file]
                _copy_shard(folder, out, record, first.identity)
                if progress is not None:
                    progress(record.bytes, total)
        replace(first, splits={name: split for name, (_, split) in chosen.items()}).save(out)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _copy_shard(source: Path, out: Path, record: ShardRecord, identity: Identity) -> None:
    path, copy = source / record.file, out / record.file
    if not path.is_file():
        raise CacheError(f"nothing was merged: the shard {path} is missing; {way_out(source)}")
    temporary = temporary_name(copy)
    shutil.copyfile(path, temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    replace_durably(temporary, copy)
    # The copy is what is read, so that a fault in the copying shows as well.
    wrong = verify_shard(out, record, layers=len(identity.layers), width=identity.hidden_size, dtype=identity.dtype)
    if wrong:
        raise CacheError(f"nothing was merged: {wrong[0].replace(str(copy), str(path))}")
