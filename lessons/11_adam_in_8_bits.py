# %% [markdown]
# # 11 · Adam, and its state in 8 bits
#
# ## The question
#
# The optimizer remembers two numbers for each one that it trains: 8 bytes in float32. For full fine-tuning that is twice
# the model again. What are these numbers good for, and can they be had in 2 bytes?

# %%
import math

import torch

from minilora import PagedAdamW
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.optim.adamw import AdamW, adamw_update
from minilora.optim.paged_adamw import SMALLEST_8BIT
from minilora.quant.blockwise import dequantize_blockwise, quantize_blockwise
from minilora.quant.codebooks import DYNAMIC_8BIT_UNSIGNED

# %% [markdown]
# For each parameter Adam keeps a running mean of its gradient, m, and one of its square, v:
#
#     m ← 0.9 m + 0.1 g              v ← 0.999 v + 0.001 g²
#     θ ← θ − lr · m̂ / (√v̂ + ε)      m̂ = m / (1 − 0.9ᵗ),  v̂ = v / (1 − 0.999ᵗ)
#
# **Predict.** Two parameters start at 0. The gradient of the first is a millionth, that of the second 100. At lr = 0.1, how
# far does the first step move each?

# %%
theta = torch.nn.Parameter(torch.zeros(2))
theta.grad = torch.tensor([1e-6, 100.0])
AdamW([theta], lr=0.1).step()
print("moved by", theta.detach().tolist())
assert torch.allclose(theta.detach(), torch.tensor([-0.1, -0.1]), rtol=0.02)

# %% [markdown]
# Both by 0.1 (the first a hair less, because of ε). The usual guess is "a hundred million times farther". But m̂/√v̂ is
# g/|g| at the first step: Adam looks at the *sign*, and the learning rate is the distance. That is why rates are given as
# plain numbers, whatever the size of the gradients.
#
# m and v start at zero, so early on both are too small, and not by the same factor. Leave the correction out, and the first
# step is

# %%
first_step = 0.1 / math.sqrt(0.001)
print(f"0.1 g / √(0.001 g²) = {first_step:.2f} times too long")
assert round(first_step, 2) == 3.16

# %% [markdown]
# ## Two bytes
#
# Now quantize both, with what lesson 04 taught: blocks (256 here), an absmax each, 8-bit codes. One question is left: which
# 256 levels? Let us look at the second moments of a small regression first.

# %%
torch.manual_seed(0)
inputs = torch.randn(512, 64) * torch.logspace(-3, 0, 64)          # features of very different size, as in real layers
targets = inputs @ torch.randn(64, 64)
weight = torch.nn.Parameter(torch.zeros(64, 64))


def loss_of(weight):
    return (inputs @ weight - targets).square().mean()


optimizer = AdamW([weight], lr=1e-2)
for _ in range(50):
    optimizer.zero_grad()
    loss_of(weight).backward()
    optimizer.step()
v = optimizer.state[weight]["exp_avg_sq"].flatten()
spread = float(v.view(-1, 256).amax(1).div(v.view(-1, 256).amin(1)).median())
print(f"within one block of 256, the largest v is {spread:.0e} times the smallest")
assert spread > 1e4

# %% [markdown]
# **Predict.** With 256 *evenly spaced* levels from 0 to the block's largest: what share of these v becomes exactly zero?

# %%
even = torch.arange(256) / 255
maps = {"evenly spaced": even, "dynamic map": DYNAMIC_8BIT_UNSIGNED}
restored = {name: dequantize_blockwise(*quantize_blockwise(v, table, 256), table, 256) for name, table in maps.items()}
zeros = {name: float((values == 0).float().mean()) for name, values in restored.items()}
for name, share in zeros.items():
    print(f"{name:14s} {share:.1%} become zero")
assert zeros["evenly spaced"] > 0.1 and zeros["dynamic map"] < 0.02

# %% [markdown]
# A v that is zero is not a small error. The step divides by its root, so ε alone is left below the line:

# %%
longer = {name: (v.sqrt() + 1e-8) / (values.sqrt() + 1e-8) for name, values in restored.items()}
for name, factor in longer.items():
    print(f"{name:14s} the worst step becomes {float(factor.max()):,.1f} times as long")
assert longer["evenly spaced"].max() > 1000 and longer["dynamic map"].max() < 10

