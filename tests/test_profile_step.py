"""The profile of a step: every operation once, their times those of a whole step, the longest first."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minilora.llama.config import LlamaConfig
from minilora.memory import Workload
from tests.models import SHAPE
from tests.scripts import load_script

script = load_script("profile_step")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "shape_of", lambda name: LlamaConfig.from_dict(SHAPE))


def test_operations_are_those_of_one_step_with_the_package_s_own_among_them() -> None:
    step = script.step_of("110m", Workload("qlora", batch=2, seq=8, label_tokens=3, r=4), CPU)
    step()
    found = script.operations(step, CPU)
    assert len({(operation.name, operation.shapes) for operation in found}) == len(found)
    assert [operation.seconds for operation in found] == sorted((operation.seconds for operation in found), reverse=True)
    linears = [operation for operation in found if operation.name == "NF4Product"]
    assert sum(operation.calls for operation in linears) == 2 * 14 - 3     # there, and back but into the first norm


def test_the_table_adds_up_and_the_file_has_every_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    script.main(["--batch", "1", "--seq", "8", "--r", "4", "--device", "cpu", "--top", "5", "--json", str(path)])
    head, names, *lines = capsys.readouterr().out.splitlines()
    made = json.loads(path.read_text())
    assert head.startswith("110m, 1 x 8 tokens, 16 of a note with loss, r = 4, ") and head.endswith(" ms a step")
    assert names.split() == ["ms", "share", "calls", "host", "ms", "operation"] and len(lines) == 6
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(1, abs=0.005)
    assert made["computing"] == pytest.approx(sum(operation["seconds"] for operation in made["operations"]))
    assert lines[5].split()[-2:] == [str(len(made["operations"]) - 5), "others"] and made["seconds"] > 0
