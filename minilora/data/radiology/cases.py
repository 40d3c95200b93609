"""The case: a patient, a question, and the findings that decide or only distract."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """What is true of the patient; None means not known and not mentioned.

    Attributes: `question` is an indication's key; `egfr` in mL/min/1.73 m²; `d_dimer` in ng/mL; allergies are "mild" or
        "severe"; `implant` is "conditional" or "unsafe"; `red_flag` belongs to back pain; `near_misses` names facts that
        look decisive and are not ("not pregnant", "irrelevant allergy").
    """

    question: str
    age: int
    sex: str
    weeks_pregnant: int | None = None
    egfr: int | None = None
    dialysis: bool = False
    iodine_allergy: str | None = None
    gadolinium_allergy: str | None = None
    implant: str | None = None
    red_flag: bool = False
    wells: str | None = None
    d_dimer: int | None = None
    near_misses: tuple[str, ...] = ()
