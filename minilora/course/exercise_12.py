"""Exercise 12: a pager that puts out the least recently used page, and what the optimizer's state takes."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from minilora.course.grading import Mistake, Task
from minilora.memory import moment_bytes
from minilora.testing import pager

Access = tuple[int, bool]
Event = tuple[bool, int | None, bool]


def _pager_with(on_hit: Callable[[OrderedDict[int, bool], int], None], newest_leaves: bool = False,
                always_written: bool = False, keeps_dirt: bool = False) -> Callable[..., list[Event]]:
    """A pager with another rule of who leaves, or of what is written back."""
    def run(accesses: list[Access], frames: int) -> list[Event]:
        resident: OrderedDict[int, bool] = OrderedDict()
        stained: set[int] = set()
        events: list[Event] = []
        for page, write in accesses:
            missing, leaving, dirty = page not in resident, None, False
            if missing and len(resident) == frames:
                leaving, dirty = resident.popitem(last=newest_leaves)
                dirty = dirty or always_written or (keeps_dirt and leaving in stained)
            if missing:
                resident[page] = write
            else:
                on_hit(resident, page)
                resident[page] = resident[page] or write
            if write:
                stained.add(page)
            events.append((missing, leaving, dirty))
        return events
    return run


def _touch(resident: OrderedDict[int, bool], page: int) -> None:
    resident.move_to_end(page)


def _leave(resident: OrderedDict[int, bool], page: int) -> None:
    """First in, first out: a page that is used again doesn't become younger."""


def _never_written(accesses: list[Access], frames: int) -> list[Event]:
    return [(missing, leaving, False) for missing, leaving, _ in pager(accesses, frames)]


def _draw(generator: torch.Generator) -> tuple[list[Access], int]:
    pages = torch.randint(0, 5, (30,), generator=generator).tolist()
    writes = (torch.rand(30, generator=generator) < 0.4).tolist()
    return list(zip(pages, writes, strict=True)), int(torch.randint(2, 4, (), generator=generator))


FIXED = ([(0, True), (1, False), (0, False), (2, False), (1, False)], 2)
TASKS = (
    Task("pager", pager, fixed=(FIXED,), random=_draw, mistakes=(
        Mistake("you put out the page that came in first; it must be the one that was *used* least recently",
                _pager_with(_leave)),
        Mistake("you put out the newest page: the one used least recently has to leave",
                _pager_with(_touch, newest_leaves=True)),
        Mistake("you write every page back: one that was only read is still right in the backing",
                _pager_with(_touch, always_written=True)),
        Mistake("you never write a page back: what was changed in it is lost", _never_written),
        Mistake("a page that was written back once counts as changed for ever: it comes back clean",
                _pager_with(_touch, keeps_dirt=True)))),
    Task("moment_bytes", moment_bytes, mistakes=(
        Mistake("there are two moments", lambda size, bits: moment_bytes(size, bits) // 2),
        Mistake("8-bit blocks have a float32 constant for every 256 elements, of each moment",
                lambda size, bits: 8 * size if bits == 32 or size < 4096 else 2 * size),
        Mistake("a parameter of fewer than 4,096 elements keeps its moments in float32",
                lambda size, bits: 8 * size if bits == 32 else 2 * (size + 4 * -(-size // 256))),
        Mistake("a parameter of exactly 4,096 elements has 8-bit moments already: fewer stay in float32",
                lambda size, bits: moment_bytes(size, 32 if size <= 4096 else bits)),
        Mistake("the last block may be short, and has a constant as well: round the number of blocks up",
                lambda size, bits: 8 * size if bits == 32 or size < 4096 else 2 * (size + 4 * (size // 256)))),
         fixed=((65_536, 32), (65_536, 8), (100_000, 8), (1000, 8), (1000, 32), (4096, 8))),
)
