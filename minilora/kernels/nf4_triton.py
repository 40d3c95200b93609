"""The Triton kernels: what one program on a GPU does.  `gpu.py` launches them, and imports this file only where it needs it.

W (out, in) lies flattened: element e is a nibble of byte e // 2, and its constant is that of block e // BLOCKSIZE.  The unit of
work is a run: RUN consecutive elements that share a block, begin at a multiple of RUN and lie in one row,

    RUN = the largest power of two, up to 64, that divides BLOCKSIZE, and in_features where rows matter

so that a run's constant is decoded once and its codes are read as words of eight.  Rows that end within a block or within a
byte need no case of their own: with an odd block size or width RUN is 1, which is slower and as right.

Bits: a constant is ``dynamic[code] * nested + offset``, a weight ``table[nibble] * constant``, each step rounded to float32 as
in the reference.  Trap: compilers contract a * b + c to one operation with one rounding; Triton and ptxas do so unless the
launch says ``enable_fp_fusion=False`` (`gpu.OPTIONS`; tests/kernels/test_gpu_compiled.py looks for such operations in the
machine code).  Where a sum may be contracted, it says `tl.fma` itself.

The sixteen levels lie in a warp's registers, one a thread and each twice, and a thread asks the one that holds level i:

    value = shfl(own, word >> 4 k)          two instructions; of the second operand only the last four bits count

Trap: a table in shared memory (`tl.gather`) takes four, and two barriers; a `tl.load` per element takes twelve.  Where there
are no warps, in Triton's interpreter and on other makers' GPUs, the table is gathered (SHUFFLED is False).

Shapes: A rows of W, G runs in each, R elements in a run, V = R / 8 words, P = R / 2 bytes; M rows of x, K features of y, S
features of x.

Lesson 17 explains it.
"""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _own_level(table: tl.tensor, SHUFFLED: tl.constexpr) -> tl.tensor:
    """The level that a thread holds for its warp: that of its number % 16.  A scalar to Triton, another one in each thread."""
    if SHUFFLED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 lane; .reg .b64 place; mov.u32 lane, %laneid; and.b32 lane, lane, 15; "
            "mad.wide.u32 place, lane, 4, $1; ld.global.nc.f32 $0, [place]; }",
            "=f,l", [table.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1)
    return 0.0


@triton.jit
def _levels(codes: tl.tensor, table: tl.tensor, own: tl.tensor, SHUFFLED: tl.constexpr) -> tl.tensor:
    """table[code] of each code, the last four bits of an uint32: float32, of the same shape."""
    if SHUFFLED:
        return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [own, codes],
                                         dtype=tl.float32, is_pure=True, pack=1)
    level_n = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape((codes & 15).to(tl.int32), (codes.numel,)), 0)
    return tl.reshape(level_n, codes.shape)


