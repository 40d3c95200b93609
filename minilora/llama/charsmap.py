"""A SentencePiece model's table of replacements: checked, and applied to a text as SentencePiece applies it.

    uint32 n      bytes of the trie
    n bytes       units of a double array: from unit p the byte c leads to p ^ c, if the unit there carries c as its label
    the rest      replacements, each ended by a zero byte, which the trie's leaves point into

A damaged table could lead past its end in the middle of a text, so every place that a text could lead to is visited first.

Trap: `Precompiled` of the `tokenizers` library looks up whole grapheme clusters, where SentencePiece takes the longest entry
that the rest of the text begins with: "\\r\\n" is one cluster and two entries, and "ﬁ" with an accent lost the accent.

Source: Darts (double-array trie, taku910/darts) and `Normalizer::NormalizePrefix` in google/sentencepiece.
"""
from __future__ import annotations

import struct
from collections.abc import Iterator

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


class Charsmap:
    """A table ready to be applied.

    Args: table: `precompiled_charsmap` of a normalizer, which `check_charsmap` has passed; empty replaces nothing.
    """

    def __init__(self, table: bytes) -> None:
        size = struct.unpack_from("<I", table)[0] if table else 0
        self._units: list[int] = np.frombuffer(table, "<u4", size // 4, 4).tolist() if table else []
        self._replacements = table[4 + size:] + b"\0"       # the last one may not be ended

    def parts(self, text: str) -> Iterator[str]:
        """What stands for each beginning of the text in turn: the longest entry's replacement, else one character itself.

        Raises: UnicodeEncodeError: a lone surrogate.
        Guarantee: the parts of sentencepiece (tests/peers/test_normalization.py).
        """
        if not self._units:
            yield from text
            return
        data, at = text.encode(), 0
        while at < len(data):
            length, place = self._longest(data, at)
            if length:
                yield self._replacements[place:self._replacements.find(b"\0", place)].decode()
            else:
                length = 1 + (data[at] >= 0xC0) + (data[at] >= 0xE0) + (data[at] >= 0xF0)
                # An entry may end inside a character: its other bytes are no character.
                yield "\ufffd" if 0x80 <= data[at] < 0xC0 else data[at:at + length].decode()
            at += length

    def _longest(self, data: bytes, at: int) -> tuple[int, int]:
        """Bytes of the longest entry at `at`, 0 for none, and where its replacement begins."""
        units = self._units
        place, length, found = _offset(units[0]), 0, 0
        for count, byte in enumerate(memoryview(data)[at:], 1):
            unit = units[place ^ byte]
            if not byte or unit & (1 << 31 | 255) != byte:      # an entry holds no zero byte
                break
            place ^= byte ^ _offset(unit)
            if unit >> 8 & 1:
                length, found = count, units[place] & ((1 << 31) - 1)
        return length, found
