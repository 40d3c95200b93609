"""Drawing cases.

Facts are drawn first and independently of any wording.  What decides (an eGFR of 24 before contrast) is always written in
the note; what does not may be dropped.  Near misses are drawn as often as the real thing: an eGFR of 38, hives years ago,
an MR conditional pacemaker, a negative pregnancy test, a past embolism beside a question about a stone.
"""
from __future__ import annotations

from dataclasses import replace
from random import Random

from minilora.data.radiology.cases import Case
from minilora.data.radiology.indications import BY_KEY, INDICATIONS
from minilora.data.radiology.rules import NO_GADOLINIUM, NO_IODINE, NO_MAGNET, PREGNANT

# How often a question is drawn: 1 unless rules take its notes away to rarer protocols, which then need a share too.
WEIGHTS = {
    "pe": 1.8, "lvo": 1.2, "cervdissect": 1.2, "neckabscess": 1.1, "neckmass": 1.1, "braintumor": 1.45, "ms": 1.25,
    "brainabscess": 1.45,
    "liverlesion": 3.1, "radiculopathy": 1.6, "crohn": 1.6, "cuff": 1.7, "meniscus": 1.5, "hematuria": 1.9, "bileduct": 1.5,
    "aaa": 1.8, "aorta": 1.8, "appendicitis": 1.2, "stone": 1.0, "constipation": 0.9, "fistula": 2.2, "discitis": 1.2,
    "myelopathy": 1.5,
    "pneumonia": 0.6, "line": 0.5, "dementia": 0.8, "subacutestroke": 0.8, "bleed": 0.5, "headinjury": 0.6, "spleen": 0.8,
    "postbiopsy": 0.8, "pancreatitis": 0.7, "diverticulitis": 0.6, "obstruction": 0.6, "abscess": 0.6, "gallbladder": 0.4,
    "ascites": 0.4,
    "hydronephrosis": 0.6, "kneeoa": 0.7, "bursitis": 0.7, "cspine": 0.7, "nodule": 0.4, "lungmass": 0.9, "empyema": 0.9,
    "lumbarfracture": 0.5, "cteph": 0.6, "bileleak": 1.0}
DECISIVE_SHARE, NEAR_MISS_SHARE = 0.6, 0.7


def draw_case(random: Random) -> Case:
    """Draw a case; the same state of `random` gives the same case."""
    indication = random.choices(INDICATIONS, [WEIGHTS.get(i.key, 1.0) for i in INDICATIONS])[0]
    case = Case(indication.key, random.randint(*indication.ages), indication.sex or random.choice("FM"))
    if random.random() < DECISIVE_SHARE:
        case = _decide(case, random)
    if random.random() < NEAR_MISS_SHARE:
        case = _distract(case, random)
    return case


def _decide(case: Case, random: Random) -> Case:
    """Add one fact (at times two) that changes this question's protocol, where there is one."""
    protocol = BY_KEY[case.question].protocol
    options = []
    if protocol in NO_IODINE:
        options += ["kidney", "kidney", "iodine"]
    if protocol in NO_GADOLINIUM:
        options += ["gadolinium", "gadolinium", "implant"] + ["implant"] * (case.question == "liverlesion")
    if protocol in NO_MAGNET:
        options += ["implant"]
    if protocol in PREGNANT and case.question not in ("fistula", "postbiopsy", "discitis"):
        options += ["pregnant"]
    if case.question == "radiculopathy":
        options += ["red flag"] * 2
    if case.question == "pe":
        options += ["d-dimer"] * 4
    if case.question == "appendicitis":
        options += ["child"] * 2
    if not options or (options == ["pregnant"] and random.random() < 0.6):
        return case
    kind = random.choice(options)
    if kind == "kidney":
        return replace(case, egfr=random.randint(7, 29))
    if kind == "iodine":
        return replace(case, iodine_allergy="severe")
    if kind == "gadolinium":
        return replace(case, gadolinium_allergy="severe")
    if kind == "pregnant":
        return replace(case, sex="F", age=random.randint(19, 42), weeks_pregnant=random.randint(7, 38))
    if kind == "red flag":
        return replace(case, red_flag=True)
    if kind == "d-dimer":
        return replace(case, wells="low", d_dimer=random.randint(110, 480))
    if kind == "child":
        return replace(case, age=random.randint(5, 13))
    case = replace(case, implant="unsafe")
    if protocol in ("MRI Brain W WO Contrast", "MRI Liver W WO Contrast",
                    "MRI Pelvis W WO Contrast") and random.random() < 0.35:
        case = replace(case, egfr=random.randint(7, 29)) if random.random() < 0.5 else replace(case,
            iodine_allergy="severe")
    return case