@triton.jit
def _constants(first_AG: tl.tensor, valid_AG: tl.tensor, constants: tl.tensor, dynamic: tl.tensor, nested: tl.tensor,
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
def _words(first_AG: tl.tensor, valid_AG: tl.tensor, packed: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """The codes of runs, eight a word: (A, G, V) uint32."""
    # Said so that Triton sees that a run begins at a multiple of 16 bytes, and reads as much at a time.
    at_AGV = (first_AG // RUN * (RUN // 8))[:, :, None] + tl.arange(0, RUN // 8)[None, None, :]
    return tl.load(packed.to(tl.pointer_type(tl.uint32)) + at_AGV, mask=valid_AG[:, :, None], other=0)


@triton.jit
def _codes(word_AGV: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """The codes of words, each in the last four bits: (A, G, R) uint32."""
    # The first of two codes is a byte's upper half, and the first of four bytes a word's last eight bits.
    even = tl.join(tl.join(word_AGV >> 4, word_AGV >> 20), tl.join(word_AGV >> 12, word_AGV >> 28))
    odd = tl.join(tl.join(word_AGV, word_AGV >> 16), tl.join(word_AGV >> 8, word_AGV >> 24))
    return tl.reshape(tl.join(even, odd), (word_AGV.shape[0], word_AGV.shape[1], RUN))


@triton.jit
def _weights(first_AG: tl.tensor, valid_AG: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, own: tl.tensor,
             constant_AG: tl.tensor, RUN: tl.constexpr, WORDS: tl.constexpr, SHORT: tl.constexpr,
             SHUFFLED: tl.constexpr) -> tl.tensor:
    """The runs that begin at the elements `first_AG`: (A, G, R) float32; some finite numbers where not valid.

    WORDS: the codes may be read as words.  SHORT: the last run may end behind the last element, n - 1.
    """
    if WORDS:
        code_AGR = _codes(_words(first_AG, valid_AG, packed, RUN), RUN)
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
    return _levels(code_AGR, table, own, SHUFFLED) * constant_AG[:, :, None]


@triton.jit
def dequantize(out: tl.tensor, n: tl.tensor, packed: tl.tensor, table: tl.tensor, constants: tl.tensor, dynamic: tl.tensor,
               nested: tl.tensor, offset: tl.tensor, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RUN: tl.constexpr,
               WORDS: tl.constexpr, SHORT: tl.constexpr, SHUFFLED: tl.constexpr, TILE: tl.constexpr) -> None:
    """TILE elements a program, rounded once to the type of `out`."""
    first_AG = tl.program_id(0).to(tl.int64) * TILE + (tl.arange(0, TILE // RUN) * RUN)[None, :]
    valid_AG = first_AG < n
    constant_AG = _constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
    own = _own_level(table, SHUFFLED)
    w_AGR = _weights(first_AG, valid_AG, n, packed, table, own, constant_AG, RUN, WORDS, SHORT, SHUFFLED)
    element_AGR = first_AG[:, :, None] + tl.arange(0, RUN)[None, None, :]
    mask_AGR = element_AGR < n if SHORT else tl.broadcast_to(valid_AG[:, :, None], element_AGR.shape)
    tl.store(out + element_AGR, w_AGR.to(out.dtype.element_ty), mask=mask_AGR)


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
    own = _own_level(table, SHUFFLED)
    total_AGV = tl.zeros((OUT, IN // RUN, RUN // 8), tl.float32)
    for start in range(0, in_features, IN):
        column_G = start + tl.arange(0, IN // RUN) * RUN
        valid_AG = (row_A < out_features)[:, None] & (column_G < in_features)[None, :] | EVEN
        first_AG = row_A.to(tl.int64)[:, None] * in_features + column_G[None, :]
        constant_AG = _constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
        word_AGV = _words(first_AG, valid_AG, packed, RUN)
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
        sum_AGV = _levels(word_AGV >> 4, table, own, SHUFFLED) * x_0[None, :, :]
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
    level_AGV = _levels(code_AGV, table, own, SHUFFLED)
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
    own = _own_level(table, SHUFFLED)
    total = tl.zeros((KEPT, ROWS), tl.float32)
    for start in range(tl.program_id(2) * SUMMED, summed_features, PARTS * SUMMED):
        summed_S = start + tl.arange(0, SUMMED)
        x_SM = tl.load(x + row_M.to(tl.int64)[None, :] * summed_features + summed_S[:, None],
                       mask=(row_M < rows)[None, :] & (summed_S < summed_features)[:, None], other=0.0)
        row_A = (start if TRANSPOSED else kept) + tl.arange(0, OUT)
        column_G = (kept if TRANSPOSED else start) + tl.arange(0, IN // RUN) * RUN
        valid_AG = (row_A < out_features)[:, None] & (column_G < in_features)[None, :]
        first_AG = row_A.to(tl.int64)[:, None] * in_features + column_G[None, :]
        constant_AG = _constants(first_AG, valid_AG, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)
        w_AGR = _weights(first_AG, valid_AG, 0, packed, table, own, constant_AG, RUN, WORDS, False, SHUFFLED)
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
    return _constants(first_AT, valid_AT, constants, dynamic, nested, offset, BLOCKSIZE, NESTED)


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
    own = _own_level(table, SHUFFLED)
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
        w_ATR = (_levels(_codes(word_ATV, 32), table, own, SHUFFLED) * constant_AT[:, :, None]).to(x_SM.dtype)
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
