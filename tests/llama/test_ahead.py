"""One read is ahead of the caller, never two, and none goes on behind the caller's back."""
from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from minilora.llama.ahead import read_ahead


class Recorder:
    """Reads that note when they begin; `wait` is set once the read of that number has begun."""

    def __init__(self, count: int) -> None:
        self.begun = [threading.Event() for _ in range(count)]
        self.threads: set[int] = set()

    def reads(self) -> list[Callable[[], int]]:
        def read(number: int) -> Callable[[], int]:
            def call() -> int:
                self.threads.add(threading.get_ident())
                self.begun[number].set()
                return number
            return call
        return [read(number) for number in range(len(self.begun))]


def test_results_come_in_order_from_one_other_thread() -> None:
    recorder = Recorder(20)
    assert list(read_ahead(recorder.reads())) == list(range(20))
    assert len(recorder.threads) == 1 and threading.get_ident() not in recorder.threads
    assert list(read_ahead([])) == []


def test_the_next_is_read_while_one_is_used_and_no_more() -> None:
    recorder = Recorder(5)
    for number in read_ahead(recorder.reads()):
        if number + 1 < 5:
            assert recorder.begun[number + 1].wait(10), f"read {number + 1} does not begin while {number} is used"
        if number + 2 < 5:
            assert not recorder.begun[number + 2].wait(0.05), f"read {number + 2} overwrites what the caller uses"


def test_two_buffers_are_enough() -> None:
    buffers = [[-1], [-1]]

    def read(number: int) -> Callable[[], list[int]]:
        def call() -> list[int]:
            buffers[number % 2][0] = number
            return buffers[number % 2]
        return call

    for number, buffer in enumerate(read_ahead([read(number) for number in range(50)])):
        assert buffer == [number]


def test_an_error_comes_where_its_result_would_have() -> None:
    def fail() -> int:
        raise ValueError("broken")
    seen = []
    with pytest.raises(ValueError, match="broken"):
        for number in read_ahead([lambda: 1, lambda: 2, fail, lambda: 4]):
            seen.append(number)
    assert seen == [1, 2]


def test_nothing_is_read_after_the_caller_has_stopped() -> None:
    recorder = Recorder(5)
    before = threading.active_count()
    with closing(read_ahead(recorder.reads())) as values:
        assert next(values) == 0
    assert threading.active_count() == before
    assert [event.is_set() for event in recorder.begun] == [True, True, False, False, False]
