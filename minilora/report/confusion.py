"""Which label is taken for which: a heat map that stays readable with dozens of labels, and the errors as a list.

Most cells of a good model are empty, and most labels are rarely wrong, so of a large set only the labels in an error are drawn.
Neighbours are confused with each other: labels of one modality and region stand together where their names say one; others are
lined up so that each follows the one it is most often confused with.
"""
from __future__ import annotations

from collections import Counter

import numpy as np

from minilora.clinical import clinical_difference, read_protocol
from minilora.metrics import Ints
from minilora.report.held import cosine_figure, costs_table
from minilora.report.markup import Child, Markup, table, tag
from minilora.report.parts import percent, shortened
from minilora.report.scorefiles import ScoreFiles
from minilora.report.svg import picture, text_width

DRAW_ALL = 20           # labels up to which even those without an error are drawn
MOST_DRAWN = 60
LISTED, CLOSE_LISTED = 15, 8
OUTSIDE = "no label of the set"
UNSAID = "their names do not say"


def count_answers(found: ScoreFiles) -> Counter[tuple[int, int]]:
    """How often each pair (reference, prediction) of codes occurs; ten thousand labels make no matrix."""
    keys, counts = np.unique(found.reference * len(found.names) + found.prediction, return_counts=True)
    return Counter({divmod(key, len(found.names)): n for key, n in zip(keys.tolist(), counts.tolist(), strict=True)})


def by_protocol(names: list[str]) -> list[int] | None:
    """An order of labels by modality, region and name; None where fewer than half of the names say a modality."""
    words = [read_protocol(name) for name in names]
    if 2 * sum(word.modality is not None for word in words) < len(names):
        return None
    return sorted(range(len(names)), key=lambda i: (words[i].modality or "~", sorted(words[i].regions), names[i]))


def by_confusion(errors: Ints) -> list[int]:
    """An order of labels in which each follows the one that it is most often confused with, the worst first.

    Args: errors: (labels, labels), zero on the diagonal.
    """
    both = errors + errors.T
    left, order = list(range(len(errors))), list[int]()
    while left:
        last = order[-1] if order and both[order[-1], left].any() else None
        weights = both[last, left] if last is not None else both[left].sum(1)
        order.append(left.pop(int(np.argmax(weights))))     # the first of equals
    return order


def difference_kinds(difference: str | None) -> list[str]:
    """What `clinical_difference` says, as the kinds alone: "contrast: with against without; side: …" -> contrast, side."""
    return [part.split(":")[0] for part in difference.split("; ")] if difference else []


def errors_section(found: ScoreFiles) -> Markup:
    """What the errors differ in, the most frequent ones, pairs that cosine calls close, and the heat map."""
    answers = count_answers(found)
    errors = {pair: n for pair, n in answers.items() if pair[0] != pair[1]}
    total = sum(errors.values())
    if not total:
        return tag("section", tag("h2", "Errors"), tag("p", f"None in {found.n:,} rows."))
    protocols = by_protocol(found.names[:-1]) is not None
    outside = len(found.names) - 1
    kinds: Counter[str] = Counter()
    listed: list[list[Child]] = []
    for (a, b), n in sorted(errors.items(), key=lambda cell: (-cell[1], found.names[cell[0][0]], found.names[cell[0][1]])):
        difference = clinical_difference(found.names[a], found.names[b]) if b != outside else None
        said = difference_kinds(difference)
        kind = f"{said[0]} alone" if len(said) == 1 else ", ".join(said) or UNSAID
        kinds[OUTSIDE if b == outside else kind] += n
        if len(listed) < LISTED:
            listed.append([f"{n:,}", _name(found.names[a]), _name(found.names[b]), *([difference or "–"] if protocols else [])])
    most = max(kinds.values())
    bars = [[kind, f"{n:,}", percent(n / total, 0),
             picture(200, 12, f"{n} of {total}", tag("rect", x=0, y=2, width=200 * n / most, height=8, class_="fill wrong"),
                     class_="bar")] for kind, n in sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0]))]
    close = [[str(pair.confused), _name(pair.a), _name(pair.b), f"{pair.cosine:.3f}", pair.difference]
             for pair in found.close_pairs[:CLOSE_LISTED]]
    return tag(
        "section", tag("h2", "Errors"),
        tag("p", f"{total:,} of {found.n:,} answers are wrong. "
                 + ("By the names of the two protocols they differ in:" if protocols else "")),
        table(["differs in", "errors", "of all", ""], bars, numbers=(1, 2)) if protocols else None,
        costs_table(found.held) if protocols else None,
        tag("h3", "The most frequent"),
        table(["times", "right", "answered", *(["what differs"] if protocols else [])], listed, numbers=(0,), class_="dense"),
        tag("h3", "Which label is taken for which"), _heat_map(found, answers),
        cosine_figure(found.held),
        [tag("h3", "Close by cosine, clinically different"),
         tag("p", "Labels that read nearly the same and mean another examination: here a high cosine is no comfort.",
             class_="quiet"),
         table(["confused", "one", "other", "cosine", "what differs"], close, numbers=(0, 3), class_="dense")]
        if close else None)


