"""Values of metrics.json, each checked before it is drawn: a file may be old, damaged, or of another tool."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.errors import DataError
from minilora.report.runfiles import finite

AGAIN = "write it again with minilora evaluate --overwrite"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object's keys and values.

    Raises: DataError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({type(error).__name__}); write it again with minilora evaluate "
                        "--overwrite") from None
    return checked_object(values, path, "the file")


def checked_object(value: Any, path: Path, what: str) -> dict[str, Any]:
    """A value that must be a JSON object.

    Raises: DataError: it is none.
    """
    if not isinstance(value, dict):
        raise DataError(f"{path}: {what} is no JSON object; write it again with minilora evaluate --overwrite")
    return value


def checked_rows(values: dict[str, Any], key: str, needed: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """A list of objects that all have some keys; none if the key is absent.

    Raises: DataError: it is none.
    """
    rows = values.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) and all(name in row for name in needed) for row in rows):
        raise DataError(f"{path}: {key} is no list of objects with {', '.join(needed)}; write it again with minilora evaluate "
                        "--overwrite")
    return rows


def checked_rate(value: Any, what: str) -> float:
    """A number between 0 and 1, up to rounding.

    Raises: DataError: it is none.
    """
    number = finite(value)
    if number is None or not -1e-9 <= number <= 1 + 1e-9:
        raise DataError(f"{what} is no number between 0 and 1; write it again with minilora evaluate --overwrite")
    return min(max(number, 0.0), 1.0)


def checked_interval(value: Any, what: str) -> tuple[float, float]:
    """A pair of rates.

    Raises: DataError: it is none.
    """
    if not isinstance(value, list) or len(value) != 2:
        raise DataError(f"{what} is no pair of numbers; write it again with minilora evaluate --overwrite")
    return checked_rate(value[0], what), checked_rate(value[1], what)
