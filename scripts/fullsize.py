"""Every command over a checkpoint of Meditron-7B's shape: written, quantized, trained, evaluated, asked, loaded again.

    python scripts/fullsize.py [--shape 7b] [--kinds safetensors bin] [--out FOLDER] [--keep] [--json FILE]

Each stage is a command in a process of its own, as a user would give it; its peak is what the system counted for it.  The
weights are random: what is said means nothing, what it takes is what a real model of this shape takes.  What was written is
removed at the end, also when interrupted.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from minilora.data.radiology import generate
from minilora.errors import MiniloraError
from minilora.files import write_json
from minilora.hub import resolve_model
from minilora.llama.config import LlamaConfig, num_parameters
from minilora.loading import load_tokenizer
from minilora.memory import Memory, Workload, predict
from minilora.runs import METRICS_FILE
from minilora.shapes import shape_of, write_random_checkpoint

TOKENS, STEPS, ROWS = 256, 4, 4
GPU_STEPS, GPU_BATCH = 200, 8       # of the longer run, on a GPU alone
ON_THE_WAY = 600_000_000            # over the model: Python, torch, and what is between the file and the model
TRAINING = 1_100_000_000            # over what the plan says, the same and what malloc keeps
RELOAD_SECONDS = 30
LOADING_SHARE = 0.85                # of the speed of the disk, or of quantizing what lies in memory, whichever is slower
LOADS = 3                           # of which the median counts
LOADING_BEGINS = 0.2                # seconds beside, for modules and headers, whatever the weights' size
VOCABULARY = 32_017                 # Meditron's, of which 17 were added to Llama 2's
# Linux counts to a process's peak what its parent held when it was started: so the parent is a small one.
START = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(process, 0)
print(os.waitstatus_to_exitcode(status), used.ru_maxrss)
"""
RELOAD = "import sys, minilora; minilora.load_model(sys.argv[1])"
LOAD = """
import sys, time
from minilora.loading import load_model
load_model("tiny")          # the library of vector code is loaded
started = time.perf_counter()
load_model(sys.argv[1])
print(time.perf_counter() - started)
"""
# Reads the files, then quantizes as many bytes out of memory.
LIMITS = """
import sys
from pathlib import Path
from minilora.bench.models import quantizing_seconds, reading_seconds
from minilora.llama.config import LlamaConfig
folder = Path(sys.argv[1])
files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
print(reading_seconds(files), quantizing_seconds(LlamaConfig.from_json(folder / "config.json"),
                                                 sum(file.stat().st_size for file in files)))
"""


@dataclass(frozen=True)
class Stage:
    """What one command took.

    Attributes: seconds: of the process from start to end. peak_bytes: its resident memory. bounds: what -> (found, at most).
    """

    name: str
    seconds: float
    peak_bytes: int
    bounds: dict[str, tuple[float, float]]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every bound holds."""
        return all(found <= most for found, most in self.bounds.values())


def run(command: Sequence[str], log: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a command; its output goes to the end of `log`.

    Raises: MiniloraError: it failed.
    """
    started = time.perf_counter()
    with log.open("a") as out:
        done = subprocess.run([sys.executable, "-S", "-c", START, sys.executable, *command], stdout=subprocess.PIPE, stderr=out)
    code, peak = map(int, done.stdout.split() or (done.returncode, 0))
    if code:
        said = (log.read_text().strip().splitlines() or ["nothing"])[-1]
        raise MiniloraError(f"{' '.join(command[:4])} ended with {code}: {said:.300}")
    return time.perf_counter() - started, peak * (1 if sys.platform == "darwin" else 1024)


