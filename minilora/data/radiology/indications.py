"""What a clinician may ask, and the protocol that answers it when nothing speaks against it.

Defaults follow the ACR Appropriateness Criteria topic of each complaint.  Surface forms are what orders say: formal,
short, and slang.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Indication:
    """A question: its default protocol, the ways to say it, what the patient may complain of, and who has it."""

    key: str
    protocol: str
    phrases: tuple[str, ...]
    signs: tuple[str, ...]
    sex: str | None = None
    ages: tuple[int, int] = (19, 88)


def _ask(key: str, protocol: str, phrases: str, signs: str, sex: str | None = None,
         ages: tuple[int, int] = (19, 88)) -> Indication:
    """`phrases` and `signs` are separated by semicolons."""
    return Indication(key, protocol, tuple(p.strip() for p in phrases.split(";")),
                      tuple(s.strip() for s in signs.split(";")), sex, ages)


INDICATIONS: tuple[Indication, ...] = (
    # head and neck
    _ask("bleed", "CT Brain WO Contrast",
         "intracranial hemorrhage; ICH; intracranial bleed; subdural hematoma; subarachnoid hemorrhage",
         "worst headache of life; fall with head strike; confusion after a fall; vomiting and drowsiness; "
         "unwitnessed fall"),
    _ask("headinjury", "CT Brain WO Contrast",
         "skull fracture; head injury; traumatic brain injury; closed head injury",
         "loss of consciousness; scalp laceration; assault with a bat; high speed car crash", ages=(6, 88)),
    _ask("cspine", "CT C-Spine(Bone)",
         "cervical spine fracture; C-spine fracture; neck fracture; unstable cervical injury",
         "midline neck tenderness; diving accident; neck pain after rollover crash; fall down stairs with neck pain"),
    _ask("sinus", "CT Sinus WO Contrast",
         "chronic sinusitis; sinus disease; nasal polyps; recurrent sinusitis before surgery",
         "facial pressure; nasal congestion for months; purulent nasal discharge; loss of smell"),
    _ask("ear", "CT Temporal Bones WO Contrast",
         "cholesteatoma; mastoiditis; ossicular erosion; otosclerosis",
         "conductive hearing loss; draining ear; ear pain behind the auricle; retracted eardrum", ages=(8, 80)),
    _ask("neckabscess", "CT Neck W Contrast",
         "peritonsillar abscess; deep neck infection; retropharyngeal abscess; neck abscess",
         "trismus and fever; muffled voice; painful swallowing; swelling under the jaw"),
    _ask("neckmass", "CT Neck W Contrast",
         "neck mass; malignant neck lymph nodes; laryngeal cancer; tongue base tumor",
         "lump in the neck; hoarse voice for weeks; enlarged lymph node in the neck; weight loss and smoking"),
    _ask("lvo", "CTA Head and Neck",
         "large vessel occlusion; LVO; acute stroke for thrombectomy; basilar occlusion",
         "sudden right sided weakness; aphasia since one hour; NIHSS 16; gaze deviation"),
    _ask("cervdissect", "CTA Head and Neck",
         "carotid dissection; vertebral artery dissection; cervical artery dissection; brain aneurysm",
         "neck pain with Horner syndrome; dizziness after chiropractor; thunderclap headache; pulsatile tinnitus"),
    _ask("carotid", "US Carotid",
         "carotid stenosis; carotid plaque; internal carotid narrowing; follow up of carotid stenosis",
         "carotid bruit; amaurosis fugax; before bypass surgery; transient vision loss", ages=(50, 88)),
    _ask("thyroid", "US Thyroid",
         "thyroid nodule; goiter; enlarged thyroid; thyroid cyst",
         "palpable thyroid lump; raised TSH; swelling low in the neck; fullness when swallowing"),
    _ask("braintumor", "MRI Brain W WO Contrast",
         "brain tumor; brain metastases; glioma; intracranial mass",
         "new seizure; morning headache with vomiting; personality change; progressive hemiparesis"),
    _ask("ms", "MRI Brain W WO Contrast",
         "multiple sclerosis; demyelination; MS flare; active demyelinating lesions",
         "optic neuritis; numbness in both legs; double vision; tingling that comes and goes", ages=(19, 55)),
    _ask("brainabscess", "MRI Brain W WO Contrast",
         "brain abscess; meningitis complication; pituitary adenoma; acoustic neuroma",
         "fever with headache; visual field cut; raised prolactin; one sided hearing loss"),
    _ask("subacutestroke", "MRI Brain WO Contrast",
         "subacute stroke; posterior fossa infarct; lacunar infarct; TIA workup",
         "vertigo since yesterday; facial droop two days ago; clumsy hand; transient slurred speech", ages=(40, 88)),
    _ask("dementia", "MRI Brain WO Contrast",
         "dementia; memory loss workup; Alzheimer disease; normal pressure hydrocephalus",
         "progressive forgetfulness; gait disturbance and incontinence; getting lost; word finding trouble", ages=(55, 88)),
    # chest
    _ask("pe", "CTA Chest Pulmonary Embolism",
         "pulmonary embolism; PE; acute PE; pulmonary embolus; PE as cause of hypoxia",
         "pleuritic chest pain; sudden shortness of breath; tachycardia and hypoxia; hemoptysis; calf swelling with "
         "dyspnea"),
    _ask("cteph", "NM Lung Ventilation Perfusion",
         "chronic thromboembolic pulmonary hypertension; CTEPH; chronic thromboembolic disease; split lung function",
         "dyspnea on exertion for a year; raised pulmonary pressure on echo; before lung resection; right heart "
         "strain, chronic"),
    _ask("aorta", "CTA Chest Aorta",
         "aortic dissection; thoracic aortic aneurysm; type B dissection; acute aortic syndrome",
         "tearing chest pain to the back; unequal arm pressures; wide mediastinum on film; Marfan with chest pain"),
    _ask("lungmass", "CT Chest W Contrast",
         "lung cancer staging; mediastinal mass; hilar mass; lung mass",
         "weight loss with cough; coin lesion on film; hoarseness and smoking; SVC swelling"),
    _ask("empyema", "CT Chest W Contrast",
         "empyema; lung abscess; complicated parapneumonic effusion; loculated pleural effusion",
         "fever despite antibiotics; persistent effusion; foul sputum; chest tube not draining"),
    _ask("nodule", "CT Chest WO Contrast",
         "follow up of pulmonary nodule; lung nodule follow up; stability of lung nodules; nodule surveillance",
         "6 mm nodule last year; incidental nodule on old scan; due for interval scan; known granulomas"),
    _ask("ild", "CT Chest High Resolution",
         "interstitial lung disease; pulmonary fibrosis; ILD; bronchiectasis; hypersensitivity pneumonitis",
         "velcro crackles; restrictive lung function; dry cough for a year; clubbing; bird keeper with dyspnea"),
    _ask("screening", "CT Chest Low Dose Screening",
         "lung cancer screening; annual lung screening; low dose screening; LDCT screening",
         "40 pack years; current smoker; quit smoking 5 years ago; no symptoms", ages=(50, 80)),
    _ask("pneumonia", "XR Chest",
         "pneumonia; community acquired pneumonia; infiltrate; chest infection",
         "fever and productive cough; crackles at the base; cough for five days; low oxygen with fever", ages=(3, 88)),
    _ask("line", "XR Chest",
         "line placement; tube position after intubation; pneumothorax after line placement; central line position",
         "just intubated; new subclavian line; new PICC; after thoracentesis"),
    # abdomen
    _ask("liverlac", "CT Abdomen W Contrast",
         "liver laceration; hepatic laceration; liver injury; hepatic hematoma; subcapsular liver hematoma",
         "right upper abdominal bruising; falling hematocrit; kicked by a horse; pain after the procedure; shoulder "
         "tip pain"),
    _ask("spleen", "CT Abdomen W Contrast",
         "splenic laceration; splenic rupture; spleen injury; splenic hematoma",
         "left upper quadrant pain; handlebar injury; left rib fractures; hypotension after a fall"),
    _ask("postbiopsy", "CT Abdomen W Contrast",
         "bleeding after liver biopsy; post-biopsy hemorrhage; perinephric hematoma after kidney biopsy; "
         "retroperitoneal bleed after biopsy",
         "drop in hemoglobin; flank pain after biopsy; tachycardia post-procedure; dizzy after the procedure"),
    _ask("pancreatitis", "CT Abdomen W Contrast",
         "pancreatitis complications; necrotizing pancreatitis; pancreatic pseudocyst; pancreatic mass",
         "epigastric pain to the back; lipase 2400; painless jaundice; vomiting after alcohol"),
    _ask("appendicitis", "CT Abdomen Pelvis W Contrast",
         "appendicitis; acute appendicitis; perforated appendix; appy",
         "right lower quadrant pain; pain migrating to the right lower belly; rebound tenderness; fever and "
         "anorexia", ages=(6, 70)),
    _ask("diverticulitis", "CT Abdomen Pelvis W Contrast",
         "diverticulitis; diverticular abscess; colitis; perforated diverticulum",
         "left lower quadrant pain; fever and bloating; bloody diarrhea; change in bowel habit"),
    _ask("obstruction", "CT Abdomen Pelvis W Contrast",
         "small bowel obstruction; SBO; bowel obstruction; volvulus; incarcerated hernia",
         "vomiting and distension; no stool for three days; high pitched bowel sounds; groin lump that will not "
         "reduce"),
    _ask("abscess", "CT Abdomen Pelvis W Contrast",
         "intraabdominal abscess; postoperative collection; anastomotic leak; pelvic abscess",
         "fever a week after surgery; wound drainage; rising white count; persistent ileus"),
    _ask("stone", "CT Kidney Stone WO Contrast",
         "kidney stone; renal stone; ureteral stone; nephrolithiasis; renal colic; ureterolithiasis",
         "colicky flank pain; flank pain to the groin; cannot sit still from pain; blood on the dipstick"),
    _ask("hematuria", "CT Urography",
         "hematuria workup; urothelial cancer; painless hematuria; gross hematuria; upper tract tumor",
         "visible blood in urine; positive urine cytology; clots in the urine; microscopic hematuria twice"),
    _ask("hydronephrosis", "US Kidneys and Bladder",
         "hydronephrosis; urinary retention; obstructive uropathy; post void residual; renal cysts",
         "rising creatinine; weak stream; full bladder on exam; recurrent urinary infections"),
    _ask("crohn", "CT Enterography",
         "active Crohn disease; small bowel Crohn flare; terminal ileitis; small bowel tumor",
         "chronic diarrhea; weight loss and cramping; raised calprotectin; obscure bleeding after negative scopes",
         ages=(19, 70)),
    _ask("liverlesion", "MRI Liver W WO Contrast",
         "indeterminate liver lesion; hepatocellular carcinoma; HCC; liver mass characterization; focal nodular "
         "hyperplasia",
         "cirrhosis with raised AFP; lesion on ultrasound; hepatitis B carrier; incidental liver spot"),
    _ask("bileduct", "MRCP WO Contrast",
         "choledocholithiasis; bile duct stone; biliary stricture; common duct stone; primary sclerosing "
         "cholangitis",
         "jaundice with dilated duct; raised bilirubin after gallstones; pale stools; itching and dark urine"),
    _ask("gallbladder", "US Abdomen",
         "gallstones; cholecystitis; acute cholecystitis; biliary colic; cholelithiasis",
         "right upper quadrant pain after meals; positive Murphy sign; nausea after fatty food; epigastric cramps "
         "at night"),
    _ask("ascites", "US Abdomen",
         "ascites; fatty liver; splenomegaly; portal vein thrombosis; liver echo for cirrhosis",
         "abnormal liver tests; shifting dullness; growing belly; raised ALT"),
    _ask("bileleak", "NM Hepatobiliary Scan",
         "bile leak; acalculous cholecystitis; biliary dyskinesia; sphincter of Oddi dysfunction",
         "pain after cholecystectomy; ICU patient with fever; bilious drain output; normal ultrasound but typical "
         "pain"),
    _ask("aaa", "CTA Abdomen Aorta",
         "ruptured abdominal aortic aneurysm; AAA; mesenteric ischemia; endoleak; AAA rupture",
         "pulsatile mass; pain out of proportion; back pain with hypotension; lactate 6 with belly pain", ages=(50, 88)),
    _ask("constipation", "XR Abdomen",
         "constipation; stool burden; feeding tube position; swallowed foreign body; nasogastric tube position",
         "no bowel movement in a week; new tube, no aspirate; swallowed a coin; encopresis", ages=(3, 88)),
    # pelvis
    _ask("ovary", "US Pelvis",
         "ovarian torsion; ovarian cyst; fibroids; ectopic pregnancy; adnexal mass",
         "sudden pelvic pain; heavy periods; adnexal tenderness; intermenstrual bleeding", "F", (15, 52)),
    _ask("testis", "US Scrotum",
         "testicular torsion; epididymitis; testicular mass; scrotal hematoma; hydrocele",
         "sudden scrotal pain; high riding testis; painless testicular lump; swollen scrotum", "M", (9, 60)),
    _ask("fistula", "MRI Pelvis W WO Contrast",
         "perianal fistula; rectal cancer staging; pelvic osteomyelitis; cervical cancer staging; prostate cancer "
         "staging",
         "draining sinus near the anus; low rectal tumor on scope; sacral pressure wound; raised tumor marker"),
    # veins, bones, joints
    _ask("dvt", "US Lower Extremity Venous",
         "DVT; deep vein thrombosis; leg clot; femoral vein thrombosis",
         "unilateral leg swelling; calf tenderness; red warm calf; swollen thigh after surgery"),
    _ask("radiculopathy", "MRI Lumbar Spine WO Contrast",
         "lumbar disc herniation; lumbar radiculopathy; sciatica; spinal stenosis; nerve root compression",
         "back pain down the left leg; positive straight leg raise; weak dorsiflexion; numb foot; failed "
         "physiotherapy"),
    _ask("discitis", "MRI Lumbar Spine W WO Contrast",
         "lumbar discitis; epidural abscess; vertebral osteomyelitis; spinal metastasis of the lumbar spine",
         "back pain with fever; night pain in the back; positive blood cultures with back pain; raised ESR and back "
         "pain"),
    _ask("lumbarfracture", "CT Lumbar Spine WO Contrast",
         "lumbar fracture; burst fracture of L1; pars defect; lumbar compression fracture after trauma",
         "fall from a roof; parachute landing; lumbar step off; back pain after car crash"),
    _ask("myelopathy", "MRI Cervical Spine WO Contrast",
         "cervical myelopathy; cervical radiculopathy; cervical disc herniation; cervical cord compression",
         "hand clumsiness; brisk reflexes; arm pain and numb thumb; unsteady gait with neck stiffness"),
    _ask("meniscus", "MRI Knee WO Contrast",
         "meniscal tear; ACL tear; internal derangement of the knee; posterior cruciate tear",
         "locking knee; knee gives way; twisting injury at football; joint line tenderness", ages=(15, 65)),
    _ask("kneeoa", "XR Knee",
         "knee osteoarthritis; patellar fracture; knee effusion after fall; tibial plateau fracture",
         "knee pain on stairs; cannot bear weight on the knee; crepitus of the knee; fall onto the knee"),
    _ask("cuff", "MRI Shoulder WO Contrast",
         "rotator cuff tear; labral tear; supraspinatus tear; shoulder instability",
         "weak abduction; night pain in the shoulder; dislocated twice; cannot lift the arm", ages=(18, 75)),
    _ask("bursitis", "US Shoulder",
         "shoulder bursitis; biceps tendinitis; calcific tendinitis; subacromial impingement",
         "painful arc; pain at the front of the shoulder; tender bicipital groove; stiff shoulder after swimming"),
    _ask("ankle", "XR Ankle",
         "ankle fracture; malleolar fracture; ankle sprain; fibula fracture",
         "inversion injury; unable to take four steps; swollen lateral malleolus; rolled the ankle", ages=(6, 88)),
    _ask("wrist", "XR Hand and Wrist",
         "scaphoid fracture; wrist fracture; boxer fracture; distal radius fracture; hand arthritis",
         "fall on outstretched hand; snuffbox tenderness; punched a wall; swollen knuckles", ages=(6, 88)),
    _ask("hip", "XR Hip and Pelvis",
         "hip fracture; femoral neck fracture; hip osteoarthritis; pelvic ring fracture",
         "shortened rotated leg; groin pain on walking; fall in the nursing home; cannot stand", ages=(30, 88)),
    _ask("bonemets", "NM Bone Scan",
         "bone metastases; skeletal metastases; bone mets; occult stress injury",
         "PSA 85; diffuse bone pain; raised alkaline phosphatase; breast cancer with rib pain"),
)
BY_KEY: dict[str, Indication] = {indication.key: indication for indication in INDICATIONS}
