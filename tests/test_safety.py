"""What can happen to a run: signals, a second run, a folder that goes, a disk or a memory that gives out, a clock that jumps.

Each ends with one line, and the run can be gone on with to the bytes that it would have had.
"""
from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora import CheckpointError, MiniloraError, OutputError, StoppedError, TrainConfig, train
from minilora.cli import main
from minilora.files import file_sha256
from minilora.locks import LOCK_FILE, FolderLock
from minilora.runs import append_metrics
from tests.killing import Runs, gone_on_with
from tests.models import write_model
from tests.notes import SECRET, notes, write_csv

loop = importlib.import_module("minilora.train")
STEPS = 6
REFERENCE: dict[str, bytes] = {}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    base, data = write_model(tmp_path / "model"), write_csv(tmp_path / "train.csv", notes(24))
    return TrainConfig(model=str(base), data=str(data), out=str(tmp_path / "run"), r=4, dropout=0.1, batch_size=4, epochs=1,
                       max_length=96, lr=1e-2, save_every=2, dtype="float32", device="cpu", quiet=True)


def adapter(run: str | Path) -> bytes:
    return (Path(run) / "adapter_model.safetensors").read_bytes()


def expected(config: TrainConfig, tmp_path: Path) -> bytes:
    """The adapter of a run to which nothing happened."""
    if "adapter" not in REFERENCE:
        train(dataclasses.replace(config, out=str(tmp_path / "whole"), resume=False))
        REFERENCE["adapter"] = adapter(tmp_path / "whole")
    return REFERENCE["adapter"]


def resumes_to_the_same_bytes(config: TrainConfig, tmp_path: Path) -> bool:
    return train(dataclasses.replace(config, resume=True)).steps == STEPS and adapter(config.out) == expected(config, tmp_path)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> pytest.MonkeyPatch:
    """Do something when the metrics of a step have been written."""
    def acting(folder: Path, values: dict[str, Any]) -> int:
        size = append_metrics(folder, values)
        if values["step"] == step:
            action()
        return size

    monkeypatch.setattr(loop, "append_metrics", acting)
    return monkeypatch


