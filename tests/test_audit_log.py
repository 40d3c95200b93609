"""The audit log: one line for each run of predict, whatever became of it, with hashes that others can take and no text."""
from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from minilora import TrainConfig, train
from minilora.audit_log import FILE, Asked, Tally, audited, digest_of, model_digest
from minilora.cli import main
from minilora.errors import DataError, OutputError, StoppedError
from minilora.files import file_sha256, write_text
from tests.models import write_model
from tests.notes import SECRET, notes, write_csv

FIELDS = {"user", "host", "started", "ended", "outcome", "error", "model", "model_sha256", "adapter", "adapter_sha256",
          "labels_sha256", "registered", "version", "input", "input_sha256", "output", "output_sha256", "resumed", "spark",
          "rows_read", "rows_predicted", "rows_in_error"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "base")
    train(TrainConfig(model=str(folder / "base"), data=str(write_csv(folder / "train.csv", notes(24))), out=str(folder / "run"),
                      r=4, batch_size=8, max_steps=2, max_length=128, dtype="float32", quiet=True))
    return folder


def words(world: Path, data: Path, out: Path, *more: Any) -> list[str]:
    return [str(word) for word in ("predict", "--model", world / "base", "--adapter", world / "run", "--dtype", "float32",
                                   "--data", data, "--out", out, "--quiet", *more)]


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def sums(folder: Path, pattern: str = "") -> str:
    """What an auditor's own tools say of a folder."""
    done = subprocess.run(f"cd '{folder}' && LC_ALL=C sha256sum {pattern or '*'} | sha256sum", shell=True, text=True,
                          capture_output=True, check=True)
    return done.stdout.split()[0]


def test_a_run_leaves_one_line_with_everything_asked_of_it_and_no_note(world: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", [*notes(9), ("", "x")])
    before = os.umask(0)
    try:
        assert main(words(world, data, tmp_path / "out.csv")) == 0
    finally:
        os.umask(before)
    log = tmp_path / FILE
    line, = lines(log)
    assert line.keys() == FIELDS
    assert (line["rows_read"], line["rows_predicted"], line["rows_in_error"]) == (10, 9, 1)
    assert (line["outcome"], line["error"], line["resumed"], line["spark"]) == ("done", None, False, False)
    assert TIME.fullmatch(line["started"]) and TIME.fullmatch(line["ended"]) and line["started"] <= line["ended"]
    assert line["user"] and line["host"] and line["input"] == str(data) and line["output"] == str(tmp_path / "out.csv")
    for path, key in ((data, "input_sha256"), (tmp_path / "out.csv", "output_sha256")):
        assert subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0] == line[key]
    served = "adapter_config.json adapter_model.safetensors labels.txt minilora.json tokenizer*.json"
    assert line["adapter_sha256"] == sums(world / "run", served)
    assert line["model_sha256"] == model_digest(world / "base")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and SECRET not in log.read_text()


