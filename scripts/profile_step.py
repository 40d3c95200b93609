"""Where the time of a training step goes, operation by operation, on a CPU or a GPU.

    python scripts/profile_step.py [--shape 110m] [--batch 4] [--seq 256] [--device cuda] [--top 25] [--json FILE]

A QLoRA step over random weights and tokens, adapters on all seven linears.  Each operation's time is its own, without those
that it calls; vector code counts to the function that calls it.  On a GPU it is the time of its kernels there, and a line says
for how much of a step the GPU had work: where that is well below one, Python asks too slowly.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minilora.files import write_json
from minilora.malloc import keep_freed_memory
from minilora.measured import make_model, random_batch
from minilora.memory import Workload
from minilora.optim.adamw import AdamW
from minilora.shapes import SHAPES, shape_of
from minilora.stepping import compute_gradients

ROUNDS = 3          # of which the median counts, after one that warms up; under the profiler the last


@dataclass(frozen=True)
class Operation:
    """Seconds of one operation over one kind of shapes in a step, where it is computed and on the host; and how often."""

    name: str
    shapes: str
    calls: int = 0
    seconds: float = 0.0
    host_seconds: float = 0.0


def step_of(shape: str, work: Workload, device: torch.device) -> Callable[[], None]:
    """An optimizer step, over when it returns."""
    config = shape_of(shape)
    model = make_model(config, work, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, batch = AdamW(trained, lr=2e-4), random_batch(config, work).to(device)
    keep_freed_memory()

    def step() -> None:
        compute_gradients(model, [batch], optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return step


def seconds_of(step: Callable[[], None]) -> float:
    """Of a step without the profiler, which slows the host down."""
    taken = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def operations(step: Callable[[], None], device: torch.device) -> list[Operation]:
    """Of one step, the longest first.

    Trap: what the profiler notes lies among the step's own tensors, which then come to lie in pages that are new, each filled
    with zeros first: ten times as long for a SwiGLU.  The last of several steps has its pages.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    for _ in range(ROUNDS):
        with profile(activities=activities, record_shapes=True, acc_events=True) as made:
            step()
    found: dict[tuple[str, str], Operation] = {}
    for event in made.key_averages(group_by_input_shape=True):
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)       # of numbers there are none
        before, host = found.get((event.key, shapes), Operation(event.key, shapes)), event.self_cpu_time_total / 1e6
        seconds = event.self_device_time_total / 1e6 if on_gpu else host
        found[event.key, shapes] = replace(before, calls=before.calls + event.count, seconds=before.seconds + seconds,
                                           host_seconds=before.host_seconds + host)
    return sorted(found.values(), key=lambda operation: -operation.seconds)


def table(found: Sequence[Operation], top: int) -> str:
    """The longest operations, and the sum of the others."""
    whole = sum(operation.seconds for operation in found)
    lines = ["      ms  share   calls   host ms  operation"]
    for operation in found[:top]:
        lines.append(f"{operation.seconds * 1e3:8.1f} {operation.seconds / whole:6.3f} {operation.calls:7} "
                     f"{operation.host_seconds * 1e3:9.1f}  {operation.name:.60}  {operation.shapes:.60}")
    rest = found[top:]
    if rest:
        seconds = sum(operation.seconds for operation in rest)
        lines.append(f"{seconds * 1e3:8.1f} {seconds / whole:6.3f} {sum(operation.calls for operation in rest):7} "
                     f"{sum(operation.host_seconds for operation in rest) * 1e3:9.1f}  {len(rest)} others")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="110m", help="of the model")
    parser.add_argument("--batch", type=int, default=4, help="notes of a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a note")
    parser.add_argument("--label-tokens", type=int, default=16, help="tokens of a note that carry loss")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute blocks in the backward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="compute type")
    parser.add_argument("--top", type=int, default=25, help="operations to show")
    parser.add_argument("--json", type=Path, help="file for all of them")
    args = parser.parse_args(arguments)

    device = torch.device(args.device)
    work = Workload("qlora", batch=args.batch, seq=args.seq, label_tokens=args.label_tokens, r=args.r,
                    gradient_checkpointing=args.gradient_checkpointing, compute=getattr(torch, args.dtype))
    step = step_of(args.shape, work, device)
    seconds = seconds_of(step)
    found = operations(step, device)
    computing = sum(operation.seconds for operation in found)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads of the CPU"
    print(f"{args.shape}, {args.batch} x {args.seq} tokens, {args.label_tokens} of a note with loss, r = {args.r}, "
          f"{'checkpointing, ' if args.gradient_checkpointing else ''}{where}: {seconds * 1e3:.1f} ms a step")
    if device.type == "cuda":
        print(f"the GPU had work for {computing * 1e3:.1f} ms, {computing / seconds:.2f} of it")
    print(table(found, args.top))
    if args.json:
        made = {"seconds": seconds, "computing": computing, "operations": [asdict(each) for each in found]}
        write_json(args.json, made)


if __name__ == "__main__":
    main()
