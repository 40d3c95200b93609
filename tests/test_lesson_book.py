"""Notebooks and book say what the scripts say, cell for cell, in one file a lesson and with nothing to load."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilora.course.book import build as building
from minilora.course.book.build import build
from minilora.course.book.pages import PLAYS_WITH_NF4, lesson_body
from minilora.course.book.prose import Prose, equation, typeset
from minilora.course.book.results import results
from minilora.course.lesson import PREDICT, Lesson, lesson_paths, lessons_folder, read_lesson
from minilora.course.map import Row, read_map
from minilora.errors import ConfigError, OutputError

FOLDER = lessons_folder()
LESSONS = [read_lesson(path) for path in lesson_paths().values()]
EACH = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
SCRIPT = FOLDER.parent / "scripts" / "build_lessons.py"
PROSE = Prose(FOLDER, {"MYTHS.md": "myths.html"}, {2: "02_x.html", 7: "07_y.html"})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of every lesson; what cells print is made up, and names its cell."""
    out = tmp_path_factory.mktemp("lessons") / "out"
    build(out, lambda lesson: [f"printed by {lesson.number}-{index}\n" for index, _ in enumerate(lesson.cells)])
    return out


def parse(path: Path) -> ElementTree.Element:
    """The page as a tree; an XML parser takes nothing that is not well-formed."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    # A script is no XML; what it holds is compared elsewhere.
    text = re.sub(r"<script>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    return ElementTree.fromstring(text.replace("<!DOCTYPE html>", "", 1))


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def squeezed(text: str) -> str:
    return " ".join(text.split())


def page_of(built: Path, lesson: Lesson) -> Path:
    return built / "book" / f"{lesson.path.stem}.html"


# Notebooks


def check_format(notebook: dict[str, Any]) -> None:
    """What nbformat 4.5 asks of a notebook of Markdown and code."""
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert {"name", "display_name"} <= set(notebook["metadata"]["kernelspec"]) and notebook["metadata"]["language_info"]["name"]
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        wanted |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert wanted <= set(cell) <= wanted | ({"attachments"} if cell["cell_type"] == "markdown" else set())
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        assert all(line.endswith("\n") and line.count("\n") == 1 for line in cell["source"][:-1])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


@EACH
def test_a_notebook_has_the_cells_of_the_script_and_its_pictures_inside(built: Path, lesson: Lesson) -> None:
    notebook = json.loads((built / "notebooks" / f"{lesson.path.stem}.ipynb").read_text(encoding="utf-8"))
    check_format(notebook)
    pictures = 0
    for cell, found in zip(lesson.cells, notebook["cells"], strict=True):
        assert found["cell_type"] == ("markdown" if cell.prose else "code")
        source = "".join(found["source"])
        for name, content in found.get("attachments", {}).items():
            assert content["image/png"].startswith("iVBORw0KGgo"), "a PNG's first bytes in base64"
            source = source.replace(f"](attachment:{name})", f"](figures/{name})")
            pictures += 1
        assert source == cell.text.rstrip("\n") and "attachment:" not in source
    assert pictures >= 1


def test_a_notebook_s_code_runs_from_top_to_bottom(built: Path, tmp_path: Path) -> None:
    notebook = json.loads((built / "notebooks" / "04_blocks_and_outliers.ipynb").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=FOLDER.parent,
                          env={"MINILORA_FIGURES": str(tmp_path), "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1",
                               "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "04_outlier.png").is_file()


# The book


@EACH
def test_a_page_has_all_prose_code_and_results_of_its_lesson_in_order(built: Path, lesson: Lesson) -> None:
    main = parse(page_of(built, lesson)).find(".//main")
    assert main is not None
    said = squeezed(text_of(main))
    at = 0
    for index, cell in enumerate(lesson.cells):
        pieces = [squeezed(cell.text), f"printed by {lesson.number}-{index}"] if not cell.prose else [
            squeezed(plain) for plain in _plain(cell.text)]
        for piece in pieces:
            assert piece in said[at:], f"after {said[at - 60 : at]!r} comes no {piece!r}"
            at = said.index(piece, at) + len(piece)
    stub = (FOLDER / "exercises" / f"{lesson.number:02d}.py").read_text(encoding="utf-8")
    assert squeezed(stub) in said[at:], "the stub of the exercise ends it"


def _plain(markdown: str) -> Iterator[str]:
    """The longest pieces of a prose cell that Markdown leaves as they are."""
    for line in re.sub(r"!\[.*?\]\(.*?\)", "", markdown).splitlines():
        if not line.startswith("    "):
            yield from (piece for piece in re.split(r"[*`#]+|^\d\. |\[|\]\(.*?\)", line) if len(squeezed(piece)) > 12
                        and "·" not in piece)


@EACH
def test_an_answer_is_folded_away_behind_its_question(built: Path, lesson: Lesson) -> None:
    main = parse(page_of(built, lesson)).find(".//main")
    assert main is not None
    children = list(main)
    guesses = [index for index, child in enumerate(children) if child.attrib.get("class") == "guess"]
    assert len(guesses) == sum(PREDICT in cell.text for cell in lesson.cells if cell.prose) >= 1
    names = [child.attrib["name"] for child in main.iter("input")]
    assert len(set(names)) == len(names) == len(guesses), "each has a place for the guess"
    for index in guesses:
        answer = children[index + 1]
        assert answer.tag == "details" and "open" not in answer.attrib and answer[0].tag == "summary"
        assert answer.find(".//h2") is None, "headings stay outside"
        assert answer.find("pre[@class='code']") is not None and answer.find("pre[@class='printed']") is not None
    assert len(main.findall("details")) == len(guesses)


def test_pages_form_one_way_through_the_book_and_back(built: Path) -> None:
    order = ["index.html", *(f"{lesson.path.stem}.html" for lesson in LESSONS), "myths.html"]
    for before, name, after in zip([None, *order], order, [*order[1:], None], strict=False):
        links = {link.attrib["rel"]: link.attrib["href"] for link in parse(built / "book" / name).iter("a")
                 if "rel" in link.attrib}
        assert (links.get("prev"), links.get("next")) == (before, after)
    for lesson in LESSONS:
        linked = "nf4.html" in {link.attrib["href"] for link in parse(page_of(built, lesson)).iter("a")}
        assert linked == (lesson.number in PLAYS_WITH_NF4)


def test_every_link_leads_to_a_page_that_is_there(built: Path) -> None:
    pages = sorted((built / "book").iterdir())
    assert len(pages) == len(LESSONS) + 3
    for path in pages:
        for link in parse(path).iter("a"):
            assert (built / "book" / link.attrib["href"]).is_file(), f"{path.name} links to {link.attrib['href']}"


def test_a_page_loads_nothing_and_only_the_sliders_run_a_script(built: Path) -> None:
    for path in sorted((built / "book").iterdir()):
        page = parse(path)
        assert (page.find(".//script") is not None) == (path.name == "nf4.html")
        policy = next(meta.attrib["content"] for meta in page.iter("meta") if "http-equiv" in meta.attrib)
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'") and "http" not in policy
        for element in page.iter():
            assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
            assert element.attrib.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert not any(name.startswith("on") or name == "style" for name in element.attrib)
        style = page.findtext(".//style") or ""
        assert "url(" not in style and "@import" not in style


def test_the_index_has_every_lesson_of_the_map_and_no_table(built: Path) -> None:
    page = parse(built / "book" / "index.html")
    assert page.find(".//table") is None
    entries = page.findall(".//ol[@class='contents']/li")
    for row, entry in zip(read_map().values(), entries, strict=True):
        said = squeezed(text_of(entry))
        assert said.startswith(f"{row.number:02d} {row.title}") and all(part in said for part in (*row.explains, *row.tasks))


def test_the_myths_are_a_page_whose_lessons_are_linked(built: Path) -> None:
    page = parse(built / "book" / "myths.html")
    assert len(page.findall(".//ol/li")) == 32
    assert {link.attrib["href"] for link in page.findall(".//main//a")} <= {f"{lesson.path.stem}.html" for lesson in LESSONS}
    assert len(page.findall(".//main//a")) >= 20


# Prose


def test_a_letter_alone_is_a_variable_and_a_word_is_not() -> None:
    assert typeset("W + ΔW = x Aᵀ lr ∂L v̂ g² c_N nested_absmax < 3") == (
        "<var>W</var> + Δ<var>W</var> = <var>x</var> <var>A</var>ᵀ lr ∂<var>L</var> <var>v̂</var> <var>g</var>² "
        "<var>c</var><sub>N</sub> nested_absmax &lt; 3")
    assert typeset("Σ g_p") == "Σ <var>g</var><sub>p</sub>"
    assert typeset("m̂ = m / (1 − 0.9ᵗ)") == "<var>m̂</var> = <var>m</var> / (1 − 0.9ᵗ)"


def test_equations_stand_in_the_columns_in_which_they_were_written() -> None:
    two = ElementTree.fromstring(equation("a = b     c = d\ne = f     g = h, with more"))
    assert two.attrib["class"] == "equation aligned"
    assert [[text_of(cell) for cell in line] for line in two] == [["a = b", "c = d"], ["e = f", "g = h, with more"]]
    one = ElementTree.fromstring(equation("a = b     c = d     e = f     g = h     i = j"))
    assert one.attrib["class"] == "equation" and len(one) == 1 and len(one[0]) == 5, "a single line is broken where it must be"


@pytest.mark.parametrize(("text", "html"), [
    ("see lesson 07 and lesson 09", 'see <a href="07_y.html">lesson 07</a> and lesson 09'),
    ("two `<s>` and <s>", "two <code>&lt;s&gt;</code> and &lt;s&gt;"),
    ("[thirty-two](MYTHS.md)", '<a href="myths.html">thirty-two</a>'),
    ("    minilora check 6", '<pre class="command">minilora check 6</pre>'),
    ("    y = 2", "<var>y</var> = 2"), ("    g ← g / N", "<var>g</var> ← "),
    ("    torchrun -m minilora train --lr=2", '<pre class="command">torchrun'),
    ("| a |\n| --- |\n| b |", '<div class="scroll"><table>')])
def test_markdown_becomes_html_with_the_book_s_own_links(text: str, html: str) -> None:
    assert html in PROSE.html(text)


def test_a_lesson_does_not_link_to_itself() -> None:
    assert "<a" not in PROSE.html("as lesson 07 says", here=7)


@pytest.mark.parametrize(("text", "words"), [
    ("[x](other.md)", "links to other.md, which is no page"), ("![x](figures/none.png)", "no such picture")])
def test_what_leads_nowhere_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PROSE.html(text)


# Running and writing


def write(tmp_path: Path, text: str) -> Lesson:
    path = tmp_path / "07_x.py"
    path.write_text(text, encoding="utf-8")
    return read_lesson(path)


def test_each_cell_is_shown_with_what_it_printed_itself(tmp_path: Path) -> None:
    lesson = write(tmp_path, "# %% [markdown]\n# # 07 · T\n\n# %%\nx = 1\nprint(x)\n\n# %%\nx += 1\n\n# %%\n"
                             "print(x, '[picture: no]')\nprint('[picture: a.png in b]')\n")
    assert results(lesson) == ["", "1\n", "", "2 [picture: no]\n"]


def test_a_question_whose_answer_has_no_text_after_it_is_folded_as_well(tmp_path: Path) -> None:
    lesson = write(tmp_path, "# %% [markdown]\n# # 07 · T\n#\n# **Predict.** How many?\n\n# %%\nprint(3)\n")
    body = lesson_body(lesson, Row(7, "T", "07_x.py", (), "–", ()), PROSE, ["", "3\n"], "stub")
    assert re.search(r"<details>.*<samp>3</samp></pre></details>", body)


def test_the_answer_ends_where_a_heading_begins_and_not_at_the_number_of_an_issue(tmp_path: Path) -> None:
    lesson = write(tmp_path, "# %% [markdown]\n# # 07 · T\n#\n# **Predict.** How many?\n\n# %%\nprint(3)\n\n# %% [markdown]\n"
                             "# Three (peft #137, peft\n# #1142).\n#\n# ## The trap\n#\n# More.\n")
    body = lesson_body(lesson, Row(7, "T", "07_x.py", (), "–", ()), PROSE, ["", "3\n", ""], "stub")
    answer, _, rest = body.partition("</details>")
    assert "#1142)." in answer and "The trap" not in answer and "<h2>The trap</h2>" in rest


def test_a_book_is_replaced_by_the_next_and_a_page_whose_lesson_has_another_name_goes(tmp_path: Path) -> None:
    first = {path: path.read_bytes() for path in build(tmp_path / "out")}
    stale = tmp_path / "out" / "book" / "06_old_name.html"
    stale.write_text("old")
    assert {path: path.read_bytes() for path in build(tmp_path / "out")} == first, "the same scripts give the same bytes"
    assert not stale.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no book"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_script_says_where_the_book_begins_and_refuses_in_one_line(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120,
                              env={"PYTHONPATH": str(FOLDER.parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
    done = run("--unrun", "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and str(tmp_path / "out" / "book" / "index.html") in done.stdout
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    done = run("--unrun", "--out", str(tmp_path / "mine"))
    assert done.returncode == 2 and done.stderr.startswith("build_lessons: ") and done.stderr.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['markdown_it'] = None; sys.path.insert(0, sys.argv[1]); import build_lessons; " \
           "sys.exit(build_lessons.main(sys.argv[2:]))"
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), "--unrun", "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, timeout=120,
                          env={"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "pip install -e '.[book]'" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_lesson_of_the_course_is_run_and_leaves_its_picture_as_it_was() -> None:
    lesson = next(lesson for lesson in LESSONS if lesson.number == 12)
    before = {path: path.stat().st_mtime_ns for path in (FOLDER / "figures").iterdir()}
    found = results(lesson)
    assert [bool(text) for text, cell in zip(found, lesson.cells, strict=True) if cell.prose] == [False] * sum(
        cell.prose for cell in lesson.cells)
    assert "268" in "".join(found) and "[picture" not in "".join(found)
    assert {path: path.stat().st_mtime_ns for path in (FOLDER / "figures").iterdir()} == before


def test_a_map_that_lacks_a_lesson_is_refused(tmp_path: Path) -> None:
    for name in ("01_a.py", "02_b.py"):
        (tmp_path / name).write_text("# %% [markdown]\n# # 01 · A\n")
    (tmp_path / "README.md").write_text("| [01 A](01_a.py) | `minilora/memory.py` | – | `f` |\n")
    with pytest.raises(ConfigError, match="differ in 2"):
        read_map(tmp_path)
    assert building.script().startswith('"use strict"')
