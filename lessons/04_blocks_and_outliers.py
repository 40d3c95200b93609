# %% [markdown]
# # 04 · Quantization, blocks and outliers
#
# ## The question
#
# A 4-bit code is a number from 0 to 15. How do you store a weight in it? And what does a single large weight do to all the
# others?

# %%
import torch

from minilora import quantize_nf4
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise

# %% [markdown]
# Take a table of levels between -1 and 1. Evenly spaced ones will do for now. Divide the weights by the largest of them
# (`absmax`), so that all lie between -1 and 1, and write down which level is nearest to each. That is *absmax
# quantization*:
#
#     absmax = max |x|         code = index of the level nearest to x / absmax         x̂ = level[code] · absmax

# %%
levels = torch.arange(-7, 8) / 7                    # 15 of the 16 codes: evenly spaced, with a zero
weights = torch.tensor([0.9, -0.5, 0.03, 0.0, 0.31])

absmax = weights.abs().max()
codes = (weights[:, None] / absmax - levels).abs().argmin(1)
restored = levels[codes] * absmax
for row in zip(weights.tolist(), codes.tolist(), restored.tolist(), strict=True):
    print("weight {:6.3f}   code {:2d}   back {:6.3f}".format(*row))

by_package, _ = quantize_blockwise(weights, levels, blocksize=64)
assert codes.tolist() == by_package.tolist()
assert restored[0] == weights[0] and restored[3] == 0           # the largest is exact, and so is zero

# %% [markdown]
# ## One outlier
#
# Here are 4,096 weights as training leaves them, about normal. Quantize them with one absmax for all, and measure the
# error. Then make *one* of them fifty times as large as the spread of the rest. Such weights exist in every large model.
#
# **Predict.** By what factor does the error of the 4,095 *other* weights grow?

# %%
def error(x, blocksize, ignore=None):
    """Root mean square error over the spread of the weights; one of them may be left out."""
    restored = dequantize_blockwise(*quantize_blockwise(x, levels, blocksize), levels, blocksize)
    wrong = restored - x
    if ignore is not None:
        wrong[ignore] = 0
    return float(wrong.square().mean().sqrt())


normal = torch.randn(4096, generator=torch.Generator().manual_seed(0))
spoiled = normal.clone()
spoiled[1000] = 50.0

clean, spoilt = error(normal, 4096), error(spoiled, 4096, ignore=1000)
print(f"error of the others, one constant for all: {clean:.3f} without the outlier, {spoilt:.3f} with it")
share_zero = float((dequantize_blockwise(*quantize_blockwise(spoiled, levels, 4096), levels, 4096) == 0).float().mean())
print(f"{share_zero:.1%} of all weights have become zero")
assert spoilt > 5 * clean and share_zero > 0.99 and len(normal) - 1 == 4095

# %% [markdown]
# An error of 1 means that nothing is left: it is as large as the weights. The usual guess is "a little, it is one of four
# thousand". But the outlier sets the scale for all. Levels are now 50/7 ≈ 7 spreads apart, and everything rounds to zero.
#
# The cure is to give neighbours their own scale. Cut the tensor into blocks of 64; an outlier then spoils 63 weights, not
# 4,095.

# %%
print(f"{'block':>6} {'no outlier':>11} {'one outlier':>12} {'bits a weight':>14}")
sizes, without, having, bits = (16, 64, 256, 1024, 4096), [], [], []
for size in sizes:
    without.append(error(normal, size))
    having.append(error(spoiled, size, ignore=1000))
    bits.append(4 + 32 / size)
    print(f"{size:6d} {without[-1]:11.3f} {having[-1]:12.3f} {bits[-1]:14.3f}")
assert having[1] < 1.6 * without[1] and having[-1] > 5 * without[-1]

# %% [markdown]
# Look at the column without outliers too. Blocks help even there: the largest of 64 normal numbers is smaller than the
# largest of 4,096, so the levels lie closer together.
#
# **Predict.** Blocks are not free: each has a float32 constant. How many bits does a weight cost in all, at 4-bit codes and
# blocks of 64?

