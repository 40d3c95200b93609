// One row of bfloat16 with the weights exact in float32: what a token costs in decoding.
//
// Sixteen 32-bit numbers of packed codes, as they lie in memory, are 128 codes, two blocks of 64 or part of a longer one.
// Shifted right by 4 k, each number's last four bits are its k-th code, and a lookup looks at no others:
//
//     sum += absmax · (table[w] x₀ + table[w >> 4] x₁ + … + table[w >> 28] x₇)
//
// x is put into that order once.  The table stays as it is, and there is one product with a constant for eight with codes:
// a seventh fewer instructions, which are the bound, than with bytes widened and a table scaled for each block.
//
// Lesson 17 explains it.

#pragma once

#include "nf4_blocks.h"

#if defined(__AVX512F__)

namespace {

const int ONE_ROWS = 8;                                         // of W at a time: a load of x serves as many
const int ONE_CODES = 128;                                      // to a register
const int64_t ONE_MOST_ROWS = 512, ONE_PARTS = 8;               // of W that a thread takes at a time; and how often, or more
const int64_t ONE_AHEAD = 4096;                                 // bytes that are asked for beyond the next rows, into L2
// Numbers between these can be added up before they meet a block's constant: nothing gets too large, or loses bits.
const float ONE_LEAST = 0x1p-60f, ONE_MOST = 0x1p100f;

// Whether rows are whole registers, and each half of one lies in one block.
inline bool one_row_fits(const Packed& w, int64_t in) {
    return in % ONE_CODES == 0 && w.blocksize % (ONE_CODES / 2) == 0 && in % w.blocksize == 0;
}

// x (in) in the order of the codes; or false where a number is too large or too small (or none).
inline bool arrange_one_row(const float* x, int64_t in, float* to) {
    Ints wrong = {};
    for (int64_t i = 0; i < in; i += LANES) {
        const Ints size = (Ints)load<Words>(x + i) & 0x7fffffff;
        wrong |= (size != 0) & ((Ints)((Floats)size < ONE_LEAST) | ~(Ints)((Floats)size <= ONE_MOST));
    }
    if (largest(wrong & 1)) return false;
    for (int64_t i = 0; i < in; i += ONE_CODES)
        for (int j = 0; j < ONE_CODES / 8; ++j)                 // a byte's first code is its high nibble
            for (int k = 0; k < 8; ++k) to[i + k * LANES + j] = x[i + 8 * j + (k ^ 1)];
    return true;
}

// Sums of ONE_ROWS rows of W.
inline void multiply_one_row(const Packed& w, int64_t in, const uint8_t* const* rows, const float* const* constants,
                             const float* x, const uint8_t* ahead, const RowConstants& row_constants, float* sums) {
    const int64_t halves_a_block = w.blocksize / (ONE_CODES / 2);
    const Table code = load_table(w.code);
    const float* dynamic = row_constants.dynamic;
    const uint8_t* codes = row_constants.codes;
    float* looked_up = row_constants.looked_up;
    Floats sum[ONE_ROWS] = {};
    for (int64_t at = 0, half = 0; at < in; at += ONE_CODES, half += 2) {
        UNROLL for (int n = 0; n < ONE_ROWS; ++n, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        if (row_constants.looks_ahead) {
            UNROLL for (int n = 0; n < 2 * ONE_ROWS; ++n) look_up(dynamic, codes + n, 1, looked_up + n);
            codes += 2 * ONE_ROWS;
            looked_up += 2 * ONE_ROWS;
        }
        Floats part[ONE_ROWS] = {};
        UNROLL for (int k = 0; k < 8; ++k) {
            const Floats piece = load<Floats>(x + at + k * LANES);
            UNROLL for (int n = 0; n < ONE_ROWS; ++n) {
                const Words index = load<Words>(rows[n] + at / 2) >> 4 * k;
                part[n] = multiply_add(part[n], (Floats)lookup(code, index), piece);
            }
        }
        const int64_t first = half / halves_a_block, second = (half + 1) / halves_a_block;
        UNROLL for (int n = 0; n < ONE_ROWS; ++n) {
            const __m512 both = _mm512_mask_broadcastss_ps(_mm512_set1_ps(constants[n][first]), 0xff00,
                                                           _mm_load_ss(constants[n] + second));
            sum[n] = multiply_add(sum[n], part[n], (Floats)both);
        }
    }
    totals<ONE_ROWS>(sum, sums);
}

// y (out) = x (in) Wᵀ in float32, handed to `take(row, sums)` as it comes; or false, and nothing was done.
template <class Take> bool one_row(const Packed& w, int64_t out, int64_t in, const float* x, int threads, Take take) {
    Scratch<float> arranged(in);
    if (!one_row_fits(w, in) || !arrange_one_row(x, in, arranged.data)) return false;
    const int64_t blocks = in / w.blocksize, bytes = in / 2;
    const int64_t part_rows = smaller(ONE_MOST_ROWS, ceil_div(out, threads * ONE_PARTS * ONE_ROWS) * ONE_ROWS);
    deal(threads, ceil_div(out, part_rows), [&](int64_t part) {
        const int64_t last = smaller((part + 1) * part_rows, out);
        RowConstants constants(w, blocks, ONE_ROWS, last, w.blocksize == ONE_CODES / 2);
        for (int64_t row = part * part_rows; row < last; row += ONE_ROWS) {
            const float* absmax = constants.take(row);
            const int64_t count = smaller(ONE_ROWS, last - row);
            const uint8_t* rows[ONE_ROWS];
            const float* of_row[ONE_ROWS];
            for (int n = 0; n < ONE_ROWS; ++n) {                // past the last one it is computed again
                const int64_t real = smaller(n, count - 1);
                rows[n] = w.packed + (row + real) * bytes;
                of_row[n] = absmax + real * blocks;
            }
            Sums<ONE_ROWS> sums;
            multiply_one_row(w, in, rows, of_row, arranged.data, w.packed + (row + ONE_ROWS) * bytes + ONE_AHEAD, constants,
                             sums.at);
            take(row, sums);
        }
    });
    return true;
}

}  // namespace

#endif
