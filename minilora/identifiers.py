"""Does a note name somebody?  Patterns for what most often does; counts come out, the text never.

It finds what is written as such things mostly are: dates, phone numbers, record numbers, addresses of mail, and names behind a
title.  A name without a title, a street or a rare disease it does not find: a count of 0 is no proof that notes are anonymous
(45 CFR 164.514(b)(2) lists eighteen kinds), and a count above 0 may be a false alarm.
"""
from __future__ import annotations

import re

_MONTH = (r"(?: jan(?:uary)? | feb(?:ruary)? | mar(?:ch)? | apr(?:il)? | may | june? | july? | aug(?:ust)? | sept?(?:ember)?"
          r" | oct(?:ober)? | nov(?:ember)? | dec(?:ember)? ) \.?")
_WRITTEN = {
    # Trap: "C3/4/5" is a piece of a spine: no letter or digit may stand before the first number.
    "dates": rf"""\b (?: \d{{1,2}} ([/.-]) \d{{1,2}} \1 (?:19|20)?\d\d
                     | (?:19|20)\d\d ([/.-]) \d{{1,2}} \2 \d{{1,2}}
                     | \d{{1,2}} (?:st|nd|rd|th)? \s+ {_MONTH} ,? \s+ (?:19|20)\d\d
                     | {_MONTH} \s+ \d{{1,2}} (?:st|nd|rd|th)? ,? \s+ (?:19|20)\d\d ) \b""",
    "phone numbers": r"""(?<![\w.-]) (?: \+\d{1,3} [ .-]? )? (?: \(\d{2,5}\) [ .-]? | \d{3,5} [ .-] )
                         \d{3,4} [ .-]? \d{3,4} \b (?![.-]?\d)
                         | \+ \d{1,3} (?: [ .-]? \(? \d{2,5} \)? ){2,4} \b""",
    # A word that says so, then a number of four digits or more; an American social security number; a long bare number.
    "record numbers": r"""\b (?: mrn | (?:medical\s+)? record | (?: patient | pt | case | chart | hospital | accession | visit
                                | insurance | nhs ) (?= \s* (?: id | no | nr | num | [#:] ) ) )
                              [\s.:#-]* (?: (?: id | number | num | no | nr ) \b [\s.:#-]* )? [a-z]{0,3} -? \d{4,} \b
                          | \b \d{3}-\d{2}-\d{4} \b
                          | (?<![\w.+-]) \d{7,12} \b""",
    "mail addresses": r"\b [\w.+-]+ @ [\w-]+ \. [\w.-]+ \b",
}
# Trap: "MR Knee" is an examination; in capitals only titles that no examination is called by count.
_TITLE = r"""\b (?: (?: Mr | Mrs | Ms | Miss | Dr | Prof | Herr | Frau | Mme ) \.? | MRS\.? | MISS | PROF\.? ) \s+
             (?: [A-Z]\. \s* )* [A-ZÀ-ÖØ-Þ] [\w'’-]+"""
PATTERNS: dict[str, re.Pattern[str]] = {
    **{kind: re.compile(pattern, re.IGNORECASE | re.VERBOSE) for kind, pattern in _WRITTEN.items()},
    "names after titles": re.compile(_TITLE, re.VERBOSE)}


def identifier_kinds(note: str) -> list[str]:
    """The kinds of `PATTERNS` that a note seems to hold."""
    return [kind for kind, pattern in PATTERNS.items() if pattern.search(note)]