def _name(label: str) -> Markup:
    return tag("span", shortened(label, 48), title=label)


def _drawn(found: ScoreFiles, answers: Counter[tuple[int, int]]) -> list[int]:
    """Codes of the labels that the heat map shows, in their order, without `OTHER`."""
    wrong, classes = ~found.right, len(found.names)
    involved = np.bincount(found.reference[wrong], minlength=classes) + np.bincount(found.prediction[wrong], minlength=classes)
    labels = np.unique(np.concatenate([found.reference, found.prediction]))
    labels = labels[labels < classes - 1]
    if len(labels) > DRAW_ALL:
        worst = labels[np.argsort(-involved[labels], kind="stable")][:MOST_DRAWN]
        labels = np.sort(worst[involved[worst] > 0])
    codes = labels.tolist()
    errors = np.array([[answers[a, b] if a != b else 0 for b in codes] for a in codes], dtype=np.int64)
    order = by_protocol([found.names[code] for code in codes]) or by_confusion(errors)
    return [codes[index] for index in order]


def _heat_map(found: ScoreFiles, answers: Counter[tuple[int, int]]) -> Child:
    rows = _drawn(found, answers)
    outside, references = len(found.names) - 1, np.bincount(found.reference, minlength=len(found.names)).tolist()
    columns = [*rows, outside] if any(b == outside for _, b in answers) else rows
    cell = 30 if len(rows) <= 12 else 22 if len(rows) <= 24 else 15 if len(rows) <= 48 else 13
    size = 10 if cell > 15 else 9
    longest = max(text_width(shortened(found.names[code], 34), size) for code in columns)
    left, top = longest + 32, longest + 10
    width, height = round(left + cell * len(columns) + 4), round(top + cell * len(rows) + 4)
    parts: list[Child] = []
    for i, code in enumerate(rows):
        y = top + cell * (i + 0.5)
        text_y = y + size * 0.36        # the letters' middle, not their foot, on the line
        parts += [tag("line", x1=left, x2=left + cell * len(columns), y1=y, y2=y, class_="grid"),
                  tag("text", tag("title", found.names[code]), shortened(found.names[code], 34), x=left - 26.0, y=text_y,
                      class_="end", font_size=size),
                  tag("text", f"{references[code]}", x=left - 5, y=text_y, class_="end faint", font_size=size)]
    for j, code in enumerate(columns):
        x = left + cell * (j + 0.5)
        parts += [tag("line", x1=x, x2=x, y1=top, y2=top + cell * len(rows), class_="grid"),
                  tag("text", tag("title", found.names[code]), shortened(found.names[code], 34), font_size=size,
                      transform=f"translate({x + size * 0.36:.1f} {top - 5:.1f}) rotate(-90)")]
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            if n := answers[a, b]:
                share = n / references[a]
                title = f"{n} of {references[a]}: {found.names[a]} answered as {found.names[b]}"
                x, y = left + cell * j, top + cell * i
                parts.append(tag("rect", tag("title", title), x=x + 1, y=y + 1, width=cell - 2, height=cell - 2, rx=2,
                                 class_="hit" if a == b else "miss", fill_opacity=f"{0.2 + 0.8 * share:.2f}"))
                if cell > 15 or a != b:
                    parts.append(tag("text", f"{n}", x=x + cell / 2, y=y + cell / 2 + size * 0.36, font_size=size,
                                     class_="middle count" + (" strong" if share > (0.5 if a == b else 0.75) else "")))
    left_out = sum(n > 0 for n in references) - sum(references[code] > 0 for code in rows)
    said = ("Rows: what was right, with the number of references; columns: what was answered. Blue is right, orange an error; "
            "the stronger, the larger its share of the row. Empty cells are left out"
            + (f", and {left_out} labels in {'fewer' if len(rows) == MOST_DRAWN else 'no'} errors." if left_out else "."))
    return [tag("p", said, class_="quiet"),
            tag("div", tag("div", picture(width, height, "Confusion of labels", *parts, class_="heat"),
                           style=f"width:{width}px;max-width:none"), class_="scroll wide")]
