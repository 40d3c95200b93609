"""CSV, JSONL and Parquet as streams of records, each read without guessing.

CSV is RFC 4180: commas, quotes doubled inside quotes, line breaks allowed inside quotes.  JSONL is one object a line.
Text is UTF-8, with or without a byte order mark.  Memory is bounded by one row (Parquet: 1,024 rows).
A record is (line, values by column): for CSV the line of the file where the row starts, else the row's number from 1.
A folder of part-* files, as Spark writes one, is a table: its parts one behind the other, by name.
"""
from __future__ import annotations

import codecs
import csv
import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minilora.errors import DataError, OutputError

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
CELL_LIMIT = 16 << 20        # characters in one CSV cell; the csv module's own limit is 131,072
LINE_LIMIT = 4 * CELL_LIMIT  # characters in one line: bounds memory on a file that isn't text
PARQUET_ROWS = 1024          # rows in memory at once
DEEPEST = 200                # lists within lists in one record
NAME_LIMIT = 40              # characters of a column name that a message may quote
_SURROGATE = re.compile("[\ud800-\udfff]")

Record = tuple[int, dict[str, Any]]


class Number(str):
    """A number of a JSON file, as it is written there."""


def table_format(path: Path, format: str | None, error: type[DataError] | type[OutputError] = DataError) -> str:
    """Return "csv", "jsonl" or "parquet": `format`, or what the suffix names; else raise `error`."""
    kind = format or FORMATS.get(path.suffix.lower())
    if kind is None or kind not in FORMATS.values():
        unknown = f"unknown format {format!r}" if format else f"unknown suffix {path.suffix!r}"
        raise error(f"{path}: {unknown} for a table; supported: {', '.join(FORMATS)}")
    return kind


def records(path: Path, kind: str) -> Iterator[Record]:
    """Return a stream of the records of a table of format `kind`; values of CSV are str, of the others what they hold.

    Raises:
        DataError: the file is missing, empty, not UTF-8, has no rows or is malformed, with the row (while reading).
    """
    read = {"csv": _csv_records, "jsonl": _jsonl_records, "parquet": _parquet_records}[kind]
    if path.is_dir():
        parts = sorted(path.glob("part-*"))
        if not parts:
            raise DataError(f"{path} is a folder; name a file")
        return _joined(path, [read(part, True) for part in parts])
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    return read(path, False)


def _joined(path: Path, parts: Iterable[Iterator[Record]]) -> Iterator[Record]:
    """The records of all parts, of which some may be empty but not all."""
    number = 0
    for part in parts:
        for record in part:
            number += 1
            yield record
    if number == 0:
        raise DataError(f"{path} has no rows; add some")


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, a byte order mark dropped.

    Raises:
        DataError: the file cannot be read, has NUL bytes, or is not UTF-8 (names the byte, the line and the remedy).
    """
    try:
        # Trap: without newline="" a "\r\n" inside a quoted cell would come back as "\n".
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT), ""), start=1):
                if "\0" in line:
                    raise DataError(f"{path} line {number} contains a NUL byte; save the file as UTF-8 text (it may be "
                                    "UTF-16, or damaged)")
                if len(line) == LINE_LIMIT:
                    raise DataError(f"{path} line {number} has over {LINE_LIMIT:,} characters; is this a text file?")
                yield line
    except UnicodeDecodeError as error:
        offset, line_number, encoding = _bad_byte(path)
        raise DataError(f"{path} is not UTF-8 at byte {offset} (line {line_number}); convert it, for example: "
                        f"iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}") from error
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}; check the path and permissions") from error


def _bad_byte(path: Path) -> tuple[int, int, str]:
    """Return the offset and line of the first byte that is not UTF-8, and the likely encoding.

    Trap: the text layer decodes ahead in chunks and reports offsets within a chunk, so the file is scanned again.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    fed, lines, pending, encoding = 0, 1, b"", "WINDOWS-1252"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            if fed == 0 and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding = "UTF-16"
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                lines += (pending + chunk)[:error.start].count(b"\n")
                return fed - len(pending) + error.start, lines, encoding
            fed, lines, pending = fed + len(chunk), lines + chunk.count(b"\n"), decoder.getstate()[0]
    return fed - len(pending), lines, encoding                # the file ends inside a character


def shown(name: str) -> str:
    """Return a column name for a message.  Trap: in a file without header line the "names" are a patient's cells."""
    return repr(name) if len(name) <= NAME_LIMIT else f"(a name of {len(name)} characters)"


