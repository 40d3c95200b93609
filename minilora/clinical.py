"""What differs between two imaging protocols by their names: the question that cosine similarity doesn't ask.

"CT Abdomen W Contrast" and "CT Abdomen WO Contrast" are nearly the same text, and the first can harm a patient
whose kidneys fail.  Names are read word by word; those that say none of this (another trade's labels) differ in nothing.

Errors are weighed by what they would do (`COSTS`).  An error costs as much as the worst thing that is wrong with it:

    clinical cost = mean over rows of  max over what differs of its cost,          0 for a right answer

Lesson 15 explains it.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minilora.metrics import Floats, Pairs

WITH, WITHOUT, BOTH = "with", "without", "with and without"
CLOSE = 0.9             # cosine from which two labels count as close
NEAREST = 200           # labels that one is compared with
ROWS_AT_ONCE = 256      # of the label × label matrix
# What an error would do if nobody noticed. The order is common sense, the figures are ours and no department's policy.
COSTS = {
    "region": 1.0,              # another part of the body is imaged: the question stays open, the dose was for nothing
    "side": 1.0,                # the same
    "contrast given": 1.0,      # injected although the protocol leaves it out: kidneys, allergy
    "extent": 0.5,              # more of the body, or less, than the protocol says
    "modality": 0.5,            # another machine: mostly a worse answer to the same question
    "contrast left out": 0.5,   # a worse answer; the examination may have to be repeated
    "contrast phases": 0.25,    # with, instead of with and without, or the reverse
    "unsaid": 0.25,             # another protocol, in what its name does not say
    "no label": 0.25,           # nothing that could be ordered: somebody has to look
}
_BOTH = re.compile(r"\b(?:w\s*(?:/|&|and|\+)?\s*(?:wo\b|w/o\b|/wo\b)|wo\s*(?:/|&|and|\+)\s*w\b|with\s*(?:and|or|/|&)\s*without"
                   r"|without\s*(?:and|/|&)\s*with\b|pre\s*(?:and|/|&)\s*post\b|before\s+and\s+after)")
_WITHOUT = re.compile(r"\b(?:wo|w/o|without|noncontrast|unenhanced|non[- ]?enhanced|native|plain|(?:no|non)[- ]?contrast)\b")
_WITH = re.compile(r"\b(?:w|with|iv|enhanced|contrast|gadolinium|gad|post[- ]?contrast)\b")
# Words of a name, and what they say; the first of a row is the name we give it.
_MODALITIES = (
    ("CTA", "cta"), ("CT", "ct", "cat"), ("MR", "mr", "mri", "mrcp"), ("MRA", "mra", "mrv"),
    ("ultrasound", "us", "ultrasound", "sonogram", "sonography", "doppler", "duplex"),
    ("X-ray", "xr", "xray", "radiograph", "radiography", "cr", "dx"),
    ("nuclear medicine", "nm", "scintigraphy", "spect"), ("PET", "pet"), ("fluoroscopy", "fl", "fluoroscopy"),
    ("mammography", "mg", "mammography", "mammogram"))
_REGIONS = (
    ("head", "brain", "head", "cranial", "skull"), ("sinus", "sinus", "sinuses"), ("face", "face", "facial"),
    ("orbit", "orbit", "orbits"), ("temporal bone", "temporal"), ("pituitary", "pituitary", "sella"), ("neck", "neck"),
    ("thyroid", "thyroid"), ("carotid", "carotid", "carotids"), ("cervical spine", "cervical"),
    ("thoracic spine", "t-spine"), ("lumbar spine", "lumbar"), ("spine", "spine"),
    ("chest", "chest", "thorax", "thoracic", "lung", "lungs", "pulmonary"), ("heart", "heart", "cardiac", "coronary"),
    ("breast", "breast", "breasts"), ("aorta", "aorta", "aortic"), ("abdomen", "abdomen", "abdominal"),
    ("liver", "liver", "hepatic"), ("bile ducts", "mrcp", "biliary", "hepatobiliary", "gallbladder"),
    ("pancreas", "pancreas", "pancreatic"),
    ("urinary tract", "urography", "urogram", "kidney", "kidneys", "renal", "bladder", "kub", "ureter"),
    ("bowel", "enterography", "bowel", "colonography", "colon"), ("pelvis", "pelvis", "pelvic"),
    ("prostate", "prostate"), ("scrotum", "scrotum", "testes", "testicular"), ("uterus", "uterus", "ob", "obstetric"),
    ("shoulder", "shoulder"), ("upper limb", "arm", "humerus", "forearm"), ("elbow", "elbow"), ("wrist", "wrist"),
    ("hand", "hand"), ("hip", "hip", "hips"), ("lower limb", "leg", "femur", "tibia", "thigh"),
    ("knee", "knee", "knees"), ("ankle", "ankle"), ("foot", "foot", "feet"), ("skeleton", "skeleton"))
_SIDES = (("left", "left", "lt"), ("right", "right", "rt"), ("both sides", "bilateral", "both"))
# Spellings of several words, and the one word of the tables above that stands for them.
_PHRASES = (
    (re.compile(r"\bx[ -]ray\b"), "xray"), (re.compile(r"\bbone scan\b"), "skeleton"),
    (re.compile(r"\b(?:c[ -]?spine|cervical spine)\b"), "cervical"),
    (re.compile(r"\b(?:l[ -]?spine|lumbar spine)\b"), "lumbar"),
    (re.compile(r"\b(?:t[ -]?spine|thoracic spine)\b"), "t-spine"), (re.compile(r"\bupper extremity\b"), "arm"),
    (re.compile(r"\blower extremity\b"), "leg"))


@dataclass(frozen=True)
class ProtocolWords:
    """What a protocol's name says; None or empty where it says nothing."""

    contrast: str | None
    modality: str | None
    regions: frozenset[str]
    side: str | None


