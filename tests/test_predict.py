"""From notes to labels: what a predictor takes from a run, tables streamed in order, and scores with the adapters off."""
from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minilora.predict
from minilora import CheckpointError, ConfigError, DataError, LoRAConfig, OutputError, add_lora, load_model, save_adapter
from minilora.adapters import EXTRA_FILE
from minilora.data.prompts import clean_note, encode_example, encode_prompt, load_template, longest_label
from minilora.data.tables import write_labels
from minilora.embed import embed_texts
from minilora.layers.nf4_linear import NF4Linear
from minilora.layers.qlora import base_only, lora_layers, quantization_of
from minilora.predict import FREE_TOKENS, Prediction, Predictor, chunks, predict_table
from minilora.score import predict_all, score_predictions, score_table
from minilora.trie import score_labels
from tests.models import write_model
from tests.notes import LABELS, SECRET, notes, write_csv

TEMPLATE = "[INST] {input} [/INST]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base", std=0.3)


def write_run(base: Path, run: Path, quantize: Any = "nf4", blocksize: int = 64) -> Path:
    """An adapter folder as training leaves it, with large random updates."""
    model = load_model(base, quantize=quantize, blocksize=blocksize, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=4), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    save_adapter(model, run, extra={"template": TEMPLATE, "max_length": 96})
    write_labels(run / "labels.txt", LABELS)
    return run


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(base, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def predictor(base: Path, run: Path) -> Predictor:
    return Predictor.load(str(base), adapter=run, dtype="float32")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# What is loaded


def test_a_run_brings_its_labels_prompt_and_length(predictor: Predictor) -> None:
    assert predictor.labels == LABELS
    assert predictor.template.text == TEMPLATE
    assert predictor.max_length == 96
    assert predictor.room == 96 - longest_label(predictor.tokenizer, LABELS)


@pytest.mark.parametrize(("stored", "blocksize"), [("nf4", 64), ("nf4", 32), (None, 64)])
def test_auto_stores_the_base_as_in_training(base: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, stored: Any,
                                             blocksize: int) -> None:
    predictor = Predictor.load(str(base), adapter=write_run(base, tmp_path / "run", stored, blocksize))
    found = quantization_of(predictor.model)
    assert (found and found.blocksize) == (blocksize if stored else None)
    assert [str(warning.message) for warning in recwarn if "adapter" in str(warning.message)] == []


def test_another_storage_is_had_by_asking_and_warns(base: Path, run: Path) -> None:
    with pytest.warns(UserWarning, match="trained on a base stored as nf4"):
        predictor = Predictor.load(str(base), adapter=run, quantize="none")
    assert quantization_of(predictor.model) is None


def test_nf4_on_request_takes_the_block_size_of_the_training(base: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(str(base), adapter=write_run(base, tmp_path / "run", blocksize=32), quantize="nf4")
    assert {module.blocksize for module in predictor.model.modules() if isinstance(module, NF4Linear)} == {32}


def test_flags_win_over_what_the_run_recorded(base: Path, run: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("yes\nno\n")
    predictor = Predictor.load(str(base), adapter=run, labels=labels, template="note", max_length=50)
    assert predictor.labels == ["yes", "no"] and predictor.template == load_template("note") and predictor.max_length == 50
    assert {answer.label for answer in predictor.predict([note for note, _ in notes(8)])} <= {"yes", "no"}


def test_an_adapter_of_another_tool_gets_the_defaults(base: Path, run: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    predictor = Predictor.load(str(base), adapter=tmp_path, labels=run / "labels.txt")
    assert predictor.template == dataclasses.replace(load_template("note"), name=predictor.template.name)
    assert predictor.max_length == 512 and quantization_of(predictor.model) is not None


def test_without_labels_something_must_say_what_to_answer(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"--labels FILE.*--free"):
        Predictor.load(str(base))


@pytest.mark.parametrize(("content", "words"), [
    ("{", "not readable as JSON"), ("[]", "found list"),
    ('{"base_quantization": "nf4"}', "base_quantization must be"),
    ('{"base_quantization": {"blocksize": "64", "double_quant": true}}', "base_quantization must be"),
    ('{"base_quantization": {"blocksize": 0, "double_quant": true}}', "base_quantization must be"),
    ('{"base_quantization": {"blocksize": 64}}', "base_quantization must be"),
    ('{"template": 7}', "template must be a text"), ('{"max_length": "long"}', "max_length a whole number"),
    ('{"template": "no place for a note"}', "{input} 0 times"),
])
def test_a_broken_record_of_the_run_is_refused(base: Path, run: Path, tmp_path: Path, content: str, words: str) -> None:
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / EXTRA_FILE).write_text(content)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        Predictor.load(str(base), adapter=tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_folder_that_is_not_there_is_named_before_labels_are_asked_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        Predictor.load(str(base), adapter=tmp_path / "none")


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_below_one_is_refused(base: Path, run: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="max_length must be at least 1"):
        Predictor.load(str(base), adapter=run, max_length=length)


# What is answered


def test_answers_stand_in_the_order_of_the_notes_and_empty_ones_get_an_error(predictor: Predictor) -> None:
    asked = ["fall", "", "a long story " * 5, " \r\n\x00", "fever"]
    answers = predictor.predict(asked)
    alone = [predictor.predict([note])[0] for note in asked]
    assert [answer.label for answer in answers] == [answer.label for answer in alone]
    for note, answer, single in zip(asked, answers, alone, strict=True):
        if clean_note(note):
            assert answer.label in LABELS and answer.error is None and answer.runner_up in LABELS
            assert answer.probability == pytest.approx(single.probability, abs=1e-4)
            assert 1 / len(LABELS) - 1e-6 <= (answer.probability or 0) <= 1 + 1e-6, "the most probable of four"
        else:
            assert answer == Prediction("", None, None, "empty note")
    assert predictor.predict([]) == []


def test_the_model_meets_the_very_prompt_it_was_trained_on(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    score_labels = minilora.predict.score_labels

    def spy(model: Any, trie: Any, prompts: list[list[int]]) -> Any:
        seen.extend(prompts)
        return score_labels(model, trie, prompts)

    monkeypatch.setattr(minilora.predict, "score_labels", spy)
    asked = ["fall", "trauma, " * 30 + "r/o bleed", "x" * 300]
    predictor.predict(asked)
    tokenizer, reserve = predictor.tokenizer, longest_label(predictor.tokenizer, LABELS)
    for note, prompt in zip(asked, seen, strict=True):
        for label in LABELS:
            example = encode_example(tokenizer, predictor.template, note, label, predictor.max_length, reserve=reserve)
            assert example.input_ids[: len(prompt)] == prompt and example.labels[len(prompt)] != -100


def test_a_free_answer_is_text_without_probability(base: Path, run: Path) -> None:
    answer, empty = Predictor.load(str(base), adapter=run, free=True).predict(["fall", ""])
    assert answer.probability is None and answer.error is None and len(answer.label) <= FREE_TOKENS
    assert empty.error == "empty note"


def test_the_adapter_decides(base: Path, run: Path, predictor: Predictor) -> None:
    asked = [note for note, _ in notes(16)]
    plain = Predictor.load(str(base), labels=run / "labels.txt", template="inst", dtype="float32")
    with base_only(predictor.model):
        without = predictor.predict(asked)
    assert [a.label for a in without] == [a.label for a in plain.predict(asked)]
    assert [a.probability for a in without] != [a.probability for a in predictor.predict(asked)]


def test_answers_come_with_the_labels_that_come_next(predictor: Predictor) -> None:
    asked = ["fall", "fever"]
    prompts = [encode_prompt(predictor.tokenizer, predictor.template, note, predictor.room).input_ids for note in asked]
    assert predictor.trie is not None
    scores = score_labels(predictor.model, predictor.trie, prompts).exp()
    for answer, row in zip(predictor.predict(asked), scores, strict=True):
        order = row.argsort(descending=True).tolist()
        assert answer.ranked == tuple(LABELS[code] for code in order), "all four, the best first"
        assert (answer.label, answer.runner_up) == answer.ranked[:2]
        assert answer.probability == pytest.approx(float(row[order[0]]), abs=1e-5)
        assert answer.runner_up_probability == pytest.approx(float(row[order[1]]), abs=1e-5)


# Tables


def test_chunks_cut_and_keep_the_order() -> None:
    assert list(chunks(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []


def test_a_table_is_labelled_in_pieces_as_in_one(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = notes(10)
    rows[4] = ("", "CT Brain")
    data = write_csv(tmp_path / "notes.csv", rows)
    assert predict_table(predictor, data, tmp_path / "one.csv", "input", quiet=True) == 10
    monkeypatch.setattr(minilora.predict, "ROWS_AT_ONCE", 3)
    assert predict_table(predictor, data, tmp_path / "pieces.csv", "input", quiet=True) == 10
    one, pieces = rows_of(tmp_path / "one.csv"), rows_of(tmp_path / "pieces.csv")
    assert list(one[0]) == ["input", "label", "prediction", "probability", "error", "runner_up", "runner_up_probability"]
    assert [(row["input"], row["label"]) for row in one] == rows
    assert [row["prediction"] for row in pieces] == [row["prediction"] for row in one]
    assert [row["error"] for row in one] == ["empty note" if index == 4 else "" for index in range(10)]
    assert one[4]["prediction"] == one[4]["probability"] == one[4]["runner_up"] == one[4]["runner_up_probability"] == ""
    for row in one[:4]:
        assert row["runner_up"] in LABELS and row["runner_up"] != row["prediction"]
        assert 0 <= float(row["runner_up_probability"]) <= float(row["probability"]) <= 1 + 1e-5


def test_a_table_that_breaks_off_leaves_no_output(predictor: Predictor, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(5))
    with data.open("a") as file:
        file.write("one,cell,too many\n")
    with pytest.raises(DataError, match=r"row 6 \(line 7\)"):
        predict_table(predictor, data, tmp_path / "out.csv", "input", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]


def test_nothing_is_asked_before_the_tables_are_known_to_fit(predictor: Predictor, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("the model was asked"))
    data = write_csv(tmp_path / "notes.csv", notes(3))
    taken = write_csv(tmp_path / "taken.csv", notes(3), ("input", "prediction"))
    cases: list[tuple[Path, Path, str, type[Exception], str]] = [
        (data, tmp_path / "out.txt", "input", OutputError, "unknown suffix"),
        (data, taken, "input", OutputError, "exists already"),
        (data, tmp_path / "no" / "out.csv", "input", OutputError, "there is no folder"),
        (data, tmp_path / "out.csv", "note", DataError, "no column 'note'"),
        (taken, tmp_path / "out.csv", "input", DataError, "column 'prediction' is one that the output adds"),
    ]
    for source, out, column, error, words in cases:
        with pytest.raises(error, match=words):
            predict_table(predictor, source, out, column, quiet=True)
    with pytest.raises(DataError, match="column 'prediction' is one that the output adds"):
        score_table(predictor, taken, "input", "prediction", tmp_path / "scores", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.csv", "taken.csv"]


# Scores


def test_a_table_is_scored_as_its_predictions_say(predictor: Predictor, tmp_path: Path) -> None:
    rows = notes(12)
    evaluation = score_table(predictor, write_csv(tmp_path / "t.csv", rows), "input", "label", tmp_path / "scores", quiet=True)
    written = rows_of(tmp_path / "scores" / "predictions.csv")
    assert list(written[0]) == ["input", "label", "prediction", "probability", "runner_up", "runner_up_probability"]
    assert [(row["input"], row["label"]) for row in written] == rows
    right = sum(row["prediction"] == row["label"] for row in written) / 12
    assert evaluation.exact_match == pytest.approx(right) and evaluation.n == 12
    assert evaluation.mean_probability == pytest.approx(sum(float(row["probability"]) for row in written) / 12)
    stored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert stored["exact_match"] == evaluation.exact_match and SECRET not in json.dumps(stored)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"metrics.json", "predictions.csv"}


def test_cosine_is_measured_by_the_base_without_the_adapter(base: Path, predictor: Predictor) -> None:
    plain = load_model(base, dtype=torch.float32)
    references, answers = [LABELS[0]] * 3, [Prediction(label, 0.5) for label in LABELS[1:]]
    found = score_predictions(predictor, answers, references).cosine

    def mean_cosine(model: torch.nn.Module) -> float:
        vectors = embed_texts(model, predictor.tokenizer, LABELS)      # type: ignore[arg-type]
        return float((vectors[1:] @ vectors[0]).clamp(min=0).mean())

    assert found == pytest.approx(mean_cosine(plain), abs=1e-4)
    assert found != pytest.approx(mean_cosine(predictor.model), abs=1e-3), "the adapter would have told another"
    assert all(layer.active for _, layer in lora_layers(predictor.model)), "it is switched on again"


def test_an_empty_note_counts_as_wrong_and_confusions_name_the_label_set(predictor: Predictor) -> None:
    answers = [*predict_all(predictor, [""], quiet=True), Prediction(LABELS[0], 0.9), Prediction(LABELS[3], 0.9)]
    evaluation = score_predictions(predictor, answers, [LABELS[0]] * 3)
    assert evaluation.exact_match == pytest.approx(1 / 3)
    assert evaluation.mean_probability is None, "one of the answers has none"
    assert LABELS[3] in {error.prediction for error in evaluation.confusions}, "a label of the set, though no reference"


def test_scores_replace_scores_and_nothing_else(predictor: Predictor, tmp_path: Path) -> None:
    data, out = write_csv(tmp_path / "t.csv", notes(4)), tmp_path / "scores"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            score_table(predictor, data, "input", "label", out, overwrite=overwrite, quiet=True)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    score_table(predictor, data, "input", "label", out, quiet=True)
    with pytest.raises(OutputError, match="--overwrite"):
        score_table(predictor, data, "input", "label", out, quiet=True)
    assert score_table(predictor, data, "input", "label", out, overwrite=True, quiet=True).n == 4
