"""The parts of the report: axes, lines, the pager's differences, orders of labels, escaping."""
from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.report.confusion import by_confusion, by_protocol, difference_kinds
from minilora.report.markup import Markup, escape, tag
from minilora.report.pager import paged_steps, pager_section, per_step
from minilora.report.parts import byte_text, duration, shortened
from minilora.report.runfiles import COUNTERS, read_run
from minilora.report.svg import Frame, linear_axis, log_axis, smooth, text_width, thin, tick_step, tick_text
from tests.runs import metrics_lines, write_run

VALUES = st.one_of(st.floats(-1e12, 1e12), st.floats(-1e-3, 1e-3)).map(lambda value: round(value, 12))
POSITIVE = st.floats(1e-9, 1e12)
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("<>&\"'\0\x0b\ufffe"), max_size=40)


# Axes


@pytest.mark.parametrize(("span", "most", "step"), [(1, 5, 0.2), (120, 6, 20), (0.0032, 5, 0.001), (7, 7, 1), (1e-7, 5, 2e-8)])
def test_a_step_between_ticks_is_round(span: float, most: int, step: float) -> None:
    assert tick_step(span, most) == pytest.approx(step)


@pytest.mark.parametrize(("value", "step", "text"), [
    (0, 0.1, "0"), (0.25, 0.05, "0.25"), (1500, 500, "1,500"), (2e-5, 1e-5, "2e-5"), (1.5e-5, 5e-6, "1.5e-5"),
    (3e7, 1e7, "3e7"), (1.2e11, 2e10, "1.2e11"), (0.5, 0.5, "0.5"), (1.0, 0.5, "1.0"), (1e30, 5e29, "1e30"),
    (-0.2, 0.1, "-0.2")])
def test_a_tick_has_the_digits_it_needs(value: float, step: float, text: str) -> None:
    assert tick_text(value, step) == text


@given(VALUES, VALUES, st.integers(2, 8), st.booleans())
def test_ticks_of_a_linear_axis_are_few_distinct_and_inside(a: float, b: float, most: int, outward: bool) -> None:
    axis = linear_axis(min(a, b), max(a, b), most=most, outward=outward)
    values = [value for value, _ in axis.ticks]
    assert axis.low < axis.high and len(values) <= most + 3 and values == sorted(set(values))
    assert not outward or len(values) >= 2
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    if not outward or math.isclose(a, b, rel_tol=1e-9):
        return
    assert axis.low <= min(a, b) + 1e-6 * abs(a - b) and axis.high >= max(a, b) - 1e-6 * abs(a - b)
    texts = [text for _, text in axis.ticks]
    assert len(set(texts)) == len(texts)


@given(POSITIVE, POSITIVE)
def test_ticks_of_a_logarithmic_axis_are_few_and_hold_the_data(a: float, b: float) -> None:
    axis = log_axis(min(a, b), max(a, b))
    values = [value for value, _ in axis.ticks]
    assert 1 <= len(values) <= 8 and values == sorted(set(values))
    assert axis.low <= min(a, b) * (1 + 1e-6) and axis.high >= max(a, b) * (1 - 1e-6)
    assert axis.share(min(a, b)) <= axis.share(max(a, b))


def test_labels_of_ticks_do_not_run_into_each_other() -> None:
    frame = Frame(linear_axis(0, 5_000_000, "step", most=6, whole=True, outward=False), linear_axis(0, 1))
    texts = [element for element in ElementTree.fromstring(frame.draw("chart")).iter("text")
             if "middle" in element.attrib.get("class", "")]
    edges = [(float(text.attrib["x"]) - 3 * len(text.text or ""), float(text.attrib["x"]) + 3 * len(text.text or ""))
             for text in texts]
    assert len(texts) >= 3 and all(one[1] < other[0] for one, other in pairwise(edges))


# Lines


def test_smoothing_by_hand() -> None:
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), 1).tolist() == [1, 2, 6, 4]
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), 3).tolist() == [1.5, 3, 4, 5]
    assert smooth(np.array([3.0]), 25).tolist() == [3]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.sampled_from([2, 10, 600]))
def test_a_thinned_line_keeps_its_peaks(values: list[float], most: int) -> None:
    x, y = np.arange(len(values), dtype=np.float64), np.array(values)
    short_x, short_y = thin(x, y, most)
    assert len(short_x) <= max(most, 1) and (np.diff(short_x) > 0).all()
    assert short_y.min() == y.min() and short_y.max() == y.max() and (y[short_x.astype(int)] == short_y).all()


def test_what_lies_outside_an_axis_is_drawn_at_its_edge() -> None:
    frame = Frame(linear_axis(0, 10), linear_axis(0, 1))
    assert frame.at(-5, 7) == frame.at(0, 1)


# The pager


def test_a_step_s_share_of_the_counters_by_hand() -> None:
    totals = {"faults": np.array([48.0, 80, 112, 10, 30]), "stall_seconds": np.array([0.5, 0.5, 0.75, 0.75, 1.0])}
    # Step 4 is another process, resumed: its faults fell, so all its totals are its own, of the counter that rose as well.
    found = per_step(totals)
    assert found["faults"].tolist() == [48, 32, 32, 10, 20]
    assert found["stall_seconds"].tolist() == [0.5, 0, 0.25, 0.75, 0.25]


