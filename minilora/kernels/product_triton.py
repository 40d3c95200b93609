"""Products with a 4-bit weight in Triton: W is rebuilt in registers (`nf4_triton`), and never written to memory.

    row_product        one row of x: a thread's levels meet its x first, and their constant the sum; no tensor cores
    operand_product    a few rows of 16 bits: W goes from its codes to the tensor cores without leaving its thread
    product            any run length and type, and the way back, g W: W is exchanged through shared memory

Where programs are few, a sum is taken in parts by several of them, which `add_parts` adds up in a fixed order.  A sum that may
be contracted says `tl.fma` itself: the launch forbids the compiler to do it elsewhere.

Shapes as in `nf4_triton`, and M rows of x, K features of y, S features of x.

Lesson 17 explains it.
"""
from __future__ import annotations

import triton
import triton.language as tl

from minilora.kernels.nf4_triton import codes_of_words, dequantize, levels, own_level, run_constants, run_weights, run_words

__all__ = ["add_parts", "dequantize", "operand_product", "product", "row_product"]


@triton.jit
def row_product(y: tl.tensor, x: tl.tensor, bias: tl.tensor, out_features: tl.tensor, in_features: tl.tensor, packed: tl.tensor,
                table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
                BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, BIAS: tl.constexpr, SHUFFLED: tl.constexpr,
                DIRECT: tl.constexpr, EVEN: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr) -> None:
    """y = W x + bias for one row of x, OUT features a program, the codes read as words.

    A word's levels meet their elements of x first, and its constant their sum: one multiplication for eight weights, and W is
    never rounded to the type of x.

    DIRECT: a thread reads the eight elements of x that a word meets at once (16 bits each, x at a multiple of 16 bytes); else
    Triton reads x as it lies, and hands each thread its own.  EVEN: no tile ends outside of W, so nothing need be asked.
    """
    row_A = tl.program_id(0) * OUT + tl.arange(0, OUT)
    own = own_level(table, SHUFFLED)
    total_AGV = tl.zeros((OUT, IN // RUN, RUN // 8), tl.float32)
    for start in range(0, in_features, IN):
        column_G = start + tl.arange(0, IN // RUN) * RUN
        valid_AG = (row_A < out_features)[:, None] & (column_G < in_features)[None, :] | EVEN
        first_AG = row_A.to(tl.int64)[:, None] * in_features + column_G[None, :]
        constant_AG = run_constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
        word_AGV = run_words(first_AG, valid_AG, packed, RUN)
        # Why float32 at once: later, each of the OUT features would turn x into it anew.
        if DIRECT:
            column_GV = column_G[:, None] + 8 * tl.arange(0, RUN // 8)[None, :]
            x_01, x_23, x_45, x_67 = tl.inline_asm_elementwise(
                "{ .reg .pred valid; setp.ne.b32 valid, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                "@valid ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }", "=&r,=&r,=&r,=&r,l,r",
                [x.to(tl.int64) + 2 * column_GV, (column_GV < in_features | EVEN).to(tl.int32)],
                dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1)
            kind: tl.constexpr = x.dtype.element_ty
            x_0, x_1 = _first(x_01, kind), _second(x_01, kind)
            x_2, x_3 = _first(x_23, kind), _second(x_23, kind)
            x_4, x_5 = _first(x_45, kind), _second(x_45, kind)
            x_6, x_7 = _first(x_67, kind), _second(x_67, kind)
        else:
            column_GR = column_G[:, None] + tl.arange(0, RUN)[None, :]
            x_GR = tl.load(x + column_GR, mask=column_GR < in_features | EVEN, other=0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(x_GR, (IN // RUN, RUN // 8, 2, 2, 2)))
            even_0, even_1 = tl.split(even)
            odd_0, odd_1 = tl.split(odd)
            x_0, x_4 = tl.split(even_0)
            x_2, x_6 = tl.split(even_1)
            x_1, x_5 = tl.split(odd_0)
            x_3, x_7 = tl.split(odd_1)
        sum_AGV = levels(word_AGV >> 4, table, own, SHUFFLED) * x_0[None, :, :]
        sum_AGV = _plus(sum_AGV, word_AGV, x_1, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 12, x_2, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 8, x_3, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 20, x_4, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 16, x_5, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 28, x_6, table, own, SHUFFLED)
        sum_AGV = _plus(sum_AGV, word_AGV >> 24, x_7, table, own, SHUFFLED)
        total_AGV = tl.fma(sum_AGV, tl.broadcast_to(constant_AG[:, :, None], sum_AGV.shape), total_AGV)
    y_A = tl.sum(tl.sum(total_AGV, axis=2), axis=1)
    if BIAS:
        y_A += tl.load(bias + row_A, mask=row_A < out_features, other=0.0)
    tl.store(y + row_A, y_A.to(y.dtype.element_ty), mask=row_A < out_features)


@triton.jit
def _first(pair: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """The first of two 16-bit numbers in a word, as float32."""
    return pair.to(tl.uint16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _second(pair: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    return (pair >> 16).to(tl.uint16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def _plus(sum_AGV: tl.tensor, code_AGV: tl.tensor, x_GV: tl.tensor, table: tl.tensor, own: tl.tensor,
          SHUFFLED: tl.constexpr) -> tl.tensor:
    """sum + table[code] x, rounded once."""
    level_AGV = levels(code_AGV, table, own, SHUFFLED)
    return tl.fma(level_AGV, tl.broadcast_to(x_GV[None, :, :], level_AGV.shape), sum_AGV)


@triton.jit(do_not_specialize=["rows"])
def product(y: tl.tensor, x: tl.tensor, bias: tl.tensor, rows: tl.tensor, out_features: tl.tensor, in_features: tl.tensor,
            packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
            BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr,
            TRANSPOSED: tl.constexpr, SHUFFLED: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
            IN: tl.constexpr) -> None:
    """y = x Wᵀ + bias, or transposed y = x W: ROWS rows and OUT features (IN transposed) a program, tile after tile of W.

    The sums are those of yᵀ = W xᵀ: rows of W fill the tensor cores' instructions, which a few rows of x would not.
    With PARTS above 1 a program takes every PARTS-th tile, and y is (PARTS, rows, features) float32, for `add_parts`.
    """
    KEPT: tl.constexpr = IN if TRANSPOSED else OUT
    SUMMED: tl.constexpr = OUT if TRANSPOSED else IN
    kept_features = in_features if TRANSPOSED else out_features
    summed_features = out_features if TRANSPOSED else in_features
    kept = tl.program_id(0) * KEPT
    kept_K = kept + tl.arange(0, KEPT)
    row_M = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = own_level(table, SHUFFLED)
    total = tl.zeros((KEPT, ROWS), tl.float32)
    for start in range(tl.program_id(2) * SUMMED, summed_features, PARTS * SUMMED):
        summed_S = start + tl.arange(0, SUMMED)
        x_SM = tl.load(x + row_M.to(tl.int64)[None, :] * summed_features + summed_S[:, None],
                       mask=(row_M < rows)[None, :] & (summed_S < summed_features)[:, None], other=0.0)
        row_A = (start if TRANSPOSED else kept) + tl.arange(0, OUT)
        column_G = (kept if TRANSPOSED else start) + tl.arange(0, IN // RUN) * RUN
        valid_AG = (row_A < out_features)[:, None] & (column_G < in_features)[None, :]
        first_AG = row_A.to(tl.int64)[:, None] * in_features + column_G[None, :]
        constant_AG = run_constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
        w_AGR = run_weights(first_AG, valid_AG, 0, packed, table, own, constant_AG, RUN, WORDS, False, SHUFFLED)
        w = tl.reshape(w_AGR, (OUT, IN)).to(x_SM.dtype)
        # Why "ieee": float32 would otherwise be cut to the ten bits of TF32.
        total = tl.dot(tl.trans(w) if TRANSPOSED else w, x_SM, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + kept_K, mask=kept_K < kept_features, other=0.0)[:, None]
    row_M = tl.program_id(2) * rows + row_M
    tl.store(y + row_M.to(tl.int64)[None, :] * kept_features + kept_K[:, None], total.to(y.dtype.element_ty),
             mask=(row_M < (tl.program_id(2) + 1) * rows)[None, :] & (kept_K < kept_features)[:, None])


@triton.jit
def _operand_words(row_A: tl.tensor, start: tl.tensor, out_features: tl.tensor, in_features: tl.tensor,
                   packed: tl.tensor) -> tl.tensor:
    """The codes of 128 columns from `start` on, four words a thread: (A, 4, 4) uint32."""
    # Why not (A, 4, 4) at once: whether threads go along the second dimension or the first differs between Triton's versions.
    # Trap: a mask that might end within a thread's four words would make them four reads.
    word_V = tl.arange(0, 16)
    at_AV = row_A.to(tl.int64)[:, None] * (in_features // 32 * 4) + start // 8 + word_V[None, :]
    valid_AV = (row_A < out_features)[:, None] & (start + 32 * (word_V // 4) < in_features)[None, :]
    word_AV = tl.load(packed.to(tl.pointer_type(tl.uint32)) + at_AV, mask=valid_AV, other=0)
    return tl.reshape(word_AV, (row_A.shape[0], 4, 4))


@triton.jit
def _operand_constants(row_A: tl.tensor, start: tl.tensor, out_features: tl.tensor, in_features: tl.tensor,
                       constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor, offset: tl.tensor,
                       BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr) -> tl.tensor:
    """Those of the same: (A, 4) float32."""
    column_T = start + 32 * tl.arange(0, 4)
    valid_AT = (row_A < out_features)[:, None] & (column_T < in_features)[None, :]
    first_AT = row_A.to(tl.int64)[:, None] * in_features + column_T[None, :]
    return run_constants(first_AT, valid_AT, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)


@triton.jit(do_not_specialize=["rows"])
def operand_product(y: tl.tensor, x: tl.tensor, bias: tl.tensor, rows: tl.tensor, out_features: tl.tensor,
                    in_features: tl.tensor, packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor,
                    nested: tl.tensor, offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr,
                    SHUFFLED: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
                    OUT: tl.constexpr) -> None:
    """`product` of 16 bits, x Wᵀ, where runs are 32 codes or longer: W stays in the thread that unpacked it.

    Tensor cores take 16 rows of W at a time from a warp's registers: thread 4 a + t has, of rows a and a + 8, the elements
    2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of every 16.  A sum may take its terms in any order.  So the thread reads 32 codes that
    lie together, columns 32 t to 32 t + 31 of 128, and they count as those of eight times 16; x is read in the same order.
    The rows, too, are numbered so that each lies where Triton puts it anyway.

    Trap: `product` unpacks W in one order and needs it in the other: all of it goes through shared memory, behind barriers.
    """
    row_A = tl.arange(0, OUT)
    turn_A = row_A // (8 * WARPS)
    row_A = row_A % 8 + 8 * (turn_A % 2) + 16 * (row_A // 8 % WARPS) + 16 * WARPS * (turn_A // 2)
    row_A += tl.program_id(0) * OUT
    row_M = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x_M = x + row_M.to(tl.int64) * in_features
    column_T = 32 * tl.arange(0, 4)
    own = own_level(table, SHUFFLED)
    total = tl.zeros((OUT, ROWS), tl.float32)
    first = tl.program_id(2) * 128
    word_ATV = _operand_words(row_A, first, out_features, in_features, packed)
    constant_AT = _operand_constants(row_A, first, out_features, in_features, constants, dynamic, nested, offset, BLOCKSIZE,
                                     NESTED)
    for start in range(first, in_features, PARTS * 128):
        # Asked for before they are needed, so that memory's answer comes while this tile is at work.
        next_ATV = _operand_words(row_A, start + PARTS * 128, out_features, in_features, packed)
        next_AT = _operand_constants(row_A, start + PARTS * 128, out_features, in_features, constants, dynamic, nested, offset,
                                     BLOCKSIZE, NESTED)
        column_TR = start + column_T[:, None] + tl.arange(0, 32)[None, :]
        x_MTR = tl.load(x_M[:, None, None] + column_TR[None, :, :],
                        mask=(row_M < rows)[:, None, None] & (column_TR < in_features)[None, :, :], other=0.0)
        # Of the 32 the places' highest three bits say which 16, then come that of 8 and that of 1; t stands between them.
        x_SM = tl.reshape(tl.permute(tl.reshape(x_MTR, (ROWS, 4, 8, 2, 2)), (2, 3, 1, 4, 0)), (128, ROWS))
        w_ATR = (levels(codes_of_words(word_ATV, 32), table, own, SHUFFLED) * constant_AT[:, :, None]).to(x_SM.dtype)
        w = tl.permute(tl.reshape(w_ATR, (OUT // (16 * WARPS), 2, WARPS, 8, 4, 8, 2, 2)), (0, 2, 1, 3, 5, 6, 4, 7))
        total = tl.dot(tl.reshape(w, (OUT, 128)), x_SM, total)
        word_ATV, constant_AT = next_ATV, next_AT
    kept_K = tl.program_id(0) * OUT + tl.arange(0, OUT)
    if BIAS:
        total += tl.load(bias + kept_K, mask=kept_K < out_features, other=0.0)[:, None]
    row_M = tl.program_id(2) * rows + row_M
    tl.store(y + row_M.to(tl.int64)[None, :] * out_features + kept_K[:, None], total.to(y.dtype.element_ty),
             mask=(row_M < (tl.program_id(2) + 1) * rows)[None, :] & (kept_K < out_features)[:, None])


@triton.jit
def add_parts(y: tl.tensor, parts: tl.tensor, bias: tl.tensor, n: tl.tensor, features: tl.tensor, PARTS: tl.constexpr,
              BIAS: tl.constexpr, TILE: tl.constexpr) -> None:
    """y = the sum of the parts (PARTS, rows, features) + bias, one behind the other, for TILE of its n elements a program."""
    element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * n + element, mask=element < n, other=0.0)
    if BIAS:
        total += tl.load(bias + element % features, mask=element < n, other=0.0)
    tl.store(y + element, total.to(y.dtype.element_ty), mask=element < n)
