"""A long prediction: killed and resumed to the same bytes, in order, in constant memory, and never mixed with another."""
from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import minilora.predict
from minilora.cli import main
from minilora.data.tables import TableWriter, iter_table, write_labels
from minilora.errors import ConfigError, DataError, OutputError
from minilora.journal import Journal, journal_path
from minilora.predict import Prediction, Predictor, predict_table
from tests.models import write_model
from tests.notes import LABELS, SECRET, notes

ROWS = 23
KILLED = """
import os, signal, sys
import minilora.predict as module
from minilora.predict import Predictor, predict_table
base, labels, data, out, chunks = sys.argv[1:]
module.ROWS_AT_ONCE = 4
predict, calls = Predictor.predict, []
def counted(self, notes):
    calls.append(1)
    if len(calls) > int(chunks):
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(self, notes)
Predictor.predict = counted
predict_table(Predictor.load(base, labels=labels, dtype="float32"), data, out, "input", quiet=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (a model) and labels.txt."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "base", std=0.3)
    write_labels(folder / "labels.txt", LABELS)
    return folder


@pytest.fixture(scope="module")
def predictor(world: Path) -> Predictor:
    return Predictor.load(str(world / "base"), labels=world / "labels.txt", dtype="float32")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilora.predict, "ROWS_AT_ONCE", 4)


def table(path: Path, n: int = ROWS) -> Path:
    """Notes in the format of the suffix; one is empty."""
    rows = [("" if index == 9 else note, f"id {index}") for index, (note, _) in enumerate(notes(n))]
    with TableWriter(path, ("input", "id")) as writer:
        for note, number in rows:
            writer.write({"input": note, "id": number})
    return path


def kill(world: Path, data: Path, out: Path, chunks: int) -> None:
    """Predict in a process of its own that is killed after so many chunks."""
    done = subprocess.run([sys.executable, "-c", KILLED, world / "base", world / "labels.txt", data, out, str(chunks)],
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that the model is asked from here on."""
    asked: list[str] = []
    predict = Predictor.predict

    def spy(self: Predictor, texts: Sequence[str]) -> list[Prediction]:
        asked.extend(texts)
        return predict(self, texts)

    monkeypatch.setattr(Predictor, "predict", spy)
    return asked


@pytest.mark.parametrize(("suffix", "chunks"), [(".csv", 3), (".jsonl", 1), (".parquet", 4), (".csv", 0)])
def test_killed_and_resumed_it_ends_with_the_same_bytes(world: Path, predictor: Predictor, tmp_path: Path, suffix: str,
                                                        chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    data, out = table(tmp_path / f"notes{suffix}"), tmp_path / f"out{suffix}"
    assert predict_table(predictor, data, tmp_path / f"whole{suffix}", "input", quiet=True) == ROWS
    kill(world, data, out, chunks)
    assert not out.exists()
    asked = count_asked(monkeypatch)
    assert predict_table(predictor, data, out, "input", quiet=True, resume=True) == ROWS
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert len(asked) == ROWS - 4 * chunks, "what was answered before is not asked again"
    assert [row.values["id"] for row in iter_table(out, "input")] == [f"id {index}" for index in range(ROWS)]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([data.name, out.name, f"whole{suffix}"] + [name for name in left if chunks == 0 and ".tmp" in name])


def test_what_is_kept_is_for_the_owner_and_goes_with_the_end(world: Path, tmp_path: Path) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    kill(world, data, out, 2)
    kept = journal_path(out)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and SECRET not in kept.read_text()
    assert [len(json.loads(line).get("answers", ())) for line in kept.read_text().splitlines()] == [0, 4, 4]


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_was_cut_short_is_answered_again(world: Path, predictor: Predictor, tmp_path: Path, cut: int) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    predict_table(predictor, data, tmp_path / "whole.csv", "input", quiet=True)
    kill(world, data, out, 3)
    kept = journal_path(out)
    kept.write_bytes(kept.read_bytes()[:-cut])
    assert predict_table(predictor, data, out, "input", quiet=True, resume=True) == ROWS
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_note_that_was_changed_is_answered_again_and_those_before_it_are_not(
        world: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    kill(world, data, out, 4)
    text = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*text[:8], "a fall,id 7\n", *text[9:]]))      # row 8, in the second chunk
    asked = count_asked(monkeypatch)
    predict_table(predictor, data, out, "input", quiet=True, resume=True)
    assert len(asked) == ROWS - 4 and asked[3] == "a fall"
    predict_table(predictor, data, tmp_path / "whole.csv", "input", quiet=True)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_bad_row_far_down_costs_no_answer_before_it(predictor: Predictor, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    good = data.read_text()
    data.write_text(good.replace("id 14\n", "id 14,one too many\n"))
    with pytest.raises(DataError, match=r"row 15 .* \(the answers to 12 rows are kept: mend the table and add --resume\)"):
        predict_table(predictor, data, out, "input", quiet=True)
    assert not out.exists()
    data.write_text(good)
    asked = count_asked(monkeypatch)
    assert predict_table(predictor, data, out, "input", quiet=True, resume=True) == ROWS and len(asked) == ROWS - 12


def test_an_interrupted_output_is_not_begun_anew_unasked(world: Path, predictor: Predictor, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    kill(world, data, out, 2)
    words = ["predict", "--model", str(world / "base"), "--labels", str(world / "labels.txt"), "--dtype", "float32", "--data",
             str(data), "--out", str(out), "--quiet"]
    assert main(words) == 2 and "--resume" in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert main([*words, "--resume", "--overwrite"]) == 2 and "one of the two" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0 and out.is_file()
    assert main([*words, "--resume"]) == 2 and "exists already" in capsys.readouterr().err
    out.unlink()
    kill(world, data, out, 2)
    assert main([*words, "--overwrite"]) == 0 and not journal_path(out).exists()
    with pytest.raises(ConfigError, match="one of the two"):
        predict_table(predictor, data, out, "input", overwrite=True, resume=True)
    assert main([*words[:7], "--note", "a", "--resume"]) == 2 and "--resume goes with --data" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"labels": LABELS[:3]}, {"max_length": 99}, {"template": "inst"}, {"dtype": "bfloat16"}])
