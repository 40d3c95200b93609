"""The main job as a newcomer runs it: what `minilora demo` promises on its last screen must be true."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.compare import compare_files
from minilora.data.radiology import PROTOCOLS
from minilora.data.radiology.notes import WORKED_EXAMPLE, is_worked_example
from minilora.data.tables import read_table
from minilora.demo import EXPECTED
from minilora.report.scorefiles import find_evaluation


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One demo for all tests of this file: some four minutes on two cores."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():     # the demo prints what it does; CI's log may show it
        assert main(["demo", "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.mark.timeout(1800)
def test_the_untuned_base_scores_at_most_a_tenth_and_training_makes_it_nine_tenths(out: Path) -> None:
    before, after = (json.loads((out / name).read_text()) for name in ("before.json", "after.json"))
    assert before["n"] == after["n"] == 2000
    assert before["exact_match"] <= 0.10, before["exact_match"]
    assert after["exact_match"] >= 0.90, after["exact_match"]
    assert after["exact_match"] > 5 * max(guess["exact_match"] for guess in after["baselines"].values())
    assert after["intervals"]["exact_match"][0] <= after["exact_match"] <= after["intervals"]["exact_match"][1]


def test_the_worked_example_stands_in_no_file(out: Path) -> None:
    for split in ("train", "val", "test"):
        assert not any(is_worked_example(row.text) for row in read_table(out / "data" / f"{split}.csv", "note", "label").rows)


def test_the_worked_example_comes_out(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "tiny", "--adapter", str(out / "run"), "--note", WORKED_EXAMPLE]) == 0
    assert capsys.readouterr().out.splitlines()[0] == EXPECTED


def test_free_writing_gives_one_of_the_protocols_and_ends(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the label set the model writes a label by itself and stops: the end token was learnt."""
    assert main(["predict", "--model", "tiny", "--adapter", str(out / "run"), "--free", "--note", WORKED_EXAMPLE]) == 0
    assert capsys.readouterr().out.strip() in PROTOCOLS


def test_the_folder_holds_what_the_page_names(out: Path) -> None:
    assert {path.name for path in out.iterdir()} >= {"before.json", "after.json", "before", "after", "run", "data"}
    run = {path.name for path in (out / "run").iterdir()}
    assert run >= {"config.toml", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                   "labels.txt", "README.md", "checkpoints"}
    first = json.loads((out / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() >= {"step", "loss", "lr", "tokens", "seconds", "peak_bytes"}


def test_every_answer_is_there_before_and_after_and_the_report_takes_the_second(out: Path) -> None:
    for name in ("before", "after"):
        scores = json.loads((out / f"{name}.json").read_text())
        rows = read_table(out / name / "predictions.csv", "note", "label").rows
        assert len(rows) == 2000 and json.loads((out / name / "metrics.json").read_text()) == scores
        assert sum(row.values["prediction"] == row.label for row in rows) / 2000 == scores["exact_match"]
        assert scores["near_duplicates"]["same"] == 0, "no test note stands in the training table"
    assert find_evaluation(out / "run") == (out / "after", "")
    found = compare_files(out / "after", out / "before", "label")
    assert found.verdict() == "better" and found.p_value < 1e-100


def test_a_second_demo_does_not_replace_the_first_unasked(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "after.json").is_file()
