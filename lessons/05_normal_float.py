# %% [markdown]
# # 05 · NF4: sixteen levels from the normal distribution
#
# ## The question
#
# You may place sixteen levels between -1 and 1, once and for all, for every weight of every model. Where do you put them?

# %%
import torch
from scipy.stats import norm

from minilora import NF4_CODE, quantize_nf4
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.kernels.reference import pack_nibbles
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.codebooks import derive_nf4

weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def usage(levels):
    """The share of the weights that takes each level."""
    codes, _ = quantize_blockwise(weights, levels, blocksize=64)
    return torch.bincount(codes.int(), minlength=len(levels)) / len(codes)


def error(levels):
    """Root mean square error, in units of the weights' spread."""
    restored = dequantize_blockwise(*quantize_blockwise(weights, levels, 64), levels, 64)
    return float((restored - weights).square().mean().sqrt())

# %% [markdown]
# Weights of a trained network look normal: most are small, few are large. Evenly spaced levels waste their codes at the
# ends, where hardly any weight lies. The idea of NF4 (QLoRA, arXiv 2305.14314, section 3): put the levels where *equally
# many* weights fall, at quantiles of the normal distribution.
#
# Quantiles of exactly 0 and 1 are infinite, so the outermost must stop short. A table of k levels would leave half a share,
# 1/(2k), at each end. NF4 takes the mean of that margin for 15 and for 16 levels:

# %%
offset = 1 - (1 / 30 + 1 / 32) / 2
print(f"outermost probability: {offset:.7f}")
assert round(offset, 7) == 0.9677083                 # the number in everybody's code

# %% [markdown]
# Why 15 and 16? Because zero must be *exact*: padding, pruned weights and dead rows must stay zero. Sixteen symmetric
# levels have no zero in the middle. So the table is made of two halves which share one: 8 quantiles above it, 7 below. It
# is lopsided on purpose.

# %%
above = norm.ppf([offset - i * (offset - 0.5) / 8 for i in range(8)])
below = -norm.ppf([offset - i * (offset - 0.5) / 7 for i in range(7)])
built = sorted([*above, 0.0, *below])
built = torch.tensor([level / max(built) for level in built])

print("levels:", "  ".join(f"{level:.4f}" for level in built.tolist()))
assert float((built - NF4_CODE).abs().max()) < 2e-7          # bitsandbytes' table, up to its rounding
assert float((torch.from_numpy(derive_nf4()) - NF4_CODE).abs().max()) < 1.2e-7
assert int((NF4_CODE < 0).sum()) == 7 and int((NF4_CODE > 0).sum()) == 8 and NF4_CODE[7] == 0

# %% [markdown]
# ## A prediction
#
# Sixteen levels at quantiles: if each took the same share of the weights, that would be 6.25 % each.
#
# **Predict.** What are the largest and the smallest share, for normal weights in blocks of 64?

# %%
shares = usage(NF4_CODE)
entropy = float(-(shares * shares.log2()).sum())
print("in percent:", " ".join(f"{100 * share:.1f}" for share in shares.tolist()))
print(f"from {float(shares.min()):.1%} to {float(shares.max()):.1%}, not {1 / 16:.2%} each; "
      f"{entropy:.2f} of 4 bits carry information")
assert 0.016 < shares.min() < 0.018 and 0.092 < shares.max() < 0.094 and abs(entropy - 3.88) < 0.01

# %% [markdown]
# "Every level is used equally" is what many texts say, and it is wrong. It would be nearly true if a level of 1 stood where
# the derivation puts it, at the outermost quantile. But weights are divided by the largest of their block, and that lies
# farther out:

# %%
absmax = weights.view(-1, 64).abs().amax(1)
print(f"outermost quantile: {norm.ppf(offset):.2f} spreads; the largest of 64 weights: {float(absmax.mean()):.2f} on average, "
      f"{float(absmax.min()):.1f} to {float(absmax.max()):.1f}")
assert norm.ppf(offset) < 1.9 < 2.5 < absmax.mean() < 2.7

# %% [markdown]
# So the whole table is stretched. The middle levels are used more than was planned, the ends less.
#
# ## Is it good?
#
# Let us hold it against other tables: evenly spaced levels (INT4, from -7 to 7), FP4 (the floats that fit in 4 bits), the
# quantiles at (i + ½)/16 without a zero, and a symmetric table of fifteen that was posted in a public thread (qlora #299).
#
# **Predict.** Which of the five has the smallest error on normal weights?

# %%
fp4 = sorted({sign * level / 6 for sign in (-1, 1) for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6)})
symmetric = torch.from_numpy(norm.ppf([(i + 0.5) / 16 for i in range(16)])).float()
half = [0.076, 0.18, 0.284, 0.394, 0.525, 0.6962, 1.0]
tables = {"NF4": NF4_CODE, "INT4": torch.arange(-7, 8) / 7, "FP4": torch.tensor(fp4),
          "quantiles without zero": symmetric / symmetric.max(),
          "posted, symmetric": torch.tensor([*(-level for level in reversed(half)), 0.0, *half])}
