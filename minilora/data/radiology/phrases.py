"""Facts in words: what orders say for each finding, and what else they say."""
from __future__ import annotations

import re
from random import Random

from minilora.data.radiology.cases import Case
from minilora.data.radiology.indications import BY_KEY, INDICATIONS

CHRONIC = ("heart failure", "diabetes", "hypertension", "COPD", "asthma", "atrial fibrillation", "CHF", "CAD", "obesity",
           "hypothyroidism",
           "migraine", "depression", "GERD", "gout", "osteoporosis", "anemia", "sleep apnea", "hyperlipidemia",
           "rheumatoid arthritis",
           "psoriasis", "epilepsy", "hepatic vein catheter study", "hepatic vein pressure measurement", "hepatic vein",
           "portal hypertension",
           "cirrhosis", "smoker", "former smoker", "alcohol use", "lupus", "sickle cell trait", "glaucoma", "BPH",
           "endometriosis")
PAST = ("PE in 2017", "DVT years ago", "kidney stones in the past", "stroke in 2012", "old hip fracture", "appendectomy",
        "cholecystectomy",
        "gallstones, asymptomatic", "breast cancer in remission", "colon cancer resected 2015", "prostate cancer treated",
        "knee replacement",
        "lumbar fusion 2010", "pneumonia last winter", "treated thyroid nodule", "melanoma removed 2014",
        "old ankle fracture",
        "diverticulitis two years ago", "meniscus repair as a teenager", "carotid surgery 2016", "hernia repair",
        "C-section", "sinus surgery",
        "coronary stent", "coronary bypass", "liver transplant 2009", "kidney donor", "rotator cuff repair",
        "tonsillectomy", "hysterectomy")
# Trap: no "previous {}": "previous carotid surgery" spells the protocol US Carotid to a search for its name.
PAST_FRAMES = ("h/o {}", "hx of {}", "history of {}", "known {}", "{}", "prior {}", "earlier {}")
VAGUE = ("feels unwell", "worse since yesterday", "sent in by the family doctor", "no better after two visits",
         "seen in the emergency room",
         "third visit this month", "symptoms come and go", "vital signs stable", "exam unclear", "onset unclear",
         "patient is worried",
         "seen on the ward", "second opinion wanted", "referred from another hospital", "discussed by phone",
         "interpreter needed")
CHILDHOOD = ("asthma", "eczema", "epilepsy", "premature birth", "hay fever", "obesity", "type 1 diabetes", "ADHD",
             "ear tubes", "celiac disease")
THINNERS = ("apixaban", "warfarin", "rivaroxaban", "clopidogrel", "aspirin", "enoxaparin", "dabigatran", "heparin drip")
DRUGS = ("metformin", "lisinopril", "insulin", "metoprolol", "atorvastatin", "furosemide", "omeprazole", "prednisone",
         "levothyroxine",
         "gabapentin", "amlodipine", "albuterol", "methotrexate")
PROCEDURE = ("post-procedure", "post-biopsy", "postop day 2", "post procedure", "s/p biopsy")
LABS = ("WBC 14", "WBC 7.2", "Hb 8.1", "Hb 13.4", "lactate 1.1", "lactate 3.9", "CRP 120", "troponin negative", "INR 1.1",
        "INR 2.8",
        "platelets 210", "sodium 138", "bilirubin 0.8", "ESR 18", "glucose 180")

SEVERE_IODINE = ("anaphylaxis to IV contrast", "anaphylactic reaction to iodinated contrast",
                 "severe allergy to CT contrast with bronchospasm",
                 "laryngeal edema after iodinated contrast", "anaphylactic shock after CT dye",
                 "severe iodinated contrast allergy, intubated")
MILD_IODINE = ("mild hives to IV contrast years ago", "nausea with CT contrast before", "itching after CT dye once",
               "mild rash to iodinated contrast",
               "felt warm with IV contrast")
SEVERE_GADOLINIUM = ("anaphylaxis to gadolinium", "severe reaction to gadolinium with hypotension",
                     "anaphylactic reaction to MRI contrast",
                     "bronchospasm after gadolinium", "severe gadolinium allergy")
MILD_GADOLINIUM = ("mild nausea with gadolinium", "single hive after MRI contrast", "mild itching after gadolinium",
                   "headache after MRI contrast")
IRRELEVANT_ALLERGY = ("penicillin allergy", "shellfish allergy", "sulfa allergy, rash", "latex allergy",
                      "allergic to peanuts")
