"""The bench measures what it says, and a figure below its limit ends the command; no test asserts on the time itself."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora import bench
from minilora.cli import main
from minilora.errors import MiniloraError
from minilora.measured import Measured
from minilora.memory import Memory

FIELDS = {"name", "unit", "ours", "peer", "ratio", "limit", "ours_peak_bytes", "peer_peak_bytes"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ELEMENTS", 2 ** 18)
    monkeypatch.setattr(bench, "STATE_BYTES", 8 * 2 ** 18 * bench.TENSORS)
    monkeypatch.setattr(bench, "QUARTER", 2 * 2 ** 18 * bench.TENSORS)


def test_in_turns_calls_both_alike_and_takes_medians() -> None:
    calls: list[str] = []

    def peer() -> None:
        calls.append("peer")
        time.sleep(0.2 if len(calls) == 6 else 0.002)       # one outlier

    ours_seconds, peer_seconds = bench.in_turns(lambda: calls.append("ours"), peer, rounds=5)
    assert calls == ["ours", "peer"] * 6
    assert ours_seconds < 0.002 <= peer_seconds < 0.2


@pytest.mark.usefixtures("small")
def test_rows_are_written_as_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_peak", lambda kind: {"none": 100, "small_disk": 10 ** 6, "unpaged": 10 ** 9}[kind])
    assert main(["bench", "--json", str(tmp_path / "rows.json"), "--only", "paged_memory", "recomputation"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["paged_adamw_peak", "recompute"] and all(row.keys() == FIELDS for row in rows)
    assert "recompute" in capsys.readouterr().out
    assert main(["bench", "--json", str(tmp_path / "rows.json"), "--only", "paged_memory"]) == 2     # it is there already


def taking(peak: int, paged: int = 0, losses: tuple[float, ...] = (1.0, 0.5)) -> Measured:
    return Measured(Memory(peak, 0, 0, 0, 0, 0, 0, 0, paged), peak, 0, losses)


def test_paging_counts_only_where_the_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {True: taking(300, paged=700), False: taking(1000)}
    monkeypatch.setattr(bench, "measure", lambda model, work: runs[work.resident_bytes is not None])
    row, = bench.paged_training()
    assert (row.ours, row.peer, row.ok) == (300, 1000, True)
    runs[True] = taking(371, paged=700)             # a tenth of what is not resident may be left: 1000 - 630
    row, = bench.paged_training()
    assert not row.ok
    runs[True] = taking(300, paged=700, losses=(1.0, 0.6))
    with pytest.raises(MiniloraError, match="must be the same"):
        next(bench.paged_training())


def test_a_prediction_may_miss_by_a_tenth_to_either_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "predict", lambda config, work: Memory(1000, 0, 0, 0, 0, 0, 0, 0))
    for took, ok in ((905, True), (1105, True), (890, False), (1120, False)):
        monkeypatch.setattr(bench, "measure", lambda model, work, took=took: taking(took))
        rows = list(bench.memory_predicted())
        assert len(rows) == 7 and all(row.ok == ok for row in rows), took


@pytest.mark.usefixtures("small")
def test_the_paged_steps_are_four_different_optimizers() -> None:
    counters = {kind: bench.optimizer(kind) for kind in ("resident", "quarter_host", "quarter_disk", "small_disk")}
    for stepper in counters.values():
        stepper.step()
        stepper.step()
    resident, quarter = counters["resident"].counters, counters["quarter_disk"].counters    # type: ignore[attr-defined]
    assert resident.evictions == 0 < quarter.evictions
    assert [row.name for row in bench.paged_steps()] == [f"paged_adamw_{kind}" for kind in ("resident", "quarter_host",
                                                                                           "quarter_disk")]


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    base, unpaged = bench._peak("none"), bench._peak("unpaged")
    assert unpaged - base > 0.9 * bench.STATE_BYTES, "the moments of 25 million parameters"


def test_a_figure_below_its_limit_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> Iterator[bench.Row]:
        yield bench.Row("slow", "s", 2.0, 1.0, 0.5, limit=0.9)

    monkeypatch.setattr(bench, "BENCHES", (slow,))
    assert main(["bench"]) == 2
    printed = capsys.readouterr()
    assert "MISSED" in printed.out and printed.err == "minilora: below the limit here: slow\n"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "nothing"]) == 2
    assert "paged_steps" in capsys.readouterr().err
