"""The pretraining text: no label beside a note, no family of val or test, and summaries that tell the truth."""
from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from minilora import load_tokenizer
from minilora.data.prompts import IGNORED
from minilora.data.radiology import PROTOCOLS, RULES, generate, labels
from minilora.data.radiology import corpus as corpus_module
from minilora.data.radiology.cases import Case
from minilora.data.radiology.corpus import Document, documents, encode_documents, summary
from minilora.data.radiology.draw import draw_case
from minilora.data.radiology.families import families
from minilora.data.radiology.glossary import MEANINGS, NORMAL, REASONS
from minilora.data.radiology.indications import BY_KEY, INDICATIONS
from minilora.data.radiology.notes import is_worked_example, write
from minilora.data.radiology.rules import protocol_for
from minilora.errors import CheckpointError


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in documents(seed=0, n=6000)]


def _kind(text: str) -> str:
    if text.startswith("Note: "):
        return "note"
    return "findings" if text.startswith("Report. ") else "definitions"


def test_a_document_with_a_note_or_findings_never_names_a_protocol(texts: list[str]) -> None:
    names = [name.casefold() for name in labels()]
    for text in texts:
        if _kind(text) != "definitions":
            found = [name for name in names if name in text.casefold()]
            assert found == [], text
        else:
            assert "note:" not in text.casefold(), text


def test_every_protocol_is_defined_somewhere(texts: list[str]) -> None:
    definitions = "\n".join(text for text in texts if _kind(text) == "definitions")
    assert [name for name in PROTOCOLS if name not in definitions] == []


def test_no_frame_of_val_or_test_occurs_in_the_corpus(texts: list[str]) -> None:
    assert {family.split for family in corpus_module._FAMILIES} == {"train", "corpus"}
    everything = "\n".join(texts).casefold()
    held_out = [family for split in ("val", "test") for family in families(split)]
    for family in held_out:
        for layout in filter(None, (family.layout, family.task)):
            frames = [run.strip() for run in re.split(r"\{\w+\}|[\[\]]", layout)]
            frames = [run for run in frames if len(run.split()) > 1]
            found = [run for run in frames if run.casefold() in everything]
            assert len(found) < max(1, len(frames)), (family.id, found)


def test_no_held_out_note_and_no_worked_example_stands_in_the_corpus(texts: list[str]) -> None:
    made = generate(2000, seed=0)
    notes = {" ".join(row.note.casefold().split()) for split in ("val", "test") for row in made[split]}
    seen = {" ".join(line.removeprefix("Note: ").casefold().split()) for text in texts for line in text.split("\n")}
    assert not notes & seen
    assert not any(is_worked_example(text) for text in texts)


def test_five_sixths_are_notes(texts: list[str]) -> None:
    kinds = Counter(_kind(text) for text in texts)
    assert 0.81 < kinds["note"] / len(texts) < 0.87
    assert 0.06 < kinds["definitions"] / len(texts) < 0.1 and 0.06 < kinds["findings"] / len(texts) < 0.1


def test_the_same_seed_gives_the_same_documents_and_the_first_do_not_depend_on_how_many() -> None:
    assert list(documents(3, 40)) == list(documents(3, 60))[:40]
    assert list(documents(3, 40)) != list(documents(4, 40))


def test_a_note_that_is_read_is_given_and_every_other_document_is_told() -> None:
    given = told = 0
    for document in documents(seed=2, n=2000):
        if document.given:
            given += 1
            assert document.given.startswith("Note: ") and document.told.startswith("\n")
            for line in document.told.strip().split("\n"):
                assert re.match(r"(Gist|In short|It says|Summary): |[A-Z][^?]*\? ", line) and line.endswith("."), line
        else:
            told += 1
    assert 0.74 < given / (given + told) < 0.82


def test_a_gist_has_its_two_parts_in_either_order() -> None:
    """So the model cannot wait with one of them: what a label's first word hangs on is known before it."""
    meanings = set(MEANINGS.values())
    gists = [line.partition(": ")[2].rstrip(".").split("; ") for document in documents(seed=3, n=1500)
             for line in document.told.split("\n") if re.match(r"(Gist|In short|It says|Summary): ", line)]
    assert len(gists) > 900 and all(len(parts) == 2 for parts in gists)
    first = [parts[0] in meanings for parts in gists]
    assert all(parts[not leads] in meanings for parts, leads in zip(gists, first, strict=True))
    assert 0.45 < sum(first) / len(first) < 0.55


