# %% [markdown]
# # 06 · Double quantization
#
# ## The question
#
# At blocks of 64 a weight costs 4.5 bits. The half bit is a float32 constant for every block: on 65 billion weights four
# gigabytes of constants. Can they be had for less?
#
# The answer is called *double quantization*, and it may be the most misread term of the paper. A widely read article says
# that it takes the weights "from 16 to 8 to 4 bits". So let us first build that.

# %%
import torch

from minilora import quantize_nf4
from minilora.course.pictures import BLUE, GOLD, GREY, RED, picture
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT
from minilora.quant.nf4 import NestedAbsmax

weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
plain = quantize_nf4(weights, double_quant=False)
double = quantize_nf4(weights, double_quant=True)


def error(restored):
    return float((restored - weights).square().mean().sqrt())


even = torch.arange(-127, 128) / 127                    # plain 8-bit integers
eight_bit = dequantize_blockwise(*quantize_blockwise(weights, even, 64), even, 64)
misread = quantize_nf4(eight_bit, double_quant=False)
print(f"once, to 4 bits:     {plain.bits_per_param:.3f} bits, error {error(plain.dequantize()):.5f}")
print(f"16 -> 8 -> 4 bits:   {misread.bits_per_param:.3f} bits, error {error(misread.dequantize()):.5f}")
assert misread.nbytes == plain.nbytes and abs(error(misread.dequantize()) - 0.09214) < 1e-4
assert abs(error(plain.dequantize()) - 0.09197) < 1e-4

# %% [markdown]
# Going through 8 bits saves not one byte, and it adds error. It cannot be what the paper means.
#
# What is quantized twice? The weights are quantized once, and leave behind constants, one for each block. Those constants
# are numbers too: 16,384 of them for our million weights. *They* are quantized, to 8 bits.

# %%
absmax = plain.absmax
print(f"{absmax.numel():,} constants, from {float(absmax.min()):.2f} to {float(absmax.max()):.2f}, "
      f"mean {float(absmax.mean()):.2f}, spread {float(absmax.std()):.2f}")
assert absmax.numel() == 16_384 and absmax.min() > 0

# %% [markdown]
# They are all positive and lie close together. A signed table would waste half of its codes on them, so the mean is
# subtracted first. The rest is the block-wise quantization that you know, 256 constants to a block:
#
#     absmax ≈ level[code] · nested_absmax + offset         offset = mean of absmax

# %%
offset = absmax.mean()
codes, nested_absmax = quantize_blockwise(absmax - offset, DYNAMIC_8BIT, 256)
decoded = dequantize_blockwise(codes, nested_absmax, DYNAMIC_8BIT, 256) + offset

package = NestedAbsmax.encode(absmax)
assert torch.equal(package.codes, codes) and torch.equal(package.decode(), decoded)
assert torch.equal(double.packed, plain.packed)         # the weights' own codes are the same bytes
print(f"a constant moves by {float(((decoded - absmax) / absmax).abs().mean()):.2%} on average")

# %% [markdown]
# **Predict.** A weight now costs a 4-bit code, its share of an 8-bit code, and its share of a float32 for 256 × 64 weights.
# How many bits is that? And how many gigabytes does it save on 65 billion weights?

# %%
bits = 4 + 8 / 64 + 32 / (256 * 64)
saved = 4.5 - bits
print(f"{bits:.3f} bits instead of 4.5: {saved:.3f} saved, {65e9 * saved / 8e9:.2f} GB of 65 billion weights")
assert bits == double.bits_per_param and round(bits, 3) == 4.127 and round(saved, 3) == 0.373
assert round(65e9 * saved / 8e9, 2) == 3.03

# %% [markdown]
# The usual wrong guess is 4 + 8/64 = 4.125: the constants of the constants are forgotten. They cost almost nothing, 0.002
# bits.
#
# **Predict.** The error was 0.09197. What is it with double-quantized constants?

# %%
print(f"error {error(plain.dequantize()):.5f} -> {error(double.dequantize()):.5f}")
assert error(plain.dequantize()) < error(double.dequantize()) < 0.0921
smallest_nonzero_bits = 32 / (256 * 64)
assert round(smallest_nonzero_bits, 3) == 0.002

