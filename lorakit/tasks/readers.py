"""Files to rows, line by line; a malformed row is an error naming the file, the line and what was expected."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, retold

LONGEST = 2**31 - 1  # characters of a field
QUOTED = 'a text that begins with a quote to end with one, those inside doubled ("a ""b"" c")'
AT_ONCE = 1024  # rows of a Parquet file in memory


def bad_row(path: Path, line: int, expected: str, found: object) -> DataError:
    return DataError(f"{path}, line {line}: expected {expected}; found {found!r:.100}")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file (with or without byte-order mark) without their line end.

    Only LF and CRLF end a line: real text has other separators inside its lines.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:  # UTF-16, or a hole that a crash left
                raise bad_row(path, number, "UTF-8 text without NUL", raw) from None
            yield number, text.removesuffix("\n").removesuffix("\r")


def tsv(path: Path, columns: Sequence[str], header: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Rows of a tab-separated file without quoting; with `header`, its first line must be `columns`.

    Blank lines may stand at the end, nowhere else.
    """
    table = list(lines(path))
    while table and not table[-1][1].strip():
        table.pop()
    shape, index, line = f"{len(columns)} tab-separated columns {', '.join(columns)}", 0, 0
    for index, (line, text) in enumerate(table, start=0 if header else 1):
        values = text.split("\t")
        if index == 0 and values != list(columns):
            raise bad_row(path, line, f"a header line with {shape}", values)
        if len(values) != len(columns):
            raise bad_row(path, line, shape, values)
        if index:
            yield line, values
    if not index:
        raise bad_row(path, line + 1, shape, "no rows" if line else "an empty file")


def csv_rows(path: Path, delimiter: str = ",", columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a file with quoting and a header line, value by column; the number is the row's last line.

    A line's end inside quotes is read as LF, CRLF too. Blank lines are skipped. Where tabs part the columns, quotes
    around tabs and lines' ends together, and in a file of one column around lines' ends, are refused: they are a text's
    own, and would swallow the rows between them.

    Args:
        columns: what the header must have; it may have others.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    rows = csv.reader((line + "\n" for _, line in lines(path)), delimiter=delimiter, strict=True)
    shape, header, found, last = f"a header line of different columns {', '.join(columns)}".rstrip(), [], False, 0
    try:
        for values in filter(None, rows):
            if delimiter == "\t" and any("\n" in text and ("\t" in text or len(values) == 1) for text in values):
                at, told = rows.line_num - "".join(values).count("\n"), "a quote that opens here closes later"
                raise bad_row(path, at, f"no line end in a text of one column or with a tab: {told}", values)
            if header and len(values) != len(header):
                raise bad_row(path, rows.line_num, f"{len(header)} columns {', '.join(header)}", values)
            if header:
                yield rows.line_num, dict(zip(header, values, strict=True))
            elif not all(values) or len({*values}) < len(values) or not {*columns} <= {*values}:
                raise bad_row(path, rows.line_num, shape if all(values) else "a name for every column", values)
            header, found, last = header or values, bool(header), rows.line_num
    except csv.Error as error:
        raise bad_row(path, rows.line_num, QUOTED, f"{error}; good to line {last}") from None
    if not found:
        raise bad_row(path, rows.line_num + 1, shape, "no rows" if header else "an empty file")


def jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a file with one JSON value a line; blank lines are skipped."""
    number, rows = 0, 0
    for number, text in lines(path):
        if text.strip():
            try:
                value = json.loads(text)
                if "\\ud" in text.lower():  # half a character passes for text until it is tokenised
                    json.dumps(value, ensure_ascii=False).encode()
            except (ValueError, RecursionError):  # also of numbers of thousands of digits
                raise bad_row(path, number, "one JSON value of Unicode text", text) from None
            rows += 1
            yield number, value
    if not rows:
        raise bad_row(path, number + 1, "one JSON value", "no rows")


def parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    """The values of `columns` in each row of a Parquet file, numbered from 1; of none, whole rows, value by column.

    Raises:
        DataError: not a Parquet file, or a column is missing.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    broken = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    with retold(broken, DataError, f"{path}: not a Parquet file, or one that cannot be read"):
        file = ParquetFile(path)
        names = file.schema_arrow.names
        if missing := {*columns} - {*names}:
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(names)}")
        batches = file.iter_batches(AT_ONCE, columns=list(columns) or None)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(([row[name] for name in columns] if columns else row for row in rows), start=1)
