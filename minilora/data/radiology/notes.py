"""A case in words: facts put into the layout of a family, with capitals and typos."""
from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from minilora.data.radiology.cases import Case
from minilora.data.radiology.families import TASK_FRAMES, Family
from minilora.data.radiology.phrases import decisive_facts, is_task, neutral_facts, question, who

# The example that the README and the demo show; the generator never writes it (`write_note` draws again).
WORKED_EXAMPLE = ("History: heart failure, hepatic vein; Diagnosis: concern for liver laceration post-procedure, post-biopsy, "
                  "on apixaban")
SHORTEST, LONGEST = 12, 70      # words
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
    if not facts["hx"]:
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
