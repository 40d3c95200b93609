"""Synthetic order notes with protocol labels.

A case is drawn first, the label follows from clinical rules, and the note is then written from the case:

    protocols    what a department offers          indications   what a clinician may ask
    cases        the patient and the findings      rules         from case to protocol, each with reason and source
    notes        a case in words, in many styles   dataset       splits that share no note and no style
    corpus       unlabelled text to pretrain on
"""
from minilora.data.radiology.dataset import generate, labels, write_dataset
from minilora.data.radiology.protocols import PROTOCOLS
from minilora.data.radiology.rules import RULES

__all__ = ["PROTOCOLS", "RULES", "generate", "labels", "write_dataset"]
