"""Mend a cache: bring its manifest back, and drop bad shards from it so that they are extracted again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import CacheError
from .fileio import temporary_name
from .lock import lock_folder
from .manifest import COPY, MANIFEST, Manifest, ShardRecord, load_manifest
from .verify import verify_shard


@dataclass(frozen=True)
class Repair:
    """What was found and done."""

    found: tuple[str, ...]
    """What was wrong, a sentence for each fault."""
    dropped: tuple[ShardRecord, ...]
    """The shards that the manifest lists no longer."""
    pending: int
    """Shards that the same extraction would now compute."""


def repair_cache(folder: Path, progress: Callable[[int, int], None] | None = None) -> Repair:
    """Read every byte of a cache, and make its manifest list only what is whole.

    Bad shards stay on disk until an extraction writes over them.

    Args:
        folder: the cache.
        progress: called with the number of bytes just checked, and how many there are.

    Raises:
        CacheError: if it is no cache, another process is writing into it, or manifest and copy are both damaged.
    """
    if not (folder / MANIFEST).exists() and not (folder / COPY).exists():
        load_manifest(folder)  # says what is missing
    with lock_folder(folder, CacheError):
        manifest, found = _best_manifest(folder)
        identity = manifest.identity
        total = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
        dropped: list[ShardRecord] = []
        splits = {}
        for name, split in manifest.splits.items():
            bad = []
            for shard in split.shards:
                wrong = verify_shard(
                    folder, shard, layers=len(identity.layers), width=identity.hidden_size, dtype=identity.dtype
                )
                if wrong:
                    bad.append(shard)
                    found += wrong
                if progress is not None:
                    progress(shard.bytes, total)
            numbers = {shard.number for shard in bad}
            splits[name] = replace(
                split,
                shards=tuple(shard for shard in split.shards if shard not in bad),
                skipped=tuple(row for row in split.skipped if row.shard not in numbers),
            )
            dropped += bad
        if found:
            replace(manifest, splits=splits).save(folder)
        for left in (temporary_name(folder / name) for name in (MANIFEST, COPY)):
            left.unlink(missing_ok=True)
    pending = sum(split.planned - len(split.done) for split in splits.values())
    return Repair(tuple(found), tuple(dropped), pending)


def _best_manifest(folder: Path) -> tuple[Manifest, list[str]]:
    try:
        manifest = load_manifest(folder)
    except CacheError as error:
        try:
            return load_manifest(folder, COPY), [f"{folder / MANIFEST} was missing or damaged; its copy took its place"]
        except CacheError as also:
            raise CacheError(
                f"the manifest of the cache {folder} cannot be brought back, since its copy is no help either. "
                f"{str(error).partition(';')[0]}; {str(also).partition(';')[0]}. Restore one of them from elsewhere, "
                "or extract into another folder"
            ) from None
    try:
        load_manifest(folder, COPY)
    except CacheError:
        return manifest, [f"{folder / COPY} was missing or damaged; it is written anew"]
    return manifest, []
