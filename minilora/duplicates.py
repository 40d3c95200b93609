"""Notes that stand, or nearly stand, in both of two tables: what a test score must not rest on.

A note is the set of its pairs of neighbouring words (case and punctuation dropped), and two notes are near-duplicates when
these sets overlap enough:

    J(a, b) = |a ∩ b| / |a ∪ b| ≥ t                                                    Jaccard similarity, t = 0.7

Sixteen million pairs of notes need not be looked at.  Order each set from its rarest pair of words to its most common; two
sets with J ≥ t then share one among their first |a| − ⌈t |a|⌉ + 1, so that only notes that meet in such a prefix are compared,
and none is missed (Bayardo, Ma & Srikant, WWW 2007; Xiao et al., WWW 2008, section 3).
"""
from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.7
_WORD = re.compile(r"\w+")


def shingles(note: str) -> frozenset[tuple[str, ...]]:
    """The pairs of neighbouring words of a note, case folded; of a single word that word, of none nothing."""
    words = _WORD.findall(note.casefold())
    return frozenset(itertools.pairwise(words)) if len(words) > 1 else frozenset((word,) for word in words)


@dataclass(frozen=True)
class Twins:
    """How close each of n notes comes to any of another table.

    Attributes:
        similarity: (n,) float64, the highest Jaccard similarity where it reaches the threshold, else 0.
        nearest: (n,) int64, which note of the other table has it (the first of equals), else -1.
    """

    similarity: NDArray[np.float64]
    nearest: NDArray[np.int64]

    @property
    def same(self) -> int:
        """Notes that stand in the other table word for word, up to case, punctuation and the order of their sentences."""
        return int((self.similarity == 1).sum())

    @property
    def near(self) -> int:
        """Notes that nearly do."""
        return int(((self.similarity > 0) & (self.similarity < 1)).sum())


def find_twins(notes: Sequence[str], others: Sequence[str] | None = None, threshold: float = THRESHOLD) -> Twins:
    """For each note the closest one among `others`, if it comes close enough.

    Args:
        others: default the notes themselves, each compared with those before it.
        threshold: of Jaccard similarity, above 0 and at most 1.

    Guarantee: what comparing every pair finds (tests/test_duplicates.py).
    """
    sets = [shingles(note) for note in notes]
    against = [shingles(note) for note in others] if others is not None else sets
    counts = Counter(shingle for found in itertools.chain(sets, against) for shingle in found)

    def prefix(found: frozenset[tuple[str, ...]]) -> list[tuple[str, ...]]:
        rarest = sorted(found, key=lambda shingle: (counts[shingle], shingle))
        # The small number keeps 0.7 · 10 from counting as a little more than 7.
        return rarest[: len(found) - math.ceil(threshold * len(found) - 1e-9) + 1] if found else []

    first: dict[frozenset[tuple[str, ...]], int] = {}       # of equal notes the first stands for all: a clinic writes
    for number, found in enumerate(against):                # "chest pain" a thousand times, and they would be a million pairs
        if found:
            first.setdefault(found, number)
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for found, number in first.items():
        for shingle in prefix(found):
            index[shingle].append(number)
    similarity, nearest = np.zeros(len(sets)), np.full(len(sets), -1, dtype=np.int64)
    for row, found in enumerate(sets):
        equal = first.get(found)
        if equal is not None and (others is not None or equal < row):
            similarity[row], nearest[row] = 1.0, equal
            continue
        seen = set[int]()
        for shingle in prefix(found):
            for number in index.get(shingle, ()):
                if number in seen or (others is None and number >= row):
                    continue
                seen.add(number)
                other = against[number]
                if min(len(found), len(other)) < threshold * max(len(found), len(other)) - 1e-9:
                    continue                    # too unequal in size to overlap enough
                shared = len(found & other)
                close = shared / (len(found) + len(other) - shared)
                if close >= threshold - 1e-12 and (close, -number) > (similarity[row], -nearest[row]):
                    similarity[row], nearest[row] = close, number
    return Twins(similarity, nearest)
