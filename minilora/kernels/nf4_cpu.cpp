// NF4 on the CPU: unpack, multiply and quantize, equal to reference.py.
//
//     weight[i] = code[nibble i] * absmax[i / blocksize]           packed[i / 2] holds two nibbles, the even i in the high one
//
// One idea carries all three loops.  NF4 has sixteen values, and sixteen float32 are exactly one 512-bit register: the table
// *is* a register, and looking sixteen weights up is one permutation of it.  Since all weights of a block share absmax, the
// table is scaled (and rounded to 16 bits, if so wanted) once a block, sixteen products in place of sixty-four; then
//
//     unpack      nibble -> permute -> store                       the scaled table holds the finished weights
//     multiply    nibble -> permute -> multiply-add                weights live in registers, or for some microseconds in L2
//     quantize    the same permutation walks a binary search over the midpoints, four steps for sixteen weights
//
// A permutation reads the low four bits of its index and ignores the rest, so a byte serves as the index of its low nibble as
// it is, and shifted right by four as that of its high nibble: nothing is masked.
//
// Vectors are those of GCC and Clang (`vector_size`), which both split into what the machine has; only `lookup` and
// `multiply_add` are written per machine: AVX-512, AVX2, NEON, and plain C++ for all others.  The machine is the one the file
// is compiled for (build.py: -march=native).
//
// Trap: floating-point contraction must be off (-ffp-contract=off).  The reference rounds after the product and again after
// the sum in `dynamic[code] * nested + offset`; a fused multiply-add there would be another absmax.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two 16-bit weights are stored as one 32-bit number, the first in its low half"
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------- vectors of sixteen

typedef float Floats __attribute__((vector_size(64)));          // 16 float32
typedef uint32_t Words __attribute__((vector_size(64)));        // 16 × 32 bits: table entries or indices
typedef uint64_t Longs __attribute__((vector_size(64)));        // 8 × 64 bits
typedef uint16_t Halves __attribute__((vector_size(32)));       // 16 × 16 bits
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));

template <class V> inline V load(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }

inline Words widen16(const uint8_t* from) { return __builtin_convertvector(load<Bytes16>(from), Words); }
inline Longs widen8(const uint8_t* from) { return __builtin_convertvector(load<Bytes8>(from), Longs); }

// table[index & 15] in each of the sixteen places.
inline Words lookup(Words table, Words index) {
#if defined(__AVX512F__)
    return (Words)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
#elif defined(__AVX2__)
    // A register holds half the table: look both halves up by three bits, and let the fourth, moved to the sign, choose.
    __m256i low, high, result[2];
    memcpy(&low, &table, 32);
    memcpy(&high, (const char*)&table + 32, 32);
    for (int half = 0; half < 2; ++half) {
        __m256i i;
        memcpy(&i, (const char*)&index + 32 * half, 32);
        __m256 a = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, i));
        __m256 b = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, i));
        result[half] = _mm256_castps_si256(_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))));
    }
    return load<Words>(result);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    // vqtbl4q looks up bytes among 64, which is the whole table: byte k of entry e lies at 4 e + k.
    uint8x16x4_t bytes;
    memcpy(&bytes, &table, 64);
    Words at = (index & 15) * 0x04040404u + 0x03020100u, result;
    for (int quarter = 0; quarter < 4; ++quarter) {
        uint8x16_t i = vld1q_u8((const uint8_t*)&at + 16 * quarter);
        vst1q_u8((uint8_t*)&result + 16 * quarter, vqtbl4q_u8(bytes, i));
    }
    return result;
#else
    Words result;
    for (int i = 0; i < 16; ++i) result[i] = table[index[i] & 15];
    return result;
#endif
}

inline Floats lookup(Floats table, Words index) { return (Floats)lookup((Words)table, index); }

