# %% [markdown]
# # 16 · Merging, and what rounding erases
#
# ## The question
#
# The adapter is trained. To serve it, you want *one* model without adapters. W + ΔW, and done? There are three ways to do
# it over a 4-bit base. They make three different models, and only one of them is the one that you evaluated.

# %%
import torch
from torch import nn

from minilora import NF4_CODE, LoRALinear, NF4Linear, merge_lora, quantize_nf4
from minilora.course.pictures import BLUE, GOLD, RED, picture
from minilora.layers.merge import MergeError
from minilora.layers.qlora import Quantization

generator = torch.Generator().manual_seed(0)
original = torch.randn(1024, 1024, generator=generator)              # W: a layer, its weights of spread 1
base = quantize_nf4(original)                                        # what training saw is Ŵ
direction = torch.randn(1024, 16, generator=generator) @ torch.randn(16, 1024, generator=generator) / 4   # spread 1, rank 16

# %% [markdown]
# How large is an update beside the weights? It depends on the task, the rate and the steps. So let us turn that into a
# dial: ΔW has a *strength* of 1 % of the weights' spread, or 10 %, or 100 %.
#
# **Predict.** Merge into 4 bits: dequantize, add ΔW, quantize again. At a strength of 1 %, how much of what was learnt
# survives? (A cosine: 1 is all, 0 is nothing.)

# %%
def three_merges(strength):
    update, seen = strength * direction, base.dequantize()
    trained = seen + update
    return {"16bit": MergeError.measure(trained.bfloat16(), trained, seen),
            "original": MergeError.measure(original + update, trained, seen),
            "4bit": MergeError.measure(quantize_nf4(trained).dequantize(), trained, seen)}


print(f"{'strength':>9s}" + "".join(f"{name:>12s}" for name in ("16bit", "original", "4bit")))
for strength in (0.01, 0.1, 1.0):
    errors = three_merges(strength)
    print(f"{strength:9.0%}" + "".join(f"{error.update_cosine:12.2f}" for error in errors.values()))
assert three_merges(0.01)["4bit"].update_cosine < 0.1 < 0.7 < three_merges(0.1)["4bit"].update_cosine < 0.8
assert three_merges(1.0)["4bit"].update_cosine > 0.98 and three_merges(0.01)["16bit"].update_cosine > 0.95

# %% [markdown]
# At 1 % almost nothing: 0.03. At 10 % it is 0.74, at 100 % 0.99. Small updates suffer most. A weight that should move by a
# hundredth of a spread rounds back to where it was. And ŵ lies exactly *on* a level, as far from the next one as it can be:

# %%
small = base.dequantize() + 0.01 * direction
same_code = float((quantize_nf4(small).codes() == base.codes()).float().mean())
gaps = NF4_CODE[1:] - NF4_CODE[:-1]
print(f"levels lie {float(gaps.min()):.2f} to {float(gaps.max()):.2f} of the block's largest weight apart; "
      f"{same_code:.2%} of the weights have the code that they had before")
assert same_code > 0.95

# %% [markdown]
# ## The subtle one
#
# The second column is what most scripts do: load the model in 16 bits, attach the adapter, merge. No rounding to 4 bits, so
# it must be exact?
#
# **Predict.** At a strength of 10 %: how large is the error of this merge, in units of the update itself?

# %%
error = three_merges(0.1)["original"]
print(f"error / update: {error.error_to_update:.2f}   (16bit: {three_merges(0.1)['16bit'].error_to_update:.3f})")
assert 0.85 < error.error_to_update < 1.0 and three_merges(0.1)["16bit"].error_to_update < 0.05

# %% [markdown]
# 0.92: as large as the update. The adapter was trained over Ŵ and learnt, among other things, to make up for Ŵ − W. Over W
# it corrects an error that is not there. The merged model may still be good, even better than before on some inputs; but it
# is not the model whose scores you reported, and nobody has evaluated it.
#
# So: *dequantize, add, save in 16 bits*. Whatever you do, measure it. The package does so on every merge:

# %%
layer = LoRALinear(NF4Linear(base), r=16, alpha=16)
with torch.no_grad():
    layer.lora_A.weight.normal_(generator=generator)
    layer.lora_B.weight.normal_(0, 0.025, generator=generator)
x = torch.randn(8, 1024, generator=generator)
as_trained = layer(x).detach()

for title, into, trained_on in (("16bit", "16bit", None), ("original", "16bit", Quantization()), ("4bit", "4bit", None)):
    fresh = LoRALinear(NF4Linear(base), r=16, alpha=16)
    if title == "original":
        plain = nn.Linear(1024, 1024, bias=False)
        plain.weight = nn.Parameter(original)
        fresh = LoRALinear(plain, r=16, alpha=16)
    with torch.no_grad():
        fresh.lora_A.weight.copy_(layer.lora_A.weight)
        fresh.lora_B.weight.copy_(layer.lora_B.weight)
    model, told = nn.ModuleDict({"q_proj": fresh}), []
    merge_lora(model, into, trained_on=trained_on, on_layer=lambda name, error, told=told: told.append(error))
    off = float((model["q_proj"](x).detach() - as_trained).norm() / as_trained.norm())
    print(f"{title:9s} outputs off by {off:6.2%}; said beforehand: weights off by {told[0].relative_error:6.2%}, "
          f"update kept {told[0].update_cosine:.2f}")
    assert abs(off - told[0].relative_error) < 0.02

# %% [markdown]
# ## The picture

# %%
strengths = [10 ** (-3 + index / 6) for index in range(19)]
titles = {"16bit": "dequantized base, 16 bits", "original": "original 16-bit base", "4bit": "4 bits"}
merges = [three_merges(strength) for strength in strengths]
with picture("16_merging", width=6.5, height=3.4) as axes:
    for (name, title), color in zip(titles.items(), (BLUE, GOLD, RED), strict=True):
        axes.plot(strengths, [merge[name].update_cosine for merge in merges], color=color, linewidth=2, label=title)
    axes.set(xscale="log", xlabel="update, in units of the weights' spread", ylabel="cosine with what was learnt",
             title="what a merge keeps")
    axes.legend()

# %% [markdown]
# ![cosine with the trained update over its strength, for three merges](figures/16_merging.png)
#
# ## Where it lives
#
# `minilora/layers/merge.py`: `merge_lora` and `MergeError`; the command is `minilora merge --into 16bit`.
# `minilora/adapters.py` records with an adapter how its base was quantized, and warns where another base comes.
#
# ## The trap
#
# "Adapters are portable." To the same base, quantized the same way. Another block size is another Ŵ:

# %%
other = quantize_nf4(original, blocksize=256).dequantize()
gap = float((other - base.dequantize()).norm() / (0.1 * direction).norm())
print(f"blocks of 256 instead of 64: the base differs by {gap:.2f} times a 10 % update")
assert gap > 1

# %% [markdown]
# Every tool will load that without a word: all shapes fit. So save block size, table and double quantization with the
# adapter.
#
# ## Your turn
#
# Write `merge_16bit` and `update_cosine` in `lessons/exercises/16.py`, then:
#
#     minilora check 16