def write_notes(folder: Path) -> tuple[Path, Path]:
    """Tables of notes that fill a sequence: several orders of the synthetic set, one behind the other."""
    tokenizer = load_tokenizer("tiny")
    paths = []
    for name, rows in (("train", 2 * STEPS), ("test", ROWS)):
        examples = generate(n=max(400, 100 * rows), seed=1)[name]
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["input", "label"])
            for row in range(rows):
                note, following = "", iter(examples[row * len(examples) // rows :])
                while len(tokenizer.encode(note)) < TOKENS:
                    note += next(following).note + "\n"
                writer.writerow([note, examples[row * len(examples) // rows].label])
        paths.append(path)
    return paths[0], paths[1]


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest(folder: Path) -> str:
    """Of the weights in a folder, file by file."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def stages(config: LlamaConfig, kinds: Sequence[str], work: Path, device: str) -> Iterator[Stage]:
    """The stages, one after another, each as soon as it has ended."""
    log = work / "log.txt"
    train_csv, test_csv = write_notes(work)
    four_bits, run_folder = work / "four-bit", work / "run"
    on_gpu = device != "cpu" and torch.cuda.is_available()

    def planned(batch: int) -> Memory:
        return predict(config, Workload("qlora", seq=TOKENS, batch=batch, gradient_checkpointing=True, on_gpu=on_gpu))

    plan = planned(1)
    model = plan.weights + plan.absmax
    largest = 2 * config.vocab_size * config.hidden_size
    load_bound = model + largest + ON_THE_WAY
    train_bound = plan.total + TRAINING
    on = ["--device", device]

    def loaded(kind: str, source: Path, total: int) -> Stage:
        """`load_model` alone, in turns with what bounds its speed: medians."""
        peak, turns = 0, []
        for _ in range(LOADS):
            run(["-c", LIMITS, str(source)], log)
            limits = log.read_text().split()[-2:]
            peak = max(peak, run(["-c", LOAD, str(source)], log)[1])
            turns.append([float(number) for number in (*limits, log.read_text().split()[-1])])
        reading, quantizing, seconds = (median(taken) for taken in zip(*turns, strict=True))
        slower = max(reading, quantizing)
        return Stage(f"load {kind}", seconds, peak, {"peak GB": (peak / 1e9, load_bound / 1e9),
                                                     "seconds": (seconds, slower / LOADING_SHARE + LOADING_BEGINS)},
                     f"{total / seconds / 1e9:.2f} GB/s; reading alone {total / reading / 1e9:.2f}, quantizing alone "
                     f"{total / quantizing / 1e9:.2f}; {slower / seconds:.2f} of the slower")

    def trained(name: str, model: Path, out: Path, steps: int, batch: int) -> Stage:
        """A run of `train`.  On a GPU the bound is one of its memory; that of the process is then CUDA's libraries."""
        command = ["-m", "minilora", "train", "--model", str(model), "--data", str(train_csv), "--out", str(out), "--max-steps",
                   str(steps), "--epochs", str(steps), "--batch-size", str(batch), "--max-length", str(TOKENS), "--r", "16",
                   "--gradient-checkpointing", "--lr", "2e-4", *on]
        seconds, peak = run(command, log)
        lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
        step_seconds = sorted(line["seconds"] for line in lines)[len(lines) // 2]
        highest = max(line["peak_bytes"] for line in lines)
        most = planned(batch).total + TRAINING
        bounds = {"highest step GB": (highest / 1e9, most / 1e9)}
        if not on_gpu:
            bounds["peak GB"] = (peak / 1e9, most / 1e9)
        return Stage(name, seconds, peak, bounds, f"{len(lines)} steps of {batch} x {TOKENS}, {step_seconds:.2g} s each; loss "
                     f"{lines[0]['loss']:.2f}, at the end {lines[-1]['loss']:.2f}")

    digests = set()
    for kind in kinds:
        source = work / kind
        started = time.perf_counter()
        total = write_random_checkpoint(config, source, "bin" if kind == "bin" else "safetensors")
        for path in resolve_model("tiny").glob("tokenizer*"):
            shutil.copy(path, source)
        seconds = time.perf_counter() - started
        yield Stage(f"write {kind}", seconds, 0, {}, f"{total / 1e9:.1f} GB, {total / seconds / 1e9:.2f} GB/s")
        shutil.rmtree(four_bits, ignore_errors=True)
        seconds, peak = run(["-m", "minilora", "quantize", str(source), str(four_bits)], log)
        digests.add(digest(four_bits))
        size = size_of(four_bits)
        yield Stage(f"quantize from {kind}", seconds, peak, {"peak GB": (peak / 1e9, load_bound / 1e9),
                                                             "4-bit GB": (size / 1e9, (model + 80_000_000) / 1e9)},
                    f"{total / seconds / 1e9:.2f} GB/s read, quantized and written")
        if not on_gpu:
            yield loaded(kind, source, total)
        if kind != kinds[-1]:
            shutil.rmtree(source)
    if len(digests) > 1:
        raise MiniloraError("the same weights out of .bin and out of safetensors became different bits")

    yield trained("load and train", source, run_folder, STEPS, 1)
    shutil.rmtree(source)
    base = ["--model", str(four_bits), "--adapter", str(run_folder)]
    seconds, peak = run(["-m", "minilora", "evaluate", *base, "--data", str(test_csv), "--out", str(work / "scores"), *on], log)
    yield Stage("evaluate", seconds, peak, {} if on_gpu else {"peak GB": (peak / 1e9, train_bound / 1e9)},
                f"{ROWS} notes of {TOKENS} tokens")
    seconds, peak = run(["-m", "minilora", "predict", *base, "--data", str(test_csv), "--out", str(work / "answers.csv"), *on],
                        log)
    yield Stage("predict", seconds, peak, {} if on_gpu else {"peak GB": (peak / 1e9, train_bound / 1e9)}, f"{ROWS} notes")
    seconds, peak = run(["-c", RELOAD, str(four_bits)], log)
    yield Stage("reload 4 bits", seconds, peak, {"seconds": (seconds, RELOAD_SECONDS),
                                                 "peak GB": (peak / 1e9, load_bound / 1e9)})
    if on_gpu:
        yield trained("train for longer", four_bits, work / "longer", GPU_STEPS, GPU_BATCH)


def table(done: Sequence[Stage]) -> str:
    """Stages as a table in Markdown."""
    lines = ["| stage | seconds | peak, GB | bounds | |", "| --- | --- | --- | --- | --- |"]
    for stage in done:
        bounds = "; ".join(f"{what} {found:.2f} of {most:.2f}{'' if found <= most else ' EXCEEDED'}"
                           for what, (found, most) in stage.bounds.items())
        peak = f"{stage.peak_bytes / 1e9:.2f}" if stage.peak_bytes else ""
        lines.append(f"| {stage.name} | {stage.seconds:,.0f} | {peak} | {bounds} | {stage.note} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print their table; 0 if every bound held, else 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", help="110m, 1.1b, 7b, 8b, or a folder with a config.json (default: 7b)")
    parser.add_argument("--kinds", nargs="+", choices=("bin", "safetensors"), default=["bin", "safetensors"],
                        help="formats of the 16-bit checkpoint, one after another (default: both)")
    parser.add_argument("--out", type=Path, help="folder to work in (default: a new one in the system's folder for such)")
    parser.add_argument("--keep", action="store_true", help="leave there what was written")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work = None
    try:
        config = shape_of(args.shape)
        if args.shape == "7b":
            config = LlamaConfig.from_dict({**config.raw, "vocab_size": VOCABULARY})
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="fullsize-", dir=args.out))
        needed, free = int(2.4 * num_parameters(config) + 2e9), shutil.disk_usage(work).free
        if free < needed:
            raise MiniloraError(f"{work.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; name another "
                                "folder with --out")
        done = []
        print(f"{num_parameters(config):,} parameters; {os.cpu_count()} cores, torch {torch.__version__}"
              + (f", {torch.cuda.get_device_name()}" if args.device != "cpu" and torch.cuda.is_available() else ""), flush=True)
        for stage in stages(config, args.kinds, work, args.device):
            done.append(stage)
            print(table(done).splitlines()[-1], flush=True)
        print("\n" + table(done))
        if args.json:
            write_json(args.json, [asdict(stage) for stage in done])
        failed = [stage.name for stage in done if not stage.ok]
        if failed:
            raise MiniloraError(f"more than allowed: {', '.join(failed)}")
    except MiniloraError as error:
        print(f"fullsize: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fullsize: stopped", file=sys.stderr)
        return 130
    finally:
        if work is not None and not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
