"""From rows to examples: which column is what, and every cell checked before the LLM sees the first text."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from reprlib import repr as short

import numpy as np

from ..cache.errors import DataError
from ..cache.exact import exact
from .prompt import fill, prompt_fields
from .tasks import Task

_TARGET_NAMES = (
    "score",
    "label",
    "labels",
    "target",
    "rating",
    "mean",
    "relatedness_score",
    "similarity_score",
    "stars",
    "grade",
    "reward",
    "y",
)
_ID_NAMES = ("id", "pair_id", "segid", "sample_id", "guid", "uid", "idx", "index")
_TEXT_NAMES = ("text", "sentence", "content", "review", "document", "tweet", "essay", "answer", "comment")


@dataclass(frozen=True)
class Columns:
    """Which column of the rows plays which part."""

    texts: dict[str, str]
    """For each field of the prompt, the column that holds its text."""

    target: str | None
    """The column of the gold score; None for rows without labels."""

    id: str | None
    """The column of the id; None to number the rows from 0."""


# eq=False: comparing arrays with == gives no single answer; compare fingerprints.
@dataclass(frozen=True, eq=False)
class SplitData:
    """The N examples of one split, in the order of their rows."""

    ids: list[str]
    """The user's ids, or the rows' positions from 0. They may repeat."""

    texts: list[str]
    """The filled prompts."""

    targets: np.ndarray
    """float64 (N,), the gold scores in the unit of the data; NaN where a row is unlabelled."""

    def fingerprint(self) -> str:
        """Hash every id, text and target in their order: SHA-256, as 64 hex digits."""
        digest = hashlib.sha256()
        for row_id, text, target in zip(self.ids, self.texts, self.targets.tolist(), strict=True):
            line = json.dumps([row_id, text, None if math.isnan(target) else target])
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> list[str]:
    """Of each text the first 12 hex digits of its SHA-256: enough to find the texts that two splits share."""
    return [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]


def resolve_columns(
    available: Sequence[str],
    *,
    prompt: str,
    task: Task | None = None,
    target_column: str | None = None,
    id_column: str | None = None,
    need_target: bool = True,
    source: str = "the data",
) -> Columns:
    """Find out which column is what.

    A column given by name is taken. Otherwise the task's candidates decide; without a task the prompt's fields are
    column names, and target and id are guessed from the usual names, whatever their case.

    Args:
        available: the columns that the rows have.
        prompt: the template whose fields need a column each.
        need_target: whether it is an error that no target is found; if not, an unclear guess gives None as well.
        source: what to call the data in messages, such as "train.csv".

    Raises:
        DataError: if a column is missing, or the target is not clear.
    """
    texts = {field: _text_column(field, available, task, source) for field in prompt_fields(prompt)}
    given = {"--target-column": target_column, "--id-column": id_column}
    for option, column in given.items():
        if column is not None and column not in available:
            raise DataError(f"{option} names the column {column!r}, but {_has(source, available)}")

    taken = {*texts.values(), id_column}
    target = target_column
    if target is None:
        found = _candidates(available, _TARGET_NAMES, task and task.target, taken)
        if need_target and len(found) != 1 and (task is None or not found):
            looked_for = ", ".join(task.target if task else _TARGET_NAMES)
            problem = f"several may be the target ({', '.join(found)})" if found else f"none is called {looked_for}"
            raise DataError(f"{_has(source, available)}; {problem}: name it with --target-column")
        target = found[0] if found and (task or len(found) == 1) else None

    row_id = id_column
    if row_id is None:
        row_id = next(iter(_candidates(available, _ID_NAMES, task and task.id, {*texts.values(), target})), None)
    return Columns(texts=texts, target=target, id=row_id)


def guess_text_column(available: Sequence[str], *, source: str = "the data") -> str:
    """Find the one column that holds the text, by the usual names, when no prompt says which.

    Raises:
        DataError: if no column, or more than one, has such a name.
    """
    found = _candidates(available, _TEXT_NAMES, None, set())
    if len(found) != 1:
        problem = f"several may be the text ({', '.join(found)})" if found else "none has a usual name for the text"
        raise DataError(f"{_has(source, available)}; {problem}: name it with --prompt, such as --prompt '{{text}}'")
    return found[0]


def load_split(
    rows: Iterable[Mapping[str, object]],
    columns: Columns,
    prompt: str,
    *,
    source: str,
    label_range: tuple[float, float] | None,
) -> SplitData:
    """Check every row and fill the prompt with it.

    A blank or missing target is an unlabelled row. Texts stay exactly as they are, white space included.

    Args:
        source: what to call the data in messages, such as "train.csv".
        label_range: the least and the greatest target allowed, both included; None allows every finite number.

    Raises:
        DataError: naming the row (counted from 0, the header aside) and the column, if a text is empty, missing, no
            text or not encodable as UTF-8, if a target is not a finite number or outside the range, or if an id is
            missing or cannot be stored; or if there are no rows.
    """
    ids: list[str] = []
    texts: list[str] = []
    targets: list[float] = []
    for number, row in enumerate(rows):
        where = f"row {number} of {source}"
        texts.append(fill_row(row, columns, prompt, where=where))
        targets.append(math.nan if columns.target is None else _target(row, columns.target, where, label_range))
        ids.append(str(number) if columns.id is None else _id(row, columns.id, where))
    if not texts:
        raise DataError(f"{source} has no rows")
    return SplitData(ids=ids, texts=texts, targets=np.array(targets, dtype=np.float64))


def fill_row(row: Mapping[str, object], columns: Columns, prompt: str, *, where: str) -> str:
    """Fill the prompt with one row's texts.

    Args:
        where: what to call the row in messages, such as "row 17 of train.csv".

    Raises:
        DataError: naming the row and the column, if a text is empty, missing, no text or not encodable as UTF-8.
    """
    return fill(prompt, {field: _text(row, column, where) for field, column in columns.texts.items()})


def check_utf8(text: str, column: str, where: str) -> None:
    """Refuse a text that UTF-8 cannot encode, as JSON's escapes allow.

    Args:
        text: the text.
        column: where it stands.
        where: what to call the row in messages.

    Raises:
        DataError: naming the row and the column.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds {text[error.start]!r} in column {column!r}, half of a surrogate pair, which is no character"
        ) from None


