"""The small JSON files of this package: a version in each, and a seal that shows any later change."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import RelishError

_SEAL = ',\n  "sha256": "'


def sealed_text(value: dict[str, Any]) -> str:
    """JSON, indented for people, whose last field `sha256` is the hash of all the text before it; NaN is refused."""
    body = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def read_versioned(
    path: Path,
    *,
    format: str,
    version: int,
    again: str,
    error: type[RelishError],
    sealed: bool = False,
    mend: str | None = None,
) -> dict[str, Any]:
    """Read a JSON object that says its format and version.

    Args:
        path: the file; messages call its folder by the format's name.
        format: what its field "format" must be, such as "relish cache".
        version: what its field "version" must be.
        again: how to make it anew, to end a message: "extract again".
        error: the type of error to raise.
        sealed: whether it must be, byte for byte, what `sealed_text` made.
        mend: what to do about damage; default to restore it or to make it again.

    Raises:
        FileNotFoundError: if it is not there.
        RelishError: of the type `error`, if it cannot be read, is damaged, is something else, or is of another version.
    """
    mend = mend or f"restore it from a copy, or {again}"
    try:
        text = path.read_bytes().decode("utf-8")
        value: Any = json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read ({reason}); {mend}") from None
    if not isinstance(value, dict) or value.get("format") != format:
        raise error(f"{path} is not that of a {format}")
    if value.get("version") != version:
        raise error(
            f"the {format} {path.parent} has format version {value.get('version')!r}, and this relish reads version "
            f"{version}; install the relish that wrote it, or {again}"
        )
    if sealed:
        body = text.rpartition(_SEAL)[0]
        if text != f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n':
            raise error(f"{path} is not as relish wrote it: it was edited or damaged; {mend}")
        del value["sha256"]
    return value
