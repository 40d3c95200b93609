"""What Spark's workers give against one process: the same notes labelled by `minilora predict` both ways.

    python scripts/spark_rate.py [--rows 4000] [--workers 2] [--json FILE]

Each way is the command that a user would give, in a process of its own, with as many threads in all as the machine has cores.
A run over twice the rows tells what a row costs from what a start costs: seconds = start + rows / rate.  The answers are
compared, row by row.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from minilora.data.radiology import generate, labels
from minilora.data.table_writer import TableWriter
from minilora.data.tables import read_table, write_labels


def seconds_of(folder: Path, rows: int, workers: int | None, out: Path) -> float:
    """Seconds that one command takes, its start included. workers: None for a single process."""
    spark = ["--spark", "--workers", str(workers)] if workers else []
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "minilora", "predict", "--model", "tiny", "--template", "tiny", "--labels",
                    str(folder / "labels.txt"), "--data", str(folder / f"{rows}.parquet"), "--input-column", "note", "--out",
                    str(out), "--overwrite", "--quiet", *spark], check=True, stderr=subprocess.DEVNULL,
                   env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"})
    return time.perf_counter() - started


def measure(rows: int, workers: int, folder: Path) -> dict[str, float]:
    """Rows a second and seconds to start of both, and the share of equal answers."""
    write_labels(folder / "labels.txt", labels())
    cases = generate(max(100, math.ceil(2 * rows / 0.8)), seed=7)["train"]
    for count in (rows, 2 * rows):
        with TableWriter(folder / f"{count}.parquet", ["note"]) as writer:
            for case in cases[:count]:
                writer.write({"note": case.note})
    found: dict[str, float] = {"rows": 2 * rows, "workers": workers}
    for name, how in (("one", None), ("spark", workers)):
        half, whole = (seconds_of(folder, count, how, folder / f"{name}.parquet") for count in (rows, 2 * rows))
        found |= {f"{name}_seconds": whole, f"{name}_rows_a_second": rows / max(1e-9, whole - half),
                  f"{name}_start_seconds": max(0.0, 2 * half - whole)}
    one, spark = (read_table(folder / f"{name}.parquet", "note").rows for name in ("one", "spark"))
    same = [a.text == b.text and a.values["prediction"] == b.values["prediction"] for a, b in zip(one, spark, strict=True)]
    return found | {"same_answers": sum(same) / len(same),
                    "ratio": found["spark_rows_a_second"] / found["one_rows_a_second"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="of the shorter run; the longer one has twice as many")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Python processes of Spark")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="minilora-spark-") as folder:
        found = measure(args.rows, args.workers, Path(folder))
    for name, value in found.items():
        print(f"{name:<22}{value:,.4g}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
