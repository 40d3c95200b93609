# %% [markdown]
# # 17 · Making it fast: sixteen values, one register
#
# ## The question
#
# A 4-bit weight is unpacked twice a step (lesson 07), and for each token that is generated. Unpacking is three lines of
# torch. Why is the package's kernel several times as fast as they are, on the same cores and to the same bits?

# %%
import mmap
import resource
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import NF4_CODE, quantize_nf4
from minilora.course.pictures import BLUE, GREY, RED, picture
from minilora.kernels import cpu
from minilora.layers.dense import multiplies
from minilora.layers.scratch import borrow, held_bytes
from minilora.llama.model import RMSNorm

OUT, IN = 2048, 4096
generator = torch.Generator().manual_seed(0)
q = quantize_nf4(torch.randn(OUT, IN, generator=generator), double_quant=False)


def three_lines(packed, absmax):
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    values = NF4_CODE[codes.long()]
    return (values.view(-1, 64) * absmax[:, None]).view(-1)


plain = three_lines(q.packed, q.absmax)
assert torch.equal(plain, q.dequantize().view(-1))
print(f"{plain.numel():,} weights: {q.packed.nbytes / 1e6:.1f} MB of codes become {plain.nbytes / 1e6:.1f} MB of float32")

# %% [markdown]
# Processors compute faster than memory delivers. So do not count operations, count *bytes moved*: what each operation reads
# from memory and writes back. Torch lets us look on; views move nothing.

# %%
class Traffic(TorchDispatchMode):
    """Sums the bytes that operations read and write, and notes how many operations there were."""

    def __init__(self):
        super().__init__()
        self.moved = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for one in args for each in (one if isinstance(one, (list, tuple)) else [one])]
        read = sum(tensor.nbytes for tensor in given if isinstance(tensor, torch.Tensor))
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.moved += read + result.nbytes
            self.operations += 1
        return result


def bytes_a_weight(unpack):
    with Traffic() as traffic:
        unpack()
    return traffic.moved / plain.numel(), traffic.operations

# %% [markdown]
# **Predict.** At the least, half a byte of codes must be read for each weight, a sixteenth of a byte of constants, and four
# bytes be written: 4.56 bytes together. How many bytes do the three lines move for each weight?

# %%
least = 0.5 + 4 / 64 + 4
moved, operations = bytes_a_weight(lambda: three_lines(q.packed, q.absmax))
print(f"{operations} operations move {moved:.1f} bytes a weight: {moved / least:.1f} times the least")
assert round(least, 2) == 4.56 and round(moved, 1) == 33.1 and operations == 6

# %% [markdown]
# 33.1. The usual guess counts the three lines and says 12 or so. But each line is one or two *passes* over memory, and what
# lies between them is wide: to index, torch wants int64, eight bytes for a code of four bits, written once and read once.
#
# ## A table of pairs
#
# Why split bytes at all? A byte has 256 values. Make a table of 256 *pairs*, and one lookup yields two weights; nothing is
# shifted, masked or put side by side.

# %%
pairs = torch.stack((NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)), dim=1)              # (256, 2): high, low nibble


def by_pairs(packed, absmax):
    values = torch.nn.functional.embedding(packed.int(), pairs)
    return values.view(-1, 64).mul_(absmax[:, None]).view(-1)


assert torch.equal(by_pairs(q.packed, q.absmax), plain)
moved_by_pairs, operations = bytes_a_weight(lambda: by_pairs(q.packed, q.absmax))
print(f"{operations} operations move {moved_by_pairs:.1f} bytes a weight: {moved_by_pairs / least:.1f} times the least")
assert round(moved_by_pairs, 1) == 16.6 and operations == 3

# %% [markdown]
# Half. This is the package's reference (`dequantize_packed`), which works wherever torch does. To come nearer, the passes
# have to become *one*: read a few bytes, look them up, scale, write, and let nothing in between leave the processor. Torch
# has no such operation. So it is written in C++.
#
# ## Sixteen values, one register
#
# A register of AVX-512 holds 512 bits. A float32 has 32.
#
# **Predict.** How many registers does the whole NF4 table take?

# %%
registers = len(NF4_CODE) * 32 / 512
print(f"{registers:.0f}")
assert registers == 1

