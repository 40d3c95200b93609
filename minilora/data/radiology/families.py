"""Layouts of a note, and which split each belongs to.

A phrasing family is a layout: headers, sentence frames, order of parts.  Every family belongs to one split, so the test
set is written in frames that training never saw; the clinical terms are shared, as they are among clinicians.  Some
families are written out; the rest, of train and of the pretraining corpus alone, are composed of announced parts in any
order, so that a question has to be found by what it says and not by where it stands.

Slots: {who} age and sex, {signs} complaints, {q} the bare question, {Q} the question in a frame ("r/o …"), {bg} all
background in one list, or {hx} past problems, {labs}, {meds} and {alg} apart.  A part in [brackets] vanishes when one of its
slots is empty; of <several|words> one is drawn.
"""
from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

FRAMES = ("r/o {}", "rule out {}", "concern for {}", "c/f {}", "eval for {}", "evaluate for {}", "suspected {}", "{}?",
          "?{}", "query {}",
          "assess for {}", "evaluation of {}", "concerning for {}", "suspicion for {}")
TASK_FRAMES = ("{}", "for {}", "requesting {}", "needs {}", "here for {}")      # a staging or follow-up is not suspected


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


WRITTEN: tuple[Family, ...] = (
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
# The parts of a composed layout; a bare slot is a part that nothing announces, "" a patient who is not described.
_QUESTIONS = ("{Q}", "{Q}", "{q}", "Dx {Q}", "Imp: {Q}", "Impression: {q}", "DDx: {q}", "Q: {Q}", "Asked: {q}",
              "Study for {q}", "Indication - {q}", "Order for {q}", "Concern: {q}", "Looking for {q}", "Prelim dx: {q}",
              "Imaging because of {q}", "Exam requested: {q}", "({q})", "** {q} **", "Main issue: {q}", "Evaluate {q}",
              "Assessment: {Q}", "To check: {q}", "Problem: {Q}", "Plan: {Q}", "The team thinks of {q}", "In view of {q}",
              "Differential: {q}", "Goal: {q}", "Needs imaging, {Q}", "My thought is {q}", "Requested for {q}",
              "Test for {q}", "#{q}", "Hypothesis {q}")
_BACKGROUNDS = ("{bg}", "{bg}", "PMH {bg}", "Hx: {bg}", "history includes {bg}", "Comorbidities: {bg}", "Chart: {bg}",
                "From the chart: {bg}", "Problem list: {bg}", "Risk factors: {bg}", "Known: {bg}", "Remarks: {bg}",
                "Other: {bg}", "Add. info: {bg}", "FYI {bg}", "({bg})", "Extra: {bg}", "Patient data: {bg}", "Also {bg}",
                "Please consider: {bg}", "Has had {bg}", "Summary of records: {bg}", "On file - {bg}", "EHR: {bg}",
                "hx {hx}[, meds {meds}][, labs {labs}][, allergies {alg}]",
                "[Labs {labs}; ][Allergic: {alg}; ][Meds {meds}; ]PMHx {hx}",
                "[Takes {meds}. ][Lab values: {labs}. ]Earlier illness: {hx}[. Allergies - {alg}]")
_SIGNS = ("{signs}", "{signs}", "Sx: {signs}", "CC {signs}", "HPI: {signs}", "Now: {signs}", "Today: {signs}", "p/w {signs}",
          "Clinical: {signs}", "Has {signs}", "Exam: {signs}", "Subjective: {signs}", "Chief problem: {signs}", "({signs})",
          "Story: {signs}", "Symptoms are {signs}", "Came with {signs}", "Triage: {signs}", "They report {signs}", "S: {signs}")
_PATIENTS = ("", "", "{who}", "{who}", "Pt {who}", "Patient: {who}", "{who} pt", "Age/sex {who}")
_BETWEEN = (". ", ". ", ". ", "; ", "; ", ", ", " / ", " - ", "\n", " // ", " | ", " + ", " ... ", " ")
_JOINERS = ((", ",), ("; ",), (", ", "; "), (" + ",), (", ", " and "), (" / ",), (". ",))
_NUMBERINGS = (("1) ", "2) ", "3) ", "4) "), ("a. ", "b. ", "c. ", "d. "), ("- ", "- ", "- ", "- "), ("* ", "* ", "* ", "* "))

# Words that announce nothing: before a part, in the corpus alone, so that a reader learns not to lean on headers.
_FILLER_TEXT = """
    again advice all also another any area answer ask at box briefly care code comment day desk detail document due entry
    every field first folder form further given group hello here hour idea info it item kindly last letter line list local
    main matter memo message more morning my name need new next night notice now number office on opinion order our page
    paper part per place point read regarding regards room sample second section see send service set sheet short side
    small some source space step still subject table team text that then there they thing third this time title to today
    topic type unit up update view way week what when which will word work write your
"""
_FILLERS = tuple(_FILLER_TEXT.split())


def _announced(part: str, random: Random) -> str:
    """The bare slot of a part behind one to three words that mean nothing here."""
    slot = next(slot for slot in ("{q}", "{Q}", "{bg}", "{hx}", "{signs}") if slot in part)
    words = " ".join(random.sample(_FILLERS, random.randint(1, 3))).capitalize()
    return words + random.choice((": ", " - ", " ", ", ", " = ")) + {"{Q}": "{q}", "{hx}": "{bg}"}.get(slot, slot)


def _composed(split: Literal["train", "corpus"], count: int) -> tuple[Family, ...]:
    """`count` layouts of parts drawn and ordered at random; the same ones every time."""
    random = Random(f"minilora layouts {split}")
    made = []
    for index in range(count):
        parts = [random.choice(options) for options in (_QUESTIONS, _BACKGROUNDS, _SIGNS)]
        if split == "corpus":
            parts = [_announced(part, random) if random.random() < 0.4 else part for part in parts]
        random.shuffle(parts)
        patient = random.choice(_PATIENTS)
        if patient:
            parts.insert(random.choice((0, 0, 0, random.randint(1, 3))), patient)
        if random.random() < 0.1:
            parts = [number + part for number, part in zip(random.choice(_NUMBERINGS), parts, strict=False)]
        layout = random.choice(_BETWEEN).join(parts) + random.choice(("", "."))
        made.append(Family(f"{split}-composed-{index:03d}", split, layout, joiners=random.choice(_JOINERS),
                           case=random.choice(("keep", "keep", "lower", "any"))))
    return tuple(made)


FAMILIES: tuple[Family, ...] = (*WRITTEN, *_composed("train", 120), *_composed("corpus", 600))


def families(split: str) -> list[Family]:
    """The families of one split, in order."""
    return [family for family in FAMILIES if family.split == split]
