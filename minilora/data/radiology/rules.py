"""From a case to its protocol: ordered clinical rules, each with its reason and source.

The question names a default protocol; every rule that applies then replaces it by another.  The order matters: what the
patient needs first, then what the patient cannot have.  Facts that change nothing are listed as well, since knowing what
to ignore is half of protocoling.  Written for teaching; no department's policy, and no advice.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minilora.data.radiology.cases import Case
from minilora.data.radiology.indications import BY_KEY

NO_IODINE = {
    "CT Brain W Contrast": "CT Brain WO Contrast", "CT Neck W Contrast": "CT Neck WO Contrast",
    "CTA Head and Neck": "MRA Head and Neck WO Contrast", "CTA Chest Pulmonary Embolism": "NM Lung Ventilation Perfusion",
    "CTA Chest Aorta": "CT Chest WO Contrast", "CT Chest W Contrast": "CT Chest WO Contrast",
    "CT Abdomen W Contrast": "CT Abdomen WO Contrast", "CT Abdomen Pelvis W Contrast": "CT Abdomen Pelvis WO Contrast",
    "CT Urography": "US Kidneys and Bladder", "CT Enterography": "MRI Abdomen Pelvis WO Contrast",
    "CT Liver Multiphase W Contrast": "CT Abdomen WO Contrast", "CTA Abdomen Aorta": "CT Abdomen Pelvis WO Contrast",
}
NO_GADOLINIUM = {
    "MRI Brain W WO Contrast": "MRI Brain WO Contrast", "MRI Lumbar Spine W WO Contrast": "MRI Lumbar Spine WO Contrast",
    "MRI Liver W WO Contrast": "MRI Liver WO Contrast", "MRI Pelvis W WO Contrast": "MRI Pelvis WO Contrast",
}
NO_MAGNET = {
    "MRI Brain W WO Contrast": "CT Brain W Contrast", "MRI Brain WO Contrast": "CT Brain WO Contrast",
    "MRI Lumbar Spine WO Contrast": "CT Lumbar Spine WO Contrast",
    "MRI Lumbar Spine W WO Contrast": "CT Lumbar Spine WO Contrast",
    "MRI Cervical Spine WO Contrast": "CT C-Spine(Bone)", "MRI Liver W WO Contrast": "CT Liver Multiphase W Contrast",
    "MRCP WO Contrast": "US Abdomen", "MRI Knee WO Contrast": "XR Knee", "MRI Shoulder WO Contrast": "US Shoulder",
    "MRI Pelvis W WO Contrast": "CT Abdomen Pelvis W Contrast",
}
PREGNANT = {
    "CTA Chest Pulmonary Embolism": "NM Lung Ventilation Perfusion",
    "CT Abdomen Pelvis W Contrast": "MRI Abdomen Pelvis WO Contrast",
    "CT Abdomen W Contrast": "US Abdomen", "CT Kidney Stone WO Contrast": "US Kidneys and Bladder",
    "CT Urography": "US Kidneys and Bladder", "CT Enterography": "MRI Abdomen Pelvis WO Contrast",
    "XR Abdomen": "US Abdomen",
    "NM Hepatobiliary Scan": "US Abdomen", **NO_GADOLINIUM,
}


@dataclass(frozen=True)
class Rule:
    """A reason to replace a protocol.

    Attributes: `applies` looks at the case; `instead` maps the protocols it forbids to what is done in their place.
    """

    id: str
    reason: str
    source: str
    applies: Callable[[Case], bool]
    instead: dict[str, str]


RULES: tuple[Rule, ...] = (
    Rule("child-appendicitis", "In children under 14 ultrasound answers most questions of appendicitis without radiation.",
         "ACR Appropriateness Criteria: Suspected Appendicitis-Child",
         lambda case: case.question == "appendicitis" and case.age < 14, {"CT Abdomen Pelvis W Contrast": "US Abdomen"}),
    Rule("low-risk-d-dimer",
         "Low clinical probability and a D-dimer under 500 ng/mL rule embolism out; a chest film looks for the rest.",
         "ACR Appropriateness Criteria: Suspected Pulmonary Embolism",
         lambda case: case.question == "pe" and case.wells == "low" and case.d_dimer is not None and case.d_dimer < 500,
         {"CTA Chest Pulmonary Embolism": "XR Chest"}),
    Rule("back-pain-red-flag",
         "Fever, intravenous drug use or cancer with back pain ask for infection or tumour, which gadolinium shows.",
         "ACR Appropriateness Criteria: Low Back Pain",
         lambda case: case.question == "radiculopathy" and case.red_flag,
         {"MRI Lumbar Spine WO Contrast": "MRI Lumbar Spine W WO Contrast"}),
    Rule("pregnancy", "In pregnancy ultrasound and plain MRI come before CT of the abdomen, and gadolinium is avoided since it "
         "reaches the fetus; for embolism the perfusion scan spares the breast.",
         "ACR-SPR Practice Parameter for Imaging Pregnant or Potentially Pregnant Patients with Ionizing Radiation; "
         "ACR Manual on MR Safety",
         lambda case: case.weeks_pregnant is not None, PREGNANT),
    Rule("mr-unsafe-implant", "An implant or fragment that is not MR conditional can move, heat or fail in the magnet.",
         "ACR Manual on MR Safety", lambda case: case.implant == "unsafe", NO_MAGNET),
    Rule("gadolinium-allergy", "After a severe reaction to gadolinium the examination is done without it.",
         "ACR Manual on Contrast Media", lambda case: case.gadolinium_allergy == "severe", NO_GADOLINIUM),
    Rule("kidney", "Under an eGFR of 30, and not on dialysis, iodinated contrast risks kidney injury.",
         "ACR Manual on Contrast Media; ACR-NKF consensus statement 2020",
         lambda case: case.egfr is not None and case.egfr < 30 and not case.dialysis, NO_IODINE),
    Rule("iodine-allergy",
         "After a severe reaction to iodinated contrast it is not given again where another test will do.",
         "ACR Manual on Contrast Media", lambda case: case.iodine_allergy == "severe", NO_IODINE),
)

CHANGES_NOTHING: dict[str, str] = {
    "blood thinners": "Apixaban, warfarin and their like change the risk of bleeding, not the way it is looked for.",
    "eGFR of 30 or more": "Contrast is given; an eGFR from 30 to 44 asks for care, not for another protocol.",
    "dialysis": "Kidneys that no longer work cannot be harmed: iodinated contrast is given to patients on dialysis.",
    "mild reactions": "Hives or nausea years ago call for premedication at most.",
    "shellfish, penicillin": "Neither allergy has to do with contrast.",
    "MR conditional implants": "They are scanned under the maker's conditions.",
    "metformin": "It may be paused; the protocol stays.",
    "kidney function before gadolinium": "Group II agents are given at any eGFR.",
}


def protocol_for(case: Case) -> tuple[str, tuple[str, ...]]:
    """The protocol a case gets, and the ids of the rules that changed it, in order."""
    protocol, fired = BY_KEY[case.question].protocol, []
    for rule in RULES:
        if rule.applies(case) and protocol in rule.instead:
            protocol = rule.instead[protocol]
            fired.append(rule.id)
    return protocol, tuple(fired)
