"""manifest.json: what a cache is and which shards are complete. Written last, atomically: listed means whole."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CacheError
from .fileio import write_json_durably
from .identity import Identity
from .jsonfile import read_versioned

FORMAT = "relish cache"
VERSION = 1
MANIFEST = "manifest.json"


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


@dataclass(frozen=True)
class SplitRecord:
    """One split: what rows it is made of and which of its shards are complete."""

    rows: int
    tokens: int
    longest: int
    """Tokens of the longest row."""
    truncated: int
    """Rows that were cut to max_length."""
    planned: int
    """Shards the split will have."""
    fingerprint: str
    """sha256 over the ordered ids, texts, targets and tokens."""
    shards: tuple[ShardRecord, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.shards) == self.planned


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

    def save(self, folder: Path) -> None:
        """Write manifest.json so that a reader finds the old or the new one, whole."""
        splits = {
            name: {**asdict(split), "shards": [asdict(shard) for shard in split.shards]}
            for name, split in self.splits.items()
        }
        write_json_durably(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "version": VERSION,
                "identity": self.identity.to_json(),
                "label_range": list(self.label_range),
                "task": self.task,
                "made_by": self.made_by,
                "splits": splits,
            },
        )


def load_manifest(folder: Path) -> Manifest:
    """Read a cache's manifest.

    Raises:
        CacheError: if there is none, it is damaged, or another version wrote it.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise CacheError(f"{folder} is a file, and a cache is a folder")
    try:
        value = read_versioned(path, format=FORMAT, version=VERSION, again="extract again", error=CacheError)
    except FileNotFoundError:
        raise CacheError(
            f"{folder} is not a relish cache: it has no {MANIFEST}. Make one with: relish extract {folder} …"
        ) from None
    try:
        return Manifest(
            identity=Identity.from_json(value["identity"]),
            label_range=(float(value["label_range"][0]), float(value["label_range"][1])),
            task=value["task"],
            made_by=dict(value["made_by"]),
            splits={
                check_split_name(name): SplitRecord(
                    **{**split, "shards": tuple(_shard_record(shard) for shard in split["shards"])}
                )
                for name, split in value["splits"].items()
            },
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CacheError(f"{path} is damaged ({error!r}); restore it from a copy, or extract again") from None


def check_split_name(name: str) -> str:
    """A split's name becomes part of file names.

    Raises:
        CacheError: if it has characters other than letters, digits, dot, dash and underscore.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise CacheError(f"a split's name may hold letters, digits, '.', '-' and '_'; got {name!r}")
    return name


def _shard_record(value: dict[str, Any]) -> ShardRecord:
    record = ShardRecord(**value)
    numbers = (record.rows, record.bytes, record.tokens, record.T, record.offset)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"shard {record.file}: {numbers}")
    if Path(record.file).name != record.file or not isinstance(record.sha256, str):
        raise ValueError(f"shard {record.file!r}")
    return record
