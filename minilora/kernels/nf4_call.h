// What a product is asked for, and how its sums become results: for nf4_product.cpp and nf4_turned.h.

#pragma once

#include "nf4_blocks.h"

namespace {

template <int KIND> struct Input { typedef uint16_t type; };
template <> struct Input<FLOAT32> { typedef float type; };

inline void copy(float* to, const float* from) { *to = *from; }
inline void copy(uint16_t* to, const uint16_t* from) { *to = *from; }
inline void copy(float* to, const uint16_t* from) {
    uint32_t bits = (uint32_t)*from << 16;
    memcpy(to, &bits, sizeof bits);
}

struct Product {
    const Packed& w;
    int64_t out, in;
    const void* x;                      // (rows, in)
    int64_t rows;
    const float* bias;                  // (out), or null
    void* y;                            // (rows, out)
    int threads;
};

// COUNT sums, whole registers of them, rounded once.
template <int KIND, int COUNT> INLINE void round_sums(const float* sums, typename Stored<KIND>::type* to) {
    for (int i = 0; i < COUNT; i += LANES) {
        if constexpr (KIND == BFLOAT16) store_halves(to + i, to_bfloat16(load<Floats>(sums + i)));
        else store(to + i, load<Words>(sums + i));
    }
}

// `count` of COUNT results to where they belong.  Of a size that is known it is an instruction or two.
template <int COUNT, class To> INLINE void put(To* y, const To* results, int64_t count) {
    if (count == COUNT) memcpy(y, results, COUNT * sizeof(To));
    else memcpy(y, results, count * sizeof(To));
}

// sums (p.rows, AT_ONCE) of all rows of x and weight rows row … + w_rows, to y.
template <int KIND, int AT_ONCE> void store_lines(const Product& p, float* sums, int64_t row, int64_t w_rows) {
    typedef typename Stored<KIND>::type To;
    for (int64_t r = 0; r < p.rows; ++r, sums += AT_ONCE) {
        if (p.bias)
            for (int64_t n = 0; n < w_rows; ++n) sums[n] += p.bias[row + n];
        To rounded[AT_ONCE];
        round_sums<KIND, AT_ONCE>(sums, rounded);
        put<AT_ONCE>((To*)p.y + r * p.out + row, rounded, w_rows);
    }
}

}  // namespace
