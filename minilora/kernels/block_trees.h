// Attention of sequences that lie one behind the other without padding, may share their beginnings, and end in the same tree.
//
// A group is one sequence: its keys are named by their rows of k and v, in the order of positions, those of a beginning that it
// shares with another one as well; the last `nodes` of them are the tree.  A query in the sequence sees the keys up to its own
// position, one in the tree all of the sequence and what `visible` says of the tree.
//
// The weights P are rounded to bfloat16 before they meet V, as torch's attention of bfloat16 does; sums are float32.
//
// A task is a group and a key/value head.  Its keys are laid out as (pairs of dimensions, keys), its values as (pairs of keys,
// dimensions): then Q Kᵀ and P V are the same loop, `pair_rows`, over the rows of all query heads that share them.

#include "block_rows.h"

namespace {

struct Trees {
    View q, k, v, o;                                            // (1, heads, rows, d)
    const int32_t* keys;                                        // rows of k and v, group after group
    const int64_t *starts, *asking;                             // (groups + 1): where a group's keys start, and its rows of q
    const int32_t* positions;                                   // of each row of q among its group's keys
    const uint8_t* visible;                                     // (nodes, nodes)
    int64_t groups, heads, kv_heads, nodes, head_dim;
    float scale;
};

const int TREE_ROWS = 8;

// out (8, columns) = A b, A's rows given as pairs, b (pairs, columns), `columns` a multiple of 16.
template <int ACROSS>
INLINE void pair_rows(const uint32_t* const* a, int64_t pairs, const uint32_t* b, int64_t columns, float* out) {
    Floats sum[TREE_ROWS][ACROSS] = {};
    for (int64_t p = 0; p < pairs; ++p) {
        Words column[ACROSS];
        UNROLL for (int c = 0; c < ACROSS; ++c) column[c] = held(_mm512_loadu_si512(b + p * columns + 16 * c));
        UNROLL for (int r = 0; r < TREE_ROWS; ++r) {
            Words both = _mm512_set1_epi32((int)a[r][p]);
            UNROLL for (int c = 0; c < ACROSS; ++c) sum[r][c] = add_pairs(sum[r][c], both, column[c]);
        }
    }
    UNROLL for (int r = 0; r < TREE_ROWS; ++r)
        UNROLL for (int c = 0; c < ACROSS; ++c) store(out + r * columns + 16 * c, sum[r][c]);
}

// The first `wanted` columns of it, a multiple of 16.
inline void pair_rows(const uint32_t* const* a, int64_t pairs, const uint32_t* b, int64_t columns, int64_t wanted,
                      float* out) {
    int64_t c = 0;
    for (; c + 32 <= wanted; c += 32) pair_rows<2>(a, pairs, b + c, columns, out + c);
    if (c < wanted) pair_rows<1>(a, pairs, b + c, columns, out + c);
}

// e^x for x ≤ 0 as torch's attention takes it where weights are rounded to bfloat16 next (fexp_u20): the bits of the result are
// 2²³ (y + 127) with y = x log2 e, less a cubic of y's fraction.  Its relative error, 10⁻⁴, is a twentieth of that rounding.
// Source: Malossi and others, Fast exponential computation on SIMD architectures (WAPCO 2015).
INLINE Floats quick_exp(Floats x) {
    Floats y = x * all(LOG2_E), f = y - _mm512_floor_ps(y);
    Floats less = multiply_add(all(-0.22433836478672356f), f, all(-0.079204240219773236f));
    less = multiply_add(all(0.30354260500649682f), f, less);
    less = multiply_add(all(0.00010703434948458272f), f, less);
    Words bits = _mm512_cvttps_epi32(multiply_add(all(0x1p23f * 127), all(0x1p23f), y - less));
    bits = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, all(-87.3365478515625f), _CMP_NLT_US), bits);   // 2⁻¹²⁶ and above
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);    // NaN stays NaN
}

// `narrow` for numbers that are zero or above 2⁻¹²⁶, or NaN.
INLINE void narrow_normal(uint16_t* to, Floats v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(v));
#else
    narrow(to, v);
#endif
}

inline __mmask16 first_of_16(int64_t count) {                   // without a branch: each row ends elsewhere than the one before
    count = count < 16 ? count : 16;
    return (__mmask16)((1u << (count > 0 ? count : 0)) - 1);
}

// Keys `rows[0 … count]` of one head -> (d / 2, columns), zeros behind the last.
inline void lay_keys(const View& k, int64_t head, const int32_t* rows, int64_t count, int64_t d, int64_t columns,
                     uint32_t* to) {
    const Words step = _mm512_set1_epi32((int)(k.row / 2));
    for (int64_t t = 0; t < columns; t += 16) {
        const __mmask16 real = first_of_16(count - t);
        const Words place = _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(real, rows + t), step);
        const uint32_t* from = (const uint32_t*)k.rows(0, head, 0);
        for (int64_t p = 0; p < d / 2; ++p)
            _mm512_storeu_si512(to + p * columns + t,
                                _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, place, from + p, 4));
    }
}

