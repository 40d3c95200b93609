"""scripts/soak on a small model: it kills, goes on, compares, and tells a run that ends with other bytes."""
from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.models import write_model
from tests.scripts import load_script


@pytest.fixture
def script() -> ModuleType:
    return load_script("soak")


def test_a_run_is_killed_and_ends_with_the_expected_bytes(script: ModuleType, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "model")
    assert script.main(["--model", str(base), "--minutes", "0", "--steps", "20", "--longest", "0.5", "--json",
                        str(tmp_path / "soak.json")]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["kills"] == 1 and found["runs"] == 1 and found["problems"] == []
    assert "1 kills survived; 1 runs of 20 steps ended with the expected bytes" in capsys.readouterr().out


def test_a_run_with_other_bytes_is_told(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "model")
    command = script.command

    def another(model: str, data: Path, out: Path, steps: int) -> list[str]:
        seed = ["--seed", "1"] if out.name == "run1" else []
        return [*command(model, data, out, steps), *seed]

    monkeypatch.setattr(script, "command", another)
    assert script.main(["--model", str(base), "--minutes", "0", "--steps", "3", "--longest", "0.5"]) == 1
    assert "run 1: adapter_model.safetensors has other bytes" in capsys.readouterr().err
