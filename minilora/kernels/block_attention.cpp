// Causal attention with its gradients, in bfloat16 on a CPU with AVX-512.  Inputs and results are bfloat16, all arithmetic is
// float32, each result is rounded once.
//
// Attention is FlashAttention (arXiv 2205.14135, section 3), for rows i, keys j ≤ i and s = 1 / √d:
//
//     forward     S = s Q Kᵀ,  L_i = log2 Σ_j exp S_ij,  P_ij = exp(S_ij) / 2^L_i,  O = P V            kept: O and L, not P
//     backward    P again from S and L;  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = s P ∘ (dP - rowsum(dO ∘ O)),  dQ = dS K,  dK = dSᵀ Q
//
// The matrices T × T exist as tiles of 64 × 64 that live in the first cache; tiles above the diagonal are never looked at, and
// on the diagonal the sums stop at it, to within the four rows that are worked on at once.  In the forward the largest S of a
// row is known only at its last tile: what was summed is scaled down whenever a larger one comes.
//
// Two loops hold all seven products.  Each adds 4 × 64 sums in 16 registers, one number of the left factor against a row of 64
// of the right.  `pair_products` is for S and dP, whose factors came in bfloat16: it takes two terms at a time, which is one
// instruction where the machine multiplies bfloat16 (it takes numbers below 1.2e-38 for zero).  `products` is for the others,
// of which one factor is P or dS.  Both want their right factor with 64 columns side by side: K and V are laid out once a head.
//
// A task is one head, and in the backward one key/value head with all query heads that read it, in their order: no two threads
// add to one number, and results depend neither on the number of threads nor on timing.

#ifdef __AVX512F__

#include "block_rows.h"

namespace {

// ---------------------------------------------------------------------------------------------------------- the two products

const int TILE = 64, ROWS = 4, ACROSS = TILE / 16;              // rows or keys of a tile; rows at once; registers of a row

// use(r, c, registers c of row r of A Bᵀ) for four rows of A and 64 of B.  A: pairs of a row side by side; b: (pairs, 64).
template <int PAIRS, class Use> INLINE void pair_products(const uint32_t* a, const uint32_t* b, Use use) {
    Floats sum[ROWS][ACROSS] = {};
    for (int p = 0; p < PAIRS; ++p) {
        Words columns[ACROSS];
        UNROLL for (int c = 0; c < ACROSS; ++c) columns[c] = held(_mm512_loadu_si512(b + p * TILE + 16 * c));
        UNROLL for (int r = 0; r < ROWS; ++r) {
            Words both = _mm512_set1_epi32((int)a[r * PAIRS + p]);
            UNROLL for (int c = 0; c < ACROSS; ++c) sum[r][c] = add_pairs(sum[r][c], both, columns[c]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int c = 0; c < ACROSS; ++c) use(r, c, sum[r][c]);
}

// c (4, D) += A b, with A[r, k] at a[r * row + k * step], b (count, D).
template <int D> INLINE void products(const float* a, int row, int step, const float* b, int count, float* c) {
    for (int at = 0; at < D; at += TILE) {
        Floats sum[ROWS][ACROSS];
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int i = 0; i < ACROSS; ++i) sum[r][i] = load(c + r * D + at + 16 * i);
        for (int k = 0; k < count; ++k) {
            Floats columns[ACROSS];
            UNROLL for (int i = 0; i < ACROSS; ++i) columns[i] = held(load(b + k * D + at + 16 * i));
            UNROLL for (int r = 0; r < ROWS; ++r) {
                Floats one = all(a[r * row + k * step]);
                UNROLL for (int i = 0; i < ACROSS; ++i) sum[r][i] = multiply_add(sum[r][i], one, columns[i]);
            }
        }
        UNROLL for (int r = 0; r < ROWS; ++r)
            UNROLL for (int i = 0; i < ACROSS; ++i) store(c + r * D + at + 16 * i, sum[r][i]);
    }
}

// ---------------------------------------------------------------------------------------------------------- a head's operands

// Row after row, and zeros up to 64 of them: what is computed from such a row is finite, and dropped.
template <int D> void copy(const View& x, int64_t b, int64_t h, int64_t first, int64_t count, uint16_t* to) {
    for (int64_t t = 0; t < count; ++t) memcpy(to + t * D, x.rows(b, h, first + t), 2 * D);
    memset(to + count * D, 0, 2 * D * (TILE - count));
}

template <int D> void widen_tile(const uint16_t* tile, float* to) {
    for (int i = 0; i < TILE * D; i += 16) store(to + i, widen(tile + i));
}

// (64, D) -> (D / 2 pairs, 64)
template <int D> void transpose_tile(const uint16_t* tile, uint32_t* to) {
    const uint32_t* pairs = (const uint32_t*)tile;
    Words place = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32(D / 2));
    for (int t = 0; t < TILE; t += 16)
        for (int p = 0; p < D / 2; ++p)
            _mm512_storeu_si512(to + p * TILE + t, _mm512_i32gather_epi32(place, pairs + t * (D / 2) + p, 4));
}

template <int D> void narrow_rows(const float* from, const View& to, int64_t b, int64_t h, int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; ++t)
        for (int i = 0; i < D; i += 16) narrow(to.rows(b, h, first + t) + i, load(from + t * D + i));
}