errors = {name: error(table) for name, table in tables.items()}
for name, value in errors.items():
    print(f"{name:24s} {value:.5f}   a zero becomes {float(tables[name].abs().min()):.3f} of the block's largest")
assert abs(errors["NF4"] - 0.09197) < 1e-4 and abs(errors["quantiles without zero"] - 0.09164) < 1e-4
assert abs(errors["posted, symmetric"] - 0.09848) < 1e-4 and errors["INT4"] > errors["FP4"] > errors["NF4"]

# %% [markdown]
# Surprised? Not NF4: the table without a zero is better, 0.09164 against 0.09197. NF4 is not "the optimal 4-bit type", as
# is often said. It pays four thousandths of its error for an exact zero, and is better than every other table that has one
# here. The posted table is 7 % worse: half of its levels are off, and one of the sixteen codes is never used.
#
# ## The picture

# %%
with picture("05_nf4", columns=2) as (left_axes, right_axes):
    grid = torch.linspace(-1.25, 1.25, 400)
    left_axes.plot(grid, norm.pdf(grid.numpy() * 2.6), color=GREY, linewidth=2)
    left_axes.vlines(NF4_CODE, 0, norm.pdf(NF4_CODE.numpy() * 2.6), color=BLUE, linewidth=2)
    left_axes.plot(NF4_CODE, [-0.02] * 16, "|", color=BLUE, markersize=10)
    left_axes.plot(tables["INT4"], [-0.06] * 15, "|", color=RED, markersize=10)
    left_axes.annotate("NF4", (1.06, -0.03), color=BLUE, fontsize=9)
    left_axes.annotate("INT4", (1.06, -0.075), color=RED, fontsize=9)
    left_axes.set(title="sixteen levels under the bell curve", xlabel="weight / absmax", yticks=[])
    right_axes.bar(range(16), 100 * shares, color=BLUE)
    right_axes.axhline(100 / 16, color=GREY, linestyle="--", label="equal shares")
    right_axes.set(title="weights that take each code, in percent", xlabel="code")
    right_axes.set_xticks(range(16))
    right_axes.tick_params(axis="x", labelsize=8)
    right_axes.legend()

# %% [markdown]
# ![levels of NF4 and INT4 under a normal density; share of the weights that takes each code](figures/05_nf4.png)
#
# ## Where it lives
#
# `minilora/quant/codebooks.py` holds the table and its derivation, `minilora/quant/nf4.py` the tensor made with it. Two
# codes share a byte, the first in the *high* four bits: `minilora/kernels/reference.py`.

# %%
q = quantize_nf4(torch.tensor([1.0, -1.0, 0.0]), double_quant=False)
print("codes", q.codes().tolist(), "-> bytes", [f"0x{byte:02X}" for byte in q.packed.tolist()])
assert q.packed.tolist() == [0xF0, 0x77]             # 15 and 0; then 7 (zero) and a filling 7

# %% [markdown]
# ## The trap
#
# A code is an index into a table. It has no sign bit and no exponent: "NF4 is a small float" is false, and so is every
# trick that relies on it. Two that look safe:
#
# 1. −w is *not* quantized to the mirror image of ŵ, because the table is lopsided.
# 2. Reading the low nibble first does not fail. It swaps neighbours, and the model talks nonsense.

# %%
w = weights[:4096]
mirrored = -quantize_nf4(w, double_quant=False).dequantize()
of_mirror = quantize_nf4(-w, double_quant=False).dequantize()
print(f"{float((mirrored != of_mirror).float().mean()):.0%} of the values differ between -(ŵ) and the ŵ of -w")
assert (mirrored != of_mirror).float().mean() > 0.5

good = quantize_nf4(w, double_quant=False)
swapped = pack_nibbles(good.codes().view(-1, 2).flip(1).flatten(), padding=7)
misread = type(good)(swapped, good.shape, good.dtype, 64, good.absmax).dequantize()
print(f"error {float((good.dequantize() - w).norm() / w.norm()):.3f}; with swapped nibbles "
      f"{float((misread - w).norm() / w.norm()):.3f}, as if the weights were random")
assert (misread - w).norm() / w.norm() > 1.3

# %% [markdown]
# What *does* hold, and is tested: the largest weight of each block is exact, zero is exact, and no weight moves by more
# than half the widest gap.

# %%
gap = float((NF4_CODE[1:] - NF4_CODE[:-1]).max()) / 2
back = quantize_nf4(weights, double_quant=False).dequantize()
worst = float(((back - weights).abs().view(-1, 64) / absmax[:, None]).max())
print(f"half the widest gap: {gap:.7f}; the worst weight of a million: {worst:.7f}")
assert worst <= gap + 1e-7 and abs(gap - 0.1519036) < 1e-7

# %% [markdown]
# ## Your turn
#
# Write `nf4_levels`, `pack` and `unpack` in `lessons/exercises/05.py`, then:
#
#     minilora check 5
