"""A block's parts against autograd's own formulas: the same bits, and less kept."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.llama.frugal import attention, plain_rms_norm, rms_norm, rotate, swiglu
from minilora.llama.rotary import rotation

BITS = [torch.float32, torch.bfloat16, torch.float16]


def results(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], int]:
    """The value, the gradients of a random direction, and the bytes that were kept for them besides `inputs`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(*leaves)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    y.backward(direction)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)], sum(kept.values())


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> tuple[int, int]:
    found, kept = results(ours, *inputs)
    expected, kept_by_autograd = results(plain, *inputs)
    assert len(found) == len(expected) == 1 + len(inputs)
    for ours_, theirs in zip(found, expected, strict=True):
        assert ours_.dtype == theirs.dtype and torch.equal(ours_, theirs)
    return kept, kept_by_autograd


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_norm_has_autograds_bits_and_keeps_one_number_a_row(dtype: torch.dtype) -> None:
    x, weight = normal(3, 50, 96, dtype=dtype), normal(96, dtype=dtype, seed=1)
    kept, by_autograd = check(lambda x: rms_norm(x, weight, 1e-5), lambda x: plain_rms_norm(x, weight, 1e-5), x)
    assert kept == weight.nbytes + 3 * 50 * 4
    assert by_autograd == kept + (4 * x.numel() if dtype != torch.float32 else 0)


def test_a_norm_whose_weight_is_trained_is_autograds() -> None:
    x, weight = normal(5, 96, dtype=torch.float32), normal(96, dtype=torch.float32, seed=1)
    check(lambda x, weight: rms_norm(x, weight, 1e-5), lambda x, weight: plain_rms_norm(x, weight, 1e-5), x, weight)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_swiglu_has_autograds_bits_and_keeps_its_inputs(dtype: torch.dtype) -> None:
    gate, up = normal(4, 30, 64, dtype=dtype), normal(4, 30, 64, dtype=dtype, seed=1)
    kept, by_autograd = check(swiglu, lambda gate, up: F.silu(gate) * up, gate, up)
    assert (kept, by_autograd) == (0, gate.nbytes)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_a_rotation_has_autograds_bits(dtype: torch.dtype) -> None:
    x = normal(2, 17, 4, 16, dtype=dtype).transpose(1, 2)
    cos, sin = rotation(torch.arange(17).expand(2, 17), torch.rand(8, generator=torch.Generator().manual_seed(2)), dtype)
    check(lambda x: rotate(x, cos, sin), lambda x: plain_rotation(x, cos, sin), x)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_has_the_bits_of_torchs_in_float32_and_keeps_its_inputs_in_16_bits(heads: tuple[int, int],
                                                                                    dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 33, count, 16, dtype=dtype, seed=seed).transpose(1, 2)
               for seed, count in enumerate((heads[0], heads[1], heads[1])))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True,
                                              enable_gqa=heads[0] != heads[1])

    kept, by_autograd = check(lambda q, k, v: attention(q, k, v, None), plain, q, k, v)
    assert kept == 4 * q.numel() + 4 * 2 * heads[0] * 33            # the result, and a number for each of its rows
    assert by_autograd == kept + 2 * (q.nbytes + k.nbytes + v.nbytes)


@pytest.mark.parametrize("function", [lambda x: rms_norm(x, torch.ones(6, dtype=torch.float64), 1e-5),
                                      lambda x: swiglu(x, x + 1),
                                      lambda x: rotate(x, torch.full((6,), 0.6).double(), torch.full((6,), 0.8).double())],
                         ids=["norm", "swiglu", "rotation"])
def test_second_derivatives_pass_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    x = normal(2, 1, 3, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(function, (x,))


class OnAGPU(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU, where other operations are taken."""

    is_cuda = True


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_what_a_gpu_takes_instead_is_the_same_within_its_roundings(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    x, weight = normal(3, 50, 96, dtype=dtype), normal(96, dtype=dtype, seed=1)
    there = rms_norm(x.as_subclass(OnAGPU), weight, 1e-5).as_subclass(Tensor)
    plain = plain_rms_norm(x, weight, 1e-5)
    assert ((there - plain).abs() <= 2 * step * plain.abs() + 1e-6).all()
    x = normal(2, 3, 7, 64, dtype=dtype)
    cos, sin = rotation(torch.arange(7).expand(2, 7), torch.rand(32, generator=torch.Generator().manual_seed(2)), dtype)
    there, plain = rotate(x.as_subclass(OnAGPU), cos, sin).as_subclass(Tensor), rotate(x, cos, sin)
    assert ((there - plain).abs() <= 2 * step * (x.abs() + x.roll(32, -1).abs())).all() and there.dtype == plain.dtype
