"""manifest.json: what a cache is and which shards are complete. Written last, atomically: listed means whole."""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from .errors import CacheError, DamagedCacheError
from .fileio import write_text_durably, writing_cache
from .identity import Identity
from .jsonfile import read_versioned, sealed_text

FORMAT = "relish cache"
VERSION = 1
MANIFEST = "manifest.json"
COPY = "manifest.copy.json"
"""Written right before the manifest itself, with the same content: what `relish cache repair` restores."""
TRAIN = "train"
"""The split that is learned from."""
ARCHIVE = "archive.json"
"""Lists the shards of a packed cache."""
PACKED_MANIFEST = "manifest.packed.json"
"""manifest.json in a packed cache. By another name, so that no reader takes the archive for a cache."""
MEND_ARCHIVE = "copy it again from where it was packed, or pack the cache into a new folder"
"""What to do about a damaged file of an archive, to end a message."""
_MEND = {
    MANIFEST: "run: relish cache repair {folder}",
    COPY: "restore it from a copy, or extract into another folder",
    PACKED_MANIFEST: MEND_ARCHIVE,
}

_SPLIT_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
SHARD_FILE = re.compile(rf"{_SPLIT_NAME}-\d{{5,}}\.h5")
"""What the names of shards are like."""


@dataclass(frozen=True)
class ShardRecord:
    """One complete shard."""

    file: str
    rows: int
    bytes: int
    tokens: int
    """Real tokens; rows × T minus this is padding."""
    T: int
    """Token slots per row: the shard's longest row."""
    offset: int
    """Where the hidden states begin in the file; they are the only bytes the sha256 leaves out."""
    sha256: str
    """Over all other bytes, which hold a CRC-32 of every row's hidden states."""

    @property
    def number(self) -> int:
        """Which of the split's planned shards it is."""
        return int(self.file.removesuffix(".h5").rpartition("-")[2])


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out, since its hidden states could not be stored."""

    row: int
    """Position in the input file."""
    id: str
    shard: int
    """Number of the shard it would be in; a shard without any other row has no file."""
    why: str


@dataclass(frozen=True)
class SplitRecord:
    """One split: what rows it is made of and which of its shards are complete."""

    rows: int
    """Rows of the input, those that were skipped included."""
    tokens: int
    longest: int
    """Tokens of the longest row."""
    truncated: int
    """Rows that were cut to max_length."""
    planned: int
    """Shards the split will have."""
    shard_rows: int
    """Most rows in a shard, as the split was begun: another number would cut it otherwise."""
    fingerprint: str
    """sha256 over the ordered ids, texts, targets and tokens."""
    skipped: tuple[SkippedRow, ...] = ()
    """In the order of their shards."""
    shards: tuple[ShardRecord, ...] = ()
    """In the order of their numbers; a number may be missing until it is extracted (again)."""

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the planned shards that need no work any more."""
        return frozenset([shard.number for shard in self.shards] + [skipped.shard for skipped in self.skipped])

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.done) == self.planned

    @property
    def covered(self) -> int:
        """Rows that need no work any more."""
        return sum(shard.rows for shard in self.shards) + len(self.skipped)


@dataclass(frozen=True)
class Manifest:
    """The whole file."""

    identity: Identity
    label_range: tuple[float, float]
    task: str | None
    """Name of the preset, None for custom data."""
    made_by: dict[str, str]
    """For people: versions and device of the first extraction."""
    splits: dict[str, SplitRecord] = field(default_factory=dict)

    def save(self, folder: Path, kept: str = "finished shards are kept") -> None:
        """Write manifest.json, after a copy of it, so that a reader finds the old or the new one, whole.

        Args:
            folder: of the cache.
            kept: what is safe if it cannot be written, for the message.

        Raises:
            CacheError: if it cannot be written; the old one is then still there.
        """
        text = sealed_text(
            {
                "format": FORMAT,
                "version": VERSION,
                "identity": self.identity.to_json(),
                "label_range": list(self.label_range),
                "task": self.task,
                "made_by": self.made_by,
                "splits": {name: asdict(split) for name, split in self.splits.items()},
            }
        )
        for name in (COPY, MANIFEST):
            with writing_cache(folder / name, kept):
                write_text_durably(folder / name, text)


