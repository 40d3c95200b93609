# %% [markdown]
# # 02 · Low-rank updates
#
# ## The question
#
# Fine-tuning changes every weight of a model a little: W becomes W + ΔW. There are as many numbers in ΔW as in W, and an
# optimizer keeps two more for each of them. Do we need them all?
#
# In this lesson we fine-tune a small model *completely*, look at what ΔW looks like, and throw most of it away.

# %%
import torch

from minilora import load_model, load_tokenizer
from minilora.course.pictures import BLUE, GREY, picture
from minilora.data import radiology
from minilora.data.batches import collate
from minilora.data.prompts import encode_example, load_template
from minilora.layers.starts import low_rank
from minilora.loss import label_loss, validation_loss
from minilora.optim.adamw import AdamW

# %% [markdown]
# The model is the one that ships with the package: a Llama with six blocks of width 256. The task: an order note in, the
# name of an imaging protocol out.

# %%
tokenizer, template = load_tokenizer("tiny"), load_template("tiny")
notes = radiology.generate(n=1000, seed=0)


def encode(rows):
    return [encode_example(tokenizer, template, row.note, row.label, max_length=128) for row in rows]


train_set, held_out = encode(notes["train"][:192]), encode(notes["val"][:48])
model = load_model("tiny", quantize=None, dtype=torch.float32)
linears = {name: module for name, module in model.named_modules()
           if isinstance(module, torch.nn.Linear) and ".layers." in name}
before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
loss_before = validation_loss(model, held_out, 16)

print(notes["train"][0].note, "->", notes["train"][0].label)
print(f"{len(linears)} matrices; loss on held-out notes before training: {loss_before:.2f} nats a label token")

# %% [markdown]
# Full fine-tuning: 24 steps of AdamW on all the weights of these matrices, no LoRA anywhere.

# %%
model.requires_grad_(False)
for linear in linears.values():
    linear.weight.requires_grad_(True)
optimizer = AdamW([linear.weight for linear in linears.values()], lr=5e-4)

for step in range(24):
    batch = collate(train_set[8 * step : 8 * step + 8], pad_id=0)
    (label_loss(model, batch) / batch.label_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()

delta = {name: linear.weight.detach() - before[name] for name, linear in linears.items()}
loss_after = validation_loss(model, held_out, 16)
print(f"loss after training: {loss_after:.2f}")
assert loss_after < loss_before / 3

# %% [markdown]
# ## A prediction
#
# Every ΔW here has rank up to 256. Now replace each by its best approximation of **rank 1**: one column times one row. For
# a 256 × 256 matrix that is 512 numbers instead of 65,536.
#
# **Predict.** What share of the improvement in loss is left? Write a percentage down, and another one for rank 8.

# %%
assert 256 + 256 == 512 and 256 * 256 == 65_536
parts = {name: low_rank(change, 64) for name, change in delta.items()}       # columns sorted, the strongest first
kept = {}
for r in (1, 2, 4, 8, 16, 64):
    with torch.no_grad():
        for name, linear in linears.items():
            left, right = parts[name]
            linear.weight.copy_(before[name] + left[:, :r] @ right[:r])
    kept[r] = (loss_before - validation_loss(model, held_out, 16)) / (loss_before - loss_after)
    print(f"rank {r:3d}: {kept[r]:6.1%} of the improvement is left")

assert kept[1] > 0.8 and kept[8] > 0.95

# %% [markdown]
# Most people guess far too low: a matrix with one 256th of its directions left sounds like a matrix with most of its effect
# gone. But what training adds is not an arbitrary matrix. Each example pushes W by an outer product (gradient × input), all
# of the examples push for the same task, and so a few directions collect nearly all of the effect.
#
# That is the whole bet of LoRA (arXiv 2106.09685, section 4.1): if the answer is low-rank anyway, *train* it in that form,
#
#     W + ΔW = W + B A          B: (out, r)    A: (r, in)
#
# and never store a gradient or an optimizer state for W.

# %% [markdown]
# **Predict.** A layer with 20,000 inputs and 10,000 outputs holds 200,000,000 numbers. How many does LoRA train beside it
# at r = 8?

# %%
inputs, outputs, r = 20_000, 10_000, 8
full, lora = inputs * outputs, r * inputs + r * outputs
print(f"{full:,} in W; {lora:,} in A and B together: {full // lora} times fewer")
assert (full, lora) == (200_000_000, 240_000)

# %% [markdown]
# The usual wrong guess multiplies (8 × 20,000 × 10,000, more than W itself). A and B stand side by side, so their sizes
# *add*: the cost grows with the sides of the matrix, not with its area. The larger the layer, the better the bargain.
#
# ## The picture

# %%
name = "model.layers.3.self_attn.q_proj"
with picture("02_low_rank", columns=2) as (left_axes, right_axes):
    for matrix, color, label in ((before[name], GREY, "W"), (delta[name], BLUE, "ΔW")):
        values = torch.linalg.svdvals(matrix)
        left_axes.plot(range(1, 257), values / values[0], color=color, linewidth=2, label=label)
    left_axes.set(xlabel="direction", ylabel="strength (first = 1)", title="q_proj of block 3: singular values")
    left_axes.legend()
    bars = right_axes.bar(["0", *map(str, kept), "256"], [0, *kept.values(), 1], color=BLUE)
    right_axes.bar_label(bars, [f"{share:.0%}" for share in (0, *kept.values(), 1)], fontsize=9)
    right_axes.set(xlabel="rank kept of each ΔW", title="share of the improvement that is left")

# %% [markdown]
# ![singular values of W and of its change; the improvement left at each rank](figures/02_low_rank.png)
#
# The strength of W falls slowly: a pretrained matrix uses all its directions, and you could not cut *it* to rank 8. The
# change falls steeply. It is the update that is low-rank, not the weight.
#
# ## Where it lives
#
# `low_rank` is in `minilora/layers/starts.py` (it also gives PiSSA and LoftQ their first A and B); the layer that trains A
# and B is in `minilora/layers/lora.py`, and is the next lesson.
#
# ## The trap
#
# "Any matrix is nearly low-rank" is false. Take a random change of the same size and cut it in the same way.

# %%
random_change = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))


def strength_kept(matrix, r):
    values = torch.linalg.svdvals(matrix).square()
    return float(values[:r].sum() / values.sum())


for label, matrix in (("what training added", delta[name]), ("noise", random_change)):
    print(f"rank 8 keeps {strength_kept(matrix, 8):5.1%} of the squared length of {label}")
assert strength_kept(random_change, 8) < 0.15 < 0.4 < strength_kept(delta[name], 8)

# %% [markdown]
# So LoRA is a bet about *tasks*. It is a good one when a model that knows a field learns to answer in a new format. It is a
# worse one when a model has to take in many unrelated facts, and then a higher r, or full tuning, is the honest answer.
#
# A second trap: a lower r does not make a step much faster. The frozen product x Wᵀ is still there, and it is hundreds of
# times larger.

# %%
multiplications_base, multiplications_lora = inputs * outputs, r * (inputs + outputs)
print(f"for each token: {multiplications_base:,} multiplications in x Wᵀ, {multiplications_lora:,} in (x Aᵀ) Bᵀ")

# %% [markdown]
# ## Your turn
#
# Write `trained_numbers` and `low_rank` in `lessons/exercises/02.py`, then:
#
#     minilora check 2