def test_answers_of_another_model_or_other_settings_are_not_mixed_in(world: Path, tmp_path: Path,
                                                                     change: dict[str, Any]) -> None:
    data, out = table(tmp_path / "notes.csv"), tmp_path / "out.csv"
    kill(world, data, out, 2)
    if "labels" in change:
        write_labels(tmp_path / "fewer.txt", change["labels"])
        change = {"labels": tmp_path / "fewer.txt"}
    other = Predictor.load(str(world / "base"), **{"labels": world / "labels.txt", "dtype": "float32", **change})
    with pytest.raises(OutputError, match="of another model, adapter, label set, prompt or setting"):
        predict_table(other, data, out, "input", quiet=True, resume=True)
    assert journal_path(out).exists() and not out.exists()


def test_what_comes_after_a_changed_chunk_is_forgotten(tmp_path: Path) -> None:
    out, long = tmp_path / "out.csv", "a label of some length"
    with pytest.raises(KeyboardInterrupt), Journal(out, "model", resume=False) as journal:
        for note in "abc":
            journal.record([note], [[long]])
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Journal(out, "model", resume=True) as journal:
        assert journal.recorded(["a"]) == [[long]] and journal.recorded(["changed"]) is None and journal.rows == 1
        journal.record(["changed"], [["CT"]])
        raise KeyboardInterrupt
    lines = journal_path(out).read_text().splitlines()
    assert [json.loads(line).get("answers") for line in lines] == [None, [[long]], [["CT"]]]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with Journal(out, "model", resume=False) as late, Journal(out, "model", resume=False) as journal:
        journal.record(["a"], [["CT"]])
        with pytest.raises(OutputError, match="another prediction is writing it"), Journal(out, "model", resume=True):
            pass
        with pytest.raises(OutputError, match="another prediction is writing it"):      # one that began at the same time
            late.record(["a"], [["CT"]])
    assert not journal_path(out).exists()


def test_an_output_that_is_being_written_cannot_be_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    with Journal(out, "model", resume=False) as first:
        first.record(["a"], [["CT"]])
        with pytest.raises(OutputError, match="another prediction is writing it"), Journal(out, "model", resume=False):
            pass
        first.record(["b"], [["CT"]])
        assert len(journal_path(out).read_text().splitlines()) == 3


def test_a_journal_takes_away_its_own_file_alone(tmp_path: Path) -> None:
    """Somebody removed it, and another prediction began."""
    out = tmp_path / "out.csv"
    with Journal(out, "model", resume=False) as first:
        first.record(["a"], [["CT"]])
        journal_path(out).unlink()
        second = Journal(out, "model", resume=False).__enter__()
        second.record(["a"], [["MR"]])
    assert journal_path(out).exists(), "a kill of the second would lose what it answered"
    second.__exit__(None, None, None)
    assert not journal_path(out).exists()


def test_a_journal_that_cannot_be_read_is_said_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    journal_path(out).mkdir()
    with pytest.raises(OutputError, match=r"out\.csv\.answers: Is a directory; remove it"), Journal(out, "model", resume=True):
        pass


def test_a_hundred_thousand_rows_take_no_more_memory_than_a_thousand(predictor: Predictor, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own allocations, which is where rows would pile up; the model is left out."""
    monkeypatch.setattr(minilora.predict, "ROWS_AT_ONCE", 512)
    monkeypatch.setattr(Predictor, "predict", lambda _, texts: [Prediction(text[-4:], 0.5, "b", None, 0.25) for text in texts])

    def peak(rows: int) -> int:
        data, out = tmp_path / f"{rows}.csv", tmp_path / f"{rows}-out.csv"
        with data.open("w") as file:
            file.write("input\n" + "".join(f"note {'pain ' * 10}{index:06}\n" for index in range(rows)))
        tracemalloc.start()
        predict_table(predictor, data, out, "input", quiet=True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with out.open() as file:
            next(file)
            assert all(f"{index:06}," in line for index, line in enumerate(file)), "the order is kept"
        return found

    small, large = peak(1_000), peak(100_000)
    assert large < small + 300_000, f"{small:,} bytes for 1,000 rows, {large:,} for 100,000"