@given(st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=20), min_size=1, max_size=3))
def test_the_shares_of_a_run_that_was_never_resumed_add_up_to_its_totals(growth: list[list[int]]) -> None:
    length = min(map(len, growth))
    totals = {str(index): np.cumsum(row[:length]).astype(float) for index, row in enumerate(growth)}
    for index, values in per_step(totals).items():
        assert values.tolist() == growth[int(index)][:length] and values.sum() == totals[index][-1]


def points(section: Markup, figure: int, style: str) -> list[tuple[float, float]]:
    line = next(element for element in ElementTree.fromstring(section).findall(".//figure")[figure].iter("polyline")
                if element.attrib["class"] == f"line {style}")
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.attrib["points"].split())]


def test_the_pager_is_drawn_from_differences(tmp_path: Path) -> None:
    lines = metrics_lines(4, paged=True)
    for line, faults, stall in zip(lines, (50, 70, 90, 100), (0.01, 0.03, 0.03, 0.08), strict=True):
        line |= {"faults": faults, "stall_seconds": stall}
    section = pager_section(read_run(write_run(tmp_path / "run", lines=lines, optimizer="paged_adamw")))
    assert section is not None
    # Faults a step 50, 20, 20, 10 on an axis to 50 between y = 194 and 24: 194 − 170 · faults / 50.
    assert [y for _, y in points(section, 0, "main")] == pytest.approx([24, 126, 126, 160], abs=0.1)
    # Waiting 0.01, 0.02, 0, 0.05 s of steps of 0.1 s: 10, 20, 0, 50 %, on an axis to 50 %.
    assert [y for _, y in points(section, 2, "main")] == pytest.approx([160, 126, 194, 24], abs=0.1)


def test_steps_that_ran_out_of_memory_are_marked(tmp_path: Path) -> None:
    lines = metrics_lines(6, paged=True)
    lines[3]["evicted_bytes"] = 7_500_000
    section = pager_section(read_run(write_run(tmp_path / "run", lines=lines, optimizer="paged_adamw")))
    tree = ElementTree.fromstring(section or "")
    assert "step 4: out of memory; 7.5 MB of pages put out" in "".join(tree.itertext())
    marks = [element for element in tree.iter("line") if element.attrib.get("class") == "line oom"]
    assert len(marks) == 3 + 3      # in each chart, and in its legend


def test_a_run_without_pages_has_no_pager_section_and_a_gap_in_counters_is_no_error(tmp_path: Path) -> None:
    assert pager_section(read_run(write_run(tmp_path / "plain"))) is None
    lines = metrics_lines(5, paged=True)
    del lines[2]["faults"]
    steps, grown = paged_steps(read_run(write_run(tmp_path / "run", lines=lines, optimizer="paged_adamw")).metrics)
    assert steps.tolist() == [1, 2, 4, 5] and set(grown) == set(COUNTERS)
    assert grown["faults"].tolist() == [3, 3, 6, 3]         # the share of the step without counters falls to the next


# Labels


def test_protocols_are_ordered_by_modality_and_region() -> None:
    names = ["MR Knee", "CT Head", "XR Knee", "CT Abdomen", "MR Brain"]
    assert [names[index] for index in by_protocol(names) or []] == ["CT Abdomen", "CT Head", "MR Brain", "MR Knee", "XR Knee"]
    assert by_protocol(["billing", "complaint", "CT Head", "other", "x"]) is None


def test_other_labels_follow_the_one_they_are_confused_with() -> None:
    errors = np.zeros((4, 4), dtype=np.int64)
    errors[0, 3], errors[3, 0], errors[1, 3] = 5, 2, 1
    assert by_confusion(errors) == [3, 0, 1, 2]


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_an_order_holds_every_label_once(n: int, random: Any) -> None:
    errors = np.array([[random.choice([0, 0, 3]) if i != j else 0 for j in range(n)] for i in range(n)])
    assert sorted(by_confusion(errors)) == list(range(n))


def test_kinds_of_a_difference() -> None:
    assert difference_kinds("contrast: with against without; side: left against right") == ["contrast", "side"]
    assert difference_kinds(None) == []


# Text


@given(TEXT, TEXT)
def test_any_text_comes_out_as_text(inside: str, attribute: str) -> None:
    element = ElementTree.fromstring(tag("p", inside, title=attribute))
    assert len(element) == 0 and list(element.attrib) == ["title"]
    kept = "".join("\ufffd" if escape(c) == "\ufffd" else c for c in inside)
    assert (element.text or "").replace("\r", "\n") == kept.replace("\r\n", "\n").replace("\r", "\n")


def test_markup_is_escaped_once_and_other_text_always() -> None:
    assert tag("p", tag("b", "<"), "<", None, 3) == "<p><b>&lt;</b>&lt;3</p>"
    assert tag("p", class_="a\"b", aria_hidden=None) == '<p class="a&quot;b"></p>'


@pytest.mark.parametrize(("said", "text"), [
    (duration(4.84), "4.8 s"), (duration(41.2), "41 s"), (duration(725), "12 min"), (duration(11_100), "3 h 05 min"),
    (byte_text(1_585_844_224), "1.59 GB"), (byte_text(711e6), "711 MB"), (byte_text(0), "0 bytes"),
    (shortened("abcdef", 6), "abcdef"), (shortened("abc def", 5), "abc…")])
def test_figures_are_said_as_people_say_them(said: str, text: str) -> None:
    assert said == text


def test_letters_of_east_asia_are_wide() -> None:
    assert text_width("疼痛", 10) == 20 and text_width("ab", 10) == 12


def test_labels_in_capitals_get_the_room_they_take() -> None:
    assert text_width("CT ABDOMEN", 10) > 1.15 * text_width("ct abdomen", 10)
