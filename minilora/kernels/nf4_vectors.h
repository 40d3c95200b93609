// Vectors as wide as the machine's registers, a table of sixteen in them, and what differs from machine to machine.
//
// Vectors are those of GCC and Clang (`vector_size`), of the one width that the machine has registers of: 64 bytes (AVX-512),
// 32 (AVX2), or 16 (NEON, and any other).  Trap: a wider one is allowed, but GCC takes it through memory, at a tenth of the
// speed.  A table of sixteen 32-bit entries is then one, two or four registers, and a lookup is
//
//     AVX-512     one permutation: it reads the low four bits of an index and ignores the rest
//     AVX2        two of eight entries each by three bits, and a blend by the fourth
//     NEON        one lookup of bytes among 64
//     others      a load from memory
//
// so a byte serves as the index of its low nibble as it is, and shifted right by four as that of its high nibble: nothing is
// masked.  The machine is the one the file is compiled for (build.py: -march=native).  On x86 tests/kernels run every form but
// NEON, which gives the same bits under qemu-aarch64, compiled by GCC and by Clang; it was never timed.
//
// Lesson 17 explains it.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define NEON
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two 16-bit weights are stored as one 32-bit number, the first in its low half"
#endif

// Loops over registers are unrolled and calls inlined by decree: an array of vectors becomes registers only where every index
// is a constant early, which -O2 does not see to by itself, and -O3 does for everything, at twice the time of compilation.
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE __attribute__((always_inline)) inline

namespace {

#if defined(__AVX512F__)
const int WIDTH = 64;
#elif defined(__AVX2__)
const int WIDTH = 32;
#else
const int WIDTH = 16;
#endif
const int LANES = WIDTH / 4, PARTS = 16 / LANES;

typedef float Floats __attribute__((vector_size(WIDTH)));
typedef uint32_t Words __attribute__((vector_size(WIDTH)));     // table entries, indices, or bits of Floats
typedef int32_t Ints __attribute__((vector_size(WIDTH)));       // the same where they are compared: unsigned takes longer
typedef uint64_t Longs __attribute__((vector_size(WIDTH)));

template <class V> INLINE V load(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> INLINE void store(void* to, V v) { memcpy(to, &v, sizeof v); }
INLINE Words choose(Ints condition, Words yes, Words no) { return condition ? yes : no; }

struct Table { Words part[PARTS]; };                            // sixteen entries

INLINE Table load_table(const float* from) {
    Table table;
    UNROLL for (int i = 0; i < PARTS; ++i) table.part[i] = load<Words>(from + i * LANES);
    return table;
}

// One entry, for what is not worth a register.
INLINE uint32_t entry(const Table& table, uint32_t index) { return table.part[index / LANES][index % LANES]; }

// LANES bytes, or 16-bit numbers, each in 32 bits.  (`__builtin_convertvector` says the same; GCC 12 moves each alone for it.)
INLINE Words widen(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    return Words{from[0], from[1], from[2], from[3]};
#endif
}

INLINE Words widen(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return Words{from[0], from[1], from[2], from[3]};
#endif
}

// The lower half of each; the upper one is zero.
INLINE void store_halves(uint16_t* to, Words v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
    UNROLL for (int i = 0; i < LANES; ++i) to[i] = (uint16_t)v[i];
#endif
}

// The lowest byte of each.
INLINE void store_bytes(uint8_t* to, Longs v) {
#if defined(__AVX512F__)
    _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8((__m512i)v));
#else
    UNROLL for (int i = 0; i < LANES / 2; ++i) to[i] = (uint8_t)v[i];
#endif
}

INLINE void store_bytes(uint8_t* to, Words v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    UNROLL for (int i = 0; i < LANES; ++i) to[i] = (uint8_t)v[i];
#endif
}

// The largest of all lanes, none of them negative.
INLINE uint32_t largest(Ints v) {
#if defined(__AVX512F__)
    return (uint32_t)_mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t found = 0;
    UNROLL for (int i = 0; i < LANES; ++i) found = v[i] > found ? v[i] : found;
    return (uint32_t)found;
#endif
}

// Store a register at the start of a cache line, around the cache: a common store would first read the line it overwrites.
// Others see such stores after `stores_are_seen`.
INLINE void store_past_cache(void* to, Words v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)to, (__m256i)v);
#else
    store(to, v);
