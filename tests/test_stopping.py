"""Ctrl-C while a command still imports: one line, exit code 130, and no traceback; in anybody else's program as ever."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = """
import sys

class Pressed:
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Pressed())
from minilora.cli import main
sys.exit(main(["data", "out", "--n", "100"]))
"""


def run(program: Path, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program.write_text(INTERRUPTED.format(name=name))
    return subprocess.run([sys.executable, program], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder, text=True,
                          capture_output=True, timeout=120, check=False)


# The first is imported by the package, the last by the command when it runs.
@pytest.mark.parametrize("name", ["torch", "minilora.train", "minilora.data.radiology"])
def test_an_interrupt_while_a_command_imports_ends_it_in_one_line(tmp_path: Path, name: str) -> None:
    done = run(tmp_path / "minilora", name, tmp_path)
    assert (done.returncode, done.stderr) == (130, "minilora: stopped\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["minilora"]


def test_in_another_program_an_interrupt_of_the_import_is_raised_as_ever(tmp_path: Path) -> None:
    done = run(tmp_path / "other.py", "torch", tmp_path)
    assert done.returncode not in (0, 130) and done.stderr.rstrip().endswith("KeyboardInterrupt")
