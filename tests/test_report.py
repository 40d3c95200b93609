"""The report as a whole: a page for every kind of run, that shows no note unless asked, loads nothing and breaks on nothing."""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora import TrainConfig, train
from minilora.baseline import NAME as BAG_OF_WORDS
from minilora.cli import build_parser, main
from minilora.errors import MiniloraError, OutputError
from minilora.evaluate import OTHER
from minilora.flags import NO_SETTINGS
from minilora.report import write_report
from minilora.report.facts import train_command
from minilora.report.scorefiles import find_evaluation
from tests.models import write_model
from tests.notes import LABELS, SECRET, notes, write_csv
from tests.runs import metrics_lines, write_run, write_scores

STRANGE = ["<b>&\"'", "<script>alert(1)</script>", "Schädel – 疼痛 🦴", "x" * 60, "a, b; c", "onload=\"x\" ]]>",
           "\u202eevil", "{{label}} ${label} %s"]
SIXTY = [f"{modality} {region} {contrast}" for modality in ("CT", "MR")
         for region in ("Brain", "Chest", "Abdomen", "Pelvis", "Knee Left", "Knee Right", "Neck", "Lumbar Spine", "Hip", "Hand")
         for contrast in ("W Contrast", "WO Contrast", "W/WO Contrast")]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def parse(path: Path) -> ElementTree.Element:
    """The page as a tree; an XML parser takes nothing that is not well-formed."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"en\">")
    return ElementTree.fromstring(text.replace("<!DOCTYPE html>", "", 1))


def words(path: Path) -> str:
    return " ".join(" ".join(parse(path).itertext()).split())


def report(run: Path, **flags: Any) -> Path:
    return write_report(run, overwrite=True, **flags)


KINDS: dict[str, Callable[[Path], Path]] = {
    "finished": lambda folder: write_run(folder, val="val.csv"),
    "killed": lambda folder: write_run(folder, finished=False, max_steps=500),
    "one step": lambda folder: write_run(folder, steps=1, finished=False),
    "paged": lambda folder: write_run(folder, optimizer="paged_adamw"),
    "full": lambda folder: write_run(folder, tune="full", quantize="none", max_grad_norm=0),
    "loss and step alone": lambda folder: write_run(folder, lines=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.0}]),
    "constant and zero": lambda folder: write_run(folder, optimizer="paged_adamw", lines=[
        dict.fromkeys(metrics_lines(1, paged=True)[0], 0) | {"step": step} for step in (1, 2, 3)]),
    "spikes": lambda folder: write_run(folder, lines=[
        line | {"loss": 1e30 if line["step"] == 9 else 1e-30, "grad_norm": 10.0 ** (line["step"] - 15), "seconds": 1e-4}
        for line in metrics_lines(30)]),
    "long": lambda folder: write_run(folder, steps=5000, optimizer="paged_adamw"),
    "pager without counters": lambda folder: write_run(folder, optimizer="paged_adamw", lines=metrics_lines(3)),
    "scored": lambda folder: write_scores(write_run(folder) / "evaluation").parent,
    "without an error": lambda folder: write_scores(write_run(folder) / "evaluation", wrong=10 ** 6).parent,
    "strange labels": lambda folder: write_scores(write_run(folder, labels=STRANGE) / "evaluation", STRANGE).parent,
    "sixty labels": lambda folder: write_scores(write_run(folder, labels=SIXTY) / "evaluation", SIXTY, n=400).parent,
    "free answers": lambda folder: write_scores(write_run(folder) / "evaluation", free=f"{SECRET} says").parent,
    "held against others": lambda folder: write_scores(
        write_run(folder) / "evaluation", others={BAG_OF_WORDS: 2, "<b>last</b> year": 4}, twins=7, adapter="0" * 64).parent,
    "held against others, all right": lambda folder: write_scores(
        write_run(folder) / "evaluation", wrong=10 ** 6, others={BAG_OF_WORDS: 10 ** 6}, twins=60).parent,
    "one row": lambda folder: write_scores(write_run(folder) / "evaluation", n=1).parent,
}


@pytest.fixture(scope="module", params=list(KINDS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of each kind of run."""
    run = KINDS[request.param](tmp_path_factory.mktemp("kind") / "run")
    return report(run)


