// Products with NF4 weights for many rows of x, on a CPU with AVX-512: sixteen rows of W are the sixteen places of a register.
//
// Elsewhere (nf4_product.cpp) a register holds weights of one row of W, and at the end its places are added up.  Here each place
// is a sum of its own: a number of x is broadcast, and meets as many rows of W as a register has places.  So weights must lie
// turned, and that is cheap while they are codes: 16 x 128 of them are sixteen registers, which are turned as 32-bit numbers of
// eight codes each.  A tile of them serves all rows of x from the first cache.
//
//     sums[r][16] += x[r][k] · W[16][k]                           in bfloat16 two k at a time
//
// Lesson 17 explains it.

#pragma once

#include "nf4_call.h"

#if defined(__AVX512F__)

namespace {

const int PLACES = 32;                                          // of a tile: two registers
const int STEPS = 128;                                          // of a tile: a row's register of codes, in bfloat16 two
const int ACROSS = 128;                                         // columns whose codes share a cache line
const int64_t THIRD_CACHE = 4 << 20;                            // bytes of x that it holds beside what others keep there
const int AHEAD_STEPS = 8;                                      // that a line of codes is asked for before it is needed
const int X_ROWS = 12;                                          // of a panel: 24 sums, two registers of weights and one of x;
                                                                // the last panel may have 4 or 8

// Place j of register r becomes place r of register j.
INLINE void turn(__m512i* v) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; ++i)
        UNROLL for (int k = 0; k < 2; ++k) {
            b[4 * i + 2 * k] = _mm512_unpacklo_epi64(a[4 * i + k], a[4 * i + 2 + k]);
            b[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(a[4 * i + k], a[4 * i + 2 + k]);
        }
    UNROLL for (int k = 0; k < 4; ++k) {                        // b[4 i + k]: rows 4 i …, columns k, k + 4, k + 8, k + 12
        const __m512i low = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x88), high = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xdd);
        v[k] = _mm512_shuffle_i32x4(low, low2, 0x88);
        v[8 + k] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        v[4 + k] = _mm512_shuffle_i32x4(high, high2, 0x88);
        v[12 + k] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

// Weights as E multiplies them: one a place or, in bfloat16, two of neighbouring steps.
template <class E> INLINE Words finished(Floats first, Floats second) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (sizeof(typename E::type) == 2) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    }
#endif
    return E::WEIGHT == FLOAT32 ? (Words)first : to_bfloat16(first) << 16;
}

// A tile for x Wᵀ: columns `column` … + count of weight rows row … + w_rows.  What is past the last row is dropped later.
template <class E> void unpack_turned(const Packed& w, int64_t in, int64_t row, int64_t w_rows, int64_t column, int64_t count,
                                      const float* absmax, uint32_t* to) {
    const int64_t blocks = in / w.blocksize;
    const int A_STEP = 4 / sizeof(typename E::type), CODES = 128;       // columns; and codes of a register
    const Table code = load_table(w.code);
    for (int half = 0; half < PLACES; half += 16)
        for (int64_t first = 0; first < count; first += CODES) {
            const int64_t some = smaller(CODES, count - first);
            __m512i codes[16];
            const float* constants[16];
            for (int r = 0; r < 16; ++r) {
                const int64_t real = smaller(half + r, w_rows - 1);
                const uint8_t* from = w.packed + ((row + real) * in + column + first) / 2;
                constants[r] = absmax + real * blocks;
                if (some == CODES) {
                    codes[r] = _mm512_loadu_si512(from);
                } else {
                    alignas(64) uint8_t part[64] = {};
                    memcpy(part, from, some / 2);
                    codes[r] = _mm512_load_si512(part);
                }
            }
            turn(codes);
            Floats scale = {};
            for (int64_t k = 0, block = -1; k < some; k += 8) {
                if (const int64_t at = (column + first + k) / w.blocksize; at != block) {
                    float of_row[16];
                    block = at;
                    for (int r = 0; r < 16; ++r) of_row[r] = constants[r][block];
                    scale = load<Floats>(of_row);
                }
                const auto weight = [&](int c) {                // a byte's first code is its high nibble
                    return (Floats)lookup(code, (Words)codes[k / 8] >> 4 * (c ^ 1)) * scale;
                };
                UNROLL for (int c = 0; c < 8; c += A_STEP)
                    store(to + (first + k + c) / A_STEP * PLACES + half, finished<E>(weight(c), weight(c + A_STEP - 1)));
            }
        }
}

