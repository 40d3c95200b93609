"""A pager: fixed-size pages in slow memory, a few of them at a time in fast memory.

    fast memory      frames, `resident_bytes` of them at most        GPU memory, or the process's memory
    backing          every page that was ever written                 pinned host memory, or a file

    use(page)        resident?  yes: it becomes the most recently used
                                no (a fault): the least recently used page is written back, and this one read in its place
    ahead            the page wanted next is fetched while the present one is worked on: by a thread, or on a GPU by a side
                     stream that events keep in step with the main one

bitsandbytes' paged optimizers leave all this to CUDA's unified memory: the driver moves 4 KiB to 2 MiB pieces when the GPU
touches them, needs no budget and shares memory with everything else, but exists on NVIDIA GPUs alone and decides by itself
what moves when.  Here the moves are the program's own: the same on any device, counted, and to a budget that is kept.

The file is not mapped into memory but read and written by position: a full disk or a file cut short is then an error that
can be caught, where a mapping ends the process (SIGBUS).  It has no name, so it disappears with the process, however that ends.

Lesson 12 explains it.
"""
from __future__ import annotations

import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from minilora.errors import ConfigError, OutputError
from minilora.files import disk_reason

PAGE_BYTES = 2 << 20
SMALLEST_PAGE = 4096


@dataclass
class PagerCounters:
    """What a pager did: times a page was not there, pages put out, bytes read and written, seconds spent waiting for them.

    On a GPU waiting is the stream's and costs the host no time, so `stall_seconds` stays near zero there.
    """

    faults: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0


class Backing(Protocol):
    """Where pages lie that are not resident; pages are numbered from 0, each of the pager's size."""

    def grow(self, pages: int) -> None:
        """Make room for `pages` more. Raises: OSError: there is none."""

    def read(self, page: int, frame: Tensor) -> None:
        """Copy a page into fast memory. Raises: OSError."""

    def write(self, page: int, frame: Tensor) -> None:
        """Copy fast memory into a page. Raises: OSError."""


def _copy(into: Tensor, source: Tensor | int) -> None:
    """Fill a page's bytes with those of another, or with one value."""
    if into.device.type == "cuda" or (isinstance(source, Tensor) and source.device.type == "cuda"):
        into.copy_(source, non_blocking=True) if isinstance(source, Tensor) else into.fill_(source)
    else:
        # Trap: torch would start OpenMP threads for the pager's own thread too.  With more of them than cores OpenMP no longer
        # spins but sleeps between two operations, and on two cores all arithmetic of the program takes twice as long.
        np.copyto(into.numpy(), source.numpy() if isinstance(source, Tensor) else source)


class HostBacking:
    """Pages in host memory; pinned where a GPU reads them, without which its copies would not run beside its work."""

    def __init__(self, page_bytes: int, pinned: bool) -> None:
        self.page_bytes, self.pinned = page_bytes, pinned
        self.pages: list[Tensor] = []

    def grow(self, pages: int) -> None:
        """See `Backing`."""
        room = torch.empty(pages, self.page_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        self.pages.extend(room.unbind())

    def read(self, page: int, frame: Tensor) -> None:
        """See `Backing`."""
        _copy(frame, self.pages[page])

    def write(self, page: int, frame: Tensor) -> None:
        """See `Backing`."""
        _copy(self.pages[page], frame)


class FileBacking:
    """Pages in a file without a name; its room is taken in advance, so that a full disk shows before any work is done."""

    def __init__(self, page_bytes: int, folder: str | Path | None) -> None:
        self.page_bytes, self.pages = page_bytes, 0
        self.file = tempfile.TemporaryFile(buffering=0, dir=folder)     # noqa: SIM115 (open as long as the pager lives)

    def grow(self, pages: int) -> None:
        """See `Backing`."""
        start, more = self.pages * self.page_bytes, pages * self.page_bytes
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file.fileno(), start, more)
        else:
            self.file.truncate(start + more)
        self.pages += pages

    def read(self, page: int, frame: Tensor) -> None:
        """See `Backing`."""
        self._seek(page)
        into = frame.numpy().data
        while into:
            into = into[self.file.readinto(into):]

    def write(self, page: int, frame: Tensor) -> None:
        """See `Backing`."""
        self._seek(page)
        left = frame.numpy().data
        while left:
            left = left[self.file.write(left):]

    def _seek(self, page: int) -> None:
        # Trap: a write behind the end of a file that was cut short fills the gap with zeros, and nobody notices.
        size, whole = os.fstat(self.file.fileno()).st_size, self.pages * self.page_bytes
        if size < whole:
            raise OSError(f"it was cut to {size:,} of {whole:,} bytes")
        self.file.seek(page * self.page_bytes)


