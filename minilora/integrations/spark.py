"""PySpark: notes labelled where they lie, by as many Python workers as there are.

    df (…, note)  --mapInArrow-->  df (…, note, prediction, probability, error, runner_up, runner_up_probability)

Rows travel as Arrow batches; a worker loads the model at its first batch and keeps it, as Spark keeps the worker.  `predict`
leaves rows in the partition they were in, and in its order; `predict_files` deals them out by their number, and its files, one
behind the other, have the table's order.  An answer does not hang on the rows beside it, but for the rounding of its compute
type, so it is the single process's, whatever the partitions (tests/test_spark.py).  The table's own columns pass by untouched,
and a note of another type becomes the text that `predict_table` makes of it.

The base should be a 4-bit folder (`minilora quantize`), or each worker quantizes it anew.  Workers of one machine divide its
cores: each gets `threads` of torch's.

Lesson 19 explains it.
"""
from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from minilora.audit_log import Tally
from minilora.data.formats import NAME_LIMIT, cell_text, records, shown, table_format
from minilora.data.table_writer import added_columns
from minilora.data.tables import iter_table
from minilora.errors import ConfigError, DataError, MiniloraError, OutputError
from minilora.files import Kind, check_output, new_folder
from minilora.predict import ADDED_COLUMNS, ADDED_NUMBERS, Predictor

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

BATCH_ROWS = 512            # of a worker at a time: sorted by length among themselves
SPARKS: dict[str, tuple[str, dict[str, Any]]] = {               # name and options of each kind of table, in Spark
    # Trap: by default Spark trims the cells that it writes, guesses types (an id 007 is 7), and fills up or cuts broken rows.
    "csv": ("csv", {"header": True, "multiLine": True, "escape": '"', "mode": "FAILFAST",
                    "ignoreLeadingWhiteSpace": False, "ignoreTrailingWhiteSpace": False}),
    "jsonl": ("json", {"ignoreNullFields": False, "primitivesAsString": True, "mode": "FAILFAST"}),
    "parquet": ("parquet", {})}
TRIES = 4                   # of a task, as on a cluster
GROUP = "minilora-predict"                  # of jobs, by which their progress is found
ROWS_A_TASK = 5_000         # at most, of `predict_files`: what is lost when a worker dies, and what the last one is waited for
# What Spark leaves in a folder, here and on Databricks: anything else in it is somebody's own.
KIND = Kind("", ("_SUCCESS", "._SUCCESS.crc", "part-*", ".part-*.crc", "_temporary", "_started_*", "_committed_*"))
# Set where somebody else started Spark, and will end it: spark-submit, and Databricks.
STARTED_ELSEWHERE = ("PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION")


@dataclass(frozen=True)
class Labelling:
    """What a worker needs to know; of one machine or of a cluster, so paths are such that every worker can read.

    Attributes:
        model, adapter, labels, free, template, quantize, device, dtype, max_length, pad_vocab: as in `Predictor.load`.
        input_column: of the notes. threads: of torch in each worker, 0: as torch chooses.
    """

    model: str
    adapter: str | None = None
    labels: str | None = None
    free: bool = False
    template: str | None = None
    quantize: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    pad_vocab: bool = False
    input_column: str = "input"
    threads: int = 0


@lru_cache(maxsize=1)
def _predictor(how: Labelling) -> Predictor:
    """A worker's model, loaded once."""
    if how.threads:
        torch.set_num_threads(how.threads)
    return Predictor.load(how.model, how.adapter, how.labels, how.free, how.template, how.quantize,  # type: ignore[arg-type]
                          how.device, how.dtype, how.max_length, how.pad_vocab, quiet=True)


def _labelled(batches: Iterator[pa.RecordBatch], how: Labelling, at: int) -> Iterator[pa.RecordBatch]:
    """What runs in a worker; notes stand in column `at`.

    Errors come out without their cause: it could hold a note, and Spark writes it into its logs.
    """
    import pyarrow as pa

    for batch in batches:
        try:
            notes = [cell_text(note) for note in batch.column(at).to_pylist()]
            answers = [answer.cells for answer in _predictor(how).predict(notes)]
        except MiniloraError as error:
            raise RuntimeError(str(error)) from None
        added = [pa.array([cells[place] for cells in answers], pa.float64() if name in ADDED_NUMBERS else pa.string())
                 for place, name in enumerate(ADDED_COLUMNS)]
        yield pa.RecordBatch.from_arrays([*batch.columns, *added], names=[*batch.schema.names, *ADDED_COLUMNS])


