"""The one writer: creates or resumes a cache, shard by shard. A shard counts once the manifest lists it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .dtypes import StorageDtype, storage_dtype
from .errors import CacheError
from .identity import Identity, refuse_differences
from .lock import lock_folder
from .manifest import (
    COPY,
    MANIFEST,
    SHARD_FILE,
    Manifest,
    SkippedRow,
    SplitRecord,
    check_split_name,
    load_manifest,
    refuse_unlisted_shards,
    shard_file,
)
from .shard import ShardWriter
from .speed import SPEED

OVERHEAD = 0.035
"""Padding a shard may have, as a share of its real tokens…"""
SLACK = 0.0004
"""…or of the whole split's, whichever is more: without it a few very long rows would each get a shard of their own."""


@dataclass(frozen=True)
class SplitRows:
    """The tokenised rows of one split, N of them, in the order of the input file."""

    ids: list[str]
    """The user's ids."""
    target: np.ndarray
    """(N,) float64, NaN if unlabelled."""
    tokens: list[np.ndarray]
    """N arrays of int32 token ids, each of the row's own length."""
    truncated: int
    """How many rows were cut to max_length."""
    fingerprint: str
    """sha256 over the ordered ids, texts, targets and tokens."""


class CacheWriter:
    """A cache being written: new, or an existing one that is continued or gets another split."""

    def __init__(
        self,
        folder: Path,
        *,
        identity: Identity,
        label_range: tuple[float, float],
        task: str | None,
        made_by: dict[str, str],
    ) -> None:
        """Open a cache for writing; nothing is written before the first shard.

        Raises:
            CacheError: if the folder holds a cache of another identity or label range, shards that have lost their
                manifest, or files that are no cache.
        """
        self.folder = folder
        self.noted: list[str] = []
        """Differences that do not keep a cache from being continued, but that a person should hear of."""
        self._begun: set[str] = set()  # names of splits, of which the manifest lists none without a shard
        known = manifest_to_resume(folder)
        if known is not None:
            self.manifest = known
            advice = "Extract into another folder, or use the same settings to go on."
            refuse_differences(self.manifest.identity, identity, what=f"the cache {folder}", advice=advice)
            if self.manifest.label_range != label_range:
                raise CacheError(
                    f"the cache {folder} has the label range {self.manifest.label_range}, not {label_range}. {advice}"
                )
            for name, value in made_by.items():
                before = self.manifest.made_by.get(name)
                if before != value:
                    self.noted.append(f"the cache was begun with {name} {before}, and this is {value}")
        else:
            if folder.exists() and not folder.is_dir():
                raise CacheError(f"{folder} is a file; a cache is a folder. Choose another name")
            if folder.exists() and any(not may_be_ours(entry.name) for entry in folder.iterdir()):
                raise CacheError(f"{folder} holds other files and is not a relish cache; choose a new or empty folder")
            refuse_unlisted_shards(folder)
            self.manifest = Manifest(identity, label_range, task, made_by)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one who writes shards; the folder is made if it is not there.

        Raises:
            CacheError: if another process is writing, or has written since this cache was opened.
        """
        with lock_folder(self.folder, CacheError):
            if (self.folder / MANIFEST).exists():
                if load_manifest(self.folder) != self.manifest:
                    raise CacheError(f"the cache {self.folder} was changed by another process; run the command again")
            elif self.manifest.splits:
                self.manifest.save(self.folder)  # it was lost, or the process died after writing its copy
            yield

    @property
    def lost_manifest(self) -> bool:
        """Whether manifest.json is missing and its copy stands in; `writing` puts it back."""
        return bool(self.manifest.splits) and not (self.folder / MANIFEST).exists()

    def made_with(self, name: str, value: str) -> None:
        """Add to `made_by` what shows only once the backbone is loaded; a cache that is begun keeps what it has."""
        if not self.manifest.splits:
            self.manifest = replace(self.manifest, made_by={**self.manifest.made_by, name: value})

    def split(self, name: str, rows: SplitRows, *, shard_rows: int) -> "SplitWriter":
        """Begin or resume a split.

        Raises:
            CacheError: if the split is there with other rows or another cut into shards.
        """
        check_split_name(name)
        if name not in self.manifest.splits:  # one that has both already can be gone on with
            for other in {*self.manifest.splits, *self._begun} - {name}:
                if other.casefold() == name.casefold():
                    raise CacheError(
                        f"the cache has a split {other!r}; {name!r} would be the same file on some systems"
                    )
        self._begun.add(name)
        lengths = np.array([len(tokens) for tokens in rows.tokens], dtype=np.int64)
        shards = cut_into_shards(lengths, shard_rows)
        known = self.manifest.splits.get(name)
        if known is None:
            known = SplitRecord(
                rows=len(lengths),
                tokens=int(lengths.sum()),
                longest=int(lengths.max()),
                truncated=rows.truncated,
                planned=len(shards),
                shard_rows=shard_rows,
                fingerprint=rows.fingerprint,
            )
        elif known.fingerprint != rows.fingerprint:
            raise CacheError(
                f"the split {name!r} of the cache {self.folder} was made from other rows ({known.rows} there, "
                f"{len(lengths)} here; ids, texts, targets, their order or their tokens differ). "
                "Give the file it was made from, or choose another split name or folder"
            )
        elif known.shard_rows != shard_rows:
            raise CacheError(
                f"the split {name!r} of the cache {self.folder} was begun with --shard-rows {known.shard_rows}, and "
                f"this is {shard_rows}; go on with --shard-rows {known.shard_rows}"
            )
        elif known.planned != len(shards) or any(len(shards[number]) != rows for number, rows in _cut(known).items()):
            raise CacheError(
                f"the split {name!r} of the cache {self.folder} was cut into other shards, by another version of "
                "relish; go on with that version, or extract into another folder"
            )
        return SplitWriter(self, name, rows, shards, known)


class SplitWriter:
    """The shards of one split, those still to be written and those that are there."""

    def __init__(
        self, cache: CacheWriter, name: str, rows: SplitRows, shards: list[np.ndarray], record: SplitRecord
    ) -> None:
        self._cache = cache
        self._name = name
        self._rows = rows
        self._shards = shards
        self.record = record

    @property
    def dtype(self) -> StorageDtype:
        """What the hidden states are stored as."""
        return storage_dtype(self._cache.manifest.identity.dtype)

    def pending(self) -> list[int]:
        """Numbers of the shards still to be written: those after the last, and any that were dropped since."""
        done = self.record.done
        return [number for number in range(len(self._shards)) if number not in done]

    def members(self, number: int) -> np.ndarray:
        """Row numbers of a shard, the row with most tokens first."""
        return self._shards[number]

    @contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Write one of the pending shards; leaving the block commits it and lists it in the manifest."""
        members, rows, identity = self._shards[number], self._rows, self._cache.manifest.identity
        folder = self._cache.folder
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(
            folder / shard_file(self._name, number),
            layers=len(identity.layers),
            width=identity.hidden_size,
            dtype=self.dtype,
            input_ids=[rows.tokens[member] for member in members],
            target=rows.target[members],
            row=members,
            ids=[rows.ids[member] for member in members],
        )
        try:
            yield writer
            record = writer.commit()
        except BaseException:
            writer.abandon()
            raise
        skipped = [
            SkippedRow(row=int(members[position]), id=rows.ids[members[position]], shard=number, why=why)
            for position, why in writer.skipped.items()
        ]
        shards = self.record.shards if record is None else (*self.record.shards, record)
        split = replace(
            self.record,
            skipped=tuple(sorted([*self.record.skipped, *skipped], key=lambda row: (row.shard, row.row))),
            shards=tuple(sorted(shards, key=lambda shard: shard.number)),
        )
        manifest = replace(self._cache.manifest, splits={**self._cache.manifest.splits, self._name: split})
        manifest.save(folder)
        self._cache.manifest, self.record = manifest, split


