"""What answers were held against: other methods row by row, the training table, and what an error would cost.

An evaluation of an earlier version, or of another tool, lacks all of this; the page then leaves it out.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora.baseline import NAME as BAG_OF_WORDS
from minilora.compare import Comparison, p_said, p_text
from minilora.errors import DataError
from minilora.report.checked import AGAIN, checked_interval, checked_object, checked_rate
from minilora.report.markup import Child, Markup, table, tag
from minilora.report.parts import figure, percent
from minilora.report.runfiles import finite
from minilora.report.svg import Frame, linear_axis

KINDS = {"region": "another region of the body", "extent": "more of the body, or less", "side": "the other side",
         "modality": "another modality",
         "contrast given": "contrast given where none belongs", "contrast left out": "contrast left out",
         "contrast phases": "with, for with and without, or the reverse",
         "unsaid": "another protocol, in what names do not say", "no label": "no label of the set"}


@dataclass(frozen=True)
class Held:
    """What was read of it; empty, or None, where the evaluation has none.

    Attributes:
        top_k: by k, share of rows whose reference is among the k most probable labels. comparisons: by name.
        cost: clinical cost with its interval; kinds: rows, and cost, of each kind of error.
        rows, wrong: histograms over cosine. twins: notes that stand in the training table, nearly do, and the score without.
        scored: hashes and names.
    """

    top_k: dict[str, float] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    cost: tuple[float, float, float] | None = None
    kinds: dict[str, tuple[int, float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)
    twins: tuple[int, int, float | None] | None = None
    scored: dict[str, Any] = field(default_factory=dict)


def _count(value: Any, what: str) -> int:
    number = finite(value)
    if number is None or number < 0 or not number.is_integer():
        raise DataError(f"{what} is no number of rows; {AGAIN}")
    return int(number)


def _counts(value: Any, what: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(f"{what} is no list; {AGAIN}")
    return [_count(one, what) for one in value]


def read_held(values: dict[str, Any], path: Path) -> Held:
    """Read it out of metrics.json.

    Raises: DataError: a value that no evaluation writes.
    """
    def part(key: str) -> dict[str, Any]:
        return checked_object(values.get(key) or {}, path, key)

    comparisons = {}
    for name, entry in part("comparisons").items():
        found, where = checked_object(entry, path, name), f"{path}: comparison with {name[:40]!r}"
        low, high = finite_pair(found.get("interval"), where)
        ours, other, p_value = (checked_rate(found.get(key), where) for key in ("exact_match", "other", "p_value"))
        n, only_ours, only_other = (_count(found.get(key), where) for key in ("n", "only_ours", "only_other"))
        comparisons[name] = Comparison(n, ours, other, ours - other, (low, high), only_ours, only_other, p_value)
    clinical, histogram, twins = part("clinical"), part("cosine_histogram"), part("near_duplicates")
    cost, kinds = None, {}
    if clinical:
        cost = (checked_rate(clinical.get("cost"), f"{path}: clinical cost"),
                *checked_interval(clinical.get("interval"), f"{path}: interval of the clinical cost"))
        weights = checked_object(clinical.get("costs", {}), path, "costs")
        kinds = {name: (_count(n, f"{path}: errors of {name[:40]!r}"), finite(weights.get(name)) or 0.0)
                 for name, n in checked_object(clinical.get("kinds", {}), path, "kinds").items() if name in KINDS}
    top = {k: checked_rate(share, f"{path}: top {k[:10]}") for k, share in part("top_k").items() if k.isdecimal()}
    rows, wrong = (_counts(histogram.get(key, []), f"{path}: cosine_histogram") for key in ("rows", "wrong"))
    near = None
    if twins:
        without, where = twins.get("exact_match_without"), f"{path}: near_duplicates"
        near = (_count(twins.get("same"), where), _count(twins.get("near"), where),
                None if without is None else checked_rate(without, f"{where} exact_match_without"))
    return Held(top, comparisons, cost, kinds, rows, wrong, near, part("scored"))


def finite_pair(value: Any, what: str) -> tuple[float, float]:
    """Two numbers between -1 and 1: the interval of a difference."""
    numbers = [finite(one) for one in value] if isinstance(value, list) else []
    if len(numbers) != 2 or not all(number is not None and -1 - 1e-9 <= number <= 1 + 1e-9 for number in numbers):
        raise DataError(f"{what}: its interval is no pair of numbers; {AGAIN}")
    return numbers[0] or 0.0, numbers[1] or 0.0


def others_section(found: Held) -> Markup | None:
    """Each other method in a row, and in words whether the model is better; None without one."""
    if not found.comparisons:
        return None
    rows: list[list[Child]] = []
    for name, it in found.comparisons.items():
        low, high = it.interval
        rows.append([name, percent(it.other), f"{100 * it.difference:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}",
                     f"{it.only_ours:,}", f"{it.only_other:,}", p_text(it.p_value), it.verdict()])
    head = ["against", "exact match", "difference", "95%", "only model", "only other", "p", "the model is"]
    said = ("Difference in points of exact match, on the same rows. Only rows that one of the two has right alone can tell "
            "them apart; p is that of McNemar's exact test: how often a fair coin would be as one-sided. It counts rows and no "
            "training run: another seed may differ by as much.")
    return tag("section", tag("h2", "Is it better than something simpler?"), _verdict(found.comparisons.get(BAG_OF_WORDS)),
               table(head, rows, numbers=range(1, 7), class_="dense others"), tag("p", said, class_="quiet"))


def _verdict(it: Comparison | None) -> Markup | None:
    """The bag of words is a yardstick: that a model does not beat it must not be overlooked."""
    if it is None:
        return None
    method = "a bag of words (TF-IDF and logistic regression on the same training table)"
    if it.verdict() == "better":
        return tag("p", f"Yes: the model is right in {percent(it.exact_match)} of the rows, {method} in {percent(it.other)} "
                        f"({p_said(it.p_value)}).")
    how = "does worse than" if it.verdict() == "worse" else "could not be told from"
    return tag("p", f"No. The model {how} {method}: right in {percent(it.exact_match)} against {percent(it.other)} of the "
                    f"rows ({p_said(it.p_value)}). On these notes the simpler method is the better choice.", class_="notice")


def said_of_rows(found: Held) -> list[Child]:
    """Sentences about what was scored: near-duplicates, and the embedder."""
    said: list[Child] = []
    if found.twins is not None:
        same, near, without = found.twins
        if same + near:
            rest = f"without them exact match is {without:.3f}." if without is not None else "no others are left."
            said.append(f" {same:,} of the notes stand in the training table as well, {near:,} nearly (they share seven tenths "
                        f"of their pairs of words); {rest}")
        else:
            said.append(" None of the notes stands, or nearly stands, in the training table.")
    embedder = found.scored.get("embedder")
    if isinstance(embedder, str) and embedder != "base":
        said.append(f" Cosine is that of {embedder[:60]}'s embeddings.")
    return said


def cosine_figure(found: Held) -> Markup | None:
    """How close answers read, right and wrong: a histogram; None without one."""
    if not sum(found.rows) or len(found.wrong) != len(found.rows) or len(found.rows) % 10:
        return None
    bins, wrong = len(found.rows), np.array(found.wrong)
    filled = [b for b in range(bins) if found.rows[b]]
    first = max(0, min(filled[0], bins - 4))
    frame = Frame(linear_axis(first / bins, 1, "cosine of answer and reference", outward=False),
                  linear_axis(0, float(wrong.max()) or 1.0, "wrong answers", whole=True))
    bars = []
    for b in range(first, bins):
        (x, y), (end, foot) = frame.at(b / bins, float(wrong[b])), frame.at((b + 1) / bins, 0.0)
        if wrong[b]:
            title = f"{b / bins:.2f} to {(b + 1) / bins:.2f}: {wrong[b]:,} of {found.rows[b]:,} wrong"
            bars.append(tag("rect", tag("title", title), x=x + 1, y=y, width=max(end - x - 2, 1.0), height=foot - y,
                            class_="miss"))
    total, close = int(wrong.sum()), int(wrong[-(bins // 10):].sum())
    if not total:
        return None
    said = (f"{total:,} wrong answers; {close:,} of them ({percent(close / total, 0)}) have a cosine of 0.9 or more. A right "
            "answer has 1.")
    drawn = figure("How close wrong answers read", frame.draw("Wrong answers by cosine", *bars), said)
    return tag("div", drawn, class_="single")


def costs_table(found: Held) -> list[Child] | None:
    """Errors weighed by what they would do; None without."""
    if found.cost is None or not found.kinds:
        return None
    cost, low, high = found.cost
    rows: Sequence[Sequence[Child]] = [[KINDS[name], f"{n:,}", f"{weight:g}"] for name, (n, weight) in
                                       sorted(found.kinds.items(), key=lambda entry: (-entry[1][1], -entry[1][0]))]
    return [tag("h3", "Weighed by what they would do"),
            tag("p", f"Clinical cost {cost:.3f} a row, 95% interval {low:.3f} to {high:.3f}: 0 if all are right, 1 if in each "
                     "row another region is imaged or contrast given against the protocol. The weights are minilora's, and no "
                     "department's policy; an error with several faults stands in several lines and costs as the worst.",
                class_="quiet"),
            table(["what is wrong", "errors", "weight"], rows, numbers=(1, 2), class_="dense")]