# %% [markdown]
# 0.09200: it is nearly free. A constant that is off by a sixth of a percent is nothing beside weights that are off by nine.
#
# Why the *dynamic map*, whose levels are dense around zero, and not evenly spaced ones? The authors had it from their 8-bit
# optimizer. It hardly matters here:

# %%
by_even = dequantize_blockwise(*quantize_blockwise(absmax - offset, even, 256), even, 256) + offset
values = plain.dequantize() / absmax.repeat_interleave(64)
print(f"error with evenly spaced levels: {error(values * by_even.repeat_interleave(64)):.5f}")
assert abs(error(values * by_even.repeat_interleave(64)) - error(double.dequantize())) < 1e-4
assert 0.0014 < ((decoded - absmax) / absmax).abs().mean() < 0.0019         # "a sixth of a percent"

# %% [markdown]
# 0.09198: if anything, a hair better.
#
# ## The picture
#
# Blocks can be made smaller or larger. Each point is one way to store the same weights.

# %%
points = {(size, nested): quantize_nf4(weights, size, nested) for size in (32, 64, 128, 256) for nested in (False, True)}
with picture("06_double_quant", columns=2) as (left_axes, right_axes):
    left_axes.hist(absmax, bins=80, color=GREY)
    left_axes.axvline(float(offset), color=RED, label="their mean")
    left_axes.set(title="block constants of normal weights", xlabel="absmax, in spreads", yticks=[])
    left_axes.legend()
    for nested, color, label in ((False, GOLD, "float32 constants"), (True, BLUE, "double quantization")):
        x = [points[size, nested].bits_per_param for size in (32, 64, 128, 256)]
        y = [error(points[size, nested].dequantize()) for size in (32, 64, 128, 256)]
        right_axes.plot(x, y, "o-", color=color, label=label)
        for size, at in zip((32, 64, 128, 256), zip(x, y, strict=True), strict=True):
            right_axes.annotate(str(size), at, xytext=(4, 5), textcoords="offset points", fontsize=9)
    right_axes.set(title="error, by block size", xlabel="bits a weight")
    right_axes.legend()

cheap, fine = points[256, False], points[64, True]
print(f"blocks of 256: {cheap.bits_per_param:.3f} bits, error {error(cheap.dequantize()):.4f}; "
      f"64, double: {fine.bits_per_param:.3f} bits, error {error(fine.dequantize()):.4f}")
assert abs(cheap.bits_per_param - fine.bits_per_param) < 0.003 and error(fine.dequantize()) < 0.94 * error(cheap.dequantize())

# %% [markdown]
# ![the distribution of block constants; error over bits for four block sizes, with and without](figures/06_double_quant.png)
#
# That is the point of it: the error of blocks of 64 at the price of blocks of 256.
#
# ## Where it lives
#
# `minilora/quant/nf4.py`: `NestedAbsmax`, `encode` and `decode`. `tests/peers/test_bitsandbytes.py` compares constants and
# values with bitsandbytes'. Source: QLoRA (arXiv 2305.14314), section 3; the map is that of the 8-bit optimizers (arXiv
# 2110.02861, section 1.3), which lesson 11 uses for what it was made for.
#
# ## The trap
#
# "Quantizing a quantized model again changes nothing." Try it before you re-save a checkpoint.

# %%
twice_plain = quantize_nf4(plain.dequantize(), double_quant=False).dequantize()
twice_double = quantize_nf4(double.dequantize(), double_quant=True).dequantize()
moved_plain = float((twice_plain != plain.dequantize()).float().mean())
moved_double = float((twice_double != double.dequantize()).float().mean())
print(f"values that move: {moved_plain:.0%} with float32 constants, {moved_double:.0%} with double quantization")
assert moved_plain == 0 and moved_double > 0.85

# %% [markdown]
# With float32 constants it is true: the largest weight of a block is exact, so the constant comes out the same, and
# everything else with it. With double quantization the constants have moved a little, so their mean is another one, and
# they move again. Only a little, but a model that was "not changed" now differs in nine values of ten, and an adapter fits
# the weights that it was trained on.
#
# ## Your turn
#
# Write `encode_absmax`, `decode_absmax` and `bits_per_weight` in `lessons/exercises/06.py`, then:
#
#     minilora check 6