def manifest_to_resume(folder: Path) -> Manifest | None:
    """The manifest of a cache to go on with, None if there is none yet.

    The copy stands in for a manifest that is missing: a process may die between the two, or someone delete one.

    Raises:
        CacheError: if it is damaged, or another version wrote it.
    """
    for name in (MANIFEST, COPY):
        if (folder / name).exists():
            return load_manifest(folder, name)
    return None


def cut_into_shards(lengths: np.ndarray, shard_rows: int) -> list[np.ndarray]:
    """Row numbers of each shard: rows sorted by length, longest first, and cut where padding would grow too much.

    The longest row comes first so that running out of memory shows in the first batch, not after a night.

    Args:
        lengths: (N,) tokens of each row.
        shard_rows: most rows in a shard.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths[order].tolist()
    slack = SLACK * sum(sizes)
    shards, begin, tokens = [], 0, 0
    for end, size in enumerate(sizes):
        padding = sizes[begin] * (end + 1 - begin) - (tokens + size)
        if end - begin == shard_rows or padding > max(OVERHEAD * (tokens + size), slack):
            shards.append(order[begin:end])
            begin, tokens = end, 0
        tokens += size
    shards.append(order[begin:])
    return shards


def _cut(split: SplitRecord) -> dict[int, int]:
    """Rows of each shard that is done, those that were skipped included."""
    rows = Counter(row.shard for row in split.skipped)
    rows.update({shard.number: shard.rows for shard in split.shards})
    return dict(rows)


def may_be_ours(name: str) -> bool:
    """Whether a file may be in a folder that is to become a cache."""
    # A process killed before its first manifest leaves a shard; hidden files are temporary ones, the lock, or the
    # system's. Times stay where someone deleted a cache's other files.
    return name.startswith(".") or name == SPEED or SHARD_FILE.fullmatch(name) is not None