def predict(df: DataFrame, how: Labelling) -> DataFrame:
    """Label the notes of a data frame; nothing runs until the result is asked for.

    Returns: the frame's columns, then `ADDED_COLUMNS` as `predict_table` has them: prediction, error and runner_up (string),
        probability and runner_up_probability (double).
    Raises: DataError: no such column, one that holds neither text nor numbers, or one of these names is taken.
    """
    from pyspark.sql.types import DoubleType, NumericType, StringType, StructField, StructType

    names = list(df.columns)
    if how.input_column not in names:
        raise _no_column("the data frame", how.input_column, names)
    at = names.index(how.input_column)
    if not isinstance(df.schema.fields[at].dataType, (StringType, NumericType)):
        raise DataError(f"column {how.input_column!r} holds {df.schema.fields[at].dataType.simpleString()[:NAME_LIMIT]} and no "
                        "text; write notes as text")
    exact = df.sparkSession.conf.get("spark.sql.caseSensitive", "false") == "true"
    added_columns("the data frame", names if exact else [*names, *map(str.lower, names)], ADDED_COLUMNS)
    plain = _plain(df)
    schema = StructType([*plain.schema.fields, *(StructField(name, DoubleType() if name in ADDED_NUMBERS else StringType())
                                                 for name in ADDED_COLUMNS)])
    return plain.mapInArrow(lambda batches: _labelled(batches, how, at), schema).toDF(*names, *ADDED_COLUMNS)


def _no_column(where: str, column: str, names: list[str]) -> DataError:
    # Trap: where the header line is missing, the names are the cells of a patient.
    return DataError(f"{where} has no column {column!r}; it has {', '.join(map(shown, names[:20]))}")


def _plain(df: DataFrame) -> DataFrame:
    """The same under names that Spark takes for names alone: by it "a.b" is a field b of a, and a backtick a quote."""
    return df.toDF(*(f"column{number}" for number in range(len(df.columns))))


