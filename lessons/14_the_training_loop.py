# %% [markdown]
# # 14 · The training loop
#
# ## The question
#
# All the parts are there: a 4-bit base, adapters, masks, an optimizer. The loop around them is ten lines. Which of the ten
# can be wrong without anybody noticing?

# %%
import torch

from minilora import LoRAConfig, add_lora, load_model, load_tokenizer
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.data import radiology
from minilora.data.batches import collate, epoch_batches
from minilora.data.prompts import encode_example, load_template
from minilora.loss import label_loss, validation_loss
from minilora.optim.adamw import AdamW
from minilora.stepping import learning_rate

tokenizer, template = load_tokenizer("tiny"), load_template("tiny")
notes = radiology.generate(n=1000, seed=0)
train_set, held_out = ([encode_example(tokenizer, template, row.note, row.label, 128) for row in rows]
                       for rows in (notes["train"][:256], notes["val"][:48]))


def fresh_model():
    model = load_model("tiny", dtype=torch.float32)
    return add_lora(model, LoRAConfig(r=8), generator=torch.Generator().manual_seed(0)).train()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]

# %% [markdown]
# ## The loop

# %%
def run(steps=24, batch_size=4, accumulate=2, peak=4e-3, seed=0):
    model = fresh_model()
    optimizer = AdamW(trained(model))
    lengths = [len(example.input_ids) for example in train_set]
    plan = epoch_batches(lengths, batch_size, accumulate, seed, epoch=0)[:steps]
    losses = []
    for step, micro_batches in enumerate(plan, 1):
        batches = [collate([train_set[index] for index in rows], pad_id=0) for rows in micro_batches]
        label_tokens = sum(batch.label_tokens for batch in batches)         # of the whole step
        loss = 0.0
        for batch in batches:
            part = label_loss(model, batch) / label_tokens                  # a sum, over what the step has in all
            part.backward()                                                 # gradients add up
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(plan), peak, warmup=0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return model, losses


before = validation_loss(fresh_model(), held_out, 16)
model, losses = run()
after = validation_loss(model, held_out, 16)
print(f"held-out loss: {before:.2f} before, {after:.2f} after {len(losses)} steps")
assert after < before / 3

# %% [markdown]
# ## What a step means
#
# A step is cut into micro-batches because memory is short. The result should not depend on how it is cut. The loop above
# divides each *sum* of losses by the label tokens of the whole step. Most code, for years also in the best-known library,
# took the mean of each micro-batch, and then the mean of these means.
#
# **Predict.** Two micro-batches, one with short labels (12 label tokens), one with long ones (48). By what factor does a
# token of the first count more, in the mean of means?

# %%
by_label = sorted(train_set, key=lambda example: sum(label != -100 for label in example.labels))
short, long = collate(by_label[:4], 0), collate(by_label[-4:], 0)
print(f"label tokens: {short.label_tokens} and {long.label_tokens}; "
      f"a token of the first counts {long.label_tokens / short.label_tokens:.1f} times as much")

model = fresh_model()
for parameter in trained(model):            # away from the start, where A has no gradient
    torch.nn.init.normal_(parameter, std=0.02)


def gradient(parts, weights):
    model.zero_grad()
    for part, weight in zip(parts, weights, strict=True):
        (label_loss(model, part) * weight).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trained(model)])


whole = collate(by_label[:4] + by_label[-4:], 0)
tokens = short.label_tokens + long.label_tokens
right = gradient([whole], [1 / tokens])
by_tokens = gradient([short, long], [1 / tokens, 1 / tokens])
of_means = gradient([short, long], [1 / (2 * short.label_tokens), 1 / (2 * long.label_tokens)])
errors = {name: float((found - right).norm() / right.norm()) for name, found in (("tokens", by_tokens), ("means", of_means))}
print(f"off the whole batch's gradient: {errors['tokens']:.1e} by label tokens, {errors['means']:.0%} by the mean of means")
assert (short.label_tokens, long.label_tokens) == (12, 48)
assert errors["tokens"] < 1e-4 and errors["means"] > 0.05

# %% [markdown]
# The ratio of the counts: four. It is not noise that averages out: short labels weigh more in
# *every* step (transformers #34191, transformers #35203).
#
# ## The rate
#
# Linear up, then half a cosine down. Two off-by-ones live here: a first step with rate 0, and a last one. Each wastes a
# step, which nobody notices in a thousand, and which is *everything* in a run of one step.