def _unique(where: str, names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DataError(f"{where}: duplicate column {shown(twice)}; give every column its own name")
    return names


def _csv_records(path: Path, may_be_empty: bool) -> Iterator[Record]:
    # strict: an unclosed quote would otherwise swallow the rest of the file into one cell without a word.
    reader = csv.reader(text_lines(path), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        start = reader.line_num + 1
        # Trap: the limit is global to the csv module, and a generator may sleep between rows: set it per row.
        limit = csv.field_size_limit(CELL_LIMIT)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = (f"a cell has over {CELL_LIMIT:,} characters; is a quote never closed?" if "limit" in str(error)
                      else f"quotes are wrong: {error}; inside a quoted cell a quote is written twice")
            raise DataError(f"{path} row {number + 1} (line {start}): {reason}") from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            break
        if not cells:
            continue                                          # a blank line
        if header is None:
            header = _unique(str(path), [name.strip() for name in cells])
            continue
        number += 1
        if len(cells) != len(header):
            raise DataError(f"{path} row {number} (line {start}) has {len(cells)} cells, the header {len(header)}; put "
                            "quotes around a cell that contains a comma")
        yield start, dict(zip(header, cells, strict=True))
    if header is None and not may_be_empty:
        raise DataError(f"{path} is empty; it needs a header line and rows")
    if number == 0 and not may_be_empty:
        raise DataError(f"{path} has a header but no rows; add rows below it")


def _jsonl_records(path: Path, may_be_empty: bool) -> Iterator[Record]:
    number = 0

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = _unique(f"{path} row {number}", [_SURROGATE.sub("\ufffd", key) for key, _ in items])
        return dict(zip(names, (value for _, value in items), strict=True))

    # Numbers stay as they are written: 1.0 must not come out as 1, nor a long id as 1e20.
    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_int=Number, parse_float=Number, parse_constant=lambda _: None)
    for number, line in enumerate((line.strip() for line in text_lines(path) if line.strip()), start=1):
        try:
            record = decoder.decode(line)
            for value in record.values() if isinstance(record, dict) else ():
                if isinstance(value, (list, dict)):
                    _as_json(value)         # too deep for that is refused here, where the row is known
        except json.JSONDecodeError as error:
            raise DataError(f"{path} row {number} is not JSON: {error.msg} at character {error.pos + 1}; write one "
                            "object a line") from error
        except RecursionError as error:
            raise DataError(f"{path} row {number} is nested too deep; write text or numbers as values") from error
        if not isinstance(record, dict):
            raise DataError(f'{path} row {number} is not a JSON object; write {{"column": "text"}} on every line')
        # Trap: "\ud83d" alone is legal JSON and no legal text; written out again it would stop the program.
        yield number, {key: _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value
                       for key, value in record.items()}
    if number == 0 and not may_be_empty:
        raise DataError(f"{path} is empty; write one JSON object a line")


def import_pyarrow() -> Any:
    """Return the pyarrow module with pyarrow.parquet loaded, an optional dependency.

    Raises:
        DataError: it is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install 'minilora[spark]', or use CSV or JSONL") from error


def _parquet_records(path: Path, may_be_empty: bool) -> Iterator[Record]:
    pyarrow = import_pyarrow()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _unique(str(path), file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                cells = [_cells(column, f"{path} after row {number}: column {shown(name)}")
                         for name, column in zip(columns, batch.columns, strict=True)]
                for values in zip(*cells, strict=True):
                    number += 1
                    yield number, dict(zip(columns, values, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after row {number}: a string is not UTF-8; write the file again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} after row {number}: not a Parquet file, or truncated; write the file again") from error
    if number == 0 and not may_be_empty:
        raise DataError(f"{path} has no rows; add some")


def _cells(column: Any, where: str) -> list[Any]:
    """The values of an Arrow array, as Python's."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, LookupError, TypeError, NotImplementedError) as error:
        # A date past the year 9999, a time zone that is not known here, an object with two fields of one name.
        raise DataError(f"{where} holds a value of type {column.type!s:.60} that Python cannot hold; write the column as text"
                        ) from error


def cell_text(value: Any) -> str:
    """Return a JSONL or Parquet value as a cell: null and NaN empty, lists and objects as JSON, the rest as text."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, (bool, list, dict)):
        return _SURROGATE.sub("\ufffd", _as_json(value))
    return str(value)


def _as_json(value: Any, depth: int = 1) -> str:
    """JSON of a value in which a `Number` is one. Raises: RecursionError: it is nested too deep."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{json.dumps(key, ensure_ascii=False)}: {_as_json(item, depth + 1)}"
                                for key, item in value.items()]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join([_as_json(item, depth + 1) for item in value]) + "]"
    return "null" if value != value else json.dumps(value, ensure_ascii=False, default=str)      # JSON has no NaN
