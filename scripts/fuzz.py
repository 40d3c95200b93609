"""Structured fuzzing of what reads a stranger's files: no crash, no hang, no memory, and only the package's own errors.

    python scripts/fuzz.py --inputs 1000000 [--seed 0] [--kinds bin adapter] [--json FILE]
    python scripts/fuzz.py --kinds bin --case 4711 --keep FOLDER        one input again, written where it can be looked at

A kind is a reader and a maker of files for it (`fuzz_inputs`); input n of a kind depends on the seed and n alone.  Inputs are
read in a child process, a few thousand to a child, so that a crash or a hang ends that child and no more: the parent knows
which input it was at, and goes on behind it.  A finding is an input that

    ends the process, or keeps it for more than 10 s            raises anything but a `MiniloraError`
    takes more than 300 MB, or a failed allocation              writes to the error stream (a library's panic)
    is refused in more than one line, or in more than 1,000 characters
"""
from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fuzz_inputs
import torch

from minilora.adapters import base_quantization, load_adapter, read_adapter_config, read_extra
from minilora.errors import MiniloraError
from minilora.llama.bnb_format import check_quantization_config, quantized_linears, read_nf4
from minilora.llama.checkpoint import load_checkpoint
from minilora.llama.config import LlamaConfig, num_parameters
from minilora.llama.strict_json import read_object
from minilora.llama.tokenizer import read_tokenizer
from minilora.llama.weights import WeightFiles

# Of a million inputs; the slower a reader, the fewer.
SHARES = {"config": 250, "index": 120, "safetensors": 250, "bin": 80, "sentencepiece": 100, "tokenizer": 40, "adapter": 100,
          "quant_state": 50, "folder": 10}
A_CHILD = 4000                      # inputs to a process
SECONDS, MEMORY, CHARACTERS = 10, 300 << 20, 1000
SAMPLE = "the thing abc é\u0301 \U0001f600 ing ▁ \t\n<s></s> ab"


# Readers


def read_config(folder: Path) -> None:
    """config.json, and what is worked out from it before weights are looked at."""
    config = LlamaConfig.from_json(folder)
    num_parameters(config)
    check_quantization_config(read_object(folder / "config.json"), "config.json")


def read_weights(folder: Path) -> None:
    """Every tensor of a folder, in whatever files."""
    weights = WeightFiles(folder)
    for key, entry in weights.entries.items():
        if entry.dtype is not None:
            weights.read(key)
    weights.close()


def read_text(folder: Path) -> None:
    """A tokenizer, and a text through it and back."""
    tokenizer = read_tokenizer(folder)
    tokenizer.decode(tokenizer.encode(SAMPLE))


def read_adapter(folder: Path) -> None:
    """An adapter, onto a module of two linears."""
    read_adapter_config(folder)
    read_extra(folder)
    base_quantization(folder)
    attention, mlp = torch.nn.Module(), torch.nn.Module()
    attention.q_proj, mlp.up_proj = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False)
    layer = torch.nn.ModuleDict({"self_attn": attention, "mlp": mlp})
    load_adapter(torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})}), folder)


def read_four_bit(folder: Path) -> None:
    """The 4-bit linears of a folder, and their weights."""
    weights = WeightFiles(folder)
    for name in quantized_linears(weights.entries):
        read_nf4(weights, name, (32, 40)).dequantize()


def read_folder(folder: Path) -> None:
    """A model and its tokenizer."""
    load_checkpoint(folder)
    read_tokenizer(folder)


READERS: dict[str, Callable[[Path], None]] = {
    "config": read_config, "index": read_weights, "safetensors": read_weights, "bin": read_weights, "sentencepiece": read_text,
    "tokenizer": read_text, "adapter": read_adapter, "quant_state": read_four_bit, "folder": read_folder}


# One input


@dataclass
class Tally:
    """What came of the inputs of a kind.

    Attributes: read, refused: inputs that were taken, or refused in one line. findings: {"case", "what"} of the others.
    """

    kind: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)


def files_of(kind: str, seed: int, case: int) -> dict[str, bytes]:
    """Input number `case`."""
    return fuzz_inputs.KINDS[kind](random.Random(f"{seed} {kind} {case}"))