def one_line(caught: pytest.ExceptionInfo[MiniloraError]) -> str:
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bytes(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(StoppedError) as caught:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        train(config)
    assert one_line(caught) == f"stopped by {number.name} after step 3 of 6; go on with --resume"
    assert caught.value.signal == number
    assert sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert signal.getsignal(number) == before and not (Path(config.out) / LOCK_FILE).exists()
    assert resumes_to_the_same_bytes(config, tmp_path)


def test_a_signal_in_the_last_step_lets_the_run_finish(config: TrainConfig, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(config)
    assert adapter(config.out) == expected(config, tmp_path)


def test_a_second_signal_ends_at_once(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        train(config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-000002"]
    assert resumes_to_the_same_bytes(config, tmp_path)


def command(config: TrainConfig, *more: str) -> list[str]:
    return ["train", "--model", config.model, "--data", config.data, "--out", config.out, "--r", "4", "--dropout", "0.1",
            "--batch-size", "4", "--max-length", "96", "--lr", "0.01", "--dtype", "float32", "--device", "cpu", "--quiet",
            *more]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_with_a_line_and_the_signals_code(config: TrainConfig, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-m", "minilora", *command(config, "--epochs", "0", "--max-steps", "100000")],
                               stderr=subprocess.PIPE, text=True)
    metrics = Path(config.out) / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    step = len(metrics.read_text().splitlines())
    assert process.returncode == code
    assert said == f"minilora: stopped by {number.name} after step {step} of 100000; go on with --resume\n"
    assert (Path(config.out) / "checkpoints" / f"step-{step:06d}").is_dir()


def test_a_command_that_is_terminated_removes_what_is_half_written(tmp_path: Path) -> None:
    code = ("import os, signal, sys; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM); "
            "from minilora.cli import main; sys.exit(main(sys.argv[1:]))")
    ended = subprocess.run([sys.executable, "-c", code, "data", str(tmp_path / "data"), "--n", "200"], capture_output=True,
                           text=True)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr
    assert list(tmp_path.iterdir()) == []


# Two runs in one folder


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, max_steps=1))
    run = Path(config.out)
    lock = FolderLock(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=rf"in use by another run \(process {os.getpid()} on .*\); wait for it") as caught:
            train(dataclasses.replace(config, **options))
        one_line(caught)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    lock.release()
    assert train(dataclasses.replace(config, resume=True, max_steps=2)).steps == 2


def test_of_many_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    """Each holder removes the lock's file when it is done, while others are opening it."""
    inside, most, wins = [0], [0], [0]

    def take() -> None:
        for _ in range(300):
            try:
                lock = FolderLock(tmp_path)
            except OutputError:
                continue
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            wins[0] += 1
            time.sleep(0)
            inside[0] -= 1
            lock.release()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and wins[0] > 8 and os.listdir(tmp_path) == []


def test_a_run_that_begins_while_this_one_loads_its_model_is_found(config: TrainConfig,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[FolderLock] = []
    load = loop.load_model

    def loading(*arguments: Any, **options: Any) -> Any:
        Path(config.out).mkdir()
        held.append(FolderLock(Path(config.out)))
        return load(*arguments, **options)

    monkeypatch.setattr(loop, "load_model", loading)
    with pytest.raises(OutputError, match="in use by another run"):
        train(config)
    assert os.listdir(config.out) == [LOCK_FILE]
    held[0].release()
    assert os.listdir(config.out) == []


# A folder that goes


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_deleted_under_a_run_ends_it_and_is_not_made_again(
        config: TrainConfig, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    run = Path(config.out)

    def delete() -> None:
        shutil.rmtree(run)
        if replaced:
            run.mkdir()
            (run / "thesis.txt").write_text("mine")

    at_step(monkeypatch, 3, delete)
    with pytest.raises(OutputError) as caught:
        train(config)
    assert "run was deleted or replaced while the run wrote to it" in one_line(caught)
    assert os.listdir(run) == ["thesis.txt"] if replaced else not run.exists()


def test_a_folder_deleted_while_a_checkpoint_is_written_is_not_made_again(
        config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    save = loop.save_checkpoint

    def saving(folder: Path, *rest: Any) -> None:
        shutil.rmtree(folder)
        save(folder, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", saving)
    with pytest.raises(OutputError, match="cannot write") as caught:
        train(config)
    assert "there is no checkpoint in" in one_line(caught) and not Path(config.out).exists()


# Disk and memory


@pytest.mark.parametrize(("number", "lasting"), [
    (errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EROFS, True), (errno.EACCES, True)],
    ids=lambda value: errno.errorcode[value] if type(value) is int else "from then on" if value else "once")
def test_a_disk_that_refuses_any_change_ends_the_run_with_one_line(
        config: TrainConfig, number: int, lasting: bool) -> None:
    """Refused are the calls that change a file, in turn: settings, metrics, checkpoints, their cleaning up, adapter, card."""
    settings = dataclasses.asdict(config)
    with Runs() as runs:
        changes = runs.run(settings)["changes"]
        whole = adapter(config.out)         # of a process like the others: with other threads sums may round otherwise
        for at in range(0, changes, 8):
            shutil.rmtree(config.out)
            ended = runs.run(settings, at=at, errno=number, lasting=lasting)
            where = f"change {at} of {changes}"
            # What only tidies up may fail without ending the run, as the removal of the lock, which comes last.
            assert ended["error"] or not lasting or at == changes - 1, where
            assert re.match(r"(cannot [^\n]*)?$", ended["error"]), f"{where}: {ended['error']}"
            if ended["error"] and at > changes / 2:
                assert os.strerror(number) in ended["error"], f"{where}: {ended['error']}"
            again = runs.run(gone_on_with(settings))
            assert again["error"] == "" and adapter(config.out) == whole, f"{where}: {again}"


def test_memory_that_gives_out_ends_with_one_line_and_the_last_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    """A real refusal by the system: from step 3 on the process may not grow."""
    code = ("import importlib, resource, sys; loop = importlib.import_module('minilora.train'); gather = loop.collate\n"
            "def growing(examples, padding):\n"
            "    batch = gather(examples, padding)\n"
            "    if growing.calls == 3:\n"
            "        size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "        resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
            "        wide = batch.input_ids.repeat(400, 6)\n"
            "        batch = type(batch)(wide, wide.ne(-1).long(), wide.clone(), wide.numel(), batch.rows)\n"
            "    growing.calls += 1\n"
            "    return batch\n"
            "growing.calls = 0\n"
            "loop.collate = growing\n"
            "from minilora.cli import main; sys.exit(main(sys.argv[1:]))")
    if not Path("/proc/self/statm").exists():
        pytest.skip("limits on memory are set by Linux's figures")
    ended = subprocess.run([sys.executable, "-c", code, *command(config, "--max-steps", str(STEPS), "--save-every", "2")],
                           capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    expected_line = r"minilora: out of memory.*lower --batch-size.*the last good checkpoint is .*step-000002\n"
    assert re.fullmatch(expected_line, ended.stderr), ended.stderr


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't "
                                                               "allocate memory: you tried to allocate 8 bytes.\nmore")])
def test_memory_that_gives_out_in_the_update_is_told_alike(config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
                                                           error: Exception) -> None:
    def failing(self: Any, closure: Any = None) -> None:
        raise error

    monkeypatch.setattr("minilora.optim.adamw.AdamW.step", failing)
    with pytest.raises(MiniloraError, match=r"^out of memory.*there is no checkpoint in") as caught:
        train(config)
    one_line(caught)


def test_any_other_error_of_torch_is_not_taken_for_memory(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, closure: Any = None) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("minilora.optim.adamw.AdamW.step", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        train(config)


# Numbers that break


def test_weights_that_are_not_finite_are_never_saved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("minilora.optim.adamw").AdamW.step

    def breaking(self: Any, closure: Any = None) -> None:
        step(self)
        if breaking_at.pop(0):
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("inf")

    breaking_at = [False, False, False, True]
    monkeypatch.setattr("minilora.optim.adamw.AdamW.step", breaking)
    with pytest.raises(CheckpointError, match=r"^step 4: .*lora_A\.weight holds NaN.*lower --lr.*checkpoint is .*step-000002$"):
        train(config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-000002"]


def test_a_validation_loss_that_is_not_finite_stops_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validation_loss", lambda *_: float("nan"))
    with pytest.raises(MiniloraError, match=r"^step 3: validation loss nan on .*step-000002$"):
        train(dataclasses.replace(config, val=config.data, eval_every=3))
    assert len((Path(config.out) / "metrics.jsonl").read_text().splitlines()) == 2


# Clocks and metrics


def test_a_clock_that_jumps_changes_nothing(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter([*[0, 1e9, -1e9, 2e9, -3e9, 5, 1e12, 0] * 1000])

    def jumping() -> float:
        return 1.7e9 + next(jumps)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr("tqdm.std.time", jumping)
    train(dataclasses.replace(config, quiet=False))
    assert adapter(config.out) == expected(config, tmp_path)
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS and all(0 <= float(line.partition('"seconds": ')[2].partition(",")[0]) < 60 for line in lines)


@pytest.mark.parametrize("left", [0, 40])
def test_metrics_that_lost_lines_do_not_keep_a_run_from_going_on(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config)
    metrics = Path(config.out) / "metrics.jsonl"
    first = metrics.read_bytes().index(b"\n") + 1
    os.truncate(metrics, first + left if left else 0)
    with pytest.warns(UserWarning, match="lost lines of steps"):
        assert resumes_to_the_same_bytes(config, tmp_path)
    assert [line.partition(",")[0] for line in metrics.read_text().splitlines()] == [
        f'{{"step": {step}' for step in ([1] if left else []) + [4, 5, 6]]


def test_a_base_or_a_template_that_changed_since_the_checkpoint_is_told(config: TrainConfig, tmp_path: Path) -> None:
    template = tmp_path / "prompt.txt"
    template.write_text("Note: {input}\nLabel:")
    config = dataclasses.replace(config, template=str(template))
    train(dataclasses.replace(config, max_steps=2))
    template.write_text("Order: {input}\nProtocol:")
    with pytest.warns(UserWarning, match=r"template .*prompt\.txt has changed since step 2: the run goes on"):
        train(dataclasses.replace(config, max_steps=3, resume=True))
    other = write_model(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match=r"what the model .*other holds has changed since step 3: the run goes on"):
        train(dataclasses.replace(config, max_steps=4, model=str(other), resume=True))
    moved = shutil.copytree(other, tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="resumed after step 4 with 5 steps in all instead of 4")
        train(dataclasses.replace(config, max_steps=5, model=str(moved), resume=True))


def test_a_checkpoint_of_a_version_that_kept_less_is_gone_on_with(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=2))
    checkpoint = Path(config.out) / "checkpoints" / "step-000002"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({name: state[name] for name in ("step", "metrics_bytes", "data_sha256")}))
    sums = (checkpoint / "SHA256SUMS").read_text().splitlines()
    sums = [f"{file_sha256(checkpoint / 'state.json')}  state.json" if line.endswith("state.json") else line for line in sums]
    (checkpoint / "SHA256SUMS").write_text("".join(line + "\n" for line in sums))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="resumed after step 2 with 3 steps in all instead of 2")
        assert train(dataclasses.replace(config, max_steps=3, resume=True)).steps == 3


def test_a_table_that_changed_since_the_checkpoint_is_told(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, max_steps=2))
    write_csv(Path(config.data), notes(23))
    with pytest.warns(UserWarning, match=r"train\.csv has changed since step 2: the run goes on"):
        train(dataclasses.replace(config, max_steps=4, resume=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="resumed after step 4 with 5 steps in all instead of 4")
        train(dataclasses.replace(config, max_steps=5, resume=True))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this system")
def test_a_checkpoint_can_be_checked_without_minilora(config: TrainConfig) -> None:
    train(dataclasses.replace(config, max_steps=2))
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=Path(config.out) / "checkpoints" / "step-000002",
                             capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 3, checked.stderr


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore.")])
def test_any_command_without_memory_ends_with_one_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("minilora.loading.load_checkpoint", failing)
    assert main(["predict", "--model", config.model, "--free", "--note", SECRET]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minilora: out of memory (") and said.count("\n") == 1 and SECRET not in said


def test_damage_to_any_byte_of_a_checkpoint_is_found(config: TrainConfig, tmp_path: Path) -> None:
    train(dataclasses.replace(config, max_steps=STEPS))
    newest = Path(config.out) / "checkpoints" / "step-000006"
    files = sorted(path for path in newest.iterdir() if path.is_file())
    assert [path.name for path in files] == ["SHA256SUMS", "optimizer.pt", "state.json", "trained.safetensors"]
    copies = {path: path.read_bytes() for path in files}
    (Path(config.out) / "adapter_model.safetensors").unlink()
    for path in files:
        size = len(copies[path])
        for at in (0, size // 2, size - 2):
            path.write_bytes(copies[path][:at] + bytes([copies[path][at] ^ 4]) + copies[path][at + 1:])
            with pytest.warns(UserWarning, match="step-000006 is damaged and passed over"):
                assert resumes_to_the_same_bytes(config, tmp_path), f"{path.name} at byte {at}"
            for name, content in copies.items():        # saved again meanwhile: to the same bytes, but for the metrics' size
                name.write_bytes(content)
