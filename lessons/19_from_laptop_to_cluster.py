# %% [markdown]
# # 19 · From laptop to cluster
#
# ## The question
#
# One process is no longer enough. The training should be done by Friday, the base fits on no card, or a million notes
# wait for their labels. These are three problems with three answers: share out the *notes of a step*, the *bytes of the
# base*, or the *rows of a table*. What has to cross the network for each, and what can go wrong with the arithmetic?

# %%
import functools
import tempfile
from pathlib import Path

import torch

from minilora import LoRAConfig, add_lora, load_model, load_tokenizer, memory_shared
from minilora.course.pictures import BLUE, GOLD, GREEN, GREY, RED, picture
from minilora.data import radiology
from minilora.data.batches import collate
from minilora.data.prompts import encode_example, load_template
from minilora.integrations.spark import Labelling
from minilora.llama.config import linear_parameters, num_parameters
from minilora.loss import label_loss
from minilora.memory import Workload, predict
from minilora.optim.adamw import AdamW
from minilora.predict import Predictor
from minilora.shapes import shape_of

tokenizer, template = load_tokenizer("tiny"), load_template("tiny")
rows = radiology.generate(n=1000, seed=0)["train"][:64]
examples = sorted((encode_example(tokenizer, template, row.note, row.label, 128) for row in rows),
                  key=lambda example: sum(label != -100 for label in example.labels))


def process():
    """What every process of a team does first: the same base, the same adapters."""
    model = add_lora(load_model("tiny", dtype=torch.float32), LoRAConfig(r=8), generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):              # away from the start, where A has no gradient
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return model.train()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient(model, batch, over):
    """Of the sum of the batch's losses, divided by `over`: all trained numbers in one row."""
    model.zero_grad()
    (label_loss(model, batch) / over).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trained(model)])

# %% [markdown]
# ## Sharing a step's notes
#
# Every process holds the whole model and takes some of the notes. Then gradients are combined, and all take the same
# step. This is *data parallel* training, torch's DDP. Its documentation says how it combines: it takes the mean over
# processes.
#
# **Predict.** Four notes with short labels go to one process (12 label tokens), four with long ones to another (48). Each
# takes the mean loss over its own label tokens. How far is the mean of their gradients from that of one process with all
# eight?

# %%
short, long = collate(examples[:4], 0), collate(examples[-4:], 0)
everything = collate(examples[:4] + examples[-4:], 0)
first, second, alone = process(), process(), process()
tokens = short.label_tokens + long.label_tokens

right = gradient(alone, everything, tokens)
mean_of_means = (gradient(first, short, short.label_tokens) + gradient(second, long, long.label_tokens)) / 2
summed = gradient(first, short, tokens) + gradient(second, long, tokens)


def off(found):
    return float((found - right).norm() / right.norm())


print(f"label tokens {short.label_tokens} and {long.label_tokens}; off by {off(mean_of_means):.0%} with the mean of means, "
      f"by {off(summed):.0e} with sums over the label tokens of all")
assert (short.label_tokens, long.label_tokens) == (12, 48) and off(mean_of_means) > 0.3 and off(summed) < 1e-5

# %% [markdown]
# It is the mistake of lesson 14 in another place: a token counts for more where few others are. The rule is the same as
# well. Let every process divide its *sum* of losses by N, the label tokens of the whole step, of all processes, and then
# *add*:
#
#     g = Σ g_p          g_p = ∇ (Σ −log p over the label tokens of process p) / N
#
# Where does a process know N from? The order of the notes is a pure function of seed and epoch (lesson 14), and each
# process knows all of the table. It counts the others' tokens without asking them.
#
# **Predict.** Three steps like that. In how many of the adapters' numbers do the two processes differ? And how far are
# they from the one that does it alone?

# %%
optimizers = [AdamW(trained(model), lr=1e-3) for model in (first, second, alone)]


