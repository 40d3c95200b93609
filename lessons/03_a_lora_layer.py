# %% [markdown]
# # 03 · A LoRA layer
#
# ## The question
#
# The update is B A, with B: (out, r) and A: (r, in). That leaves four decisions. How do A and B start? How strong is the
# update? What are their gradients? And how do you get rid of the layer afterwards? The answer to each is one line, and
# people get each of these lines wrong.

# %%
import torch
from torch import nn

from minilora import LoRALinear
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.optim.adamw import AdamW

torch.manual_seed(0)
linear = nn.Linear(64, 64, bias=False)
x, target = torch.randn(256, 64), torch.randn(256, 64)

# %% [markdown]
# ## How it starts
#
# The model should be the pretrained one at step 0, so the update must be zero: B A = 0. One zero matrix is enough: B. A is
# random, Gaussian in the paper (section 4.1), uniform within 1/√in in loralib, in PEFT and here (`kaiming_uniform_`).
#
# **Predict.** A is random and B is zero. After the first backward, which of the two has a gradient that is not zero: A, B,
# both, or none?

# %%
layer = LoRALinear(linear, r=4, alpha=8)
assert torch.equal(layer(x), linear(x))             # the base model, to the bit

(layer(x) - target).square().mean().backward()
size_a, size_b = (float(part.weight.grad.norm()) for part in (layer.lora_A, layer.lora_B))
print(f"step 1: gradient of A {size_a:.4f}, of B {size_b:.4f}")
assert size_a == 0 and size_b > 0

# %% [markdown]
# Only B. The usual wrong guess is "none: B is zero, so nothing can pass through it". Write the gradients down, with y = x
# Wᵀ + s (x Aᵀ) Bᵀ and g = ∂L/∂y:
#
#     ∂L/∂B = s · gᵀ (x Aᵀ)          A is in it, B is not
#     ∂L/∂A = s · (g B)ᵀ x           B is in it
#
# So at step 1 B moves, and from step 2 on both do. Set *both* to zero and both gradients are zero for ever.

# %%
def fit(layer, steps=200, lr=1e-2):
    optimizer = AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=lr)
    losses = []
    for _ in range(steps):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


usual = fit(LoRALinear(linear, r=4, alpha=8))
dead_layer = LoRALinear(linear, r=4, alpha=8)
nn.init.zeros_(dead_layer.lora_A.weight)
dead = fit(dead_layer)
print(f"A random, B zero: loss {usual[0]:.3f} -> {usual[-1]:.3f}")
print(f"both zero:        loss {dead[0]:.3f} -> {dead[-1]:.3f}")
assert usual[-1] < 0.97 * usual[0] and dead[-1] == dead[0]

# %% [markdown]
# ## How strong it is
#
# The update is multiplied by `scaling` = alpha / r. With Adam, whose steps have a fixed size, alpha decides how far one step
# moves ΔW. So tuning it is roughly the same as tuning the learning rate, says the paper (arXiv 2106.09685, section 4.1), if
# the start is scaled appropriately. What differs: alpha is a factor in the forward as well. A rate is gone when training is
# over. Alpha stays, and belongs to what an adapter file means: the same A and B with twice the alpha are twice the update.
#
# **Predict.** Someone leaves the 1/r out, and uses alpha alone. They train with r = 4, then change r to 64. By what factor
# does the strength of one step change, compared with the correct layer?

# %%
def one_step(r, scaling, lr=1e-3):
    layer = LoRALinear(linear, r=r, alpha=8, generator=torch.Generator().manual_seed(0))
    layer.scaling = scaling
    fit(layer, steps=1, lr=lr)
    return layer


def first_step(r, scaling, lr=1e-3):
    return float(one_step(r, scaling, lr).update().detach().norm())


right = [first_step(r, 8 / r) for r in (4, 64)]
wrong = [first_step(r, 8) for r in (4, 64)]
print(f"with alpha / r: {right[0]:.3f} at r = 4, {right[1]:.3f} at r = 64: {right[1] / right[0]:.2f} times")
print(f"with alpha:     {wrong[0]:.3f} at r = 4, {wrong[1]:.3f} at r = 64: {wrong[1] / wrong[0]:.2f} times")
factor = (wrong[1] / wrong[0]) / (right[1] / right[0])
print(f"the mistake makes the step {factor:.1f} times longer")
assert 15.9 < factor < 16.1                          # 64 / 4

