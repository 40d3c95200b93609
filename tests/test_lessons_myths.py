"""The myths page: each of the thirty-two has a place that shows it, where its figures stand; what no lesson shows is here."""
from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from minilora import LoRAConfig, NF4Linear, add_lora, load_model, quantize_nf4
from minilora.course.lesson import lesson_paths, lessons_folder, read_lesson
from minilora.memory import Workload, predict
from minilora.shapes import shape_of
from tests.test_lessons import code, numbers, prose

MYTHS = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## |\Z)", (lessons_folder() / "MYTHS.md").read_text(encoding="utf-8"),
                   re.MULTILINE | re.DOTALL)
EACH = pytest.mark.parametrize(("number", "text"), MYTHS)


def two_of_seven_linears() -> set[str]:
    def millions(targets: tuple[str, ...]) -> str:
        return f"{predict(shape_of('7b'), Workload('qlora', r=64, target_modules=targets)).adapters / 4e6:.1f}"
    return {millions(("q_proj", "v_proj")), millions(LoRAConfig().target_modules)}


def lora_quantizes_nothing() -> set[str]:
    model = add_lora(load_model("tiny", quantize=None), LoRAConfig(r=4))
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) > 100       # bases, A and B
    return set()


def block_sizes() -> set[str]:
    weights, found = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)), set()
    for size in (32, 64, 256):
        q = quantize_nf4(weights, size, double_quant=False)
        found |= {str(size), f"{q.bits_per_param}", f"{float((q.dequantize() - weights).square().mean().sqrt()):.4f}"}
    return found


def activations_stay() -> set[str]:
    full, lora = (predict(shape_of("7b"), Workload(kind, seq=512, compute=torch.float32)).activations
                  for kind in ("full", "lora"))
    assert 0.85 < lora / full < 1, lora / full
    return set()


TESTS = {check.__name__: check for check in (two_of_seven_linears, lora_quantizes_nothing, block_sizes, activations_stay)}


def test_there_are_thirty_two_and_they_are_numbered() -> None:
    assert [int(number) for number, _ in MYTHS] == list(range(1, 33))


@EACH
def test_a_myth_says_what_is_true_and_where_it_is_shown(number: str, text: str) -> None:
    assert re.match(r'\*\*"[^*]+\*\* \S', text), "what is said, in bold, then what is true"
    named = re.search(r"\*(?:Lessons? ([\d, ]+)|Test: (\w+))\.\*\s*$", text)
    assert named, "ends with the place"
    shown, computed = "", set[str]()
    if named[1]:
        paths = lesson_paths()
        lessons = [read_lesson(paths[int(each)]) for each in named[1].split(",")]
        # A lesson's own test holds its prose against what its code computes.
        shown = "\n".join(prose(lesson) + code(lesson) for lesson in lessons)
    else:
        computed = TESTS[named[2]]()
    said = numbers(re.sub(r"\*(?:Lesson|Test).*", "", " ".join(text.split())))
    assert said - numbers(shown) - computed == set(), "figures that nothing derives"


def test_a_figure_that_nothing_derives_is_found() -> None:
    with pytest.raises(AssertionError, match="nothing derives"):
        test_a_myth_says_what_is_true_and_where_it_is_shown("1", '**"X."** It is 7.777 GB. *Lesson 06.*\n')