def test_only_what_is_told_carries_loss() -> None:
    tokenizer = load_tokenizer("tiny")
    texts = [Document("Note: r/o PE", "\nGist: clot."), Document("", "CT means computed tomography.")]
    read, told = encode_documents(tokenizer, texts)
    note = tokenizer.encode("Note: r/o PE")
    assert read.input_ids[: len(note)] == note and read.labels[: len(note)] == [IGNORED] * len(note)
    assert read.labels[len(note) :] == read.input_ids[len(note) :] == [*tokenizer.encode("\nGist: clot.", bos=False), 1]
    assert told.labels == [IGNORED, *told.input_ids[1:]] and told.input_ids[0] == tokenizer.bos_id


def test_a_tokenizer_without_an_end_is_refused() -> None:
    class Endless:
        eos_id = None

    with pytest.raises(CheckpointError, match="no end token"):
        encode_documents(Endless(), [])  # type: ignore[arg-type]


def test_a_share_of_the_notes_is_put_into_capitals_when_asked() -> None:
    def share(capitals: float) -> float:
        notes = [text.given.removeprefix("Note: ") for text in documents(4, 1500, capitals) if text.given]
        return sum(note == note.upper() for note in notes) / len(notes)

    plain = share(0.0)
    assert plain < 0.15 and share(0.5) > 0.4 + plain / 2 and share(1.0) == 1.0


def test_the_gist_names_what_the_rules_looked_at_and_nothing_else() -> None:
    random = Random(5)
    for _ in range(1000):
        case = draw_case(random)
        fired = protocol_for(case)[1]
        changes = summary(case, write(case, random.choice(families("train")), random))["changes"]
        assert changes == (" and ".join(REASONS[rule] for rule in fired) if fired else "nothing")
    assert set(REASONS) == {rule.id for rule in RULES}


def test_documents_are_short_enough_to_pack(texts: list[str]) -> None:
    words = [len(text.split()) for text in texts]
    assert min(words) >= 10 and max(words) <= 200


def test_a_summary_says_what_the_rules_look_at() -> None:
    """Read the summary, not the case: forbidden contrast, magnet and pregnancy explain every override."""
    random = Random(0)
    for _ in range(1500):
        case = draw_case(random)
        told = summary(case, write(case, random.choice(families("train")), random))
        fired = protocol_for(case)[1]
        if "kidney" in fired or "iodine-allergy" in fired:
            assert told["iodinated contrast"].startswith("forbidden"), case
        if "gadolinium-allergy" in fired:
            assert told["gadolinium"].startswith("forbidden"), case
        if "mr-unsafe-implant" in fired:
            assert told["magnet"].startswith("forbidden"), case
        if "pregnancy" in fired:
            assert told["pregnancy"].startswith("yes"), case
        if "low-risk-d-dimer" in fired:
            assert "ruled out" in told["special"] and "not ruled out" not in told["special"], case
        assert told["region"] == PROTOCOLS[BY_KEY[case.question].protocol].region


def test_a_summary_gives_the_egfr_and_its_meaning() -> None:
    random, family = Random(1), families("train")[1]

    def told(**facts: object) -> dict[str, str]:
        case = Case("liverlac", 60, "M", **facts)  # type: ignore[arg-type]
        return summary(case, write(case, family, random))

    assert told(egfr=24)["kidneys"] == "eGFR 24, under 30, severely reduced"
    assert told(egfr=24)["iodinated contrast"] == "forbidden, eGFR 24 is under 30"
    assert told(egfr=71)["iodinated contrast"] == "allowed, eGFR 71 is not under 30"
    assert told(egfr=8, dialysis=True)["iodinated contrast"] == "allowed, on dialysis"
    assert told(iodine_allergy="mild")["iodinated contrast"] == "allowed, the reaction was mild"


def test_the_glossary_covers_every_question_and_region() -> None:
    assert set(MEANINGS) == {indication.key for indication in INDICATIONS}
    assert {PROTOCOLS[indication.protocol].region for indication in INDICATIONS} <= set(NORMAL)
    assert len(set(MEANINGS.values())) == len(MEANINGS)
    assert not any(name.casefold() in rule.reason.casefold() for rule in RULES for name in labels())
