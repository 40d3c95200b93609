# %% [markdown]
# # 18 · rsLoRA, DoRA, LoRA+, PiSSA
#
# ## The question
#
# A LoRA layer makes four choices: how strong the update is, what exactly is trained, how fast A and B move, and where
# they start (lesson 03). For each there is a paper that chooses otherwise, and each is a line or two. What does each of
# these lines do? And how would you find out whether it helps *you*?

# %%
import torch
from torch import nn

from minilora import LoRALinear, NF4Linear, NF4Tensor, load_model, quantize_nf4
from minilora.course.pictures import BLUE, GOLD, GREEN, GREY, RED, picture
from minilora.layers.starts import pissa, start_from_weight
from minilora.optim.adamw import AdamW
from minilora.stepping import rate_groups

SIZE = 128
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator)


# A weight as pretraining leaves it: some directions are strong, and the others fall off.
left, right = (torch.linalg.qr(random(SIZE, SIZE))[0] for _ in range(2))
weight = left @ torch.diag(2 / torch.arange(1, SIZE + 1).sqrt()) @ right.T
x = random(256, SIZE)


def layer(start=None, **settings):
    linear = nn.Linear(SIZE, SIZE, bias=False)
    linear.weight = nn.Parameter(weight.clone())
    made = LoRALinear(linear, generator=torch.Generator().manual_seed(1), **settings)
    if start:
        start_from_weight(made, weight, start)
    return made

# %% [markdown]
# ## rsLoRA: the strength
#
# r directions add up nearly at random, so their sum grows as √r. alpha / r shrinks faster than that, and a step at r = 64
# is shorter than one at r = 4 (the picture of lesson 03). rsLoRA (arXiv 2312.03732) divides by √r.
#
# **Predict.** You train with alpha = 32 at r = 16, and switch rsLoRA on. By what factor does the update grow? Which alpha
# makes it the layer that it was?

# %%
plain, switched = layer(r=16, alpha=32), layer(r=16, alpha=32, use_rslora=True)
put_right = layer(r=16, alpha=8, use_rslora=True)
print(f"scaling {plain.scaling:g} -> {switched.scaling:g}, {switched.scaling / plain.scaling:g} times; "
      f"with alpha = 8: {put_right.scaling:g}")
assert switched.scaling == 4 * plain.scaling and put_right.scaling == plain.scaling == 2

# %% [markdown]
# Four times, √16, and alpha = 8. rsLoRA is a rule for *changing r*: it keeps the strength where it was. At one r it is
# the same layer with another alpha, and so nothing that LoRA could not do.
#
# ## DoRA: length and direction
#
# Write each row of W as a length times a direction. The authors of DoRA (arXiv 2402.09353) saw that full fine-tuning
# moves the two independently, and that LoRA moves both or none. So each row gets a length of its own, m, which starts as
# W's:
#
#     W' = m · (W + s B A) / ‖W + s B A‖          ‖·‖ of each row
#
# The paper writes the norm of each *column*, because its W is (in, out), as its authors say (DoRA #1). Its columns are the rows
# of our W, and of W in their code and in PEFT.
#
# **Predict.** After training, B is made ten times larger. What becomes of the lengths of the rows of W', with LoRA and
# with DoRA?

# %%
lengths = {}
for name, dora in (("LoRA", False), ("DoRA", True)):
    one = layer(r=8, alpha=16, use_dora=dora)
    assert (one(x) - x @ weight.T).abs().max() < 1e-5               # at the start, the base
    with torch.no_grad():
        one.lora_B.weight.copy_(torch.randn(SIZE, 8, generator=torch.Generator().manual_seed(2)) * 0.05)
        before = one.merged_weight().norm(dim=1)
        one.lora_B.weight *= 10
        lengths[name] = one.merged_weight().norm(dim=1) / before
    print(f"{name}: lengths times {float(lengths[name].min()):.2f} to {float(lengths[name].max()):.2f}")
assert lengths["LoRA"].min() > 1.5 and (lengths["DoRA"] - 1).abs().max() < 1e-5

# %% [markdown]
# With DoRA nothing: B and A have no say in lengths, whatever their size, and m has all of it.
#
# **Predict.** How many numbers more are trained, in a layer of 4096 × 4096 at r = 16? And how often is a 4-bit weight
# unpacked in a step? (LoRA: twice, lesson 07.)

# %%
numbers, more = 16 * (4096 + 4096), 4096
rebuilt, original = [], NF4Tensor.dequantize


def counting(self, *args, **kwargs):
    rebuilt.append(self.shape)
    return original(self, *args, **kwargs)


NF4Tensor.dequantize = counting
times = {}
for name, dora in (("LoRA", False), ("DoRA", True)):
    one = LoRALinear(NF4Linear(quantize_nf4(weight)), r=8, use_dora=dora)
    rebuilt.clear()
    one(torch.ones(1024, SIZE, requires_grad=True)).sum().backward()
    times[name] = len(rebuilt)
