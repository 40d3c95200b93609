"""evaluate and compare as a department uses them: other embedders, other methods, and the table that was trained on."""
from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora import TrainConfig, train
from minilora.cli import main
from minilora.score import training_table
from tests.bert_folders import write_bert
from tests.models import write_model
from tests.notes import SECRET, notes, write_csv

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a model), run/ (an adapter trained on train.csv), test.csv (two of its four notes stand in train.csv)."""
    folder = tmp_path_factory.mktemp("world")
    base = write_model(folder / "base")
    rows = notes(16)
    data = write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", [*rows[:2], ("a fall from the stairs", rows[2][1]), ("cough", rows[3][1])])
    train(TrainConfig(model=str(base), data=str(data), out=str(folder / "run"), r=2, max_steps=2, batch_size=4, max_length=96,
                      dtype="float32", quiet=True))
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process."""
    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err
    return run


def evaluate_words(world: Path, out: Path, *more: Any, data: Path | None = None) -> list[Any]:
    return ["evaluate", "--model", world / "base", "--adapter", world / "run", "--data", data or world / "test.csv",
            "--out", out, *more]


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_metrics_say_what_was_scored_and_no_path(world: Path, tmp_path: Path, call: Call) -> None:
    assert call(*evaluate_words(world, tmp_path / "s"))[0] == 0
    text = (tmp_path / "s" / "metrics.json").read_text()
    scored = json.loads(text)["scored"]
    assert scored["adapter"] == sha(world / "run" / "adapter_model.safetensors") and scored["data"] == sha(world / "test.csv")
    assert scored["train"] == sha(world / "train.csv") and scored["model"] == "base" and scored["embedder"] == "base"
    assert len(scored["weights"]) == 64 and scored["labels"] == 4 and str(world) not in text
    assert call("evaluate", "--model", world / "base", "--labels", world / "run" / "labels.txt", "--data", world / "test.csv",
                "--out", tmp_path / "bare", "--quiet")[0] == 0
    bare = json.loads((tmp_path / "bare" / "metrics.json").read_text())["scored"]
    assert bare["adapter"] is None and bare["weights"] != scored["weights"] and bare["train"] is None


def test_notes_of_the_run_s_own_training_table_are_counted_unasked(world: Path, tmp_path: Path, call: Call) -> None:
    code, out, err = call(*evaluate_words(world, tmp_path / "s"))
    assert code == 0 and "2 notes stand in the training table, 0 nearly" in out and SECRET not in out + err
    found = json.loads((tmp_path / "s" / "metrics.json").read_text())["near_duplicates"]
    assert (found["same"], found["near"], found["n_without"]) == (2, 0, 2)


