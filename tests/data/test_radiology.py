"""Cases, rules and splits: what decides is written, what does not decide changes nothing, and no split leaks."""
from __future__ import annotations

import csv
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from minilora.data.radiology import PROTOCOLS, RULES, generate, labels, write_dataset
from minilora.data.radiology.cases import Case
from minilora.data.radiology.dataset import Example
from minilora.data.radiology.families import FAMILIES, families
from minilora.data.radiology.indications import BY_KEY, INDICATIONS
from minilora.data.radiology.notes import WORKED_EXAMPLE, is_worked_example, write_note
from minilora.data.radiology.phrases import (
    CONDITIONAL,
    DIALYSIS,
    MILD_GADOLINIUM,
    MILD_IODINE,
    RED_FLAGS,
    SEVERE_GADOLINIUM,
    SEVERE_IODINE,
    UNSAFE,
)
from minilora.data.radiology.rules import protocol_for
from minilora.errors import ConfigError, OutputError

Splits = dict[str, list[Example]]
NEEDED = ("CT Abdomen W Contrast", "CT Abdomen WO Contrast", "CT Brain WO Contrast", "CTA Chest Pulmonary Embolism",
          "CT Urography", "MRI Lumbar Spine WO Contrast", "CT C-Spine(Bone)")


@pytest.fixture(scope="module")
def made() -> Splits:
    return generate(10_000, seed=0)


def _rows(made: Splits) -> list[Example]:
    return [row for split in ("train", "val", "test") for row in made[split]]


# -- rules ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("question", "plain", "fact", "changed", "rule"), [
    ("liverlac", "CT Abdomen W Contrast", {"egfr": 24}, "CT Abdomen WO Contrast", "kidney"),
    ("liverlac", "CT Abdomen W Contrast", {"iodine_allergy": "severe"}, "CT Abdomen WO Contrast", "iodine-allergy"),
    ("pe", "CTA Chest Pulmonary Embolism", {"egfr": 18}, "NM Lung Ventilation Perfusion", "kidney"),
    ("pe", "CTA Chest Pulmonary Embolism", {"sex": "F", "age": 30, "weeks_pregnant": 20}, "NM Lung Ventilation Perfusion",
     "pregnancy"),
    ("pe", "CTA Chest Pulmonary Embolism", {"wells": "low", "d_dimer": 320}, "XR Chest", "low-risk-d-dimer"),
    ("appendicitis", "CT Abdomen Pelvis W Contrast", {"sex": "F", "age": 30, "weeks_pregnant": 20},
     "MRI Abdomen Pelvis WO Contrast", "pregnancy"),
    ("appendicitis", "CT Abdomen Pelvis W Contrast", {"age": 9}, "US Abdomen", "child-appendicitis"),
    ("stone", "CT Kidney Stone WO Contrast", {"sex": "F", "age": 30, "weeks_pregnant": 20}, "US Kidneys and Bladder",
     "pregnancy"),
    ("hematuria", "CT Urography", {"egfr": 29}, "US Kidneys and Bladder", "kidney"),
    ("ms", "MRI Brain W WO Contrast", {"gadolinium_allergy": "severe"}, "MRI Brain WO Contrast", "gadolinium-allergy"),
    ("myelopathy", "MRI Cervical Spine WO Contrast", {"implant": "unsafe"}, "CT C-Spine(Bone)", "mr-unsafe-implant"),
    ("radiculopathy", "MRI Lumbar Spine WO Contrast", {"red_flag": True}, "MRI Lumbar Spine W WO Contrast",
     "back-pain-red-flag"),
])
def test_one_decisive_fact_changes_the_protocol_as_its_rule_says(question: str, plain: str, fact: dict[str, object],
                                                                 changed: str, rule: str) -> None:
    case = Case(question, 50, "M")
    assert protocol_for(case) == (plain, ())
    assert protocol_for(replace(case, **fact)) == (changed, (rule,))


