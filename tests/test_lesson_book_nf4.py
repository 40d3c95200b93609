"""The page of sliders: its arithmetic is the package's to the bit, and so is what it shows after a drag."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minilora import NF4_CODE, quantize_nf4
from minilora.course.book.build import build
from minilora.quant.codebooks import DYNAMIC_8BIT
from minilora.quant.nf4 import NF4Tensor
from tests.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
MIDPOINTS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("nf4")
    build(folder / "out")
    browser = Browser(folder / "profile")
    browser.open(folder / "out" / "book" / "nf4.html")
    yield browser
    browser.close()


@pytest.fixture
def browser(open_browser: Browser) -> Iterator[Browser]:
    open_browser.screen(1280)
    open_browser.send("Page.reload")
    open_browser.wait_for_load()
    open_browser.settle()
    yield open_browser
    assert open_browser.complaints == []


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def with_outlier(n: int) -> Tensor:
    weights = normal(n, 1)
    weights[n // 2] = 50
    return weights


def beside_midpoints(blocks: int) -> Tensor:
    """Blocks of 64 with any largest weight, and the numbers next to each midpoint of it: there each rounding decides."""
    largest = normal(blocks, 2).abs()[:, None] + 0.1
    middle = MIDPOINTS * largest
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-math.inf, math.inf)]
    return torch.cat([largest, middle, *beside, torch.zeros(blocks, 18)], dim=1).view(-1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(64 * 300),                                     # more than one block of constants
    "an outlier": lambda: with_outlier(4096),
    "far from zero": lambda: normal(2048) + 3,
    "a short last block, an odd count": lambda: normal(1001),
    "on the midpoints": lambda: torch.cat([torch.ones(1), MIDPOINTS, torch.nextafter(MIDPOINTS, torch.ones(1)),
                                           torch.nextafter(MIDPOINTS, -torch.ones(1))]).repeat(9),
    "beside the midpoints of any scale": lambda: beside_midpoints(100),
    "on the levels": lambda: torch.cat([NF4_CODE, NF4_CODE * 3.7]),
    "zeros": lambda: torch.zeros(200),
    "some blocks of zeros": lambda: torch.cat([torch.zeros(128), normal(128), torch.zeros(64)]),
    "tiny": lambda: normal(512) * 1e-37,
    "below the smallest that is scaled": lambda: normal(512) * 1e-39,
    "huge": lambda: normal(512) * 1e36,
    "one": lambda: torch.tensor([-0.3]),
}


def as_list(weights: Tensor) -> str:
    """Float32 numbers as JavaScript reads them: exactly."""
    return f"Float32Array.from({json.dumps(weights.tolist())})"


def in_page(browser: Browser, weights: Tensor, made: NF4Tensor) -> dict[str, Any]:
    double = made.nested is not None
    offset = repr(made.nested.offset) if made.nested is not None else "undefined"
    call = f"quantizeNF4(w, {made.blocksize}, {json.dumps(double)}, {offset})"
    found = browser.ask(f"(() => {{ const w = {as_list(weights)}, q = {call}, list = Array.from; return JSON.stringify({{ "
                        "packed: list(q.packed), absmax: list(q.absmax), bits: q.bits, values: list(q.values), "
                        "codes: list(q.codes), error: rmsError(w, q.values), "
                        "nested: q.nested && {codes: list(q.nested.codes), absmax: list(q.nested.absmax)}}); })()")
    answer: dict[str, Any] = json.loads(found)
    return answer


@pytest.mark.parametrize("double", [False, True], ids=["float32 constants", "double quantization"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_its_bits_are_the_package_s(browser: Browser, kind: str, blocksize: int, double: bool) -> None:
    weights = WEIGHTS[kind]()
    made = quantize_nf4(weights, blocksize, double)
    found = in_page(browser, weights, made)
    assert found["packed"] == made.packed.tolist() and found["codes"] == made.codes().tolist()
    assert torch.equal(torch.tensor(found["absmax"]), made.absmax)
    assert torch.equal(torch.tensor(found["values"]), made.dequantize())
    assert found["bits"] == made.bits_per_param
    wanted = float((made.dequantize().double() - weights.double()).square().mean().sqrt())
    assert math.isclose(found["error"], wanted, rel_tol=1e-9, abs_tol=1e-300)
    if made.nested is not None:
        assert found["nested"] == {"codes": made.nested.codes.tolist(), "absmax": made.nested.absmax.tolist()}


def test_the_mean_that_it_subtracts_is_the_package_s_up_to_the_order_of_a_sum(browser: Browser) -> None:
    made = quantize_nf4(normal(64 * 300), 64, True)
    offset = browser.ask(f"encodeAbsmax({as_list(quantize_nf4(normal(64 * 300), 64, False).absmax)}).offset")
    assert made.nested is not None and math.isclose(offset, made.nested.offset, rel_tol=3e-7)


def test_its_tables_are_the_package_s(browser: Browser) -> None:
    assert browser.ask("Array.from(NF4_CODE)") == NF4_CODE.tolist()
    assert browser.ask("Array.from(DYNAMIC_8BIT)") == DYNAMIC_8BIT.tolist()


# What is shown


def shown(browser: Browser) -> dict[str, str]:
    browser.settle()
    texts: dict[str, str] = browser.ask("Object.fromEntries([...document.querySelectorAll('.tiles dd')].map("
                                        "each => [each.id, each.textContent]))")
    return texts


def drawn(browser: Browser, selector: str, attribute: str) -> list[float]:
    """A number of every mark of one kind."""
    numbers: list[float] = browser.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map("
                                       f"each => Number(each.getAttribute('{attribute}')))")
    return numbers


def setting(browser: Browser, name: str) -> float:
    return float(browser.ask(f"settings().{name}"))


def check_against_the_package(browser: Browser) -> None:
    """Everything the page says, from the weights that it made itself."""
    said, size = shown(browser), int(setting(browser, "blocksize"))
    weights = torch.tensor(browser.ask("Array.from(currentWeights(settings()))"))
    double, spread, at = browser.ask("settings().double"), setting(browser, "spread"), int(setting(browser, "weight"))
    made, other = quantize_nf4(weights, size, double), quantize_nf4(weights, size, not double)
    block = slice(at // size * size, at // size * size + size)
    error = (made.dequantize().double() - weights.double()).square()
    assert said["bits"] == f"{made.bits_per_param:.3f}" and said["bits-beside"].startswith(f"{other.bits_per_param:.3f} with ")
    assert math.isclose(float(said["error"]), float(error.mean().sqrt()) / spread, abs_tol=0.6e-4)
    assert math.isclose(float(said["error-beside"].split()[0]), float(error[block].mean().sqrt()) / spread, abs_tol=0.6e-4)
    codes = made.codes()
    assert said["used"] == f"{len(codes[block].unique())} of 16"
    exact = quantize_nf4(weights, size, False).absmax
    assert math.isclose(float(said["moved"].split()[0]), 100 * float((made.absmax / exact - 1).abs().mean()), abs_tol=0.006)
    # The picture of shares: sixteen grey bars as high as codes are frequent.
    heights = torch.tensor(drawn(browser, "#codes .grey", "height"))
    shares = torch.bincount(codes.long(), minlength=16) / len(codes)
    torch.testing.assert_close(heights / heights.max(), shares / shares.max(), atol=1e-4, rtol=1e-4)
    # The levels of the block, where they are drawn.
    width = browser.ask("document.getElementById('weights').viewBox.baseVal.width")
    levels = [(x - 14) / (width - 28) * 20 - 10 for x in drawn(browser, "#weights line.blue.faint", "x1")]
    torch.testing.assert_close(torch.tensor(levels), NF4_CODE * made.absmax[at // size], atol=1e-3, rtol=1e-3)
    # One weight on its way.
    way = browser.ask("Object.fromEntries([...document.querySelectorAll('#way tr')].map(row => [row.cells[0].textContent, "
                      "row.cells[1].textContent.replaceAll('−', '-')]))")
    assert way["nearest level"].endswith(f"code {int(codes[at])}")
    assert way["stored"] == f"{'low' if at % 2 else 'high'} four bits of the byte {int(made.packed[at // 2]):02x}"
    assert math.isclose(float(way["comes out as"].split(",")[0]), float(made.dequantize()[at]), abs_tol=0.6e-4)
    strip = browser.ask("[...document.querySelectorAll('#strip button')].map(each => each.textContent)")
    first = int(browser.ask("document.querySelector('#strip button').dataset.at"))
    assert strip == [f"{int(code):x}" for code in codes[first : first + len(strip)]] and first <= at < first + len(strip)


def test_at_first_it_shows_what_the_lessons_say(browser: Browser) -> None:
    check_against_the_package(browser)
    said = shown(browser)
    assert (said["bits"], said["error"]) == ("4.127", "0.0920")


def where(browser: Browser, name: str) -> tuple[float, float]:
    return browser.middle(f".handle[data-name={name}] .grip")


def unit(browser: Browser) -> float:
    """Pixels for a weight of 1."""
    return float(browser.ask("(document.getElementById('weights').getBoundingClientRect().width - 28) / 20"))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("name", "by", "becomes"), [
    ("mean", 1.5, 1.5), ("mean", -40, -3), ("spread", 1, 2), ("spread", -0.6, 0.4), ("outlier", 6, 6), ("outlier", -30, -10)])
def test_a_handle_that_is_dragged_moves_its_number(browser: Browser, width: int, name: str, by: float, becomes: float) -> None:
    browser.screen(width, touch=width < 500)
    browser.settle()
    x, y = where(browser, name)
    way = [(x + by * unit(browser) * part / 4, y + part) for part in range(1, 5)]
    (browser.swipe if width < 500 else browser.drag)((x, y), way)
    browser.settle()
    assert math.isclose(setting(browser, name), becomes, abs_tol=0.06), "up to a pixel and a step of the slider"
    assert [setting(browser, other) for other in ("mean", "spread", "outlier") if other != name] == [
        first for other, first in (("mean", 0), ("spread", 1), ("outlier", 0)) if other != name]
    check_against_the_package(browser)
    x_after, _ = where(browser, name)
    if abs(by) < 20:
        assert math.isclose(x_after, x + by * unit(browser), abs_tol=2.5), "the handle follows"
    browser.drag((x_after, y), [(x_after, y)])
    assert math.isclose(setting(browser, name), becomes, abs_tol=0.06), "and stays where it was let go"


def test_a_drag_beside_the_handles_and_a_move_without_a_press_change_nothing(browser: Browser) -> None:
    before, (x, y) = browser.ask("settings()"), where(browser, "mean")
    browser.drag((x - 150, y + 60), [(x + 100, y + 60)])
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + 50, y=y)
    browser.settle()
    assert browser.ask("settings()") == before


def test_an_outlier_takes_the_levels_from_its_block_and_larger_blocks_let_more_pay(browser: Browser) -> None:
    x, y = where(browser, "outlier")
    browser.drag((x, y), [(x + 10 * unit(browser), y)])
    few = shown(browser)
    assert int(few["used"].split()[0]) <= 9 and float(few["error"]) < 0.1 < 0.2 < float(few["error-beside"].split()[0])
    browser.ask("document.getElementById('size').focus()")
    for _ in range(6):
        browser.key("ArrowRight")
    assert setting(browser, "blocksize") == 4096
    assert float(shown(browser)["error"]) > 1.4 * float(few["error"])
    check_against_the_package(browser)


def test_double_quantization_is_switched_with_a_click_and_changes_no_code(browser: Browser) -> None:
    codes = "[...document.querySelectorAll('#strip button')].map(each => each.textContent).join('')"
    before, ring = browser.ask(codes), "Number(document.querySelector('#tradeoff .ring').getAttribute('cx'))"
    at = browser.ask(ring)
    browser.click("#double")
    assert shown(browser)["bits"] == "4.500" and shown(browser)["moved"] == "0.00 %" and browser.ask(ring) > at
    check_against_the_package(browser)
    browser.ask("document.getElementById('double').focus()")
    browser.key(" ")
    assert shown(browser)["bits"] == "4.127" and browser.ask(codes) == before and browser.ask(ring) == at


def test_the_curve_of_block_sizes_is_the_package_s(browser: Browser) -> None:
    browser.settle()
    weights = torch.tensor(browser.ask("Array.from(currentWeights(settings()))"))
    for color, double in (("gold", False), ("blue", True)):
        points = browser.ask(f"document.querySelector('#tradeoff .path.{color}').getAttribute('points').split(' ').map("
                             "point => point.split(',').map(Number))")
        made = [quantize_nf4(weights, 32 << step, double) for step in range(8)]
        wanted = torch.tensor([[each.bits_per_param, float((each.dequantize() - weights).square().mean().sqrt())]
                               for each in made])
        # Both axes are straight: distances along them are in one proportion.
        for axis in (0, 1):
            found = torch.tensor(points)[:, axis]
            torch.testing.assert_close((found - found[0]) / (found[-1] - found[0]),
                                       (wanted[:, axis] - wanted[0, axis]) / (wanted[-1, axis] - wanted[0, axis]),
                                       atol=2e-3, rtol=0)


def test_a_code_that_is_touched_is_followed_from_weight_to_weight(browser: Browser) -> None:
    browser.click("#strip span:nth-child(5) button:nth-child(2)")
    browser.settle()
    assert setting(browser, "weight") == 4992 + 9
    assert browser.ask("document.querySelectorAll('#strip [aria-pressed=true]').length") == 1
    check_against_the_package(browser)
    browser.ask("document.getElementById('weight').focus()")
    browser.key("ArrowLeft")
    assert setting(browser, "weight") == 5000


def test_a_click_brings_back_the_beginning(browser: Browser) -> None:
    first = browser.ask("settings()")
    browser.ask("document.getElementById('spread').focus()")
    browser.key("ArrowRight")
    browser.click("#double")
    assert browser.ask("settings()") == first | {"spread": 1.05, "double": False}
    browser.click("#reset")
    assert browser.ask("settings()") == first and shown(browser)["bits"] == "4.127"


def test_what_it_gives_to_try_comes_out_as_it_says(browser: Browser) -> None:
    first = float(shown(browser)["error"])
    for spread in (0.1, 0.5, 3):
        browser.ask(f"set('spread', {spread})")
        assert math.isclose(float(shown(browser)["error"]), first, rel_tol=0.001), "errors in spreads do not change with it"
    browser.click("#reset")
    browser.ask("set('mean', 3)")
    browser.settle()
    heights = drawn(browser, "#codes .grey", "height")
    assert sum(heights[:7]) < 0.01 * sum(heights), "the half of the table below zero is wasted"


@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("settings", [{}, {"outlier": 10, "spread": 3, "mean": 3}, {"outlier": -10, "mean": -3, "spread": 0.1}])
def test_every_word_of_a_picture_lies_inside_it(browser: Browser, width: int, settings: dict[str, float]) -> None:
    browser.screen(width, touch=width < 500)
    for name, value in settings.items():
        browser.ask(f"set('{name}', {value})")
    browser.settle()
    words = browser.ask("[...document.querySelectorAll('svg text')].map(each => { const word = each.getBoundingClientRect(), "
                        "all = each.closest('svg').getBoundingClientRect(); return [each.textContent, word.left - all.left, "
                        "all.right - word.right, word.top - all.top, all.bottom - word.bottom]; })")
    assert len(words) > 30 and [word for word, *room in words if min(room) < -1] == []
    labels = browser.ask("[...document.querySelectorAll('#codes .middle')].map(each => each.textContent)")
    assert labels == [str(code) for code in range(16)]


def test_letters_keep_their_size_when_the_window_becomes_narrow(browser: Browser, tmp_path: Path) -> None:
    browser.screen(390, touch=True)
    browser.settle()
    assert browser.ask("document.getElementById('weights').viewBox.baseVal.width") == 358
    assert browser.ask("document.querySelector('#codes .tick').getBoundingClientRect().height") > 11
    browser.picture(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 20_000
