// Blocks quantized, to NF4 and to any table of 256, equal to reference.py to the bit.
//
//     absmax = max |x|        scaled = x * (1 / absmax)        index = how many midpoints of the table lie below scaled
//
// The index comes of a binary search, a register of values at a time: among sixteen entries by four lookups in the register
// that holds the fifteen midpoints; among 256 by the same four in every sixteenth midpoint, then four in memory, which is L1.

#include "nf4_blocks.h"

namespace {

// A value on a midpoint stays with the lower entry.
INLINE Words nearest(Floats value, const Table& midpoints, float middle) {
    Words index = (Words)(value > middle) & 8;
    index += (Words)(value > (Floats)lookup(midpoints, index + 3)) & 4;
    index += (Words)(value > (Floats)lookup(midpoints, index + 1)) & 2;
    return index + ((Words)(value > (Floats)lookup(midpoints, index)) & 1);
}

template <int KIND> INLINE Floats load_some(const void* x, int64_t i, int64_t count) {      // zeros behind the last
    const int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    char buffer[WIDTH] = {};
    memcpy(buffer, (const char*)x + i * SIZE, count * SIZE);
    return load_floats<KIND>(buffer, 0);
}

template <int KIND> INLINE Floats load_up_to(const void* x, int64_t i, int64_t stop) {
    return stop - i < LANES ? load_some<KIND>(x, i, stop - i) : load_floats<KIND>(x, i);
}

// The bits of the largest |x| among first … stop.
template <int KIND> INLINE uint32_t largest_bits(const void* x, int64_t first, int64_t stop) {
    // Without their signs float32 numbers are ordered as their bits are, with infinity and NaN on top.
    Ints size = {};
    for (int64_t i = first; i < stop; i += LANES) {
        Ints bits = (Ints)load_up_to<KIND>(x, i, stop) & 0x7fffffff;
        size = bits > size ? bits : size;
    }
    return largest(size);
}

// The constant of a block whose largest number has these bits, and what its values are multiplied by.
INLINE Floats store_absmax(uint32_t bits, float* absmax) {
    memcpy(absmax, &bits, sizeof bits);
    return Floats{} + 1 / (*absmax > 1e-38f ? *absmax : 1e-38f);                // reference.SMALLEST_SCALED_ABSMAX
}

const uint32_t INFINITE = 0x7f800000;                                           // bits of infinity; those of NaN are larger

// ------------------------------------------------------------------------------------------------------------- 4 bits a number

// Blocks that start with element `first`, an even one, and end before `last`; false where a number is not finite.
template <int KIND> bool quantize(const void* x, int64_t first, int64_t last, const float* between, int64_t blocksize,
                                  float* absmax, uint8_t* packed) {
    const Table midpoints = load_table(between);
    const float middle = between[7];
    uint32_t worst = 0;
    for (int64_t block = first / blocksize; first < last; ++block) {
        int64_t stop = smaller(last, (block + 1) * blocksize), i = first;
        uint32_t bits = largest_bits<KIND>(x, first, stop);
        worst = bits > worst ? bits : worst;
        Floats inverse = store_absmax(bits, absmax + block);
        for (; i < stop && i % 2; ++i)                                          // the block starts within a byte
            packed[i / 2] |= (uint8_t)nearest(load_some<KIND>(x, i, 1) * inverse, midpoints, middle)[0];
        for (; i < stop; i += LANES) {
            Words index = nearest(load_up_to<KIND>(x, i, stop) * inverse, midpoints, middle);
            Longs pairs = (Longs)index;                                         // low word: the even element's index
            pairs = pairs << 4 | pairs >> 32;
            if (stop - i >= LANES) store_bytes(packed + i / 2, pairs);
            else
                for (int64_t k = i; k < stop; k += 2)
                    packed[k / 2] = (uint8_t)pairs[(k - i) / 2] & (k + 1 < stop ? 0xff : 0xf0);     // half a byte is not ours
        }
        first = stop;
    }
    return worst < INFINITE;
}

// Elements a part that a thread takes: some 30 µs.
const int64_t DEALT = 1 << 16;

template <int KIND> bool quantize_all(const void* x, int64_t n, const float* code, int64_t blocksize, float* absmax,
                                      uint8_t* packed, int padding, int threads) {
    float between[16] = {};
    for (int i = 0; i < 15; ++i) between[i] = (code[i + 1] + code[i]) / 2;
    const int64_t part = 2 * blocksize * ceil_div(DEALT, 2 * blocksize);        // whole blocks and whole bytes
    bool finite = true;
    deal(n < ALONE ? 1 : threads, ceil_div(n, part), [&](int64_t at) {
        if (!quantize<KIND>(x, at * part, smaller((at + 1) * part, n), between, blocksize, absmax, packed))
            __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    if (n % 2) packed[n / 2] |= (uint8_t)padding;
    return finite;
}

// ------------------------------------------------------------------------------------------------------------- 8 bits a number

// Midpoints of a sorted table of up to 256 entries, infinity where there is none; `coarse` every sixteenth.
struct Midpoints {
    float between[256], coarse[16];
    Midpoints(const float* code, int64_t entries) {
        for (int64_t i = 0; i < 256; ++i) between[i] = i + 1 < entries ? (code[i + 1] + code[i]) / 2 : __builtin_inff();
        for (int i = 0; i < 16; ++i) coarse[i] = between[16 * i + 15];
    }
};

INLINE Words nearest(Floats value, const Midpoints& midpoints, const Table& coarse) {
    Words index = nearest(value, coarse, midpoints.coarse[7]) << 4;
    index += (Words)(value > gather(midpoints.between, index + 7)) & 8;
    index += (Words)(value > gather(midpoints.between, index + 3)) & 4;
    index += (Words)(value > gather(midpoints.between, index + 1)) & 2;
    return index + ((Words)(value > gather(midpoints.between, index)) & 1);
}

// x (n) float32 -> absmax (blocks) and codes (n); false where a number is not finite.
inline bool quantize_bytes(const float* x, int64_t n, const Midpoints& midpoints, int64_t blocksize, float* absmax,
                           uint8_t* codes, int threads) {
    const int64_t part = ceil_div(DEALT / 4, blocksize);                        // blocks; a number takes four times as long
    const Table coarse = load_table(midpoints.coarse);
    bool finite = true;
    deal(n < ALONE / 4 ? 1 : threads, ceil_div(ceil_div(n, blocksize), part), [&](int64_t at) {
        uint32_t worst = 0;
        for (int64_t block = at * part; block < (at + 1) * part && block * blocksize < n; ++block) {
            int64_t first = block * blocksize, stop = smaller(n, first + blocksize);
            uint32_t bits = largest_bits<FLOAT32>(x, first, stop);
            worst = bits > worst ? bits : worst;
            Floats inverse = store_absmax(bits, absmax + block);
            for (int64_t i = first; i < stop; i += LANES) {
                Words index = nearest(load_up_to<FLOAT32>(x, i, stop) * inverse, midpoints, coarse);
                if (stop - i >= LANES) store_bytes(codes + i, index);
                else
                    for (int64_t k = i; k < stop; ++k) codes[k] = (uint8_t)index[k - i];
            }
        }
        if (worst >= INFINITE) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    return finite;
}

}  // namespace