@pytest.mark.parametrize("fact", [
    {"egfr": 30}, {"egfr": 71}, {"egfr": 8, "dialysis": True}, {"dialysis": True}, {"iodine_allergy": "mild"},
    {"gadolinium_allergy": "severe"}, {"implant": "unsafe"}, {"implant": "conditional"},
    {"near_misses": ("not pregnant",)}, {"near_misses": ("irrelevant allergy",)}, {"near_misses": ("no allergy",)},
], ids=str)
def test_a_near_miss_leaves_contrast_ct_as_it_is(fact: dict[str, object]) -> None:
    for question in ("liverlac", "diverticulitis", "neckmass", "aorta", "pe", "lungmass"):
        case = Case(question, 50, "F")
        assert protocol_for(replace(case, **fact)) == protocol_for(case), (question, fact)


def test_a_stone_search_needs_no_contrast_whatever_the_kidneys_and_allergies_say() -> None:
    for fact in ({"egfr": 9}, {"egfr": 90}, {"iodine_allergy": "severe"}, {"dialysis": True}):
        assert protocol_for(replace(Case("stone", 50, "M"), **fact))[0] == "CT Kidney Stone WO Contrast", fact


def test_every_fact_alone_decides_only_through_a_rule_that_names_it(made: Splits) -> None:
    """Take decisive facts away from generated cases, one by one: the label moves only if that fact's rule had fired."""
    harmless = {"egfr": 71, "iodine_allergy": None, "gadolinium_allergy": None, "implant": None, "weeks_pregnant": None}
    rule_of = {"egfr": "kidney", "iodine_allergy": "iodine-allergy", "gadolinium_allergy": "gadolinium-allergy",
               "implant": "mr-unsafe-implant", "weeks_pregnant": "pregnancy"}
    moved: Counter[str] = Counter()
    for row in made["test"]:
        for fact, value in harmless.items():
            label, fired = protocol_for(replace(row.case, **{fact: value}))
            if label != row.label:
                assert rule_of[fact] in row.rules, (fact, row.case)
                assert rule_of[fact] not in fired, (fact, row.case)
                moved[fact] += 1
    assert set(moved) == set(harmless), f"no case of the test split hangs on {set(harmless) - set(moved)}"


def test_rules_have_distinct_ids_reasons_and_sources_and_lead_to_protocols_that_exist() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.reason.endswith(".") and rule.source, rule.id
        assert set(rule.instead) | set(rule.instead.values()) <= set(PROTOCOLS), rule.id


# -- protocols and questions -------------------------------------------------------------------------------------------
def test_the_department_offers_at_least_forty_protocols_of_every_modality() -> None:
    assert labels() == sorted(PROTOCOLS) and len(PROTOCOLS) >= 44
    assert not set(NEEDED) - set(PROTOCOLS)
    assert {protocol.modality for protocol in PROTOCOLS.values()} == {"CT", "CTA", "MR", "US", "XR", "NM"}


def test_no_phrase_asks_two_different_questions() -> None:
    phrases = Counter(phrase.casefold() for indication in INDICATIONS for phrase in indication.phrases)
    assert [phrase for phrase, count in phrases.items() if count > 1] == []
    assert len(BY_KEY) == len(INDICATIONS) and all(indication.protocol in PROTOCOLS for indication in INDICATIONS)


# -- splits -------------------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_notes_and_another_seed_others() -> None:
    first, again, other = generate(300, 5), generate(300, 5), generate(300, 6)
    assert first == again
    assert not {row.note for row in _rows(first)} & {row.note for row in _rows(other)}


def test_another_process_with_another_hash_seed_gives_the_same_notes() -> None:
    code = ("from minilora.data.radiology import generate; "
            "print(*(repr(row.note) for rows in generate(150, 2).values() for row in rows), sep='\\n')")
    printed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "77"}, text=True, check=True,
                             capture_output=True, cwd=Path(__file__).resolve().parents[2]).stdout
    assert printed.splitlines() == [repr(row.note) for row in _rows(generate(150, 2))]


