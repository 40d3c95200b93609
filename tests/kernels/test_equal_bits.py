"""Unpacking and quantizing give the reference's bits, in every form of the vector code."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import quantize_nf4
from minilora.kernels import cpu, reference
from minilora.kernels.cpu import Constants, Kernel
from minilora.quant.codebooks import DYNAMIC_8BIT, DYNAMIC_8BIT_UNSIGNED, NF4_CODE, NF4_ZERO
from minilora.testing import strategies

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
sizes = st.one_of(st.integers(1, 300), st.sampled_from((4095, 4096, 4097, 8192 + 31, 20_000)))
blocksizes = st.one_of(st.sampled_from((1, 2, 3, 16, 31, 32, 33, 64, 128, 256, 4096, 1 << 50)), st.integers(1, 300))
anything = st.floats(width=32, allow_subnormal=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal, the sign of zero included; NaN equals NaN."""
    unequal = (ours != theirs) | (ours.signbit() != theirs.signbit())
    unequal &= ~(ours.isnan() & theirs.isnan())
    if unequal.any():
        at = int(unequal.nonzero()[0])
        pytest.fail(f"first difference at {at}: {ours[at]} in the kernel, {theirs[at]} in the reference")
    return True


def by_reference(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, n: int,
                 dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize_packed(packed, absmax, code, blocksize, torch.empty(n, dtype=dtype))


@given(n=sizes, blocksize=blocksizes, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_unpacked_weights_equal_the_reference(kernel: Kernel, n: int, blocksize: int, dtype: torch.dtype, seed: int) -> None:
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator(seed))
    absmax = torch.randn(-(-n // blocksize), generator=generator(seed)).abs()
    ours = kernel.dequantize(packed, Constants(absmax), NF4_CODE, blocksize, torch.empty(n, dtype=dtype))
    assert same_bits(ours, by_reference(packed, absmax, NF4_CODE, blocksize, n, dtype))


@given(n=sizes, blocksize=blocksizes, nested=st.sampled_from((1, 3, 256, 257)), dtype=st.sampled_from(FLOATS),
       offset=st.floats(-1, 1, width=32), seed=st.integers(0, 99))
def test_constants_in_eight_bits_are_decoded_with_the_references_two_roundings(
        kernel: Kernel, n: int, blocksize: int, nested: int, dtype: torch.dtype, offset: float, seed: int) -> None:
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator(seed))
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator(seed))
    scales = torch.rand(-(-blocks // nested), generator=generator(seed))
    absmax = reference.dequantize_blocks(codes, scales, DYNAMIC_8BIT, nested) + offset
    constants = Constants(None, codes, DYNAMIC_8BIT, scales, offset, nested)
    ours = kernel.dequantize(packed, constants, NF4_CODE, blocksize, torch.empty(n, dtype=dtype))
    assert same_bits(ours, by_reference(packed, absmax, NF4_CODE, blocksize, n, dtype))


@given(code=st.lists(anything, min_size=16, max_size=16), absmax=st.one_of(st.sampled_from((0.0, 1.0, 1e-38, 1e-45)), anything),
       dtype=st.sampled_from(FLOATS))
def test_every_float32_is_rounded_as_torch_rounds_it(kernel: Kernel, code: list[float], absmax: float,
                                                     dtype: torch.dtype) -> None:
    """Subnormals, ties, overflow, infinities and NaN, in the wide loop and in its tail."""
    table, constant = torch.tensor(code), torch.tensor([absmax])
    packed = torch.arange(256, dtype=torch.uint8)[17:170]
    ours = kernel.dequantize(packed, Constants(constant), table, 1 << 40, torch.empty(305, dtype=dtype))
    assert same_bits(ours, by_reference(packed, constant, table, 1 << 40, 305, dtype))


def test_each_tie_and_edge_of_the_16_bit_types_is_rounded_as_torch_rounds_it(kernel: Kernel) -> None:
    for dtype, bits in ((torch.float16, 16), (torch.bfloat16, 16)):
        halves = torch.arange(1 << bits, dtype=torch.int32).to(torch.int16).view(dtype).float()
        halves = halves[halves.isfinite()].sort().values
        between = (halves[1:].double() + halves[:-1].double()).div(2).float()        # the ties, exact in float32
        around = torch.cat([halves, between, between.nextafter(torch.tensor(9e9)), between.nextafter(torch.tensor(-9e9))])
        around = torch.nn.functional.pad(around, (0, -around.numel() % 16)).view(-1, 16)[:: 1 if dtype == torch.float16 else 7]
        packed = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8)
        one, out = torch.ones(1), torch.empty(16, dtype=dtype)
        for code in around:
            assert same_bits(kernel.dequantize(packed, Constants(one), code.contiguous(), 16, out), code.to(dtype))


def quantized_alike(kernel: Kernel, x: torch.Tensor, blocksize: int) -> None:
    found = kernel.quantize(x, NF4_CODE, blocksize, NF4_ZERO)
    assert found is not None
    packed, absmax = found
    codes, expected = reference.quantize_blocks(x, NF4_CODE, blocksize)
    assert same_bits(absmax, expected)
    assert same_bits(packed.int(), reference.pack_nibbles(codes, NF4_ZERO).int())


@given(values=strategies.weights(), blocksize=blocksizes, dtype=st.sampled_from(FLOATS))
def test_packed_codes_and_constants_equal_the_reference(kernel: Kernel, values: list[float], blocksize: int,
                                                        dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype)
    quantized_alike(kernel, torch.where(x.isfinite(), x, 0), blocksize)         # float16 overflows


@given(n=sizes, blocksize=blocksizes, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_blocks_of_any_size_within_and_across_bytes_are_packed_alike(kernel: Kernel, n: int, blocksize: int, dtype: torch.dtype,
                                                                     seed: int) -> None:
    quantized_alike(kernel, torch.randn(n, generator=generator(seed)).to(dtype), blocksize)


def test_a_value_on_each_midpoint_takes_the_lower_code_and_its_neighbours_their_own(kernel: Kernel) -> None:
    midpoints = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    up, down = midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))
    x = torch.cat([torch.ones(1), midpoints, up, down, -torch.ones(1)])          # absmax is 1: nothing is rounded
    packed, _ = kernel.quantize(x, NF4_CODE, 64, NF4_ZERO)
    codes = reference.unpack_nibbles(packed, 47)[1:46].view(3, 15).int()
    assert codes[0].tolist() == codes[2].tolist() == list(range(15)) and codes[1].tolist() == list(range(1, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_as_itself(kernel: Kernel, dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    for blocksize in (1, 16, 64, x.numel()):
        quantized_alike(kernel, x, blocksize)
        quantized_alike(kernel, x.flip(0).contiguous(), blocksize)


TABLES = {"signed": DYNAMIC_8BIT, "unsigned": DYNAMIC_8BIT_UNSIGNED, "sixteen": NF4_CODE, "two": torch.tensor([-0.5, 1.0]),
          "one": torch.tensor([0.25])}


def quantized_to_bytes_alike(kernel: Kernel, x: torch.Tensor, code: torch.Tensor, blocksize: int) -> None:
    found = kernel.quantize_bytes(x, code, blocksize)
    assert found is not None
    codes, absmax = reference.quantize_blocks(x, code, blocksize)
    assert same_bits(found[1], absmax)
    assert same_bits(found[0].int(), codes.int())


@given(values=strategies.weights(), blocksize=blocksizes, table=st.sampled_from(sorted(TABLES)))
def test_codes_of_any_table_up_to_256_equal_the_reference(kernel: Kernel, values: list[float], blocksize: int,
                                                          table: str) -> None:
    quantized_to_bytes_alike(kernel, torch.tensor(values), TABLES[table], blocksize)


@given(n=st.one_of(sizes, st.just(100_003)), blocksize=blocksizes, table=st.sampled_from(sorted(TABLES)),
       seed=st.integers(0, 99))
def test_codes_of_blocks_of_any_size_equal_the_reference(kernel: Kernel, n: int, blocksize: int, table: str, seed: int) -> None:
    quantized_to_bytes_alike(kernel, torch.randn(n, generator=generator(seed)), TABLES[table], blocksize)


@pytest.mark.parametrize("table", ["signed", "unsigned"])
def test_a_value_on_each_midpoint_of_256_takes_the_lower_code(kernel: Kernel, table: str) -> None:
    code = TABLES[table]
    midpoints = (code[1:] + code[:-1]) / 2
    up, down = midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))
    codes, _ = kernel.quantize_bytes(torch.cat([torch.ones(1), midpoints, up, down]), code, 4096)       # absmax is 1
    on, above, below = codes[1:].view(3, 255).int()
    assert on.tolist() == below.tolist() == list(range(255)) and above.tolist() == list(range(1, 256))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_lies(kernel: Kernel, dtype: torch.dtype, value: float) -> None:
    for n, at in ((1, 0), (17, 16), (1000, 0), (1000, 999), (300_001, 300_000), (300_001, 150_000)):
        x = torch.randn(n, generator=generator(n)).to(dtype)
        assert kernel.quantize(x, NF4_CODE, 64, NF4_ZERO) is not None
        x[at] = value
        assert kernel.quantize(x, NF4_CODE, 64, NF4_ZERO) is None, f"{value} at {at} of {n}"
        assert dtype != torch.float32 or kernel.quantize_bytes(x, DYNAMIC_8BIT, 256) is None, f"{value} at {at} of {n}"


def test_large_tensors_are_shared_by_threads_and_equal_the_reference(kernel: Kernel) -> None:
    for n, blocksize in ((1 << 20, 64), (999_999, 64), (999_999, 77), (700_001, 1)):
        x = torch.randn(n, generator=generator(n))
        quantized_alike(kernel, x, blocksize)
        packed, absmax = kernel.quantize(x, NF4_CODE, blocksize, NF4_ZERO)
        for dtype in FLOATS:
            ours = kernel.dequantize(packed, Constants(absmax), NF4_CODE, blocksize, torch.empty(n, dtype=dtype))
            assert same_bits(ours, by_reference(packed, absmax, NF4_CODE, blocksize, n, dtype))


def test_what_is_larger_than_the_cache_is_the_same(kernel: Kernel) -> None:
    n = (1 << 25) + 77                                                          # 64 MiB in 16 bits
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8, generator=generator(0))
    absmax = torch.rand(-(-n // 64), generator=generator(0))
    expected = by_reference(packed, absmax, NF4_CODE, 64, n, torch.bfloat16)
    for start in (0, 1):                                                        # at a cache line, and beside one
        out = torch.empty(n + 1, dtype=torch.bfloat16)[start : start + n]
        assert torch.equal(kernel.dequantize(packed, Constants(absmax), NF4_CODE, 64, out), expected)


@given(values=strategies.weights(), blocksize=blocksizes, double_quant=st.booleans(), dtype=st.sampled_from(FLOATS))
def test_the_package_gives_the_same_bytes_without_the_kernel(values: list[float], blocksize: int, double_quant: bool,
                                                             dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype)
    x = torch.where(x.isfinite() & (x.abs() < 1e30), x, 0)                      # the constants have a mean
    with_it = quantize_nf4(x, blocksize, double_quant)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "kernel", lambda: None)
        without = quantize_nf4(x, blocksize, double_quant)
        weights = without.dequantize()
    assert torch.equal(with_it.packed, without.packed) and torch.equal(with_it.absmax, without.absmax)
    assert same_bits(with_it.dequantize(), weights)


def test_the_reference_in_several_chunks_equals_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(999, generator=generator(0))
    codes, absmax = reference.quantize_blocks(x, NF4_CODE, 32)
    packed = reference.pack_nibbles(codes, NF4_ZERO)
    whole = by_reference(packed, absmax, NF4_CODE, 32, 999, torch.float32)
    monkeypatch.setattr(reference, "CHUNK", 64)
    parts = reference.quantize_blocks(x, NF4_CODE, 32)
    assert torch.equal(parts[0], codes) and torch.equal(parts[1], absmax)
    assert torch.equal(by_reference(packed, absmax, NF4_CODE, 32, 999, torch.float32), whole)


def test_wrong_types_and_gaps_between_elements_are_refused_before_c_sees_them(kernel: Kernel) -> None:
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    for bad in (lambda: kernel.dequantize(packed.int(), Constants(absmax), NF4_CODE, 64, torch.empty(64)),
                lambda: kernel.dequantize(packed, Constants(absmax.double()), NF4_CODE, 64, torch.empty(64)),
                lambda: kernel.dequantize(packed, Constants(absmax), NF4_CODE, 64, torch.empty(64, 2)[:, 0])):
        with pytest.raises(ValueError, match="the kernel takes"):
            bad()
    for n, blocksize in ((63 + 64, 64), (64, 32)):
        with pytest.raises(ValueError, match="weights in 2 blocks"):
            kernel.dequantize(packed, Constants(absmax), NF4_CODE, blocksize, torch.empty(n))