# %%
stored = quantize_nf4(normal, blocksize=64, double_quant=False)
print(f"{stored.nbytes} bytes for {normal.numel()} weights: {stored.bits_per_param} bits each")
assert stored.bits_per_param == 4 + 32 / 64 == 4.5

# %% [markdown]
# Half a bit, an eighth on top. Halve the block and you pay a whole bit. Lesson 06 gets most of that half bit back.
#
# ## The picture

# %%
def local_error(blocksize):
    restored = dequantize_blockwise(*quantize_blockwise(spoiled, levels, blocksize), levels, blocksize)
    wrong = (restored - spoiled).abs()
    wrong[1000] = 0
    return wrong.view(-1, 64).mean(1)


with picture("04_outlier", columns=2, width_ratios=(1.5, 1)) as (left_axes, right_axes):
    left_axes.plot(range(32, 4096, 64), local_error(4096), color=RED, linewidth=2, label="one constant")
    left_axes.plot(range(32, 4096, 64), local_error(64), color=BLUE, linewidth=2, label="blocks of 64")
    left_axes.axvline(1000, color=GREY, linestyle=":", label="the outlier")
    left_axes.set(xlabel="position in the tensor", ylabel="mean error nearby", title="one outlier among 4,096 weights",
                  ylim=(0, 1.25))
    left_axes.legend(ncols=3, loc="upper center", fontsize=9)
    right_axes.plot(bits, having, "o-", color=RED, label="one outlier")
    right_axes.plot(bits, without, "o-", color=BLUE, label="none")
    for size, x, y in zip(sizes, bits, having, strict=True):
        right_axes.annotate(str(size), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    right_axes.set(xlabel="bits a weight", title="error, by block size", ylim=(0, 1))
    right_axes.legend()

# %% [markdown]
# ![where the outlier does damage, with one constant and with blocks; error over bits](figures/04_outlier.png)
#
# ## Where it lives
#
# `minilora/kernels/reference.py` is the definition, in torch: `quantize_blocks` is ten lines. The vector code
# (`minilora/kernels/nf4_quantize.h`) must equal it to the bit. `minilora/quant/blockwise.py` refuses what no constant can
# scale: NaN, infinities, empty tensors. Source: QLoRA (arXiv 2305.14314), section 2.
#
# ## The trap
#
# "A block is a row of the matrix, or a piece of one." It is not: the tensor is flattened, and 64 *neighbours* are a block,
# wherever a row ends. With rows of 96, the second block begins in the first row and ends in the second.

# %%
matrix = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
whole = quantize_nf4(matrix, blocksize=64, double_quant=False)
rows = [quantize_nf4(row, blocksize=64, double_quant=False) for row in matrix]
print(f"blocks over the flattened matrix: {whole.absmax.numel()}; row by row: {sum(r.absmax.numel() for r in rows)}")

right = whole.dequantize()
in_levels = right.flatten() / whole.absmax.repeat_interleave(64)
wrong = (in_levels * whole.absmax[:4].repeat_interleave(96)).view(4, 96)           # constant i given to row i
print(f"error: {float((right - matrix).norm() / matrix.norm()):.3f}; "
      f"with constants assigned by row: {float((wrong - matrix).norm() / matrix.norm()):.3f}")
assert whole.absmax.numel() == 6 and sum(r.absmax.numel() for r in rows) == 8
assert (wrong - matrix).norm() > 1.4 * (right - matrix).norm()

# %% [markdown]
# Nothing crashes here either: the model just gets worse. bitsandbytes has a bug of this kind in its CPU code, for rows that
# are no multiple of the block (`tests/peers/test_bitsandbytes.py` records it).
#
# ## Your turn
#
# Write `quantize_blocks`, `dequantize_blocks` and `bits_per_weight` in `lessons/exercises/04.py`, then:
#
#     minilora check 4
