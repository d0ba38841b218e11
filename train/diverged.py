"""A file beside the run folders for each cell that diverged: tables say what is missing, and why."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import RunError
from ..cache.fileio import write_text_durably
from ..cache.jsonfile import read_versioned, sealed_text
from .settings import with_later_settings

FORMAT = "relish diverged cell"
VERSION = 1
_SUFFIX = ".diverged.json"


@dataclass(frozen=True)
class DivergedCell:
    """A cell whose loss was no longer finite; nothing else of it is kept."""

    path: Path
    head: str
    depth: int
    seed: int
    parameters: int
    reason: str
    training: dict[str, Any]
    """Rows and recipe, to tell whether another training is the same."""


def diverged_path(runs: Path, cell: object) -> Path:
    """Where the file of a cell is."""
    return runs / f"{cell}{_SUFFIX}"


def save_diverged(cell: DivergedCell) -> None:
    """Write its file."""
    value = {name: item for name, item in vars(cell).items() if name != "path"}
    write_text_durably(cell.path, sealed_text({"format": FORMAT, "version": VERSION, **value}))


def find_diverged(runs: Path) -> list[DivergedCell]:
    """The cells of a folder that diverged and have no run, by name.

    Raises:
        RunError: naming the file, if one is damaged.
    """
    found = []
    for path in sorted(runs.iterdir()) if runs.is_dir() else []:
        if not re.fullmatch(r"[a-z].*-L\d+-seed\d+" + re.escape(_SUFFIX), path.name):
            continue
        if (runs / path.name.removesuffix(_SUFFIX)).is_dir():
            continue
        value = read_versioned(
            path,
            format=FORMAT,
            version=VERSION,
            again="delete it",
            error=RunError,
            sealed=True,
            mend="delete it, and that cell will be trained again",
        )
        del value["format"], value["version"]
        value["training"]["settings"] = with_later_settings(value["training"]["settings"])
        found.append(DivergedCell(path, **value))
    return found
