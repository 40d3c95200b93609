"""What labelling n notes with Spark costs in machines, hours and bytes, where it saturates first, and how much luck matters.

    python scripts/scale.py [--rows-a-second 300] [--start-seconds 15] [--model-bytes 1.1e7] …

The plan, from figures that are measured (`scripts/spark_rate.py`) or given:

    tasks    T = n / rows of a task            slots  S = machines * workers
    seconds  = start + loading + (n / rate) / S * (delays and tries) + waiting for the last task
    tries    a try that fails with probability p, half way, is done again: 1 / (1 - p) tries on average; a job fails where
             one task fails `most` times in a row: 1 - (1 - p^most)^T
    last     S exponential tails of mean m end after m * H_S on average, H_S = 1 + 1/2 + … + 1/S

What saturates: the model's bytes, which every machine fetches at once from one storage; the table's bytes, in and out; the
driver, which starts so many tasks a second.  `simulate` draws the tasks of a job one by one and deals them to the first slot
that is free, as Spark does; tests/test_scale.py holds it to these closed forms.  The figures are of CPUs; nothing is promised.
"""
from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

DRAWN = 200_000         # tasks at most: a second or so each time
SIZES = {"10 thousand": 10_000, "10 million": 10_000_000, "a billion": 1_000_000_000}


@dataclass(frozen=True)
class Figures:
    """What is known of one machine and one model; each is a flag.

    Attributes: see the defaults' help in `HELP`.
    """

    rows_a_second: float = 140.0
    start_seconds: float = 12.0
    load_seconds: float = 2.0
    model_bytes: float = 1.1e7
    row_bytes: float = 250.0
    answer_bytes: float = 60.0
    rows_a_task: float = 5000.0
    workers: float = 2.0
    storage_bytes_a_second: float = 1.0e9
    tasks_a_second: float = 200.0
    fails: float = 0.01
    most: float = 4.0
    straggle: float = 0.1
    hours: float = 8.0


HELP = {"rows_a_second": "that one worker labels", "start_seconds": "until Spark runs its first task",
        "load_seconds": "until a worker has the model", "model_bytes": "that a machine fetches", "row_bytes": "of a note, read",
        "answer_bytes": "of an answer, written beside its note", "rows_a_task": "of a partition", "workers": "of a machine",
        "storage_bytes_a_second": "that the storage gives to all machines together", "tasks_a_second": "that the driver starts",
        "fails": "probability that a task's try fails", "most": "tries of a task, after which the job fails",
        "straggle": "mean delay of a task, as a share of its length (exponential)", "hours": "in which a job is to be done"}


@dataclass(frozen=True)
class Plan:
    """What n notes take. limit: what saturates first. failing: probability that the job fails."""

    tasks: int
    machines: int
    hours: float
    machine_hours: float
    read_bytes: float
    written_bytes: float
    limit: str
    failing: float


def harmonic(n: int) -> float:
    """H_n: the mean of the largest of n exponentials of mean 1."""
    if n < 100:
        return sum(1 / k for k in range(1, n + 1))
    return math.log(n) + 0.5772156649015329 + 1 / (2 * n) - 1 / (12 * n * n)        # off by less than 1e-9


def expected_tries(fails: float) -> float:
    """Mean number of tries until one succeeds."""
    return 1 / (1 - fails)


def job_fails(tasks: int, fails: float, most: int) -> float:
    """Probability that any of the tasks fails `most` times in a row."""
    return -math.expm1(tasks * math.log1p(-(fails ** most)))


