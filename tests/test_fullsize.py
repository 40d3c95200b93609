"""scripts/fullsize at a small shape: every stage, its bounds, and nothing left behind."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minilora.shapes import SHAPES

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fullsize.py"


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        **SHAPES["110m"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "vocab_size": 4000}))
    return folder


def test_every_stage_runs_within_its_bounds_and_leaves_nothing(shape: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, str(SCRIPT), "--shape", str(shape), "--out", str(out), "--json",
                           str(tmp_path / "t.json")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads((tmp_path / "t.json").read_text())}
    assert list(stages) == ["write bin", "quantize from bin", "load bin", "write safetensors", "quantize from safetensors",
                            "load safetensors", "load and train", "evaluate", "predict", "reload 4 bits"]
    assert "quantizing alone" in stages["load bin"]["note"] and set(stages["load bin"]["bounds"]) == {"peak GB", "seconds"}
    assert all(100e6 < stage["peak_bytes"] < 700e6 for name, stage in stages.items() if not name.startswith("write"))
    assert stages["load and train"]["note"].startswith("4 steps of 1 x 256") and set(stages["reload 4 bits"]["bounds"]) == {
        "seconds", "peak GB"}
    assert "| load and train |" in done.stdout and list(out.iterdir()) == []


def test_an_interrupted_run_removes_what_it_wrote(shape: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, str(SCRIPT), "--shape", str(shape), "--out", str(out)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert process.returncode == 143 and list(out.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    code = ("import shutil, sys; sys.path.insert(0, sys.argv.pop(1)); import fullsize; "
            "shutil.disk_usage = lambda path: type('Usage', (), {'free': 5 * 10 ** 9}); sys.exit(fullsize.main())")
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), "--out", str(tmp_path / "out")], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2 and "has 5.0 GB free, 18.2 GB are needed; name another folder with --out" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
