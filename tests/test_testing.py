"""The oracle: the specifications by hand, against each other, and the package against them."""
from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import NF4_CODE, LoRAConfig, add_lora, load_model, quantize_nf4, testing
from minilora.data.batches import collate
from minilora.data.prompts import Example
from minilora.layers.lora import LoRALinear
from minilora.llama.model import LlamaForCausalLM
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.quant.codebooks import DYNAMIC_8BIT, dynamic_map
from tests.models import write_model

POSTED = [-1.0, -0.6962, -0.525, -0.394, -0.284, -0.18, -0.076, 0.0, 0.076, 0.18, 0.284, 0.394, 0.525, 0.6962, 1.0]
CODE = NF4_CODE.tolist()


# -- codebooks --------------------------------------------------------------------------------------------------------
def test_the_derived_levels_are_the_stored_ones() -> None:
    testing.check_nf4_code(NF4_CODE)
    testing.check_nf4_code(testing.nf4_code())
    assert testing.nf4_code() == CODE, "bits are compared by the levels that files hold"
    for signed, stored in ((True, DYNAMIC_8BIT), (False, dynamic_map(False))):
        assert testing.dynamic_code(signed) == stored.tolist()
        exact = testing.dynamic_code(signed, precision=float)
        assert max(abs(a - b) for a, b in zip(exact, stored.tolist(), strict=True)) < 1e-7


def test_a_level_between_the_derived_and_the_stored_one_is_packed_as_files_have_it() -> None:
    w = torch.tensor([1.0, -0.8480963706970215])
    codes, _ = testing.quantize(w, testing.nf4_code())
    assert testing.pack(codes) == quantize_nf4(w, double_quant=False).packed.tolist() == [0xF0]
    assert testing.quantize(w, testing.derived_nf4_code())[0] == [15, 1]


@given(values=testing.weights(min_size=0, max_size=3), longer=testing.weights(min_size=7, max_size=5),
       batch=testing.batches(7, max_length=1))
def test_strategies_take_the_ends_of_their_ranges(values: list[float], longer: list[float],
                                                  batch: list[tuple[list[int], list[int]]]) -> None:
    assert len(values) <= 3 and len(longer) == 7 and all(len(ids) == 3 for ids, _ in batch)


def test_wrong_tables_found_in_the_wild_are_caught() -> None:
    with pytest.raises(AssertionError, match="NF4 has 16 levels, found 15"):
        testing.check_nf4_code(POSTED)
    # The even spacing of probabilities that popular explanations give: no zero.
    from statistics import NormalDist
    even = [NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)]
    with pytest.raises(AssertionError, match="level 1 is "):
        testing.check_nf4_code([level / max(even) for level in even])


# -- quantization -----------------------------------------------------------------------------------------------------
@given(testing.weights(), st.sampled_from((1, 2, 7, 64, 256)))
def test_quantization_equals_the_specification_to_the_bit(values: list[float], blocksize: int) -> None:
    q = quantize_nf4(torch.tensor(values), blocksize, double_quant=False)
    codes, absmax = testing.quantize(values, CODE, blocksize)
    assert q.codes().tolist() == codes and q.absmax.tolist() == absmax
    assert q.packed.tolist() == testing.pack(codes) and testing.unpack(q.packed, len(values)) == codes
    assert q.dequantize().tolist() == testing.dequantize(codes, absmax, CODE, blocksize)