// Tiles for x W: columns `column` … + count of W's rows from `row` on, one or two to a step; past the last of `rows` are zeros.
template <class E> void unpack_across(const Packed& w, int64_t rows, int64_t in, int64_t row, int64_t steps, int64_t column,
                                      int64_t count, uint32_t* to) {
    const int A_STEP = 4 / sizeof(typename E::type);
    const int64_t blocks = in / w.blocksize, first = column / w.blocksize;
    const int64_t some = (column + count - 1) / w.blocksize + 1 - first;        // blocks of a row
    const Table code = load_table(w.code);
    float absmax[A_STEP][ACROSS / 16];
    for (int64_t s = 0; s < steps; ++s) {
        const int64_t at = row + s * A_STEP, there = smaller(A_STEP, rows - at);
        for (int64_t h = 0; h < there; ++h) decode_absmax(w, (at + h) * blocks + first, some, absmax[h]);
        // Rows lie kilobytes apart: no processor guesses the next line by itself.
        for (int h = 0; h < A_STEP; ++h) __builtin_prefetch(w.packed + ((at + AHEAD_STEPS * A_STEP + h) * in + column) / 2);
        for (int64_t c = 0; c < count; c += 16) {
            Floats weights[A_STEP] = {};
            for (int64_t h = 0; h < there; ++h) {
                const uint8_t* from = w.packed + ((at + h) * in + column + c) / 2;
                weights[h] = (Floats)lookup_in_order(code, from) * absmax[h][(column + c) / w.blocksize - first];
            }
            store(to + c / PLACES * STEPS * PLACES + s * PLACES + c % PLACES, finished<E>(weights[0], weights[A_STEP - 1]));
        }
    }
}

// Sums (ROWS, PLACES) over some steps, or added to what is there.
template <class E, int ROWS> void multiply_turned(const uint32_t* weights, const uint32_t* x, int64_t steps, bool add,
                                                  float* sums) {
    Floats sum[2 * ROWS];
    UNROLL for (int i = 0; i < 2 * ROWS; ++i) sum[i] = add ? load<Floats>(sums + i * 16) : Floats{};
    for (int64_t s = 0; s < steps; ++s) {
        const Words first = load<Words>(weights + s * PLACES), second = load<Words>(weights + s * PLACES + 16);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const Words piece = (Words)_mm512_set1_epi32((int)x[s * ROWS + r]);
            sum[2 * r] = E::step(sum[2 * r], first, piece);
            sum[2 * r + 1] = E::step(sum[2 * r + 1], second, piece);
        }
    }
    UNROLL for (int i = 0; i < 2 * ROWS; ++i) store(sums + i * 16, sum[i]);
}

// Of the panel that starts where so many rows are left.
inline int64_t panel_rows(int64_t left) { return smaller(X_ROWS, ceil_div(left, 4) * 4); }

