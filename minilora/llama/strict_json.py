"""JSON from strangers: a model folder's config, index and tokenizer settings, read without surprises.

`json.loads` keeps the last of two equal keys; in an index that would silently pick one of two shards, so a repeated key
is refused here.  Only regular files are read, and only up to a size: a pipe would wait for ever, and a device never end.
Every failure names the file, and quotes no more of it than a line holds.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError

LARGEST_OBJECT = 16 << 20       # bytes of a config or an index: that of 405 billion parameters in 4 bits takes one
LARGEST_FILE = 256 << 20        # bytes of a tokenizer: those of 256,000 tokens take 35


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r:.80} stands twice")
        result[key] = value
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
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{source}: not readable as JSON ({detail}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must hold a JSON object {{...}}, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file.

    Raises: CheckpointError: no such file, unreadable, or as `parse_object`.
    """
    return parse_object(read_bytes(path, LARGEST_OBJECT), str(path))


def read_bytes(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """A small file's bytes.

    Raises: CheckpointError: no such file, no regular one, larger than `largest` bytes, or unreadable; names it.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; fetch it again")
        if size > largest:
            raise CheckpointError(f"{path}: has {size:,} bytes, more than the {largest:,} that such a file may have; fetch it "
                                  "again")
        with path.open("rb") as file:
            return file.read(largest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
