"""Two processes that do the same work in turns: ours, and a peer's.

Each is a process of its own, so that its peak memory is its own and neither meets the other's threads or caches.  The parent
tells one, then the other, to do the work once; a child answers with its seconds.  What a child prints itself goes to its error
stream, of which the last line is shown if it fails.

    parent                      child
                                prepares, loads, warms nothing          {"ready": true}
    go                          does the work once                      {"seconds": 1.23}
    …
    end of input                                                        {"peak_bytes": 660000000}
"""
from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from minilora.bench.events import cold_seconds
from minilora.bench.rows import quartiles
from minilora.errors import MiniloraError
from minilora.runs import peak_bytes

Work = Literal["load", "step", "prefill", "decode", "score", "unpack", "product"]
LAYER_WORKS = ("unpack", "product")
PAUSE_SECONDS = 0.02        # between turns: OpenMP's threads spin for some milliseconds after their last loop
PEERS_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "peers.py"


@dataclass(frozen=True)
class Task:
    """What both sides do.

    Attributes:
        model: folder of a 16-bit checkpoint, where the work needs one.
        batch, length: sequences, and tokens of each. new_tokens: to write, for decode.
        label_tokens: of a sequence, those that carry loss.
        adapted: whether decode has an adapter on all linears, as a step has. r: rank of the adapters.
        rows, shape: of x and of the weight (out, in), for product and unpack. dtype: of the result.
        grad: whether gradients are wanted. layers: that many weights are taken in turn (more than the caches hold).
        calls: of which a turn's seconds are the median.
        device: cpu, or cuda: there a peak is the GPU's memory, and a single layer is timed by `events.cold_seconds`.
    """

    work: Work
    model: str = ""
    batch: int = 1
    length: int = 128
    new_tokens: int = 32
    label_tokens: int = 16
    adapted: bool = False
    r: int = 16
    gradient_checkpointing: bool = False
    rows: int = 1
    shape: tuple[int, int] = (0, 0)
    dtype: str = "bfloat16"
    grad: bool = True
    layers: int = 1
    calls: int = 1
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @staticmethod
    def from_json(text: str) -> Task:
        """What `asdict` and JSON made of a task."""
        fields = json.loads(text)
        return Task(**{**fields, "shape": tuple(fields["shape"])})


@dataclass(frozen=True)
class Taken:
    """What a side took: seconds of each turn, the first, which was the warm-up, and its process's peak, loading included."""

    seconds: list[float]
    first: float
    peak_bytes: int

    @property
    def median(self) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds)


def ratio(ours: Taken, peer: Taken) -> tuple[float, tuple[float, float]]:
    """How many times as fast we are, the median over the turns, and its quartiles."""
    each = [b / a for a, b in zip(ours.seconds, peer.seconds, strict=True)]
    return statistics.median(each), quartiles(each)


class _Side:
    def __init__(self, command: Sequence[str], task: Task) -> None:
        self.name = Path(command[-1]).stem
        self.errors = tempfile.TemporaryFile("w+")      # noqa: SIM115  (closed in `end`)
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen([sys.executable, *command, json.dumps(asdict(task))], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True, env={**os.environ, **offline})
        self.seconds: list[float] = []

    def answer(self, key: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()] or ["it said nothing"]
            reason = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
            raise MiniloraError(f"{self.name} failed: {reason:.300}")
        return json.loads(line)[key]

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.seconds.append(self.answer("seconds"))

    def end(self) -> Taken:
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self.answer("peak_bytes")
        return Taken(self.seconds[1:], self.seconds[0], peak)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def take_turns(task: Task, rounds: int, peers: bool, peer_task: Task | None = None) -> tuple[Taken, Taken | None]:
    """Do a task on both sides, one warm-up and `rounds` turns each; without `peers` on ours alone.

    Args: peer_task: the peer's, where it is another one.
    Raises: MiniloraError: a side failed, or there is no script with the peers' side.
    """
    commands = [(["-m", "minilora.bench.ours"], task)]
    if peers:
        if not PEERS_SCRIPT.is_file():
            raise MiniloraError("--peers needs scripts/peers.py: run the bench from a checkout of the project, with the extra "
                                "[peers] installed")
        commands.append(([str(PEERS_SCRIPT)], peer_task or task))
    sides: list[_Side] = []
    try:
        for command, its_task in commands:      # one after the other: loading is no race for the disk
            sides.append(_Side(command, its_task))
            sides[-1].answer("ready")
        for _ in range(rounds + 1):
            for side in sides:
                time.sleep(PAUSE_SECONDS)
                side.turn()
        taken = [side.end() for side in sides]
    finally:
        for side in sides:
            side.stop()
    return taken[0], taken[1] if peers else None


def serve(prepare: Callable[[Task], Callable[[], object]]) -> None:
    """A side's main function: prepare the task of the command line, then do it once for every line of the standard input.

    What the work returns, where it is a float, are its seconds; else the clock tells.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                       # what libraries print is no answer
    task = Task.from_json(sys.argv[1])
    call = prepare(task)
    device = torch.device(task.device)
    if device.type == "cuda":
        call = partial(cold_seconds, call) if task.work in LAYER_WORKS else partial(_finished, call, device)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(ready=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(task.calls):
            started = time.perf_counter()
            told = call()
            seconds.append(told if isinstance(told, float) else time.perf_counter() - started)
        answer(seconds=statistics.median(seconds))
    answer(peak_bytes=peak_bytes(device))


def _finished(call: Callable[[], object], device: torch.device) -> object:
    told = call()
    torch.cuda.synchronize(device)      # a call is over for Python before it is for the GPU
    return told
