"""Predictions go out as they came in: CSV, JSONL or Parquet, a row at a time, and whole or not at all.

Rows go to a temporary file of mode 0600 beside the output, which is synced and takes the output's name when the block
ends well, and is removed when it doesn't (`minilora.files.atomic_path`): a killed prediction leaves no half table that
looks like a whole one.
"""
from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from minilora.data.formats import PARQUET_ROWS, import_pyarrow, shown, table_format
from minilora.errors import DataError, OutputError
from minilora.files import atomic_path, check_output


def added_columns(path: str | Path, columns: Sequence[str],
                  added: Sequence[str] = ("prediction", "probability", "error")) -> list[str]:
    """Return `columns` followed by `added`, the columns of a file of predictions.

    Raises:
        DataError: the input `path` has one of the added columns already.
    """
    clash = next((name for name in added if name in columns), None)
    if clash is not None:
        raise DataError(f"{path}: column {clash!r} is one that the output adds; rename it in the input")
    return [*columns, *added]


class TableWriter:
    """Context manager that writes a table row by row; the suffix names the format.

    Args:
        path: the output; nothing stands there until the block ends without an error.
        columns: in order.
        overwrite: replace an output that exists.
        numbers: columns that are float64 in Parquet; the others are strings.

    Raises:
        OutputError: the output exists and `overwrite` is False, the suffix is unknown, or the disk refuses.
        DataError: Parquet without pyarrow, or a row with a column that is not in `columns`.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], overwrite: bool = False,
                 numbers: Sequence[str] = ("probability", "runner_up_probability")) -> None:
        self.path, self.columns, self.overwrite, self.numbers = Path(path), list(columns), overwrite, frozenset(numbers)
        self.kind = table_format(self.path, None, OutputError)
        self._stack = ExitStack()

    def __enter__(self) -> TableWriter:
        check_output(self.path, self.overwrite)
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a folder; name a file")
        pyarrow = import_pyarrow() if self.kind == "parquet" else None
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path, mode=0o600))
            if pyarrow is not None:
                kinds = [pyarrow.float64() if name in self.numbers else pyarrow.string() for name in self.columns]
                self._schema = pyarrow.schema(list(zip(self.columns, kinds, strict=True)))
                self._arrow, self._rows = pyarrow, list[dict[str, Any]]()
                self._parquet = stack.enter_context(pyarrow.parquet.ParquetWriter(temporary, self._schema))
            else:
                self._file = stack.enter_context(temporary.open("w", encoding="utf-8", errors="replace", newline=""))
            if self.kind == "csv":
                self._write_csv(self.columns)
            self._stack = stack.pop_all()
        return self

    def write(self, values: Mapping[str, str | float | None]) -> None:
        """Add one row; a column that `values` lacks stays empty (null)."""
        unknown = next((name for name in values if name not in self.columns), None)
        if unknown is not None:
            raise DataError(f"{self.path}: a row has the column {shown(unknown)}, which was not announced; give every "
                            "row of the input the same columns")
        row = {name: values.get(name) for name in self.columns}
        if self.kind == "csv":
            self._write_csv(["" if value is None else str(value) for value in row.values()])
        elif self.kind == "jsonl":
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            self._rows.append(row)
            if len(self._rows) == PARQUET_ROWS:
                self._flush()

    def _write_csv(self, cells: Sequence[str]) -> None:
        # Trap: a carriage return counts as special only where it is part of the line terminator; left unquoted, the
        # row would come back as two.
        if any("\r" in cell for cell in cells):
            csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
        else:
            csv.writer(self._file, lineterminator="\n").writerow(cells)

    def _flush(self) -> None:
        self._parquet.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> bool | None:
        if error is not None:
            return self._stack.__exit__(kind, error, trace)   # removes the temporary file
        with self._stack:
            if self.kind == "parquet" and self._rows:
                self._flush()
        return None
