"""Answers as readers write them: right ones pass however they are written, wrong ones don't, and are told why."""
from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minilora.cli import main
from minilora.course.exercise_08 import HEADS
from minilora.course.grading import Verdict, difference, grade, load_answers
from minilora.course.progress import check, stub_of, tasks_of
from minilora.memory import moment_bytes


class Answer(NamedTuple):
    """One function of an exercise, as text; `words` of what the grader says to it, where it is wrong."""

    number: int
    name: str
    text: str
    words: str = ""


def graded(answer: Answer, folder: Path) -> Verdict:
    file = folder / "mine.py"
    file.write_text(answer.text)
    task = next(task for task in tasks_of(answer.number) if task.name == answer.name)
    return grade(task, getattr(load_answers(file), answer.name), file)


def start(matrix: str) -> str:
    return f"import math\nimport torch\n\ndef lora_start(i, o, r):\n    return {matrix}, torch.zeros(o, r)\n"


def frozen(forward: str, backward: str) -> str:
    return ("import torch\n\nheld = {}\n\nclass FrozenProduct(torch.autograd.Function):\n    @staticmethod\n"
            "    def forward(ctx, x, weight):\n" + "".join(f"        {line}\n" for line in forward.split("; ")) +
            "\n    @staticmethod\n    def backward(ctx, g):\n" + "".join(f"        {line}\n" for line in backward.split("; ")))


def heads(index: str) -> str:
    return ("import torch\n\ndef shared_heads(q, k, v):\n    out, n = [], q.shape[1]\n    for h in range(len(q)):\n"
            f"        g = {index}\n        scores = q[h] @ k[g].T / q.shape[-1] ** 0.5\n"
            "        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)\n"
            "        out.append(scores.softmax(-1) @ v[g])\n    return torch.stack(out)\n")


def adamw(denominator: str) -> str:
    return ("def adamw_step(p, g, m, v, t, lr, decay):\n    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g\n"
            "    mh, vh = m / (1 - 0.9 ** t), v / (1 - 0.999 ** t)\n"
            f"    return p * (1 - lr * decay) - lr * mh / ({denominator}), m, v\n")


def rate(rising: str, start: str = "w") -> str:
    return ("import math\n\ndef learning_rate(step, total, peak, warmup):\n"
            f"    w = {rising} if warmup else 0\n    if step <= w:\n        return peak * step / w\n    begin = {start}\n"
            "    return peak * (1 + math.cos(math.pi * (step - begin) / (total + 1 - begin))) / 2\n")


def checkpoint(back: str) -> str:
    """By saved tensors' hooks: the block is called again at the first tensor that is asked for."""
    return ("import torch\nfrom torch.autograd.graph import saved_tensors_hooks\n\ndef checkpoint(block, x):\n"
            "    state, needs, made, numbers = torch.get_rng_state(), x.requires_grad, [], [0]\n    x_kept = x.detach()\n"
            "    def pack(tensor):\n        numbers[0] += 1\n        return numbers[0] - 1\n"
            "    def unpack(number):\n        if not made:\n            before = torch.get_rng_state()\n"
            "            torch.set_rng_state(state)\n"
            "            with torch.enable_grad(), saved_tensors_hooks(lambda t: made.append(t.detach()), lambda n: n):\n"
            f"                block(x_kept.detach().requires_grad_(needs))\n            {back}\n        return made[number]\n"
            "    with saved_tensors_hooks(pack, unpack):\n        return block(x)\n")


def doubly(mean: str) -> str:
    return ("from minilora.quant.blockwise import quantize_blockwise\nfrom minilora.quant.codebooks import DYNAMIC_8BIT\n\n"
            f"def encode_absmax(absmax):\n    offset = {mean}\n"
            "    return *quantize_blockwise(absmax - offset, DYNAMIC_8BIT, 256), offset\n")


def match(same: str) -> str:
    return ("def exact_match(predictions, references):\n    def same(text):\n        return " + same +
            "\n    return sum(same(p) == same(r) for p, r in zip(predictions, references)) / len(references)\n")


