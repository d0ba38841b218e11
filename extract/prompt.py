"""Prompt templates: `{name}` stands for the text of the field or column of that name, `{{` and `}}` for braces.

A name may hold spaces and dots: `{translation.en}` is the column called "translation.en", never an attribute.
"""

from collections.abc import Iterator, Mapping
from string import Formatter

from ..cache.errors import DataError


def prompt_fields(template: str) -> tuple[str, ...]:
    """Name the fields of a template, each once, in the order of their first use.

    Raises:
        DataError: if the template has no field, an empty one, one with a format (`{x:>8}`, `{x!r}`), unpaired braces,
            or text that UTF-8 cannot encode.
    """
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the prompt {template!r} holds {template[error.start]!r}, half of a surrogate pair, which is no "
            "character: give it as UTF-8"
        ) from None
    fields = tuple(dict.fromkeys(field for _, field in _pieces(template) if field is not None))
    if not fields:
        raise DataError(f"the prompt {template!r} has no field; put the text's column in braces, such as {{text}}")
    return fields


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put the values in the fields' places. Braces inside a value are text.

    Raises:
        DataError: if the template is malformed.
        KeyError: if `values` lacks a field.
    """
    return "".join(literal if field is None else f"{literal}{values[field]}" for literal, field in _pieces(template))


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"the prompt {template!r} is malformed: {error}; write {{{{ and }}}} for braces that are text"
        ) from None
    for literal, field, spec, conversion in pieces:
        if field is not None and not field.strip():
            raise DataError(f"the prompt {template!r} has an empty field {{}}; name the column in the braces")
        if spec or conversion:
            raise DataError(
                f"the prompt {template!r} has a format in the field {field!r}; write {{{field}}} without ':' or '!'"
            )
        yield literal, field