// Values of the same -> (pairs of keys, d).
inline void lay_values(const View& v, int64_t head, const int32_t* rows, int64_t count, int64_t d, uint32_t* to) {
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t c = 0; c < d; c += 16) {
            const auto half = [&](int64_t key) {
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v.rows(0, head, rows[key]) + c)));
            };
            Words both = half(i);
            if (i + 1 < count) both = _mm512_or_si512(both, _mm512_slli_epi32(half(i + 1), 16));
            _mm512_storeu_si512(to + i / 2 * d + c, both);
        }
}

inline void attend(const Trees& a, int64_t task) {
    const int64_t group = task / a.kv_heads, shared = task % a.kv_heads, each = a.heads / a.kv_heads, d = a.head_dim;
    const int32_t* rows = a.keys + a.starts[group];
    const int64_t count = a.starts[group + 1] - a.starts[group], length = count - a.nodes, columns = (count + 15) / 16 * 16;
    const int64_t first = a.asking[group], asking = (a.asking[group + 1] - first) * each;
    if (!asking) return;
    Scratch<uint32_t> keys(d / 2 * columns), values(columns / 2 * d);
    Scratch<float> s(TREE_ROWS * columns), o(TREE_ROWS * d);
    Scratch<uint16_t> weights(TREE_ROWS * columns);
    Scratch<__mmask16> seen(a.nodes * columns / 16 + 1);        // of each node, 16 keys a number
    lay_keys(a.k, shared, rows, count, d, columns, keys.data);
    lay_values(a.v, shared, rows, count, d, values.data);
    for (int64_t node = 0; node < a.nodes; ++node)
        for (int64_t c = 0; c < columns; c += 16) {
            unsigned bits = first_of_16(length - c);
            for (int64_t key = c < length ? length : c; key < smaller(c + 16, count); ++key)
                bits |= (unsigned)(a.visible[node * a.nodes + key - length] != 0) << (key - c);
            seen.data[(node * columns + c) / 16] = (__mmask16)bits;
        }
    const Floats scale = all(a.scale);
    for (int64_t r0 = 0; r0 < asking; r0 += TREE_ROWS) {
        const uint32_t *q[TREE_ROWS], *p[TREE_ROWS];
        int64_t position[TREE_ROWS], last = 0;
        uint16_t* to[TREE_ROWS];
        float total[TREE_ROWS];
        for (int r = 0; r < TREE_ROWS; ++r) {                   // past the last row it is computed again
            const int64_t at = smaller(r0 + r, asking - 1), row = first + at / each, head = shared * each + at % each;
            q[r] = (const uint32_t*)a.q.rows(0, head, row);
            to[r] = a.o.rows(0, head, row);
            p[r] = (const uint32_t*)(weights.data + r * columns);
            position[r] = a.positions[row];
            const int64_t sees = position[r] < length ? position[r] + 1 : count;
            last = last > sees ? last : sees;
        }
        const int64_t wanted = (last + 15) / 16 * 16;
        pair_rows(q, d / 2, keys.data, columns, wanted, s.data);
        for (int r = 0; r < TREE_ROWS; ++r) {
            const bool in_tree = position[r] >= length;
            const __mmask16* masks = seen.data + (in_tree ? (position[r] - length) * columns / 16 : 0);
            const auto mask = [&](int64_t c) { return in_tree ? masks[c / 16] : first_of_16(position[r] + 1 - c); };
            float* scores = s.data + r * columns;
            Floats top = all(-__builtin_inff()), sum = {};
            for (int64_t c = 0; c < wanted; c += 16) top = _mm512_mask_max_ps(top, mask(c), top, load(scores + c) * scale);
            const Floats largest = all(_mm512_reduce_max_ps(top));
            for (int64_t c = 0; c < wanted; c += 16) {
                Floats weight = _mm512_maskz_mov_ps(mask(c), quick_exp(load(scores + c) * scale - largest));
                narrow_normal(weights.data + r * columns + c, weight);
                sum += weight;
            }
            total[r] = _mm512_reduce_add_ps(sum);
        }
        pair_rows(p, (last + 1) / 2, values.data, d, d, o.data);
        for (int r = 0; r < TREE_ROWS; ++r)
            for (int64_t c = 0; c < d; c += 16) narrow(to[r] + c, load(o.data + r * d + c) * all(1 / total[r]));
    }
}

}  // namespace