# %%
print("one step:  ", learning_rate(1, 1, peak=1.0, warmup=0.1))
print("ten steps: ", [round(learning_rate(step, 10, 1.0, 0.2), 2) for step in range(1, 11)])
assert learning_rate(1, 1, 1.0, 0.1) == 1.0 and learning_rate(10, 10, 1.0, 0.2) > 0

# %% [markdown]
# ## The same run twice
#
# **Predict.** The loop is run a second time, with the same seed. In how many of the adapters' numbers does a bit differ?

# %%
short_runs = [run(steps=4) for _ in range(2)]
differing = sum(int((one != other).sum()) for one, other in zip(*(trained(model) for model, _ in short_runs), strict=True))
print(f"{differing} of {sum(parameter.numel() for parameter in trained(short_runs[0][0])):,} numbers differ")
assert differing == 0

# %% [markdown]
# None, if you take care. The order of the notes is a pure function of (seed, epoch), A's start has a generator of its own,
# and nothing is drawn from a global state. Then a killed run can also go on where it was, and end with the same bytes: all
# that has to be saved is adapters, moments, and the number of the step.

# %%
lengths = [len(example.input_ids) for example in train_set]
assert epoch_batches(lengths, 4, 2, seed=0, epoch=1) == epoch_batches(lengths, 4, 2, seed=0, epoch=1)
assert epoch_batches(lengths, 4, 2, seed=0, epoch=1) != epoch_batches(lengths, 4, 2, seed=0, epoch=2)

# %% [markdown]
# ## The picture

# %%
with picture("14_loop", columns=3, width=10, height=3) as (left_axes, middle_axes, right_axes):
    left_axes.plot(range(1, len(losses) + 1), losses, color=BLUE, linewidth=2)
    left_axes.set(title="loss", xlabel="step", ylim=(0, None))
    middle_axes.plot(range(1, 101), [learning_rate(step, 100, 1.0, 0.1) for step in range(1, 101)], color=BLUE, linewidth=2)
    middle_axes.set(title="learning rate, of its peak", xlabel="step of 100")
    bars = right_axes.bar(["by label tokens", "mean of means"], [errors["tokens"], errors["means"]], color=[BLUE, RED])
    right_axes.bar_label(bars, [f"{errors['tokens']:.0e}", f"{errors['means']:.0%}"])
    right_axes.axhline(0, color=GREY)
    right_axes.set(title="gradient off the whole batch's", yticks=[])

# %% [markdown]
# ![loss over the steps; the rate over a run; error of the gradient by how micro-batches are averaged](figures/14_loop.png)
#
# ## Where it lives
#
# `minilora/train.py` is this loop with checkpoints, validation and a progress bar; `minilora/stepping.py` has rate and
# gradients, `minilora/data/batches.py` the order. `tests/test_train.py` kills runs and compares bytes.
#
# ## The trap
#
# "Resuming works, the loss goes on where it was." Look closer: here is a run that is continued from its adapters alone,
# with a fresh optimizer, as scripts do that save no more.

# %%
def go_on(model, optimizer, first, last):
    plan = epoch_batches(lengths, 4, 1, seed=0, epoch=0)
    for step in range(first, last + 1):
        batch = collate([train_set[index] for index in plan[step - 1][0]], 0)
        (label_loss(model, batch) / batch.label_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


whole_run, resumed, careless = fresh_model(), fresh_model(), fresh_model()
go_on(whole_run, AdamW(trained(whole_run), lr=2e-3), 1, 6)
for model, keep_moments in ((resumed, True), (careless, False)):
    optimizer = AdamW(trained(model), lr=2e-3)
    go_on(model, optimizer, 1, 3)
    saved = optimizer.state_dict()
    optimizer = AdamW(trained(model), lr=2e-3)
    if keep_moments:
        optimizer.load_state_dict(saved)
    go_on(model, optimizer, 4, 6)


def distance(model):
    both = zip(trained(model), trained(whole_run), strict=True)
    return float(torch.cat([(one - other).detach().flatten() for one, other in both]).norm())


print(f"away from the run that was never interrupted: {distance(resumed)} with the moments, {distance(careless):.2f} without")
assert distance(resumed) == 0 and distance(careless) > 0.05

# %% [markdown]
# ## Your turn
#
# Write `accumulate` and `learning_rate` in `lessons/exercises/14.py`, then:
#
#     minilora check 14
