"""The notes that the model is most wrong or least sure about.  Note text is patient data: only with --show-text."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora.report.markup import Markup, tag
from minilora.report.parts import shortened
from minilora.report.scorefiles import ScoreFiles

SHOWN = 10              # notes of each list
LONGEST = 1500          # characters of one


def hardest_section(found: ScoreFiles) -> Markup | None:
    """Wrong answers that were given with confidence, and right ones that nearly were not; None without the notes."""
    if found.notes is None:
        return None
    chance = found.probability if found.probability is not None else np.zeros(found.n)
    wrong, right = np.flatnonzero(~found.right), np.flatnonzero(found.right)
    sure = wrong[np.argsort(-chance[wrong], kind="stable")][:SHOWN].tolist()
    unsure = right[np.argsort(chance[right], kind="stable")][:SHOWN].tolist() if found.probability is not None else []
    return tag("section", tag("h2", "The hardest notes"),
               tag("p", "This part holds text of notes, which is patient data: the file is readable by its owner alone.",
                   class_="notice"),
               _list("Wrong, and sure of it" if found.probability is not None else "Wrong", found, sure),
               _list("Right, and unsure of it", found, unsure))


def _list(title: str, found: ScoreFiles, rows: Sequence[int]) -> list[Markup] | None:
    if not rows:
        return None
    items = []
    for row in rows:
        note = (found.notes or [])[row]
        given = f", probability {found.probability[row]:.3f}" if found.probability is not None else ""
        items.append(tag("li", tag("p", tag("strong", tag("bdi", found.names[found.reference[row]])),
                                   [" answered as ", tag("bdi", found.names[found.prediction[row]])] if not found.right[row]
                                   else None,
                                   tag("span", f" (row {row + 1}{given})", class_="quiet")),
                         tag("blockquote", shortened(note, LONGEST))))
    return [tag("h3", title), tag("ol", items, class_="notes")]
