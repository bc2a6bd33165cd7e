"""Rows of data: from lists, tables and files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amortlm.errors import DataError, nearest

if TYPE_CHECKING:
    from amortlm.types import Row

FIELD_LIMIT = 2**31 - 1  # characters of a CSV field; long documents exceed Python's default of 131,072


def as_rows(data: Any, what: str = "data") -> list[dict[str, Any]]:
    """The rows of a list of mappings, a `datasets.Dataset`, a DataFrame (pandas, polars) or an Arrow table.

    Raises DataError, with a remedy, for anything else (splits, a stream, a mapping of columns, a path), and if there
    are no rows.
    """
    if isinstance(data, str | bytes | Path):
        raise DataError(
            f"{what} is a text or a path; give rows, [{{column: value, ...}}, ...]: "
            f"amortlm.data.load_rows({str(data)!r}) reads a file"
        )
    if is_row(data):
        as_row(data, what)  # splits raise their own error
        raise DataError(
            f"{what} is one mapping; give a list of rows, [{{column: value, ...}}, ...], or "
            "datasets.Dataset.from_dict(...) of a mapping of columns"
        )
    for method in ("to_dicts", "to_pylist"):  # polars, Arrow
        if hasattr(data, method):
            data = getattr(data, method)()
    if hasattr(data, "iloc"):  # pandas
        _refuse_repeated(data.columns, what)
        data = data.to_dict("records")
    if isinstance(data, Iterable) and not hasattr(data, "__len__"):
        raise DataError(
            f"{what} is a stream ({type(data).__name__}), but rows are read more than once: give list(...) of the "
            "stream, or of its first rows (itertools.islice, .take(n))"
        )
    if not isinstance(data, Iterable) and hasattr(data, "__getitem__"):  # torch
        data = [data[i] for i in range(len(data))]
    if not isinstance(data, Iterable):
        raise DataError(
            f"{what} has no rows; give a list with a mapping of column to value for each row, not {_shown(data)}"
        )
    rows = [as_row(row, f"{what}: row {i}") for i, row in enumerate(data)]
    if not rows:
        raise DataError(f"{what} is empty: give at least one row")
    return rows


def as_row(row: Any, what: str = "the row") -> dict[str, Any]:
    """A mapping or a Series as a dict. Raises DataError for anything else, and for column names that are not text."""
    if not is_row(row):
        raise DataError(f"{what} is {_shown(row)}, not a mapping of column to value")
    if not isinstance(row, Mapping):
        _refuse_repeated(row.index, what)
        row = row.to_dict()
    splits = [name for name, part in row.items() if hasattr(part, "column_names")]
    if splits:
        raise DataError(
            f"{what} contains the splits {', '.join(map(repr, splits))}: give one, dataset[{splits[0]!r}]"
        )
    for name in row:
        if not isinstance(name, str):
            raise DataError(
                f"{what} has a column named {name!r}, not text: rename it, e.g. to 'column_{name}'"
            )
    return dict(row)


def rows_or_row(data: Any, what: str = "rows") -> list[dict[str, Any]]:
    """The rows of `as_rows`, or the only row where `data` is one row."""
    return as_rows([data] if is_row(data) else data, what)


def is_row(data: Any) -> bool:
    """Is `data` one row (a mapping or a Series) rather than rows?"""
    return isinstance(data, Mapping) or (
        hasattr(data, "to_dict") and hasattr(data, "index") and not _is_table(data)
    )


def _is_table(data: Any) -> bool:
    return hasattr(data, "columns")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 and "\n" not in text else f"a {type(value).__name__}"


def _refuse_repeated(names: Iterable[Any], what: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"{what} has more than one column {repeated[0]!r}: rename or drop all but one")


def check_rows(
    rows: Sequence[Row], columns: set[str], what: str, why: str = ", which a template uses"
) -> None:
    """Raise DataError unless every row has `columns`."""
    for i, row in enumerate(rows):
        missing = columns - set(row)
        if missing:
            name = min(missing)
            raise DataError(
                f"{what}: row {i} has no column {name!r}{why}; " + nearest(name, map(str, row), "It has")
            )


# Files


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json, .csv or .tsv file in UTF-8. Raises DataError naming the file and line."""
    path = Path(path)
    readers = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": lambda text: _table(text, ","),
        ".tsv": lambda text: _table(text, "\t"),
    }
    if path.suffix not in readers:
        raise DataError(
            f"data file {path}: use .jsonl, .json, .csv or .tsv; datasets.load_dataset reads other kinds, and its "
            ".to_json('rows.jsonl') writes one of these"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise DataError(f"cannot read data file {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(
            f"data file {path} is not UTF-8 text (line {line}): save it as UTF-8, e.g. "
            f"iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    try:
        return as_rows(readers[path.suffix](text), f"data file {path}")
    except _LineError as e:
        raise DataError(f"data file {path}, line {e.line}: {e}") from None


class _LineError(ValueError):
    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON text may hold U+2028
        if line.strip():
            row = _json(line, number)
            if not isinstance(row, dict):
                raise _LineError(number, f"{_shown(row)} is not an object of column to value")
            rows.append(row)
    return rows


def _json(text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        raise _LineError(first_line + e.lineno - 1, f"not JSON: {e.msg} (column {e.colno})") from None
    except (ValueError, RecursionError) as e:
        raise _LineError(first_line, f"not JSON: {e}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has {repeated!r} more than once")
    return found


def _table(text: str, delimiter: str) -> list[dict[str, Any]]:
    """The lines after a header, all values as text; None for the missing values of a short line."""
    # Strict: a quote that is never closed would swallow the rest of the file.
    reader = csv.DictReader(StringIO(text), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        rows = list(_lines(reader))
    except csv.Error as e:
        raise _LineError(reader.line_num + 1, f"{e}; inside a quoted value, write a quote twice") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _lines(reader: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    repeated = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
    if repeated:
        raise _LineError(reader.line_num, f"the header has more than one column {repeated[0]!r}")
    for row in reader:
        if None in row:
            raise _LineError(reader.line_num, "more values than the header has columns")
        yield row
