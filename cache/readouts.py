"""What the LLM itself answered to the rows of a split: `readouts/` in a cache, one sealed JSON file per 256 rows.

A readout is one kind of answer with one number of solved examples (shots) in the prompt. Each of its parts says all
about itself, so that parts can be copied, and never mixed up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import CacheError, DamagedCacheError
from .fileio import write_text_durably, writing_cache
from .identity import Identity, name_differences, refuse_differences
from .jsonfile import read_versioned, sealed_text
from .manifest import Manifest, SplitRecord

FORMAT = "relish readout"
VERSION = 1
FOLDER = "readouts"
PART_ROWS = 256
REGRESSION = "regression"
KINDS = ("greedy", "samples", "candidates", REGRESSION)
_FILE = re.compile(rf"(?P<split>.+)\.(?P<kind>{'|'.join(KINDS)})-(?P<shots>\d+)shot-(?P<number>\d{{5,}})\.json")
_AGAIN = "run the same relish extract command again, with --readouts"


@dataclass(frozen=True)
class Readout:
    """One kind of answer to rows of one split: a part of them, or all."""

    identity: Identity
    """That of the cache."""
    split: str
    fingerprint: str
    """The split's, in the manifest."""
    kind: str
    """A name of KINDS."""
    shots: int
    """Solved examples that were asked for."""
    shots_used: int
    """Solved examples that fitted the context."""
    settings: dict[str, Any]
    """All else the answers depend on: candidates, number of samples, temperature, seed, hash of the examples …"""
    rows: tuple[int, ...] = ()
    """Positions in the input file, ascending."""
    ids: tuple[str, ...] = ()
    answers: tuple[Any, ...] = ()
    """For each row: greedy a text, samples a list of texts, candidates a list of log-probabilities, regression a
    score."""
    seconds: float = 0.0
    """Computing them took that long, as if no other readout shared the reading of what all prompts begin with."""

    @property
    def name(self) -> str:
        """Such as greedy-0shot."""
        return readout_name(self.kind, self.shots)


def readout_name(kind: str, shots: int) -> str:
    """How a readout is called."""
    return f"{kind}-{shots}shot"


def part_path(folder: Path, split: str, name: str, number: int) -> Path:
    """Where a part of a readout is.

    Args:
        folder: the cache.
        split: the split.
        name: of the readout.
        number: of the part, from 0.
    """
    return folder / FOLDER / f"{split}.{name}-{number:05d}.json"


def part_rows(rows: int, number: int) -> range:
    """The rows of a part of a split with so many rows."""
    return range(number * PART_ROWS, min(rows, (number + 1) * PART_ROWS))