def test_four_fifths_are_for_training_and_a_tenth_each_to_watch_and_to_test(made: Splits) -> None:
    assert [len(made[split]) for split in ("train", "val", "test")] == [8000, 1000, 1000]
    assert [len(rows) for rows in generate(123, 0).values()] == [99, 12, 12]


def test_no_note_occurs_twice_in_any_spelling(made: Splits) -> None:
    notes = Counter(" ".join(row.note.casefold().split()) for row in _rows(made))
    assert notes.most_common(1)[0][1] == 1


def test_splits_share_no_phrasing_family_and_no_frame(made: Splits) -> None:
    used = {split: {row.family for row in rows} for split, rows in made.items()}
    assert used == {split: {family.id for family in families(split)} for split in used}
    assert len(used["train"]) >= 16 and len(used["val"]) >= 4 and len(used["test"]) >= 6
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]
    # Runs of two words or more between the slots of a layout are its frame.
    frames: dict[str, set[str]] = {}
    for family in FAMILIES:
        for layout in (family.layout, family.task):
            for run in re.split(r"[{}\[\]<>|:.;,?]|\{\w+\}", layout):
                if len(run.split()) > 1:
                    frames.setdefault(" ".join(run.casefold().split()), set()).add(family.split)
    held_out = {run: splits for run, splits in frames.items() if splits & {"val", "test"}}
    assert len(held_out) > 20
    assert {run: splits for run, splits in held_out.items() if len(splits) > 1} == {}


def test_every_label_is_learnable_and_none_dominates(made: Splits) -> None:
    counts = Counter(row.label for row in made["train"])
    total = sum(counts.values())
    assert set(counts) == set(labels())
    assert max(counts.values()) / total <= 0.05, counts.most_common(1)
    assert min(counts.values()) / total >= 0.006, counts.most_common()[-1]


def test_every_rule_fires_and_overrides_about_two_in_five_notes(made: Splits) -> None:
    fired = Counter(rule for row in made["train"] for rule in row.rules)
    assert set(fired) == {rule.id for rule in RULES}
    assert 0.3 < sum(bool(row.rules) for row in made["train"]) / len(made["train"]) < 0.5


def test_labels_are_what_the_rules_say(made: Splits) -> None:
    for row in _rows(made):
        assert (row.label, row.rules) == protocol_for(row.case)


# -- notes --------------------------------------------------------------------------------------------------------------
def test_notes_are_twelve_to_seventy_words_and_most_twenty_to_forty_five(made: Splits) -> None:
    words = [len(row.note.split()) for row in _rows(made)]
    assert min(words) >= 12 and max(words) <= 70
    assert sum(20 <= count <= 45 for count in words) / len(words) > 0.75


def test_every_decisive_fact_is_written_in_the_note(made: Splits) -> None:
    for row in _rows(made):
        note, case = row.note.casefold(), row.case

        def says(options: tuple[str, ...], note: str = note) -> bool:
            return any(option.casefold() in note for option in options)

        where = (row.family, case)
        assert says(BY_KEY[case.question].phrases), where
        assert case.egfr is None or re.search(rf"gfr(?: of |=| ){case.egfr}\b", note), where
        assert not case.dialysis or says(DIALYSIS), where
        assert case.weeks_pregnant is None or (re.search(rf"\b{case.weeks_pregnant}(?:w| weeks)", note)
                                               and re.search("pregnan|gravid|g2p1", note)), where
        assert case.iodine_allergy is None or says(SEVERE_IODINE if case.iodine_allergy == "severe" else MILD_IODINE), where
        assert case.gadolinium_allergy is None or says(
            SEVERE_GADOLINIUM if case.gadolinium_allergy == "severe" else MILD_GADOLINIUM), where
        assert case.implant is None or says(UNSAFE if case.implant == "unsafe" else CONDITIONAL), where
        assert not case.red_flag or says(RED_FLAGS), where
        assert case.d_dimer is None or (f"dimer {case.d_dimer}" in note and case.wells is not None
                                        and re.search(rf"(?:wells|score|probability) {case.wells}", note)), where
        assert case.age >= 14 or re.search(rf"\b{case.age}(?:\b|[mf])", note), where