// Of 16 keys in the tile on the diagonal those that row r sees.
inline __mmask16 seen(int r, int c) {
    int keys = r + 1 - 16 * c;
    return keys >= 16 ? 0xffff : keys <= 0 ? 0 : (__mmask16)((1u << keys) - 1);
}

// ------------------------------------------------------------------------------------------------------------------ attention

struct Attention {
    int64_t batch, heads, kv_heads, length;
    float scale;
    View q, k, v, o, d_o, d_q, d_k, d_v;
    float* log_sum;                                             // L: (B, H, T)
};

template <int D> void forward(const Attention& a, int64_t task) {
    const int64_t b = task / a.heads, h = task % a.heads, shared = h / (a.heads / a.kv_heads);
    const int64_t tiles = (a.length + TILE - 1) / TILE, area = TILE * D;
    Scratch<uint32_t> keys(tiles * area / 2);
    Scratch<float> values(tiles * area), o(area), weights(TILE * TILE);
    Scratch<uint16_t> tile(area);
    float largest[TILE], sum[TILE];
    const Floats factor = all(a.scale * LOG2_E);
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * TILE, count = smaller(TILE, a.length - first);
        copy<D>(a.k, b, shared, first, count, tile.data);
        transpose_tile<D>(tile.data, keys.data + i * area / 2);
        copy<D>(a.v, b, shared, first, count, tile.data);
        widen_tile<D>(tile.data, values.data + i * area);
        copy<D>(a.q, b, h, first, count, tile.data);
        memset(o.data, 0, area * 4);
        for (int64_t j = 0; j <= i; ++j)
            for (int r0 = 0; r0 < count; r0 += ROWS) {
                Floats s[ROWS][ACROSS];
                pair_products<D / 2>((const uint32_t*)tile.data + r0 * (D / 2), keys.data + j * area / 2,
                                     [&](int r, int c, Floats v) ALWAYS { s[r][c] = v * factor; });
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    Floats top = all(-__builtin_inff()), added = {};
                    UNROLL for (int c = 0; c < ACROSS; ++c)
                        top = _mm512_mask_max_ps(top, i == j ? seen(r0 + r, c) : 0xffff, top, s[r][c]);
                    float now = _mm512_reduce_max_ps(top);
                    if (j > 0) now = now > largest[r0 + r] ? now : largest[r0 + r];
                    UNROLL for (int c = 0; c < ACROSS; ++c) {
                        Floats p = _mm512_maskz_mov_ps(i == j ? seen(r0 + r, c) : 0xffff, exp2(s[r][c] - all(now)));
                        store(weights.data + (r0 + r) * TILE + 16 * c, p);
                        added += p;
                    }
                    float total = _mm512_reduce_add_ps(added);
                    if (j == 0) sum[r0 + r] = total;
                    else if (now == largest[r0 + r]) sum[r0 + r] += total;
                    else {
                        Floats less = exp2(all(largest[r0 + r] - now));
                        sum[r0 + r] = sum[r0 + r] * _mm512_cvtss_f32(less) + total;
                        for (int c = 0; c < D; c += 16) {
                            float* at = o.data + (r0 + r) * D + c;
                            store(at, load(at) * less);
                        }
                    }
                    largest[r0 + r] = now;
                }
                products<D>(weights.data + r0 * TILE, TILE, 1, values.data + j * area, i == j ? r0 + ROWS : TILE,
                            o.data + r0 * D);
            }
        for (int64_t r = 0; r < count; ++r) {
            for (int c = 0; c < D; c += 16)
                narrow(a.o.rows(b, h, first + r) + c, load(o.data + r * D + c) / all(sum[r]));
            a.log_sum[(b * a.heads + h) * a.length + first + r] = largest[r] + __builtin_log2f(sum[r]);
        }
    }
}

