"""The book in a real browser: wide and narrow, dark, printed, and clicked through from the first page to the last."""
from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilora.course.book.build import build
from minilora.course.lesson import lesson_paths
from tests.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
NAMES = [*(f"{path.stem}.html" for path in lesson_paths().values()), "index.html", "myths.html", "nf4.html"]
LONG = "a line that is printed: " + "0123456789 " * 20
# Text against what lies behind it, as WCAG 2.1 defines contrast; returns the worst, and whose it is.
CONTRAST = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const color = numbers(getComputedStyle(e).backgroundColor); if (color.length < 4 || color[3] > 0) return color; }
    return [255, 255, 255]; };
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
    const style = getComputedStyle(e), ink = numbers(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`];
  }
  return worst; })()"""
VISIBLE = "[...document.querySelectorAll('details > pre')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("book")
    build(out / "out", lambda lesson: [LONG] * len(lesson.cells))
    return out / "out" / "book"


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(open_browser: Browser) -> Browser:
    open_browser.complaints.clear()
    open_browser.requested.clear()
    open_browser.screen(1280)
    return open_browser


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_a_desk_and_a_phone_and_asks_for_nothing_but_itself(book: Path, browser: Browser, name: str) -> None:
    for width in (1280, 390, 320):
        browser.screen(width, touch=width < 500)
        browser.open(book / name)
        browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.ask("document.documentElement.scrollWidth") <= width, f"it scrolls sideways at {width}"
        assert browser.ask("Number(getComputedStyle(document.querySelector('p:not([class])')).fontSize.slice(0, -2))") >= 16
        assert browser.ask("[...document.images].every(each => each.complete && each.naturalWidth > 300)")
    assert browser.complaints == []
    assert {url for url in browser.requested if not url.startswith("data:image/png")} == {(book / name).as_uri()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_lies_behind_it(book: Path, browser: Browser, dark: bool) -> None:
    browser.screen(1280, dark=dark)
    for name in ("06_double_quantization.html", "index.html", "myths.html", "nf4.html"):
        browser.open(book / name)
        browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
        browser.settle()
        worst, whose = browser.ask(CONTRAST)
        assert worst >= 4.5, f"{name}: {whose} has a contrast of {worst:.2f}"
        paper = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")


def test_the_measure_of_contrast_finds_a_text_that_cannot_be_read(book: Path, browser: Browser) -> None:
    browser.open(book / "index.html")
    browser.ask("document.querySelector('h1').style.color = '#eee'")
    assert browser.ask(CONTRAST)[0] < 1.3


@pytest.mark.parametrize("width", [1280, 390])
def test_clicks_lead_through_the_whole_book_and_back(book: Path, browser: Browser, width: int) -> None:
    browser.screen(width)
    browser.open(book / "index.html")
    order = [*(f"{path.stem}.html" for path in lesson_paths().values()), "myths.html"]
    for name in order:
        browser.click(".bottom .next")
        browser.wait_for_load()
        assert browser.ask("location.pathname").endswith(f"/{name}")
    for name in [*order[-2::-1], "index.html"]:
        browser.click(".top .prev")
        browser.wait_for_load()
        assert browser.ask("location.pathname").endswith(f"/{name}")
    browser.click(".contents li:nth-child(6) a")
    browser.wait_for_load()
    assert browser.ask("document.querySelector('h1').textContent") == "Double quantization"
    browser.click(".facts a")
    browser.wait_for_load()
    assert browser.ask("document.title") == "NF4 by hand"


def test_an_answer_is_hidden_until_it_is_asked_for_by_hand_or_by_key(book: Path, browser: Browser) -> None:
    browser.open(book / "06_double_quantization.html")
    seen = browser.ask(VISIBLE)
    assert len(seen) >= 4 and not any(seen)
    browser.click("summary")
    assert browser.ask(VISIBLE)[:2] == [True, True] and not browser.ask(VISIBLE)[-1]
    browser.ask("document.querySelectorAll('.guess input')[1].focus()")
    browser.send("Input.insertText", text="4.127")
    browser.key("Tab")
    browser.key("Enter")
    assert all(browser.ask(VISIBLE))
    assert browser.ask("document.querySelectorAll('.guess input')[1].value") == "4.127"


def test_print_shows_the_answers_and_no_navigation(book: Path, browser: Browser) -> None:
    browser.screen(800, medium="print", dark=True)
    browser.open(book / "06_double_quantization.html")
    assert all(browser.ask(VISIBLE)) and len(browser.ask(VISIBLE)) >= 4
    assert browser.ask("[...document.querySelectorAll('nav, summary')].every(each => !each.checkVisibility())")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", "white in dark mode too"
    assert browser.ask("[...document.querySelectorAll('pre')].every(each => each.scrollWidth <= each.clientWidth)")
    assert base64.b64decode(browser.send("Page.printToPDF", printBackground=True)["data"]).startswith(b"%PDF-")


def test_code_is_coloured_and_equations_are_set(book: Path, browser: Browser) -> None:
    browser.open(book / "11_adam_in_8_bits.html")
    colors = browser.ask("[...new Set([...document.querySelectorAll('.code span')].map(each => getComputedStyle(each).color))]")
    assert len(colors) >= 5
    tops = browser.ask("[...document.querySelectorAll('.aligned span')].map(each => each.getBoundingClientRect().top)")
    assert tops[0] == tops[1] < tops[2] == tops[3], "two equations side by side"
    browser.screen(390, touch=True)
    narrow = browser.ask("[...document.querySelectorAll('.aligned span')].map(each => each.getBoundingClientRect().top)")
    assert narrow == sorted(set(narrow)), "and one below the other on a phone"


def test_a_page_alone_in_a_folder_is_whole(book: Path, browser: Browser, tmp_path: Path) -> None:
    shutil.copy(book / "nf4.html", tmp_path / "mailed.html")
    browser.open(tmp_path / "mailed.html")
    assert browser.ask("document.getElementById('bits').textContent") == "4.127" and browser.complaints == []
    assert json.dumps(browser.requested) == json.dumps([(tmp_path / "mailed.html").as_uri()])
