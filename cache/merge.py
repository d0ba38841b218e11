"""Join caches of one identity: their splits come together in a new cache."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .errors import CacheError
from .fileio import open_read, replace_durably, temporary_name, writing_cache
from .identity import Identity, refuse_differences
from .lock import LOCK, lock_folder
from .manifest import COPY, MANIFEST, ShardRecord, SplitRecord
from .reader import FeatureCache, open_cache
from .readouts import FOLDER, copy_readouts, merged_readouts
from .shard import way_out
from .verify import verify_shard

_PIECE = 1 << 22
_KEPT = "nothing was merged"


def merge_caches(out: Path, caches: list[Path], progress: Callable[[int, int], None] | None = None) -> None:
    """Copy the splits of several caches into a new one, checking every byte.

    A split may stand in several caches if it was made from the same rows; a complete one is taken before an unfinished
    one, and one with more rows before one with fewer. So is each readout.

    Raises:
        CacheError: if `out` holds anything or another process writes there, identities or label ranges differ, a split
            was made from different rows, or a shard is damaged or cannot be written. Nothing but its lock is
            left in `out` then.
    """
    _refuse_others(out)
    opened = [open_cache(path) for path in caches]
    chosen = _choose(opened)
    with writing_cache(out, _KEPT):
        out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, CacheError):
        _refuse_others(out)  # what another process wrote since
        _copy(opened, chosen, out, progress)


def _refuse_others(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise CacheError(f"{out} exists and is not an empty folder; merge into a new one")


def _choose(opened: list[FeatureCache]) -> dict[str, tuple[Path, SplitRecord]]:
    """The folder that each split is taken from, and what is listed of it there."""
    first = opened[0]
    chosen: dict[str, tuple[Path, SplitRecord]] = {}
    for cache in opened:
        manifest = cache.manifest
        refuse_differences(
            first.manifest.identity,
            manifest.identity,
            what=f"the cache {first.folder}, against {cache.folder},",
            advice="Only caches of one identity can be merged.",
        )
        if manifest.label_range != first.manifest.label_range:
            raise CacheError(
                f"{cache.folder} has the label range {manifest.label_range}, {first.folder} has "
                f"{first.manifest.label_range}; only caches of one label range can be merged"
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
    return chosen


def _copy(
    opened: list[FeatureCache],
    chosen: dict[str, tuple[Path, SplitRecord]],
    out: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the splits, with readouts of all caches; nothing, if something fails."""
    first = opened[0].manifest
    made = [path for name in (COPY, MANIFEST) for path in (temporary_name(out / name), out / name)]
    total = sum(record.bytes for _, split in chosen.values() for record in split.shards)
    try:
        for folder, split in chosen.values():
            for record in split.shards:
                made += [temporary_name(out / record.file), out / record.file]
                _copy_shard(folder, out, record, first.identity)
                if progress is not None:
                    progress(record.bytes, total)
        parts = merged_readouts([(cache.folder, cache.manifest) for cache in opened])
        made += [out / FOLDER / part.name for part in parts]
        copy_readouts(out, parts, _KEPT)
        replace(first, splits={name: split for name, (_, split) in chosen.items()}).save(out, _KEPT)
    except BaseException:
        for path in made:
            with suppress(OSError):  # the first error is the one to tell
                path.unlink(missing_ok=True)
        with suppress(OSError):
            (out / FOLDER).rmdir()
        raise


def _copy_shard(source: Path, out: Path, record: ShardRecord, identity: Identity) -> None:
    path, copy = source / record.file, out / record.file
    if not path.exists():
        raise CacheError(f"{_KEPT}: the shard {path} is missing; {way_out(source)}")
    try:
        opened = os.fdopen(open_read(path), "rb")
    except OSError as reason:
        raise CacheError(f"{_KEPT}: the shard {path} cannot be opened ({reason.strerror}); {way_out(source)}") from None
    temporary = temporary_name(copy)
    with opened, writing_cache(copy, _KEPT):
        with temporary.open("wb") as file:
            shutil.copyfileobj(opened, file, _PIECE)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(temporary, copy)
    # The copy is what is read, so that a fault in the copying shows as well.
    wrong = verify_shard(out, record, layers=len(identity.layers), width=identity.hidden_size, dtype=identity.dtype)
    if wrong:
        raise CacheError(f"{_KEPT}: {wrong[0].replace(str(copy), str(path))}")
