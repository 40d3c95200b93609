"""A case in words, in many styles.

A phrasing family is a layout: headers, sentence frames, order of parts.  Every family belongs to one split, so the test
set is written in frames that training never saw; the clinical terms are shared, as they are among clinicians.

Slots: {who} age and sex, {signs} complaints, {q} the bare question, {Q} the question in a frame ("r/o …"), {bg} all
background in one list, or {hx} past problems, {labs}, {meds} and {alg} apart.  A part in [brackets] vanishes when one of its
slots is empty; of <several|words> one is drawn.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Literal

from minilora.data.radiology.cases import Case
from minilora.data.radiology.phrases import decisive_facts, is_task, neutral_facts, question, who

# The example that the README and the demo show; the generator never writes it (`write_note` draws again).
WORKED_EXAMPLE = ("History: heart failure, hepatic vein; Diagnosis: concern for liver laceration post-procedure, post-biopsy, "
                  "on apixaban")
FRAMES = ("r/o {}", "rule out {}", "concern for {}", "c/f {}", "eval for {}", "evaluate for {}", "suspected {}", "{}?",
          "?{}", "query {}",
          "assess for {}", "evaluation of {}", "concerning for {}", "suspicion for {}")
TASK_FRAMES = ("{}", "for {}", "requesting {}", "needs {}", "here for {}")      # a staging or follow-up is not suspected
SHORTEST, LONGEST = 12, 70      # words


@dataclass(frozen=True)
class Family:
    """One way to write an order; `task` is the layout for an examination ("lung cancer staging") where `layout` suspects."""

    id: str
    split: Literal["train", "val", "test", "corpus"]
    layout: str
    frames: tuple[str, ...] = FRAMES
    joiners: tuple[str, ...] = (", ", "; ")
    case: Literal["keep", "lower", "upper", "any"] = "keep"
    task: str = ""


def _families(split: Literal["train", "val", "test", "corpus"], *rows: tuple[object, ...]) -> tuple[Family, ...]:
    made = []
    for index, (layout, *options) in enumerate(rows):
        made.append(Family(f"{split}-{index:02d}", split, str(layout),
                           **(options[0] if options else {})))  # type: ignore[arg-type]
    return tuple(made)


FAMILIES: tuple[Family, ...] = (
    *_families(
        "train",
        ("<Notes|Note|Clinical notes>: {signs}. History: {bg}. {Q}.", {"case": "any"}),
        ("History: {bg}; Diagnosis: {Q}",),
        ("<History|Hx>: {bg}. <Diagnosis|Provisional diagnosis>: {Q}, {signs}", {"case": "any"}),
        ("Diagnosis: {Q}. History: {bg}.", {"case": "any"}),
        ("History: {hx}; Diagnosis: {Q}[, on {meds}][, {labs}][, {alg}]", {"joiners": (", ",)}),
        ("{who} <here now|here today|in clinic>, {signs}, {Q}."
         "[ <PMH|PMHx>: {hx}.][ Meds: {meds}.][ Labs: {labs}.][ Allergies: {alg}.]",),
        ("{who}. {signs}.[ {bg}.] {Q}", {"case": "lower"}),
        ("Indication: {q}. <Clinical|Clin info>: {signs}, {bg}.",),
        ("{Q} - {signs} - {bg}", {"case": "any"}),
        ("<Pt|Patient> is a {who} who <presents|is here>: {signs}."
         "[ Past medical history: {hx}.][ Takes {meds}.][ {labs}.][ {alg}.] {Q}.",
         {"joiners": (", ", " and ")}),
        ("{bg}. Now {signs}. {Q}.",),
        ("hx {bg} / now {signs} / {Q}", {"case": "lower"}),
        ("Clinical information: {signs}. {bg}. Question: {q}?", {"case": "upper"}),
        ("Dx: {Q}; Hx: {bg}; Sx: {signs}", {"joiners": (", ",)}),
        ("{who}, {bg}, p/w {signs}, {Q}", {"joiners": (", ",)}),
        ("{signs}. {Q}.[ Earlier: {hx}.][ On {meds}.][ {labs}.][ {alg}.]",),
        ("The patient reports: {signs}. Known problems are {hx}.[ Current drugs: {meds}.]"
         "[ Laboratory: {labs}.][ Allergy: {alg}.] "
         "We want to evaluate for {q}.",
         {"joiners": (", ", " and "),
          "task": "The patient reports: {signs}. Known problems are {hx}.[ Current drugs: {meds}.]"
          "[ Laboratory: {labs}.][ Allergy: {alg}.] This is for {q}."}),
        ("Order: {Q}. <Details|Specifics>: {who}, {signs}; {bg}.",),
        ("<Reason|Why>: {q}\nSymptoms: {signs}\n<Other|Also>: {bg}", {"case": "any"}),
        ("{Q} in {who} with {bg}. {signs}.", {"joiners": (", ",)}),
        ("s: {signs}; pmh {bg}; imaging for {q}", {"case": "lower", "joiners": (", ", " + ")}),
        ("[Allergies: {alg}.][ Labs: {labs}.][ Meds: {meds}.] PMH: {hx}. {who}, {signs}. {Q}.",),
        ("{who}: {Q}. <Complains of|CC>: {signs}.[ Takes {meds}.] Past: {hx}.[ Allergies: {alg}.][ Labs: {labs}.]",),
        ("<ED|Ward|Clinic> note. {who}. CC {signs}. PMHx {bg}. A/P: {Q}.", {"case": "any"}),
    ),
    *_families(
        "val",
        ("Clinical question: {q}. Relevant facts: {bg}. Complaint: {signs}.",),
        ("{who} referred because of: {signs}; {bg}; suspicion is {q}.",
         {"joiners": (", ",), "task": "{who} referred because of: {signs}; {bg}; request is {q}."}),
        ("Complaint - {signs}. Previously - {bg}. Working diagnosis - {q}.",
         {"case": "any", "task": "Complaint - {signs}. Previously - {bg}. Wanted - {q}."}),
        ("We are asked to look for {q}: {signs}, {bg}.", {"joiners": (", ",),
                                                          "task": "We are asked about {q}: {signs}, {bg}."}),
    ),
    *_families(
        "test",
        ("Reason for exam: {q}. Complaining of: {signs}. Background: {bg}.", {"case": "any"}),
        ("{who} seen today: {signs}. Worried about {q}. Of note: {bg}.",
         {"task": "{who} seen today: {signs}. Booked for {q}. Of note: {bg}."}),
        ("Please exclude {q}. {signs}. Past issues: {bg}.", {"task": "Please help with {q}. {signs}. Past issues: {bg}."}),
        ("Presentation: {signs} | Facts: {bg} | Possible {q}",
         {"case": "any", "joiners": (", ", " / "), "task": "Presentation: {signs} | Facts: {bg} | Purpose {q}"}),
        ("Dear colleague, I am sending you this {who}: {signs}. Background: {hx}.[ Medication: {meds}.][ Results: {labs}.]"
         "[ Reactions: {alg}.] Could this be {q}? Thank you.",
         {"joiners": (", ", " and "), "task": "Dear colleague, I am sending you this {who}: {signs}. Background: {hx}."
          "[ Medication: {meds}.][ Results: {labs}.][ Reactions: {alg}.] This is about {q}. Thank you."}),
        ("{signs} => {q}? (context: {bg})", {"case": "lower", "joiners": (", ",)}),
        ("On record: {bg}. Came in today: {signs}. Our main worry is {q}.",
         {"joiners": (", ",), "task": "On record: {bg}. Came in today: {signs}. Our aim is {q}."}),
    ),
    *_families(
        "corpus",
        ("{who}. Story: {signs}. Earlier problems: {bg}. The doctor thinks of {q}.",),
        ("Request: {Q}. Why: {signs}. Also: {bg}.", {"case": "any"}),
        ("{bg}. {signs}. {Q}", {"joiners": (", ", ". ")}),
    ),
)
_PART = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"<([^<>]*)>")


@dataclass(frozen=True)
class Written:
    """A note, and what was put into it: the question as asked, whether age and sex are said, the facts by slot."""

    note: str
    asked: str
    names_patient: bool
    facts: dict[str, list[str]]


def families(split: str) -> list[Family]:
    """The families of one split, in order."""
    return [family for family in FAMILIES if family.split == split]


def write_note(case: Case, family: Family, random: Random) -> str:
    """Write the order note of a case, 12 to 70 words; the same state of `random` gives the same note."""
    return write(case, family, random).note


def write(case: Case, family: Family, random: Random) -> Written:
    """Write the note of a case, and say what stands in it."""
    while True:
        written = _write(case, family, random)
        if not is_worked_example(written.note) and SHORTEST <= len(written.note.split()) <= LONGEST:
            return written


def is_worked_example(note: str) -> bool:
    """Whether the README's example stands in a note, whatever its capitals, spaces and punctuation."""
    return _letters(WORKED_EXAMPLE) in _letters(note)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _write(case: Case, family: Family, random: Random) -> Written:
    decisive, neutral = decisive_facts(case, random), neutral_facts(case, random)
    facts = {slot: neutral.get(slot, []) + decisive.get(slot, []) for slot in ("hx", "labs", "meds", "alg", "signs")}
    if "{hx}" in family.layout and not facts["hx"]:
        facts["hx"] = ["no prior surgery"]
    slots = {slot: [_typo(item, random) if item in neutral.get(slot, []) else item for item in items]
             for slot, items in facts.items()}
    for slot in ("hx", "labs", "meds", "alg"):
        random.shuffle(slots[slot])
    joiner = random.choice(family.joiners)
    asked = question(case, random)
    task = is_task(asked)
    background = slots["hx"] + [f"on {drug}" for drug in slots["meds"]] + slots["labs"] + slots["alg"]
    random.shuffle(background)
    framed = random.choice(TASK_FRAMES if task else family.frames).format(asked)
    values = {"who": who(case, random), "q": asked, "Q": framed, "bg": joiner.join(background),
              **{slot: joiner.join(items) for slot, items in slots.items()}}
    names_patient = "{who}" in family.layout
    if case.age < 14 and not names_patient:         # a child's age decides, so it is always written
        slot = next(slot for slot in ("signs", "bg", "hx") if f"{{{slot}}}" in family.layout)
        values[slot], names_patient = f"{values['who']}, {values[slot]}", True
    layout = _CHOICE.sub(lambda choice: random.choice(choice[1].split("|")),
                         family.task if task and family.task else family.layout)
    text = _PART.sub(lambda part: part[1] if all(values[slot] for slot in _SLOT.findall(part[1])) else "", layout)
    text = _SLOT.sub(lambda slot: values[slot[1]], text).strip().replace("?.", "?").replace("??", "?")
    style = family.case if family.case != "any" else random.choice(("keep", "keep", "lower", "upper"))
    text = {"keep": text[0].upper() + text[1:], "lower": text.lower(), "upper": text.upper()}[style]
    return Written(text, asked, names_patient, facts)


def _typo(text: str, random: Random) -> str:
    """At times two neighbouring letters inside a long word of a fact that decides nothing change places."""
    if random.random() > 0.06:
        return text
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) >= 6 and word.isalpha()]
    if not long:
        return text
    index = random.choice(long)
    at = random.randint(1, len(words[index]) - 3)
    word = words[index]
    words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