NF4Tensor.dequantize = original
print(f"{numbers:,} numbers and {more:,} more, {more / numbers:.1%}; unpacked {times['LoRA']} times and {times['DoRA']} times")
assert (numbers, more) == (131_072, 4096) and times == {"LoRA": 2, "DoRA": 3}

# %% [markdown]
# 3.1 % more numbers are nothing. What is dear is the norm: it needs W + s B A, every step, so a 4-bit weight is unpacked
# once more, to memory, also where lesson 17 never writes it. The paper saves one thing: no gradient goes through the
# norm.
#
# ## LoRA+: two rates
#
# Adam moves each number by about the rate, however small its gradient. A has n columns. A note's gradient for a row of A
# is a multiple of x, so all n moves agree in sign with what they meet, and what they do to A x adds up.
#
# **Predict.** A layer becomes 16 times wider. By what factor does one step of A move A x further?

# %%
rate, moved = 2e-4, {}
for width in (256, 4096):
    note = torch.randn(width, generator=torch.Generator().manual_seed(0)).sign()
    a = nn.Linear(width, 16, bias=False)                # starts as A does, Kaiming-uniform
    before = a(note).detach()
    optimizer = AdamW(a.parameters(), lr=rate, weight_decay=0.0)
    a(note).sum().backward()
    optimizer.step()
    after = a(note).detach()
    moved[width] = float((after - before).abs().mean())
    by_b = rate * float(before.abs().sum())             # B starts at zero, and its entries move by the rate, too
    print(f"width {width:4d}: entries of A x are about {float(before.abs().mean()):.2f}; a step of A moves them by "
          f"{moved[width]:.3f}, one of B moves y by {by_b:.4f}")
    assert 0.001 < by_b < 0.002
factor = moved[4096] / moved[256]
print(f"{factor:.0f} times")
assert abs(factor - 16) < 0.1 and moved[4096] > 0.5

# %% [markdown]
# Sixteen. In a wide layer one step at a usual rate moves A x by about as much as it is large: A is as fast as it may be.
# B's rows have r entries, 16 in narrow layers and in wide ones: its step does a five-hundredth of that, and B could go
# faster. That is LoRA+ (arXiv 2402.12354): B gets a multiple of A's rate. In code it is a second group of parameters.

# %%
one = layer(r=8, use_dora=True)
names = {parameter: name for name, parameter in one.named_parameters()}
for parameters, relative in rate_groups(one, 16):
    print(f"rate times {relative:4g}: {', '.join(names[parameter] for parameter in parameters)}")
assert [names[parameter] for parameter in rate_groups(one, 16)[1][0]] == ["lora_B.weight"]

# %% [markdown]
# ## PiSSA: a start from the weight
#
# LoRA starts at nothing, B A = 0. PiSSA (arXiv 2404.02948) starts at the r strongest directions of W: the base keeps the
# *rest*, and A and B hold what was taken out.
#
#     W = U S Vᵀ     B = U √S / √s     A = √S Vᵀ / √s     base = W − s B A          S cut after r
#
# The rest is smaller, so it loses less in 4 bits.
#
# **Predict.** For the weights of the small model, at r = 16: by how many percent does the 4-bit error fall?

# %%
def error(matrix):
    return float((quantize_nf4(matrix).dequantize() - matrix).norm())


model = load_model("tiny", quantize=None, dtype=torch.float32)
matrices = [module.weight.detach() for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name]
ratios = {r: sum(error(pissa(matrix, r)[0]) / error(matrix) for matrix in matrices) / len(matrices) for r in (16, 64)}
print(f"error with the strongest directions taken out: {ratios[16]:.2f} at r = 16, {ratios[64]:.2f} at r = 64")
assert 0.84 < ratios[16] < 0.90 and ratios[64] < 0.65

# %% [markdown]
# By 13 % or so at r = 16, and these matrices are small: sixteen directions of 128 or 256. Among a 7B's 4,096 they
# are a smaller part.
#
# But the main claim is that training is *faster*. Is it? Here are two tasks for our layer. In one, the right weight is W
# and *new* directions, which W does not know; in the other the *strong* directions of W are mixed anew. Both changes have
# rank 8 and the same length.

# %%
new = random(SIZE, 8) @ random(8, SIZE) / 200
strong = left[:, :8] @ random(8, 8) @ right[:, :8].T
strong *= new.norm() / strong.norm()


