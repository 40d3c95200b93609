"""`minilora train` on a small set, killed by SIGKILL at random moments every few seconds: the adapter must come out the same.

    python scripts/soak.py --minutes 30 [--steps 1000] [--longest 10] [--seed 0] [--json FILE]

One run is left alone; its adapter is what every other one must end with, to the byte.  Then runs are started, killed and
started again with --resume until the minutes are over; the last one is left to finish.  Every start is the command that a user
would give, in a process of its own.  Exit code 1 if a run ends with other bytes, or says anything but a warning.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minilora.data.radiology import write_dataset

NOTES = 500             # of which 400 are trained on
RESULTS = ("adapter_model.safetensors", "adapter_config.json", "minilora.json", "labels.txt")


@dataclass
class Soak:
    """What was done.

    Attributes: kills: processes that SIGKILL ended. runs: finished with the expected bytes. seconds: in all. problems: a line
        for each run that did not end as expected.
    """

    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def command(model: str, data: Path, out: Path, steps: int) -> list[str]:
    """How a run is started, or, where it has come as far as its settings, gone on with."""
    resume = ["--resume"] if (out / "config.toml").is_file() else []
    return [sys.executable, "-m", "minilora", "train", "--model", model, "--template", "tiny", "--data", str(data),
            "--input-column", "note", "--out", str(out), "--max-steps", str(steps), "--batch-size", "4", "--max-length", "128",
            "--dropout", "0.1", "--save-every", "5", "--device", "cpu", "--quiet", *resume]


def digests(out: Path) -> dict[str, str]:
    """The SHA-256 of each file that a seed fixes, and of the metrics less time and memory."""
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in RESULTS}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{key: value for key, value in line.items() if key not in ("seconds", "peak_bytes")} for line in lines]
    return found | {"metrics.jsonl": hashlib.sha256(json.dumps(kept).encode()).hexdigest()}


def run_once(call: Sequence[str], wait: float | None) -> tuple[int, str]:
    """One process: killed after `wait` seconds, or left alone; its exit code and what it said."""
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        said, _ = process.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    finally:
        process.kill()
    return process.returncode, said


def soak(model: str, minutes: float, steps: int, longest: float, seed: int, folder: Path) -> Soak:
    """Kill runs for so many minutes.

    Args: steps: of a run. longest: seconds at most until a kill. folder: to work in.
    """
    draw, done, started = random.Random(seed), Soak(), time.perf_counter()
    write_dataset(folder / "data", NOTES, seed)
    notes = folder / "data" / "train.csv"
    code, said = run_once(command(model, notes, folder / "whole", steps), None)
    if code:
        done.problems.append(f"the run that was left alone ended with {code}: {said.strip()}")
        return done
    expected = digests(folder / "whole")
    print(f"expected: adapter {expected[RESULTS[0]][:16]} after {steps} steps", flush=True)
    over, number = time.perf_counter() + 60 * minutes, 0
    while time.perf_counter() < over or not number:
        number += 1
        out = folder / f"run{number}"
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            # The first process of all is killed even when no time is left, so that a run of no minutes is one all the same.
            wait = draw.uniform(0.2, longest) if time.perf_counter() < over or not done.kills else None
            code, said = run_once(command(model, notes, out, steps), wait)
            done.kills += code == -signal.SIGKILL
            lost = [line for line in said.splitlines() if "warning" not in line]
            if lost:
                done.problems.append(f"run {number}: {lost[-1]}")
        if code:
            done.problems.append(f"run {number} ended with {code}: {said.strip()[-300:]}")
            break
        found = digests(out)
        other = [name for name, digest in expected.items() if found[name] != digest]
        done.problems += [f"run {number}: {name} has other bytes" for name in other]
        done.runs += not other
        done.seconds = time.perf_counter() - started
        print(f"run {number}: {done.kills} kills, {done.runs} runs as expected, {done.seconds:.0f} s", flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when every run ended with the expected bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    parser.add_argument("--minutes", type=float, default=30.0, help="of starting and killing; the last run then finishes")
    parser.add_argument("--steps", type=int, default=1000, help="of each run")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds at most between a start and its kill")
    parser.add_argument("--seed", type=int, default=0, help="of notes and moments")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="minilora-soak-") as folder:
        done = soak(args.model, args.minutes, args.steps, args.longest, args.seed, Path(folder))
    print(f"{done.kills} kills survived; {done.runs} runs of {args.steps} steps ended with the expected bytes; "
          f"{done.seconds / 60:.1f} minutes")
    for problem in done.problems:
        print(problem, file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
    return 1 if done.problems or not done.runs else 0


if __name__ == "__main__":
    sys.exit(main())
