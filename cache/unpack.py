"""Unpack a packed cache: byte for byte the one that was packed, every byte checked."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .archive import PackedShard, check_packed, load_archive
from .dtypes import storage_dtype
from .errors import CacheError
from .fileio import allocate, create, replace_durably, temporary_name, write_at, write_text_durably, writing_cache
from .identity import Identity
from .lock import lock_folder
from .manifest import COPY, MANIFEST, PACKED_MANIFEST, ShardRecord, refuse_unlisted_shards
from .packed import restore, zstd_filter
from .readouts import FOLDER, copy_readouts, part_files
from .shard import HiddenLayout
from .verify import verify_shard
from .writer import may_be_ours

_BEGUN = ".unpacking"
"""There while shards without a manifest are those of an interrupted call, and may be replaced."""


def unpack_cache(archive: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Write the cache that an archive was made from.

    Shards that are there and whole are kept, so that the same call goes on after an interruption. The manifest comes
    last.

    Args:
        archive: the folder of the archive; it is only read.
        out: the folder of the cache: new, empty, or left by an interrupted call.
        progress: called with the number of bytes of the cache just written, and how many there are.

    Returns:
        Names of the splits.

    Raises:
        CacheError: if there is no archive, it is unfinished or damaged, `out` holds something else or cannot be
            written.
        MissingExtraError: if hdf5plugin is not installed.
    """
    zstd_filter()  # before the work, not after it
    opened = load_archive(archive)
    if opened.missing:
        raise CacheError(
            f"the packed cache {archive} is not finished ({len(opened.missing)} shards are missing, the first is "
            f"{opened.missing[0]}); pack the cache again into it to go on"
        )
    text = (archive / PACKED_MANIFEST).read_bytes().decode("utf-8")
    _refuse_others(out, text)
    identity = opened.manifest.identity
    records = [record for split in opened.manifest.splits.values() for record in split.shards]
    total = sum(record.bytes for record in records)

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, total)

    with lock_folder(out, CacheError):
        begun = out / _BEGUN
        if not begun.exists():
            if not (out / MANIFEST).exists() and not (out / COPY).exists():
                refuse_unlisted_shards(out)
            with writing_cache(begun):
                begun.touch()
        for record in records:
            if not _whole(out, record, identity):
                _unpack_shard(archive, out, record, opened.shards[record.file], identity, advance)
            else:
                advance(record.bytes)
        copy_readouts(out, part_files(archive))
        for name in (COPY, MANIFEST):
            with writing_cache(out / name):
                write_text_durably(out / name, text)
        begun.unlink(missing_ok=True)
    return list(opened.manifest.splits)


def _refuse_others(out: Path, text: str) -> None:
    if out.exists() and not out.is_dir():
        raise CacheError(f"{out} is a file; a cache is a folder. Choose another name")
    for name in (MANIFEST, COPY):
        if (out / name).exists() and (out / name).read_bytes() != text.encode():
            raise CacheError(f"{out} holds another cache; choose a new or empty folder")
    if not out.exists():
        return
    ours = (MANIFEST, COPY, FOLDER)
    if any(not may_be_ours(entry.name) and entry.name not in ours for entry in out.iterdir()):
        raise CacheError(f"{out} holds other files and is not a relish cache; choose a new or empty folder")


def _whole(out: Path, record: ShardRecord, identity: Identity) -> bool:
    return (out / record.file).is_file() and not verify_shard(
        out, record, layers=len(identity.layers), width=identity.hidden_size, dtype=identity.dtype
    )


def _unpack_shard(
    archive: Path,
    out: Path,
    record: ShardRecord,
    packed: PackedShard,
    identity: Identity,
    advance: Callable[[int], None],
) -> None:
    source, final = archive / record.file, out / record.file
    temporary = temporary_name(final)
    check_packed(source, packed)
    layout = HiddenLayout(len(identity.layers), record.T, identity.hidden_size, storage_dtype(identity.dtype))
    try:
        with writing_cache(final):
            descriptor = create(temporary)

        def put(data: memoryview, place: int) -> None:
            with writing_cache(final):
                write_at(descriptor, data, place)

        try:
            with writing_cache(final):
                allocate(descriptor, record.bytes)  # which leaves the padding zero
            restore(source, record, layout, put, advance)
            with writing_cache(final):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with writing_cache(final):
            replace_durably(temporary, final)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell; a run that goes on writes over the file
            temporary.unlink(missing_ok=True)
        raise
