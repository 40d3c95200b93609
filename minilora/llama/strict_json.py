"""JSON from strangers: a model folder's config, index and tokenizer settings, read without surprises.

`json.loads` keeps the last of two equal keys; in an index that would silently pick one of two shards, so a repeated key
is refused here.  Every failure names the file.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return result


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """Parse one UTF-8 JSON object.

    Args:
        text: the bytes. source: what to call them in an error (a file's path, a tensor's key).

    Raises: CheckpointError: not UTF-8, not JSON, not an object, or a key that stands twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: not UTF-8 text (byte {error.start}); fetch the file again") from error
    except (ValueError, RecursionError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{source}: not readable as JSON ({detail}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must hold a JSON object {{...}}, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file.

    Raises: CheckpointError: no such file, unreadable, or as `parse_object`.
    """
    return parse_object(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A small file's bytes; an unreadable one is a `CheckpointError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