def _find(words: set[str], table: tuple[tuple[str, ...], ...]) -> list[str]:
    return [name for name, *spellings in table if words & set(spellings)]


def read_protocol(label: str) -> ProtocolWords:
    """Read contrast, modality, regions and side out of a protocol's name."""
    text = " ".join(label.casefold().replace("_", " ").split())
    contrast: str | None
    if _BOTH.search(text):
        contrast = BOTH
    elif _WITHOUT.search(text):
        contrast = WITHOUT
    else:
        contrast = WITH if _WITH.search(text) else None
    for phrase, word in _PHRASES:
        text = phrase.sub(word, text)
    words = set(re.findall(r"t-spine|\w+", text))
    modality, side = _find(words, _MODALITIES), _find(words, _SIDES)
    if "angiography" in words or "angio" in words:
        modality = [{"CT": "CTA", "MR": "MRA"}.get(name, name) for name in modality]
    return ProtocolWords(contrast, modality[0] if modality else None, frozenset(_find(words, _REGIONS)),
                         side[0] if side else None)


def clinical_difference(a: str, b: str) -> str | None:
    """What differs between two protocols: contrast, modality, region, side; None if their names tell nothing.

    Contrast that only one name mentions counts where nothing else differs.
    """
    return _difference(read_protocol(a), read_protocol(b))


def _difference(first: ProtocolWords, second: ProtocolWords) -> str | None:
    found = []
    if first.modality and second.modality and first.modality != second.modality:
        found.append(f"modality: {first.modality} against {second.modality}")
    if first.regions and second.regions and first.regions != second.regions:
        found.append(f"region: {', '.join(sorted(first.regions))} against {', '.join(sorted(second.regions))}")
    if first.side and second.side and first.side != second.side:
        found.append(f"side: {first.side} against {second.side}")
    if first.contrast != second.contrast and (not found or (first.contrast and second.contrast)):
        found.insert(0, f"contrast: {first.contrast or 'not said'} against {second.contrast or 'not said'}")
    return "; ".join(found) or None


def error_kinds(reference: str, answer: str) -> list[str]:
    """What is wrong with an answer: keys of `COSTS`, each at most once; nothing where both are one label.

    Unlike `clinical_difference` it has a direction: contrast that is given differs from contrast that is left out.
    """
    if reference == answer:
        return []
    right, given = read_protocol(reference), read_protocol(answer)
    found = ["modality"] if right.modality and given.modality and right.modality != given.modality else []
    if right.regions and given.regions and right.regions != given.regions:
        found.append("extent" if right.regions & given.regions else "region")
    found += ["side"] if right.side and given.side and right.side != given.side else []
    # As in `clinical_difference`: what only one name mentions counts where nothing else differs.
    if right.contrast != given.contrast and (not found or (right.contrast and given.contrast)):
        without = (None, WITHOUT)
        found.append("contrast given" if right.contrast in without and given.contrast not in without else
                     "contrast left out" if given.contrast in without and right.contrast not in without else
                     "contrast phases" if right.contrast not in without else "unsaid")
    return found or ["unsaid"]