def test_every_kind_of_run_has_a_page_with_one_title(written: Path) -> None:
    page = parse(written)
    assert len(page.findall(".//h1")) == 1 and page.find("head/title") is not None
    assert [section.find("h2").text for section in page.findall(".//section")][-1] == "How it was made"  # type: ignore[union-attr]
    assert "nan" not in words(written).casefold().split() and "inf" not in words(written).casefold().split()


def test_it_loads_nothing_and_runs_nothing(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    for element in parse(written).iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "image", "use")
        for name in element.attrib:
            assert name not in ("src", "href", "srcset", "action", "data") and not name.startswith("on")
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text.replace("&#x27;", "'")


def test_every_mark_lies_inside_its_picture(written: Path) -> None:
    pictures = parse(written).findall(".//svg")
    assert len(pictures) >= 1
    for picture in pictures:
        left, top, width, height = map(float, picture.attrib["viewBox"].split())
        assert (left, top) == (0, 0) and width > 0 and height > 0
        for element in picture.iter():
            x = [element.attrib[name] for name in ("x", "x1", "x2", "cx") if name in element.attrib]
            y = [element.attrib[name] for name in ("y", "y1", "y2", "cy") if name in element.attrib]
            points = [point.split(",") for point in element.attrib.get("points", "").split()]
            x, y = x + [point[0] for point in points], y + [point[1] for point in points]
            if element.tag == "rect":
                x.append(str(float(element.attrib["x"]) + float(element.attrib["width"])))
                y.append(str(float(element.attrib["y"]) + float(element.attrib["height"])))
            if "transform" in element.attrib:
                along, down = NUMBER.findall(element.attrib["transform"])[:2]
                x, y = [*x, along], [*y, down]
            assert all(math.isfinite(float(value)) and -0.05 <= float(value) <= width + 0.05 for value in x), element.attrib
            assert all(math.isfinite(float(value)) and -0.05 <= float(value) <= height + 0.05 for value in y), element.attrib


def test_no_note_is_in_it(written: Path) -> None:
    assert SECRET not in written.read_text(encoding="utf-8")
    assert stat.S_IMODE(written.stat().st_mode) == 0o644