NO_ALLERGY = ("no contrast allergy", "NKDA", "no known allergies", "tolerated contrast before", "no allergies")
UNSAFE = ("pacemaker, not MR conditional", "old pacemaker, MRI unsafe", "MR unsafe ICD", "ferromagnetic aneurysm clip",
          "metal fragment in the orbit",
          "cochlear implant, not MRI compatible", "non MR conditional defibrillator",
          "abandoned pacer leads, MRI contraindicated")
CONDITIONAL = ("MR conditional pacemaker", "MRI safe pacemaker", "MRI compatible ICD", "titanium hip, MRI ok",
               "cochlear implant, MR conditional",
               "MR safe aneurysm coil", "MR conditional defibrillator")
NOT_PREGNANT = ("not pregnant", "pregnancy test negative", "hCG negative", "LMP two weeks ago", "negative urine hCG")
DIALYSIS = ("ESRD on hemodialysis", "on dialysis three times a week", "dialysis MWF", "anuric on hemodialysis",
            "peritoneal dialysis")
RED_FLAGS = ("fever 38.9 and IV drug use", "IV drug use with chills", "known metastatic breast cancer",
             "lung cancer with night pain", "fever and recent bacteremia", "active lymphoma and weight loss")

# Said of one sex only; and what an order asks for without suspecting it.
_OF_MEN = re.compile(r"prostate|PSA|BPH")
_OF_WOMEN = re.compile(r"C-section|hysterectomy|endometriosis|cervical cancer|ovar|breast|adnexal|fibroid|ectopic|hCG|LMP")
_TASK = re.compile(r"workup|staging|follow up|surveillance|screening|position|placement|characterization|stability|"
                   r"split lung|stool burden|post void|liver echo|before surgery|for thrombectomy")
# Illnesses that other questions ask about: in the history of this patient they are a matter of the past.
_ONCE = tuple((indication.key, phrase) for indication in INDICATIONS for phrase in indication.phrases
              if not _TASK.search(phrase) and "after" not in phrase and not re.search(
                  r"ectopic|chronic|metasta|tumor|cancer|mass|glioma|dementia|Alzheimer|abscess|osteomyelitis|discitis|appy|"
                  r"sclerosis|pregnan|torsion|CTEPH|ILD|fibrosis|osteoarthritis|multiple|flare|lesion|upper tract", phrase))
# Rarely true before forty.
_LATE = re.compile(r"carotid|coronary|stroke|cancer|replacement|hip fracture|20(?:09|1\d)|BPH|CAD|CHF|osteoporosis|AAA|"
                   r"aneurysm|endoleak|hydrocephalus|stenosis|infarct|femoral neck")
_ONCE_FRAMES = ("h/o {}", "hx of {}", "prior {}", "history of {} in 20{:02d}", "s/p treatment of {}", "{} in 20{:02d}",
                "{} 3 years ago, resolved", "earlier {}", "treated for {} last year", "past {}")
_ONCE_SHARE, _VAGUE_SHARE = 0.6, 0.45


def fits(text: str, sex: str, age: int = 50) -> bool:
    """Whether a fact can be true of this sex at this age."""
    return not (_OF_MEN if sex == "F" else _OF_WOMEN).search(text) and (age >= 40 or not _LATE.search(text))


def is_task(asked: str) -> bool:
    """Whether an order asks for an examination ("lung cancer staging") and not about a suspected disease."""
    return _TASK.search(asked) is not None


def who(case: Case, random: Random) -> str:
    """Age and sex."""
    adult = case.age >= 18
    noun = ("woman" if adult else "girl") if case.sex == "F" else ("man" if adult else "boy")
    long = "female" if case.sex == "F" else "male"
    return random.choice((f"{case.age} y/o {case.sex}", f"{case.age}{case.sex}", f"{case.age} yo {long}",
                          f"{case.age} year old {noun}",
                          f"{case.age}-year-old {long}", f"{case.age} yo {noun}"))


def _pregnancy(case: Case, random: Random) -> str:
    return random.choice(("pregnant, {} weeks", "{} weeks pregnant", "pregnant at {}w", "G2P1 at {} weeks",
                          "gravid, {} weeks gestation",
                          "intrauterine pregnancy of {} weeks")).format(case.weeks_pregnant)