@dataclass
class _Move:
    """A page on its way into a frame: when it is done, by the thread or by the stream."""

    page: int
    frame: Tensor
    done: Future[None] | torch.cuda.Event


class Pager:
    """Pages of bytes under a budget; a page that was never written reads as zeros.

    Args:
        page_bytes: size of a page, 4,096 at least. resident_bytes: budget of fast memory, two pages at least.
        backing: "host" memory, or a file on "disk" (CPU only). device: where pages are worked on.
        folder: of the file; default the system's temporary one, which may itself be memory.

    Raises: ConfigError: an argument. OutputError: the file cannot be made.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES, resident_bytes: int = 64 * PAGE_BYTES,
                 backing: Literal["host", "disk"] = "host", device: torch.device | str = "cpu",
                 folder: str | Path | None = None) -> None:
        self.page_bytes, self.device, self.counters = page_bytes, torch.device(device), PagerCounters()
        if isinstance(page_bytes, bool) or not isinstance(page_bytes, int) or page_bytes < SMALLEST_PAGE or page_bytes % 8:
            raise ConfigError(f"page_bytes must be a multiple of 8 and at least {SMALLEST_PAGE}, not {page_bytes!r}")
        if not 2 * page_bytes <= resident_bytes < 1 << 62:
            raise ConfigError(f"resident_bytes must hold two pages, one to work on and one to fetch: at least {2 * page_bytes} "
                              f"at {page_bytes} a page, not {resident_bytes!r}")
        if backing not in ("host", "disk") or (backing == "disk" and self.device.type != "cpu"):
            raise ConfigError(f"backing must be host or, on a CPU, disk; not {backing!r} on {self.device.type}")
        self.most_frames = int(resident_bytes) // page_bytes
        self.where = f"the page file in {folder or tempfile.gettempdir()}" if backing == "disk" else "pages in host memory"
        self.pages = 0
        try:
            self._backing: Backing = FileBacking(page_bytes, folder) if backing == "disk" else \
                HostBacking(page_bytes, pinned=self.device.type == "cuda")
        except OSError as error:
            raise OutputError(f"cannot make {self.where}: {disk_reason(error)}") from error
        self._resident: OrderedDict[int, Tensor] = OrderedDict()       # page -> frame, the least recently used first
        self._frames = 0
        self._dirty: set[int] = set()           # resident, and written to since they were read
        self._kept: set[int] = set()            # ever written back
        self._coming: _Move | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._broken: str | None = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of fast memory taken now."""
        return self._frames * self.page_bytes

    def grow(self, pages: int) -> int:
        """Add pages of zeros; returns the first one's number.

        Raises: OutputError: no room on the disk.
        """
        try:
            self._backing.grow(pages)
        except OSError as error:
            raise OutputError(f"{self.where}: no room for {pages * self.page_bytes:,} more bytes ({disk_reason(error)}); free "
                              "some space, or name another folder") from error
        self.pages += pages
        return self.pages - pages

    def use(self, page: int, ahead: int | None = None, write: bool = True) -> Tensor:
        """A page's bytes in fast memory, (page_bytes,) uint8, to be worked on until the next call.

        Args:
            ahead: the page wanted next, fetched meanwhile. write: whether the bytes will be changed.

        Raises: OutputError: the backing failed, now or before: what lay there is lost, so nothing is given out any more.
        """
        self._check()
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        self._arrive()
        if page not in self._resident:
            self._fetch(page)
            self._arrive()
        self._resident.move_to_end(page)
        if write:
            self._dirty.add(page)
        if ahead is not None and ahead not in self._resident:
            self._fetch(ahead)
        return self._resident[page]

    def evict(self) -> int:
        """Write every page back and release the frames; returns the bytes of fast memory that became free.

        Raises: OutputError: as `use`.
        """
        self._check()
        self._arrive()
        freed = self.resident_bytes
        try:
            for page, frame in self._resident.items():
                self._put_out(page, frame)
            if self._stream is not None:
                torch.cuda.current_stream(self.device).synchronize()       # the frames are read until then
        except Exception as error:
            self._break(error)
        self._resident.clear()
        self._frames = 0
        return freed

    def close(self) -> None:
        """End the thread; the pager is not used any more."""
        if self._thread is not None:
            self._thread.shutdown()
        self._broken = f"{self.where}: closed"

    def _put_out(self, page: int, frame: Tensor) -> None:
        self.counters.evictions += 1
        if page in self._dirty:
            self._backing.write(page, frame)
            self.counters.bytes_out += self.page_bytes
            self._dirty.discard(page)
            self._kept.add(page)

    def _fetch(self, page: int) -> None:
        """Begin to bring a page in; the page worked on at present is the most recently used, so it stays."""
        self.counters.faults += 1
        leaving: int | None = None
        if self._frames < self.most_frames:
            frame = torch.empty(self.page_bytes, dtype=torch.uint8, device=self.device)
            self._frames += 1
        else:
            leaving, frame = self._resident.popitem(last=False)
        if self._stream is None:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="pager")
            self._coming = _Move(page, frame, self._thread.submit(self._exchange, leaving, frame, page))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))    # updates of the frame's old page are still queued
        try:
            with torch.cuda.stream(self._stream):
                self._exchange(leaving, frame, page)
                self._coming = _Move(page, frame, self._stream.record_event())
        except Exception as error:
            self._break(error)

    def _exchange(self, leaving: int | None, frame: Tensor, page: int) -> None:
        if leaving is not None:
            self._put_out(leaving, frame)
        if page in self._kept:
            self._backing.read(page, frame)
            self.counters.bytes_in += self.page_bytes
        else:
            _copy(frame, 0)

    def _arrive(self) -> None:
        """Wait for the page that is on its way, if one is."""
        move, self._coming = self._coming, None
        if move is None:
            return
        started = time.perf_counter()
        try:
            if isinstance(move.done, Future):
                move.done.result()
            else:
                torch.cuda.current_stream(self.device).wait_event(move.done)
        except Exception as error:      # whatever it was, a page may be lost, and would be read as an older one
            self._break(error)
        self.counters.stall_seconds += time.perf_counter() - started
        self._resident[move.page] = move.frame

    def _check(self) -> None:
        if self._broken is not None:
            raise OutputError(self._broken)

    def _break(self, error: Exception) -> None:
        self._broken = (f"{self.where} failed ({disk_reason(error)}): the optimizer's state is lost; free some space, then go "
                        "on from the last checkpoint with --resume")
        raise OutputError(self._broken) from error


def in_order(pages: list[int], backwards: bool) -> Iterator[tuple[int, int | None]]:
    """Each page with the one that comes after it, forwards or backwards.

    Why both: a scan that always runs forwards puts out just the page it will want first, so under a budget every access
    faults; one that turns round finds what it used last still there.
    """
    order = pages[::-1] if backwards else pages
    yield from zip(order, [*order[1:], None], strict=True) if order else ()