def part_count(rows: int) -> int:
    """Parts of a readout of a split with so many rows."""
    return -(-rows // PART_ROWS)


def save_part(folder: Path, part: Readout) -> None:
    """Write a part, so that a reader finds it whole or not at all.

    Raises:
        CacheError: if it cannot be written.
    """
    path = part_path(folder, part.split, part.name, part.rows[0] // PART_ROWS)
    value = {field.name: getattr(part, field.name) for field in fields(part)}
    value |= {"identity": part.identity.to_json(), "seconds": round(part.seconds, 3)}
    with writing_cache(path, "finished parts are kept"):
        path.parent.mkdir(exist_ok=True)
        write_text_durably(path, sealed_text({"format": FORMAT, "version": VERSION, **value}))


def load_part(path: Path) -> Readout:
    """Read a part.

    Raises:
        FileNotFoundError: if it is not there.
        CacheError: if another version wrote it.
        DamagedCacheError: if it is damaged.
    """
    value = read_versioned(
        path,
        format=FORMAT,
        version=VERSION,
        again=f"delete {path} and {_AGAIN}",
        error=CacheError,
        damaged=DamagedCacheError,
        sealed=True,
        mend=_AGAIN,
    )
    del value["format"], value["version"]
    try:
        lists = {name: tuple(value[name]) for name in ("rows", "ids", "answers")}
        part = Readout(**{**value, **lists, "identity": Identity.from_json(value["identity"])})
        if part_path(path.parent.parent, part.split, part.name, part.rows[0] // PART_ROWS) != path:
            raise ValueError("its name is that of another")
        if not len(part.rows) == len(part.ids) == len(part.answers) or not all(map(_good(part), part.answers)):
            raise ValueError("its answers")
    except CacheError as error:
        raise CacheError(f"{path} cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamagedCacheError(f"{path} is damaged ({error!r}); {_AGAIN}") from None
    return part


def pending_parts(folder: Path, planned: Readout, rows: int) -> list[int]:
    """Numbers of the parts still to be computed; a damaged one is computed again.

    Args:
        folder: the cache.
        planned: the readout, its answers aside.
        rows: of the split.

    Raises:
        CacheError: if a part was made with anything different; names what differs, with both values.
    """
    missing = []
    for number in range(part_count(rows)):
        path = part_path(folder, planned.split, planned.name, number)
        try:
            part = load_part(path)
        except (FileNotFoundError, DamagedCacheError):
            missing.append(number)
            continue
        _refuse_others(path, part, planned)
    return missing


def load_readouts(folder: Path, manifest: Manifest, split: str) -> tuple[list[Readout], list[str]]:
    """The readouts of a split.

    Args:
        folder: the cache.
        manifest: the cache's.
        split: one of its splits.

    Returns:
        Those that are complete, in the order of the rows, sorted by shots and kind; and for each that is not a sentence
        on what is missing or damaged.
    """
    found, wrong = [], []
    for name in readout_names(folder, split):
        readout, problem = _whole_or_why(folder, manifest, split, name)
        found += [readout] if readout is not None else []
        wrong += [problem] if problem else []
    return found, wrong


def readout_names(folder: Path, split: str) -> list[str]:
    """Names of the readouts that have at least one part, in any state."""
    matches = [match for path in part_files(folder) if (match := _FILE.fullmatch(path.name))]
    return sorted({readout_name(m["kind"], int(m["shots"])) for m in matches if m["split"] == split}, key=_order)


def part_files(folder: Path) -> list[Path]:
    """The parts in a cache, sorted by name."""
    there = folder / FOLDER
    return sorted(path for path in there.iterdir() if _FILE.fullmatch(path.name)) if there.is_dir() else []


def readouts_info(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Figures of each readout, for `relish cache info`; a part counts if it is whole."""
    figures = []
    for split, record in manifest.splits.items():
        for name in readout_names(folder, split):
            paths = [part_path(folder, split, name, number) for number in range(part_count(record.rows))]
            loaded = [_load_or_none(path) for path in paths if path.exists()]
            parts = [part for part in loaded if part is not None]
            state = "complete" if len(parts) == len(paths) else "damaged" if len(parts) < len(loaded) else "unfinished"
            figures.append(
                {
                    "split": split,
                    "name": name,
                    "shots_used": parts[0].shots_used if parts else None,
                    "rows": sum(len(part.rows) for part in parts),
                    "of": record.rows,
                    "seconds": round(sum(part.seconds for part in parts), 3),
                    "state": state,
                }
            )
    return figures


def verify_readouts(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the readouts of a cache, a sentence for each."""
    found = []
    for split in manifest.splits:
        found += load_readouts(folder, manifest, split)[1]
    return found


def copy_readouts(out: Path, parts: Sequence[Path], kept: str = "finished parts are kept") -> None:
    """Copy parts into another cache or archive, each checked.

    Args:
        out: its folder.
        parts: the files.
        kept: what is safe if one cannot be written, for the message.

    Raises:
        CacheError: if one is damaged, or cannot be written.
    """
    for path in parts:
        load_part(path)
        with writing_cache(out / FOLDER / path.name, kept):
            (out / FOLDER).mkdir(exist_ok=True)
            write_text_durably(out / FOLDER / path.name, path.read_bytes().decode("utf-8"))


def mirror_readouts(source: Path, out: Path) -> None:
    """Make the readouts of an archive those of its cache: copy what is there, drop what is there no more.

    Raises:
        CacheError: if one is damaged, or cannot be written.
    """
    parts = part_files(source)
    copy_readouts(out, parts)
    for stale in {path.name for path in part_files(out)} - {path.name for path in parts}:
        (out / FOLDER / stale).unlink()


def merged_readouts(caches: Sequence[tuple[Path, Manifest]]) -> list[Path]:
    """The parts that a merged cache gets: of each readout those of the cache that has most of them.

    Args:
        caches: folder and manifest of each.
    """
    chosen: dict[tuple[str, str], list[Path]] = {}
    for folder, manifest in caches:
        for split, record in manifest.splits.items():
            for name in readout_names(folder, split):
                paths = [part_path(folder, split, name, number) for number in range(part_count(record.rows))]
                parts = [path for path in paths if path.exists()]
                if len(parts) > len(chosen.get((split, name), [])):
                    chosen[split, name] = parts
    return [path for parts in chosen.values() for path in parts]


def _load_or_none(path: Path) -> Readout | None:
    try:
        return load_part(path)
    except CacheError:
        return None


def _whole_or_why(folder: Path, manifest: Manifest, split: str, name: str) -> tuple[Readout | None, str]:
    try:
        return _whole(folder, manifest.identity, manifest.splits[split], split, name), ""
    except CacheError as error:
        return None, str(error)


def _whole(folder: Path, identity: Identity, record: SplitRecord, split: str, name: str) -> Readout:
    parts: list[Readout] = []
    count = part_count(record.rows)
    called = f"the readout {name} of the split {split!r} of the cache {folder}"
    for number in range(count):
        path = part_path(folder, split, name, number)
        try:
            part = load_part(path)
        except FileNotFoundError:
            there = sum(part_path(folder, split, name, other).exists() for other in range(count))
            raise CacheError(f"{called} is not finished ({there} of {count} parts); {_AGAIN}") from None
        refuse_differences(
            identity, part.identity, what=f"{path}, against the cache itself,", advice=f"Delete it, and {_AGAIN}."
        )
        if part.fingerprint != record.fingerprint or part.rows != tuple(part_rows(record.rows, number)):
            raise CacheError(f"{path} was made from other rows than the split {split!r}; delete it, and {_AGAIN}")
        if parts:
            _refuse_others(path, part, parts[0])
        parts.append(part)
    return replace(
        parts[0],
        rows=sum((part.rows for part in parts), ()),
        ids=sum((part.ids for part in parts), ()),
        answers=sum((part.answers for part in parts), ()),
        seconds=sum(part.seconds for part in parts),
    )


def _refuse_others(path: Path, have: Readout, want: Readout) -> None:
    advice = f"delete {path.parent} to ask anew, or use the same settings to go on"
    refuse_differences(have.identity, want.identity, what=str(path), advice=advice.capitalize() + ".")
    different = [
        (name, getattr(have, name), getattr(want, name))
        for name in ("fingerprint", "shots_used")
        if getattr(have, name) != getattr(want, name)
    ]
    different += [
        (name, have.settings.get(name), want.settings.get(name))
        for name in sorted(have.settings.keys() | want.settings.keys())
        if have.settings.get(name) != want.settings.get(name)
    ]
    if different:
        raise CacheError(f"{path} was made with something else: {name_differences(different)}; {advice}")


def _good(part: Readout) -> Any:
    if part.kind == "greedy":
        return lambda answer: isinstance(answer, str)
    if part.kind == REGRESSION:
        return lambda answer: isinstance(answer, (int, float))
    kind = str if part.kind == "samples" else (int, float)
    length = len(part.answers[0])
    return lambda answer: len(answer) == length and all(isinstance(value, kind) for value in answer)


def _order(name: str) -> tuple[int, int]:
    kind, _, shots = name.rpartition("-")
    return int(shots.removesuffix("shot")), KINDS.index(kind)
