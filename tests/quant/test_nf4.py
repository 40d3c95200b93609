"""NF4: by hand, by loop, by property, and what it refuses."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from minilora import NF4_CODE, NF4Tensor, QuantizationError, quantize_nf4
from minilora.kernels import reference
from minilora.quant.codebooks import DYNAMIC_8BIT
from minilora.testing import dequantize as dequantize_loop
from minilora.testing import quantize as quantize_loop

CODE = NF4_CODE.numpy()
BOUND = 0.1519036      # half the widest gap, between -1 and -0.696
# Magnitudes from 2**-100 up: below 1e-38 scaling stops (see test_subnormal_blocks_follow_the_clamp).
finite = st.floats(-(2.0 ** 100), 2.0 ** 100, width=32).map(lambda x: 0.0 if abs(x) < 2.0 ** -100 else x)
weights = arrays(np.float32, array_shapes(max_dims=3, max_side=40), elements=finite)
blocksizes = st.sampled_from([1, 2, 3, 16, 32, 64, 128, 256, 1024, 4096])


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    index = int((a.reshape(-1) != b.reshape(-1)).nonzero()[0])
    return f"first difference at {index}: {a.reshape(-1)[index]} against {b.reshape(-1)[index]}"


def test_one_block_by_hand() -> None:
    q = quantize_nf4(torch.tensor([2.0, -2.0, 0.0, 1.0, 0.1]), double_quant=False)
    # Scaled: 1, -1, 0, 0.5, 0.05; nearest codes 15, 0, 7, 12 (0.4407; the midpoint to 0.5626 is 0.50166), 8 (0.0796).
    assert q.codes().tolist() == [15, 0, 7, 12, 8]
    assert q.packed.tolist() == [0xF0, 0x7C, 0x87]           # the first code in the high nibble; the pad is the zero, 7
    assert q.absmax.tolist() == [2.0]
    assert q.dequantize().tolist() == pytest.approx([2, -2, 0, 2 * 0.44070983, 2 * 0.0795803])


@pytest.mark.parametrize("index", range(15))
def test_a_tie_goes_to_the_lower_index(index: int) -> None:
    midpoint = (NF4_CODE[index] + NF4_CODE[index + 1]) / 2
    above = torch.nextafter(midpoint, torch.tensor(2.0))
    codes = quantize_nf4(torch.stack([torch.tensor(1.0), midpoint, above]), double_quant=False).codes()
    assert codes.tolist() == [15, index, index + 1]


@given(weights, blocksizes)
def test_codes_and_absmax_equal_the_loop(w: np.ndarray, blocksize: int) -> None:
    q = quantize_nf4(torch.from_numpy(w), blocksize, double_quant=False)
    codes, absmax = quantize_loop(w.reshape(-1), CODE, blocksize)
    assert q.codes().tolist() == codes and q.absmax.tolist() == absmax
    assert q.dequantize().reshape(-1).tolist() == dequantize_loop(codes, absmax, CODE, blocksize)


@given(arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)), blocksizes)
def test_any_finite_float32_down_to_subnormals_equals_the_loop(w: np.ndarray, blocksize: int) -> None:
    q = quantize_nf4(torch.from_numpy(w), blocksize, double_quant=False)
    codes, absmax = quantize_loop(w, CODE, blocksize)
    assert q.codes().tolist() == codes and q.absmax.tolist() == absmax
    assert q.dequantize().tolist() == dequantize_loop(codes, absmax, CODE, blocksize)


@given(weights, blocksizes)
def test_error_is_bounded_zero_stays_zero_and_the_largest_is_exact(w: np.ndarray, blocksize: int) -> None:
    x = torch.from_numpy(w)
    restored = quantize_nf4(x, blocksize, double_quant=False).dequantize()
    assert restored.shape == x.shape
    assert (restored[x == 0] == 0).all()
    for block, back in zip(x.reshape(-1).split(blocksize), restored.reshape(-1).split(blocksize), strict=True):
        absmax = block.abs().max()
        assert ((block - back).abs() <= BOUND * absmax * (1 + 1e-6)).all()
        largest = block.abs().argmax()
        assert back[largest] == block[largest]


@given(weights, st.integers(-8, 8))
def test_scaling_by_a_power_of_two_keeps_codes_and_scales_absmax(w: np.ndarray, exponent: int) -> None:
    x = torch.from_numpy(w)
    plain, scaled = (quantize_nf4(v, double_quant=False) for v in (x, x * 2.0 ** exponent))
    assert torch.equal(plain.packed, scaled.packed) and torch.equal(plain.absmax * 2.0 ** exponent, scaled.absmax)


@given(st.integers(1, 20), st.randoms(use_true_random=False))
def test_permuting_blocks_permutes_results(blocks: int, random: object) -> None:
    x = torch.randn(blocks, 64, generator=torch.Generator().manual_seed(blocks))
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks + 1))
    a, b = quantize_nf4(x, double_quant=False), quantize_nf4(x[order], double_quant=False)
    assert torch.equal(a.packed.view(blocks, 32)[order], b.packed.view(blocks, 32)) and torch.equal(a.absmax[order], b.absmax)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=99))
def test_unpack_after_pack_is_the_identity(codes: list[int]) -> None:
    packed = reference.pack_nibbles(torch.tensor(codes, dtype=torch.uint8), padding=7)
    assert packed.numel() == (len(codes) + 1) // 2
    assert reference.unpack_nibbles(packed, len(codes)).tolist() == codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(w=weights)
def test_16_bit_input_gives_the_bytes_of_its_upcast(dtype: torch.dtype, w: np.ndarray) -> None:
    x = torch.from_numpy(w).clamp(-6e4, 6e4).to(dtype)
    a, b = quantize_nf4(x), quantize_nf4(x.float())
    assert torch.equal(a.packed, b.packed) and torch.equal(a.absmax, b.absmax)
    assert a.dtype == dtype and torch.equal(a.dequantize(), b.dequantize().to(dtype)), "rounded once, from float32"


def test_sign_symmetry_does_not_hold() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    a, b = quantize_nf4(x, double_quant=False), quantize_nf4(-x, double_quant=False)
    assert not torch.equal(a.dequantize(), -b.dequantize())


def test_quantizing_twice_changes_nothing_with_float_constants_and_much_with_nested_ones() -> None:
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    once = quantize_nf4(x, double_quant=False).dequantize()
    assert torch.equal(once, quantize_nf4(once, double_quant=False).dequantize())
    nested = quantize_nf4(x).dequantize()
    moved = (nested != quantize_nf4(nested).dequantize()).float().mean()
    assert moved > 0.5, f"only {moved:.0%} of the values moved"


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(0, 2 ** 31))
def test_double_quantization_equals_the_loop(blocks: int, seed: int) -> None:
    x = torch.randn(blocks * 4, generator=torch.Generator().manual_seed(seed))
    plain, nested = quantize_nf4(x, 4, double_quant=False), quantize_nf4(x, 4).nested
    assert nested is not None and nested.blocksize == 256
    assert nested.offset == float(plain.absmax.mean())
    centred = (plain.absmax - plain.absmax.mean()).numpy()
    codes, absmax = quantize_loop(centred, DYNAMIC_8BIT.numpy(), 256)
    assert nested.codes.tolist() == codes and nested.absmax.tolist() == absmax
    decoded = np.array(dequantize_loop(codes, absmax, DYNAMIC_8BIT.numpy(), 256), dtype=np.float32) + np.float32(nested.offset)
    assert quantize_nf4(x, 4).absmax.tolist() == decoded.tolist()


def test_bits_per_parameter_are_the_papers() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    assert quantize_nf4(w, double_quant=False).bits_per_param == 4 + 32 / 64
    assert quantize_nf4(w).bits_per_param == 4 + 8 / 64 + 32 / (64 * 256)
    saved = 4.5 - quantize_nf4(w).bits_per_param
    assert round(saved, 3) == 0.373 and round(saved / 8 * 65e9 / 1e9, 2) == 3.03
    q = quantize_nf4(w)
    assert q.nbytes == 1024 * 1024 // 2 + 16384 + 64 * 4 + 4


def test_rmse_on_normal_weights_is_the_published_one() -> None:
    w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    plain, nested = ((w - quantize_nf4(w, double_quant=dq).dequantize()).square().mean().sqrt() for dq in (False, True))
    assert abs(float(plain) - 0.0920) < 3e-4 and 0 < float(nested - plain) < 1e-4


def test_a_block_is_64_neighbours_of_the_flattened_tensor() -> None:
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize_nf4(w).packed, quantize_nf4(w.reshape(-1)).packed)
    assert torch.equal(quantize_nf4(w.t()).dequantize(), quantize_nf4(w.t().contiguous()).dequantize())


def test_dequantize_into_a_buffer_is_the_same_and_checked() -> None:
    q = quantize_nf4(torch.randn(33, 7, generator=torch.Generator().manual_seed(0)), blocksize=16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((33, 7), 9.0, dtype=dtype)
        assert q.dequantize(out=out) is out and torch.equal(out, q.dequantize(dtype))
    for bad in (torch.empty(7, 33), torch.empty(33, 14)[:, ::2]):
        with pytest.raises(QuantizationError, match="out must be"):
            q.dequantize(out=bad)


def test_large_tensors_in_several_chunks_equal_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(999, generator=torch.Generator().manual_seed(0))
    whole = quantize_nf4(w, 32)
    monkeypatch.setattr(reference, "CHUNK", 64)
    parts = quantize_nf4(w, 32)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.dequantize(), parts.dequantize())


def test_subnormal_blocks_follow_the_clamp() -> None:
    w = torch.tensor([1e-40, -1e-40, 0.0] * 30)
    q = quantize_nf4(w, double_quant=False)
    assert q.codes().unique().tolist() == [7], "below 1e-38 scaling stops: values come out as zero"
    assert (q.dequantize() == 0).all()


@given(weights, blocksizes)
def test_zero_stays_zero_under_double_quantization(w: np.ndarray, blocksize: int) -> None:
    x = torch.from_numpy(w)
    assert (quantize_nf4(x, blocksize).dequantize()[x == 0] == 0).all()


@given(weights, blocksizes)
def test_storage_is_what_the_parts_take(w: np.ndarray, blocksize: int) -> None:
    n, blocks = w.size, -(-w.size // blocksize)
    plain, nested = (quantize_nf4(torch.from_numpy(w), blocksize, double_quant=dq) for dq in (False, True))
    assert plain.packed.numel() == nested.packed.numel() == (n + 1) // 2
    assert plain.nbytes == (n + 1) // 2 + 4 * blocks
    assert nested.nbytes == (n + 1) // 2 + blocks + 4 * -(-blocks // 256) + 4
    assert plain.bits_per_param == 8 * plain.nbytes / n and nested.bits_per_param == 8 * (nested.nbytes - 4) / n


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_single_number_keeps_its_shape_and_value(double_quant: bool) -> None:
    for value in (3.5, -3.5, 0.0):
        q = quantize_nf4(torch.tensor(value), double_quant=double_quant)
        assert q.shape == torch.Size([]) and q.packed.numel() == 1 and q.absmax.tolist() == [abs(value)]
        assert q.dequantize().shape == torch.Size([]) and float(q.dequantize()) == value


def test_a_parameter_and_a_view_give_the_bytes_of_their_values_and_no_graph() -> None:
    w = torch.nn.Parameter(torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(0)))
    for view in (w, w.permute(2, 0, 1), w[:, ::3], w[:, :1].expand(6, 5, 8), w * 2):
        q = quantize_nf4(view)
        assert torch.equal(q.packed, quantize_nf4(view.detach().clone(memory_format=torch.contiguous_format)).packed)
        assert q.shape == view.shape and not q.absmax.requires_grad and not q.dequantize().requires_grad


def test_a_block_larger_than_the_tensor_costs_nothing() -> None:
    w = torch.randn(101, generator=torch.Generator().manual_seed(0))
    whole, huge = quantize_nf4(w, 101), quantize_nf4(w, 1 << 50)        # padded to its block it would take a petabyte
    assert torch.equal(whole.packed, huge.packed) and torch.equal(whole.dequantize(), huge.dequantize())


def test_all_zero_tensors_are_exact() -> None:
    for double_quant in (False, True):
        q = quantize_nf4(torch.zeros(3, 50), double_quant=double_quant)
        assert q.codes().unique().tolist() == [7] and (q.absmax == 0).all() and (q.dequantize() == 0).all()


@pytest.mark.parametrize("w", [
    torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 0.0]), torch.tensor([0.0, -float("inf")]).bfloat16(),
    torch.tensor([float("nan")]).half(), torch.empty(0), torch.empty(0, 5), torch.arange(4), torch.ones(4, dtype=torch.bool),
    torch.ones(4, dtype=torch.complex64), torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4).to_sparse(),
    torch.ones(4, device="meta"), [1.0, 2.0], np.ones(4, np.float32), None])
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_cannot_be_quantized_is_refused(w: torch.Tensor, double_quant: bool) -> None:
    with pytest.raises(QuantizationError) as caught:
        quantize_nf4(w, double_quant=double_quant)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1, 500, 998])
def test_one_bad_number_anywhere_is_found_and_named(dtype: torch.dtype, value: float, at: int) -> None:
    w = torch.randn(27, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    w.view(-1)[at] = value
    with pytest.raises(QuantizationError, match=rf"\(27, 37\) holds {value}"):
        quantize_nf4(w)


def test_a_number_that_float32_cannot_hold_is_refused() -> None:
    w = torch.tensor([1.0, 1e300], dtype=torch.float64)
    with pytest.raises(QuantizationError, match=r"1e\+300"):
        quantize_nf4(w, double_quant=False)
    assert torch.equal(quantize_nf4(w[:1]).dequantize(), w[:1])


def test_constants_without_a_float32_mean_are_refused_and_do_without_nesting() -> None:
    w = torch.full((1024,), 3e38)
    with pytest.raises(QuantizationError, match="without double quantization"):
        quantize_nf4(w)
    assert torch.equal(quantize_nf4(w, double_quant=False).dequantize(), w)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, "bfloat16"])
def test_weights_come_out_in_floating_types_only(dtype: torch.dtype) -> None:
    q = quantize_nf4(torch.randn(10))
    with pytest.raises(QuantizationError, match="floating type"):
        q.dequantize(dtype)
    if isinstance(dtype, torch.dtype):
        with pytest.raises(QuantizationError, match="floating type"):
            q.dequantize(out=torch.empty(10, dtype=dtype))


def test_a_parameter_may_be_the_buffer() -> None:
    q = quantize_nf4(torch.randn(10, generator=torch.Generator().manual_seed(0)))
    out = torch.nn.Parameter(torch.empty(10))
    assert q.dequantize(out=out) is out and torch.equal(out.detach(), q.dequantize())


@pytest.mark.parametrize("blocksize", [0, -64, 64.0, True, "64", None])
def test_impossible_block_sizes_are_refused(blocksize: int) -> None:
    with pytest.raises(QuantizationError, match="blocksize"):
        quantize_nf4(torch.ones(4), blocksize=blocksize)


def test_parts_that_do_not_fit_are_refused() -> None:
    q = quantize_nf4(torch.randn(8, 64), double_quant=False)
    with pytest.raises(QuantizationError, match="packed"):
        NF4Tensor(q.packed[:-1], (8, 64), torch.float32, 64, q.absmax)
    with pytest.raises(QuantizationError, match="absmax"):
        NF4Tensor(q.packed, (8, 64), torch.float32, 32, q.absmax)
    with pytest.raises(QuantizationError, match="exactly one"):
        NF4Tensor(q.packed, (8, 64), torch.float32, 64)
    with pytest.raises(QuantizationError, match="blocksize"):
        NF4Tensor(q.packed, (8, 64), torch.float32, 0, q.absmax)
    with pytest.raises(QuantizationError, match="uint8"):
        NF4Tensor(q.packed.int(), (8, 64), torch.float32, 64, q.absmax)


@pytest.mark.parametrize("fast", [True, False])
def test_writing_into_a_buffer_is_a_change_that_autograd_finds(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr("minilora.quant.nf4._kernel", lambda device, dtype: None)
    q, buffer, x = quantize_nf4(torch.ones(8, 8)), torch.ones(8, 8), torch.ones(8, 8, requires_grad=True)
    y = (buffer * x).sum()
    q.dequantize(out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        assert q.dequantize(out=torch.empty(8, 8)).is_inference()


@pytest.mark.parametrize("out", [[1], torch.ones(8, 8, requires_grad=True) * 2])
def test_what_is_no_buffer_is_refused(out: object) -> None:
    with pytest.raises(QuantizationError, match="out must be a tensor that is written into"):
        quantize_nf4(torch.ones(8, 8)).dequantize(out=out)      # type: ignore[arg-type]
