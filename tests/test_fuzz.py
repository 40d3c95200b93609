"""scripts/fuzz: a short run finds nothing, and every sort of defect that is planted in a reader is found."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
PLANTED = {
    "an error that is not the package's": ("raise KeyError('x')", "KeyError at <string>"),
    "two lines": ("raise MiniloraError('a' * 2000)", "refused in 2000 characters"),
    "a hang": ("time.sleep(60)", "hung for 1 s"),
    "a crash": ("os.abort()", "ended the process (6)"),
    "memory": ("bytearray(400 << 20)", "took "),
    "memory that is not there": ("bytearray(10 << 30)", "MemoryError at <string>"),
    "a word on the error stream": ("os.write(2, b'panicked at')", "wrote to the error stream b'panicked at', then: read"),
}


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=250,
                          env={"PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})


def test_five_thousand_inputs_of_all_kinds_find_nothing(tmp_path: Path) -> None:
    done = run("import sys, fuzz; sys.exit(fuzz.main(sys.argv[1:]))", "--inputs", "5000", "--json",
               str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    tallies = json.loads((tmp_path / "found.json").read_text())
    assert len(tallies) == 9 and sum(tally["inputs"] for tally in tallies) == 5000
    # Inputs that are all refused, or all read, would have missed what lies behind the first check.
    assert all(tally["refused"] > 10 < tally["inputs"] and tally["read"] >= 2 for tally in tallies), done.stdout


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found_and_the_inputs_behind_it_are_still_read(tmp_path: Path, defect: str) -> None:
    line, said = PLANTED[defect]
    code = ("import os, sys, time, fuzz\nfrom minilora.errors import MiniloraError\nseen = [0]\n"
            f"fuzz.SECONDS = {1 if defect == 'a hang' else 60}\n"
            "def planted(folder):\n"
            "    number = seen[0]\n"
            "    seen[0] += 1\n"
            f"    if number == 3: {line}\n"
            "fuzz.READERS['config'] = planted\nsys.exit(fuzz.main(sys.argv[1:]))")
    done = run(code, "--inputs", "6", "--kinds", "config", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    tally, = json.loads((tmp_path / "found.json").read_text())
    assert tally["inputs"] == 6
    # A new child counts from 0 again, so a crash comes back no more: two inputs are behind it.
    assert [finding["case"] for finding in tally["findings"]] == [3] and said in tally["findings"][0]["what"], tally
    assert f"config 3: {tally['findings'][0]['what']}" in done.stderr


def test_an_input_comes_again_by_its_number(tmp_path: Path) -> None:
    for name, later in (("a", 0), ("b", 10 ** 7)):
        run(f"import sys, time; now = time.time; time.time = lambda: now() + {later}; import fuzz; "
            "sys.exit(fuzz.main(sys.argv[1:]))", "--kinds", "bin", "--seed", "3", "--case", "17", "--keep",
            str(tmp_path / name))
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second and list(first) == ["pytorch_model.bin"]
