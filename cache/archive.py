"""archive.json: which shards of a packed cache are complete. Written last, atomically: listed means whole."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import CacheError
from .fileio import write_text_durably, writing_cache
from .jsonfile import read_versioned, sealed_text
from .manifest import ARCHIVE, MANIFEST, MEND_ARCHIVE, PACKED_MANIFEST, Manifest, checked, load_manifest

FORMAT = "relish archive"
VERSION = 1


@dataclass(frozen=True)
class PackedShard:
    """One complete shard of an archive."""

    file: str
    """Name of the file, the same as in the cache."""
    bytes: int
    sha256: str
    """Over the whole file."""
    shard: str
    """The sha256 that the manifest has for the shard it was made from."""


@dataclass(frozen=True)
class Archive:
    """A packed cache."""

    manifest: Manifest
    """That of the cache it was made from."""
    shards: dict[str, PackedShard]
    """By file name; a shard of the manifest may be missing until packing is finished."""

    @property
    def bytes(self) -> int:
        """Size of the packed shards."""
        return sum(shard.bytes for shard in self.shards.values())

    @property
    def missing(self) -> list[str]:
        """Files of the manifest's shards that are not packed yet."""
        records = [record for split in self.manifest.splits.values() for record in split.shards]
        return [record.file for record in records if not self.has(record.file, record.sha256)]

    def has(self, file: str, sha256: str) -> bool:
        """Whether that shard is packed, and from a shard of that hash."""
        return file in self.shards and self.shards[file].shard == sha256


def is_archive(folder: Path) -> bool:
    """Whether a folder is a packed cache, and not a cache."""
    return (folder / ARCHIVE).exists() and not (folder / MANIFEST).exists()


def save_shards(folder: Path, shards: dict[str, PackedShard]) -> None:
    """Write archive.json, so that a reader finds the old or the new one, whole.

    Raises:
        CacheError: if it cannot be written; the old one is then still there.
    """
    listed = [asdict(shards[file]) for file in sorted(shards)]
    with writing_cache(folder / ARCHIVE):
        write_text_durably(folder / ARCHIVE, sealed_text({"format": FORMAT, "version": VERSION, "shards": listed}))


def load_shards(folder: Path) -> dict[str, PackedShard]:
    """Read archive.json.

    Raises:
        CacheError: if there is none, it is damaged, or another version wrote it.
    """
    path = folder / ARCHIVE
    if folder.is_file():
        raise CacheError(f"{folder} is a file, and a packed cache is a folder")
    try:
        value = read_versioned(
            path,
            format=FORMAT,
            version=VERSION,
            again="pack the cache again",
            error=CacheError,
            sealed=True,
            mend=MEND_ARCHIVE,
        )
    except FileNotFoundError:
        what = (
            "a cache, not a packed one" if (folder / MANIFEST).exists() else f"not a packed cache: it has no {ARCHIVE}"
        )
        raise CacheError(f"{folder} is {what}. Pack a cache with: relish cache pack CACHE ARCHIVE") from None
    try:
        shards = [checked(PackedShard(**shard)) for shard in value["shards"]]
        if any(Path(shard.file).name != shard.file for shard in shards):
            raise ValueError("the names of the shards")
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is damaged ({error!r}); {MEND_ARCHIVE}") from None
    return {shard.file: shard for shard in shards}


def load_archive(folder: Path) -> Archive:
    """Read what an archive holds; no shard is touched.

    Raises:
        CacheError: if it is no archive, one of its two small files is damaged, or another version wrote it.
    """
    shards = load_shards(folder)
    if not (folder / PACKED_MANIFEST).is_file():
        raise CacheError(f"the packed cache {folder} has lost its {PACKED_MANIFEST}; {MEND_ARCHIVE}")
    return Archive(load_manifest(folder, PACKED_MANIFEST), shards)


def file_hash(path: Path) -> str:
    """sha256 over a whole file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
        return digest.hexdigest()


def check_packed(path: Path, packed: PackedShard) -> None:
    """Check every byte of a packed shard, before HDF5 opens it: damaged bytes may crash HDF5.

    Raises:
        CacheError: if it is not the file that was packed.
    """
    try:
        size = path.stat().st_size
        if size != packed.bytes:
            raise CacheError(f"the packed shard {path} has {size} bytes, {packed.bytes} were written; {MEND_ARCHIVE}")
        if file_hash(path) != packed.sha256:
            raise CacheError(f"the packed shard {path} is damaged (its hash differs); {MEND_ARCHIVE}")
    except OSError as error:
        raise CacheError(f"the packed shard {path} cannot be read ({error.strerror}); {MEND_ARCHIVE}") from None
