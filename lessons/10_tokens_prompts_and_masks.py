# %% [markdown]
# # 10 · Tokens, prompts and masks
#
# ## The question
#
# What does the model *see*? Most fine-tunings that fail do not fail in the mathematics. They fail in the twenty lines that
# turn a note and a label into numbers, and nothing ever raises an error. Here are four of these bugs, each shown at work.

# %%
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F

import minilora
from minilora import LoRAConfig, add_lora, load_model, load_tokenizer
from minilora.course.pictures import GREEN, GREY, picture
from minilora.data import batches, prompts, radiology
from minilora.loss import label_loss
from minilora.optim.adamw import AdamW
from minilora.show import token_texts

tokenizer, template = load_tokenizer("tiny"), prompts.load_template("tiny")
row = radiology.generate(n=1000, seed=0)["train"][5]
example = prompts.encode_example(tokenizer, template, row.note, row.label, max_length=256)
for text, label in zip(token_texts(tokenizer, example.input_ids), example.labels, strict=True):
    print(f"[{text}]" if label != prompts.IGNORED else f"{text}|", end="")

# %% [markdown]
# That is one training example: tokens end at `|`, and those in brackets carry loss. The rest has the label -100, which the
# loss skips.
#
# **Predict.** What share of the tokens of a training set like this carries loss?

# %%
rows = radiology.generate(n=1000, seed=0)["train"][:200]
examples = [prompts.encode_example(tokenizer, template, row.note, row.label, max_length=256) for row in rows]
with_loss = sum(label != prompts.IGNORED for example in examples for label in example.labels)
tokens = sum(len(example.input_ids) for example in examples)
print(f"{with_loss:,} of {tokens:,} tokens: {with_loss / tokens:.0%}")
assert 0.08 < with_loss / tokens < 0.12

# %% [markdown]
# ## Bug 1: loss on the prompt
#
# The guess is often "half". It is a tenth or so, because labels are short and notes are long. Forget the mask, and nine
# tenths of the training goes into *writing notes*.

# %%
model = load_model("tiny", quantize=None, dtype=torch.float32)
ids = torch.tensor([example.input_ids])
with torch.no_grad():
    losses = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
carries = torch.tensor(example.labels[1:]) != prompts.IGNORED
print(f"loss in all, before training: {float(losses[~carries].sum()):.0f} nats on {int((~carries).sum())} prompt tokens, "
      f"{float(losses[carries].sum()):.0f} on {int(carries.sum())} label tokens")
assert losses[~carries].sum() > losses[carries].sum()

# %% [markdown]
# ## Bug 2: two begin tokens
#
# A template that begins with the text `<s>` looks harmless. But the tokenizer adds a begin token of its own, and most
# tokenizers read the text `<s>` as that token, too.

# %%
raw = tokenizers.Tokenizer.from_file(str(Path(minilora.__file__).parent / "assets" / "tiny" / "tokenizer.json"))
usual = [tokenizer.bos_id, *raw.encode("<s>Note: r/o PE", add_special_tokens=False).ids]
ours = tokenizer.encode("<s>Note: r/o PE")
print("a usual tokenizer:", [raw.id_to_token(token) for token in usual[:4]])
print("the package's:    ", token_texts(tokenizer, ours)[:6])
assert usual.count(tokenizer.bos_id) == 2 and ours.count(tokenizer.bos_id) == 1

# %% [markdown]
# The package never reads control tokens out of text, so that a *note* cannot smuggle one in either, and it refuses a
# template that spells one:

# %%
try:
    prompts.Template("mine", "<s>[INST] {input} [/INST]")
    raise AssertionError("it should have been refused")
except minilora.ConfigError as error:
    print(error)

# %% [markdown]
# ## Bug 3: the joint
#
# Prompt and label are tokenized apart, then put together. At inference the model sees the prompt alone, so it had better be
# the same tokens.
#
# **Predict.** The template ends in "Label: " with a space, and the label is "CT Brain". Is tokens(prompt) + tokens(label)
# the same as tokens(prompt + label)?