#endif
}

INLINE void stores_are_seen() {
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_sfence();
#endif
}

// table[index & 15] in each place.
INLINE Words lookup(const Table& table, Words index) {
#if defined(__AVX512F__)
    return (Words)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table.part[0]);
#elif defined(__AVX2__)
    __m256 low = (__m256)_mm256_permutevar8x32_epi32((__m256i)table.part[0], (__m256i)index);
    __m256 high = (__m256)_mm256_permutevar8x32_epi32((__m256i)table.part[1], (__m256i)index);
    return (Words)_mm256_blendv_ps(low, high, (__m256)(index << 28));           // the fourth bit, moved to the sign, chooses
#elif defined(NEON)
    uint8x16x4_t bytes = {{(uint8x16_t)table.part[0], (uint8x16_t)table.part[1], (uint8x16_t)table.part[2],
                           (uint8x16_t)table.part[3]}};
    return (Words)vqtbl4q_u8(bytes, (uint8x16_t)((index & 15) * 0x04040404u + 0x03020100u));    // byte k of entry e: 4 e + k
#else
    return Words{entry(table, index[0] & 15), entry(table, index[1] & 15), entry(table, index[2] & 15),
                 entry(table, index[3] & 15)};
#endif
}

// table[index] in each place, from a table in memory.
INLINE Floats gather(const float* table, Words index) {
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (Floats)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    return Floats{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
#endif
}

// Entries by the high nibbles of LANES bytes (`even`: weights 0, 2, …) and by their low ones (`odd`).
INLINE void lookup_bytes(const Table& table, const uint8_t* from, Words& even, Words& odd) {
#if defined(__AVX2__) || defined(NEON)
    Words byte = widen(from);
    even = lookup(table, byte >> 4);
    odd = lookup(table, byte);
#else
    even = Words{entry(table, from[0] >> 4), entry(table, from[1] >> 4), entry(table, from[2] >> 4),
                 entry(table, from[3] >> 4)};
    odd = Words{entry(table, from[0] & 15), entry(table, from[1] & 15), entry(table, from[2] & 15),
                entry(table, from[3] & 15)};
#endif
}

// Entries by the nibbles of LANES / 2 bytes, in order.
INLINE Words lookup_in_order(const Table& table, const uint8_t* from) {
#if defined(__AVX512F__)
    Longs byte = (Longs)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
#if defined(__AVX512VBMI__)
    // One instruction picks eight bits from anywhere in 64, for each of eight bytes; only the first of an index matters.
    byte = (Longs)_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0000000000000004), (__m512i)byte);   // from bit 4; from 0
    return lookup(table, (Words)byte);
#else
    return lookup(table, (Words)(byte >> 4 | byte << 32));              // index 2i: the high nibble; 2i + 1: the low one
#endif
#elif defined(__AVX2__)
    uint32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return lookup(table, (Words{} + bytes) >> Words{4, 0, 12, 8, 20, 16, 28, 24});
#elif defined(NEON)
    uint16_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return lookup(table, (Words{} + bytes) >> Words{4, 0, 12, 8});
#else
    return Words{entry(table, from[0] >> 4), entry(table, from[0] & 15), entry(table, from[1] >> 4),
                 entry(table, from[1] & 15)};
#endif
}

// The 16-bit entries, which stand in both halves, by the nibbles of LANES bytes, in order.
INLINE Words lookup_halves_in_order(const Table& table, const uint8_t* from) {
#if defined(__AVX512VBMI__)
    // A table of 32 halves, entry e at 2e and 2e + 1: bits 3 … 7 of a byte find the high nibble's, bits -1 … 3 the low one's.
    __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x001f0023003f0003), (__m512i)widen(from));
    return (Words)_mm512_permutexvar_epi16(index, (__m512i)table.part[0]);