once, by_alpha, by_rate = first_step(4, 8 / 4), first_step(4, 16 / 4), first_step(4, 8 / 4, lr=2e-3)
print(f"twice the alpha: a step {by_alpha / once:.2f} times as long; twice the rate: {by_rate / once:.2f} times")
assert abs(by_alpha / by_rate - 1) < 1e-3
trained = one_step(4, 8 / 4)
before, trained.scaling = trained.update().detach(), 16 / 4
assert torch.equal(trained.update(), 2 * before)     # after training a rate would change nothing

# %% [markdown]
# Sixteen: exactly the ratio of the ranks, and nothing crashes. A hand-copied class in a well-known book had this bug for a
# year (LLMs-from-scratch #821, #1080): every result was plausible, and no rate carried over from one r to the next.
#
# Look at the first line as well: even the correct step is not the same at both ranks. r matrices of rank one add up nearly
# at random, so their sum grows about as √r, while alpha / r shrinks as 1/r. That is the argument of rsLoRA (arXiv
# 2312.03732) for alpha / √r.
#
# ## How it ends
#
# Because y = x Wᵀ + s (x Aᵀ) Bᵀ = x (W + s B A)ᵀ, the trained layer *is* a plain linear layer. Merge, and r is gone.

# %%
layer = LoRALinear(linear, r=4, alpha=8)
fit(layer)
merged = x @ layer.merged_weight().T
off = float((merged - layer(x)).detach().abs().max() / merged.detach().abs().max())
print(f"merged and unmerged differ by {off:.1e} of the largest output: float32 rounding")
assert off < 1e-5

# %% [markdown]
# In float32 merging is exact up to rounding. Over a 4-bit base it is not: lesson 16.
#
# ## The picture

# %%
ranks = (1, 2, 4, 8, 16, 32, 64)
with picture("03_lora_layer", columns=2) as (left_axes, right_axes):
    left_axes.plot(usual, color=BLUE, linewidth=2, label="A random, B zero")
    left_axes.plot(dead, color=RED, linewidth=2, label="both zero")
    left_axes.set(xlabel="step", ylabel="loss", title="the start")
    left_axes.legend()
    right_axes.plot(ranks, [first_step(r, 8 / r) for r in ranks], "o-", color=BLUE, label="alpha / r")
    right_axes.plot(ranks, [first_step(r, 8 / r ** 0.5) for r in ranks], "o-", color=GREY, label="alpha / √r (rsLoRA)")
    right_axes.plot(ranks, [first_step(r, 8) for r in ranks], "o-", color=RED, label="alpha")
    right_axes.set(xlabel="r", xscale="log", yscale="log", title="length of ΔW after the first step")
    right_axes.set_xticks(ranks, map(str, ranks))
    right_axes.minorticks_off()
    right_axes.legend()

# %% [markdown]
# ![loss with a good and a dead start; the first step's length over r for three scalings](figures/03_lora_layer.png)
#
# ## Where it lives
#
# `minilora/layers/lora.py`, with rsLoRA and DoRA. `tests/peers/test_peft.py` holds outputs, gradients and files against
# PEFT's.

# %%
print(LoRALinear(linear, r=4, alpha=8))

# %% [markdown]
# ## The trap
#
# Adapters are float32 here, whatever the base is stored in. Why not bfloat16, like everything else? It keeps 8 bits of
# precision: a step smaller than 1/256 of an entry rounds back to where it was.

# %%
entry, step = 1.0, 1e-3
wide, narrow = torch.tensor(entry), torch.tensor(entry, dtype=torch.bfloat16)
for _ in range(1000):
    wide, narrow = wide + step, narrow + step
print(f"1 + 1000 steps of 0.001: {float(wide):.3f} in float32, {float(narrow):.3f} in bfloat16")
assert abs(float(wide) - 2) < 1e-3 and float(narrow) == 1

# %% [markdown]
# A thousand steps, and nothing was learnt. No error, no warning: the loss is simply flat.
#
# ## Your turn
#
# Write `lora_forward`, `lora_start` and `lora_gradients` in `lessons/exercises/03.py`, then:
#
#     minilora check 3