// sum + a * b.  Here one rounding fewer is welcome: products carry an error bound, not equality to the bit.
inline Floats multiply_add(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
    for (int half = 0; half < 2; ++half) {
        __m256 s, x, y;
        memcpy(&s, (const char*)&sum + 32 * half, 32);
        memcpy(&x, (const char*)&a + 32 * half, 32);
        memcpy(&y, (const char*)&b + 32 * half, 32);
        s = _mm256_fmadd_ps(x, y, s);
        memcpy((char*)&sum + 32 * half, &s, 32);
    }
    return sum;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    for (int quarter = 0; quarter < 4; ++quarter) {
        float32x4_t s = vld1q_f32((const float*)&sum + 4 * quarter);
        s = vfmaq_f32(s, vld1q_f32((const float*)&a + 4 * quarter), vld1q_f32((const float*)&b + 4 * quarter));
        vst1q_f32((float*)&sum + 4 * quarter, s);
    }
    return sum;
#else
    return sum + a * b;
#endif
}

// The sum of the sixteen, always in the same order.
inline float total(Floats v) {
    float lanes[16];
    store(lanes, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// ------------------------------------------------------------------------------------------------------------- 16-bit floats

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };           // the numbers that cpu.py passes

inline Words choose(Words condition, Words yes, Words no) { return (condition & yes) | (~condition & no); }

// Round to the nearest bfloat16, ties to even; subnormals stay (the instruction for it would make them zero), NaN stays NaN.
inline Words to_bfloat16(Floats v) {
    Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return choose((Words)(v != v), (bits >> 16) | 0x40, rounded);
}

// Round to the nearest float16, ties to even (the branchless form of Fabian Giesen's float_to_half).
inline Words to_float16(Floats v) {
    Words bits = (Words)v, sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    Words normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    // Adding 0.5 moves a float16 subnormal's last bit to float32's last place: the addition itself rounds.
    Words subnormal = (Words)((Floats)size + 0.5f) - 0x3f000000;
    Words special = 0x7c00 | ((Words)(size > 0x7f800000) & 0x200);
    Words finite = choose((Words)(size < (113u << 23)), subnormal, normal);
    return sign | choose((Words)(size >= (143u << 23)), special, finite);
}

inline Floats from_float16(Words half) {
    Words size = (half & 0x7fff) << 13;
    Floats value = (Floats)size * 0x1p112f;                     // the exponent's new bias; exact, for subnormals too
    Words special = (Words)(size >= (0x7c00u << 13)) & 0x7f800000;
    return (Floats)((Words)value | special | (half & 0x8000) << 16);
}

template <int KIND> inline Floats load_floats(const void* from, int64_t i) {
    if (KIND == FLOAT32) return load<Floats>((const float*)from + i);
    Words half = __builtin_convertvector(load<Halves>((const uint16_t*)from + i), Words);
    return KIND == BFLOAT16 ? (Floats)(half << 16) : from_float16(half);
}

// -------------------------------------------------------------------------------------------------------------------- threads

// The parts of 0 … count that are worth a thread, each thread's part fixed by its number: results don't depend on timing.
// Trap: the team must be torch's own (build.py links its OpenMP library), and as large.  A second team beside it, or one that
// changes its size, makes the threads of both sleep between operations, and all arithmetic of the program takes twice as long.
template <class Body> void parallel(int threads, int64_t count, Body body) {
    if (threads > count) threads = count > 0 ? (int)count : 1;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; ++t) body(count * t / threads, count * (t + 1) / threads);
        return;
    }
#endif
    body((int64_t)0, count);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Uninitialized memory for one call, at the start of a cache line (a vector that straddles two costs two loads).
