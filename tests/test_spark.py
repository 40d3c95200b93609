"""PySpark on this machine: several workers give the answers of one process, in order, with bad rows kept and tasks retried."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyspark", reason="PySpark is not installed: it comes with the extra [spark]")
pd = pytest.importorskip("pandas")
if shutil.which("java") is None:
    pytest.skip("no Java here, on which Spark runs", allow_module_level=True)

from minilora.audit_log import FILE  # noqa: E402
from minilora.cli import main  # noqa: E402
from minilora.compare import read_rows  # noqa: E402
from minilora.data.tables import read_columns  # noqa: E402
from minilora.errors import ConfigError, DataError, MiniloraError, OutputError  # noqa: E402
from minilora.integrations.spark import Labelling, local_session, predict, predict_files  # noqa: E402
from minilora.predict import ADDED_COLUMNS  # noqa: E402
from tests.notes import SECRET, notes, write_csv  # noqa: E402

LABELS = ["CT Brain", "MR Knee, left", "CT Abdomen W Contrast"]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n")
    return path


@pytest.fixture
def how(labels: Path) -> Labelling:
    return Labelling("tiny", labels=str(labels), dtype="float32", threads=1)


def rows(folder: Path) -> Any:
    """The files of a folder, one behind the other."""
    parts = sorted(folder.glob("part-*.csv"))
    return pd.concat([pd.read_csv(path, keep_default_na=False) for path in parts], ignore_index=True)


def test_several_workers_give_the_answers_of_one_process_in_the_tables_order(
        tmp_path: Path, how: Labelling, capsys: pytest.CaptureFixture[str]) -> None:
    table = [*notes(90), (f'{SECRET} "quoted",\nover two lines', "x"), ("", "x"), *notes(9)]
    data = write_csv(tmp_path / "notes.csv", table)
    command = ["predict", "--model", "tiny", "--labels", str(how.labels), "--dtype", "float32", "--data", str(data)]
    assert main([*command, "--out", str(tmp_path / "out.csv"), "--spark", "--workers", "2"]) == 0
    told = capsys.readouterr()
    assert "2/2" in told.err and "101 rows in" in told.out and SECRET not in told.err + told.out
    assert main([*command, "--out", str(tmp_path / "one.csv"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    ours, one = rows(tmp_path / "out.csv"), pd.read_csv(tmp_path / "one.csv", keep_default_na=False)
    assert len(list((tmp_path / "out.csv").glob("part-*.csv"))) == 2
    assert list(ours) == list(one) == ["input", "label", "prediction", "probability", "error", "runner_up",
                                       "runner_up_probability"]
    for column in ("input", "prediction", "error", "runner_up"):
        assert ours[column].tolist() == one[column].tolist(), column
    assert ours["error"].tolist().count("empty note") == 1
    for column in ("probability", "runner_up_probability"):
        differences = [abs(float(a) - float(b)) for a, b in zip(ours[column], one[column], strict=True) if a != ""]
        assert len(differences) == 100 and max(differences) < 1e-4, column
    first, second = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert (first["spark"], second["spark"]) == (True, False) and (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o700
    for key in ("rows_read", "rows_predicted", "rows_in_error", "input_sha256", "model_sha256", "labels_sha256", "outcome"):
        assert first[key] == second[key], key
    assert (first["rows_read"], first["rows_in_error"]) == (101, 1) and first["output_sha256"]
    for path in (tmp_path / "out.csv").iterdir():
        assert path.stat().st_mode & 0o077 == 0, "notes are their owner's alone"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_free_answers_have_the_same_columns_and_types_as_of_one_process(tmp_path: Path, suffix: str) -> None:
    data = write_csv(tmp_path / "notes.csv", [*notes(2), ("", "x")])
    command = ["predict", "--model", "tiny", "--free", "--dtype", "float32", "--data", str(data), "--quiet", "--out"]
    one, ours = tmp_path / f"one{suffix}", tmp_path / f"ours{suffix}"
    assert main([*command, str(one)]) == 0 and main([*command, str(ours), "--spark", "--workers", "1"]) == 0
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_schema(one).names == parquet.read_schema(next(ours.glob("part-*"))).names
        assert parquet.read_schema(one).types == parquet.read_schema(next(ours.glob("part-*"))).types
    assert read_columns(one) == read_columns(ours)
    found, expected = read_rows(ours), read_rows(one)
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected]
    assert [row["error"] for row in found] == ["", "", "empty note"] and {row["runner_up_probability"] for row in found} == {""}


NOTE = "headache after a fall"
ODD_TABLES: dict[str, str | dict[str, list[Any]]] = {           # by file: text, or Parquet's columns
    "padded.csv": f"note, id\n  {NOTE}  , 7 \n{NOTE},007\n",
    "names.csv": f"note,_row,Note,Prediction,a.b,c`d\n{NOTE},1,2,3,4,5\n",
    "numbers.jsonl": f'{{"note": 12, "b": 2.50, "a": 12345678901234567890}}\n{{"note": "{NOTE}", "a": null, "c": "x"}}\n',
    "ids.parquet": {"note": [NOTE, NOTE, None], "id": [1234567890123456789, None, 2], "a.b": [True, None, False]},
    "whole.parquet": {"note": [12, 34]}, "halves.parquet": {"note": [1.5, None]},
    "comma.csv": f"note,id\n{NOTE}, left,1\n{NOTE},2\n", "short.csv": f"note,id\n{NOTE}\n",
    "broken.jsonl": f'{{"note": "{NOTE}"}}\n{{"note": "{NOTE}",\n', "truth.parquet": {"note": [True, False]},
}


def test_odd_tables_come_out_as_of_one_process_and_broken_ones_are_refused_by_the_same_line(
        tmp_path: Path, how: Labelling, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    spark, written = local_session(1), {}
    for name, table in ODD_TABLES.items():
        if isinstance(table, str):
            (tmp_path / name).write_text(table)
        else:
            parquet.write_table(pyarrow.table(table), tmp_path / name)
        written[name] = tmp_path / name
    (tmp_path / "latin.csv").write_bytes("note\nKöpfschmerz\n".encode("latin-1"))
    written["latin.csv"] = tmp_path / "latin.csv"

    @contextmanager
    def kept(workers: int | None = None) -> Iterator[tuple[Any, int, int]]:
        yield spark, 1, 1

    def ran(data: Path, *more: str) -> tuple[int, Any]:
        out = tmp_path / f"{'spark' if more else 'one'}-{data.name}"
        code = main(["predict", "--model", "tiny", "--labels", str(how.labels), "--dtype", "float32", "--data", str(data),
                     "--input-column", "note", "--out", str(out), "--quiet", *more])
        said = capsys.readouterr().err
        return code, [{**row, "probability": "", "runner_up_probability": ""} for row in read_rows(out)] if code == 0 else said

    monkeypatch.setattr("minilora.integrations.spark.session", kept)
    try:
        for name, path in written.items():
            assert ran(path) == ran(path, "--spark"), name
    finally:
        spark.stop()
    assert read_columns(tmp_path / "spark-numbers.jsonl") == ["note", "b", "a", "c", *ADDED_COLUMNS]
    for name in ("comma.csv", "short.csv", "broken.jsonl", "truth.parquet", "latin.csv"):
        assert not (tmp_path / f"spark-{name}").exists(), name


def test_a_task_that_fails_is_tried_again(tmp_path: Path, how: Labelling) -> None:
    spark, failed = local_session(2), tmp_path / "failed"

    def once(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if not failed.exists():
                failed.touch()
                raise OSError("a worker is gone")
            yield batch

    try:
        frame = spark.createDataFrame([(str(index), note) for index, (note, _) in enumerate(notes(40))], ["id", "input"])
        found = predict(frame.repartition(2).mapInPandas(once, frame.schema), how).collect()
    finally:
        spark.stop()
    assert failed.exists() and sorted(int(row["id"]) for row in found) == list(range(40))
    assert all(row["prediction"] in LABELS and 0 < row["probability"] <= 1 for row in found)


def test_what_cannot_be_labelled_is_said_in_one_line_without_a_note(tmp_path: Path, how: Labelling,
                                                                    capfd: pytest.CaptureFixture[str]) -> None:
    data = write_csv(tmp_path / "notes.csv", notes(4))
    with pytest.raises(DataError, match="has no column 'text'"):
        predict_files(data, tmp_path / "a.csv", Labelling("tiny", labels=how.labels, input_column="text"))
    headless = tmp_path / "headless.csv"
    headless.write_text("".join(f"{SECRET} of a ladder and hit the head on the way down,{number}\n" for number in range(2)))
    with pytest.raises(DataError, match="has no column 'input'") as refused:
        predict_files(headless, tmp_path / "a.csv", how)
    assert SECRET not in str(refused.value)
    assert main(["predict", "--model", "tiny", "--labels", str(tmp_path / "none.txt"), "--data", str(data), "--out",
                 str(tmp_path / "b.csv"), "--spark", "--workers", "1"]) == 2
    line, = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert (line["outcome"], line["error"], line["rows_read"]) == ("failed", "MiniloraError", None)
    said = capfd.readouterr().err
    assert "none.txt" in said.splitlines()[-1] and SECRET not in said


def test_what_is_overwritten_by_spark_stays_until_the_answers_are_there(tmp_path: Path, how: Labelling) -> None:
    data, out = write_csv(tmp_path / "notes.csv", notes(3)), tmp_path / "out.jsonl"
    out.mkdir()
    (out / "part-00000-x.json").write_text('{"input": "an earlier answer"}\n')
    with pytest.raises(MiniloraError, match=r"none\.txt"):
        predict_files(data, out, replace(how, labels=str(tmp_path / "none.txt")), 1, overwrite=True)
    assert [path.read_text() for path in out.iterdir()] == ['{"input": "an earlier answer"}\n']
    with pytest.raises(MiniloraError, match=r"none\.txt"):
        predict_files(data, tmp_path / "new.jsonl", replace(how, labels=str(tmp_path / "none.txt")), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.txt", "notes.csv", "out.jsonl"]
    assert predict_files(data, out, how, 1, overwrite=True) == 3
    assert len(read_rows(out)) == 3 and not (out / "part-00000-x.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.txt", "notes.csv", "out.jsonl"]


def test_spark_overwrites_no_folder_with_files_of_somebody_else_or_with_what_it_reads(tmp_path: Path, how: Labelling) -> None:
    out = tmp_path / "out.csv"
    out.mkdir()
    data = write_csv(out / "part-1.csv", notes(3))
    with pytest.raises(OutputError, match=r"is or holds .*part-1\.csv, which is read here"):
        predict_files(data, out, how, 1, overwrite=True)
    with pytest.raises(OutputError, match=r"is or holds .*out\.csv, which is read here"):
        predict_files(out, out, how, 1, overwrite=True)
    other = write_csv(tmp_path / "notes.csv", notes(3))
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds mine.txt, which no earlier output"):
        predict_files(other, out, how, 1, overwrite=True)
    assert main(["predict", "--model", "tiny", "--labels", str(how.labels), "--data", str(other), "--out", str(out), "--spark",
                 "--overwrite"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "part-1.csv"]


def test_without_java_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyspark.sql import SparkSession

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            if name == "getOrCreate":
                raise RuntimeError("[JAVA_GATEWAY_EXITED] Java gateway process exited before sending its port number.")
            return lambda *_: self

    monkeypatch.setattr(SparkSession, "builder", Refusing())
    with pytest.raises(ConfigError, match="Java 17"):
        local_session(1)