def fit(made, change, rate, ratio=1.0, steps=60):
    """The share of the task's loss that is left after some steps of AdamW."""
    groups = rate_groups(made, ratio)
    optimizer = AdamW([{"params": parameters} for parameters, _ in groups])
    for group, (_, relative) in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = rate * relative
    target = x @ (weight + change).T
    for _ in range(steps):
        (made(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(((made(x) - target).square().mean() / (x @ change.T).square().mean()).detach())

# %% [markdown]
# **Predict.** PiSSA at r = 8 learns each of the two. LoRA does both, with the right rate. Does PiSSA?

# %%
variants = {"LoRA": ({}, 1), "rsLoRA": ({"use_rslora": True}, 1), "DoRA": ({"use_dora": True}, 1), "LoRA+, 8 times": ({}, 8),
            "PiSSA": ({"start": "pissa"}, 1)}
rates = [0.0005 * 2 ** power for power in range(8)]
left_over = {task: {name: [fit(layer(r=8, alpha=16, **settings), change, rate, ratio) for rate in rates]
                    for name, (settings, ratio) in variants.items()}
             for task, change in (("new", new), ("strong", strong))}
for task, curves in left_over.items():
    print(f"{task:7s} LoRA  {' '.join(f'{share:6.1%}' for share in curves['LoRA'])}    of the loss is left, by rate")
    print(f"{task:7s} PiSSA {' '.join(f'{share:6.1%}' for share in curves['PiSSA'])}")
assert min(left_over["new"]["LoRA"]) < 0.01 and min(left_over["new"]["PiSSA"]) > 0.7
assert left_over["strong"]["PiSSA"][0] < 0.2 * left_over["strong"]["LoRA"][0]

# %% [markdown]
# On the strong directions PiSSA is far ahead: at the lowest rate it has 5 % of the loss left where LoRA has half. On the
# new ones it is stuck, at every rate. Its r directions are taken: whatever it is to learn, it must first give up
# something that it holds. How far it can get is known before a step is taken, by cutting "what it holds + what is
# new" to rank 8.

# %%
_, held_left, held_right = pissa(weight, 8)
strengths = torch.linalg.svdvals(x @ (held_left @ held_right + new).T)
bound = float(strengths[8:].square().sum() / (x @ new.T).square().sum())                # what no matrix of rank 8 can reach
print(f"PiSSA cannot get below {bound:.1%}; it came to {min(left_over['new']['PiSSA']):.1%}")
assert bound > 0.7 and abs(min(left_over["new"]["PiSSA"]) - bound) < 0.01

# %% [markdown]
# Which of the two is *your* task? Nobody knows beforehand. On the demo's notes (the table in the project's README)
# PiSSA's loss is LoRA's.
#
# And what PiSSA trained fits no other base: over W itself, the strongest directions are there twice.

# %%
started = layer("pissa", r=8, alpha=16)
on_its_base, on_the_original = started(x).detach(), (x @ (weight + started.update()).T).detach()
off = [float((y - x @ weight.T).norm() / (x @ weight.T).norm()) for y in (on_its_base, on_the_original)]
print(f"before any training, off the model by {off[0]:.0e} over its own base, by {off[1]:.0%} over the original")
assert off[0] < 1e-5 and off[1] > 0.5

# %% [markdown]
# ## The picture

# %%
colors = dict(zip(variants, (BLUE, GOLD, GREEN, RED, GREY), strict=True))
with picture("18_variants", columns=2, width=8, height=3) as both_axes:
    for axes, (task, curves) in zip(both_axes, left_over.items(), strict=True):
        for name, shares in curves.items():
            axes.plot(rates, shares, "o-", color=colors[name], markersize=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="learning rate (of A)", title=f"{task} directions: loss left, 60 steps")
    both_axes[0].legend(fontsize=8, loc="lower left")

# %% [markdown]
# ![loss left over the learning rate for five variants, on a task of new and one of strong directions](figures/18_variants.png)
#
# ## Where it lives
#
# `minilora/layers/lora.py`: rsLoRA is a line of `scaling`, DoRA the end of `forward`. `minilora/layers/starts.py`: PiSSA,
# and LoftQ, which starts from what quantization lost. `minilora/stepping.py`: `rate_groups`. Flags of `minilora train`:
# `--use-rslora`, `--use-dora`, `--loraplus-lr-ratio`, `--init-lora-weights`. `tests/peers/test_peft.py` holds them
# against PEFT's.
#
# ## The trap
#
# "Our variant beats LoRA." At which rate? rsLoRA and LoRA+ take longer steps, so they win wherever the rate was too low,
# and lose wherever it was too high:

# %%
def at(name, index):
    return left_over["new"][name][index]


four = list(variants)[:4]
for index, word in ((1, "low"), (6, "high")):
    print(f"a {word:4s} rate, {rates[index]:.3f}:  " + ", ".join(f"{name} {at(name, index):.1%}" for name in four))
print("each at its best:      " + ", ".join(f"{name} {min(left_over['new'][name]):.1%}" for name in four))
assert max(at("rsLoRA", 1), at("LoRA+, 8 times", 1)) < at("LoRA", 1)
assert min(at("rsLoRA", 6), at("LoRA+, 8 times", 6)) > at("LoRA", 6)
assert max(min(left_over["new"][name]) for name in four) < 0.02

# %% [markdown]
# Three variants, one experiment, and whichever conclusion you like. Each at its own best rate they all solve the task. So
# give every variant its own rates, look at the whole curve, repeat with other seeds, and count the runs that you spent:
# LoRA with as many tries is the thing to beat. The package's own table in the README gives each variant LoRA's rate, and
# says that it does.
#
# ## Your turn
#
# Write `rslora_scaling`, `dora_weight`, `loraplus_rates` and `pissa_start` in `lessons/exercises/18.py`, then:
#
#     minilora check 18