def take(model, optimizer, flat):
    parts = flat.split([parameter.numel() for parameter in trained(model)])
    for parameter, part in zip(trained(model), parts, strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()


for step in range(3):
    notes = examples[8 * step : 8 * step + 8]
    shares = [collate(notes[rank::2], 0) for rank in range(2)]                  # every second note
    total = sum(share.label_tokens for share in shares)
    parts = [gradient(model, share, total) for model, share in zip((first, second), shares, strict=True)]
    for model, optimizer in zip((first, second), optimizers[:2], strict=True):
        take(model, optimizer, parts[0] + parts[1])
    take(alone, optimizers[2], gradient(alone, collate(notes, 0), total))


def adapters(model):
    return torch.cat([parameter.detach().flatten() for parameter in trained(model)])


differing = int((adapters(first) != adapters(second)).sum())
away = float((adapters(first) - adapters(alone)).norm() / adapters(alone).norm())
print(f"between the two: {differing} of {adapters(first).numel():,} numbers differ; from the one alone: {away:.0e}")
assert differing == 0 and away < 1e-3

# %% [markdown]
# None: the same sum and the same update give the same bits, so adapters never have to be sent, and one process can write
# the checkpoint for all. From the one alone they differ by rounding, because a sum was taken in another order. "The same"
# for a team therefore means: the same bits for the same number of processes.
#
# ## What crosses the network
#
# A sum over P processes is an *all-reduce*. The simple way, everyone sends everything to everyone, costs P − 1 times the
# gradient. The usual way is a ring. The gradient is cut into P pieces, and each process always sends one piece to its
# right. In the first round the pieces are added up on their way, in the second the finished ones are handed around.

# %%
def ring(gradients):
    """The sum, as every process has it in the end, and how many bytes each has sent."""
    count = len(gradients)
    pieces = [list(each.clone().chunk(count)) for each in gradients]            # pieces[process][piece]
    sent = [0] * count
    for turn in range(2 * (count - 1)):
        moving = [(process - turn) % count for process in range(count)]         # the piece that each process sends
        arriving = [pieces[process][moving[process]] for process in range(count)]
        for process, piece in enumerate(arriving):
            right_hand = (process + 1) % count
            kept = pieces[right_hand][moving[process]]
            pieces[right_hand][moving[process]] = kept + piece if turn < count - 1 else piece
            sent[process] += piece.nbytes
    return [torch.cat(each) for each in pieces], sent


four = [torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
sums, sent = ring(four)
assert all(torch.equal(each, sums[0]) for each in sums), "the same bits everywhere"
assert (sums[0] - sum(four)).abs().max() < 1e-5

# %% [markdown]
# **Predict.** Four processes, a gradient of 4 MB. How many MB does each of them send, in all? And how many would it be
# for a hundred processes?

# %%
size = four[0].nbytes / 2 ** 20
hundred = 2 * 99 / 100 * size
print(f"{sent[0] / 2 ** 20:.0f} MB, {sent[0] / four[0].nbytes:.1f} times the gradient; a hundred processes: {hundred:.1f} MB")
assert sent == [2 * 3 * four[0].nbytes // 4] * 4 and round(hundred, 1) == 7.9

# %% [markdown]
# 6 and 7.9. Many guess that more processes mean more traffic for each. It is 2 (P − 1) / P times the gradient, and never
# more than twice, for any number of them.
#
# So what counts is how large the gradient is. LoRA was about memory; here it pays a second time.
#
# **Predict.** A 7B model, four machines in an office with a network of one gigabit a second. How long does the all-reduce
# of a step take, for all weights and for adapters of r = 16?

# %%
GIGABIT = 1e9 / 8                                       # bytes a second
shapes = {name: shape_of(name) for name in ("7b", "70b")}
qlora = {name: predict(shape, Workload("qlora", gradient_checkpointing=True)) for name, shape in shapes.items()}
seconds = {}
for name, shape in shapes.items():
    for what, numbers in (("all weights", num_parameters(shape)), ("adapters", qlora[name].gradients // 4)):
        crossing = 2 * 3 / 4 * 4 * numbers              # float32
        seconds[name, what] = crossing / GIGABIT
        print(f"{name:3s} {what:11s} {4 * numbers / 1e9:7.2f} GB of gradient, each sends {crossing / 1e9:7.2f} GB: "
              f"{seconds[name, what]:6.0f} s")
print(f"{num_parameters(shapes['7b']) / (qlora['7b'].gradients // 4):.0f} times less")
assert round(seconds["7b", "all weights"]) == 323 and round(seconds["7b", "adapters"]) == 2
assert round(seconds["70b", "all weights"]) == 3311 and round(seconds["70b", "adapters"]) == 10

# %% [markdown]
# More than five minutes, or two seconds. Full fine-tuning over a network like that is out of the question. With adapters
# any cable will do, even for a 70B: ten seconds, where all weights would take most of an hour.
#
# ## Sharing the base
#
# DDP needs the whole base in every process. A 70B has no room on a card of 24 GB even in 4 bits. So each process keeps a
# *share* of the bytes. When a block's turn comes, all send their shares of it, and it is dropped right after. This is
# *sharding*, torch's FSDP (ZeRO, stage 3; arXiv 1910.02054). Frozen weights are the easy case: nothing of them is ever
# sent back.
#
# **Predict.** 70 billion weights, in 4 bits. How many cards of 24 GB does it take until base and adapters fit, each card
# with its share? (Embeddings, head and adapters stay whole on each.)

# %%
def on_each(name, processes, bits=None):
    """Bytes of base and adapters in a process: its share of the linears, and what is whole everywhere."""
    shape, memory = shapes[name], qlora[name]
    elsewhere = 2 * (num_parameters(shape) - linear_parameters(shape))
    linears = memory.weights + memory.absmax - elsewhere if bits is None else linear_parameters(shape) * bits / 8
    return linears / processes + elsewhere + memory.adapters + memory.gradients + memory.optimizer, linears


for processes in (1, 2, 4, 8):
    held = [on_each("70b", processes, bits)[0] / 1e9 for bits in (None, 16)]
    print(f"{processes} processes: {held[0]:5.1f} GB in each, in 16 bits {held[1]:5.1f} GB")
assert on_each("70b", 1)[0] > 24e9 > on_each("70b", 2)[0] and on_each("70b", 8, 16)[0] < 24e9 < on_each("70b", 4, 16)[0]
on_top = qlora["70b"].activations + qlora["70b"].scratch                        # one note of 512 tokens, checkpointed
assert on_each("70b", 4)[0] + on_top < 24e9 < on_each("70b", 2)[0] + on_top

# %% [markdown]
# Two on paper, and four in practice, since activations and one unpacked weight come on top; in 16 bits eight. It
# is not free. A block is gathered for its forward, and once more for its backward. With gradient checkpointing (lesson 13)
# it is computed again, but right before its backward, and that takes one gathering for both: two in all, as without.
#
# **Predict.** How many gigabytes does a process receive for one micro-batch, with four processes?

# %%
four_bit, sixteen_bit = (2 * 3 / 4 * on_each("70b", 4, bits)[1] for bits in (None, 16))
once_a_step = 2 * 3 / 4 * qlora["70b"].gradients
print(f"{four_bit / 1e9:.0f} GB, {four_bit / GIGABIT:.0f} s in that office; in 16 bits {sixteen_bit / 1e9:.0f} GB")
print(f"adapters: {once_a_step / 1e9:.1f} GB, once a step: {four_bit / once_a_step:.0f} times less")
work = Workload("qlora", batch=4, gradient_checkpointing=True)                  # a note for each
ddp, fsdp = memory_shared.shares(shapes["70b"], work, 4)                        # what `minilora memory --processes 4` counts
assert (ddp.sent, fsdp.sent) == (once_a_step, once_a_step + four_bit)
assert (round(four_bit / 1e9), round(sixteen_bit / 1e9), round(four_bit / once_a_step)) == (53, 205, 43)

# %% [markdown]
# 53, which is 43 times the adapters' traffic. It is gathered as it is stored, in 4 bits; in 16 it would be 205. So:
# *DDP where the base fits, over any network; FSDP where it does not, over a fast one.* In the package both are a flag of
# `train`:
#
#     torchrun --nproc-per-node 2 -m minilora train --distributed ddp  --model tiny --data notes.csv --out run
#     torchrun --nproc-per-node 2 -m minilora train --distributed fsdp --model tiny --data notes.csv --out run
#
# ## Sharing a table
#
# Labelling has no gradients. Rows know nothing of each other, so nothing has to be sent but the rows themselves: Spark
# gives each worker a part of the table, batch by batch. There is one thing to get right, which the
# published pipeline got wrong: it built its model anew for every row.
#
# **Predict.** 1,000 notes in batches of 8, four workers. How often is the model loaded: once a row, once a batch, once a
# worker?

# %%
print(f"{1000:,}, {1000 // 8} and {4}")

folder = tempfile.TemporaryDirectory()
labels = Path(folder.name) / "labels.txt"
labels.write_text("\n".join(sorted({row.label for row in rows})) + "\n")
how = Labelling(model="tiny", labels=str(labels), template="tiny", dtype="float32", device="cpu")
loaded = []


@functools.lru_cache(maxsize=1)
def predictor(how):
    loaded.append(how)
    return Predictor.load(how.model, labels=how.labels, template=how.template, dtype=how.dtype, device=how.device, quiet=True)


def worker(batches, how):
    """What runs in a worker: batches in, answers out; the model is loaded at the first batch, and kept."""
    for batch in batches:
        yield predictor(how).predict(batch)


notes = [row.note for row in rows[:24]]
at_once = [answer for answers in worker([notes], how) for answer in answers]
predictor.cache_clear()
loaded.clear()
partitions = [[notes[0:8], notes[8:12]], [notes[12:13]], [notes[13:24]]]
shared = [answer for partition in partitions for answers in worker(partition, how) for answer in answers]
apart = max(abs(one.probability - other.probability) for one, other in zip(at_once, shared, strict=True))
print(f"{len(shared)} answers in {sum(map(len, partitions))} batches, the model was loaded {len(loaded)} time; "
      f"probabilities differ by {apart:.0e} at the most")
assert [one.label for one in at_once] == [other.label for other in shared] and apart < 1e-4 and len(loaded) == 1

# %% [markdown]
# Spark is given such a function by `mapInArrow`. The answers are the same however the rows are cut. That is a property
# of the *model code* (padding must not change a row's answer), and it is what makes a result from a cluster one that you
# can check on a laptop.
#
# ## Keeping an account
#
# A run on ten machines wants a place where its figures can be seen: MLflow. The rule in the package is that the *run
# folder is the truth* and the store a copy. Nothing in training waits for the store. What it lacks is sent later, from
# `metrics.jsonl`, and a file beside that says how far it got.
#
# **Predict.** Send some lines, then write down how far you are; or write it down first, and then send. The computer dies
# in between. What does the store have in the end, with either order?

# %%
def account(send_first):
    """The steps that a store has after a sync that died at the third step, between the two actions, and one that did not."""
    sent, noted = [], 0
    for dies_at in (3, None):
        for step in range(noted + 1, 7):
            half_done = step == dies_at
            if send_first or not half_done:
                sent.append(step)
            if not send_first or not half_done:
                noted = step
            if half_done:
                break
    return sent


print("sent, then written down:", account(send_first=True))
print("written down, then sent:", account(send_first=False))
assert (account(send_first=True), account(send_first=False)) == ([1, 2, 3, 3, 4, 5, 6], [1, 2, 4, 5, 6])

# %% [markdown]
# A step twice, or a step missing for good. There is no third order. Twice is better: whoever reads the store can drop the
# second, while nobody can find what was never there. The package sends first.
#
# When a run is done, its model can be *registered*: a name, a version, and an alias such as "champion" that moves from
# one version to the next. Whatever asks for the champion, a server or a Spark job, gets the new one.
#
# **Predict.** How large is such a version, for a 7B?

# %%
registered, whole = qlora["7b"].adapters, 2 * num_parameters(shapes["7b"])
print(f"{registered / 1e6:.0f} MB of adapters at r = 16; the merged model would be {whole / 1e9:.2f} GB")
assert round(registered / 1e6) == 160 and round(whole / 1e9, 2) == 13.48

# %% [markdown]
# 160 MB in float32, where a merged model has 13.48 GB in each version: adapter, tokenizer, label set, prompt, and the
# *name* of the base, which is on the machine already, or on the hub.
#
# ## The picture

# %%
with picture("19_cluster", columns=3, width=10, height=3) as (left_axes, middle_axes, right_axes):
    bars = left_axes.bar(["sums over N", "mean of means"], [off(summed), off(mean_of_means)], color=[BLUE, RED])
    left_axes.bar_label(bars, ["rounding", f"{off(mean_of_means):.0%}"])
    left_axes.set(title="two processes' gradient, off by", yticks=[], ylim=(0, 1.2 * off(mean_of_means)))
    names = ["7B, all", "7B, adapters", "70B, all", "70B, adapters"]
    bars = middle_axes.barh(names[::-1], list(seconds.values())[::-1], color=[BLUE, RED] * 2)
    middle_axes.bar_label(bars, [f" {value:,.0f} s" for value in list(seconds.values())[::-1]])
    middle_axes.set(xscale="log", xlim=(1, 5e4), title="all-reduce of a step, 1 Gbit/s")
    counts = range(1, 9)
    for bits, color, label in ((16, GREY, "base in 16 bits"), (None, GREEN, "base in 4 bits")):
        right_axes.plot(counts, [on_each("70b", count, bits)[0] / 1e9 for count in counts], "o-", color=color, label=label)
    right_axes.axhline(24, color=GOLD, label="a card of 24 GB")
    right_axes.set(xlabel="processes", title="70B, sharded: GB in each", xticks=counts)
    right_axes.legend(fontsize=9)

# %% [markdown]
# ![gradient error by averaging; seconds of an all-reduce; gigabytes a process over their number](figures/19_cluster.png)
#
# ## Where it lives
#
# `minilora/stepping.py` takes the sums, `minilora/memory.py` counts what a process holds; the team of processes is in
# `minilora/integrations/distributed.py`, with DDP and FSDP. `minilora/integrations/spark.py` labels tables (`minilora
# predict --spark`), `minilora/integrations/tracking.py` sends runs (`--mlflow`), and `minilora/integrations/serving.py`
# registers a run as a model that any process with minilora can load. None of these libraries is needed until its flag is
# given.
#
# ## The trap
#
# You have read the rule and divide by N, the label tokens of *all* processes. Then you hand the model to DDP, which takes
# the *mean*. So the gradient is too small by the number of processes.
#
# **Predict.** With 8 processes: what does the first step of Adam look like, beside the right one? And is there anything
# else that would show the mistake?

# %%
def first_step(flat, clip):
    """How one step of AdamW moves the adapters."""
    model = process()
    before = adapters(model)
    optimizer = AdamW(trained(model), lr=1e-3, weight_decay=0.0)
    take(model, optimizer, flat * min(1.0, clip / float(flat.norm())))
    return adapters(model) - before


good, small = first_step(right, clip=float("inf")), first_step(right / 8, clip=float("inf"))
print(f"the step is another one by {float((small - good).norm() / good.norm()):.1%}")
limit = 0.5 * float(right.norm())
cut, not_cut = (min(1.0, limit / float(flat.norm())) for flat in (right, right / 8))
print(f"a clip at half of the gradient's length: the right one is multiplied by {cut:.2f}, the small one by {not_cut:.2f}")
assert (small - good).norm() < 0.05 * good.norm() and (cut, not_cut) == (0.5, 1.0)

# %% [markdown]
# As good as the same: Adam divides by the gradient's own size, and a constant factor is gone. The loss is right, the
# curve looks as it should, and gradient clipping, which is there for the one bad batch in a thousand, is off: the
# gradient would have to be eight times as long. With plain SGD the rate is an eighth. Nobody notices either before the
# day it matters. So compare a team's *gradient* with one process's, not its loss.
#
# ## Your turn
#
# Write `step_gradient`, `all_reduce_bytes`, `sharded_bytes` and `label_partition` in `lessons/exercises/19.py`, then:
#
#     minilora check 19
