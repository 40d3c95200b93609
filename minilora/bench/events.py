"""What a call takes on a GPU: the time between two events in its queue, one before the call and one behind it.

    cold     before each call a buffer larger than every cache is cleared, as in a model each layer's weight comes from memory;
             while that runs the call is put into the queue, so that Python's time does not count
"""
from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

CLEARED_BYTES = 1 << 30             # a third of a millisecond on the fastest GPUs: several times what Python takes for a call
WARM_UP = 3                         # the first call compiles
Event = torch.cuda.Event


def in_turns(*calls: Callable[[], object], rounds: int = 30) -> list[float]:
    """Median seconds of each call on the current GPU, called alternately with nothing in the caches."""
    cleared = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    events: list[list[tuple[Event, Event]]] = [[] for _ in calls]
    for turn in range(WARM_UP + rounds):
        for side, call in zip(events, calls, strict=True):
            before, behind = Event(enable_timing=True), Event(enable_timing=True)
            cleared.zero_()
            before.record()
            call()
            behind.record()
            if turn >= WARM_UP:
                side.append((before, behind))
    torch.cuda.synchronize()
    return [statistics.median(before.elapsed_time(behind) / 1e3 for before, behind in side) for side in events]


def cold_seconds(call: Callable[[], object]) -> float:
    """Median seconds of one call on the current GPU."""
    return in_turns(call)[0]
