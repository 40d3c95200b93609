"""The Triton kernels: what one program on a GPU does.  `gpu.py` launches them, and imports this file only where it needs it.

W (out, in) lies flattened: element e is a nibble of byte e // 2, and its constant is that of block e // BLOCKSIZE.  The unit of
work is a run: RUN consecutive elements that share a block, begin at a multiple of RUN and lie in one row,

    RUN = the largest power of two, up to 64, that divides BLOCKSIZE, and in_features where rows matter

so that a run's constant is decoded once and its bytes are read in one go.  Rows that end within a block or within a byte need
no case of their own: with an odd block size or width RUN is 1, which is slower and as right.

Bits: a constant is ``dynamic[code] * nested + offset``, a weight ``table[nibble] * constant``, each step rounded to float32 as
in the reference.  Trap: compilers contract a * b + c to one operation with one rounding; Triton and ptxas do so unless the
launch says ``enable_fp_fusion=False`` (`gpu.OPTIONS`; tests/kernels/test_gpu.py looks for such operations in the machine code).

The sixteen levels are looked up in shared memory (`tl.gather`), where they lie in sixteen banks: a warp reads any 32 of them at
once.  Trap: a `tl.load` per element does it too, with three times the instructions, since Triton moves 64-bit addresses between
threads for it.

Shapes: A rows of W, G runs in each, R elements in a run, P = R / 2 bytes; M rows of x, K features of y, S features of x.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nibbles(word: tl.tensor) -> tl.tensor:
    """The eight codes of each word, uint32, in the order of the elements: (..., 2, 2, 2) int32."""
    code_0, code_1 = (word >> 4 & 15), (word & 15)
    code_2, code_3 = (word >> 12 & 15), (word >> 8 & 15)
    code_4, code_5 = (word >> 20 & 15), (word >> 16 & 15)
    code_6, code_7 = (word >> 28), (word >> 24 & 15)
    even = tl.join(tl.join(code_0, code_4), tl.join(code_2, code_6))
    odd = tl.join(tl.join(code_1, code_5), tl.join(code_3, code_7))
    return tl.join(even, odd).to(tl.int32)


@triton.jit
def _parts(first_AG: tl.tensor, valid_AG: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, constants: tl.tensor,
           dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
           RUN: tl.constexpr, WORDS: tl.constexpr, SHORT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The runs that begin at the elements `first_AG` (int64): levels (A, G, RUN) and constants (A, G), float32; some finite
    numbers where not valid.

    NESTED: constants per nested block, or 0: they are float32.  WORDS: whether the codes are read as words of eight.
    SHORT: the last run may end behind the last element, n - 1.
    """
    block_AG = first_AG // BLOCKSIZE
    constant_AG = tl.load(constants + block_AG, mask=valid_AG, other=0)
    if NESTED:
        level_AG = tl.load(dynamic + constant_AG.to(tl.int32))
        scale_AG = tl.load(nested + block_AG // NESTED, mask=valid_AG, other=0.0)
        constant_AG = level_AG * scale_AG + offset
    if WORDS:
        word = tl.arange(0, RUN // 8)[None, None, :]
        words = packed.to(tl.pointer_type(tl.uint32))
        word_AGW = tl.load(words + (first_AG // 8)[:, :, None] + word, mask=valid_AG[:, :, None], other=0)
        nibble_AGR = tl.reshape(_nibbles(word_AGW), (first_AG.shape[0], first_AG.shape[1], RUN))
    elif RUN == 1:
        byte_AG = tl.load(packed + first_AG // 2, mask=valid_AG, other=0).to(tl.int32)
        nibble_AGR = tl.where(first_AG % 2 == 0, byte_AG >> 4, byte_AG & 15)[:, :, None]
    else:
        pair = tl.arange(0, RUN // 2)[None, None, :]
        mask_AGP = valid_AG[:, :, None]
        # Why only where it is needed: a mask that may end anywhere makes the loads single bytes.
        if SHORT:
            mask_AGP = mask_AGP & (first_AG[:, :, None] + 2 * pair < n)
        byte_AGP = tl.load(packed + (first_AG // 2)[:, :, None] + pair, mask=mask_AGP, other=0).to(tl.int32)
        nibble_AGR = tl.interleave(byte_AGP >> 4, byte_AGP & 15)
    level_n = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape(nibble_AGR, (nibble_AGR.numel,)), 0)
    return tl.reshape(level_n, nibble_AGR.shape), constant_AG


@triton.jit
def _tile(row: tl.tensor, column: tl.tensor, out_features: tl.tensor, in_features: tl.tensor, packed: tl.tensor,
          table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
          BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr, OUT: tl.constexpr,
          IN: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`_parts` of W[row : row + OUT, column : column + IN]: (OUT, IN // RUN, RUN) and (OUT, IN // RUN)."""
    row_A = row + tl.arange(0, OUT)
    column_G = column + tl.arange(0, IN // RUN) * RUN
    valid_AG = (row_A < out_features)[:, None] & (column_G < in_features)[None, :]
    first_AG = row_A.to(tl.int64)[:, None] * in_features + column_G[None, :]
    return _parts(first_AG, valid_AG, 0, packed, table, constants, dynamic, nested, offset, BLOCKSIZE, NESTED, RUN, WORDS, False)


@triton.jit
def dequantize(out: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor,
               nested: tl.tensor, offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr,
               WORDS: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr) -> None:
    """TILE elements a program, rounded once to the type of `out`."""
    first_AG = tl.program_id(0).to(tl.int64) * TILE + (tl.arange(0, TILE // RUN) * RUN)[None, :]
    valid_AG = first_AG < n
    level_AGR, constant_AG = _parts(first_AG, valid_AG, n, packed, table, constants, dynamic, nested, offset, BLOCKSIZE, NESTED,
                                    RUN, WORDS, SHORT)
    w_AGR = level_AGR * constant_AG[:, :, None]
    element_AGR = first_AG[:, :, None] + tl.arange(0, RUN)[None, None, :]
    mask_AGR = element_AGR < n if SHORT else tl.broadcast_to(valid_AG[:, :, None], element_AGR.shape)
    tl.store(out + element_AGR, w_AGR.to(out.dtype.element_ty), mask=mask_AGR)


@triton.jit
def row_product(y: tl.tensor, x: tl.tensor, bias: tl.tensor, out_features: tl.tensor, in_features: tl.tensor, packed: tl.tensor,
                table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
                BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr,
                OUT: tl.constexpr, IN: tl.constexpr) -> None:
    """y = W x + bias for one row of x, OUT features a program: a run's levels meet x first, and its constant their sum."""
    row = tl.program_id(0) * OUT
    row_A = row + tl.arange(0, OUT)
    total_AG = tl.zeros((OUT, IN // RUN), tl.float32)
    for start in range(0, in_features, IN):
        level_AGR, constant_AG = _tile(row, start, out_features, in_features, packed, table, constants, dynamic, nested, offset,
                                       BLOCKSIZE, NESTED, RUN, WORDS, OUT, IN)
        column_GR = start + (tl.arange(0, IN // RUN) * RUN)[:, None] + tl.arange(0, RUN)[None, :]
        x_GR = tl.load(x + column_GR, mask=column_GR < in_features, other=0.0).to(tl.float32)
        total_AG += tl.sum(level_AGR * x_GR[None, :, :], axis=2) * constant_AG
    y_A = tl.sum(total_AG, axis=1)
    if BIAS:
        y_A += tl.load(bias + row_A, mask=row_A < out_features, other=0.0)
    tl.store(y + row_A, y_A.to(y.dtype.element_ty), mask=row_A < out_features)


@triton.jit(do_not_specialize=["rows"])
def product(y: tl.tensor, x: tl.tensor, bias: tl.tensor, rows: tl.tensor, out_features: tl.tensor, in_features: tl.tensor,
            packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
            BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr,
            TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr) -> None:
    """y = x Wᵀ + bias, or transposed y = x W: ROWS rows and OUT features (IN transposed) a program, tile after tile of W.

    The sums are those of yᵀ = W xᵀ: rows of W fill the tensor cores' instructions, which a few rows of x would not.
    """
    KEPT: tl.constexpr = IN if TRANSPOSED else OUT
    SUMMED: tl.constexpr = OUT if TRANSPOSED else IN
    kept_features = in_features if TRANSPOSED else out_features
    summed_features = out_features if TRANSPOSED else in_features
    kept = tl.program_id(0) * KEPT
    kept_K = kept + tl.arange(0, KEPT)
    row_M = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((KEPT, ROWS), tl.float32)
    for start in range(0, summed_features, SUMMED):
        summed_S = start + tl.arange(0, SUMMED)
        x_SM = tl.load(x + row_M.to(tl.int64)[None, :] * summed_features + summed_S[:, None],
                       mask=(row_M < rows)[None, :] & (summed_S < summed_features)[:, None], other=0.0)
        level_AGR, constant_AG = _tile(start if TRANSPOSED else kept, kept if TRANSPOSED else start, out_features, in_features,
                                       packed, table, constants, dynamic, nested, offset, BLOCKSIZE, NESTED, RUN, WORDS, OUT, IN)
        w = tl.reshape(level_AGR * constant_AG[:, :, None], (OUT, IN)).to(x_SM.dtype)
        # Why "ieee": float32 would otherwise be cut to the ten bits of TF32.
        total = tl.dot(tl.trans(w) if TRANSPOSED else w, x_SM, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + kept_K, mask=kept_K < kept_features, other=0.0)[:, None]
    tl.store(y + row_M.to(tl.int64)[None, :] * kept_features + kept_K[:, None], total.to(y.dtype.element_ty),
             mask=(row_M < rows)[None, :] & (kept_K < kept_features)[:, None])