template <int D> void backward(const Attention& a, int64_t task) {
    const int64_t b = task / a.kv_heads, shared = task % a.kv_heads, group = a.heads / a.kv_heads;
    const int64_t tiles = (a.length + TILE - 1) / TILE, area = TILE * D;
    Scratch<uint32_t> k_pairs(tiles * area / 2), v_pairs(tiles * area / 2);
    Scratch<float> k(tiles * area), d_k(tiles * area), d_v(tiles * area);
    Scratch<float> q(area), d_q(area), d_o(area), p(TILE * TILE), d_s(TILE * TILE);
    Scratch<uint16_t> q_tile(area), d_o_tile(area);
    float log_sum[TILE] = {}, inner[TILE] = {};
    const Floats factor = all(a.scale * LOG2_E), scale = all(a.scale);
    for (int64_t j = 0; j < tiles; ++j) {
        const int64_t first = j * TILE, count = smaller(TILE, a.length - first);
        copy<D>(a.v, b, shared, first, count, q_tile.data);
        transpose_tile<D>(q_tile.data, v_pairs.data + j * area / 2);
        copy<D>(a.k, b, shared, first, count, q_tile.data);
        transpose_tile<D>(q_tile.data, k_pairs.data + j * area / 2);
        widen_tile<D>(q_tile.data, k.data + j * area);
    }
    memset(d_k.data, 0, tiles * area * 4);
    memset(d_v.data, 0, tiles * area * 4);
    for (int64_t h = shared * group; h < (shared + 1) * group; ++h)
        for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = i * TILE, count = smaller(TILE, a.length - first);
            copy<D>(a.q, b, h, first, count, q_tile.data);
            widen_tile<D>(q_tile.data, q.data);
            copy<D>(a.d_o, b, h, first, count, d_o_tile.data);
            widen_tile<D>(d_o_tile.data, d_o.data);
            memset(d_q.data, 0, area * 4);
            for (int64_t r = 0; r < count; ++r) {
                Floats sum = {};
                for (int c = 0; c < D; c += 16)
                    sum = multiply_add(sum, load(d_o.data + r * D + c), widen(a.o.rows(b, h, first + r) + c));
                inner[r] = _mm512_reduce_add_ps(sum);
                log_sum[r] = a.log_sum[(b * a.heads + h) * a.length + first + r];
            }
            const int rows = (int)((count + ROWS - 1) / ROWS * ROWS);
            for (int64_t j = 0; j <= i; ++j) {
                for (int r0 = 0; r0 < rows; r0 += ROWS) {
                    pair_products<D / 2>((const uint32_t*)q_tile.data + r0 * (D / 2), k_pairs.data + j * area / 2,
                                         [&](int r, int c, Floats s) ALWAYS {
                        Floats weight = exp2(_mm512_fmsub_ps(s, factor, all(log_sum[r0 + r])));
                        store(p.data + (r0 + r) * TILE + 16 * c,
                              _mm512_maskz_mov_ps(i == j ? seen(r0 + r, c) : 0xffff, weight));
                    });
                    pair_products<D / 2>((const uint32_t*)d_o_tile.data + r0 * (D / 2), v_pairs.data + j * area / 2,
                                         [&](int r, int c, Floats d_p) ALWAYS {
                        Floats slope = load(p.data + (r0 + r) * TILE + 16 * c) * scale * (d_p - all(inner[r0 + r]));
                        store(d_s.data + (r0 + r) * TILE + 16 * c,
                              _mm512_maskz_mov_ps(i == j ? seen(r0 + r, c) : 0xffff, slope));
                    });
                    products<D>(d_s.data + r0 * TILE, TILE, 1, k.data + j * area, i == j ? r0 + ROWS : TILE,
                                d_q.data + r0 * D);
                }
                const auto by_keys = [&](const float* left, const float* right, float* sums) {
                    for (int c0 = 0; c0 < (i == j ? rows : TILE); c0 += ROWS) {
                        const int from = i == j ? c0 : 0;       // the first row that sees one of these keys
                        products<D>(left + from * TILE + c0, 1, TILE, right + from * D, rows - from, sums + c0 * D);
                    }
                };
                by_keys(p.data, d_o.data, d_v.data + j * area);
                by_keys(d_s.data, q.data, d_k.data + j * area);
            }
            narrow_rows<D>(d_q.data, a.d_q, b, h, first, count);
        }
    narrow_rows<D>(d_k.data, a.d_k, b, shared, 0, a.length);
    narrow_rows<D>(d_v.data, a.d_v, b, shared, 0, a.length);
}

}  // namespace

extern "C" {

void block_attention(const Attention* a, int head_dim, int threads) {
    deal(threads, a->batch * a->heads, [&](int64_t task) { head_dim == 64 ? forward<64>(*a, task) : forward<128>(*a, task); });
}

void block_attention_backward(const Attention* a, int head_dim, int threads) {
    deal(threads, a->batch * a->kv_heads,
         [&](int64_t task) { head_dim == 64 ? backward<64>(*a, task) : backward<128>(*a, task); });
}

}  // extern "C"

#endif