def test_a_training_table_that_was_changed_since_is_not_taken_for_it(world: Path, tmp_path: Path) -> None:
    assert training_table(world / "run") == (world / "train.csv", "input", "label")
    shutil.copytree(world / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.toml").read_text()
    other = write_csv(tmp_path / "other.csv", notes(3))
    (tmp_path / "run" / "config.toml").write_text(config.replace(str(world / "train.csv"), str(other)))
    assert training_table(tmp_path / "run") is None and training_table(world / "base") is None


def test_rows_that_no_answer_is_right_for_are_counted(world: Path, tmp_path: Path, call: Call) -> None:
    rows = notes(4)
    data = write_csv(tmp_path / "odd.csv", [*rows, (f"{SECRET} new", "XR Foot"), ("x", f"{SECRET}'s")])
    code, _, err = call(*evaluate_words(world, tmp_path / "s", "--quiet", data=data))
    assert code == 0 and err.count("\n") == 1 and SECRET not in err
    assert err.endswith("odd.csv: 2 of 6 rows have a label that is none of the 4 labels that can be answered, and can never be "
                        "right\n")
    same = write_csv(tmp_path / "same.csv", [(note, f" {label.upper()} ") for note, label in rows])
    assert call(*evaluate_words(world, tmp_path / "t", "--quiet", data=same))[2] == "", "spelling does not count"
    assert call(*evaluate_words(world, tmp_path / "u", "--quiet", "--free", data=data))[2] == ""


def test_a_bert_measures_cosine_where_it_is_asked_for(world: Path, tmp_path: Path, call: Call) -> None:
    bert = write_bert(tmp_path / "my-bert")
    assert call(*evaluate_words(world, tmp_path / "a"))[0] == 0
    assert call(*evaluate_words(world, tmp_path / "b", "--embedder", bert))[0] == 0
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert one["exact_match"] == other["exact_match"] and one["cosine"] != other["cosine"]
    assert other["scored"]["embedder"] == "my-bert"


def test_a_bag_of_words_and_an_earlier_evaluation_stand_in_the_same_table(world: Path, tmp_path: Path, call: Call) -> None:
    pytest.importorskip("sklearn")
    assert call(*evaluate_words(world, tmp_path / "first", "--quiet"))[0] == 0
    code, out, err = call(*evaluate_words(world, tmp_path / "second", "--baseline", "--against", tmp_path / "first"))
    assert code == 0, err
    assert "against bag of words" in out and "against first: +0.0 points" in out
    found = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert found["baselines"].keys() == {"shuffled", "majority", "bag of words", "first"}
    assert found["comparisons"]["first"]["p_value"] == 1 and found["comparisons"]["bag of words"]["n"] == 4


def test_two_evaluations_are_compared_without_a_model(world: Path, tmp_path: Path, call: Call) -> None:
    assert call(*evaluate_words(world, tmp_path / "one", "--quiet"))[0] == 0
    code, out, err = call("compare", tmp_path / "one", tmp_path / "one")
    assert code == 0 and "4 rows" in out and "p = 1.000, they cannot be told apart" in out and SECRET not in out + err
    code, out, err = call("compare", tmp_path / "one", tmp_path / "none")
    assert (code, out) == (2, "") and err.count("\n") == 1


@pytest.mark.parametrize(("more", "says"), [
    (["--embedder", "none"], "no folder with a config.json"), (["--against", "none"], "none"),
    (["--train", "none.csv"], "none.csv: no such file"), (["--baseline", "--train", "test.csv", "--input-column", "x"], "'x'"),
])
def test_what_is_missing_is_said_before_the_model_is_loaded(world: Path, tmp_path: Path, call: Call, more: list[str], says: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("minilora.predict.Predictor.load", lambda *_: pytest.fail("the model was loaded"))
    code, out, err = call(*evaluate_words(world, tmp_path / "s", *more))
    assert (code, out) == (2, "") and err.count("\n") == 1 and says in err and SECRET not in err
    assert not (tmp_path / "s").exists()


def test_a_baseline_needs_to_know_what_was_trained_on(world: Path, tmp_path: Path, call: Call) -> None:
    pytest.importorskip("sklearn")
    words = ["evaluate", "--model", world / "base", "--labels", world / "run" / "labels.txt", "--data", world / "test.csv",
             "--out", tmp_path / "s", "--baseline"]
    code, _, err = call(*words)
    assert code == 2 and "name it with --train" in err


def test_answers_that_predict_wrote_score_as_the_model_asked_again_does(world: Path, tmp_path: Path, call: Call) -> None:
    predict = ["predict", "--model", world / "base", "--adapter", world / "run", "--data", world / "test.csv", "--quiet"]
    assert call(*predict, "--out", tmp_path / "answers.jsonl")[0] == 0
    (tmp_path / "parts.jsonl").mkdir()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    for number, part in enumerate((lines[:3], [], lines[3:])):
        (tmp_path / "parts.jsonl" / f"part-{number}.jsonl").write_text("".join(part))
    assert call(*evaluate_words(world, tmp_path / "asked"))[0] == 0
    asked = json.loads((tmp_path / "asked" / "metrics.json").read_text())
    for name in ("answers.jsonl", "parts.jsonl"):
        assert call(*evaluate_words(world, tmp_path / f"scores-{name}", "--answers", tmp_path / name))[0] == 0
        found = json.loads((tmp_path / f"scores-{name}" / "metrics.json").read_text())
        assert found["scored"].pop("answers") and not asked["scored"].get("answers")
        assert {**found, "scored": 0, "top_k": 0} == {**asked, "scored": 0, "top_k": 0}, "the table keeps two labels a row"
    first, second = ((tmp_path / folder / "predictions.csv").read_text() for folder in ("asked", "scores-answers.jsonl"))
    assert first == second


def test_answers_of_another_model_or_another_table_are_refused(world: Path, tmp_path: Path, call: Call) -> None:
    shutil.copytree(world / "run", tmp_path / "other")
    (tmp_path / "other" / "labels.txt").write_text("CT Brain\nMR Knee, left\n")
    predict = ["predict", "--model", world / "base", "--data", world / "test.csv", "--quiet"]
    assert call(*predict, "--adapter", tmp_path / "other", "--out", tmp_path / "answers.csv")[0] == 0
    code, _, said = call(*evaluate_words(world, tmp_path / "s", "--answers", tmp_path / "answers.csv"))
    assert code == 2 and "labelled by another model" in said and str(tmp_path / "other") in said
    with (tmp_path / "answers.csv").open("a") as file:          # changed since: no line of the log is of these bytes
        file.write("one more,CT Brain,CT Brain,0.5,,,\n")
    code, _, said = call(*evaluate_words(world, tmp_path / "s", "--answers", tmp_path / "answers.csv"))
    assert code == 2 and "5 rows" in said and not (tmp_path / "s").exists()
    table = (tmp_path / "answers.csv").read_text().replace("one more,CT Brain,CT Brain,0.5,,,\n", "")
    for broken in ("about 0.5", "-0.5", "1.5", "nan"):
        (tmp_path / "answers.csv").write_text(re.sub(r",[01]\.\d+", f",{broken}", table, count=1))
        code, _, said = call(*evaluate_words(world, tmp_path / "s", "--answers", tmp_path / "answers.csv"))
        assert code == 2 and "no number" in said, broken