def label_range_of(targets: np.ndarray) -> tuple[float, float]:
    """Take the least and the greatest of the targets, NaN left aside.

    Args:
        targets: float64 (N,), NaN where unlabelled.

    Raises:
        DataError: if no target is left, or all of them are equal.
    """
    labelled = targets[~np.isnan(targets)]
    if labelled.size == 0:
        raise DataError("no row has a target, so there is no label range; give one with --label-range")
    low, high = float(labelled.min()), float(labelled.max())
    if low == high:
        raise DataError(f"every target is {low:g}, so there is no label range; give one with --label-range")
    return low, high


def _text_column(field: str, available: Sequence[str], task: Task | None, source: str) -> str:
    if task is None or field not in task.fields:
        if field in available:
            return field
        raise DataError(f"the prompt names the column {field!r}, but {_has(source, available)}")
    names = task.fields[field]
    for name in names:
        if name in available:
            return name
    raise DataError(
        f"the task {task.name} reads {field!r} from the column {' or '.join(map(repr, names))}, "
        f"but {_has(source, available)}"
    )


def _candidates(
    available: Sequence[str], usual: Sequence[str], of_task: Sequence[str] | None, taken: set[str | None]
) -> list[str]:
    free = [name for name in available if name not in taken]
    if of_task is not None:
        return [name for name in of_task if name in free]
    return [name for one in usual for name in free if name.strip().lower() == one]


def _has(source: str, available: Sequence[str]) -> str:
    return f"{source} has: {', '.join(available)}"


def _is_missing(cell: object) -> bool:
    return cell is None or type(cell).__name__ == "NAType"  # pandas', which is unlike itself and neither true nor false


def _is_blank(cell: object) -> bool:
    return _is_missing(cell) or (isinstance(cell, str) and not cell.strip())


def _text(row: Mapping[str, object], column: str, where: str) -> str:
    cell = row.get(column)
    if _is_missing(cell):
        raise DataError(f"{where} has no text in column {column!r}")
    if not isinstance(cell, str):
        raise DataError(f"{where} has {short(cell)} in column {column!r}, which is not text")
    if not cell.strip():
        raise DataError(f"{where} has an empty text in column {column!r}")
    check_utf8(cell, column, where)
    return cell


def _target(row: Mapping[str, object], column: str, where: str, label_range: tuple[float, float] | None) -> float:
    cell = row.get(column)
    if _is_blank(cell):
        return math.nan
    value = _number(cell)
    if value is None or (math.isnan(value) and isinstance(cell, str)):
        raise DataError(
            f"{where} has the target {short(cell)} in column {column!r}, which is not a number; "
            "leave the cell blank if the row has no label"
        )
    if math.isinf(value):
        raise DataError(f"{where} has the target {short(cell)} in column {column!r}, which is not finite")
    if label_range is not None and not math.isnan(value) and not label_range[0] <= value <= label_range[1]:
        raise DataError(
            f"{where} has the target {exact(value)} in column {column!r}, outside the label range "
            f"[{exact(label_range[0])}, {exact(label_range[1])}]; if the target is right, give its range with "
            "--label-range, in a new folder if the cache has another one"
        )
    return value


def _number(cell: object) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, (str, Real, Decimal)):
        return None
    # float() reads "1_000" as Python source does; in a table it is a slip.
    if isinstance(cell, str) and "_" in cell:
        return None
    try:
        return float(cell)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _id(row: Mapping[str, object], column: str, where: str) -> str:
    cell = row.get(column)
    if isinstance(cell, Real) and not isinstance(cell, Integral) and float(cell).is_integer():
        cell = int(float(cell))
    if _is_blank(cell) or cell != cell:
        raise DataError(f"{where} has no id in column {column!r}; fill it, or name another one with --id-column")
    if not isinstance(cell, (str, Real, Decimal)):
        raise DataError(f"{where} has {short(cell)} in column {column!r}, which is neither text nor a number")
    row_id = str(cell)
    if "\0" in row_id:
        raise DataError(f"{where} has an id with a NUL character in column {column!r}, which HDF5 cannot store")
    check_utf8(row_id, column, where)
    return row_id