REBUILT = "ctx.weight = weight; return x @ weight.dequantize().T"
BY_HAND = "(codes[weight.codes().int()].view(-1, 64) * weight.absmax[:, None]).view(weight.shape)"
MOMENTS = ("def moment_bytes(size, bits):\n    if bits == 32 or size {} 4096:\n        return 8 * size\n"
           "    return 2 * (size + 4 * -(-size // 256))\n")
SHARED = "def sharded_bytes(linear, other, processes):\n    return linear * {} / 8 / processes + 2 * other\n"
RIGHT = [
    Answer(3, "lora_start", start("(torch.rand(r, i) * 2 - 1) / math.sqrt(i)")),
    Answer(3, "lora_start", start("torch.empty(r, i).uniform_(-i ** -0.5, i ** -0.5)")),
    Answer(3, "lora_start", start("torch.nn.init.kaiming_uniform_(torch.empty(r, i), a=5 ** 0.5)")),
    Answer(3, "lora_start", start("torch.nn.Linear(i, r).weight")),
    Answer(6, "encode_absmax", doubly("float(absmax.double().mean())")),
    Answer(6, "encode_absmax", doubly("sum(absmax.tolist()) / len(absmax)")),
    Answer(6, "encode_absmax", doubly("absmax.mean().item()")),
    Answer(7, "FrozenProduct", frozen(REBUILT, "return g @ ctx.weight.dequantize(), None")),
    Answer(7, "FrozenProduct", frozen("ctx.weight = weight; dense = weight.dequantize(torch.float32); return x @ dense.T",
                                      "dense = ctx.weight.dequantize(g.dtype); return g.mm(dense), None")),
    Answer(7, "FrozenProduct", frozen("ctx.weight = weight; held['w'] = torch.empty(weight.shape); "
                                      "return x @ weight.dequantize(out=held['w']).T",
                                      "return g @ ctx.weight.dequantize(out=held['w']), None")),
    Answer(7, "FrozenProduct", "from minilora.quant.codebooks import NF4_CODE as codes\n" + frozen(
        f"ctx.weight = weight; return x @ {BY_HAND}.T", f"weight = ctx.weight; return g @ {BY_HAND}, None")),
    Answer(8, "shared_heads", heads("h // (len(q) // len(k))")),
    Answer(8, "shared_heads", heads("h * len(k) // len(q)")),
    Answer(11, "adamw_step", adamw("vh.sqrt() + 1e-8")),
    Answer(12, "moment_bytes", MOMENTS.format("<")),
    Answer(13, "checkpoint", checkpoint("torch.set_rng_state(before)")),
    Answer(14, "learning_rate", rate("max(1, round(total * warmup))")),
    Answer(15, "exact_match", match("' '.join(text.lower().split())")),
    Answer(19, "sharded_bytes", SHARED.format("4.127")),
    Answer(19, "sharded_bytes", SHARED.format("(4 + 8 / 64 + 32 / (64 * 256))")),
]
KEPT = "the dense weight is kept from forward to backward"
WRONG = [
    Answer(3, "lora_start", start("torch.rand(r, i) / math.sqrt(i)"), "no entry of A is negative"),
    Answer(3, "lora_start", start("torch.full((r, i), 1 / math.sqrt(i))"), "A has rank 1"),
    Answer(3, "lora_start", start("(torch.rand(1, i) * 2 - 1).expand(r, i) / math.sqrt(i)"), "all rows of A are the same"),
    Answer(3, "lora_start", start("torch.zeros(r, i).index_put((torch.tensor([0]), torch.tensor([0])), "
                                  "torch.tensor(1 / math.sqrt(i)))"), "A has rank 1"),
    Answer(3, "lora_start", start("torch.randn(r, i) / math.sqrt(3 * i)"), "A is normal"),
    Answer(3, "lora_start", start("(torch.randint(0, 2, (r, i)) * 2 - 1) / math.sqrt(i)"), "spread of A"),
    Answer(5, "pack", "def pack(codes):\n    codes = codes.float()\n    return codes[0::2] << 4 | codes[1::2]\n", "(line 3)"),
    Answer(7, "FrozenProduct", frozen("w = weight.dequantize(); ctx.kept = [w]; return x @ w.T",
                                      "return g @ ctx.kept[0], None"), KEPT),
    Answer(7, "FrozenProduct", frozen("w = weight.dequantize(); ctx.kept = lambda: w; return x @ w.T",
                                      "return g @ ctx.kept(), None"), KEPT),
    Answer(7, "FrozenProduct", frozen("held['w'] = weight.dequantize().T; return x @ held['w']",
                                      "return g @ held['w'].T, None"), KEPT),
    Answer(7, "FrozenProduct", frozen("ctx.kept = [weight.dequantize().clone()]; return x @ ctx.kept[0].T",
                                      "return g @ ctx.kept[0], None"), KEPT),
    Answer(7, "FrozenProduct", frozen("held['w'] = torch.empty(weight.shape); return x @ weight.dequantize(out=held['w']).T",
                                      "return g @ held['w'], None"), KEPT),
    Answer(7, "FrozenProduct", frozen("ctx.weight = weight; held['w'] = weight.dequantize(); return x @ held['w'].T",
                                      "return g @ ctx.weight.dequantize(), None"), KEPT),
    Answer(8, "shared_heads", heads("h // len(k)"), "H // Hkv query heads share"),
    Answer(8, "shared_heads", heads("h // 2"), "you wrote down"),
    Answer(8, "shared_heads", heads("h % len(k)"), "neighbours share"),
    Answer(11, "adamw_step", adamw("vh.sqrt()"), "eps is missing"),
    Answer(11, "adamw_step", adamw("(vh + 1e-8).sqrt()"), "eps is added to the root"),
    Answer(11, "adamw_step", adamw("((v.sqrt() + 1e-8) / (1 - 0.999 ** t) ** 0.5)"), "after the correction"),
    Answer(12, "moment_bytes", MOMENTS.format("<="), "of exactly 4,096"),
    Answer(13, "checkpoint", checkpoint("pass"), "generator"),
    Answer(14, "learning_rate", rate("max(1, int(total * warmup))"), "round(total * warmup)"),
    Answer(14, "learning_rate", rate("math.ceil(total * warmup)"), "round(total * warmup)"),
    Answer(14, "learning_rate", rate("max(1, round(total * warmup))", "max(w, 1)"), "begins at step 0"),
    Answer(15, "exact_match", match("''.join(text.lower().split())"), "'CTBrain'"),
    Answer(18, "dora_weight", "def dora_weight(weight, a, b, scaling, m):\n    sum = weight + scaling * b @ a\n"
           "    return m[:, None] * sum / sum.norm(dim=0)\n", "the paper's columns: its W is (in, out)"),
    Answer(19, "sharded_bytes", SHARED.format("4.125"), "constants of the constants"),
    Answer(1, "training_bytes", "def training_bytes(parameters):\n    return 16.0 * parameters\n", "return an int: use int("),
    Answer(6, "encode_absmax", doubly("absmax.mean()"), "return a float: use float(...)"),
    Answer(16, "update_cosine", "import torch\n\ndef update_cosine(merged, trained, base):\n    return torch.cosine_similarity("
           "(merged - base).flatten(), (trained - base).flatten(), dim=0)\n", "return a float: use float(...)"),
    Answer(16, "update_cosine", "import numpy\n\ndef update_cosine(merged, trained, base):\n    return numpy.float32(0)\n",
           "return a float: use float(...)"),
]