# %% [markdown]
# Exactly one. And there is an instruction that looks sixteen entries up in a register at once, a *permutation*: place i of
# the result is table[index i], and of each index it reads the last four bits and ignores all others.
#
# So a byte can be the index as it is: its last four bits are its low nibble. Shifted right by four, it is the index of its
# high nibble. Here are the two permutations, for sixteen bytes:

# %%
def permute(table, index):
    """What the instruction does in each of sixteen places."""
    return table[index & 15]


chunk = q.packed[:16].int()
high, low = permute(NF4_CODE, chunk >> 4), permute(NF4_CODE, chunk)
print("bytes  ", " ".join(f"   {byte:02x}" for byte in chunk[:8].tolist()), "...")
print("high   ", " ".join(f"{value:5.2f}" for value in high[:8].tolist()), "...   weights 0, 2, 4, ...")
print("low    ", " ".join(f"{value:5.2f}" for value in low[:8].tolist()), "...   weights 1, 3, 5, ...")
assert torch.equal(torch.stack((high, low), dim=1).view(-1) * q.absmax[0], plain[:32])

# %% [markdown]
# Now the constants. All 64 weights of a block have the same absmax.
#
# **Predict.** How many multiplications does it take to scale a block of 64 weights?

# %%
table = NF4_CODE * q.absmax[0]                              # once a block; it is a register again
block = q.packed[:32].int()
finished = torch.stack((permute(table, block >> 4), permute(table, block)), dim=1).view(-1)
print(f"{table.numel()} products for {finished.numel()} weights")
assert torch.equal(finished, plain[:64]) and (table.numel(), finished.numel()) == (16, 64)

# %% [markdown]
# Sixteen, which is one instruction: scale the *table*, and the lookups yield finished weights. They are the same products,
# so they have the same bits. For 64 weights that makes one multiplication, two loads of sixteen bytes, two shifts and four
# permutations.
#
# ## Never in order
#
# The two registers hold the even and the odd weights. To write a row of W, they have to be interleaved. But most of the
# time nobody wants W: what is wanted is W x. And a sum does not care for its order, if x comes in the same one.
#
# **Predict.** A layer of 2,048 rows of 4,096 weights meets one x. How many numbers are moved to another place, if the
# weights are put in order? And if x is split into even and odd elements instead?