template <class T> struct Scratch {
    T* data;
    explicit Scratch(int64_t count) : data((T*)aligned_alloc(64, ceil_div(count * (int64_t)sizeof(T), 64) * 64)) {
        if (!data) abort();
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

}  // namespace

// --------------------------------------------------------------------------------------------------------------------- unpack

// A packed weight as cpu.py hands it over (`Packed` there has the same fields in the same order).
struct Packed {
    const uint8_t* packed;
    const float* code;                  // 16
    int64_t n, blocksize;
    const float* absmax;                // float32 per block, or null where the next fields hold it in 8 bits a block
    const uint8_t* nested_codes;
    const float* dynamic;               // 256
    const float* nested_absmax;
    int64_t nested_blocksize;
    float offset;
};

namespace {

// The float32 constants of blocks first … first + count.
void decode_absmax(const Packed& w, int64_t first, int64_t count, float* out) {
    if (w.absmax) {
        memcpy(out, w.absmax + first, count * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count;) {
        int64_t group = (first + i) / w.nested_blocksize;
        int64_t stop = smaller(count, (group + 1) * w.nested_blocksize - first);
        for (; i < stop; ++i) out[i] = w.dynamic[w.nested_codes[first + i]] * w.nested_absmax[group] + w.offset;
    }
}

// A block's sixteen weights in the output's type, each in 32 bits.
template <int KIND> inline Words scaled_table(Floats code, float absmax) {
    Floats table = code * absmax;
    return KIND == FLOAT32 ? (Words)table : KIND == BFLOAT16 ? to_bfloat16(table) : to_float16(table);
}

template <int KIND> struct Stored { typedef uint16_t type; };
template <> struct Stored<FLOAT32> { typedef uint32_t type; };

// Sixteen 32-bit or thirty-two 16-bit weights, one register, from the bytes at `from`.
template <int KIND> inline Words unpack_register(Words table, const uint8_t* from) {
    if (KIND == FLOAT32) {
        Longs byte = widen8(from);
        return lookup(table, (Words)(byte >> 4 | byte << 32));          // index 2i: the high nibble; 2i + 1: the low one
    }
    Words byte = widen16(from);
    return lookup(table, byte >> 4) | lookup(table << 16, byte);        // even weights in the low halves, odd in the high ones
}

// Weights first … last of one block to `out`; they may start and end within a byte.
template <int KIND, class T> inline T* unpack_block(Words table, const uint8_t* packed, int64_t first, int64_t last, T* out) {
    const int64_t STEP = 64 / sizeof(T);
    if (first < last && first % 2) *out++ = (T)table[packed[first++ / 2] & 15];
    for (; first + STEP <= last; first += STEP, out += STEP) store(out, unpack_register<KIND>(table, packed + first / 2));
    for (; first + 1 < last; first += 2) {
        *out++ = (T)table[packed[first / 2] >> 4];
        *out++ = (T)table[packed[first / 2] & 15];
    }
    if (first < last) *out++ = (T)table[packed[first / 2] >> 4];
    return out;
}

// Weights first … last of the flattened tensor to `out`, whatever blocks they lie in.
template <int KIND, class T = typename Stored<KIND>::type> void unpack(const Packed& w, int64_t first, int64_t last, T* out) {
    const int64_t AT_ONCE = 128;
    float absmax[AT_ONCE];
    Floats code = load<Floats>(w.code);
    for (int64_t block = first / w.blocksize; first < last; block += AT_ONCE) {
        int64_t blocks = smaller(AT_ONCE, (last - 1) / w.blocksize + 1 - block);
        decode_absmax(w, block, blocks, absmax);
        for (int64_t b = 0; b < blocks; ++b) {
            int64_t stop = smaller(last, (block + b + 1) * w.blocksize);
            out = unpack_block<KIND>(scaled_table<KIND>(code, absmax[b]), w.packed, first, stop, out);
            first = stop;
        }
    }
}

template <int KIND> void unpack_all(const Packed& w, void* out, int threads) {
    typedef typename Stored<KIND>::type T;
    const int64_t PART = 4096;                      // a thread's part starts at a multiple of it: at a byte, at a cache line
    parallel(w.n < 4 * PART ? 1 : threads, ceil_div(w.n, PART), [&](int64_t from, int64_t to) {
        unpack<KIND>(w, from * PART, smaller(to * PART, w.n), (T*)out + from * PART);
    });
}

// ------------------------------------------------------------------------------------------------ multiply: the weights' order

// y = x Wᵀ + bias for one to four rows x: every weight meets its rows of x straight from the register it was looked up in.
//
// A register of bytes yields sixteen even weights (by high nibbles) and sixteen odd ones.  Putting them in order would cost
// more than the lookups; instead x is split likewise once per call: 32 elements become 16 even and then 16 odd ones.
// The sum runs over eight chains per weight row, and W_ROWS rows at once share each load of x.
const int W_ROWS = 4, FEW = 4;

template <int ROWS, bool ROUND> void multiply_few(const Packed& w, int64_t row, int w_rows, int64_t in, const float* x,
                                                  float* absmax, float* sums) {
    const int64_t blocks = in / w.blocksize;
    Floats code = load<Floats>(w.code), even[W_ROWS][ROWS] = {}, odd[W_ROWS][ROWS] = {};
    decode_absmax(w, row * blocks, w_rows * blocks, absmax);
    const uint8_t* packed[W_ROWS];
    const float* constants[W_ROWS];
    for (int n = 0; n < W_ROWS; ++n) {              // past the matrix's last row the last one is computed again, and dropped
        int real = n < w_rows ? n : w_rows - 1;
        packed[n] = w.packed + (row + real) * in / 2;
        constants[n] = absmax + real * blocks;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        Floats table[W_ROWS];
        for (int n = 0; n < W_ROWS; ++n) {
            table[n] = code * constants[n][b];
            if (ROUND) table[n] = (Floats)(to_bfloat16(table[n]) << 16);
        }
        for (int64_t i = b * w.blocksize; i < (b + 1) * w.blocksize; i += 32) {
            for (int n = 0; n < W_ROWS; ++n) {
                Words byte = widen16(packed[n] + i / 2);
                Floats high = lookup(table[n], byte >> 4), low = lookup(table[n], byte);
                for (int r = 0; r < ROWS; ++r) {
                    even[n][r] = multiply_add(even[n][r], high, load<Floats>(x + i * ROWS + 32 * r));
                    odd[n][r] = multiply_add(odd[n][r], low, load<Floats>(x + i * ROWS + 32 * r + 16));
                }
            }
        }
    }
    for (int n = 0; n < w_rows; ++n)
        for (int r = 0; r < ROWS; ++r) sums[n * ROWS + r] = total(even[n][r] + odd[n][r]);
}

// --------------------------------------------------------------------------------------------------- multiply: through a tile

// y = x Wᵀ + bias for more rows: W_ROWS rows of W are unpacked into a tile that stays in the first caches, and each of them
// meets X_ROWS rows of x at a time, so that a load of either serves several multiply-adds and all sums fit in registers.
#if defined(__AVX512F__)
const int X_ROWS = 6, TILE_ROWS = 4;                // 24 sums of 32 registers
#else
const int X_ROWS = 3, TILE_ROWS = 2;                // a sum takes two registers of 16 (AVX2) or four of 32 (NEON)
#endif

// What a 64-byte register of both operands holds, and how it is multiplied.
struct Singles {
    typedef float type;
    static const int COUNT = 16;
    static inline Floats step(Floats sum, Words a, Words b) { return multiply_add(sum, (Floats)a, (Floats)b); }
};
#if defined(__AVX512BF16__)
// Two products a place, summed in float32.  The instruction takes subnormal numbers as zero and rounds each sum once.
struct Pairs {
    typedef uint16_t type;
    static const int COUNT = 32;
    static inline Floats step(Floats sum, Words a, Words b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
    }
};
typedef Pairs For16Bits;
#else
typedef Singles For16Bits;                          // 16-bit numbers are widened to float32, exactly
#endif

template <class E, int ROWS> void multiply_tile(const char* tile, int64_t stride, const char* x, int64_t steps, float* sums) {
    Floats sum[TILE_ROWS][ROWS] = {};
    for (int64_t s = 0; s < steps; ++s) {
        Words weight[TILE_ROWS];
        for (int n = 0; n < TILE_ROWS; ++n) weight[n] = load<Words>(tile + n * stride + 64 * s);
        for (int r = 0; r < ROWS; ++r) {
            Words from_x = load<Words>(x + 64 * (s * ROWS + r));
            for (int n = 0; n < TILE_ROWS; ++n) sum[n][r] = E::step(sum[n][r], weight[n], from_x);
        }
    }
    for (int n = 0; n < TILE_ROWS; ++n)
        for (int r = 0; r < ROWS; ++r) sums[n * ROWS + r] = total(sum[n][r]);
}

// x (rows, in) as the loops above read it, each in its own order; `E` is the type the products are taken in.
template <int KIND> inline float as_float(const void* x, int64_t i) {
    if (KIND == FLOAT32) return ((const float*)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <int KIND> inline void element(const void* x, int64_t i, float* to) { *to = as_float<KIND>(x, i); }
template <int KIND> inline void element(const void* x, int64_t i, uint16_t* to) { *to = ((const uint16_t*)x)[i]; }

// sums (w_rows, rows) of weight rows row … row + w_rows, rounded once to y (all rows, out).
template <int KIND> void store_sums(const float* sums, int64_t row, int w_rows, int64_t first, int rows, const float* bias,
                                    int64_t out, void* y) {
    for (int n = 0; n < w_rows; ++n)
        for (int r = 0; r < rows; ++r) {
            float value = sums[n * rows + r] + (bias ? bias[row + n] : 0.0f);
            int64_t at = (first + r) * out + row + n;
            if (KIND == FLOAT32) ((float*)y)[at] = value;
            else ((uint16_t*)y)[at] = (uint16_t)to_bfloat16(Floats{value})[0];
        }
}

struct Product {
    const Packed& w;
    int64_t out, in;
    const void* x;
    int64_t rows;
    const float* bias;
    void* y;
    int threads;
};

template <int KIND, int ROWS> void few(const Product& p) {
    Scratch<float> x(p.in * ROWS);
    for (int64_t i = 0; i < p.in; i += 32)
        for (int r = 0; r < ROWS; ++r)
            for (int k = 0; k < 32; ++k) x.data[i * ROWS + 32 * r + k / 2 + k % 2 * 16] = as_float<KIND>(p.x, r * p.in + i + k);
    parallel(p.threads, ceil_div(p.out, W_ROWS), [&](int64_t from, int64_t to) {
        Scratch<float> absmax(W_ROWS * (p.in / p.w.blocksize));
        float sums[W_ROWS * ROWS];
        for (int64_t row = from * W_ROWS; row < smaller(to * W_ROWS, p.out); row += W_ROWS) {
            int w_rows = (int)smaller(W_ROWS, p.out - row);
            // One row is exact: its weights are not rounded to x's type.
            multiply_few<ROWS, KIND == BFLOAT16 && ROWS != 1>(p.w, row, w_rows, p.in, x.data, absmax.data, sums);
            store_sums<KIND>(sums, row, w_rows, 0, ROWS, p.bias, p.out, p.y);
        }
    });
}

template <class E> void multiply_tile(int rows, const char* tile, int64_t stride, const char* x, int64_t steps, float* sums) {
    switch (rows) {
        case 1: return multiply_tile<E, 1>(tile, stride, x, steps, sums);
        case 2: return multiply_tile<E, 2>(tile, stride, x, steps, sums);
        case 3: return multiply_tile<E, 3>(tile, stride, x, steps, sums);
#if defined(__AVX512F__)
        case 4: return multiply_tile<E, 4>(tile, stride, x, steps, sums);
        case 5: return multiply_tile<E, 5>(tile, stride, x, steps, sums);
        case 6: return multiply_tile<E, 6>(tile, stride, x, steps, sums);
#endif
    }
}

// Weights first … last, unpacked for products in E: float32, or bfloat16 as they are or widened.
template <int KIND> inline void unpack_for(const Packed& w, int64_t first, int64_t last, uint16_t* to) {
    unpack<KIND>(w, first, last, to);
}
template <int KIND> inline void unpack_for(const Packed& w, int64_t first, int64_t last, float* to) {
    if (KIND == FLOAT32) return unpack<FLOAT32>(w, first, last, (uint32_t*)to);
    uint16_t* half = (uint16_t*)(to + (last - first)) - (last - first);        // in the row's second half, widened forwards
    unpack<BFLOAT16>(w, first, last, half);
    for (int64_t i = 0; i < last - first; ++i) to[i] = as_float<BFLOAT16>(half, i);
}

template <int KIND, class E> void many(const Product& p) {
    typedef typename E::type T;
    const int64_t steps = ceil_div(p.in, E::COUNT), panels = ceil_div(p.rows, X_ROWS);
    // Trap: rows a power of two apart fall on the same few places of a cache; an odd number of cache lines keeps them apart.
    const int64_t stride = 64 * (steps | 1);
    Scratch<T> x(p.rows * steps * E::COUNT);
    memset(x.data, 0, p.rows * steps * 64);
    for (int64_t r = 0; r < p.rows; ++r) {          // panels of X_ROWS rows, in each panel a register of every row in turn
        int64_t first = r / X_ROWS * X_ROWS, in_panel = smaller(X_ROWS, p.rows - first);
        T* to = x.data + (first * steps + (r - first)) * E::COUNT;
        for (int64_t i = 0; i < p.in; ++i) element<KIND>(p.x, r * p.in + i, to + i / E::COUNT * in_panel * E::COUNT + i % E::COUNT);
    }
    parallel(p.threads, ceil_div(p.out, TILE_ROWS), [&](int64_t from, int64_t to) {
        Scratch<char> tile(TILE_ROWS * stride);
        memset(tile.data, 0, TILE_ROWS * stride);
        float sums[TILE_ROWS * X_ROWS];
        for (int64_t row = from * TILE_ROWS; row < smaller(to * TILE_ROWS, p.out); row += TILE_ROWS) {
            int w_rows = (int)smaller(TILE_ROWS, p.out - row);
            for (int n = 0; n < w_rows; ++n)
                unpack_for<KIND>(p.w, (row + n) * p.in, (row + n + 1) * p.in, (T*)(tile.data + n * stride));
            for (int64_t panel = 0; panel < panels; ++panel) {
                int64_t first = panel * X_ROWS;
                int in_panel = (int)smaller(X_ROWS, p.rows - first);
                multiply_tile<E>(in_panel, tile.data, stride, (const char*)(x.data + first * steps * E::COUNT), steps, sums);
                store_sums<KIND>(sums, row, w_rows, first, in_panel, p.bias, p.out, p.y);
            }
        }
    });
}

template <int KIND, class E> void product(const Product& p) {
    bool whole = p.w.blocksize % 32 == 0 && p.in % p.w.blocksize == 0;      // blocks start with rows, and hold whole registers
    if (whole && p.rows == 1) return few<KIND, 1>(p);
    if (whole && p.rows == 2) return few<KIND, 2>(p);
    if (whole && p.rows == 3) return few<KIND, 3>(p);
    if (whole && p.rows == 4) return few<KIND, 4>(p);
    many<KIND, E>(p);
}

// ------------------------------------------------------------------------------------------------------------------- quantize

// Count the midpoints below each value: the index of the nearest entry, a value on a midpoint staying with the lower one.
inline Words nearest(Floats value, Floats midpoints) {
    Words index = (Words)(value > midpoints[7]) & 8;
    index += (Words)(value > lookup(midpoints, index + 3)) & 4;
    index += (Words)(value > lookup(midpoints, index + 1)) & 2;
    return index + ((Words)(value > lookup(midpoints, index)) & 1);
}

template <int KIND> inline Floats load_some(const void* x, int64_t i, int64_t count) {      // zeros behind the last
    const int64_t SIZE = KIND == FLOAT32 ? 4 : 2;
    char buffer[64] = {};
    memcpy(buffer, (const char*)x + i * SIZE, count * SIZE);
    return load_floats<KIND>(buffer, 0);
}

// Blocks that start with element `first`, an even one, and end before `last`; false where a number is not finite.
template <int KIND> bool quantize(const void* x, int64_t first, int64_t last, Floats midpoints, int64_t blocksize, float* absmax,
                                  uint8_t* packed) {
    uint32_t worst = 0;
    for (int64_t block = first / blocksize; first < last; ++block) {
        int64_t stop = smaller(last, (block + 1) * blocksize), i = first;
        // Without their signs float32 numbers are ordered as their bits are, with infinity and NaN on top.
        Words size = {};
        for (; i < stop; i += 16) {
            Floats v = stop - i < 16 ? load_some<KIND>(x, i, stop - i) : load_floats<KIND>(x, i);
            Words bits = (Words)v & 0x7fffffff;
            size = choose((Words)(bits > size), bits, size);
        }
        uint32_t largest = 0;
        for (int lane = 0; lane < 16; ++lane) largest = size[lane] > largest ? size[lane] : largest;
        worst = largest > worst ? largest : worst;
        memcpy(absmax + block, &largest, sizeof largest);
        float scaled_by = absmax[block] > 1e-38f ? absmax[block] : 1e-38f;      // reference.SMALLEST_SCALED_ABSMAX
        Floats inverse = Floats{} + 1 / scaled_by;
        for (i = first; i < stop && i % 2; ++i)                                 // the block starts within a byte
            packed[i / 2] |= (uint8_t)nearest(load_some<KIND>(x, i, 1) * inverse, midpoints)[0];
        for (; i < stop; i += 16) {
            bool full = stop - i >= 16;
            Words index = nearest((full ? load_floats<KIND>(x, i) : load_some<KIND>(x, i, stop - i)) * inverse, midpoints);
            Longs pairs = (Longs)index;                                         // low word: the even element's index
            Bytes8 bytes = __builtin_convertvector((pairs << 4 | pairs >> 32) & 255, Bytes8);
            if (full) store(packed + i / 2, bytes);
            else for (int64_t k = i; k < stop; k += 2) packed[k / 2] = k + 1 < stop ? bytes[(k - i) / 2] : bytes[(k - i) / 2] & 0xf0;
        }
        first = stop;
    }
    return worst < 0x7f800000;
}

template <int KIND> bool quantize_all(const void* x, int64_t n, const float* code, int64_t blocksize, float* absmax,
                                      uint8_t* packed, int padding, int threads) {
    float between[16] = {};
    for (int i = 0; i < 15; ++i) between[i] = (code[i + 1] + code[i]) / 2;
    Floats midpoints = load<Floats>(between);
    const int64_t part = 2 * blocksize * ceil_div(4096, 2 * blocksize);     // whole blocks and whole bytes
    bool finite = true;
    parallel(n < 4 * part ? 1 : threads, ceil_div(n, part), [&](int64_t from, int64_t to) {
        if (!quantize<KIND>(x, from * part, smaller(to * part, n), midpoints, blocksize, absmax, packed))
            __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    if (n % 2) packed[n / 2] |= (uint8_t)padding;
    return finite;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what cpu.py calls by ctypes

extern "C" {

const char* nf4_machine() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16 products";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return "NEON";
#else
    return "plain C++";
#endif
}

void nf4_unpack(const Packed* w, int kind, void* out, int threads) {
    if (kind == FLOAT32) unpack_all<FLOAT32>(*w, out, threads);
    else if (kind == BFLOAT16) unpack_all<BFLOAT16>(*w, out, threads);
    else unpack_all<FLOAT16>(*w, out, threads);
}

// y (rows, out) = x (rows, in) Wᵀ + bias, x and y both float32 or both bfloat16; bias float32 (out) or null.
void nf4_product(const Packed* w, int64_t out, int64_t in, const void* x, int64_t rows, int kind, const float* bias, void* y,
                 int threads) {
    Product p = {*w, out, in, x, rows, bias, y, out * in * rows < 65536 ? 1 : threads};
    if (kind == FLOAT32) product<FLOAT32, Singles>(p);
    else product<BFLOAT16, For16Bits>(p);
}

// x (n) of `kind` -> absmax (blocks) and packed ((n + 1) / 2).  Returns whether all of x is finite; else the results mean nothing.
int nf4_quantize(const void* x, int kind, int64_t n, const float* code, int64_t blocksize, float* absmax, uint8_t* packed,
                 int padding, int threads) {
    if (kind == FLOAT32) return quantize_all<FLOAT32>(x, n, code, blocksize, absmax, packed, padding, threads);
    if (kind == BFLOAT16) return quantize_all<BFLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
    return quantize_all<FLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
}

}  // extern "C"