#else
    Words even, odd;
    lookup_bytes(table, from, even, odd);
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Words)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
    return (even & 0xffff) | (odd & 0xffff0000);
#endif
#endif
}

// sum + a * b.  Here one rounding fewer is welcome: products carry an error bound, not equality to the bit.
INLINE Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(NEON)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

// The sum of all lanes, always in the same order: halves are added while there are more than four.
typedef float Sixteen __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
template <class Half, class V> INLINE Half add_halves(V v) {
    Half half[2];
    memcpy(half, &v, sizeof v);
    return half[0] + half[1];
}
INLINE float total(Four v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE float total(Eight v) { return total(add_halves<Four>(v)); }
INLINE float total(Sixteen v) { return total(add_halves<Eight>(v)); }

// The same sums of sixteen registers at once, each halving shared by two of them: 45 instructions in place of 160.
#if defined(__AVX512F__)
INLINE void add_totals(const Floats* v, float* to) {
    __m512 sum[16];
    UNROLL for (int i = 0; i < 16; ++i) sum[i] = (__m512)v[i % 4 * 4 + i / 4];      // so that the order at the end is that of v
    UNROLL for (int i = 0; i < 8; ++i) {
        __m512 a = sum[2 * i], b = sum[2 * i + 1];
        sum[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);       // lanes 8 apart
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        __m512 a = sum[2 * i], b = sum[2 * i + 1];
        sum[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);       // 4
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        __m512 a = sum[2 * i], b = sum[2 * i + 1];
        sum[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);             // 2
    }
    _mm512_storeu_ps(to, _mm512_shuffle_ps(sum[0], sum[1], 0x88) + _mm512_shuffle_ps(sum[0], sum[1], 0xdd));
}
#endif

// Of COUNT registers to as many numbers.
template <int COUNT> INLINE void totals(const Floats* v, float* to) {
    int i = 0;
#if defined(__AVX512F__)
    UNROLL for (; i + 16 <= COUNT; i += 16) add_totals(v + i, to + i);
#endif
    UNROLL for (; i < COUNT; ++i) to[i] = total(v[i]);
}

// ------------------------------------------------------------------------------------------------------------- 16-bit floats

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };           // the numbers that cpu.py passes

// Round to the nearest bfloat16, ties to even; subnormals stay (the instruction for it would make them zero), NaN stays NaN.
INLINE Words to_bfloat16(Floats v) {
    Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return choose((Ints)(v != v), (bits >> 16) | 0x40, rounded);
}
inline uint16_t to_bfloat16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return (uint16_t)((v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Round to the nearest float16, ties to even (the branchless form of Fabian Giesen's float_to_half).
INLINE Words to_float16(Floats v) {
    Words bits = (Words)v, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    Words normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    // Adding 0.5 moves a float16 subnormal's last bit to float32's last place: the addition itself rounds.
    Words subnormal = (Words)((Floats)size + 0.5f) - 0x3f000000;
    Words special = 0x7c00 | ((Words)((Ints)size > 0x7f800000) & 0x200);
    Words finite = choose((Ints)size < (113 << 23), subnormal, normal);
    return sign | choose((Ints)size >= (143 << 23), special, finite);
}

INLINE Floats from_float16(Words half) {
    Words size = (half & 0x7fff) << 13;
    Floats value = (Floats)size * 0x1p112f;                     // the exponent's new bias; exact, for subnormals too
    Words special = (Words)((Ints)size >= (0x7c00 << 13)) & 0x7f800000;
    return (Floats)((Words)value | special | (half & 0x8000) << 16);
}

template <int KIND> INLINE Floats load_floats(const void* from, int64_t i) {
    if (KIND == FLOAT32) return load<Floats>((const float*)from + i);
    Words half = widen((const uint16_t*)from + i);
    return KIND == BFLOAT16 ? (Floats)(half << 16) : from_float16(half);
}

}  // namespace