def _distract(case: Case, random: Random) -> Case:
    """Add one or two facts that look decisive and, for this question, are not."""
    protocol = BY_KEY[case.question].protocol
    for _ in range(random.choice((1, 1, 2))):
        close = (("egfr", "dialysis", "mild iodine", "other agent") if protocol in NO_IODINE
                 else ("conditional", "mild gadolinium", "egfr", "other agent") if protocol in NO_GADOLINIUM
                 else ("conditional", "mild gadolinium", "egfr")
                 if protocol in NO_MAGNET else ("elsewhere",))
        kind = random.choice((*close, *close, "egfr", "dialysis", "mild iodine", "mild gadolinium", "conditional",
                              "not pregnant",
                              "irrelevant allergy", "no allergy", "d-dimer", "elsewhere"))
        if kind == "egfr" and case.egfr is None:
            case = replace(case, egfr=random.choice((random.randint(31, 59), random.randint(60, 112))))
        elif kind == "dialysis" and case.egfr is None and case.age > 25 and case.weeks_pregnant is None:
            case = replace(case, dialysis=True, egfr=random.choice((None, random.randint(5, 12))))
        elif kind == "mild iodine" and case.iodine_allergy is None and "no allergy" not in case.near_misses:
            case = replace(case, iodine_allergy="mild")
        elif kind == "mild gadolinium" and case.gadolinium_allergy is None and "no allergy" not in case.near_misses:
            case = replace(case, gadolinium_allergy="mild")
        elif kind == "other agent" and "no allergy" not in case.near_misses:
            # A severe reaction, but to the contrast that this examination doesn't use.
            if protocol in NO_IODINE and case.gadolinium_allergy is None:
                case = replace(case, gadolinium_allergy="severe")
            elif protocol in NO_GADOLINIUM and case.iodine_allergy is None:
                case = replace(case, iodine_allergy="severe")
        elif kind == "conditional" and case.implant is None and case.age > 25:
            case = replace(case, implant="conditional")
        elif kind == "not pregnant" and case.sex == "F" and 15 <= case.age <= 48 and case.weeks_pregnant is None \
                and case.question != "ovary":
            case = replace(case, near_misses=(*case.near_misses, "not pregnant"))
        elif kind in ("irrelevant allergy",
                      "no allergy") and case.iodine_allergy is None and case.gadolinium_allergy is None \
                and not {"irrelevant allergy", "no allergy"} & set(case.near_misses):
            case = replace(case, near_misses=(*case.near_misses, kind))
        elif kind == "d-dimer" and case.question in ("pe", "dvt") and case.d_dimer is None:
            case = replace(case, wells=random.choice(("high", "low")), d_dimer=random.randint(620, 4800))
            if case.wells == "high" and random.random() < 0.4:
                case = replace(case, d_dimer=random.randint(110, 480))
        elif kind == "elsewhere":
            # The right fact at the wrong question: a weak kidney before an ankle film, an unsafe implant before CT.
            if case.question in ("dvt", "thyroid", "gallbladder", "hydronephrosis", "ankle",
                                 "wrist") and 19 <= case.age <= 42 \
                    and case.sex == "F" and "not pregnant" not in case.near_misses:
                case = replace(case, weeks_pregnant=random.randint(7, 38))
            elif protocol not in NO_IODINE and protocol not in NO_MAGNET and case.egfr is None:
                case = replace(case, egfr=random.randint(7, 29))
            elif protocol not in NO_MAGNET and protocol not in ("CTA Head and Neck",
                "CT Enterography") and case.implant is None \
                    and case.weeks_pregnant is None and case.age > 18:
                case = replace(case, implant="unsafe")
    return replace(case, near_misses=tuple(dict.fromkeys(case.near_misses)))