# %%
prompt, label = "Note: r/o PE\nLabel: ", "CT Brain"
apart = tokenizer.encode(prompt) + tokenizer.encode(label, bos=False)
together = tokenizer.encode(prompt + label)
print("apart:   ", token_texts(tokenizer, apart)[-4:])
print("together:", token_texts(tokenizer, together)[-4:])
assert apart != together and together[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt)

# %% [markdown]
# No: a space in front belongs to the word that follows. Whoever tokenizes the *whole* text for training, and the prompt
# alone for inference, trains on " CT" and then asks for what comes after a lone " ", which the model has never seen there.
#
# The rule that always works: the prompt's ids are a prefix of the example's ids, always. The package tokenizes both apart,
# in training and in prediction.

# %%
encoded = prompts.encode_prompt(tokenizer, template, row.note, max_tokens=250)
whole = prompts.encode_example(tokenizer, template, row.note, row.label, max_length=256)
assert whole.input_ids[: len(encoded.input_ids)] == encoded.input_ids
print("the prompt's tokens are the beginning of the example's")

# %% [markdown]
# ## The picture

# %%
shown = [text.strip() or ("⏎" if "\n" in text else "␣") for text in token_texts(tokenizer, example.input_ids)[1:]]
with picture("10_tokens", width=9, height=3.2) as axes:
    first = max(0, len(shown) - 44)
    axes.bar(range(first, len(shown)), losses[first:], color=[GREEN if each else GREY for each in carries[first:].tolist()])
    axes.set(ylabel="loss (nats)", title="loss of each token before training: the label's are green (the last 44 tokens)")
    axes.set_xticks(range(first, len(shown)), shown[first:], rotation=90, fontsize=7)
    axes.margins(x=0.01)

# %% [markdown]
# ![loss of each token of a note and its label](figures/10_tokens.png)
#
# Only the green bars are what we want to learn.
#
# ## Where it lives
#
# `minilora/data/prompts.py` (template, tokens, mask), `minilora/data/batches.py` (padding) and `minilora/loss.py`. Look at
# your own data before you train on it: `minilora show --model tiny --data notes.csv`.
#
# ## The trap
#
# Bug 4 is the classic. A tokenizer has no padding token, so the end token is used for padding. Padding must carry no loss,
# so labels *equal to that id* are masked. See what has been masked as well?
#
# We train two adapters on eight notes until they know them by heart. The only difference is that mask.

# %%
notes = ["r/o PE", "r/o stroke", "r/o appendicitis", "r/o DVT", "r/o stone", "r/o fracture", "r/o tumor", "r/o abscess"]
labels = [("CT Abdomen W Contrast", "CT Abdomen", "US")[index % 3] for index in range(8)]
eight = [prompts.encode_example(tokenizer, template, note, label, 64) for note, label in zip(notes, labels, strict=True)]


def answers(mask_the_end: bool):
    model = load_model("tiny", dtype=torch.float32)
    add_lora(model, LoRAConfig(r=8), generator=torch.Generator().manual_seed(0))
    batch = batches.collate(eight, pad_id=tokenizer.eos_id)
    if mask_the_end:
        batch.labels[batch.labels == tokenizer.eos_id] = prompts.IGNORED            # the bug
    tokens = int((batch.labels != prompts.IGNORED).sum())
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=4e-3)
    for _ in range(40):
        (label_loss(model, batch) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return minilora.generate(model, tokenizer, [template.fill(note) for note in notes], max_new_tokens=12)


for title, written in (("with the end token", good := answers(False)), ("without", bad := answers(True))):
    print(f"{title}:")
    for note, answer in list(zip(notes, written, strict=True))[:3]:
        print(f"    {note:18s} -> {answer.strip()!r}")
right = [sum(answer.strip() == label for answer, label in zip(written, labels, strict=True)) for written in (good, bad)]
print(f"exactly the label: {right[0]} of 8, and {right[1]} of 8")
assert right[0] >= 7 and right[1] <= 2

# %% [markdown]
# Both learnt the label's words. The second never saw an end, so it writes the label and goes on. The cure is not another
# padding id but another question: padding is where the *length* says so, and never what looks like it.
#
# ## Your turn
#
# Write `training_example` and `collate` in `lessons/exercises/10.py`, then:
#
#     minilora check 10
