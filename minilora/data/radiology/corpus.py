"""Unlabelled text to pretrain on: notes, notes read in plain words, definitions, findings.

    78 %  a note of a train family (or of a corpus-only family), then what it says in plain words: most often the gist (what
          is looked for, and what changes the plan, in either order: so both must be known before the first word), then
          questions with answers: what is asked, kidneys, allergies, implant, pregnancy, and what each of them forbids
     6 %  a note alone           8 %  definitions           8 %  findings

No document holds both a note (or what it says) and the name of a protocol, so which protocol a note asks for is left to
fine-tuning; the names stand in definitions only, without any note.  Families of val and test never occur.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from minilora.data.prompts import IGNORED, Example
from minilora.data.radiology.cases import Case
from minilora.data.radiology.draw import draw_case
from minilora.data.radiology.families import families
from minilora.data.radiology.glossary import ABBREVIATIONS, MEANINGS, NORMAL, REASONS, TERMS
from minilora.data.radiology.indications import BY_KEY, INDICATIONS
from minilora.data.radiology.notes import Written, write
from minilora.data.radiology.phrases import THINNERS, is_task
from minilora.data.radiology.protocols import PROTOCOLS
from minilora.data.radiology.rules import CHANGES_NOTHING, RULES, protocol_for
from minilora.errors import CheckpointError

if TYPE_CHECKING:
    from minilora.llama.tokenizer import Tokenizer

KINDS, SHARES = ("reading", "note", "definitions", "findings"), (78, 6, 8, 8)
GIST_SHARE = 0.9        # of the readings
_FAMILIES = families("train") + families("corpus")


class Document(NamedTuple):
    """A text in two parts: `given` is to be read only, `told` carries the loss; where nothing is given, all of it does."""

    given: str
    told: str

    @property
    def text(self) -> str:
        """The whole document."""
        return self.given + self.told


def documents(seed: int = 0, n: int = 90_000, capitals: float = 0.0) -> Iterator[Document]:
    """Yield `n` documents of about 30 to 160 words; the same seed gives the same documents.

    Args: capitals: share of the notes put into capitals throughout, beside those whose family already is.
    """
    random = Random(f"minilora corpus {seed}")
    for _ in range(n):
        kind = random.choices(KINDS, SHARES)[0]
        if kind == "reading":
            yield _reading(random, capitals)
        elif kind == "note":
            yield _bare_note(random, capitals)
        else:
            yield _definitions(random) if kind == "definitions" else _findings(random)


def encode_documents(tokenizer: Tokenizer, texts: Iterable[Document]) -> list[Example]:
    """Each document as BOS, given, told, EOS; what is given carries no loss.

    Raises: CheckpointError: the tokenizer has no end token.
    """
    if tokenizer.eos_id is None:
        raise CheckpointError("the tokenizer names no end token, so a document could not end")
    made = []
    for row, text in enumerate(texts):
        given, told = tokenizer.encode(text.given, bos=True), [*tokenizer.encode(text.told, bos=False), tokenizer.eos_id]
        made.append(Example([*given, *told], [IGNORED] * len(given) + told, row))
    return made


def _draw(random: Random, capitals: float) -> tuple[Case, Written]:
    case = draw_case(random)
    written = write(case, random.choice(_FAMILIES), random)
    if capitals and random.random() < capitals:
        written = replace(written, note=written.note.upper())
    return case, written


def _bare_note(random: Random, capitals: float) -> Document:
    return Document("", "\n".join(f"Note: {_draw(random, capitals)[1].note}" for _ in range(random.choice((1, 2)))))


def _reading(random: Random, capitals: float) -> Document:
    case, written = _draw(random, capitals)
    answers = summary(case, written)
    lines = []
    if random.random() < GIST_SHARE:
        said = "; ".join(random.sample((answers["meaning"], answers["changes"]), 2))
        lines.append(f"{random.choice(('Gist', 'In short', 'It says', 'Summary'))}: {said}.")
    for key in random.sample(list(answers), random.randint(5, 9)):
        lines.append(f"{random.choice(QUESTIONS[key])} {answers[key]}.")
    return Document(f"Note: {written.note}", "".join(f"\n{line}" for line in lines))


QUESTIONS: dict[str, tuple[str, str]] = {
    "asked": ("What is asked?", "What do they look for?"), "meaning": ("What does that mean?",
        "What is it in plain words?"),
    "region": ("Which part of the body?", "Where?"), "kidneys": ("How are the kidneys?", "What is the kidney function?"),
    "iodinated contrast": ("Is iodinated contrast allowed?", "May CT dye be given?"),
    "gadolinium": ("Is gadolinium allowed?", "May MRI dye be given?"), "magnet": ("Is the magnet allowed?",
        "May the patient enter MRI?"),
    "pregnancy": ("Is the patient pregnant?", "Pregnant?"), "allergies": ("Which allergies?", "Any reaction to contrast?"),
    "blood thinner": ("Which blood thinner?", "On a blood thinner?"), "past": ("What is known from before?",
        "What else is known?"),
    "special": ("Anything special?", "What stands out?"),
    "helps": ("Which contrast shows it best?", "What dye would help?"),
    "changes": ("What changes the plan?", "Does anything change the plan?"),
}


def summary(case: Case, written: Written) -> dict[str, str]:
    """What a note says, in plain words, by topic; only what stands in the note is told."""
    protocol = PROTOCOLS[BY_KEY[case.question].protocol]
    return {
        "asked": written.asked, "meaning": MEANINGS[case.question], "region": protocol.region,
        "kidneys": _kidneys(case), "iodinated contrast": _iodine(case), "gadolinium": _gadolinium(case),
        "magnet": _magnet(case),
        "pregnancy": _pregnancy(case, written),
        "allergies": ", ".join(written.facts["alg"]) or "not mentioned",
        "blood thinner": ", ".join(drug for drug in written.facts["meds"] if drug in THINNERS) or "none",
        "past": ", ".join(written.facts["hx"]) or "nothing", "special": _special(case, written),
        "helps": {"iodine": "iodinated contrast", "none": "none"}.get(protocol.contrast, protocol.contrast),
        "changes": " and ".join(REASONS[rule] for rule in protocol_for(case)[1]) or "nothing",
    }


def _pregnancy(case: Case, written: Written) -> str:
    if case.weeks_pregnant is not None:
        return "yes, avoid radiation and gadolinium"
    denied = "not pregnant" in case.near_misses or (case.sex == "M" and written.names_patient)
    return "no" if denied else "not mentioned"


def _kidneys(case: Case) -> str:
    if case.dialysis:
        return "on dialysis" + (f", eGFR {case.egfr} does not count" if case.egfr is not None else "")
    if case.egfr is None:
        return "not mentioned"
    if case.egfr < 30:
        return f"eGFR {case.egfr}, under 30, severely reduced"
    return f"eGFR {case.egfr}, not under 30, " + ("reduced" if case.egfr < 60 else "good")


def _iodine(case: Case) -> str:
    reasons = []
    if case.egfr is not None and case.egfr < 30 and not case.dialysis:
        reasons.append(f"eGFR {case.egfr} is under 30")
    if case.iodine_allergy == "severe":
        reasons.append("severe allergy to iodinated contrast")
    if reasons:
        return "forbidden, " + " and ".join(reasons)
    if case.dialysis:
        return "allowed, on dialysis"
    if case.iodine_allergy == "mild":
        return "allowed, the reaction was mild"
    return "allowed" if case.egfr is None else f"allowed, eGFR {case.egfr} is not under 30"


def _gadolinium(case: Case) -> str:
    if case.gadolinium_allergy == "severe":
        return "forbidden, severe allergy to gadolinium"
    if case.weeks_pregnant is not None:
        return "forbidden, pregnant"
    return "allowed, the reaction was mild" if case.gadolinium_allergy == "mild" else "allowed"


def _magnet(case: Case) -> str:
    if case.implant == "unsafe":
        return "forbidden, implant or metal is MR unsafe"
    return "allowed, the implant is MR conditional" if case.implant == "conditional" else "allowed, no unsafe implant"


def _special(case: Case, written: Written) -> str:
    found = []
    if case.age < 14:
        found.append(f"a child of {case.age} years")
    elif written.names_patient:
        found.append(f"an adult of {case.age} years" if case.age > 17 else f"a youth of {case.age} years")
    if case.red_flag:
        found.append("red flag for infection or tumor")
    if case.d_dimer is not None:
        low = case.wells == "low" and case.d_dimer < 500
        verdict = "embolism is ruled out" if low else "not ruled out"
        found.append(f"probability {case.wells} and D-dimer {case.d_dimer}, {verdict}")
    if is_task(written.asked):
        found.append("a planned examination")
    return ", ".join(found) or "nothing"


def _definitions(random: Random) -> Document:
    """Terms and what they mean; protocol names may stand here, since no note does."""
    lines = []
    for _ in range(random.randint(4, 8)):
        kind = random.random()
        if kind < 0.35:
            indication = random.choice(INDICATIONS)
            phrase = random.choice(indication.phrases)
            region = PROTOCOLS[indication.protocol].region
            lines.append(random.choice((f"{phrase}: {MEANINGS[indication.key]}; region: {region}.",
                                        f"{phrase} means {MEANINGS[indication.key]}.",
                                        f"{random.choice(indication.signs)} may point to {MEANINGS[indication.key]}.")))
        elif kind < 0.5:
            short, long = random.choice(list(ABBREVIATIONS.items()))
            lines.append(random.choice((f"{short} means {long}.", f"{short}: {long}.")))
        elif kind < 0.7:
            term, meaning = random.choice(list(TERMS.items()))
            lines.append(random.choice((f"{term}: {meaning}.", f"{term} means {meaning}.", f"What is {term}? {meaning}.")))
        elif kind < 0.92:
            protocol = random.choice(list(PROTOCOLS.values()))
            contrast = {"iodine": "iodinated contrast is given", "gadolinium": "gadolinium is given",
                        "none": "no contrast"}[protocol.contrast]
            lines.append(random.choice((f"{protocol.name}: {protocol.description}.",
                                        f"{protocol.name}: region {protocol.region}; {contrast}.")))
        else:
            lines.append(random.choice((*(rule.reason for rule in RULES), *CHANGES_NOTHING.values())))
    return Document("", "\n".join(lines))


def _findings(random: Random) -> Document:
    """The text of a short report."""
    indication = random.choice(INDICATIONS)
    phrase, region = random.choice(indication.phrases), PROTOCOLS[indication.protocol].region
    normal = list(NORMAL[region])
    random.shuffle(normal)
    if is_task(phrase):
        verdict = random.choice((f"Seen for {phrase}.", f"Compared with before: no change. Asked: {phrase}."))
    else:
        verdict = random.choice((f"Findings fit {phrase}.", f"No sign of {phrase}.",
                                 f"{phrase[0].upper()}{phrase[1:]} is confirmed.",
                                 f"{phrase[0].upper()}{phrase[1:]} cannot be excluded.", f"Most likely {phrase}."))
    return Document("", f"Report. Region: {region}. Clinical: {random.choice(indication.signs)}. Asked: {phrase}, that is "
                        f"{MEANINGS[indication.key]}.\n"
                        f"Findings: {' '.join(normal[: random.randint(2, len(normal))])}\nImpression: {verdict}")
