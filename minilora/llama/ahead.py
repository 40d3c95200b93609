"""Reading ahead: while one tensor is quantized, the next one is read.

    reader    read 0   read 1   read 2   …
    caller             use 0    use 1    use 2   …

so that loading takes the longer of both times and not their sum: that of the disk, or that of the processor.  One thread is
enough, and no queue: a second tensor ahead would only take memory.  A tensor that lies in a mapped file is not copied: to read
it is to ask the disk for it (`mapped`), and a thread waits there because the disk takes no more than some requests at once.

Trap: torch's operations must stay with the caller.  Each thread that enters one has a team of helpers of its own, and two teams
on the same cores make both sleep; so the reader moves bytes, and computes nothing.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(reads: Sequence[Callable[[], Item]]) -> Generator[Item, None, None]:
    """Call one after the other in a thread of its own, one ahead of the caller.

    Args:
        reads: what to do, in order.

    Returns: the results, in order.  Read k begins when result k - 2 was done with, so no more than two lie in memory.
    Raises: what a read raises, where its result would have come.
    Guarantee: no more than one read is ahead, and none goes on after the iterator was closed (tests/llama/test_ahead.py).
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead: Future[Item] | None = None
        for read in reads:
            before, ahead = ahead, reader.submit(read)
            if before is not None:
                yield before.result()
        if ahead is not None:
            yield ahead.result()