@dataclass(frozen=True)
class ClinicalErrors:
    """The errors of an evaluation, weighed.

    Attributes:
        cost: clinical cost, in [0, 1]; interval: 95 %, by bootstrap. per_error: mean cost of an error, 0 without one.
        kinds: errors by what is wrong with them, keys of `COSTS`; one may count under several.
        costs: the weights that were used.
    """

    cost: float
    interval: tuple[float, float]
    per_error: float
    kinds: dict[str, int]
    costs: dict[str, float]


def weigh_errors(pairs: Pairs, names: list[str], allowed: set[int], rng: np.random.Generator, resamples: int,
                 costs: Mapping[str, float] = COSTS) -> ClinicalErrors:
    """Weigh the errors of a table.

    Args: pairs: what was answered. names: of all codes. allowed: codes that are labels; other answers are "no label".
    """
    kinds = [[] if a == b else error_kinds(names[a], names[b]) if b in allowed else ["no label"]
             for a, b in zip(pairs.reference.tolist(), pairs.prediction.tolist(), strict=True)]
    weights = np.array([max((costs[kind] for kind in found), default=0.0) for found in kinds])
    n, errors = int(pairs.count.sum()), int(pairs.count[pairs.reference != pairs.prediction].sum())
    total = float(pairs.count @ weights)
    counts = Counter[str]()
    for found, count in zip(kinds, pairs.count.tolist(), strict=True):
        counts.update(dict.fromkeys(found, count))
    # Rows of one cost are alike to this score: a resample is a number for each of the few costs there are.
    levels, which = np.unique(weights, return_inverse=True)
    shares = np.bincount(which, pairs.count) / n
    low, high = np.percentile(rng.multinomial(n, shares / shares.sum(), size=resamples) @ levels / n, [2.5, 97.5])
    return ClinicalErrors(total / n, (float(low), float(high)), total / errors if errors else 0.0,
                          {kind: counts[kind] for kind in costs if counts[kind]}, dict(costs))


@dataclass(frozen=True)
class ClosePair:
    """Two labels that cosine calls close, what differs clinically, and how often one was answered for the other."""

    a: str
    b: str
    cosine: float
    difference: str
    confused: int


def close_pairs(labels: list[int], names: list[str], vectors: Floats, pairs: Pairs, most: int) -> list[ClosePair]:
    """Pairs of cosine `CLOSE` or more that differ clinically: those that differ in contrast alone first, then by cosine.

    Of a large set each label is compared with the `NEAREST` that follow it: 10,000 labels have 50 million pairs.

    Args:
        labels: codes to pair. names, vectors: of all codes, (d,) float64 of length 1 each. pairs: what was answered.
        most: pairs returned.
    """
    errors = {(int(a), int(b)): int(n) for a, b, n in zip(pairs.reference, pairs.prediction, pairs.count, strict=True)}
    protocols, known = [read_protocol(names[code]) for code in labels], vectors[labels]
    found: list[tuple[bool, ClosePair]] = []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        for row, cosines in enumerate((known[start : start + ROWS_AT_ONCE] @ known.T).clip(0, 1), start):
            columns = np.arange(row + 1, len(labels))
            if len(columns) > NEAREST:
                columns = columns[np.argpartition(-cosines[columns], NEAREST)[:NEAREST]]
            for column in columns[cosines[columns] >= CLOSE].tolist():
                difference = _difference(protocols[row], protocols[column])
                if difference is not None:
                    a, b = labels[row], labels[column]
                    contrast_alone = difference.startswith("contrast") and ";" not in difference
                    confused = errors.get((a, b), 0) + errors.get((b, a), 0)
                    found.append((contrast_alone, ClosePair(names[a], names[b], float(cosines[column]), difference, confused)))
    found.sort(key=lambda entry: (not entry[0], -entry[1].cosine, entry[1].a, entry[1].b))
    return [pair for _, pair in found[:most]]
