"""The fused product is that of the unpacked weight, but for the order of its sums."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import quantize_nf4
from minilora.kernels.cpu import Constants, Kernel
from minilora.quant.codebooks import DYNAMIC_8BIT, NF4_CODE
from minilora.quant.nf4 import NF4Tensor

SHAPES = [(1, 64), (5, 128), (40, 96), (33, 4096), (9, 33), (6, 1), (64, 640), (130, 256), (37, 192), (6, 14336)]


def constants(q: NF4Tensor) -> Constants:
    return Constants(q.absmax) if q.nested is None else Constants(
        None, q.nested.codes, DYNAMIC_8BIT, q.nested.absmax, q.nested.offset, q.nested.blocksize)


def product(kernel: Kernel, q: NF4Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return kernel.product(x, q.packed, constants(q), NF4_CODE, q.blocksize, q.shape[0], bias)


def transposed(kernel: Kernel, q: NF4Tensor, x: torch.Tensor) -> torch.Tensor | None:
    return kernel.product_transposed(x, q.packed, constants(q), NF4_CODE, q.blocksize, q.shape[1])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_in_units_of_the_bound(q: NF4Tensor, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """|y − y*| / ((in + 2) 2⁻²⁴ (Σ|x w| + |b|) + the one rounding to y's type), y* the product in float64.

    w in x's type; for one row as it is, in float32.
    """
    w, x64 = q.dequantize(torch.float32 if len(x) == 1 else x.dtype).double(), x.double()
    return error_of(x64, w.T, y, bias)


def error_of(x64: torch.Tensor, w64: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    exact, size = x64 @ w64, x64.abs() @ w64.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    last = 2.0 ** -8 if y.dtype == torch.bfloat16 else 2.0 ** -24
    bound = (x64.shape[1] + 2) * 2.0 ** -24 * size * (1 + last) + last * exact.abs() + 1e-36
    return float(((y.double() - exact).abs() / bound).max())


@given(shape=st.sampled_from(SHAPES), rows=st.integers(1, 20) | st.sampled_from((33, 48, 49, 61, 97, 250)),
       blocksize=st.sampled_from((7, 32, 64, 128, 4096)), double_quant=st.booleans(), biased=st.booleans(),
       dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_products_lie_within_the_rounding_of_their_sums(kernel: Kernel, shape: tuple[int, int], rows: int, blocksize: int,
                                                        double_quant: bool, biased: bool, dtype: torch.dtype) -> None:
    q = quantize_nf4(normal(*shape), blocksize, double_quant)
    x, bias = normal(rows, shape[1], seed=1).to(dtype), normal(shape[0], seed=2) if biased else None
    y = product(kernel, q, x, bias)
    assert y.shape == (rows, shape[0]) and y.dtype == dtype
    worst = error_in_units_of_the_bound(q, x, y, bias)
    assert worst <= 1, f"off by {worst:.2f} times the bound"


@given(shape=st.sampled_from([*SHAPES, (1, 2048), (333, 1024)]), rows=st.integers(1, 30) | st.sampled_from((97, 250)),
       blocksize=st.sampled_from((7, 32, 64, 128, 192, 4096)), double_quant=st.booleans(),
       dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_transposed_products_lie_within_the_rounding_of_their_sums(kernel: Kernel, shape: tuple[int, int], rows: int,
                                                                   blocksize: int, double_quant: bool,
                                                                   dtype: torch.dtype) -> None:
    q, x = quantize_nf4(normal(*shape), blocksize, double_quant), normal(rows, shape[0], seed=1).to(dtype)
    y = transposed(kernel, q, x)
    block = min(q.blocksize, shape[0] * shape[1])
    whole = shape[1] % block == 0 and block % 64 == 0
    assert (y is not None) == (whole and "AVX-512" in kernel.machine)
    if y is not None:
        assert y.shape == (rows, shape[1]) and y.dtype == dtype
        worst = error_of(x.double(), q.dequantize(dtype).double(), y)
        assert worst <= 1, f"off by {worst:.2f} times the bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_each_weight_meets_its_own_element_of_x(kernel: Kernel, dtype: torch.dtype) -> None:
    for out, columns, blocksize in ((7, 256, 64), (301, 640, 128), (40, 192, 192), (1, 64, 64)):
        q = quantize_nf4(normal(out, columns), blocksize)
        y = transposed(kernel, q, torch.eye(out, dtype=dtype))
        assert y is None or torch.equal(y, q.dequantize(dtype))
        assert (y is None) == ("AVX-512" not in kernel.machine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_rows_result_depends_neither_on_its_neighbours_nor_on_threads(kernel: Kernel, dtype: torch.dtype) -> None:
    q, x = quantize_nf4(normal(515, 1024)), normal(130, 515, seed=1).to(dtype)
    if "AVX-512" not in kernel.machine:
        return
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for rows in (1, 11, 12, 13, 130):
                y = transposed(kernel, q, x[:rows].contiguous())
                assert y is not None
                results.append(y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[-1][: len(y)]) for y in results)
    x[5, 77] = float("nan")
    y = transposed(kernel, q, x)
    assert y is not None and y[5].isnan().all() and y[:5].isfinite().all() and y[6:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 192, 256, 4096])
def test_one_row_meets_weights_that_are_not_rounded(kernel: Kernel, blocksize: int, dtype: torch.dtype) -> None:
    """Rounded to bfloat16 they would be off by more than the bound, as large terms cancel here."""
    for out, columns in ((1, 128), (7, 768), (8, 640), (61, 4096), (1030, 256)):
        for double_quant in (True, False):
            q = quantize_nf4(normal(out, columns), blocksize, double_quant)
            x = normal(1, columns, seed=1).to(dtype)
            w = q.dequantize(torch.float32)[0]
            x -= (x @ w.to(dtype)) / (w @ w).to(dtype) * w.to(dtype)
            worst = error_in_units_of_the_bound(q, x, product(kernel, q, x))
            assert worst <= 1, f"off by {worst:.2f} times the bound at {out} x {columns}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_takes_numbers_of_any_size(kernel: Kernel, dtype: torch.dtype) -> None:
    """Where a sum before its constant would be too large, or a product with a code too small, another way is taken."""
    small, large = quantize_nf4(normal(20, 256) * 1e-20), quantize_nf4(normal(20, 256) * 1e20)
    for q, size in ((small, 1e36), (small, 3e38), (small, 1.0), (large, 1e-30), (large, 1e-38), (large, 1e15)):
        x = (normal(1, 256, seed=1).clamp(-1, 1) * size).to(dtype)
        assert error_in_units_of_the_bound(q, x, product(kernel, q, x)) <= 1
        x[0, ::3] = 0.0
        x[0, 1] = -size
        assert error_in_units_of_the_bound(q, x, product(kernel, q, x)) <= 1
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(1, 256, dtype=dtype)
        x[0, 77] = bad
        y = product(kernel, small, x)[0]
        there = small.dequantize(torch.float32)[:, 77] != 0
        assert not y[there].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_meets_its_own_element_of_x(kernel: Kernel, dtype: torch.dtype) -> None:
    """x is a unit vector, so every sum is one weight: exact, whatever its order."""
    for out, columns, blocksize in ((7, 256, 64), (5, 128, 128), (6, 96, 64), (3, 33, 16)):
        q = quantize_nf4(normal(out, columns), blocksize)
        w = q.dequantize(dtype)
        assert torch.equal(product(kernel, q, torch.eye(columns, dtype=dtype)), w.T)
        for rows in (1, 2, 3, 5):
            for first in range(0, columns - rows, 13):
                assert torch.equal(product(kernel, q, torch.eye(columns, dtype=dtype)[first : first + rows].contiguous()),
                                   w.T[first : first + rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_result_depends_neither_on_its_neighbours_nor_on_threads(kernel: Kernel, dtype: torch.dtype) -> None:
    q = quantize_nf4(normal(1030, 512))
    x = normal(250, 512, seed=1).to(dtype)
    threads = torch.get_num_threads()
    try:
        one, few, many, most = [], [], [], []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            one += [product(kernel, q, x[:1])]
            few += [product(kernel, q, x[:rows].contiguous()) for rows in (2, 3, 4, 7, 8, 9, 16)]
            many += [product(kernel, q, x[:rows].contiguous()) for rows in (17, 23, 40)]
            most += [product(kernel, q, x[:rows].contiguous()) for rows in (49, 70, 250)]
    finally:
        torch.set_num_threads(threads)
    # One row of bfloat16 meets other weights, those that are not rounded.
    for results in (one + few, many, most) if dtype == torch.float32 else (one, few, many, most):
        longest = max(results, key=len)
        assert all(torch.equal(y, longest[: len(y)]) for y in results)


def test_infinities_and_nan_in_x_reach_their_own_rows_only(kernel: Kernel) -> None:
    q = quantize_nf4(normal(12, 128))
    for rows in (3, 20, 60):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(rows, 128, seed=1).to(dtype)
            x[1, 77] = float("nan")
            y = product(kernel, q, x)
            assert y[1].isnan().all() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_blocks_of_zeros_give_zero(kernel: Kernel) -> None:
    q = quantize_nf4(torch.zeros(8, 128), double_quant=False)
    for dtype in (torch.float32, torch.bfloat16):
        assert (product(kernel, q, torch.ones(2, 128, dtype=dtype)) == 0).all()


@given(out=st.sampled_from((1, 5, 6, 7, 200)), columns=st.sampled_from((1, 31, 32, 33, 96, 2048, 2057)),
       rows=st.integers(1, 16))
def test_dense_products_lie_within_the_rounding_of_their_sums(kernel: Kernel, out: int, columns: int, rows: int) -> None:
    if rows > kernel.dense_rows:
        with pytest.raises(ValueError, match=f"1 to {kernel.dense_rows} rows"):
            kernel.dense_product(torch.zeros(rows, columns, dtype=torch.bfloat16), torch.zeros(out, columns).bfloat16())
        return
    w, x = normal(out, columns).bfloat16(), normal(rows, columns, seed=1).bfloat16()
    y = kernel.dense_product(x, w)
    exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    bound = (columns + 2) * 2.0 ** -24 * size * (1 + 2.0 ** -8) + 2.0 ** -8 * exact.abs() + 1e-36
    worst = float(((y.double() - exact).abs() / bound).max())
    assert y.shape == (rows, out) and y.dtype == torch.bfloat16 and worst <= 1, f"off by {worst:.2f} times the bound"


def test_dense_rows_depend_neither_on_their_neighbours_nor_on_threads(kernel: Kernel) -> None:
    w, x = normal(1030, 512).bfloat16(), normal(max(kernel.dense_rows, 1), 512, seed=1).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [kernel.dense_product(x[:rows], w) for rows in range(1, kernel.dense_rows + 1)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[-1][: len(y)]) for y in results)


def test_dense_products_take_what_fits(kernel: Kernel) -> None:
    x, w = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    for bad_x, bad_w in ((x[:0], w), (x.expand(17, 64), w), (x, w[:, :32]), (x.float(), w), (x, w.float()),
                         (x, torch.zeros(64, 8, dtype=torch.bfloat16).T)):
        with pytest.raises(ValueError, match="the kernel takes"):
            kernel.dense_product(bad_x, bad_w)
