"""Patterns for what names somebody: what they must find, and what of an order note they must leave alone."""
from __future__ import annotations

from pathlib import Path

import pytest

from minilora.data.radiology import write_dataset
from minilora.data.tables import iter_table
from minilora.identifiers import PATTERNS, identifier_kinds

FOUND = {
    "dates": ["seen 3/14/2024 for pain", "DOB 01.02.1956", "since 2024-03-14", "on 3-4-24", "14 March 2024", "March 3rd, 2021",
              "dec 25 2020", "SEPT 3, 2019"],
    "phone numbers": ["call (555) 123-4567", "555-123-4567 for results", "+1 555.123.4567", "0161 496 0000",
                      "tel. +49 30 1234 5678", "+43 (316) 40400-000"],
    "record numbers": ["MRN 1234567", "mrn: A-12345", "MRN#00123", "patient ID 99812", "Accession no. 445566", "pt # 12345",
                       "record number 55512", "SSN 123-45-6789", "12345678 knee pain", "NHS number 9434765919"],
    "mail addresses": ["reach a.b@clinic.example.org"],
    "names after titles": ["Mr. Smith fell", "for Dr. A. O'Brien", "Mrs Özdemir", "MRS SMITH", "Frau Müller", "Prof. Lee asks"],
}
LEFT_ALONE = ["MR Knee, left", "MR Brain W WO Contrast", "C3/4/5 stenosis", "L4-5, L5/S1 disc", "eGFR 24, creatinine 2.1",
              "BP 120/80", "D-dimer 12000", "T12-L1 fracture", "65 yo m, fall from 3 m", "2 days ago", "may have a bleed",
              "march fracture", "r/o PE, sudden dyspnea", "Dr to call with results", "3-4 cm mass", "GCS 14/15",
              "5/10 pain, worse at night", "CT Abdomen 1.5 x 2.0 cm", "in 2019", "the patient is 54", "case of 3",
              "1-2-3 weeks"]


@pytest.mark.parametrize(("kind", "note"), [(kind, note) for kind, notes in FOUND.items() for note in notes])
def test_what_names_somebody_is_found(kind: str, note: str) -> None:
    assert kind in identifier_kinds(note)


@pytest.mark.parametrize("note", LEFT_ALONE)
def test_what_an_order_says_of_the_body_is_left_alone(note: str) -> None:
    assert identifier_kinds(note) == [], note


def test_synthetic_notes_name_nobody(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", n=1000, seed=3)
    assert [row.number for row in iter_table(tmp_path / "d" / "train.csv", "note") if identifier_kinds(row.text)] == []


@pytest.mark.parametrize("kind", list(PATTERNS))
def test_a_long_note_is_searched_in_no_time(kind: str) -> None:
    """A pattern that goes back and forth over its input would hang here: the file's timeout is the judge."""
    for piece in ("1 ", "12-", "A. ", "(555) ", "jan 1", "mrn ", "a@b.", "Dr A. "):
        PATTERNS[kind].search(piece * 20_000)
