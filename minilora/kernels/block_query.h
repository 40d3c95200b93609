// Attention of one position a sequence, as in decoding: softmax(s q Kᵀ) V over keys where they lie in the cache, each read once
// for all query heads that share them.  Bound by the cache's bytes where these are few, and by adding up otherwise.
//
// Scores are sums over d, which lies side by side: sixteen keys are multiplied place by place, and what their sixteen registers
// hold is added up as a tree that ends in one register, a key a place (`sums`).  The weights stay float32: each is met by its
// value, widened, so that four heads share a load.

#pragma once

#include "block_rows.h"

namespace {

struct Query {
    View q, k, v, o;                                            // (B, H, 1, d), (B, Hkv, S, d)
    const uint8_t* mask;                                        // (B or 1, S), who is seen; or null
    int64_t batch, heads, kv_heads, length, head_dim, mask_row; // the last is 0 where one mask is for all
    float scale;
};

// The sum of each of sixteen registers; place i has that of register IN_PLACE[i].
const int IN_PLACE[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
INLINE Floats sums(Floats* v) {
    UNROLL for (int i = 0; i < 8; ++i)                          // halves: of register i in places 0 - 7, of i + 8 in 8 - 15
        v[i] = _mm512_shuffle_f32x4(v[i], v[i + 8], 0x44) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee);
    UNROLL for (int i = 0; i < 4; ++i)                          // quarters, then pairs, then single places
        v[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88) + _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    UNROLL for (int i = 0; i < 2; ++i)
        v[i] = _mm512_shuffle_ps(v[i], v[i + 2], 0x44) + _mm512_shuffle_ps(v[i], v[i + 2], 0xee);
    return _mm512_shuffle_ps(v[0], v[1], 0x88) + _mm512_shuffle_ps(v[0], v[1], 0xdd);
}

inline void query_scores(const Query& a, int64_t b, int64_t shared, const uint16_t* q, int64_t from, float* to) {
    const uint16_t* key[16];
    UNROLL for (int i = 0; i < 16; ++i) key[i] = a.k.rows(b, shared, smaller(from + IN_PLACE[i], a.length - 1));
    Floats part[16] = {};
    for (int64_t c = 0; c < a.head_dim; c += 32) {
        const Words one = _mm512_loadu_si512(q + c);
        UNROLL for (int i = 0; i < 16; ++i) part[i] = add_pairs(part[i], _mm512_loadu_si512(key[i] + c), one);
    }
    store(to, sums(part) * all(a.scale * LOG2_E));
}

// o rows of HEADS heads = weights (heads, columns) · V, over their totals.
template <int HEADS>
void query_values(const Query& a, int64_t b, int64_t head, int64_t shared, const float* weights, int64_t columns,
                  const float* total) {
    for (int64_t c0 = 0; c0 < a.head_dim; c0 += 64) {
        Floats sum[HEADS][4] = {};
        for (int64_t t = 0; t < a.length; ++t) {
            const uint16_t* from = a.v.rows(b, shared, t) + c0;
            Floats value[4];
            UNROLL for (int c = 0; c < 4; ++c) value[c] = held(widen(from + 16 * c));
            UNROLL for (int h = 0; h < HEADS; ++h) {
                const Floats one = all(weights[h * columns + t]);
                UNROLL for (int c = 0; c < 4; ++c) sum[h][c] = multiply_add(sum[h][c], one, value[c]);
            }
        }
        UNROLL for (int h = 0; h < HEADS; ++h)
            UNROLL for (int c = 0; c < 4; ++c) narrow(a.o.rows(b, head + h, 0) + c0 + 16 * c, sum[h][c] / all(total[h]));
    }
}

inline void query(const Query& a, int64_t task) {
    const int64_t b = task / a.kv_heads, shared = task % a.kv_heads, each = a.heads / a.kv_heads, head = shared * each;
    const int64_t columns = (a.length + 15) / 16 * 16;
    Scratch<float> weights(each * columns), total(each);
    Scratch<__mmask16> seen(columns / 16);
    memset(seen.data, 0, columns / 8);
    for (int64_t t = 0; t < a.length; ++t)
        seen.data[t / 16] |= (__mmask16)((!a.mask || a.mask[b * a.mask_row + t]) << t % 16);
    for (int64_t c = 0; c < columns; c += 16)
        for (int64_t h = 0; h < each; ++h)
            query_scores(a, b, shared, a.q.rows(b, head + h, 0), c, weights.data + h * columns + c);
    for (int64_t h = 0; h < each; ++h) {
        float* row = weights.data + h * columns;
        Floats top = all(-__builtin_inff()), sum = {};
        for (int64_t c = 0; c < columns; c += 16) top = _mm512_mask_max_ps(top, seen.data[c / 16], top, load(row + c));
        const Floats largest = all(_mm512_reduce_max_ps(top));
        for (int64_t c = 0; c < columns; c += 16) {
            const Floats weight = _mm512_maskz_mov_ps(seen.data[c / 16], exp2(load(row + c) - largest));
            store(row + c, weight);
            sum += weight;
        }
        total.data[h] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t h = 0; h < each;) {
        const int64_t left = each - h, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto values = count == 4 ? query_values<4> : count == 2 ? query_values<2> : query_values<1>;
        values(a, b, head + h, shared, weights.data + h * columns, columns, total.data + h);
        h += count;
    }
}

}  // namespace