def plan(notes: int, known: Figures) -> Plan:
    """The fewest machines that label so many notes within the hours, or, where no number does, those that end first."""
    tasks = max(1, math.ceil(notes / known.rows_a_task))
    a_task = min(notes, known.rows_a_task) / known.rows_a_second
    tries = 1 + known.straggle + 0.5 * (expected_tries(known.fails) - 1)        # a failed try costs half

    def seconds(machines: int) -> dict[str, float]:
        slots = min(tasks, machines * int(known.workers))
        return {"start": known.start_seconds,
                "model load": known.load_seconds + machines * known.model_bytes / known.storage_bytes_a_second,
                "labelling": tasks * a_task * tries / slots,
                "last task": a_task * known.straggle * (harmonic(slots) - 1),
                "storage": notes * (2 * known.row_bytes + known.answer_bytes) / known.storage_bytes_a_second,
                "driver": tasks / known.tasks_a_second}

    def whole(machines: int) -> float:
        parts = seconds(machines)
        moved = max(parts["labelling"], parts["storage"], parts["driver"])      # all three at the same time
        return parts["start"] + parts["model load"] + moved + parts["last task"]

    candidates = [1]
    while candidates[-1] * int(known.workers) < tasks:
        candidates.append(max(candidates[-1] + 1, math.ceil(candidates[-1] * 1.02)))
    within = (machines for machines in candidates if whole(machines) <= known.hours * 3600)
    machines = next(within, None) or min(candidates, key=whole)
    # More machines help until one of the others takes longer than the labelling: that is what saturates first.
    parts = seconds(machines)
    work = parts["labelling"] * min(tasks, machines * int(known.workers))
    ceilings = {name: work / parts[name] for name in ("driver", "storage")}
    per_machine = known.model_bytes / known.storage_bytes_a_second
    ceilings["model load"] = known.workers * math.sqrt(work / known.workers / per_machine) if per_machine else math.inf
    first = min(ceilings, key=lambda name: ceilings[name])
    if ceilings[first] >= tasks:
        first, ceilings = "rows of a task", {"rows of a task": float(tasks)}
    taken = whole(machines) / 3600
    return Plan(tasks, machines, taken, machines * taken, notes * known.row_bytes + machines * known.model_bytes,
                notes * (known.row_bytes + known.answer_bytes),
                f"{first}, at {max(1, round(ceilings[first] / known.workers)):,} machines",
                job_fails(tasks, known.fails, int(known.most)))


@dataclass(frozen=True)
class Job:
    """A job that was drawn: its seconds, its tries in all, and whether it came to its end."""

    seconds: float
    tries: int
    done: bool


def simulate(tasks: int, slots: int, a_task: float, known: Figures, seed: int) -> Job:
    """Draw a job: each task to the slot that is free first; a try takes its length and an exponential delay, or fails half way.

    Args: a_task: seconds of a task without delay.
    """
    draw = random.Random(seed)
    free, tries, end = [0.0] * min(slots, tasks), 0, 0.0
    for _ in range(tasks):
        for attempt in range(1, int(known.most) + 1):
            tries += 1
            failed = draw.random() < known.fails
            length = a_task * (0.5 if failed else 1 + (draw.expovariate(1 / known.straggle) if known.straggle else 0.0))
            at = heapq.heappop(free) + length
            heapq.heappush(free, at)
            end = max(end, at)
            if not failed:
                break
            if attempt == int(known.most):
                return Job(end, tries, False)
    return Job(end, tries, True)


def amount(number: float) -> str:
    """Bytes with a unit of thousands."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.1f} MB"


def table(known: Figures, draws: int = 5) -> str:
    """The plan for each size, in Markdown; the simulation beside it for the sizes that are quick to draw."""
    lines = ["| notes | tasks | machines | hours | machine hours | read | written | saturates first | job fails | drawn |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, notes in SIZES.items():
        found = plan(notes, known)
        a_task = min(notes, known.rows_a_task) / known.rows_a_second
        drawable = range(draws) if found.tasks <= DRAWN else range(0)
        jobs = [simulate(found.tasks, found.machines * int(known.workers), a_task, known, seed)
                for seed in drawable]
        before = known.start_seconds + known.load_seconds + found.machines * known.model_bytes / known.storage_bytes_a_second
        spent = [job.seconds + before for job in jobs if job.done]
        drawn = f"{min(spent) / 3600:.2f} to {max(spent) / 3600:.2f} h" if spent else "none ended" if jobs else "not drawn"
        lines.append(f"| {name} | {found.tasks:,} | {found.machines:,} | {found.hours:.2f} | {found.machine_hours:,.1f} | "
                     f"{amount(found.read_bytes)} | {amount(found.written_bytes)} | {found.limit} | "
                     f"{found.failing:.1e} | {drawn} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """One flag for each figure."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in fields(Figures):
        found.add_argument("--" + field.name.replace("_", "-"), type=float, default=field.default, metavar="X",
                           help=HELP[field.name])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    print(table(Figures(**vars(parser().parse_args(argv)))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