@pytest.mark.parametrize("answer", RIGHT, ids=lambda answer: f"{answer.number:02d}-{answer.name}")
def test_a_right_answer_is_right_however_it_is_written(answer: Answer, tmp_path: Path) -> None:
    verdict = graded(answer, tmp_path)
    assert verdict.state == "right", verdict.message


@pytest.mark.parametrize("answer", WRONG, ids=lambda answer: f"{answer.number:02d}-{answer.name}")
def test_a_wrong_answer_is_told_what_is_wrong_with_it(answer: Answer, tmp_path: Path) -> None:
    verdict = graded(answer, tmp_path)
    assert verdict.state == "wrong" and answer.words in verdict.message, verdict


def test_a_start_is_judged_alike_whatever_numbers_are_drawn() -> None:
    task = next(task for task in tasks_of(3) if task.name == "lora_start")
    draws = random.Random(0)

    def own_generator(i: int, o: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(draws.randrange(1 << 30))
        return torch.empty(r, i).uniform_(-i ** -0.5, i ** -0.5, generator=generator), torch.zeros(o, r)

    assert {grade(task, own_generator).state for _ in range(300)} == {"right"}


def test_heads_are_shared_in_more_ways_than_one() -> None:
    assert {(4, 2), (6, 2), (8, 2), (4, 4), (4, 1)} <= set(HEADS)
    assert any(n // kv != 2 and (n - 1) // kv < kv for n, kv in HEADS), "h // Hkv is a head, and a wrong one"
    assert any(n // kv != 2 and (n - 1) // 2 < kv for n, kv in HEADS), "h // 2 is a head, and a wrong one"


def test_the_smallest_parameter_of_8_bits_is_asked_for() -> None:
    task = next(task for task in tasks_of(12) if task.name == "moment_bytes")
    assert (4096, 8) in task.fixed and moment_bytes(4096, 8) < moment_bytes(4095, 8)


# -- open or wrong ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "state"), [
    ("def trained_numbers(i, o, r):\n    raise NotImplementedError\n", "open"),
    ("def trained_numbers(i, o, r):\n    raise NotImplementedError('later')\n", "open"),
    ("def trained_numbers(i, o, r): raise NotImplementedError\n", "open"),
    ("def _later():\n    raise NotImplementedError\n\ndef trained_numbers(i, o, r):\n    return _later()\n", "open"),
    ("import torch\n\ndef trained_numbers(i, o, r):\n    return torch.ones(2) << 4\n", "wrong"),
    ("import torch\n\ndef trained_numbers(i, o, r):\n    return torch.nn.Module()(i)\n", "wrong")])
def test_only_the_readers_own_stub_is_open(text: str, state: str, tmp_path: Path) -> None:
    verdict = graded(Answer(2, "trained_numbers", text), tmp_path)
    assert verdict.state == state
    if state == "wrong":
        assert "NotImplementedError: " in verdict.message and verdict.message.endswith("(line 4)")


def test_a_class_of_which_one_half_is_written_is_open(tmp_path: Path) -> None:
    for forward, backward in ((REBUILT, "raise NotImplementedError"), ("raise NotImplementedError", "return g, None")):
        assert graded(Answer(7, "FrozenProduct", frozen(forward, backward)), tmp_path).state == "open"


def test_the_line_is_named_wherever_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def trained_numbers(i, o, r):\n    return r / 0\n\n"
                                      "def low_rank(weight, r):\n    raise NotImplementedError\n")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for file in ("../mine.py", str(tmp_path / "mine.py"), "../inside/../mine.py"):
        assert main(["check", "2", "--file", file]) == 2
        printed = capsys.readouterr().out
        assert "division by zero (line 2)" in printed and "open   low_rank" in printed
    monkeypatch.chdir(tmp_path)
    assert [verdict.state for verdict in check(2, "mine.py")] == ["wrong", "open"]