def test_the_same_files_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    assert report(written.parent, out=tmp_path / "again.html").read_bytes() == written.read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("kind", ["paged", "strange labels", "held against others"])
def test_a_browser_has_nothing_to_complain_of(kind: str, tmp_path: Path) -> None:
    page = report(KINDS[kind](tmp_path / "run"))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([str(CHROMIUM), *quiet, "--enable-logging=stderr", "--v=0", "--dump-dom", f"file://{page}"],
                          capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "How it was made" in done.stdout and "<script" not in done.stdout


# Notes


def test_notes_are_shown_when_asked_for_to_the_owner_alone(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run") / "evaluation", free=f"{SECRET} says so").parent
    page = report(run, show_text=True)
    assert re.search(f"{SECRET} \\d+: pain", words(page)) and stat.S_IMODE(page.stat().st_mode) == 0o600
    assert f"{SECRET} says so" not in words(page) and OTHER in words(page)      # an answer that is no label stays hidden


def test_a_page_that_held_notes_is_replaced_by_one_that_does_not(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run") / "evaluation").parent
    report(run, show_text=True)
    page = report(run)
    assert SECRET not in page.read_text() and stat.S_IMODE(page.stat().st_mode) == 0o644


def test_notes_come_from_the_run_s_own_columns(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", input_column="befund", label_column="fach")
    write_scores(run / "scores", columns=("befund", "fach"))
    assert SECRET in words(report(run, show_text=True)) and SECRET not in words(report(run))


# Labels


def test_labels_are_text_whatever_they_hold(tmp_path: Path) -> None:
    page = report(KINDS["strange labels"](tmp_path / "run"))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text
    shown = [text for element in parse(page).iter() for text in (element.text, element.attrib.get("title")) if text]
    assert [label for label in STRANGE if not any(label in text for text in shown)] == []


# What it finds


def test_a_label_that_turns_the_direction_of_writing_turns_nothing_but_itself(tmp_path: Path) -> None:
    page = report(KINDS["strange labels"](tmp_path / "run"), show_text=True)
    isolating, found = {"td", "th", "dd", "text", "blockquote", "bdi", "title"}, []

    def walk(element: ElementTree.Element, inside: frozenset[str]) -> None:
        within = inside | {element.tag.rpartition("}")[2]}
        found.extend((text, bool(where & isolating)) for text, where in [
            (element.text, within), *((child.tail, within) for child in element)] if text and "\u202e" in text)
        for child in element:
            walk(child, within)

    walk(parse(page), frozenset())
    assert len(found) > 3 and [text for text, isolated in found if not isolated] == []
    assert re.search(r"\np \{[^}]*overflow-wrap: anywhere", page.read_text(encoding="utf-8")), "a long word widens no page"


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    said = words(report(KINDS["killed"](tmp_path / "run")))
    assert "Unfinished: 30 of at most 500 steps" in said and "No evaluation yet." in said and "minilora evaluate" not in said
    assert "recorded when a run ends" in said
    whole = words(report(KINDS["finished"](tmp_path / "whole")))
    assert "Unfinished" not in whole and "minilora evaluate" in whole


def test_a_run_that_went_on_says_that_its_adapter_is_older(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=30)
    card = run / "README.md"
    card.write_text(card.read_text() + "| steps | 30 of 16 x 1 notes |\n")
    assert "is of step" not in words(report(run))
    card.write_text(card.read_text().replace("| 30 of", "| 20 of"))
    assert "to predict with is of step 20" in words(report(run))


def test_errors_by_hand(tmp_path: Path) -> None:
    one, other, head = "CT Abdomen W Contrast", "CT Abdomen WO Contrast", "CT Brain WO Contrast"
    run = write_run(tmp_path / "run", labels=[one, other, head])
    page = parse(report(write_scores(run / "evaluation", [one, other, head], n=8, wrong=4).parent))     # rows 0 and 4 of 8
    cells = [["".join(cell.itertext()) for cell in row.findall("td")] for row in page.iter("tr")]
    assert ["contrast alone", "1", "50%", "1 of 2"] in cells and ["region alone", "1", "50%", "1 of 2"] in cells
    assert [row for row in cells if len(row) == 4 and row[1] in (one, other, head)] == [
        ["1", one, other, "contrast: with against without"], ["1", other, head, "region: abdomen against head"]]
    drawn = {title.text for title in page.iter("title")}
    assert {f"1 of 3: {one} answered as {other}", f"2 of 3: {one} answered as {one}"} <= drawn
    assert f"1 of 3: {one} answered as {head}" not in drawn


def test_of_many_labels_the_worst_are_drawn_and_listed(tmp_path: Path) -> None:
    labels = [f"CT Region {index}" for index in range(250)]
    run = write_scores(write_run(tmp_path / "run", labels=labels) / "evaluation", labels, n=500, wrong=1).parent
    page = parse(report(run))
    heat = next(picture for picture in page.iter("svg") if picture.attrib["class"] == "heat")
    assert len([text for text in heat.iter("text") if text.attrib.get("class") == "end"]) == 60
    assert "250 labels, the hardest 200." in words(run / "report.html")
    assert "and 190 labels in fewer errors." in words(run / "report.html")
    assert len(page.findall(".//table[@class='dense labels']/tbody/tr")) == 200


@pytest.mark.parametrize("rest", [b'{"step": 31, "lo', b"{", b"\0\0\0", b'{"step": 31}'])
def test_a_last_line_that_was_cut_short_is_left_out_and_said(rest: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    whole = words(report(run))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(rest)
    said = words(report(run))
    assert "cut short" in said and "cut short" not in whole and "Unfinished: 30 steps" in said


def test_scores_stand_in_it_with_their_intervals(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run") / "evaluation").parent
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    said = words(report(run))
    low, high = metrics["intervals"]["exact_match"]
    assert f"exact match on 60 rows, 95% interval {low:.1%} to {high:.1%}" in said
    for name in ("exact_match", "macro_f1", "weighted_f1", "cosine"):
        assert f"{metrics[name]:.3f}" in said
    assert f"Expected calibration error {metrics['calibration_error']:.3f}" in said
    assert "240 notes" in said and "torch 2.13.0" in said


@pytest.mark.parametrize(("wrong", "every", "says"), [
    (20, 2, "Yes: the model is right in 95.0% of the rows, a bag of words"),
    (2, 20, "No. The model does worse than a bag of words"),
    (4, 4, "No. The model could not be told from a bag of words"),
    (10, 8, "No. The model could not be told from a bag of words")])
def test_it_says_whether_a_bag_of_words_is_beaten(wrong: int, every: int, says: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_scores(run / "evaluation", wrong=wrong, others={BAG_OF_WORDS: every})
    said = words(report(run))
    assert says in said and ("the simpler method is the better choice" in said) == says.startswith("No")
    assert said.count("Is it better than something simpler?") == 1


def test_top_labels_training_notes_and_costs_stand_in_it(tmp_path: Path) -> None:
    one, other, head = "CT Abdomen W Contrast", "CT Abdomen WO Contrast", "CT Brain WO Contrast"
    run = write_run(tmp_path / "run", labels=[one, other, head])
    write_scores(run / "evaluation", [one, other, head], n=8, wrong=4, twins=3, adapter="0" * 64, embedder="minilm")
    metrics, said = json.loads((run / "evaluation" / "metrics.json").read_text()), words(report(run))
    assert f"Top 3 the reference is among the 3 most probable labels {metrics['top_k']['3']:.3f}" in said
    assert "3 of the notes stand in the training table as well, 0 nearly" in said and "minilm's embeddings" in said
    without = metrics["near_duplicates"]["exact_match_without"]
    assert f"without them exact match is {without:.3f}" in said
    # Of the two errors one leaves contrast out, the other images the head.
    assert f"Clinical cost {(0.5 + 1) / 8:.3f} a row" in said
    assert "another region of the body 1 1 " in said and "contrast left out 1 0.5" in said
    close = sum(metrics["cosine_histogram"]["wrong"][-2:])      # bins of a twentieth
    assert f"2 wrong answers; {close} of them ({50 * close}%) have a cosine of 0.9 or more" in said


def test_scores_of_another_adapter_are_called_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "adapter_model.safetensors").write_bytes(b"weights")
    write_scores(run / "evaluation", adapter="0" * 64)
    assert "These scores are of another adapter than the run folder holds now" in words(report(run))
    shutil.rmtree(run / "evaluation")
    write_scores(run / "evaluation", adapter=hashlib.sha256(b"weights").hexdigest())
    assert "of another adapter" not in words(report(run))


def test_among_several_evaluations_the_adapter_s_own_is_found_by_its_hash(tmp_path: Path) -> None:
    run, own = write_run(tmp_path / "run"), hashlib.sha256(b"weights").hexdigest()
    (run / "adapter_model.safetensors").write_bytes(b"weights")
    write_run(tmp_path / "run2")
    write_scores(tmp_path / "before", adapter="0" * 64)
    assert find_evaluation(run) == (None, ""), "the only one there is of another adapter"
    write_scores(tmp_path / "after", adapter=own)
    assert find_evaluation(run) == (tmp_path / "after", "")
    write_scores(tmp_path / "again", adapter=own)
    assert find_evaluation(run)[0] is None and "--evaluation" in find_evaluation(run)[1]
    for name, adapter in (("a", "0" * 64), ("b", own)):
        write_scores(run / name, adapter=adapter)
    assert find_evaluation(run) == (run / "b", "")


def test_an_evaluation_of_an_earlier_version_has_its_page(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run") / "evaluation", others={BAG_OF_WORDS: 2}, twins=3, adapter="0" * 64).parent
    path = run / "evaluation" / "metrics.json"
    new = {"top_k", "clinical", "cosine_histogram", "comparisons", "near_duplicates", "scored", "reliability", "coverage",
           "confusion_matrix"}
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in new}))
    said = words(report(run))
    assert "Exact match" in said and "Top 3" not in said and "Clinical cost" not in said and "McNemar" not in said


@pytest.mark.parametrize(("folders", "found"), [
    ([], None), (["run/evaluation"], "run/evaluation"), (["run/a", "run/b"], None), (["scores"], "scores"),
    (["scores", "other"], None), (["run/evaluation", "scores"], "run/evaluation"), (["scores", "RUN2"], None)])
def test_an_evaluation_is_taken_only_where_it_is_certain(folders: list[str], found: str | None, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for folder in folders:
        write_run(tmp_path / folder) if folder == "RUN2" else write_scores(tmp_path / folder)
    path, hint = find_evaluation(run)
    assert path == (tmp_path / found if found else None)
    assert bool(hint) == (found is None and bool(folders))
    report(run)


@pytest.mark.parametrize("settings", [
    {}, {"r": 8, "dropout": 0.1, "use_dora": True, "double_quant": False, "target_modules": ("q_proj", "v_proj")},
    {"tune": "full", "quantize": "none", "val": "a b.csv", "template": "it's --r {input}", "lr": 1e-05},
    {"data": "-odd.csv", "optimizer": "paged_adamw", "resident_mib": 0.5, "state_bits": 8, "seed": 7}])
def test_its_command_makes_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**{"model": "tiny", "data": "train.csv", "out": "run", **settings})
    args = vars(build_parser().parse_args(shlex.split(" ".join(train_command(config)))[1:]))
    settings = {key: value for key, value in args.items() if key not in ("command", "run", "config", *NO_SETTINGS)}
    assert TrainConfig(**settings) == config


# Refusals


def broken(change: Callable[[Path], Any]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        run = write_scores(write_run(folder / "run") / "evaluation").parent
        change(run)
        return [str(run)]
    return make


def replace(name: str, old: str, new: str) -> Callable[[Path], list[str]]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))
    return broken(change)


def scores(**values: Any) -> Callable[[Path], list[str]]:
    def change(run: Path) -> None:
        path = run / "evaluation" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return broken(change)


def write(name: str, content: bytes) -> Callable[[Path], list[str]]:
    return broken(lambda run: (run / name).write_bytes(content))


METRICS, CONFIG, SCORES, ROWS = "metrics.jsonl", "config.toml", "evaluation/metrics.json", "evaluation/predictions.csv"
REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no such folder": (lambda folder: [str(folder / "none")], "no such folder"),
    "no run folder": (lambda folder: [str(folder)], "is no run folder (no config.toml)"),
    "configuration": (write(CONFIG, b"model = "), "is not TOML"),
    "setting": (replace(CONFIG, "seed = 0", "seeds = 0"), "unknown setting 'seeds'"),
    "no metrics": (broken(lambda run: (run / METRICS).unlink()), "no whole step yet"),
    "empty metrics": (write(METRICS, b""), "no whole step yet"),
    "half a line": (write(METRICS, b'{"step": 1, "lo'), "no whole step yet"),
    "a broken line": (replace(METRICS, '{"step": 5,', '{"step": ,'), "line 5 is no JSON object"),
    "a line of another kind": (replace(METRICS, '{"step": 5,', '{"stop": 5,'), "line 5 lacks step"),
    "metrics that are not text": (write(METRICS, b"\xff\xfe\n"), "line 1 is no JSON object"),
    "a loss that is no number": (replace(METRICS, '"loss": 3.0', '"loss": NaN'), "line 1: loss is no number that training"),
    "a huge number": (replace(METRICS, '"tokens": 91', '"tokens": 1' + "0" * 400), "line 1: tokens is no number that training"),
    "half a step": (replace(METRICS, '{"step": 5,', '{"step": 4.5,'), "line 5: step is no number that training"),
    "a step twice": (replace(METRICS, '{"step": 5,', '{"step": 4,'), "line 5: step 4 comes after step 4"),
    "labels": (write("labels.txt", b"a\na\n"), "duplicate of line 1"),
    "no JSON": (write(SCORES, b"{"), "not readable JSON"),
    "a list": (write(SCORES, b"[]"), "is no JSON object"),
    "a score that is no number": (scores(macro_f1="high"), "macro_f1 is no number between 0 and 1"),
    "a score that is not finite": (scores(cosine=math.nan), "cosine is no number between 0 and 1"),
    "no score": (replace(SCORES, '"macro_f1"', '"makro_f1"'), "lacks macro_f1"),
    "intervals": (scores(intervals={"macro_f1": [0.1]}), "interval of macro_f1 is no pair"),
    "an interval": (scores(intervals={"macro_f1": [0.1, None]}), "interval of macro_f1 is no number"),
    "labels' scores": (scores(per_label=[{"label": "a"}]), "per_label is no list of objects with label, cosine"),
    "close pairs": (scores(close_pairs=7), "close_pairs is no list"),
    "baselines": (scores(baselines={"majority": 1}), "majority is no JSON object"),
    "clinical cost": (scores(clinical={"cost": 2}), "clinical cost is no number between 0 and 1"),
    "kinds of errors": (scores(clinical={"cost": 0.5, "interval": [0, 1], "kinds": {"side": 0.5}}),
                        "'side' is no number of rows"),
    "comparisons": (scores(comparisons={"b": {"n": "many", "interval": [0, 1]}}), "comparison with 'b' is no number"),
    "an interval of a difference": (scores(comparisons={"b": {"interval": [0]}}),
                                    "comparison with 'b': its interval is no pair"),
    "near-duplicates": (scores(near_duplicates={"same": -1, "near": 0}), "near_duplicates is no number of rows"),
    "top k": (scores(top_k={"3": "all"}), "top 3 is no number between 0 and 1"),
    "a histogram": (scores(cosine_histogram={"rows": 7}), "cosine_histogram is no list"),
    "what was scored": (scores(scored=3), "scored is no JSON object"),
    "another evaluation": (scores(exact_match=0.123), "do not belong together"),
    "another number of rows": (scores(n=61), "do not belong together"),
    "no label column": (replace(ROWS, "input,label", "input,lable"), "no column 'label' with the labels"),
    "no probabilities": (replace(ROWS, "prediction,probability", "prediction,chance"), "no column 'probability'"),
    "a probability that is no number": (replace(ROWS, ",0.5\n", ",nan\n"), "probability is no number between 0 and 1"),
    "a logit": (replace(ROWS, ",0.5\n", ",-3.5\n"), "probability is no number between 0 and 1"),
    "a row without label": (replace(ROWS, "pain,C-Spine(Bone)", "pain,"), "row 1 (line 2) has no label"),
    "rows of another width": (replace(ROWS, ",0.5\n", "\n"), "cells, the header"),
    "no rows": (write(ROWS, b"input,label,prediction,probability\r\n"), "no rows"),
    "no such evaluation": (lambda folder: [*broken(lambda run: None)(folder), "--evaluation", "none"], "none: no such folder"),
    "no evaluation": (lambda folder: [*broken(lambda run: None)(folder), "--evaluation", str(folder)], "holds no metrics.json"),
    "notes of no evaluation": (lambda folder: [str(write_run(folder / "run")), "--show-text"], "there is none"),
    "no column of notes": (lambda folder: [*replace(ROWS, "input,label", "note,label")(folder), "--show-text"],
                           "no column 'input' with the notes"),
    "no page": (lambda folder: [*broken(lambda run: None)(folder), "--out", str(folder / "run" / METRICS), "--overwrite"],
                "ends in .html"),
    "no folder for it": (lambda folder: [*broken(lambda run: None)(folder), "--out", str(folder / "none" / "a.html")],
                         "cannot write"),
    "a folder": (lambda folder: [*broken(lambda run: (run / "report.html").mkdir())(folder)], "is a folder"),
    "a page that exists": (write("report.html", b"mine"), "exists already; choose another output or pass --overwrite"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_ends_with_one_line_and_nothing_written(case: str, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    make, says = REFUSED[case]
    arguments = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minilora: ") and err.count("\n") == 1 and says in err, err
    assert SECRET not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_existing_page_is_replaced_only_when_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = write_report(run)
    assert page == run / "report.html"
    with pytest.raises(OutputError, match="exists already"):
        write_report(run)
    assert write_report(run, overwrite=True) == page
    assert [path.name for path in run.glob(".tmp-*")] == []


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MiniloraError, match="No space left"):
        write_report(run)
    assert not (run / "report.html").exists() and list(run.glob(".tmp-*")) == []


def test_a_run_that_was_really_trained_and_evaluated_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = write_model(tmp_path / "base"), write_csv(tmp_path / "train.csv", notes(24))
    run = tmp_path / "run"
    train(TrainConfig(model=str(base), data=str(data), val=str(data), out=str(run), r=2, batch_size=8, max_steps=4,
                      eval_every=2, max_length=128, dtype="float32", optimizer="paged_adamw", page_bytes=4096,
                      resident_mib=8192 / 2 ** 20, quiet=True))
    assert main(["evaluate", "--model", str(base), "--adapter", str(run), "--data", str(data), "--out", str(run / "evaluation"),
                 "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    said = words(run / "report.html")
    assert "Pager" in said and "Label by label" in said and "24 notes" in said and all(label in said for label in LABELS)
    assert SECRET not in said
