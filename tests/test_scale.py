"""The plan of scale, held to closed forms and to draws; the page prints what the command prints."""
from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
scale = load_script("scale")
SURE = scale.Figures(fails=0.0, straggle=0.0)


def test_the_mean_of_the_last_of_n_exponentials_is_the_harmonic_number() -> None:
    known = scale.Figures(fails=0.0, straggle=1.0)
    for n in (1, 4, 32):
        ends = [scale.simulate(n, n, 1.0, known, seed).seconds - 1.0 for seed in range(4000)]
        assert statistics.fmean(ends) == pytest.approx(scale.harmonic(n), abs=4 * statistics.stdev(ends) / math.sqrt(len(ends)))
    assert scale.harmonic(4) == 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert scale.harmonic(500) == pytest.approx(sum(1 / k for k in range(1, 501)), abs=1e-9)


@pytest.mark.parametrize("fails", [0.0, 0.1, 0.5])
def test_tries_are_those_of_a_geometric_distribution(fails: float) -> None:
    job = scale.simulate(20_000, 16, 1.0, scale.Figures(fails=fails, straggle=0.0, most=1000), 3)
    spread = math.sqrt(fails) / (1 - fails) / math.sqrt(20_000)         # standard error of the mean number of tries
    assert job.done and job.tries / 20_000 == pytest.approx(scale.expected_tries(fails), abs=4 * spread + 1e-12)


def test_a_job_fails_as_often_as_one_of_its_tasks_fails_every_time() -> None:
    known = scale.Figures(fails=0.3, most=3)
    expected = 1 - (1 - 0.3 ** 3) ** 20
    assert scale.job_fails(20, 0.3, 3) == pytest.approx(expected)
    share = statistics.fmean(not scale.simulate(20, 4, 1.0, known, seed).done for seed in range(4000))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert scale.job_fails(10 ** 6, 1e-5, 4) == pytest.approx(1e-14, rel=1e-6), "small ones are not lost in rounding"


def test_without_luck_a_job_takes_its_waves() -> None:
    assert scale.simulate(10, 4, 2.0, SURE, 0) == scale.Job(6.0, 10, True)         # three waves of two seconds
    assert scale.simulate(3, 4, 2.0, SURE, 0) == scale.Job(2.0, 3, True)
    assert scale.simulate(50, 4, 2.0, scale.Figures(), 1) == scale.simulate(50, 4, 2.0, scale.Figures(), 1), "seeded"


def test_the_plan_without_luck_is_division_by_hand() -> None:
    known = scale.Figures(rows_a_second=100, start_seconds=10, load_seconds=5, model_bytes=0, rows_a_task=1000, workers=2,
                          fails=0, straggle=0, hours=1, row_bytes=100, answer_bytes=10)
    found = scale.plan(100_000, known)
    assert (found.tasks, found.machines) == (100, 1) and found.hours * 3600 == pytest.approx(10 + 5 + 1000 / 2)
    assert found.read_bytes == 10_000_000 and found.written_bytes == 11_000_000 and found.failing == 0
    more = scale.plan(1_000_000, known)         # 5,000 s on one machine: two are needed, and end within the hour
    assert more.machines == 2 and more.hours * 3600 == pytest.approx(15 + 10_000 / 4)


def test_where_no_number_of_machines_is_enough_the_plan_is_the_one_that_ends_first() -> None:
    known = scale.Figures(model_bytes=1e12, fails=0.0, straggle=0.0, workers=1)         # each machine waits 1,000 s more
    found = scale.plan(10 ** 9, known)
    best = math.sqrt(200_000 * 5000 / 140 / 1000)               # d/dm (work / m + 1000 m) = 0
    assert found.machines == pytest.approx(best, rel=0.03) and found.hours > known.hours


@pytest.mark.parametrize(("changed", "first"), [({"tasks_a_second": 0.1}, "driver"), ({"storage_bytes_a_second": 1e6,
                                                "model_bytes": 0.0}, "storage"), ({"model_bytes": 4e9}, "model load"),
                                                ({"rows_a_task": 1e8}, "rows of a task")])
def test_what_saturates_first_is_what_was_made_slow(changed: dict[str, float], first: str) -> None:
    assert scale.plan(10 ** 9, scale.Figures(**changed)).limit.startswith(f"{first}, at ")


def test_the_plan_is_near_what_is_drawn() -> None:
    known = scale.Figures()
    for notes in (10_000_000, 100_000_000):
        found = scale.plan(notes, known)
        drawn = [scale.simulate(found.tasks, found.machines * 2, known.rows_a_task / known.rows_a_second, known, seed).seconds
                 for seed in range(3)]
        assert found.hours * 3600 == pytest.approx(statistics.fmean(drawn) + known.start_seconds + known.load_seconds, rel=0.03)


def test_the_page_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    commands = [line[2:].split() for line in page.splitlines() if line.startswith("$ python scripts/scale.py")]
    assert len(commands) == 2
    for words in commands:
        assert scale.main(words[2:]) == 0
        assert capsys.readouterr().out in page, " ".join(words)
