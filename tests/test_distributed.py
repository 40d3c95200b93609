"""Several processes train what one trains: the same losses within rounding, one adapter, less memory each, and one end."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minilora import TrainConfig, train
from minilora.cli import main
from minilora.errors import ConfigError
from minilora.memory import Workload, predict
from minilora.memory_shared import shares
from minilora.memory_table import size
from minilora.shapes import shape_of
from minilora.team import Team
from tests.notes import notes, write_csv

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["--max-steps", "6", "--batch-size", "6", "--accumulate", "2", "--lr", "1e-3", "--dtype", "float32",
            "--device", "cpu"]
PAGED = ["--optimizer", "paged_adamw", "--page-bytes", "65536", "--resident-mib", "1"]


def torchrun(processes: int, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                           *command], capture_output=True, text=True, env=environment, timeout=240, **more)


def losses(run: Path, name: str = "loss") -> list[float]:
    return [step[name] for step in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in step]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 43 notes, seven micro-batches of six and one of a single row, of which but one process has a share."""
    return write_csv(tmp_path_factory.mktemp("data") / "notes.csv", notes(43))


@pytest.fixture(scope="module")
def alone(data: Path) -> Path:
    out = data.parent / "alone"
    assert main(["train", "--model", "tiny", "--data", str(data), "--val", str(data), "--out", str(out), *SETTINGS,
                 "--quiet"]) == 0
    return out


@pytest.mark.parametrize(("kind", "processes", "flags"), [
    ("ddp", 2, PAGED), ("fsdp", 2, []), ("ddp", 4, []),
    ("fsdp", 4, PAGED)])