def test_lines_are_added_and_never_changed(world: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(3))
    assert main(words(world, data, tmp_path / "a.csv")) == 0
    first = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(first + b'{"half": ')             # a power cut
    (tmp_path / FILE).chmod(0o644)
    assert main(words(world, data, tmp_path / "b.csv")) == 0
    second = (tmp_path / FILE).read_bytes()
    assert second.startswith(first + b'{"half": \n') and len(second.splitlines()) == 3
    assert json.loads(second.splitlines()[2])["output"] == str(tmp_path / "b.csv")
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_run_that_fails_has_its_line_with_the_rows_it_had_read(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("input\n" + f"{SECRET}\n" * 600 + f'{SECRET},"too many"\n')
    assert main(words(world, tmp_path / "notes.csv", tmp_path / "out.csv")) == 2
    (tmp_path / "notes.csv").write_text("input\n" + f"{SECRET}\n" * 601)
    assert main(words(world, tmp_path / "notes.csv", tmp_path / "out.csv", "--resume")) == 0
    failed, done = lines(tmp_path / FILE)
    assert (failed["outcome"], failed["error"], failed["rows_read"]) == ("failed", "DataError", 512)
    assert failed["output_sha256"] is None
    assert (done["outcome"], done["resumed"], done["rows_predicted"]) == ("done", True, 601)
    assert SECRET not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(("error", "outcome"), [(KeyboardInterrupt(), "stopped"), (SystemExit(143), "stopped"),
                                                (StoppedError("x", 15), "stopped"), (DataError(SECRET), "failed"),
                                                (ValueError(SECRET), "failed")])
def test_how_a_run_ended_is_told_without_the_errors_text(tmp_path: Path, error: BaseException, outcome: str) -> None:
    with pytest.raises(type(error)), audited(Asked("tiny", out=str(tmp_path / "out.csv")), None):
        raise error
    line, = lines(tmp_path / FILE)
    assert (line["outcome"], line["error"]) == (outcome, type(error).__name__) and SECRET not in json.dumps(line)


def test_a_single_note_is_logged_where_a_log_is_named(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "--model", str(world / "base"), "--adapter", str(world / "run"), "--note", SECRET]
    assert main(command) == 0 and not (tmp_path / FILE).exists()
    assert main([*command, "--audit", str(tmp_path / "log.jsonl")]) == 0
    line, = lines(tmp_path / "log.jsonl")
    assert (line["rows_predicted"], line["input"], line["output"]) == (1, None, None) and SECRET not in json.dumps(line)


def test_a_log_that_cannot_be_written_is_found_before_anything_is_read(world: Path, tmp_path: Path,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(3))
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none/log.jsonl", "link", "pipe", "."):
        assert main(words(world, data, tmp_path / "out.csv", "--audit", tmp_path / name)) == 2
        assert "audit log" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    assert (tmp_path / "elsewhere").read_text() == ""


def _write_lines(folder: str, number: int) -> None:
    for _ in range(20):
        with audited(Asked("tiny", registered="x" * 9000, out=f"{folder}/{number}.csv"), None) as tally:
            tally.count([None])


def test_runs_that_end_at_once_write_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_lines, args=(str(tmp_path), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    outputs = [line["output"] for line in lines(tmp_path / FILE)]
    assert sorted(outputs) == sorted(f"{tmp_path}/{number}.csv" for number in range(4) for _ in range(20))


def test_a_folders_hash_is_that_of_the_systems_own_tool_and_knows_content_and_names(tmp_path: Path) -> None:
    assert digest_of(tmp_path / "none") is None
    folder = tmp_path / "out.parquet"
    folder.mkdir()
    for name in ("part-1", "part-0", "é", "_SUCCESS", ".part-0.crc"):
        (folder / name).write_text(name)
    first = digest_of(folder)
    assert first == sums(folder, "part-0 part-1 é")
    (folder / "_SUCCESS").write_text("other")
    assert digest_of(folder) == first
    (folder / "part-1").rename(folder / "part-2")
    renamed = digest_of(folder)
    (folder / "part-2").write_text("part-1 ")
    assert len({first, renamed, digest_of(folder)}) == 3
    assert digest_of(folder / "é") == file_sha256(folder / "é")


def test_a_model_is_the_files_that_decide_its_answers(world: Path) -> None:
    run = world / "run"
    before = model_digest(run)
    write_text(run / "report.html", "a page")
    assert model_digest(run) == before
    labels = (run / "labels.txt").read_text()
    write_text(run / "labels.txt", labels + "another\n")
    changed = model_digest(run)
    write_text(run / "labels.txt", labels)
    assert changed != before == model_digest(run)


def test_a_tally_counts_answers_and_errors() -> None:
    tally = Tally()
    tally.count([None, "empty note", None])
    tally.count([])
    assert (tally.rows_read, tally.rows_predicted, tally.rows_in_error) == (3, 2, 1)


def test_a_log_on_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="its line is missing"), audited(Asked("none", out=str(tmp_path / "o.csv")), None):
        monkeypatch.setattr(os, "write", full)


@pytest.mark.parametrize("error", [DataError(f"row 3 is bad: {'x' * 9}"), StoppedError("stopped by SIGTERM", 15)])
def test_a_full_disk_does_not_hide_what_failed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      error: Exception) -> None:
    said = str(error)
    with pytest.raises(type(error)) as raised, audited(Asked("none", out=str(tmp_path / "o.csv")), None):
        monkeypatch.setattr(os, "write", lambda _, content: len(content) // 2)      # as where some bytes are left
        raise error
    assert raised.value is error and str(error).startswith(said + " (and cannot write the audit log ")
    assert str(error).endswith(": No space left on device; its line is missing)") and "\n" not in str(error)


def test_what_is_no_error_of_ours_ends_as_it_does_with_a_warning_of_the_missing_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (pytest.warns(UserWarning, match="its line is missing"), pytest.raises(KeyboardInterrupt),
          audited(Asked("none", out=str(tmp_path / "o.csv")), None)):
        monkeypatch.setattr(os, "write", lambda *_: 0)
        raise KeyboardInterrupt


def test_a_prediction_on_a_full_disk_says_so_first(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(3))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(words(world, data, tmp_path / "out.csv")) == 2
    said = capsys.readouterr().err
    assert said.startswith("minilora: cannot write ") and said.count("\n") == 1 and not (tmp_path / "out.csv").exists()
    assert 0 < said.index("No space left") < said.index("(and cannot write the audit log ")


@pytest.mark.parametrize("link", ["", "symbolic", "hard"])
@pytest.mark.parametrize("flag", ["data", "out", "labels"])
def test_a_log_that_is_another_file_of_the_run_is_refused_and_nothing_is_added(
        world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, link: str) -> None:
    files = {"data": write_csv(tmp_path / "s.csv", notes(3)), "out": tmp_path / "out.csv", "labels": tmp_path / "labels.txt"}
    for name in ("out", "labels"):
        files[name].write_text((world / "run" / "labels.txt").read_text())
    log, before = files[flag], {name: path.read_bytes() for name, path in files.items()}
    if link:
        (tmp_path / "folder").symlink_to(tmp_path)
        log = tmp_path / "folder" / log.name if link == "symbolic" else tmp_path / "other"
        if link == "hard":
            os.link(files[flag], log)
    assert main(words(world, files["data"], files["out"], "--labels", files["labels"], "--overwrite", "--audit", log)) == 2
    said = capsys.readouterr().err
    assert f"is what --{flag} names; name another" in said and said.count("\n") == 1
    assert {name: path.read_bytes() for name, path in files.items()} == before


@pytest.mark.parametrize(("name", "says"), [("run/tokenizer.model", "--adapter"), ("base/model-2.safetensors", "--model"),
                                            ("out.csv/log.jsonl", "--out")])
def test_a_log_that_would_become_a_part_of_model_or_output_is_refused(world: Path, tmp_path: Path, name: str,
                                                                      says: str) -> None:
    asked = Asked(str(world / "base"), str(world / "run"), out=str(world / "out.csv"))
    with pytest.raises(OutputError, match=f"lies in what {says} names"), audited(asked, world / name):
        pytest.fail("it was done")
    assert not (world / name).exists()
    with audited(asked, world / "run" / "who.jsonl"):
        pass
    (world / "run" / "who.jsonl").unlink()


@pytest.mark.parametrize("content", [b"a,b\n", b"{}\n", b'{"user": "x"}\n', b'{"user": 3, "name": [1]}\n{"user": ', b"\xff\xfe",
                                     b"\n"])
def test_a_file_that_is_no_log_gets_no_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            content: bytes) -> None:
    data, other = write_csv(tmp_path / "notes.csv", notes(3)), tmp_path / "mine.txt"
    other.write_bytes(content)
    other.chmod(0o644)
    assert main(words(world, data, tmp_path / "out.csv", "--audit", other)) == 2
    assert "mine.txt is there and is no audit log" in capsys.readouterr().err
    assert other.read_bytes() == content and stat.S_IMODE(other.stat().st_mode) == 0o644 and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("half", [b"", b"{", b'{"user": ', b'{"user": "mw", "ho'])
