// Sixteen float32 in a register of AVX-512, bfloat16 to and from them, and tasks for torch's threads: what block_*.cpp need.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

// Loops over registers are unrolled and calls inlined by decree: an array of vectors becomes registers only where every index
// is a constant early, which -O2 does not see to by itself.
#define UNROLL _Pragma("GCC unroll 16")
#define ALWAYS __attribute__((always_inline))
#define INLINE ALWAYS inline

namespace {

typedef __m512 Floats;                                          // 16 float32
typedef __m512i Words;                                          // 16 × 32 bits; or 16 pairs of bfloat16, the first one low

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
template <class V> INLINE V held(V v) { __asm__("" : "+v"(v)); return v; }      // or GCC loads it again at each use
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Floats widen(const uint16_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

// To the nearest bfloat16, ties to even, in the high half of each place; NaN stays NaN.
INLINE Words to_bfloat16(Floats v) {
    Words bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    Words near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
INLINE void narrow(uint16_t* to, Floats v) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(to_bfloat16(v), 16)));
}
INLINE Floats rounded(Floats v) {
    return _mm512_castsi512_ps(_mm512_and_si512(to_bfloat16(v), _mm512_set1_epi32((int)0xffff0000)));
}

// 2^x within one unit in the last place: x = n + f, |f| ≤ 1/2, a polynomial with a relative error of 1.9e-9 for 2^f.
INLINE Floats exp2(Floats x) {
    Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), f = x - n;
    Floats y = all(0x1.41d332p-13f);
    y = multiply_add(all(0x1.5f456ap-10f), y, f);
    y = multiply_add(all(0x1.3b2dbcp-7f), y, f);
    y = multiply_add(all(0x1.c6aed4p-5f), y, f);
    y = multiply_add(all(0x1.ebfbdap-3f), y, f);
    y = multiply_add(all(0x1.62e430p-1f), y, f);
    y = multiply_add(all(1.0f), y, f);
    return _mm512_scalef_ps(y, n);
}

const float LOG2_E = 1.44269504f;               // exp x = 2^(x log2 e)

// sum + a₁ b₁ + a₂ b₂ of the pairs in each place.
INLINE Floats add_pairs(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const Words high = _mm512_set1_epi32(0xffff0000);
    sum = multiply_add(sum, _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
    return multiply_add(sum, _mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)));
#endif
}

// Memory that is not initialized, at the start of a cache line.
template <class T> struct Scratch {
    T* data;
    explicit Scratch(int64_t count) : data((T*)aligned_alloc(64, (count * (int64_t)sizeof(T) + 63) / 64 * 64)) {
        if (!data) abort();
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// Tasks 0 … count, dealt to torch's team of threads as they come.  Trap: see `parallel` in nf4_blocks.h.
template <class Body> void deal(int threads, int64_t count, Body body) {
    if (threads > count) threads = count > 0 ? (int)count : 1;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
#endif
    for (int64_t task = 0; task < count; ++task) body(task);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