def test_several_processes_train_what_one_trains(data: Path, alone: Path, tmp_path: Path, kind: str, processes: int,
                                                 flags: list[str]) -> None:
    out = tmp_path / kind
    done = torchrun(processes, "-m", "minilora", "train", "--model", "tiny", "--data", str(data), "--val", str(data), "--out",
                    str(out), *SETTINGS, "--distributed", kind, "--gradient-checkpointing", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"6 steps by {processes} processes" in done.stdout
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(out, "val_loss")[-1:] == pytest.approx(losses(alone, "val_loss")[-1:], rel=1e-3)
    # Adam hides a gradient that is too small by the number of processes; its length does not.
    assert losses(out, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-3)
    ours, one = load_file(out / "adapter_model.safetensors"), load_file(alone / "adapter_model.safetensors")
    for name, tensor in one.items():
        assert (ours[name] - tensor).norm() <= 2e-2 * tensor.norm() + 1e-5, name
    extra = [json.loads((run / "minilora.json").read_text()) for run in (out, alone)]
    assert extra[0]["base_digest"] == extra[1]["base_digest"]


MEMBERS = """
import sys, hashlib, torch
from torch.utils._python_dispatch import TorchDispatchMode
from minilora import TrainConfig, train
from minilora.integrations.distributed import ProcessGroup
training = sys.modules["minilora.train"]            # the name in the package is the function
team = ProcessGroup(sys.argv[1], "cpu")
seen = {}
inner = training.compute_gradients
def watched(model, *rest, **options):
    seen["model"] = model
    return inner(model, *rest, **options)
training.compute_gradients = watched

class Network(TorchDispatchMode):
    sent = 0
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name = operator.name()
        if name.startswith("c10d::_allgather_base_"):
            self.sent += arguments[0].nbytes * (team.size - 1) // team.size
        elif name.startswith("c10d::allreduce_"):
            self.sent += sum(2 * tensor.nbytes * (team.size - 1) // team.size for tensor in arguments[0])
        return operator(*arguments, **(options or {}))

with Network() as network:
    train(TrainConfig(model="tiny", data=sys.argv[2], out=sys.argv[3], max_steps=4, batch_size=6, accumulate=2, dropout=0.1,
                      dtype="float32", device="cpu", quiet=True), team)
digest = hashlib.sha256()
for name, parameter in sorted(seen["model"].named_parameters()):
    if "lora_" in name:
        digest.update(parameter.detach().numpy().tobytes())
tensors = (*seen["model"].named_parameters(), *seen["model"].named_buffers())
held = sum(getattr(tensor, "_local_tensor", tensor).nbytes for name, tensor in tensors
           if name.endswith(("packed", "nested_codes")))
print(f"member {team.rank}: {digest.hexdigest()} {held} {network.sent}", flush=True)
team.wait()
team.close()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_process_has_the_same_adapter_holds_its_share_and_sends_what_is_predicted(
        data: Path, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "members.py"
    script.write_text(MEMBERS)
    done = torchrun(2, str(script), kind, str(data), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    members = [line.split() for line in done.stdout.splitlines() if line.startswith("member")]
    assert len(members) == 2 and len({digest for _, _, digest, *_ in members}) == 1
    work = Workload("qlora", batch=6, accumulate=2, compute=torch.float32)
    sent = next(share.sent for share in shares(shape_of("tiny"), work, 2) if share.kind == kind)
    whole = 3_538_944 // 2 + 3_538_944 // 64                # codes, and a byte for each block's constant
    for *_, held, counted in members:
        assert int(held) == pytest.approx(whole / (2 if kind == "fsdp" else 1), rel=0.01)
        assert int(counted) == pytest.approx(4 * sent, rel=0.01)


def test_a_run_of_two_goes_on_alone_and_one_of_one_goes_on_by_two(data: Path, tmp_path: Path) -> None:
    command = ["-m", "minilora", "train", "--model", "tiny", "--data", str(data), *SETTINGS[2:], "--save-every", "1"]
    first = torchrun(2, *command, "--out", str(tmp_path / "a"), "--max-steps", "3", "--distributed", "ddp")
    assert first.returncode == 0, first.stderr[-3000:]
    assert main([*command[2:], "--out", str(tmp_path / "a"), "--max-steps", "6", "--resume", "--quiet"]) == 0
    assert main([*command[2:], "--out", str(tmp_path / "b"), "--max-steps", "3", "--quiet"]) == 0
    second = torchrun(2, *command, "--out", str(tmp_path / "b"), "--max-steps", "6", "--resume", "--distributed", "fsdp")
    assert second.returncode == 0, second.stderr[-3000:]
    assert len(losses(tmp_path / "a")) == 6 and losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_when_one_process_is_killed_the_others_end_too(data: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minilora", "train",
         "--model", "tiny", "--data", str(data), "--out", str(out), "--epochs", "0", "--max-steps", "5000", "--device", "cpu",
         "--distributed", kind, "--quiet"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for _ in range(600):
            time.sleep(0.1)
            if (out / "metrics.jsonl").exists() and losses(out):
                break
        members = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(members[-1]), signal.SIGKILL)
        _, said = started.communicate(timeout=120)
        assert started.returncode != 0 and "another process of the team has ended" in said, said
        assert "step-000" in said or "there is no checkpoint" in said
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("flags", "reason"), [
    (["--distributed", "ddp"], "torchrun"), (["--distributed", "ddp", "--tune", "full", "--quantize", "none"], "--tune full"),
    (["--distributed", "fsdp", "--init-lora-weights", "pissa"], "pissa")])
def test_what_no_team_can_do_is_said_in_one_line(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", "--model", "tiny", "--data", "x.csv", "--out", "y", *flags]) == 2
    assert reason in capsys.readouterr().err


class Member(Team):
    """One of several, which are not there: for `share`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def test_rows_are_shared_out_once_each_and_nobody_is_without_one() -> None:
    for processes in (1, 2, 3, 5):
        for rows in ([7], [3, 1, 4], list(range(10))):
            parts = [Member(rank, processes).share(rows) for rank in range(processes)]
            assert sorted(row for mine, counts in parts if counts for row in mine) == sorted(rows)
            assert all(mine for mine, _ in parts)


def test_a_team_of_one_is_the_loop_as_it_was(data: Path, alone: Path, tmp_path: Path) -> None:
    config = TrainConfig(model="tiny", data=str(data), out=str(tmp_path / "again"), max_steps=6, batch_size=6, accumulate=2,
                         lr=1e-3, dtype="float32", device="cpu", quiet=True)
    train(config, Team())
    adapters = [run / "adapter_model.safetensors" for run in (tmp_path / "again", alone)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_what_two_hold_is_what_one_holds_less_what_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    config, work = shape_of("7b"), Workload("qlora", batch=2, gradient_checkpointing=True)
    alone = predict(config, Workload("qlora", batch=1, gradient_checkpointing=True))
    ddp, fsdp = shares(config, work, 2)
    blocks = 32 * sum(rows * columns for rows, columns in config.linear_shapes().values())
    packed = blocks // 2 + blocks // 64 + blocks // 64 // 256 * 4 + 4 * 32 * 7
    assert ddp.sent == 4 * 39_976_960 and fsdp.sent == ddp.sent + packed
    assert ddp.peak - fsdp.peak == packed - packed // 2 - 2 * packed // 32 and ddp.peak == alone.held()["begin"].total
    with pytest.raises(ConfigError, match="2 or more"):
        shares(config, work, 1)
    assert main(["memory", "--model", "7b", "--batch", "2", "--gradient-checkpointing", "--processes", "2"]) == 0
    said = capsys.readouterr().out
    assert size(fsdp.sent) in said and size(fsdp.peak) in said
