"""Reading the small JSON files of this package, with a version in each."""

import json
from pathlib import Path
from typing import Any

from .errors import RelishError


def read_versioned(path: Path, *, format: str, version: int, again: str, error: type[RelishError]) -> dict[str, Any]:
    """Read a JSON object that says its format and version.

    Args:
        path: the file; messages call its folder by the format's name.
        format: what its field "format" must be, such as "relish cache".
        version: what its field "version" must be.
        again: how to make it anew, to end a message: "extract again".
        error: the type of error to raise.

    Raises:
        FileNotFoundError: if it is not there.
        RelishError: of the type `error`, if it cannot be read, is something else, or is of another version.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read ({reason}); restore it from a copy, or {again}") from None
    if not isinstance(value, dict) or value.get("format") != format:
        raise error(f"{path} is not that of a {format}")
    if value.get("version") != version:
        raise error(
            f"the {format} {path.parent} has format version {value.get('version')!r}, and this relish reads version "
            f"{version}; install the relish that wrote it, or {again}"
        )
    return value
