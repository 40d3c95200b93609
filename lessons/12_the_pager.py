# %% [markdown]
# # 12 · The pager
#
# ## The question
#
# QLoRA's third idea is the *paged optimizer*. The article that made it popular says that it "arranges weights and biases"
# in memory. It does not touch a weight. What does it move, when, and what does it buy?

# %%
import torch

from minilora import PagedAdamW
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.llama.config import linear_parameters
from minilora.memory import Workload, predict
from minilora.optim.adamw import AdamW
from minilora.optim.paged import Pager, in_order
from minilora.shapes import shape_of
from minilora.testing import pager

# %% [markdown]
# It moves the *state of the optimizer*: Adam's two moments. They are needed in the optimizer's step, and in forward and
# backward not at all. So they can lie in slow memory (the host's, or a file), and a few pages at a time are brought in for
# the step. If a long note makes the activations swell, the pages leave, instead of the run dying.
#
# **Predict.** A 7B model, r = 64 on q and v as in many scripts. 4-bit storage saves about 9.6 GB. How large is the
# optimizer's state that paging can move?

# %%
config = shape_of("7b")
work = Workload("qlora", r=64, target_modules=("q_proj", "v_proj"), seq=512)
memory = predict(config, work)
saved_by_4_bits = 2 * linear_parameters(config) - (memory.absmax + linear_parameters(config) // 2)
everywhere = predict(config, Workload("qlora", r=64, seq=512))
print(f"saved by 4-bit weights: {saved_by_4_bits / 1e9:.1f} GB")
print(f"optimizer state: {memory.optimizer / 1e6:.0f} MB on q and v, {everywhere.optimizer / 1e6:,.0f} MB on all seven linears")
assert round(saved_by_4_bits / 1e9, 1) == 9.6 and round(memory.optimizer / 1e6) == 268
assert round(everywhere.optimizer / 1e6) == 1279

# %% [markdown]
# 268 MB, less than a thirtieth of what 4 bits save. Paging is a seat belt and not the engine: with LoRA there is little
# state, since little is trained. For *full* fine-tuning it is another matter, and there the package's pager turns 54 GB of
# state into a budget of yours.
#
# ## How a pager works
#
# Pages of fixed size, `frames` of them in fast memory. When one is missing (a *fault*), the least recently used one leaves.
# If it was changed, it is written back first.

# %%
accesses = [(0, True), (1, True), (2, False), (0, True), (3, True)]
for (page, write), (missing, leaving, written) in zip(accesses, pager(accesses, frames=3), strict=True):
    print(f"page {page}{' (to change)' if write else '':12s} " + ("fault" if missing else "there")
          + ("" if leaving is None else f", page {leaving} leaves" + (" and is written back" if written else "")))

# %% [markdown]
# An optimizer goes through *all* pages, once a step.
#
# **Predict.** Eight pages, room for four, and each step goes through pages 0, 1, … 7 in order. How many faults does a step
# have, once it is running?

# %%
def faults(orders, frames):
    accesses = [(page, True) for order in orders for page in order]
    missing = [event[0] for event in pager(accesses, frames)]
    return [sum(missing[8 * step : 8 * step + 8]) for step in range(len(orders))]


forwards = [list(range(8)) for _ in range(5)]
turning = [list(range(8))[:: 1 if step % 2 == 0 else -1] for step in range(5)]
print("always forwards:     ", faults(forwards, 4))
print("turning at the end:  ", faults(turning, 4))
assert faults(forwards, 4)[1:] == [8] * 4 and faults(turning, 4)[1:] == [4] * 4

# %% [markdown]
# Most guess four: half of the pages fit, so half should be there. But *all eight* are missing, every time.
# Least-recently-used puts out just the page that is wanted soonest. A step that turns round at the end finds what it used
# last still there, and four is what you get.
#
# Order does not matter to Adam, which treats every element alone. So `PagedAdamW` turns round each step, for free.

# %%
counted = {}
for name, backwards_every_other in (("forwards", False), ("turning", True)):
    real = Pager(page_bytes=4096, resident_bytes=4 * 4096)
    real.grow(8)
    for step in range(5):
        for page, _ in in_order(list(range(8)), backwards_every_other and step % 2 == 1):
            real.use(page)
    counted[name] = real.counters
    print(f"{name:9s} {real.counters.faults} faults, {real.counters.bytes_in:,} bytes in, {real.counters.bytes_out:,} out")
    real.close()
assert (counted["forwards"].faults, counted["turning"].faults) == (40, 24)

# %% [markdown]
# ## Does it change the result?
#
# No, not in one bit. Here the state lies in a file, and two pages of it are in memory at a time.

# %%
torch.manual_seed(0)
plain, paged = (torch.nn.Parameter(torch.ones(300, 100)) for _ in range(2))
in_memory = AdamW([plain], lr=1e-2)
in_pages = PagedAdamW([paged], lr=1e-2, page_bytes=16_384, resident_bytes=2 * 16_384, backing="disk")
for _ in range(5):
    plain.grad = torch.randn(300, 100)
    paged.grad = plain.grad.clone()
    in_memory.step()
    in_pages.step()
print(f"state: {8 * paged.numel():,} bytes, of which {in_pages.pager.resident_bytes:,} in memory; "
      f"{in_pages.counters.faults} faults")
assert torch.equal(plain, paged) and in_pages.pager.resident_bytes == 2 * 16_384

# %% [markdown]
# ## The picture

# %%
with picture("12_pager", columns=2, height=2.8, sharey=True) as both:
    titles = ("always forwards: every access a fault", "turning: half of them")
    for axes, orders, title in zip(both, (forwards, turning), titles, strict=True):
        accesses = [(page, True) for order in orders for page in order]
        for at, ((page, _), event) in enumerate(zip(accesses, pager(accesses, 4), strict=True)):
            axes.plot(at, page, "s", markersize=5, color=RED if event[0] else BLUE)
        for step in range(1, 5):
            axes.axvline(8 * step - 0.5, color=GREY, linewidth=0.8)
        axes.set(title=title, xlabel="access (5 steps of 8); red: fault")
    both[0].set_ylabel("page")

# %% [markdown]
# ![accesses to eight pages over five steps, with faults in red, for both orders](figures/12_pager.png)
#
# ## Where it lives
#
# `minilora/optim/paged.py` is the pager, `minilora/optim/paged_adamw.py` AdamW over it. The paper (arXiv 2305.14314,
# section 3) leaves all of this to NVIDIA's unified memory, where the driver decides. Here the moves are the program's own:
# counted, on any device, to a budget that is kept.
#
# ## The trap
#
# You asked for `paged_adamw`. Is anything paged? bitsandbytes pages tensors of 100,000 elements or more, and leaves all
# others where they are.
#
# **Predict.** Layers 4,096 wide: from which r on is A or B paged at all?

# %%
def paged_share(r, least=100_000):
    sizes = [r * side for shape in config.linear_shapes().values() for side in shape]
    return sum(size for size in sizes if size >= least) / sum(sizes), sum(size >= least for size in sizes) / len(sizes)


for r in (8, 16, 24, 25, 64):
    share, tensors = paged_share(r)
    print(f"r = {r:2d}: {tensors:4.0%} of the tensors, {share:4.0%} of the state")
narrow = next(r for r in range(1, 100) if 4096 * r >= 100_000)
print(f"a side of 4096 counts from r = {narrow} on")
assert narrow == 25 and paged_share(8)[0] == 0 and paged_share(25)[0] == 1

# %% [markdown]
# At the common r = 16, whatever is 4,096 wide stays in GPU memory, and "paged" is a word in a config file. Always look at
# what was moved: `minilora report` shows the pager's counters of a run.
#
# ## Your turn
#
# Write `pager` and `moment_bytes` in `lessons/exercises/12.py`, then:
#
#     minilora check 12
