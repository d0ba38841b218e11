"""Rows of a CSV, TSV, JSONL or Parquet file, or of a data set at the Hugging Face hub, one dict a row.

Cells of CSV and TSV stay the text they are: "NA", "null" and "007" are never turned into anything else.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..cache.errors import DataError, require_extra

# The most that a C long holds on every platform; beyond it csv raises OverflowError on Windows.
_LONGEST_CELL = 2**31 - 1

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps a data set as Parquet that its repository has only a script for: datasets 4 and later
runs no scripts."""

_QUOTED_CELL = re.compile(r'(?<![^\t])"[^"]*(?:""[^"]*)*"(?=\t|\r?\n?\Z)')


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, object]]:
    """Stream the rows of a file; its suffix tells the format.

    CSV and TSV need a header line and give `str` cells; JSONL and Parquet give the values they hold. Text is UTF-8,
    with or without a byte order mark. Blank lines are skipped. A TSV is read with quoting only if it was written with
    quoting throughout; otherwise, as in WMT's files, quote characters are text.

    Raises:
        DataError: at the call, if the file is absent, a directory, empty or of another format; while reading, if a line
            is not UTF-8, not of the format, or has another number of cells than the header.
        MissingExtraError: if the file is Parquet and pyarrow is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a file of rows")
    if not path.exists():
        raise DataError(f"{path} does not exist")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has a suffix that is not supported; supported are {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return reader(path)


def read_hub(
    dataset_id: str, split: str, config: str | None = None, revision: str | None = None
) -> Iterator[dict[str, object]]:
    """Load one split of a data set at the hub and iterate over its rows.

    Nested columns are flattened: `{"translation": {"en": …}}` gives the column "translation.en".

    Raises:
        DataError: if the hub cannot be reached, or has no such data set, revision, config or split.
        MissingExtraError: if the package datasets is not installed.
    """
    datasets = require_extra("datasets", "hub", "Reading a data set from the hub")
    with _hub_failures(f"split {split!r} of the data set {_name(dataset_id, config)}"):
        return iter(datasets.load_dataset(dataset_id, config, split=split, revision=revision).flatten())


def hub_splits(dataset_id: str, config: str | None = None, revision: str | None = None) -> list[str]:
    """Name the splits that a data set has at the hub.

    Raises:
        DataError: if the hub cannot be reached, or has no such data set, revision or config.
        MissingExtraError: if the package datasets is not installed.
    """
    datasets = require_extra("datasets", "hub", "Reading a data set from the hub")
    with _hub_failures(f"the splits of the data set {_name(dataset_id, config)}"):
        return list(datasets.get_dataset_split_names(dataset_id, config, revision=revision))


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[dict[str, object]]:
    # The limit is the csv module's own and shared, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with _opened(path, newline="") as handle:
        yield from _under_header(path, _csv_records(path, handle, delimiter))


def _read_tsv(path: Path) -> Iterator[dict[str, object]]:
    if _is_quoted_tsv(path):
        yield from _read_csv(path, "\t")
        return
    with _opened(path, newline="\n") as handle:
        yield from _under_header(path, _unquoted_records(handle))


def _read_jsonl(path: Path) -> Iterator[dict[str, object]]:
    # Read twice: a key that the first rows lack, such as the score of an unlabelled row, is a column all the same.
    columns = dict.fromkeys(key for row in _json_rows(path) for key in row)
    for row in _json_rows(path):
        yield {**columns, **row}


def _json_rows(path: Path) -> Iterator[dict[str, object]]:
    with _opened(path, newline="\n") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield _json_object(path, number, line)


def _read_parquet(path: Path) -> Iterator[dict[str, object]]:
    pyarrow = require_extra("pyarrow", "extract", "Reading a Parquet file")
    parquet = require_extra("pyarrow.parquet", "extract", "Reading a Parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            _check_header(path, file.schema_arrow.names)
            for batch in file.iter_batches():
                yield from _without_times(pyarrow, batch).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None


def _without_times(pyarrow: Any, batch: Any) -> Any:
    """Times as text: Python's own have no nanoseconds and end with the year 9999."""
    kinds = pyarrow.types
    for place, field in enumerate(batch.schema):
        if kinds.is_timestamp(field.type) or kinds.is_time(field.type) or kinds.is_date(field.type):
            batch = batch.set_column(place, field.name, batch.column(place).cast(pyarrow.string()))
        elif kinds.is_duration(field.type):
            batch = batch.set_column(place, field.name, batch.column(place).cast(pyarrow.int64()))
    return batch


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _csv_records(path: Path, handle: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # strict: an unclosed quote would otherwise swallow the rest of the file into one cell without a word.
    reader = csv.reader(handle, delimiter=delimiter, strict=True)
    first_line = 1
    try:
        for cells in reader:
            yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: the row at line {first_line} has broken quoting: {error}") from None


def _unquoted_records(handle: TextIO) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(handle, 1):
        content = line.removesuffix("\n").removesuffix("\r")
        yield number, content.split("\t") if content else []


def _is_quoted_tsv(path: Path) -> bool:
    """Tell whether a program that quotes cells wrote this TSV.

    Such a program quotes every cell that holds a quote, so a stray quote outside a well-formed quoted cell, or a row
    whose cells no longer match the header's in number, shows that quotes are text here.
    """
    quoted = False
    tabs = None
    record: list[str] = []
    odd = False
    with _opened(path, newline="\n") as handle:
        for line in handle:
            record.append(line)
            odd ^= line.count('"') % 2 == 1
            if odd:
                continue
            rest, cells = _QUOTED_CELL.subn("", "".join(record))
            record.clear()
            quoted = quoted or cells > 0
            tabs = rest.count("\t") if tabs is None else tabs
            blank = not cells and not rest.strip("\r\n")
            if '"' in rest or (not blank and rest.count("\t") != tabs):
                return False
    return quoted and not odd


def _under_header(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[dict[str, object]]:
    records = iter(records)
    _, header = next(records, (1, []))
    _check_header(path, header)
    for line, cells in records:
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}: the row at line {line} has a wrong number of cells: "
                f"expected {len(header)} as in the header, got {len(cells)}"
            )
        yield dict(zip(header, cells, strict=True))


def _check_header(path: Path, names: list[str]) -> None:
    if not any(name.strip() for name in names):
        raise DataError(f"{path} has no header: its first line must name the columns")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has more than one column named {', '.join(map(repr, repeated))}")


def _json_object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: line {number} is JSON that is nested too deeply to be read") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: line {number} is not a JSON object, but a {type(value).__name__}")
    return value


@contextmanager
def _opened(path: Path, newline: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as handle:
            yield handle
    except UnicodeDecodeError:
        with path.open("rb") as binary:
            number = next((number for number, line in enumerate(binary, 1) if not _is_utf8(line)), 1)
        raise DataError(f"{path}: line {number} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _hub_failures(wanted: str) -> Iterator[None]:
    try:
        yield
    # Offline, gated, misspelt, script-based …: each has its own class, from four packages and many of their versions.
    except Exception as error:
        what = _first_line(error)
        way_out = ""
        if what.startswith("Dataset scripts are no longer supported"):
            way_out = f"; --hub-revision {CONVERTED} takes what the hub itself made of it, where it did"
        raise DataError(f"the hub did not give {wanted}: {what}{way_out}") from error


def _name(dataset_id: str, config: str | None) -> str:
    return repr(dataset_id) if config is None else f"{dataset_id!r} (config {config!r})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
