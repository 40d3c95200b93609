"""From codes to weights in Triton: what a program on a GPU does.  `gpu.py` launches it, and imports it where it needs it alone.

W (out, in) lies flattened: element e is a nibble of byte e // 2, and its constant is that of block e // BLOCKSIZE.  The unit of
work is a run: RUN consecutive elements that share a block, begin at a multiple of RUN and lie in one row,

    RUN = the largest power of two, up to 64, that divides BLOCKSIZE, and in_features where rows matter

so that a run's constant is decoded once and its codes are read as words of eight.  Rows that end within a block or within a
byte need no case of their own: with an odd block size or width RUN is 1, which is slower and as right.

Bits: a constant is ``dynamic[code] * nested + offset``, a weight ``table[nibble] * constant``, each step rounded to float32 as
in the reference.  Trap: compilers contract a * b + c to one operation with one rounding; Triton and ptxas do so unless the
launch says ``enable_fp_fusion=False`` (`gpu.OPTIONS`; tests/kernels/test_gpu_compiled.py looks for such operations in the
machine code).

The sixteen levels lie in a warp's registers, one a thread and each twice, and a thread asks the one that holds level i:

    value = shfl(own, word >> 4 k)          two instructions; of the second operand only the last four bits count

Trap: a table in shared memory (`tl.gather`) takes four, and two barriers; a `tl.load` per element takes twelve.  Where there
are no warps, in Triton's interpreter and on other makers' GPUs, the table is gathered (SHUFFLED is False).

Shapes: A rows of W, G runs in each, R elements in a run, V = R / 8 words, P = R / 2 bytes.

Lesson 17 explains it.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_level(table: tl.tensor, SHUFFLED: tl.constexpr) -> tl.tensor:
    """The level that a thread holds for its warp: that of its number % 16.  A scalar to Triton, another one in each thread."""
    if SHUFFLED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 lane; .reg .b64 place; mov.u32 lane, %laneid; and.b32 lane, lane, 15; "
            "mad.wide.u32 place, lane, 4, $1; ld.global.nc.f32 $0, [place]; }",
            "=f,l", [table.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1)
    return 0.0


@triton.jit
def levels(codes: tl.tensor, table: tl.tensor, own: tl.tensor, SHUFFLED: tl.constexpr) -> tl.tensor:
    """table[code] of each code, the last four bits of an uint32: float32, of the same shape."""
    if SHUFFLED:
        return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [own, codes],
                                         dtype=tl.float32, is_pure=True, pack=1)
    level_n = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape((codes & 15).to(tl.int32), (codes.numel,)), 0)
    return tl.reshape(level_n, codes.shape)


@triton.jit
def run_constants(first_AG: tl.tensor, valid_AG: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor,
               offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr) -> tl.tensor:
    """Of the runs that begin at the elements `first_AG` (int64): (A, G) float32; some finite number where not valid.

    NESTED: constants per nested block, or 0: they are float32.
    """
    block_AG = first_AG // BLOCKSIZE
    constant_AG = tl.load(constants + block_AG, mask=valid_AG, other=0)
    if NESTED:
        level_AG = tl.load(dynamic + constant_AG.to(tl.int32))
        scale_AG = tl.load(nested + block_AG // NESTED, mask=valid_AG, other=0.0)
        constant_AG = level_AG * scale_AG + offset
    return constant_AG


@triton.jit
def run_words(first_AG: tl.tensor, valid_AG: tl.tensor, packed: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """The codes of runs, eight a word: (A, G, V) uint32."""
    # Said so that Triton sees that a run begins at a multiple of 16 bytes, and reads as much at a time.
    at_AGV = (first_AG // RUN * (RUN // 8))[:, :, None] + tl.arange(0, RUN // 8)[None, None, :]
    return tl.load(packed.to(tl.pointer_type(tl.uint32)) + at_AGV, mask=valid_AG[:, :, None], other=0)


@triton.jit
def codes_of_words(word_AGV: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """The codes of words, each in the last four bits: (A, G, R) uint32."""
    # The first of two codes is a byte's upper half, and the first of four bytes a word's last eight bits.
    even = tl.join(tl.join(word_AGV >> 4, word_AGV >> 20), tl.join(word_AGV >> 12, word_AGV >> 28))
    odd = tl.join(tl.join(word_AGV, word_AGV >> 16), tl.join(word_AGV >> 8, word_AGV >> 24))
    return tl.reshape(tl.join(even, odd), (word_AGV.shape[0], word_AGV.shape[1], RUN))


@triton.jit
def run_weights(first_AG: tl.tensor, valid_AG: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, own: tl.tensor,
             constant_AG: tl.tensor, RUN: tl.constexpr, WORDS: tl.constexpr, SHORT: tl.constexpr,
             SHUFFLED: tl.constexpr) -> tl.tensor:
    """The runs that begin at the elements `first_AG`: (A, G, R) float32; some finite numbers where not valid.

    WORDS: the codes may be read as words.  SHORT: the last run may end behind the last element, n - 1.
    """
    if WORDS:
        code_AGR = codes_of_words(run_words(first_AG, valid_AG, packed, RUN), RUN)
    elif RUN == 1:
        byte_AG = tl.load(packed + first_AG // 2, mask=valid_AG, other=0).to(tl.uint32)
        code_AGR = tl.where(first_AG % 2 == 0, byte_AG >> 4, byte_AG)[:, :, None]
    else:
        pair = tl.arange(0, RUN // 2)[None, None, :]
        mask_AGP = valid_AG[:, :, None]
        # Why only where it is needed: a mask that may end anywhere makes the loads single bytes.
        if SHORT:
            mask_AGP = mask_AGP & (first_AG[:, :, None] + 2 * pair < n)
        byte_AGP = tl.load(packed + (first_AG // 2)[:, :, None] + pair, mask=mask_AGP, other=0).to(tl.uint32)
        code_AGR = tl.interleave(byte_AGP >> 4, byte_AGP)
    return levels(code_AGR, table, own, SHUFFLED) * constant_AG[:, :, None]


@triton.jit
def dequantize(out: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor,
               nested: tl.tensor, offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr,
               WORDS: tl.constexpr, SHORT: tl.constexpr, SHUFFLED: tl.constexpr, TILE: tl.constexpr) -> None:
    """TILE elements a program, rounded once to the type of `out`."""
    first_AG = tl.program_id(0).to(tl.int64) * TILE + (tl.arange(0, TILE // RUN) * RUN)[None, :]
    valid_AG = first_AG < n
    constant_AG = run_constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
    own = own_level(table, SHUFFLED)
    w_AGR = run_weights(first_AG, valid_AG, n, packed, table, own, constant_AG, RUN, WORDS, SHORT, SHUFFLED)
    element_AGR = first_AG[:, :, None] + tl.arange(0, RUN)[None, None, :]
    mask_AGR = element_AGR < n if SHORT else tl.broadcast_to(valid_AG[:, :, None], element_AGR.shape)
    tl.store(out + element_AGR, w_AGR.to(out.dtype.element_ty), mask=mask_AGR)
