"""The small JSON files of this package: a version in each, and a seal that shows any later change."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .errors import RelishError
from .fileio import read_whole

_SEAL = ',\n  "sha256": "'


def sealed_text(value: dict[str, Any]) -> str:
    """JSON, indented for people, whose last field `sha256` is the hash of all the text before it; NaN is refused."""
    body = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    # A path of bytes that are no UTF-8 holds half surrogates, which only an escape can write.
    return _sealed(re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", body))


def read_versioned(
    path: Path,
    *,
    format: str,
    version: int,
    again: str,
    error: type[RelishError],
    damaged: type[RelishError] | None = None,
    sealed: bool = False,
    mend: str | None = None,
) -> dict[str, Any]:
    """Read a JSON object that says its format and version.

    A seal is the same in every version, and looked at first: a bit that flips in `format` or `version` is damage too.

    Args:
        path: the file; messages call its folder by the format's name.
        format: what its field "format" must be, such as "relish cache".
        version: what its field "version" must be.
        again: how to make it anew, to end a message: "extract again".
        error: the type of error to raise.
        damaged: the type of error to raise for damage; default `error`.
        sealed: whether it must be, byte for byte, what `sealed_text` made.
        mend: what to do about damage; default to restore it or to make it again.

    Raises:
        FileNotFoundError: if it is not there.
        RelishError: of the type `error`, if it cannot be read, is damaged, is something else, or is of another version.
    """
    mend = mend or f"restore it from a copy, or {again}"
    damaged = damaged or error
    try:
        text = read_whole(path).decode("utf-8")
        value: Any = json.loads(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as reason:
        why = (isinstance(reason, OSError) and reason.strerror) or reason
        raise damaged(f"{path} cannot be read ({why}); {mend}") from None
    whole = not sealed or text == _sealed(text.rpartition(_SEAL)[0])
    broken = damaged(f"{path} is not as relish wrote it: it was edited or damaged; {mend}")
    if isinstance(value, dict) and "sha256" in value and not whole:
        raise broken
    if not isinstance(value, dict) or value.get("format") != format:
        raise error(f"{path} is not that of a {format}")
    if value.get("version") != version:
        raise error(
            f"the {format} {path.parent} has format version {value.get('version')!r}, and this relish reads version "
            f"{version}; install the relish that wrote it, or {again}"
        )
    if not whole:
        raise broken
    if sealed:
        del value["sha256"]
    return value


def _sealed(body: str) -> str:
    return f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