# %% [markdown]
# The *dynamic map* (arXiv 2110.02861) has levels in every decade from 1 down to a ten-millionth. It is coarse everywhere,
# by a few percent for most, and blind nowhere.
#
# ## The picture

# %%
with picture("11_dynamic_map", columns=2) as (left_axes, right_axes):
    scaled = (v.view(-1, 256) / v.view(-1, 256).amax(1, keepdim=True)).flatten().log10()
    left_axes.hist(scaled, bins=60, color=GREY)
    left_axes.plot(even[1:].log10(), [-12] * 255, "|", color=RED, markersize=9)
    left_axes.plot(DYNAMIC_8BIT_UNSIGNED[1:].log10(), [-32] * 255, "|", color=BLUE, markersize=9)
    left_axes.set(title="second moments, and where the levels are", xlabel="log10 of v / its block's largest", yticks=[],
                  xlim=(-7.2, 0.2))
    left_axes.annotate("evenly spaced", (-7, -20), color=RED, fontsize=9)
    left_axes.annotate("dynamic map", (-7, -40), color=BLUE, fontsize=9)
    for name, color in (("evenly spaced", RED), ("dynamic map", BLUE)):
        right_axes.hist(longer[name].log10().clamp(-1, 6), bins=60, color=color, alpha=0.7, label=name)
    right_axes.set(title="how much longer a step becomes", xlabel="log10 of the factor", yscale="log", ylabel="parameters")
    right_axes.legend()

# %% [markdown]
# ![second moments and the levels of two maps; by what factor steps become longer](figures/11_dynamic_map.png)
#
# ## Does it train?
#
# `PagedAdamW(state_bits=8)` keeps both moments so (tensors of fewer than 4,096 elements stay in float32, as in
# bitsandbytes).

# %%
exact, rounded = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64))
steppers = [AdamW([exact], lr=1e-2), PagedAdamW([rounded], lr=1e-2, state_bits=8)]
for _ in range(100):
    for stepper in steppers:
        stepper.zero_grad()
        loss_of(stepper.param_groups[0]["params"][0]).backward()
        stepper.step()
off = float((exact - rounded).detach().norm() / exact.detach().norm())
state = steppers[1].state_dict()["state"][0]
stored = sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name != "step")
print(f"after 100 steps: loss {float(loss_of(exact).detach()):.5f} in 32 bits, {float(loss_of(rounded).detach()):.5f} in 8; "
      f"weights differ by {off:.1%}")
print(f"{stored / rounded.numel():.3f} bytes a parameter instead of 8")
assert SMALLEST_8BIT == 4096 and off < 0.2 and round(stored / rounded.numel(), 3) == 2.031

# %% [markdown]
# ## Where it lives
#
# `minilora/optim/adamw.py`: the update rule in ten lines, equal to torch's to the bit (`tests/optim/test_adamw.py`), and
# `Moments8bit`. Sources: Adam (arXiv 1412.6980), decoupled decay (arXiv 1711.05101), 8-bit state (arXiv 2110.02861).
#
# ## The trap
#
# Evenly spaced levels again, this time in a training run. Everything else is the same.

# %%
def train_with(table, steps=60):
    weight, m, v = torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64)
    for step in range(1, steps + 1):
        grad, = torch.autograd.grad(loss_of(weight.requires_grad_(True)), weight)
        weight = weight.detach()
        adamw_update(weight, grad, m, v, step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        v = dequantize_blockwise(*quantize_blockwise(v.flatten(), table, 256), table, 256).view(64, 64)
    return weight


found = {name: train_with(table) for name, table in maps.items()}
loss_start = float(loss_of(torch.zeros(64, 64)))
for name, weight in found.items():
    print(f"{name:14s} loss {loss_start:.2f} -> {float(loss_of(weight)):.2f}, largest weight {float(weight.abs().max()):,.1f}")
assert loss_of(found["dynamic map"]) < 0.6 * loss_start < loss_of(found["evenly spaced"])
assert found["evenly spaced"].abs().max() > 10 * found["dynamic map"].abs().max()

# %% [markdown]
# For *weights* evenly spaced levels were only a little worse. For a number that is divided by, they are a catastrophe. The
# right table depends on what the number is used for.
#
# ## Your turn
#
# Write `adamw_step` and `encode_second_moment` in `lessons/exercises/11.py`, then:
#
#     minilora check 11
