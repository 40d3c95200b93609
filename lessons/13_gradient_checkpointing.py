# %% [markdown]
# # 13 · Gradient checkpointing
#
# ## The question
#
# The weights are in 4 bits, the optimizer has little to remember. What is left in memory? The *activations*: whatever the
# forward computes and the backward needs. They grow with each token, and 4 bits do nothing about them. Can they go, too?

# %%
import warnings

import torch
import torch.utils.checkpoint
from torch.autograd.graph import saved_tensors_hooks

from minilora import LoRAConfig, LoRALinear, NF4Tensor, add_lora
from minilora.course.pictures import BLUE, RED, picture
from minilora.data.batches import collate
from minilora.data.prompts import IGNORED, Example
from minilora.llama.config import LlamaConfig
from minilora.loss import label_loss
from minilora.shapes import random_model

# %% [markdown]
# A small random QLoRA model, and notes of 200 tokens of which the last four carry loss.

# %%
def make_model(layers):
    shape = {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
             "num_key_value_heads": 4, "intermediate_size": 344, "vocab_size": 500, "max_position_embeddings": 256,
             "rms_norm_eps": 1e-5}
    model = random_model(LlamaConfig.from_dict(shape), dtype=torch.float32)
    return add_lora(model, LoRAConfig(r=8), generator=torch.Generator().manual_seed(0)).train()


generator = torch.Generator().manual_seed(0)
notes = [torch.randint(0, 500, (200,), generator=generator).tolist() for _ in range(4)]
batch = collate([Example(ids, [IGNORED] * 196 + ids[-4:]) for ids in notes], pad_id=0)


def kept_bytes(model):
    """What is kept between forward and backward, each tensor once, without the parameters."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def remember(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(remember, lambda tensor: tensor):
        label_loss(model, batch)
    return sum(kept.values())

# %% [markdown]
# The idea (arXiv 1604.06174): of each block keep only what went *in*. When the backward comes to the block, run it again,
# and use what that makes. (Here each half of a block, attention and MLP, is run again by itself, so both inputs are kept.)
#
# **Predict.** Eight blocks. By what factor does the memory shrink that is kept between forward and backward?

# %%
model = make_model(layers=8)
plain = kept_bytes(model)
model.gradient_checkpointing = True
frugal = kept_bytes(model)
print(f"kept: {plain / 1e6:.1f} MB, with checkpointing {frugal / 1e6:.1f} MB: {plain / frugal:.1f} times less")
assert plain > 4 * frugal

# %% [markdown]
# The usual guess is "half". But a block keeps more than a dozen tensors inside, several of them wider than its input, and
# all of them go.
#
# **Predict.** And the price? Everybody says: "a third more time", since a backward costs two forwards. How many times is
# each 4-bit weight rebuilt in a step, with and without?

# %%
def rebuilt_weights(model):
    counted, original = [0, 0], NF4Tensor.dequantize

    def counting(self, *args, **kwargs):
        counted[0] += 1
        return original(self, *args, **kwargs)

    NF4Tensor.dequantize = counting
    label_loss(model, batch).backward()
    NF4Tensor.dequantize = original
    return counted[0]


model.gradient_checkpointing = False
without, linears = rebuilt_weights(model), 8 * 7
model.gradient_checkpointing = True
having = rebuilt_weights(model)
print(f"{linears} linears: rebuilt {without} times without, {having} times with: {having / without - 1:.0%} more products")
assert 1.9 * linears < without < 2 * linears and 0.45 < having / without - 1 < 0.55

# %% [markdown]
# "A third" is right for full fine-tuning, where a backward is two products, for ∂x and for ∂W. A frozen weight has no ∂W.
# Its backward is *one* product, so a second forward costs half as much again. (In large layers the package makes the base
# product last, and stops recomputing before it: nothing that the backward needs comes after.)
#
# The gradients are the same, to the bit:

# %%
def gradients(checkpointing):
    model.gradient_checkpointing = checkpointing
    model.zero_grad()
    label_loss(model, batch).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


same = all(torch.equal(one, other) for one, other in zip(gradients(False), gradients(True), strict=True))
print("equal gradients:", same)
assert same

# %% [markdown]
# ## The picture

# %%
depths = (1, 2, 4, 6, 8, 10)
curves = {False: [], True: []}
for depth in depths:
    deeper = make_model(depth)
    for checkpointing, values in curves.items():
        deeper.gradient_checkpointing = checkpointing
        values.append(kept_bytes(deeper) / 1e6)
with picture("13_checkpointing", width=6, height=3.2) as axes:
    axes.plot(depths, curves[False], "o-", color=RED, label="everything kept")
    axes.plot(depths, curves[True], "o-", color=BLUE, label="checkpointing: inputs of the halves of blocks")
    axes.set(xlabel="blocks", ylabel="MB", title="kept between forward and backward, 4 notes of 200 tokens", ylim=(0, None))
    axes.legend()

# %% [markdown]
# ![megabytes kept over the number of blocks, with and without checkpointing](figures/13_checkpointing.png)
#
# ## Where it lives
#
# `minilora/llama/recompute.py`, with dropout, autocast and the early stop. `tests/llama/test_recompute.py` holds its
# gradients against torch's to the bit. `minilora memory --gradient-checkpointing` says what it will save before you load a
# model.
#
# For long notes it goes two steps further. An MLP treats each token by itself, so its inside need not be there for all
# tokens at once: it is computed again some rows at a time (`recompute_rows`). And the inputs that are kept need not lie on
# the GPU: the backward asks for them one after another, and the host has room (`--activation-offloading`). What is left on
# the GPU is the inside of one attention, whatever the number of blocks.
#
# ## The trap
#
# torch has had checkpointing for years, and its older form ("reentrant") has a trap made for LoRA. It looks whether the
# block's *input* needs a gradient. Below the first adapter everything is frozen, so the first block's input needs none.

# %%
layer = LoRALinear(torch.nn.Linear(16, 16), r=4)
x = torch.randn(3, 16)                                  # from a frozen embedding: needs no gradient


def gradient_of_b(run):
    layer.zero_grad()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = run(x)
        if y.requires_grad:
            y.sum().backward()
    return layer.lora_B.weight.grad, [str(warning.message)[:60] for warning in told]


for reentrant in (True, False):
    found, told = gradient_of_b(lambda x, r=reentrant: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=r))
    print(f"use_reentrant={reentrant}: gradient of B: {'none' if found is None else f'{float(found.norm()):.2f}'}  {told}")
    assert (found is None) == reentrant

# %% [markdown]
# Nothing is trained, and all that is left of it is a warning among a hundred others (LoRA #120, peft #137, peft #1142). The
# cure for *your* code is not another flag but a habit: after the first step, assert that every B has moved.

# %%
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
optimizer.step()
still = [name for name, p in model.named_parameters() if name.endswith("lora_B.weight") and not p.any()]
print("adapters that did not move:", still)
assert still == []

# %% [markdown]
# ## Your turn
#
# Write `checkpoint` in `lessons/exercises/13.py`, then:
#
#     minilora check 13