def test_no_note_claims_what_the_case_lacks(made: Splits) -> None:
    for row in _rows(made):
        note, case = row.note.casefold(), row.case
        wrong = {
            "severe iodine": case.iodine_allergy != "severe" and any(text.casefold() in note for text in SEVERE_IODINE),
            "severe gadolinium": case.gadolinium_allergy != "severe" and any(t.casefold() in note for t in SEVERE_GADOLINIUM),
            "unsafe": case.implant != "unsafe" and any(text.casefold() in note for text in UNSAFE),
            "weeks": case.weeks_pregnant is None and re.search(r"\d+ ?w(?:eeks)?\b", note) is not None,
            "gfr": case.egfr is None and "gfr" in note, "dialysis": not case.dialysis and "dialysis" in note}
        assert not any(wrong.values()), (wrong, row.family, case)


def test_the_worked_example_stands_in_no_note_but_its_layout_and_words_do(made: Splits) -> None:
    assert not any(is_worked_example(row.note) for row in _rows(made))
    assert is_worked_example(WORKED_EXAMPLE.upper() + ".") and is_worked_example("ED. " + WORKED_EXAMPLE.replace(",", ";"))
    train = [row.note for row in made["train"]]
    assert any(note.startswith("History: ") and "; Diagnosis: concern for " in note for note in train)
    for words in ("hepatic vein", "heart failure", "liver laceration", "post-procedure, post-biopsy", "on apixaban"):
        assert any(words in note for note in train), words
    assert protocol_for(Case("liverlac", 60, "M"))[0] == "CT Abdomen W Contrast"


def test_the_writer_draws_again_when_it_hits_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    from minilora.data.radiology import notes

    drawn = iter([WORKED_EXAMPLE, WORKED_EXAMPLE.lower(), "too short", " ".join(["word"] * 15)])
    monkeypatch.setattr(notes, "_write", lambda *_: notes.Written(next(drawn), "", False, {}))
    assert write_note(Case("liverlac", 60, "M"), families("train")[0], Random(0)) == " ".join(["word"] * 15)


# -- files --------------------------------------------------------------------------------------------------------------
def test_the_files_hold_the_generated_rows_for_the_owner_only(tmp_path: Path) -> None:
    assert write_dataset(tmp_path / "set", n=200, seed=3) == {"train": 160, "val": 20, "test": 20}
    made = generate(200, 3)
    for split in ("train", "val", "test"):
        path = tmp_path / "set" / f"{split}.csv"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["note"], row["label"]) for row in rows] == [(row.note, row.label) for row in made[split]]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["test.csv", "train.csv", "val.csv"]


def test_existing_output_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", n=200, seed=3)
    before = (tmp_path / "set" / "train.csv").read_bytes()
    with pytest.raises(OutputError, match="overwrite"):
        write_dataset(tmp_path / "set", n=200, seed=4)
    assert (tmp_path / "set" / "train.csv").read_bytes() == before
    write_dataset(tmp_path / "set", n=200, seed=4, overwrite=True)
    assert (tmp_path / "set" / "train.csv").read_bytes() != before


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (99, 0), (-5, 0), (200, -1)])
def test_too_few_notes_or_a_negative_seed_are_refused(n: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least"):
        write_dataset(tmp_path / "set", n=n, seed=seed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"no train\.csv"):
        write_dataset(tmp_path / "letters", n=200, seed=0, overwrite=True)
    assert (tmp_path / "letters" / "mother.txt").read_text() == "dear"
