"""The imaging protocols a department offers, by the names it uses."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """One protocol: its name, how it images, what part, whether contrast is given, and a sentence about it."""

    name: str
    modality: str       # CT, CTA, MR, US, XR, NM
    region: str
    contrast: str       # iodine, gadolinium, none
    description: str


def _protocols(*rows: tuple[str, str, str, str, str]) -> dict[str, Protocol]:
    return {row[0]: Protocol(*row) for row in rows}


PROTOCOLS: dict[str, Protocol] = _protocols(
    ("CT Brain WO Contrast", "CT", "head", "none",
     "plain CT of the head, fast, shows fresh blood, fractures and large strokes"),
    ("CT Brain W Contrast", "CT", "head", "iodine",
     "CT of the head with iodinated contrast, shows tumours and abscesses where MRI cannot be done"),
    ("CT C-Spine(Bone)", "CT", "neck", "none", "thin CT slices of the cervical spine in bone window, shows fractures"),
    ("CT Sinus WO Contrast", "CT", "head", "none", "plain CT of the paranasal sinuses, shows bone and mucosa"),
    ("CT Temporal Bones WO Contrast", "CT", "head", "none", "very thin plain CT of the ear and mastoid"),
    ("CT Neck W Contrast", "CT", "neck", "iodine", "CT of the soft tissues of the neck with iodinated contrast"),
    ("CT Neck WO Contrast", "CT", "neck", "none", "plain CT of the soft tissues of the neck"),
    ("CTA Head and Neck", "CTA", "head", "iodine", "CT angiography of the arteries of the neck and brain"),
    ("MRA Head and Neck WO Contrast", "MR", "head", "none",
     "time-of-flight MR angiography of the arteries of the neck and brain, no contrast"),
    ("CTA Chest Pulmonary Embolism", "CTA", "chest", "iodine", "CT angiography timed to the pulmonary arteries"),
    ("NM Lung Ventilation Perfusion", "NM", "chest", "none", "scintigraphy of air and blood flow in the lungs"),
    ("CTA Chest Aorta", "CTA", "chest", "iodine", "gated CT angiography of the thoracic aorta"),
    ("CT Chest W Contrast", "CT", "chest", "iodine",
     "CT of the chest with iodinated contrast, shows mediastinum and pleura"),
    ("CT Chest WO Contrast", "CT", "chest", "none", "plain CT of the chest, shows nodules and lung"),
    ("CT Chest High Resolution", "CT", "chest", "none", "thin inspiratory and expiratory CT of the lung tissue"),
    ("CT Chest Low Dose Screening", "CT", "chest", "none", "low dose CT that screens smokers for lung cancer"),
    ("XR Chest", "XR", "chest", "none", "radiograph of heart and lungs in two views"),
    ("CT Abdomen W Contrast", "CT", "abdomen", "iodine",
     "CT of the upper abdomen with iodinated contrast, shows liver, spleen, pancreas and kidneys"),
    ("CT Abdomen WO Contrast", "CT", "abdomen", "none", "plain CT of the upper abdomen"),
    ("CT Abdomen Pelvis W Contrast", "CT", "abdomen and pelvis", "iodine",
     "CT of bowel, abdomen and pelvis with iodinated contrast"),
    ("CT Abdomen Pelvis WO Contrast", "CT", "abdomen and pelvis", "none", "plain CT of abdomen and pelvis"),
    ("CT Kidney Stone WO Contrast", "CT", "urinary tract", "none",
     "low dose plain CT of kidneys, ureters and bladder; stones are dense by themselves"),
    ("CT Urography", "CT", "urinary tract", "iodine",
     "CT of kidneys, ureters and bladder before and after contrast, with an excretory phase"),
    ("CT Enterography", "CT", "abdomen and pelvis", "iodine", "CT of the small bowel distended with oral contrast"),
    ("CT Liver Multiphase W Contrast", "CT", "abdomen", "iodine", "CT of the liver in arterial, portal and delayed phases"),
    ("MRI Liver W WO Contrast", "MR", "abdomen", "gadolinium",
     "MRI that characterizes liver lesions before and after gadolinium"),
    ("MRI Liver WO Contrast", "MR", "abdomen", "none", "MRI of the liver with diffusion, no gadolinium"),
    ("MRCP WO Contrast", "MR", "abdomen", "none", "MRI of bile and pancreatic ducts from their own fluid"),
    ("CTA Abdomen Aorta", "CTA", "abdomen", "iodine", "CT angiography of the abdominal aorta and its branches"),
    ("MRI Abdomen Pelvis WO Contrast", "MR", "abdomen and pelvis", "none", "plain MRI of bowel and pelvis, no radiation"),
    ("US Abdomen", "US", "abdomen", "none", "ultrasound of liver, gallbladder and the upper abdomen"),
    ("US Kidneys and Bladder", "US", "urinary tract", "none", "ultrasound of kidneys and bladder"),
    ("US Pelvis", "US", "pelvis", "none", "ultrasound of uterus and ovaries"),
    ("US Scrotum", "US", "scrotum", "none", "Doppler ultrasound of the testes"),
    ("US Lower Extremity Venous", "US", "leg", "none", "compression ultrasound of the leg veins"),
    ("US Thyroid", "US", "neck", "none", "ultrasound of the thyroid gland"),
    ("US Carotid", "US", "neck", "none", "Doppler ultrasound of the carotid arteries"),
    ("XR Abdomen", "XR", "abdomen", "none", "radiograph of the abdomen"),
    ("MRI Brain W WO Contrast", "MR", "head", "gadolinium", "MRI of the brain before and after gadolinium"),
    ("MRI Brain WO Contrast", "MR", "head", "none", "MRI of the brain with diffusion, no gadolinium"),
    ("MRI Lumbar Spine WO Contrast", "MR", "lumbar spine", "none", "MRI of lumbar discs and nerve roots"),
    ("MRI Lumbar Spine W WO Contrast", "MR", "lumbar spine", "gadolinium",
     "MRI of the lumbar spine before and after gadolinium, for infection and tumour"),
    ("CT Lumbar Spine WO Contrast", "CT", "lumbar spine", "none", "plain CT of the lumbar spine"),
    ("MRI Cervical Spine WO Contrast", "MR", "neck", "none", "MRI of the cervical cord and discs"),
    ("MRI Pelvis W WO Contrast", "MR", "pelvis", "gadolinium", "MRI of the pelvis before and after gadolinium"),
    ("MRI Pelvis WO Contrast", "MR", "pelvis", "none", "plain MRI of the pelvis"),
    ("MRI Knee WO Contrast", "MR", "knee", "none", "MRI of menisci, ligaments and cartilage of the knee"),
    ("XR Knee", "XR", "knee", "none", "radiograph of the knee"),
    ("MRI Shoulder WO Contrast", "MR", "shoulder", "none", "MRI of the rotator cuff"),
    ("US Shoulder", "US", "shoulder", "none", "ultrasound of the rotator cuff"),
    ("XR Ankle", "XR", "ankle", "none", "radiograph of the ankle in three views"),
    ("XR Hand and Wrist", "XR", "hand", "none", "radiograph of hand and wrist"),
    ("XR Hip and Pelvis", "XR", "hip", "none", "radiograph of hip and pelvis"),
    ("NM Bone Scan", "NM", "skeleton", "none", "scintigraphy of bone turnover in the whole skeleton"),
    ("NM Hepatobiliary Scan", "NM", "abdomen", "none", "scintigraphy that follows bile from liver to bowel"),
)