def load_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read a cache's manifest, the copy of it, or that of a packed cache.

    Raises:
        CacheError: if there is none, it is damaged, or another version wrote it.
        DamagedCacheError: if it is damaged, or lost.
    """
    path = folder / name
    if folder.is_file():
        raise CacheError(f"{folder} is a file, and a cache is a folder")
    mend = _MEND[name].format(folder=quote(str(folder)))
    try:
        value = read_versioned(
            path,
            format=FORMAT,
            version=VERSION,
            again="extract into another folder",
            error=CacheError,
            damaged=DamagedCacheError,
            sealed=True,
            mend=mend,
        )
    except FileNotFoundError:
        if name == MANIFEST:
            if (folder / COPY).exists():
                raise DamagedCacheError(f"the cache {folder} has lost its {MANIFEST}; {mend}") from None
            if (folder / ARCHIVE).exists():
                raise CacheError(
                    f"{folder} is a packed cache; unpack it with: relish cache unpack {folder} CACHE"
                ) from None
            refuse_unlisted_shards(folder)
        raise CacheError(
            f"{folder} is not a relish cache: it has no {name}. Make one with: relish extract {folder} …"
        ) from None
    try:
        low, high = value["label_range"]
        if not -math.inf < float(low) < float(high) < math.inf:
            raise ValueError(f"the label range {low} to {high}")
        if not all(isinstance(text, str) for text in value["made_by"].values()):
            raise ValueError("made_by")
        return Manifest(
            identity=Identity.from_json(value["identity"]),
            label_range=(float(low), float(high)),
            task=value["task"],
            made_by=dict(value["made_by"]),
            splits={name: _split_record(name, split) for name, split in value["splits"].items()},
        )
    except CacheError as error:
        raise CacheError(f"{path} cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedCacheError(f"{path} is damaged ({error!r}); {mend}") from None


def refuse_unlisted_shards(folder: Path) -> None:
    """Refuse a folder whose shards have lost both manifests.

    One shard may be there: a process that is killed before its first manifest leaves it. More were finished.

    Raises:
        DamagedCacheError: if there are more.
    """
    shards = sorted(path.name for path in folder.glob("*.h5") if SHARD_FILE.fullmatch(path.name))
    if len(shards) > 1:
        raise DamagedCacheError(
            f"{folder} holds {len(shards)} shards ({shards[0]} …) and no {MANIFEST} that lists them; restore it, or "
            f"{COPY}, from elsewhere, or extract into another folder"
        )


def check_split_name(name: str) -> str:
    """A split's name becomes part of file names.

    Raises:
        CacheError: if it has characters other than letters, digits, dot, dash and underscore.
    """
    if not re.fullmatch(_SPLIT_NAME, name):
        raise CacheError(f"a split's name may hold letters, digits, '.', '-' and '_'; got {name!r}")
    return name


def shard_file(split: str, number: int) -> str:
    """The name of a shard's file."""
    return f"{split}-{number:05d}.h5"


def _split_record(name: str, value: dict[str, Any]) -> SplitRecord:
    if not re.fullmatch(_SPLIT_NAME, name):
        raise ValueError(f"the split name {name!r}")
    shards = tuple(checked(ShardRecord(**shard)) for shard in value["shards"])
    skipped = tuple(checked(SkippedRow(**row)) for row in value["skipped"])
    record = checked(SplitRecord(**{**value, "shards": shards, "skipped": skipped}))
    numbers = [shard.number for shard in shards]
    if [shard.file for shard in shards] != [shard_file(name, number) for number in sorted(set(numbers))]:
        raise ValueError(f"the names of the shards of {name}")
    if not all(0 <= number < record.planned for number in record.done):
        raise ValueError(f"the numbers of the shards of {name}")
    return record


def checked(record: Any) -> Any:
    """The record itself.

    Raises:
        ValueError: if a field is not of the type it should be, or a number is negative.
    """
    for name, kind in type(record).__annotations__.items():
        value = getattr(record, name)
        if (kind is int and not (type(value) is int and value >= 0)) or (kind is str and not isinstance(value, str)):
            raise ValueError(f"{type(record).__name__}.{name} is {value!r}")
    return record