def _kidney(case: Case, random: Random) -> str:
    return random.choice(("eGFR {}", "GFR {}", "eGFR of {}", "estimated GFR {} mL/min", "eGFR={}", "eGFR {} this morning",
                          "kidney function: eGFR {}")).format(case.egfr)


def decisive_facts(case: Case, random: Random) -> dict[str, list[str]]:
    """Facts of the case that a rule may look at, in words, by slot: "hx", "labs", "alg"."""
    hx, labs, allergies = [], [], []
    if case.weeks_pregnant is not None:
        hx.append(_pregnancy(case, random))
    if "not pregnant" in case.near_misses:
        hx.append(random.choice(NOT_PREGNANT))
    if case.implant is not None:
        hx.append(random.choice(UNSAFE if case.implant == "unsafe" else CONDITIONAL))
    if case.dialysis:
        hx.append(random.choice(DIALYSIS))
    if case.red_flag:
        hx.append(random.choice(RED_FLAGS))
    if case.egfr is not None:
        labs.append(_kidney(case, random))
    if case.d_dimer is not None:
        labs.append(f"{random.choice(('Wells score', 'Wells', 'pretest probability'))} {case.wells}")
        labs.append(f"{random.choice(('D-dimer', 'd-dimer', 'D dimer'))} {case.d_dimer}")
    if case.iodine_allergy is not None:
        allergies.append(random.choice(SEVERE_IODINE if case.iodine_allergy == "severe" else MILD_IODINE))
    if case.gadolinium_allergy is not None:
        allergies.append(random.choice(SEVERE_GADOLINIUM if case.gadolinium_allergy == "severe" else MILD_GADOLINIUM))
    if "irrelevant allergy" in case.near_misses:
        allergies.append(random.choice(IRRELEVANT_ALLERGY))
    if "no allergy" in case.near_misses:
        allergies.append(random.choice(NO_ALLERGY))
    return {"hx": hx, "labs": labs, "alg": allergies}


def neutral_facts(case: Case, random: Random) -> dict[str, list[str]]:
    """Facts that decide nothing, by slot: "hx", "labs", "meds", "signs"."""
    adult = case.age >= 19
    hx = [item for item in random.sample(CHRONIC if adult else CHILDHOOD, random.choice((1, 1, 2, 2))) if fits(item,
        case.sex, case.age)]
    if "smoker" in hx and "former smoker" in hx:
        hx.remove("smoker")
    for past in random.sample(PAST, random.choice((0, 1, 1, 2)) if adult else 0):
        if not fits(past, case.sex, case.age) or (past == "hysterectomy" and case.weeks_pregnant):
            continue
        dated = any(word in past for word in ("old ", "ago", "past", "20", "last"))
        hx.append(random.choice(PAST_FRAMES[:5] if dated else PAST_FRAMES).format(past))
    if adult and case.question != "radiculopathy" and random.random() < _ONCE_SHARE:
        key, phrase = random.choice(_ONCE)
        if key != case.question and fits(phrase, case.sex, case.age) and BY_KEY[key].sex in (None, case.sex):
            hx.append(random.choice(_ONCE_FRAMES).format(phrase, random.randint(5, 23)))
    meds = random.sample(THINNERS, 1) if adult and random.random() < 0.35 else []
    meds += random.sample(DRUGS, random.choice((0, 0, 1, 2)) if adult else 0)
    by_name = {lab.split()[0]: lab for lab in random.sample(LABS, random.choice((0, 0, 1, 2)))}      # one value of a kind
    labs = list(by_name.values())
    fitting = [sign for sign in BY_KEY[case.question].signs if fits(sign, case.sex)]
    signs = random.sample(fitting, min(len(fitting), random.choice((1, 1, 2))))
    if random.random() < _VAGUE_SHARE:      # many orders say nothing that would give the answer away
        signs = random.sample(VAGUE, random.choice((1, 2)))
    return {"hx": hx, "labs": labs, "meds": meds, "signs": signs}


def question(case: Case, random: Random) -> str:
    """The question in the words of an order, at times with the procedure it follows."""
    asked = random.choice([phrase for phrase in BY_KEY[case.question].phrases if fits(phrase,
        case.sex) or BY_KEY[case.question].sex])
    if case.question in ("liverlac", "postbiopsy", "spleen") and random.random() < 0.4:
        asked += " " + ", ".join(random.sample(PROCEDURE, random.choice((1, 2))))
    return asked
