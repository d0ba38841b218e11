"""Pack a cache for moving it: the same shards, compressed without loss, in a folder of their own."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .archive import Archive, PackedShard, check_packed, file_hash, load_archive, load_shards, save_shards
from .dtypes import storage_dtype
from .errors import CacheError
from .fileio import create, replace_durably, temporary_name, write_text_durably, writing_cache
from .identity import Identity, refuse_differences
from .lock import lock_folder
from .manifest import ARCHIVE, MANIFEST, PACKED_MANIFEST, Manifest, ShardRecord, load_manifest
from .packed import restore, write_packed, zstd_filter
from .readouts import mirror_readouts
from .shard import HiddenLayout
from .verify import verify_shard


def pack_cache(cache: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> Archive:
    """Pack every shard that a cache lists, and read each back before it counts.

    Shards that an earlier run has packed are kept, and those that the cache has no more are dropped. So the same call
    goes on after an interruption, and brings an archive up to date after the cache got another split.

    Args:
        cache: the folder of the cache; it is only read.
        out: the folder of the archive: new, empty, or an archive of this cache.
        progress: called with the number of bytes of the cache just packed, and how many there are.

    Raises:
        CacheError: if there is no cache, a shard of it is damaged, `out` holds something else or cannot be written.
        MissingExtraError: if hdf5plugin is not installed.
    """
    zstd_filter()  # before the work, not after it
    _refuse_others(out, load_manifest(cache))
    with lock_folder(out, CacheError):
        with writing_cache(out / PACKED_MANIFEST):
            write_text_durably(out / PACKED_MANIFEST, (cache / MANIFEST).read_bytes().decode("utf-8"))
        manifest = load_manifest(out, PACKED_MANIFEST)  # the cache may grow meanwhile
        records = [record for split in manifest.splits.values() for record in split.shards]
        total = sum(record.bytes for record in records)
        packed = _forget(out, records)

        def advance(count: int) -> None:
            if progress is not None:
                progress(count, total)

        for record in records:
            if not _whole(out / record.file, packed.get(record.file)):
                packed[record.file] = _pack_shard(cache, out, record, manifest.identity, advance)
                save_shards(out, packed)
            else:
                advance(record.bytes)
        mirror_readouts(cache, out)
    return load_archive(out)


def _refuse_others(out: Path, manifest: Manifest) -> None:
    if out.exists() and not out.is_dir():
        raise CacheError(f"{out} is a file; a packed cache is a folder. Choose another name")
    if (out / MANIFEST).exists():
        raise CacheError(f"{out} is a cache; choose a new or empty folder for the packed one")
    if (out / PACKED_MANIFEST).exists():
        refuse_differences(
            load_manifest(out, PACKED_MANIFEST).identity,
            manifest.identity,
            what=f"the packed cache {out}",
            advice="Pack into another folder.",
        )
    elif out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise CacheError(f"{out} holds other files and is not a packed cache; choose a new or empty folder")


def _forget(out: Path, records: list[ShardRecord]) -> dict[str, PackedShard]:
    """The shards listed before; those that the cache has no more, or has anew, are taken off the list."""
    before = load_shards(out) if (out / ARCHIVE).exists() else {}
    hashes = {record.file: record.sha256 for record in records}
    packed = {file: shard for file, shard in before.items() if hashes.get(file) == shard.shard}
    save_shards(out, packed)
    for file in before.keys() - hashes.keys():
        (out / file).unlink(missing_ok=True)
    return packed


def _whole(path: Path, packed: PackedShard | None) -> bool:
    if packed is None:
        return False
    try:
        check_packed(path, packed)
    except CacheError:
        return False
    return True


def _pack_shard(
    cache: Path, out: Path, record: ShardRecord, identity: Identity, progress: Callable[[int], None]
) -> PackedShard:
    layers, width, dtype = len(identity.layers), identity.hidden_size, identity.dtype
    layout = HiddenLayout(layers, record.T, width, storage_dtype(dtype))
    shard, final = cache / record.file, out / record.file
    temporary = temporary_name(final)
    try:
        with writing_cache(final):
            descriptor = create(temporary)
            try:
                clean = write_packed(shard, descriptor, record, layout, progress)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        try:
            restore(temporary, record, layout, lambda data, place: None)
        except CacheError:
            clean = False
        if not clean:
            wrong = verify_shard(cache, record, layers=layers, width=width, dtype=dtype)
            raise CacheError(wrong[0] if wrong else f"packing {shard} did not give it back; run the same command again")
        with writing_cache(final):
            packed = PackedShard(record.file, temporary.stat().st_size, file_hash(temporary), record.sha256)
            replace_durably(temporary, final)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell; a run that goes on writes over the file
            temporary.unlink(missing_ok=True)
        raise
    return packed