// x's rows as `multiply_turned` reads them: a panel's rows side by side, step after step.
template <int KIND, class E> void arrange_turned(const Product& p, int64_t first, int64_t steps, uint32_t* to) {
    typedef typename Input<KIND>::type From;
    const int64_t rows = panel_rows(p.rows - first);
    const int64_t a_step = 4 / sizeof(typename E::type);
    for (int64_t s = 0; s < steps; s += 16) {
        __m512i v[16] = {};
        for (int64_t r = 0; r < smaller(X_ROWS, p.rows - first); ++r) {
            alignas(64) typename E::type piece[16 * 4 / sizeof(typename E::type)] = {};
            const From* from = (const From*)p.x + (first + r) * p.in + s * a_step;
            const int64_t count = smaller(16 * a_step, p.in - s * a_step);
            for (int64_t k = 0; k < count; ++k) copy(piece + k, from + k);
            v[r] = _mm512_load_si512(piece);
        }
        turn(v);
        for (int64_t k = 0; k < smaller(16, steps - s); ++k) memcpy(to + (s + k) * rows, v + k, rows * sizeof *to);
    }
}

// y = x Wᵀ, or transposed y = x W; p.in is how many numbers a row of x has, and p.out a row of y.
template <int KIND, class E> void turned(const Product& p, bool transposed) {
    const int64_t a_step = 4 / sizeof(typename E::type), steps = ceil_div(p.in, a_step), blocks = p.in / p.w.blocksize;
    const int64_t panels = ceil_div(p.rows, X_ROWS), places = transposed && p.out >= 2 * ACROSS * p.threads ? ACROSS : PLACES;
    Scratch<uint32_t> x(panels * X_ROWS * steps);
    parallel(p.threads, panels, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i)
            arrange_turned<KIND, E>(p, i * X_ROWS, steps, x.data + i * X_ROWS * steps);
    });
    parallel(p.threads, ceil_div(p.out, places), [&](int64_t from, int64_t to) {
        Scratch<uint32_t> tiles(STEPS * places);
        Scratch<float> sums(panels * X_ROWS * places), absmax(transposed ? 0 : PLACES * blocks);
        memset(tiles.data, 0, STEPS * places * sizeof *tiles.data);
        for (int64_t place = from * places; place < smaller(to * places, p.out); place += places) {
            const int64_t there = smaller(places, p.out - place);
            if (!transposed) decode_absmax(p.w, place * blocks, there * blocks, absmax.data);
            for (int64_t s = 0; s < steps; s += STEPS) {
                const int64_t some = smaller(STEPS, steps - s);
                if (transposed) unpack_across<E>(p.w, p.in, p.out, s * a_step, some, place, there, tiles.data);
                else unpack_turned<E>(p.w, p.in, place, there, s * a_step, some * a_step, absmax.data, tiles.data);
                for (int64_t t = 0; t < ceil_div(there, PLACES); ++t)
                    for (int64_t i = 0; i < panels; ++i) {
                        const int64_t rows = panel_rows(p.rows - i * X_ROWS);
                        (rows == 4 ? multiply_turned<E, 4> : rows == 8 ? multiply_turned<E, 8> : multiply_turned<E, X_ROWS>)(
                            tiles.data + t * STEPS * PLACES, x.data + i * X_ROWS * steps + s * rows, some, s > 0,
                            sums.data + (t * panels + i) * X_ROWS * PLACES);
                    }
            }
            for (int64_t t = 0; t < there; t += PLACES)
                store_lines<KIND, PLACES>(p, sums.data + t * panels * X_ROWS, place + t, smaller(PLACES, there - t));
        }
    });
}

// The same, so many rows of x at a time as the third cache holds.
template <int KIND, class E> void turned_in_parts(const Product& p, bool transposed) {
    const int64_t width = sizeof(typename Stored<KIND>::type);
    const int64_t most = X_ROWS * (8 + THIRD_CACHE / (p.in * (int64_t)sizeof(typename E::type) * X_ROWS));
    for (int64_t first = 0; first < p.rows; first += most)
        turned<KIND, E>(Product{p.w, p.out, p.in, (const char*)p.x + first * p.in * width, smaller(most, p.rows - first),
                                p.bias, (char*)p.y + first * p.out * width, p.threads}, transposed);
}

}  // namespace

#endif
