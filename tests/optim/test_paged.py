"""The pager against a dictionary of pages: what it gives out, what it keeps in memory, what it counts, how it fails."""
from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import ConfigError, OutputError, testing
from minilora.optim.paged import SMALLEST_PAGE, FileBacking, Pager, in_order

Backing = Literal["host", "disk"]


def filled(value: int) -> torch.Tensor:
    return torch.full((SMALLEST_PAGE,), value, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(backing=st.sampled_from(["host", "disk"]), frames=st.integers(2, 6), data=st.data())
def test_every_page_reads_as_it_was_last_written(backing: Backing, frames: int, data: st.DataObject) -> None:
    pager = Pager(SMALLEST_PAGE, frames * SMALLEST_PAGE, backing)
    pages = data.draw(st.integers(1, 10))
    assert pager.grow(pages) == 0
    expected = [0] * pages          # never written: zeros
    number = st.integers(0, pages - 1)
    for page, ahead, value in data.draw(st.lists(st.tuples(number, st.none() | number, st.none() | st.integers(0, 255)),
                                                 max_size=40)):
        content = pager.use(page, ahead, write=value is not None)
        assert torch.equal(content, filled(expected[page]))
        if value is not None:
            content.fill_(value)
            expected[page] = value
        assert pager.resident_bytes <= frames * SMALLEST_PAGE
        if data.draw(st.integers(0, 9)) == 0:
            assert pager.evict() >= SMALLEST_PAGE and pager.resident_bytes == 0
    for page, value in enumerate(expected):
        assert torch.equal(pager.use(page, write=False), filled(value))
    pager.close()


@settings(max_examples=80, deadline=None)
@given(accesses=testing.page_accesses(pages=7), frames=st.integers(2, 5), backing=st.sampled_from(["host", "disk"]))
def test_it_does_what_the_specification_does(accesses: list[tuple[int, bool]], frames: int, backing: Backing) -> None:
    pager = Pager(SMALLEST_PAGE, frames * SMALLEST_PAGE, backing)
    pager.grow(7)
    for access, (missing, leaving, written_back) in zip(accesses, testing.pager(accesses, frames), strict=True):
        before = dataclasses.replace(pager.counters)
        pager.use(access[0], write=access[1])
        assert (pager.counters.faults - before.faults, pager.counters.evictions - before.evictions) == \
            (missing, leaving is not None), access
        assert pager.counters.bytes_out - before.bytes_out == written_back * SMALLEST_PAGE, access
    pager.close()


def test_the_least_recently_used_page_leaves_first() -> None:
    pager = Pager(SMALLEST_PAGE, 3 * SMALLEST_PAGE)
    pager.grow(4)
    for page in (0, 1, 2, 0):
        pager.use(page)
    assert (pager.counters.faults, pager.counters.evictions) == (3, 0)
    pager.use(3)                    # puts out page 1: 0 was used since
    for page in (2, 0):
        pager.use(page)
    assert (pager.counters.faults, pager.counters.evictions) == (4, 1)
    pager.use(1)
    assert (pager.counters.faults, pager.counters.evictions) == (5, 2)


def test_only_what_was_changed_is_written_and_only_what_was_written_is_read() -> None:
    pager = Pager(SMALLEST_PAGE, 2 * SMALLEST_PAGE)
    pager.grow(4)
    for page in range(4):
        pager.use(page, write=page == 0)
    assert (pager.counters.bytes_out, pager.counters.bytes_in) == (SMALLEST_PAGE, 0)
    pager.use(0, write=False)
    assert (pager.counters.bytes_out, pager.counters.bytes_in) == (SMALLEST_PAGE, SMALLEST_PAGE)
    for page in (1, 2):
        pager.use(page, write=False)
    assert pager.counters.bytes_out == SMALLEST_PAGE, "a page that was only read need not be written again"


def test_the_page_wanted_next_is_there_when_it_is_asked_for() -> None:
    pager = Pager(SMALLEST_PAGE, 2 * SMALLEST_PAGE)
    pager.grow(6)
    for page, ahead in in_order(list(range(6)), backwards=False):
        pager.use(page, ahead).fill_(page)
    assert pager.counters.faults == 6       # a page that was fetched ahead does not fault again
    for page, ahead in in_order(list(range(6)), backwards=True):
        assert torch.equal(pager.use(page, ahead, write=False), filled(page))
    assert pager.counters.faults == 6 + 4   # the last two were still there


def test_turning_round_keeps_the_resident_share() -> None:
    def faults(turning: bool) -> int:
        pager = Pager(SMALLEST_PAGE, 5 * SMALLEST_PAGE)
        pager.grow(20)
        for scan in range(10):
            for page, ahead in in_order(list(range(20)), backwards=turning and scan % 2 == 1):
                pager.use(page, ahead)
        return pager.counters.faults

    assert faults(turning=False) == 10 * 20
    assert faults(turning=True) == 20 + 9 * 15


@pytest.mark.parametrize(("options", "message"), [
    ({"page_bytes": 4095}, "page_bytes"), ({"page_bytes": 4100}, "multiple of 8"), ({"page_bytes": True}, "page_bytes"),
    ({"resident_bytes": 2 * SMALLEST_PAGE - 1}, "two pages"), ({"backing": "tape"}, "backing"),
    ({"backing": "disk", "device": "meta"}, "on a CPU")])
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pager(**{"page_bytes": SMALLEST_PAGE, "resident_bytes": 1 << 20, **options})


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot make the page file in .*missing: No such file"):
        Pager(SMALLEST_PAGE, backing="disk", folder=tmp_path / "missing")


def test_the_page_file_has_no_name(tmp_path: Path) -> None:
    pager = Pager(SMALLEST_PAGE, 2 * SMALLEST_PAGE, "disk", folder=tmp_path)
    pager.grow(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is not taken in advance on this system")
def test_a_full_disk_shows_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    pager = Pager(SMALLEST_PAGE, 2 * SMALLEST_PAGE, "disk")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no room for 12,288 more bytes .No space left on device"):
        pager.grow(3)


def working(pages: int = 6) -> tuple[Pager, FileBacking]:
    """A pager whose pages were all written, most of them to the file."""
    pager = Pager(SMALLEST_PAGE, 2 * SMALLEST_PAGE, "disk")
    pager.grow(pages)
    for page, ahead in in_order(list(range(pages)), backwards=False):
        pager.use(page, ahead).fill_(page + 1)
    backing = pager._backing
    assert isinstance(backing, FileBacking)
    return pager, backing


def test_a_file_cut_short_gives_nothing_out() -> None:
    pager, backing = working()
    backing.file.truncate(SMALLEST_PAGE // 2)
    with pytest.raises(OutputError, match=r"cut to 2,048 of 24,576 bytes.*--resume"):
        pager.use(0)
    with pytest.raises(OutputError, match="state is lost"):
        pager.use(5)                # it is still in memory, but the state as a whole is gone


def test_a_disk_that_fills_up_while_a_page_leaves_gives_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pager, backing = working()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backing, "write", full)
    with pytest.raises(OutputError, match=r"No space left on device.*--resume"):
        pager.use(0)
    with pytest.raises(OutputError, match="No space left"):
        pager.evict()


def test_whatever_stops_a_move_no_older_page_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pager, backing = working()

    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(backing, "read", out_of_memory)
    with pytest.raises(OutputError, match="MemoryError"):
        pager.use(0)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="state is lost"):
        pager.use(0)


COUNT_THREADS = """
import os, sys, torch
from minilora.optim.paged import Pager

torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
before = len(os.listdir("/proc/self/task"))
pager = Pager(2 << 20, 4 << 20, sys.argv[1])
pager.grow(4)
for page in (0, 1, 2, 3, 0, 1):
    pager.use(page, (page + 1) % 4)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize("backing", ["host", "disk"])
def test_its_thread_starts_no_others(backing: Backing) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS, backing], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n", "a second team of OpenMP threads slows down every operation of the program"


def test_a_closed_pager_is_refused() -> None:
    pager, _ = working()
    pager.close()
    with pytest.raises(OutputError, match="closed"):
        pager.use(0)