def local_session(workers: int | None = None) -> SparkSession:
    """Spark on this machine, with the interpreter that runs this.

    Args: workers: Python processes, default one a core.
    Raises: ConfigError: PySpark is not installed, or there is no Java.
    """
    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        raise ConfigError("--spark needs PySpark: pip install 'minilora[spark]'") from None
    # Trap: Spark starts whatever `python3` is, which may be another one than this, without torch.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    count = workers or os.cpu_count() or 1
    try:
        made = (SparkSession.builder.master(f"local[{count},{TRIES}]").appName("minilora")
                .config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
                .config("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH_ROWS)
                .config("spark.sql.caseSensitive", "true")          # a column Note beside note, as for `predict_table`
                .config("spark.hadoop.fs.permissions.umask-mode", "077").getOrCreate())
    except Exception as error:          # PySpark's own, and py4j's, of which most say that no Java answered
        if "JAVA" in str(error).upper():
            raise ConfigError("Spark runs on Java 17 or later, and found none: install one, or set JAVA_HOME") from None
        raise
    made.sparkContext.setLogLevel("ERROR")
    return made


@contextmanager
def session(workers: int | None = None) -> Iterator[tuple[SparkSession, int, int]]:
    """The cluster's Spark where this runs under spark-submit or on Databricks, else one on this machine for the length of the
    block.

    Yields: the session, how many tasks run at once, and how many threads of torch each should have.
    Raises: as `local_session`.
    """
    if any(os.environ.get(name) for name in STARTED_ELSEWHERE):
        from pyspark.sql import SparkSession

        made = SparkSession.builder.getOrCreate()
        made.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", BATCH_ROWS)
        yield made, workers or made.sparkContext.defaultParallelism, int(made.conf.get("spark.task.cpus", "1") or 1)
        return
    made, cores = local_session(workers), os.cpu_count() or 1
    try:
        yield made, workers or cores, max(1, cores // (workers or cores))
    finally:
        made.stop()


@contextmanager
def _progress(spark: SparkSession, tasks: int, quiet: bool) -> Iterator[None]:
    """A bar of the tasks that the job in the block has done; Spark is asked twice a second."""
    tracker, done = spark.sparkContext.statusTracker(), threading.Event()
    spark.sparkContext.setJobGroup(GROUP, "label a table")

    def completed() -> int:
        stages = [tracker.getStageInfo(stage) for job in map(tracker.getJobInfo, tracker.getJobIdsForGroup(GROUP)) if job
                  for stage in job.stageIds]
        return max((stage.numCompletedTasks for stage in stages if stage and stage.numTasks == tasks), default=0)

    def watch() -> None:
        with suppress(Exception):       # Spark itself is gone, and the block says so
            while not done.wait(0.5):
                bar.update(completed() - bar.n)

    if quiet:
        yield
        return
    with tqdm(total=tasks, desc="predict", unit="task") as bar:
        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()
        bar.update(tasks - bar.n)


def check_answers(data: str | Path, out: str | Path, how: Labelling, overwrite: bool) -> None:
    """Raise the OutputError of `predict_files`, before Spark is started or anything recorded."""
    check_output(out, overwrite, KIND, reads=(data, how.model, how.adapter, how.labels, how.template))


@contextmanager
def _place(out: str | Path, overwrite: bool) -> Iterator[tuple[str, str]]:
    """Where Spark is to write, and in which mode.

    Trap: Spark removes what it overwrites first, and then begins: a job that fails would leave neither.  So on this machine it
    writes beside it, and the folder takes the name when all is there; a cluster's storage knows no renaming of folders.
    """
    if any(os.environ.get(name) for name in STARTED_ELSEWHERE) or "://" in str(out):
        yield str(out), "overwrite" if overwrite else "error"
        return
    with new_folder(out, overwrite, KIND, mode=0o700) as temporary:
        yield str(temporary), "overwrite"


def _columns(path: Path, kind: str, input_column: str) -> list[str] | None:
    """The columns of a table, in order, after the checks of `predict_table`; None of Parquet, or if it isn't on this machine.

    Text is read through once by the package's own reader, which takes no time beside labelling it.  Spark's is lenient: it
    ends a note at a comma without quotes, and puts a sign for what is no UTF-8.

    Raises: DataError: with file and row, as `iter_table`.
    """
    if not path.exists() or (path.is_dir() and not any(path.glob("part-*"))):
        return None
    first = list(next(records(path, kind))[1])
    if input_column not in first:
        raise _no_column(str(path), input_column, first)
    rows = iter_table(path, input_column)
    if kind == "parquet":
        next(rows)
        return None
    return list(dict.fromkeys(name for row in rows for name in row.values))


def predict_files(data: str | Path, out: str | Path, how: Labelling, workers: int | None = None, overwrite: bool = False,
                  tally: Tally | None = None, quiet: bool = True) -> int:
    """Label a table with Spark, on this machine or on the cluster that this runs on.

    Args:
        data: CSV, JSONL or Parquet, a file or a folder of such. out: a folder of such files, by suffix, with the columns of
            `predict_table`; owner-only where it is Spark of this machine that writes it. tally: gets the rows, once they are
            counted in what was written.
        quiet: no bar.

    Returns: rows written.
    Raises: ConfigError, DataError, OutputError: as `predict_table`; MiniloraError: a worker failed.
    Guarantee: what `overwrite` replaces goes when all answers are there, on this machine (tests/test_spark.py), and is never
        more than Spark's own files, nor anything that is read.
    """
    if tally is not None:               # a run that fails leaves no file in which to count
        tally.rows_read = tally.rows_predicted = tally.rows_in_error = None
    check_answers(data, out, how, overwrite)
    written, how_written = SPARKS[table_format(Path(out), None, OutputError)]
    source = table_format(Path(data), None)
    names = _columns(Path(data), source, how.input_column)
    with session(workers) as (spark, at_once, threads):
        from pyspark.sql.functions import count, lit, monotonically_increasing_id
        from pyspark.sql.types import StringType, StructField, StructType

        try:
            kind, options = SPARKS[source]
            reader: Any = spark.read.format(kind).options(**options)
            if source == "jsonl" and names:         # or they come by the alphabet, and an object gets the keys of all others
                reader = reader.schema(StructType([StructField(name, StringType()) for name in names]))
            table: Any = reader.load(str(data))
            names = names or list(table.columns)
            tasks, row = max(at_once, math.ceil(table.count() / ROWS_A_TASK)), "_row"
            numbered = _plain(table).withColumn(row, monotonically_increasing_id())
            dealt = numbered.repartitionByRange(tasks, row).sortWithinPartitions(row).drop(row).toDF(*names)
            labelled = predict(dealt, how if how.threads else replace(how, threads=threads))
            with _place(out, overwrite) as (place, mode), _progress(spark, tasks, quiet):
                labelled.write.format(written).options(**how_written).mode(mode).save(place)
            # Trap: JSON is read back without a column that is empty in every row, unless it is named.
            answers: Any = spark.read.schema(labelled.schema).format(written).options(**how_written).load(str(out))
            rows, errors = answers.agg(count(lit(1)), count("error")).collect()[0]
        except MiniloraError:
            raise
        except Exception as error:      # Spark's text is a page of Java; its first line that is ours says what was wrong
            condition = re.match(r"\[([A-Z_.]+)\]", str(error))        # what follows it may quote a row
            said = next((line.strip() for line in str(error).splitlines() if "RuntimeError:" in line),
                        type(error).__name__ + (f" {condition[1]}" if condition else ""))
            raise MiniloraError(f"Spark stopped: {said.partition('RuntimeError:')[2].strip() or said}") from None
    if tally is not None:
        tally.rows_read, tally.rows_predicted, tally.rows_in_error = rows, rows - errors, errors
    return int(rows)