def write(files: dict[str, bytes], folder: Path) -> None:
    """Replace what lies in a folder."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def outcome(kind: str, folder: Path) -> str:
    """"read", "refused", or what is wrong with how it ended."""
    try:
        READERS[kind](folder)
        return "read"
    except MiniloraError as error:
        text = str(error)
        if "\n" in text or "\r" in text:
            return f"refused in more than one line: {text[:200]!r}"
        return "refused" if len(text) <= CHARACTERS else f"refused in {len(text)} characters: {text[:200]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:          # a panic of a library in Rust is no Exception
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]!r}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(kind: str, seed: int, cases: range, progress: mmap.mmap, said: int, folder: Path) -> Tally:
    """Read inputs, one after the other; `progress` holds the one that is being read, `said` is the error stream's file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tally, peak = Tally(kind), 0
    for case in cases:
        write(files_of(kind, seed, case), folder)
        struct.pack_into("<q", progress, 0, case)
        spoken, peak = os.fstat(said).st_size, _peak()
        result = outcome(kind, folder)
        if _peak() - peak > MEMORY:
            result = f"took {(_peak() - peak) / 1e6:.0f} MB, then: {result}"
        if os.fstat(said).st_size > spoken:
            result = f"wrote to the error stream {os.pread(said, 200, spoken)!r}, then: {result}"
        tally.inputs += 1
        tally.read += result == "read"
        tally.refused += result == "refused"
        if result not in ("read", "refused"):
            tally.findings.append({"case": case, "what": result})
    return tally


def watched(kind: str, seed: int, cases: range, folder: Path) -> Tally:
    """Read inputs in a child; what it cannot tell itself, a crash or a hang, is found out here."""
    progress = mmap.mmap(-1, 8)
    struct.pack_into("<q", progress, 0, cases.start)
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as report:
        process = os.fork()
        if process == 0:
            try:
                os.dup2(said.fileno(), 2)
                tally = child(kind, seed, cases, progress, said.fileno(), folder)
                report.write(json.dumps(asdict(tally)).encode())
                report.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        at, since = cases.start, time.monotonic()
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            now = struct.unpack_from("<q", progress)[0]
            if done:
                break
            if now != at:
                at, since = now, time.monotonic()
            elif time.monotonic() - since > SECONDS + 20 * (at == cases.start):     # the first one waits for imports
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                status = -1
                break
            time.sleep(0.05)
        report.seek(0)
        told = report.read()
        if told:
            return Tally(**json.loads(told))
        said.seek(0)
        what = f"hung for {SECONDS} s" if status == -1 else \
            f"ended the process ({status}): {said.read()[-300:].decode(errors='replace')!r}"
        return Tally(kind, now + 1 - cases.start, findings=[{"case": now, "what": what}])


def fuzz(kind: str, count: int, seed: int, folder: Path, first: int = 0) -> Tally:
    """`count` inputs of a kind, in as many children as it takes."""
    total, started = Tally(kind), time.perf_counter()
    case = first
    while case < first + count:
        part = watched(kind, seed, range(case, min(first + count, case + A_CHILD)), folder)
        case += part.inputs
        total.inputs += part.inputs
        total.read += part.read
        total.refused += part.refused
        total.findings += part.findings
    total.seconds = round(time.perf_counter() - started, 1)
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 without a finding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", choices=list(READERS), default=list(READERS), help="what to read")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same inputs")
    parser.add_argument("--case", type=int, help="this one alone, of the one kind that is named")
    parser.add_argument("--keep", metavar="FOLDER", help="write the input of --case there")
    parser.add_argument("--json", metavar="FILE", help="write the figures and findings there as well")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if args.case is not None and args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
        write(files_of(args.kinds[0], args.seed, args.case), Path(args.keep))
    shares = sum(SHARES[kind] for kind in args.kinds)
    tallies = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="minilora-fuzz-", dir=memory if memory.is_dir() else None) as folder:
        print("| kind | inputs | read | refused | findings | seconds |\n| --- | --- | --- | --- | --- | --- |", flush=True)
        for kind in args.kinds[:1] if args.case is not None else args.kinds:
            count = 1 if args.case is not None else max(1, args.inputs * SHARES[kind] // shares)
            tallies.append(tally := fuzz(kind, count, args.seed, Path(folder), args.case or 0))
            print(f"| {kind} | {tally.inputs:,} | {tally.read:,} | {tally.refused:,} | {len(tally.findings)} | "
                  f"{tally.seconds:,.0f} |", flush=True)
    print(f"| all | {sum(tally.inputs for tally in tallies):,} | {sum(tally.read for tally in tallies):,} | "
          f"{sum(tally.refused for tally in tallies):,} | {sum(len(tally.findings) for tally in tallies)} | "
          f"{sum(tally.seconds for tally in tallies):,.0f} |")
    for tally in tallies:
        for finding in tally.findings[:20]:
            print(f"{tally.kind} {finding['case']}: {finding['what']}", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(tally) for tally in tallies], indent=2) + "\n", encoding="utf-8")
    return 1 if any(tally.findings for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
