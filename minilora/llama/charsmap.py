"""A SentencePiece model's table of replacements, checked before a library follows it.

    uint32 n      bytes of the trie
    n bytes       units of a double array: from unit p the byte c leads to p ^ c, if the unit there carries c as its label
    the rest      replacements, each ended by a zero byte, which the trie's leaves point into

The library that applies it (`tokenizers`) follows these offsets without a look at the table's end, and a damaged one makes it
panic in the middle of a text.  So every place that a text could lead to is visited here.

Source: Darts (double-array trie, taku910/darts) and `Precompiled` in huggingface/tokenizers.
"""
from __future__ import annotations

import struct

import numpy as np

LARGEST = 4 << 20       # bytes; that of nmt_nfkc takes 240,000


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)


def check_charsmap(table: bytes) -> None:
    """Make sure that no text leads past the table's end.

    Args: table: `precompiled_charsmap` of a normalizer; empty is fine.

    Raises: ValueError: says what is wrong.
    """
    if not table:
        return
    if len(table) > LARGEST or len(table) < 4:
        raise ValueError(f"a table of replacements of {len(table):,} bytes")
    size = struct.unpack_from("<I", table)[0]
    if size % 4 or not 1024 <= size <= len(table) - 4:
        raise ValueError("a table of replacements that is cut short")
    units: list[int] = np.frombuffer(table, "<u4", size // 4, 4).tolist()
    try:
        replacements = table[4 + size:].decode("utf-8").encode()       # as UTF-8, whole
    except UnicodeDecodeError:
        raise ValueError("replacements that are not UTF-8") from None
    starts = {0, *(at + 1 for at, byte in enumerate(replacements) if byte == 0)}
    waiting, seen = [_offset(units[0])], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if place | 255 >= len(units):
            raise ValueError("a table of replacements that leads past its end")
        for byte in range(1, 256):
            unit = units[place ^ byte]
            if unit & (1 << 31 | 255) != byte:
                continue
            below = (place ^ byte) ^ _offset(unit)
            if unit >> 8 & 1 and (below >= len(units) or (units[below] & ((1 << 31) - 1)) not in starts):
                raise ValueError("a replacement outside the table")
            waiting.append(below)
