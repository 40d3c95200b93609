# %% [markdown]
# # 01 · What fine-tuning costs
#
# ## The question
#
# A model with 7 billion parameters is a file of 13.48 GB. You have a graphics card of 24 GB, or a laptop of 16. Why can't
# you just train it? And what exactly does QLoRA take away so that you can?

# %%
import torch

from minilora import LoRAConfig, add_lora, load_model
from minilora.course.pictures import BLUE, GOLD, GREEN, GREY, RED, picture
from minilora.layers.qlora import trainable_parameters
from minilora.llama.config import linear_parameters, num_parameters
from minilora.memory import Peaks, Workload, predict
from minilora.shapes import shape_of

# %% [markdown]
# **Predict.** Llama 2 7B, one note of 512 tokens at a time, every weight trained by AdamW in float32. How many gigabytes
# does a step need?

# %%
config = shape_of("7b")
work = {"full": Workload("full", seq=512, compute=torch.float32), "LoRA": Workload("lora", seq=512),
        "QLoRA": Workload("qlora", seq=512)}
parts = {name: predict(config, each) for name, each in work.items()}
peaks = {name: max(Peaks.of(memory)) for name, memory in parts.items()}
print(f"{num_parameters(config):,} parameters; a step of full fine-tuning takes {peaks['full'] / 1e9:.0f} GB")
for name in ("weights", "gradients", "optimizer", "activations"):
    print(f"    {name:12s} {getattr(parts['full'], name) / 1e9:6.1f} GB")
assert 105 < peaks["full"] / 1e9 < 112

# %% [markdown]
# Whoever guesses 13 or 14 thinks of the file. Training float32 weights keeps four numbers for each: the weight, its
# gradient, and two that Adam remembers. That makes 16 bytes a parameter, before a single activation.
#
# LoRA (lessons 02 and 03) freezes the weights and trains two thin matrices beside each. QLoRA (04 to 07) then stores what
# is frozen in 4 bits.
#
# **Predict.** Which part does each of the two take away, and how much is left?

# %%
print(f"{'GB':14s}" + "".join(f"{name:>9s}" for name in parts))
for field in ("weights", "absmax", "adapters", "gradients", "optimizer", "activations", "scratch"):
    print(f"{field:14s}" + "".join(f"{getattr(memory, field) / 1e9:9.2f}" for memory in parts.values()))
print(f"{'peak':14s}" + "".join(f"{peak / 1e9:9.2f}" for peak in peaks.values()))
assert peaks["LoRA"] < 0.16 * peaks["full"] and peaks["QLoRA"] < 0.45 * peaks["LoRA"]
assert parts["LoRA"].optimizer < 0.01 * parts["full"].optimizer

# %% [markdown]
# LoRA takes away gradients and optimizer: from 81 GB to half a gigabyte. QLoRA takes away most of the *weights*. Neither
# does much about activations (they halve here because the arithmetic is 16-bit), and so they are the largest part that you
# can still shrink: lesson 13.

# %%
full, lora = ((parts[name].gradients + parts[name].optimizer) / 1e9 for name in ("full", "LoRA"))
print(f"gradients and optimizer: {full:.0f} GB full, {lora:.2f} GB with LoRA")
assert round(full) == 81 and lora < 0.5

# %% [markdown]
# **Predict.** 4 bits are a quarter of 16. So by what factor is the 7B model smaller in 4 bits?

# %%
in_linears = linear_parameters(config)
elsewhere = num_parameters(config) - in_linears
sixteen, four = 2 * num_parameters(config), in_linears * 4.127 / 8 + 2 * elsewhere
print(f"{sixteen / 1e9:.2f} GB -> {four / 1e9:.2f} GB: {sixteen / four:.2f} times smaller; "
      f"{elsewhere / num_parameters(config):.1%} of the weights stay in 16 bits")
assert round(sixteen / four, 2) == 3.49 and abs(four - parts["QLoRA"].weights - parts["QLoRA"].absmax) < 1e7

# %% [markdown]
# From 13.48 to 3.87 GB: 3.49 times and not 4, for two reasons. A weight costs 4.127 bits (lesson 06), and embeddings, head
# and norms stay in 16.
#
# ## The picture

# %%
fields = {"weights": GREY, "gradients": GOLD, "optimizer": RED, "activations": BLUE, "adapters": GREEN}
with picture("01_costs", columns=2, width=9, width_ratios=(1, 1.2)) as (left_axes, right_axes):
    for axes, names in ((left_axes, ("full", "LoRA", "QLoRA")), (right_axes, ("LoRA", "QLoRA"))):
        for position, name in enumerate(names):
            bottom = 0.0
            for field, color in fields.items():
                size = getattr(parts[name], field) / 1e9
                axes.bar(position, size, bottom=bottom, color=color, label=field if position == 0 else None)
                bottom += size
        axes.set_xticks(range(len(names)), names)
    left_axes.set(ylabel="GB", title="7B, one note of 512 tokens")
    right_axes.set(title="the same without the first bar")
    left_axes.legend(fontsize=9)

# %% [markdown]
# ![gigabytes of full fine-tuning, LoRA and QLoRA by what they hold](figures/01_costs.png)
#
# ## Where it lives
#
# `minilora/memory.py` predicts, part by part, before anything is loaded, and `minilora/measured.py` measures beside it:
#
#     minilora memory --model 7b --seq 512 --gradient-checkpointing
#
# The paper (QLoRA, arXiv 2305.14314, section 1) counts in the same way for 65 billion parameters: 16-bit weights and
# gradients, float32 moments.

# %%
in_16_bits, in_4_bits = 65e9 * (2 + 2 + 8) / 1e9, 65e9 * 4.127 / 8 / 1e9
print(f"65B: {in_16_bits:.0f} GB to fine-tune in 16 bits; the weights alone in 4 bits: {in_4_bits:.1f} GB")
assert in_16_bits == 780 and in_4_bits < 48

# %% [markdown]
# "More than 780 GB" became "less than 48 GB": one graphics card.
#
# ## The trap
#
# Libraries print a line like "trainable: 1.6 %". On a 4-bit model that line is often wrong, because it counts *tensor
# elements*, and a packed byte is one element that holds two weights.

# %%
model = add_lora(load_model("tiny"), LoRAConfig(r=16))
trained, everything = trainable_parameters(model)
packed = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("packed"))
elements = packed + sum(parameter.numel() for parameter in model.parameters())
print(f"trained: {trained:,} of {everything:,} weights, {trained / everything:.1%}; by elements {trained / elements:.1%}")
assert elements < 0.7 * everything and trained / elements > 1.4 * trained / everything

# %% [markdown]
# 12.8 % where 8.1 % is true. The model did not shrink when it was packed; the ruler did. `trainable_parameters` counts a
# 4-bit weight as the number that it stands for.
#
# ## Your turn
#
# Write `training_bytes` and `four_bit_bytes` in `lessons/exercises/01.py`, then:
#
#     minilora check 1