# %%
def product_split(packed, absmax, x):
    """W x for a W whose rows are whole blocks, from the two halves of each byte."""
    index = packed.view(OUT, IN // 2).int()
    scale = absmax.view(OUT, IN // 64).repeat_interleave(32, dim=1)                            # of 32 bytes each
    even, odd = x[0::2], x[1::2]                                                               # once a call
    return (permute(NF4_CODE, index >> 4) * scale) @ even + (permute(NF4_CODE, index) * scale) @ odd


x = torch.randn(IN, generator=generator)
y, y_split = plain.view(OUT, IN) @ x, product_split(q.packed, q.absmax, x)
print(f"{OUT * IN:,} or {IN:,}: {OUT:,} times fewer")
print(f"the two sums differ by {float((y - y_split).norm() / y.norm()):.0e} of their length: rounding")
assert (OUT * IN, IN) == (8_388_608, 4096) and (y - y_split).norm() < 1e-6 * y.norm()

# %% [markdown]
# x is split once, and serves all rows. For one row of x the kernel reads codes and constants, and writes 2,048 sums. W is
# nowhere.

# %%
codes_read, dense_read = q.packed.nbytes + q.absmax.nbytes, 2 * OUT * IN
print(f"read for one x: {codes_read / 1e6:.1f} MB; a dense layer in 16 bits: {dense_read / 1e6:.1f} MB")
fused = q.fused_product(x[None])
if fused is not None:                                       # None without a compiler
    assert (fused[0] - y).norm() < 1e-5 * y.norm()
assert round(dense_read / codes_read, 2) == 3.56

# %% [markdown]
# That is why a 4-bit layer can be *faster* than a dense one when tokens are generated one by one: 3.56 times fewer bytes.
# In training, where hundreds of rows meet each weight, the products take the time, and all that unpacking can do is to stay out
# of their way.
#
# ## Turned while they are codes
#
# There are two ways to multiply with registers. In the first one holds sixteen weights of *one row* of W, and at the end its
# sixteen sums are added up to one. In the second it holds one weight of each of *sixteen rows*, a number of x is copied to all
# sixteen places, and each place is the sum of a row: nothing is left to add. But in memory a row's weights lie side by side, so
# for the second way they have to be turned.
#
# **Predict.** To turn 16 x 16 numbers of 32 bits takes 64 instructions. How many for 16 rows of 128 weights, once they are
# float32? And while they are still codes of 4 bits?

# %%
def product_turned(packed, absmax, x):
    """W x for a W whose rows are whole blocks; eight codes of a row are a number of 32 bits, and these are turned."""
    words = packed.view(OUT, IN // 2).view(torch.int32).T.contiguous()                         # (IN / 8, OUT)
    scale = absmax.view(OUT, IN // 64).T.repeat_interleave(8, dim=0)
    # A byte's first code is its high nibble.
    return sum(x[k::8] @ (permute(NF4_CODE, words >> 4 * (k ^ 1)) * scale) for k in range(8))


as_floats, as_codes = 64 * (16 * 128) // (16 * 16), 64 * (16 * 128 // 8) // (16 * 16)
y_turned = product_turned(q.packed, q.absmax, x)
print(f"{as_floats} or {as_codes}; the sums differ by {float((y - y_turned).norm() / y.norm()):.0e} of their length")
assert (as_floats, as_codes) == (512, 64) and (y - y_turned).norm() < 1e-6 * y.norm()

# %% [markdown]
# Turned once, a tile of 32 rows and 128 columns stays in the first cache and serves every row of x. So in float32, where
# torch's product takes its time on some processors, W never needs to lie in memory, however many rows there are; and the way
# back, x W, finds its sixteen weights side by side as they are.
#
# ## Fresh memory is slow memory
#
# One more thing has to be right, and it has nothing to do with NF4. Where does the result go? `torch.empty` of 34 MB gets
# no memory. It gets a promise; the system hands pages out at the first write, one *fault* each, and fills them with zeros
# before.
#
# **Predict.** A page has 4,096 bytes. We fill 33,554,432 fresh bytes, and then the same again. How many faults each time?

# %%
def page_faults(work, *inputs):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(*inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


size = 4 * OUT * IN
with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:               # straight from the system
    fresh = torch.frombuffer(memory, dtype=torch.float32)
    first, second = page_faults(fresh.fill_, 1.0), page_faults(fresh.fill_, 2.0)
    del fresh
print(f"first time {first:,} faults, second time {second:,}")
assert (size, size // 4096) == (33_554_432, 8192)
assert first == 0 or (first >= size >> 21 and second < first / 2)              # 0: a system that does not count them

# %% [markdown]
# 8,192, if the system's pages are that small (some hand out pages of two megabytes, and have a few dozen faults), and then
# none. So all layers unpack into *one* buffer, that of lesson 07, and it is as large as the largest of them.

# %%
one, other = (borrow(torch.Size(shape), torch.float32, torch.device("cpu")) for shape in ((OUT, IN), (64, 64)))
print(f"two layers, one buffer: {one.data_ptr() == other.data_ptr()}, {held_bytes():,} bytes")
assert one.data_ptr() == other.data_ptr() and held_bytes() >= size

# %% [markdown]
# ## Seconds
#
# Bytes are counted, seconds are measured, and other work on the machine disturbs them. So we compare within one run, best of
# several, against the one thing that no unpacking can beat: filling the buffer.

# %%
def seconds(work, times=7):
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


kernel, out = cpu.kernel(), borrow(q.shape, torch.float32, torch.device("cpu"))
fill = seconds(lambda: out.fill_(1.0))
ways = {"three lines": lambda: three_lines(q.packed, q.absmax),
        "pairs": lambda: by_pairs(q.packed, q.absmax),
        "package, fresh memory": lambda: q.dequantize(torch.float32),
        "package, one buffer": lambda: q.dequantize(out=out)}
for name, work in ways.items():
    print(f"{name:22s} {seconds(work) / fill:5.1f} times as long as filling the buffer")
print("kernel:", "none, the reference in torch" if kernel is None else kernel.machine)
assert torch.equal(q.dequantize(out=out).view(-1), plain), "whatever the speed, the bits are the same"

# %% [markdown]
# Compare the last two: one kernel, the same bytes, and most of the time was the system handing out pages. And the first two
# take longer than their bytes explain, because their passes write into fresh memory as well.
#
# ## Sixteen bits without an instruction
#
# A table of sixteen fits a register of AVX-512. Most laptops have AVX2, with registers half as wide (two hold the table), and
# what is worse for training: no instruction that multiplies bfloat16. Torch then takes the numbers one by one. But a bfloat16
# number *is* a float32 number, of which the last sixteen bits are zero.
#
# **Predict.** Widen x and W to float32, multiply these, round the sums to bfloat16. How many of the results are another number
# than the exact sum, rounded once?

# %%
x16, w16 = (torch.randn(rows, 512, generator=generator).bfloat16() for rows in (32, 256))
exact = (x16.double() @ w16.double().T).bfloat16()
widened = (x16.float() @ w16.float().T).bfloat16()
wide, narrow = seconds(lambda: x16.float() @ w16.float().T), seconds(lambda: x16 @ w16.T)
print(f"{float((widened != exact).float().mean()):.2%} differ")
print(f"torch's 16-bit product takes {narrow / wide:.1f} times as long; instructions for it: {multiplies(torch.bfloat16)}")
assert (widened != exact).float().mean() < 0.01
assert torch.equal(x16.view(torch.int16).int() << 16, x16.float().view(torch.int32))

# %% [markdown]
# Hardly any: a product of two numbers of eight significant bits has sixteen, float32 holds it exactly, and only the sums are
# rounded, long before bfloat16 would see it. So where the processor has no such instruction, the package multiplies in
# float32, widening a piece of a weight at a time; and the command line computes in float32 there from the start.
#
# ## Asking takes time, too
#
# When a token is generated, the products read 4 bits a weight, and all else is tiny: a norm of one row, a rotation, a sum. But
# each operation is asked for by Python, which looks up a module, checks types, makes a tensor for the result.
#
# **Predict.** A block has seven linears, two norms, two rotations, two writes into the cache, one attention, one SwiGLU and two
# sums. How many operations is a token in a model of 22 blocks? And what does one cost that has nothing to do?

# %%
operations = 22 * (7 + 2 + 2 + 2 + 1 + 1 + 2)
nothing, one_token = RMSNorm(64, eps=1e-5), torch.randn(1, 64, generator=generator)
with torch.no_grad():
    asked = seconds(lambda: nothing(one_token))
print(f"{operations} operations; the norm of 64 numbers takes {asked * 1e6:.0f} µs, nearly all of it asking")
print(f"so a token waits some {operations * asked * 1e3:.0f} ms to be asked for")
assert operations == 374

# %% [markdown]
# A model of 1.1 billion weights is read in some 20 ms. So half as much again would go to asking, and that does not shrink with
# the bits. (A prompt asks as often, but once for all its tokens.) Hence `generate` asks *once a token*: what the layers are
# made of is written down when decoding begins, and one call of C++ goes through all blocks. It calls the same functions in
# the same order, and has the same bits; and where a block is not as usual (a hook, DoRA, a GPU), Python goes through it as
# ever.
#
# ## The same on a GPU
#
# There are no registers of 512 bits on a GPU. There are *warps*: 32 threads that do the same at the same time, each with
# registers of its own, and an instruction by which a thread reads a register of another one, the *shuffle*. So the table
# lies across the warp, one level a thread, each twice. Who needs level i asks thread i.
#
# Each thread has read a word of eight codes. A word is four bytes, the first of them its *last* eight bits, and the first
# code of a byte is its high nibble.
#
# **Predict.** By how many bits is the word shifted, so that the code of element 0 comes last? And that of element 1?

# %%
own = NF4_CODE.repeat(2)                                                                       # thread t holds level t % 16
words = q.packed[: 32 * 4].view(torch.int32).long() & 0xFFFFFFFF                               # thread t's eight codes
shifts = [4 * (element ^ 1) for element in range(8)]


def shuffle(own, index):
    """Each thread reads what thread `index` of its half of the warp holds; only the last four bits count."""
    thread = torch.arange(32)
    return own[(thread & 16) + (index & 15)]


eight = torch.stack([shuffle(own, words >> shift) for shift in shifts], dim=1)                 # (threads, elements)
print("shifts of elements 0 to 7:", shifts)
assert torch.equal(eight.view(-1), NF4_CODE[q.codes()[: 32 * 8].long()]) and shifts[:2] == [4, 0]

# %% [markdown]
# 4 and 0: the usual guess, 28 or 0, forgets that a byte's first code is high, or that the first byte is low. Two
# instructions a weight, shift and shuffle. A table in shared memory takes four, and all threads have to wait for it first.
#
# The package's kernels are in Triton, which is Python: it is compiled for the GPU, and without one it can be *interpreted*,
# slowly, on any machine. So their bits are tested where there is no GPU.
#
# ## The picture

# %%
with picture("17_fast", columns=2, width=9, height=2.8, width_ratios=(1, 2)) as (left_axes, right_axes):
    bars = left_axes.bar(["three lines", "pairs", "one pass"], [moved, moved_by_pairs, least], color=[RED, GREY, BLUE])
    left_axes.bar_label(bars, [f"{height:.1f}" for height in (moved, moved_by_pairs, least)])
    left_axes.set(title="bytes moved for each weight", yticks=[], ylim=(0, 38))
    right_axes.imshow(torch.stack((NF4_CODE, high, low)), cmap="RdBu", vmin=-1.2, vmax=1.2, aspect="auto")
    for row, index in enumerate((torch.arange(16), chunk >> 4, chunk & 15)):
        for column, code in enumerate(index.tolist()):
            right_axes.text(column, row, f"{code:x}", ha="center", va="center", fontsize=9)
    right_axes.set(title="one register of levels, asked twice by the same sixteen bytes", xticks=[])
    right_axes.set_yticks(range(3), ["table", "high nibbles", "low nibbles"])

# %% [markdown]
# ![bytes moved by three ways to unpack; the table in one register, and what two permutations take from it](figures/17_fast.png)
#
# ## Where it lives
#
# `minilora/kernels/reference.py` is the truth, in torch; `minilora/kernels/nf4_vectors.h` has the register and its lookups, in
# four forms for four kinds of processor; `minilora/kernels/nf4_product.cpp` the loops over them;
# `minilora/kernels/nf4_one_row.h` the one that a token meets, where a block's sum is scaled and not its weights;
# `minilora/kernels/nf4_turned.h` those that many rows meet;
# `minilora/layers/scratch.py` the buffer; `minilora/layers/dense.py` the products of processors without 16-bit ones;
# `minilora/llama/decoding.py` and `minilora/kernels/block_token.h` the one call a token;
# `minilora/kernels/nf4_triton.py` the same for GPUs, and `minilora/kernels/product_triton.py` their products, one of which
# hands a weight from its codes to the tensor cores within one thread. `tests/kernels/test_equal_bits.py` and
# `tests/kernels/test_gpu.py` hold them against the reference, bit for bit. `minilora bench --only unpacking` measures on
# your machine.
#
# ## The trap
#
# In training, weights come out in bfloat16. A value then has 16 bits, and a register holds 32. So round the table to
# bfloat16, once for all, and scale what was looked up?
#
# **Predict.** Eight significant bits are left of a level, so it is off by a fifth of a percent at the most. In how many of
# the weights will there be another number than in the reference, which scales in float32 and rounds once?

# %%
codes, right = q.codes().view(-1, 64).long(), q.dequantize(torch.bfloat16).view(-1, 64)
rounded_first = (NF4_CODE.bfloat16().float()[codes] * q.absmax[:, None]).bfloat16()
differing = float((rounded_first != right).float().mean())
largest = float(((rounded_first.float() - right.float()).abs() / right.float().abs().clamp(min=1e-9)).max())
print(f"{differing:.0%} of the weights differ, none by more than {largest:.1%}")
assert torch.allclose(rounded_first, right, rtol=0.01, atol=0), "a test with a tolerance of 1 % sees nothing"
assert round(differing, 2) == 0.20 and largest < 0.008

# %% [markdown]
# In every fifth: each is rounded twice. It is a small error, and that is the trap: a test with a tolerance of one percent
# passes, and an adapter that was trained with one kernel is then served by another, over other weights. So the tests of fast
# code ask for *equal*, which a kernel can be if it does the same roundings in the same order. Here that costs nothing:
# scale the table in float32, round *that*, then look up.

# %%
scaled_first = (NF4_CODE * q.absmax[:, None]).bfloat16().gather(1, codes)                      # 16 roundings a block of 64
assert torch.equal(scaled_first, right)
print("scaled, rounded, looked up: equal to the bit")

# %% [markdown]
# ## Your turn
#
# Write `unpack_by_pairs`, `even_odd_product` and `word_codes` in `lessons/exercises/17.py`, then:
#
#     minilora check 17