def test_a_log_whose_first_line_a_power_cut_left_half_is_gone_on_with(tmp_path: Path, half: bytes) -> None:
    (tmp_path / FILE).write_bytes(half)
    for _ in range(2):
        with audited(Asked("none", out=str(tmp_path / "o.csv")), None):
            pass
    assert [json.loads(line)["outcome"] for line in (tmp_path / FILE).read_text().splitlines()[-2:]] == ["done", "done"]


def test_a_new_runs_folder_is_its_owners_alone_and_one_that_was_shared_stays_so(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)

    def again(steps: int, **more: Any) -> int:
        train(TrainConfig(model=str(world / "base"), data=str(world / "train.csv"), out=str(tmp_path / "run"), r=4,
                          batch_size=8, max_steps=steps, max_length=128, dtype="float32", quiet=True, **more))
        return stat.S_IMODE((tmp_path / "run").stat().st_mode)

    assert stat.S_IMODE((world / "run").stat().st_mode) == 0o700 == again(1)
    (tmp_path / "run").chmod(0o750)
    assert again(1, resume=True) == 0o750
    assert again(1, overwrite=True) == 0o700
    assert main(["merge", "--model", str(world / "base"), "--adapter", str(world / "run"), "--out", str(tmp_path / "merged"),
                 "--quiet"]) == 0
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o700