@given(testing.weights(max_size=200))
def test_float32_and_exact_arithmetic_differ_next_to_midpoints_only(values: list[float]) -> None:
    if max(map(abs, values)) < 1e-30:       # there float32 stops scaling, by definition
        return
    codes, absmax = testing.quantize(values, CODE, 64)
    exact, _ = testing.quantize(values, CODE, 64, float)
    for position, (code, best) in enumerate(zip(codes, exact, strict=True)):
        if code != best:
            scaled = values[position] / absmax[position // 64]
            midpoint = (CODE[min(code, best)] + CODE[max(code, best)]) / 2
            assert abs(code - best) == 1 and abs(scaled - midpoint) < 2.0 ** -22, (position, scaled)


@given(st.lists(testing.weights(max_size=64), min_size=1, max_size=5))
def test_blocks_know_nothing_of_each_other(blocks: list[list[float]]) -> None:
    filled = [(block * 64)[:64] for block in blocks]
    whole = quantize_nf4(torch.tensor(filled), double_quant=False)
    alone = [quantize_nf4(torch.tensor(block), double_quant=False) for block in filled]
    assert torch.equal(whole.packed, torch.cat([q.packed for q in alone]))
    backwards = quantize_nf4(torch.tensor(filled[::-1]), double_quant=False)
    assert torch.equal(backwards.absmax, whole.absmax.flip(0))


@given(testing.weights(min_size=65, max_size=700))
def test_double_quantization_equals_the_specification_from_the_same_mean(values: list[float]) -> None:
    if max(map(abs, values)) > 1e36:        # the sum of such constants may leave float32: refused, tested elsewhere
        return
    plain, double = (quantize_nf4(torch.tensor(values), 1, double_quant=nested) for nested in (False, True))
    assert double.nested is not None
    codes, nested, offset = testing.double_quantize(plain.absmax, offset=double.nested.offset)
    stored = [float(level) for level in DYNAMIC_8BIT]
    if codes != double.nested.codes.tolist():       # the derived table is rounded apart from the stored one
        centred = [testing.float32(constant - offset) for constant in plain.absmax.tolist()]
        codes, nested = testing.quantize(centred, stored, 256)
    assert double.nested.codes.tolist() == codes and double.nested.absmax.tolist() == nested
    mean = math.fsum(plain.absmax.tolist()) / len(values)
    assert abs(mean - offset) <= 1e-5 * max(plain.absmax.tolist()), "the offset is the mean"
    decoded = testing.double_dequantize(codes, nested, offset)
    assert max(abs(a - b) for a, b in zip(decoded, double.absmax.tolist(), strict=True)) <= 1e-6 * max(map(abs, values)) + 1e-44


def test_wrong_implementations_are_caught() -> None:
    """Each mistake people make changes what the specification says of one short list."""
    values = [0.9, -0.5, 0.03, 0.0, 0.31, -0.9, 0.12]
    codes, _ = testing.quantize(values, CODE)
    right = testing.pack(codes)
    assert [low * 16 + high for high, low in zip([*codes, 7][0::2], [*codes, 7][1::2], strict=True)] != right
    assert testing.quantize(values, [*POSTED[:8], 0.05, *POSTED[8:]])[0] != codes
    assert testing.double_quantize([1.0, 2.0, 4.0])[0] != testing.quantize([1.0, 2.0, 4.0], testing.dynamic_code(), 256)[0]


# -- LoRA -------------------------------------------------------------------------------------------------------------
def _layer(weight: Any, lora_a: Any, lora_b: Any, alpha: int) -> LoRALinear:
    base = torch.nn.Linear(len(weight[0]), len(weight), bias=False).double()
    base.weight.data.copy_(torch.tensor(weight, dtype=torch.float64))
    layer = LoRALinear(base, r=len(lora_a), alpha=alpha).double()
    layer.lora_A.weight.data.copy_(torch.tensor(lora_a, dtype=torch.float64))
    layer.lora_B.weight.data.copy_(torch.tensor(lora_b, dtype=torch.float64))
    return layer


LORA = st.tuples(testing.matrices(3, 5), testing.matrices(4, 5), testing.matrices(2, 5), testing.matrices(4, 2),
                 testing.matrices(3, 4), st.sampled_from((1, 2, 16)))


@given(LORA)
def test_lora_equals_the_specification_forwards_and_backwards(drawn: tuple[Any, ...]) -> None:
    x, weight, lora_a, lora_b, grad_y, alpha = drawn
    layer = _layer(weight, lora_a, lora_b, alpha)
    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = layer(inputs)
    y.backward(torch.tensor(grad_y, dtype=torch.float64))
    close(y, testing.lora_forward(x, weight, lora_a, lora_b, alpha / 2))
    grad_x, grad_a, grad_b = testing.lora_gradients(x, weight, lora_a, lora_b, alpha / 2, grad_y)
    close(inputs.grad, grad_x)
    close(layer.lora_A.weight.grad, grad_a)
    close(layer.lora_B.weight.grad, grad_b)


@given(LORA)
def test_the_specified_gradients_are_those_of_finite_differences(drawn: tuple[Any, ...]) -> None:
    x, weight, lora_a, lora_b, grad_y, alpha = drawn
    found = testing.lora_gradients(x, weight, lora_a, lora_b, alpha / 2, grad_y)

    def loss(x: Any, lora_a: Any, lora_b: Any) -> float:
        y = testing.lora_forward(x, weight, lora_a, lora_b, alpha / 2)
        return math.fsum(a * b for row, grad in zip(y, grad_y, strict=True) for a, b in zip(row, grad, strict=True))

    for which, gradient in enumerate(found):
        arguments = [x, lora_a, lora_b]
        moved = [[list(row) for row in argument] for argument in arguments]
        moved[which][1][0] += 1.0           # the loss is linear in each argument alone: any step is exact
        assert loss(*moved) - loss(*arguments) == pytest.approx(gradient[1][0], abs=1e-9)


@given(LORA)
def test_a_zero_b_is_the_identity_and_two_updates_add_up(drawn: tuple[Any, ...]) -> None:
    x, weight, lora_a, lora_b, _, alpha = drawn
    inputs, zero = torch.tensor(x, dtype=torch.float64), [[0.0] * 2] * 4
    plain = _layer(weight, lora_a, zero, alpha)(inputs)
    close(plain, testing.matmul(x, testing.transpose(weight)))
    doubled = _layer(weight, lora_a, [[2 * value for value in row] for row in lora_b], alpha)(inputs)
    once = _layer(weight, lora_a, lora_b, alpha)(inputs)
    close(doubled - plain, (2 * (once - plain)).tolist())


def close(found: torch.Tensor | None, expected: Any) -> None:
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


# -- AdamW ------------------------------------------------------------------------------------------------------------
@given(st.lists(testing.matrices(1, 6), min_size=1, max_size=5), st.sampled_from((0.0, 0.1)))
def test_adamw_equals_the_specification(gradients: list[list[list[float]]], decay: float) -> None:
    start = [0.5, -1.0, 0.0, 2.0, 1e-3, -3.0]
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = AdamW([parameter], lr=0.01, weight_decay=decay)
    expected, first, second = start, [0.0] * 6, [0.0] * 6
    for step, [gradient] in enumerate(gradients, 1):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        expected, first, second = testing.adamw(expected, gradient, first, second, step, 0.01, weight_decay=decay)
    close(parameter.detach(), expected)
    close(optimizer.state[parameter]["exp_avg_sq"], second)


def test_eight_bit_moments_follow_the_full_ones() -> None:
    start, codes = [1.0, -1.0, 0.5], ([127] * 3, [0.0])
    full, first, second = start, [0.0] * 3, [0.0] * 3
    small, m, v = start, codes, ([0] * 3, [0.0])
    for step in range(1, 20):
        gradient = [math.sin(step), 0.3, -0.01 * step]
        full, first, second = testing.adamw(full, gradient, first, second, step, 0.01)
        small, m, v = testing.adamw_8bit(small, gradient, m, v, step, 0.01)
    assert small != full and small == pytest.approx(full, abs=0.02)
    assert max(m[0]) <= 255 and testing.dequantize(*v, testing.dynamic_code(False), 256) == pytest.approx(second, rel=0.1)


# -- loss and mask ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return load_model(write_model(tmp_path_factory.mktemp("m"), std=0.3), quantize=None, dtype=torch.float32)


@settings(deadline=None, max_examples=25)
@given(testing.batches(vocabulary=200))
def test_loss_equals_the_specification_however_the_step_is_cut(model: LlamaForCausalLM,
                                                               made: list[tuple[list[int], list[int]]]) -> None:
    examples = [Example(ids, labels) for ids, labels in made]
    with torch.no_grad():
        logits = [model(torch.tensor([example.input_ids]))[0] for example in examples]
        expected = testing.masked_loss(logits, [example.labels for example in examples])
        tokens = sum(collate([example], 0).label_tokens for example in examples)
        for cut in (len(examples), 1, 2):
            parts = [collate(examples[at : at + cut], 0) for at in range(0, len(examples), cut)]
            found = sum(float(label_loss(model, part)) for part in parts) / tokens
            assert found == pytest.approx(expected, rel=2e-5), cut


def test_a_loss_needs_a_label() -> None:
    with pytest.raises(ValueError, match="no position carries loss"):
        testing.masked_loss([[[0.0, 1.0]] * 2], [[-100, -100]])
    assert testing.masked_loss([[[0.0, 0.0]] * 3], [[-100, 1, 0]]) == pytest.approx(math.log(2))
    assert testing.label_mask([5, 6], [7], 2) == ([5, 6, 7, 2], [-100, -100, 7, 2])


# -- checkpoints ------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=20)
@given(testing.checkpoint_shapes())
def test_any_small_llama_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]) -> None:
    folder: Path = tmp_path_factory.mktemp("shape")
    from minilora.llama.checkpoint import save_checkpoint
    from minilora.llama.config import LlamaConfig
    model = LlamaForCausalLM(LlamaConfig.from_dict(raw))
    model.init_weights(torch.Generator().manual_seed(0), 0.3)
    save_checkpoint(model, folder)
    again = load_model(folder, quantize=None, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids), again(ids))
    add_lora(again, LoRAConfig(r=2))
    assert torch.equal(model(ids), again(ids)), "fresh adapters change nothing"


@pytest.mark.parametrize("strategy", [testing.weights, lambda: testing.batches(9), testing.checkpoint_shapes])
def test_strategies_reach_what_they_promise(strategy: Callable[[], st.SearchStrategy[Any]]) -> None:
    from hypothesis import find
    if strategy is testing.weights:
        assert find(strategy(), lambda values: 0 < max(map(abs, values)) < 1e-38)
        assert find(strategy(), lambda values: len(values) % 2 == 1 and max(map(abs, values)) > 1e37)
        assert find(strategy(), lambda values: len(values) > 64 and not any(values))
    elif strategy is testing.checkpoint_shapes:
        assert find(strategy(), lambda raw: raw["vocab_size"] % 2 == 1 and raw["tie_word_embeddings"])
    else:
        assert find(strategy(), lambda made: len({len(ids) for ids, _ in made}) > 2)


def test_the_oracle_imports_nothing_of_the_package() -> None:
    files = sorted(Path(testing.__file__).parent.glob("*.py"))
    assert len(files) == 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [str(node.module)] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                known = name.partition(".")[0] in (*sys.stdlib_module_names, "hypothesis")
                assert known or name.startswith("minilora.testing."), f"{file.name} imports {name}"