# -- numbers of another type -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "right", "words"), [
    (torch.tensor(2.125), 2.125, "found a tensor, return a float: use float(...)"),
    (torch.tensor([7.0]), 2.125, "found a tensor, return a float: use float(...)"),
    (torch.tensor(3), 3, "found a tensor, return an int: use int(...)"),
    (16000.0, 16000, "found the float 16000, return an int: use int(...) or //"),
    (12000.0, 16000, "found 12000, right is 16000"), (12000, 16000, "found 12000, right is 16000"),
    (True, 1, "found True, right is 1"), ("1", 1.0, "found '1', right is 1"),
    (torch.ones(3, 3), 2.0, "found <float32 3x3>, right is 2")])
def test_a_number_of_another_type_is_told_by_its_type(given: object, right: float, words: str) -> None:
    assert difference(given, right, 1e-5) == words


# -- what stubs say ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "words"), [
    (3, "the paper draws them from a Gaussian"), (11, "eps 1e-8 beside the root of the corrected v"),
    (13, "the random generator is where it was"), (14, "from the peak at step w, which is 0 without warm-up"),
    (9, "before the next is read")])
def test_a_stub_says_what_its_grader_asks_for(number: int, words: str) -> None:
    assert words in " ".join(stub_of(number).read_text(encoding="utf-8").split())
