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
// `multiply_add` (and what widens bytes) are written per machine: AVX-512, AVX2, NEON, and plain C++ for all others.  The
// machine is the one the file is compiled for (build.py: -march=native).  On x86 tests/kernels run every form but NEON, which
// gave the same bits under emulation (qemu-aarch64, by hand) and was never timed.  Only AVX-512 is tuned: GCC takes vectors
// of this size through memory elsewhere, and the AVX2 form is no faster than plain C++.
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

template <class V> inline V load(const void* from) { V v; memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }

// Unsigned bytes, each in 32 or in 64 bits.  (`__builtin_convertvector` says the same, but GCC 12 moves byte by byte for it.)
inline Words widen16(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    __m256i result[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)),
                         _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)))};
    return load<Words>(result);
#else
    uint32_t result[16];
    for (int i = 0; i < 16; ++i) result[i] = from[i];
    return load<Words>(result);
#endif
}

inline Longs widen8(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Longs)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
    __m256i result[2] = {_mm256_cvtepu8_epi64(bytes), _mm256_cvtepu8_epi64(_mm_srli_si128(bytes, 4))};
    return load<Longs>(result);
#else
    uint64_t result[8];
    for (int i = 0; i < 8; ++i) result[i] = from[i];
    return load<Longs>(result);
#endif
}

// Store a register at the start of a cache line, around the cache: a common store would first read the line it overwrites.
inline void store_past_cache(void* to, Words v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)v);
#else
    store(to, v);
#endif
}

// Sixteen 16-bit numbers, each in 32 bits.
inline Words widen_halves(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    uint32_t result[16];
    for (int i = 0; i < 16; ++i) result[i] = from[i];
    return load<Words>(result);
#endif
}

// The lowest byte of each.
inline void store_bytes(uint8_t* to, Longs v) {
#if defined(__AVX512F__)
    _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8((__m512i)v));
#else
    for (int i = 0; i < 8; ++i) to[i] = (uint8_t)v[i];
#endif
}

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
    for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
    for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// ------------------------------------------------------------------------------------------------------------- 16-bit floats

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };           // the numbers that cpu.py passes

inline Words choose(Words condition, Words yes, Words no) { return condition ? yes : no; }

// Round to the nearest bfloat16, ties to even; subnormals stay (the instruction for it would make them zero), NaN stays NaN.
inline Words to_bfloat16(Floats v) {
    Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return choose((Words)(v != v), (bits >> 16) | 0x40, rounded);
}
inline uint16_t to_bfloat16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return (uint16_t)((v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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
    Words half = widen_halves((const uint16_t*)from + i);
    return KIND == BFLOAT16 ? (Floats)(half << 16) : from_float16(half);
}

// -------------------------------------------------------------------------------------------------------------------- threads

// Fewer weights than this are done in some 10 µs: less than other threads would take to wake, on a machine with other work.
const int64_t ALONE = 1 << 18;

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
        const float scale = w.nested_absmax[group], offset = w.offset, *dynamic = w.dynamic;    // the compiler can't know that
        const uint8_t* codes = w.nested_codes + first;                                          // `out` changes none of them
        for (; i < stop; ++i) out[i] = dynamic[codes[i]] * scale + offset;
    }
}

// A block's sixteen weights in the output's type, each in 32 bits; 16-bit ones stand in both halves.
template <int KIND> inline Words scaled_table(Floats code, float absmax) {
    Floats table = code * absmax;
    if (KIND == FLOAT32) return (Words)table;
    Words half = KIND == BFLOAT16 ? to_bfloat16(table) : to_float16(table);
    return half | half << 16;
}

template <int KIND> struct Stored { typedef uint16_t type; };
template <> struct Stored<FLOAT32> { typedef uint32_t type; };

// Sixteen 32-bit or thirty-two 16-bit weights, one register, from the bytes at `from`.
template <int KIND> inline Words unpack_register(Words table, const uint8_t* from) {
#if defined(__AVX512VBMI__)
    // One instruction picks eight bits from anywhere in 64, for each of eight bytes; only the first of an index matters.
    if (KIND == FLOAT32)                                    // from bit 4, the high nibble; from bit 0, the low one
        return lookup(table, (Words)_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0000000000000004), (__m512i)widen8(from)));
    // A table of 32 halves, entry e at 2e and 2e + 1: bits 3 … 7 of a byte find the high nibble's, bits -1 … 3 the low one's.
    __m512i index = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x001f0023003f0003), (__m512i)widen16(from));
    return (Words)_mm512_permutexvar_epi16(index, (__m512i)table);
#else
    if (KIND == FLOAT32) {
        Longs byte = widen8(from);
        return lookup(table, (Words)(byte >> 4 | byte << 32));          // index 2i: the high nibble; 2i + 1: the low one
    }
    Words byte = widen16(from);
    return lookup(table & 0xffff, byte >> 4) | lookup(table << 16, byte);   // even weights in the low halves, odd in the high
#endif
}

// Weights first … last of one block to `out`; they may start and end within a byte, and end within a register.
template <int KIND, class T> __attribute__((noinline)) void unpack_piece(Words table, const uint8_t* packed, int64_t first,
                                                                          int64_t last, T* out) {
    const int64_t STEP = 64 / sizeof(T);
    if (first % 2) *out++ = (T)table[packed[first++ / 2] & 15];
    for (; first + STEP <= last; first += STEP, out += STEP) store(out, unpack_register<KIND>(table, packed + first / 2));
    for (; first + 1 < last; first += 2) {
        *out++ = (T)table[packed[first / 2] >> 4];
        *out++ = (T)table[packed[first / 2] & 15];
    }
    if (first < last) *out++ = (T)table[packed[first / 2] >> 4];
}

// Weights first … last of the flattened tensor to `out`, whatever blocks they lie in; `past_cache` where `out` starts a line.
template <int KIND, class T = typename Stored<KIND>::type>
void unpack(const Packed& w, int64_t first, int64_t last, T* out, bool past_cache = false) {
    const int64_t AT_ONCE = 128, STEP = 64 / sizeof(T), blocksize = w.blocksize;
    const uint8_t* packed = w.packed;
    const Floats code = load<Floats>(w.code);
    const bool whole = blocksize % STEP == 0 && first % blocksize == 0;         // blocks are whole registers, but for the last
    float absmax[AT_ONCE];
    for (int64_t block = first / blocksize; first < last; block += AT_ONCE) {
        int64_t blocks = smaller(AT_ONCE, (last - 1) / blocksize + 1 - block);
        decode_absmax(w, block, blocks, absmax);
        for (int64_t b = 0; b < blocks; ++b) {
            const Words table = scaled_table<KIND>(code, absmax[b]);
            int64_t stop = smaller(last, (block + b + 1) * blocksize);
            __builtin_prefetch(packed + first / 2 + 1024);
            if (whole && stop - first == blocksize && past_cache)
                for (int64_t i = 0; i < blocksize; i += STEP)
                    store_past_cache(out + i, unpack_register<KIND>(table, packed + first / 2 + i / 2));
            else if (whole && stop - first == blocksize)
                for (int64_t i = 0; i < blocksize; i += STEP)
                    store(out + i, unpack_register<KIND>(table, packed + first / 2 + i / 2));
            else
                unpack_piece<KIND>(table, packed, first, stop, out);
            out += stop - first;
            first = stop;
        }
    }
}

template <int KIND> void unpack_all(const Packed& w, void* out, int threads) {
    typedef typename Stored<KIND>::type T;
    const int64_t PART = 4096;                      // a thread's part starts at a multiple of it: at a byte, at a cache line
    const int64_t LARGE = 64 << 20;                 // bytes that no cache holds until they are read
    bool past_cache = w.n * (int64_t)sizeof(T) >= LARGE && (uintptr_t)out % 64 == 0;
    parallel(w.n < ALONE ? 1 : threads, ceil_div(w.n, PART), [&](int64_t from, int64_t to) {
        unpack<KIND>(w, from * PART, smaller(to * PART, w.n), (T*)out + from * PART, past_cache);
#if defined(__AVX512F__)
        _mm_sfence();                               // such stores are seen by other threads only after this
#endif
    });
}

// ------------------------------------------------------------------------------------------------------------------- multiply

// y = x Wᵀ + bias, and W never lies in memory.  The types below say what one 64-byte register of weights holds, how a scaled
// table and such registers are made, and how a register of weights meets one of x.
//
// 2 · COUNT weights make two registers, `even` (by the high nibbles) and `odd` (by the low ones).  Putting them in order would
// cost more than looking them up, so x is split the same way instead, once a call (`arrange`).

struct Singles {
    typedef float type;
    static const int COUNT = 16;
    static Words table(Floats code, float absmax) { return (Words)(code * absmax); }
    static void weights(Words table, const uint8_t* from, Words& even, Words& odd) {
        Words byte = widen16(from);
        even = lookup(table, byte >> 4);
        odd = lookup(table, byte);
    }
    static Floats step(Floats sum, Words weight, Words x) { return multiply_add(sum, (Floats)weight, (Floats)x); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// bfloat16: twice as many to a register, and two products a place and instruction, summed in float32.
// Trap: these instructions take subnormal numbers (below 1.2e-38) for zero, in the table as in the product.
struct ShortSingles {
    typedef uint16_t type;
    static const int COUNT = 32;
    static Words table(Floats code, float absmax) {
        __m512 table = (__m512)(code * absmax);
        return (Words)_mm512_cvtne2ps_pbh(table, table);        // twice: an index has five bits here
    }
    static void weights(Words table, const uint8_t* from, Words& even, Words& odd) {
        __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
        even = (Words)_mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), (__m512i)table);
        odd = (Words)_mm512_permutexvar_epi16(byte, (__m512i)table);
    }
    static Floats step(Floats sum, Words weight, Words x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)weight, (__m512bh)(__m512i)x);
    }
};
#else
// bfloat16 without such instructions: the weights are rounded to it, and held and multiplied in float32.
struct ShortSingles : Singles {
    static Words table(Floats code, float absmax) { return to_bfloat16(code * absmax) << 16; }
};
#endif

template <int KIND> struct Input { typedef uint16_t type; };
template <> struct Input<FLOAT32> { typedef float type; };
template <int KIND> struct Multiplied { typedef ShortSingles type; };
template <> struct Multiplied<FLOAT32> { typedef Singles type; };

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

// x's rows first … first + rows, as the loops below read them: a register of each row, then the next register of each.
// With `split` registers 2s and 2s + 1 hold the even and the odd elements of what they would hold otherwise.
template <int KIND, class E> void arrange(const Product& p, int64_t first, int rows, bool split, typename E::type* to) {
    typedef typename Input<KIND>::type From;
    const int64_t COUNT = E::COUNT, registers = ceil_div(p.in, COUNT);
    memset(to, 0, registers * rows * 64);
    for (int64_t s = 0; s < registers; ++s)
        for (int r = 0; r < rows && first + r < p.rows; ++r) {
            int64_t start = split ? s / 2 * 2 * COUNT + s % 2 : s * COUNT, by = split ? 2 : 1;
            const From* from = (const From*)p.x + (first + r) * p.in + start;
            for (int64_t k = 0; k < COUNT && start + k * by < p.in; ++k) copy(to + (s * rows + r) * COUNT + k, from + k * by);
        }
}

// sums (w_rows, rows) of weight rows row … row + w_rows and x's rows first … first + rows, rounded once to y.
template <int KIND> void store_sums(const Product& p, const float* sums, int64_t row, int w_rows, int64_t first, int rows) {
    for (int64_t n = row; n < smaller(row + w_rows, p.out); ++n)
        for (int64_t r = first; r < smaller(first + rows, p.rows); ++r) {
            float value = sums[(n - row) * rows + (r - first)] + (p.bias ? p.bias[n] : 0.0f);
            if (KIND == FLOAT32) ((float*)p.y)[r * p.out + n] = value;
            else ((uint16_t*)p.y)[r * p.out + n] = to_bfloat16(value);
        }
}

// Few rows: a weight meets all of them straight from the register it was looked up in.  W_ROWS rows of W share each load of x.
template <class E, int W_ROWS, int ROWS> void multiply_few(const Product& p, int64_t row, const typename E::type* x,
                                                           float* absmax, float* sums) {
    const int64_t blocks = p.in / p.w.blocksize, bytes = p.w.blocksize / 2;
    int64_t w_rows = smaller(W_ROWS, p.out - row);
    Floats code = load<Floats>(p.w.code), sum[W_ROWS][ROWS] = {};
    decode_absmax(p.w, row * blocks, w_rows * blocks, absmax);
    const uint8_t* packed[W_ROWS];
    const float* constants[W_ROWS];
    for (int n = 0; n < W_ROWS; ++n) {              // past the matrix's last row the last one is computed again, and dropped
        int64_t real = smaller(n, w_rows - 1);
        packed[n] = p.w.packed + (row + real) * p.in / 2;
        constants[n] = absmax + real * blocks;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        Words table[W_ROWS];
        for (int n = 0; n < W_ROWS; ++n) table[n] = E::table(code, constants[n][b]);
        for (int64_t at = b * bytes; at < (b + 1) * bytes; at += E::COUNT) {
            const typename E::type* pieces = x + 2 * at * ROWS;
            for (int n = 0; n < W_ROWS; ++n) {
                Words even, odd;
                E::weights(table[n], packed[n] + at, even, odd);
                __builtin_prefetch(packed[n] + at + W_ROWS * p.in / 2);         // the next W_ROWS rows, in time for them
                for (int r = 0; r < ROWS; ++r) {
                    sum[n][r] = E::step(sum[n][r], even, load<Words>(pieces + r * E::COUNT));
                    sum[n][r] = E::step(sum[n][r], odd, load<Words>(pieces + (ROWS + r) * E::COUNT));
                }
            }
        }
    }
    for (int n = 0; n < W_ROWS; ++n)
        for (int r = 0; r < ROWS; ++r) sums[n * ROWS + r] = total(sum[n][r]);
}

template <int KIND, int W_ROWS, int ROWS> void few(const Product& p) {
    typedef typename Multiplied<KIND>::type E;
    const int64_t panels = ceil_div(p.rows, ROWS), panel = ROWS * p.in;
    Scratch<typename E::type> x(panels * panel);
    for (int64_t i = 0; i < panels; ++i) arrange<KIND, E>(p, i * ROWS, ROWS, true, x.data + i * panel);
    parallel(p.threads, ceil_div(p.out, W_ROWS), [&](int64_t from, int64_t to) {
        Scratch<float> absmax(W_ROWS * (p.in / p.w.blocksize));
        float sums[W_ROWS * ROWS];
        for (int64_t row = from * W_ROWS; row < smaller(to * W_ROWS, p.out); row += W_ROWS)
            for (int64_t i = 0; i < panels; ++i) {
                multiply_few<E, W_ROWS, ROWS>(p, row, x.data + i * panel, absmax.data, sums);
                store_sums<KIND>(p, sums, row, W_ROWS, i * ROWS, ROWS);
            }
    });
}

// More rows, or blocks that straddle rows: some rows of W are unpacked into a tile that stays in the first caches, and meet a
// panel of x's rows at a time, so that a load of either serves several multiply-adds while all sums stay in registers.
#if defined(__AVX512F__)
const int PANEL = 6, TILE = 4;                      // 24 sums in 32 registers
#else
const int PANEL = 3, TILE = 2;                      // a sum takes two registers of 16 (AVX2), or four of 32 (NEON)
#endif

template <class E, int ROWS> void multiply_tile(const char* tile, int64_t stride, const typename E::type* x, int64_t registers,
                                                float* sums) {
    Floats sum[TILE][ROWS] = {};
    for (int64_t s = 0; s < registers; ++s) {
        Words weight[TILE];
        for (int n = 0; n < TILE; ++n) weight[n] = load<Words>(tile + n * stride + 64 * s);
        for (int r = 0; r < ROWS; ++r) {
            Words piece = load<Words>(x + (s * ROWS + r) * E::COUNT);
            for (int n = 0; n < TILE; ++n) sum[n][r] = E::step(sum[n][r], weight[n], piece);
        }
    }
    for (int n = 0; n < TILE; ++n)
        for (int r = 0; r < ROWS; ++r) sums[n * ROWS + r] = total(sum[n][r]);
}

// Weights first … last in the type they are multiplied in: as they are, or bfloat16 widened to float32.
template <int KIND> void unpack_for(const Packed& w, int64_t first, int64_t last, uint16_t* to) {
    unpack<KIND>(w, first, last, to);
}
template <int KIND> void unpack_for(const Packed& w, int64_t first, int64_t last, float* to) {
    if (KIND == FLOAT32) return unpack<FLOAT32>(w, first, last, (uint32_t*)to);
    uint16_t* half = (uint16_t*)to + (last - first);                // the second half of the room: widened from the front,
    unpack<BFLOAT16>(w, first, last, half);                         // each is read before its place is written
    for (int64_t i = 0; i < last - first; ++i) copy(to + i, half + i);
}

template <int KIND> void many(const Product& p) {
    typedef typename Multiplied<KIND>::type E;
    typedef typename E::type T;
    const int64_t registers = ceil_div(p.in, E::COUNT), panels = ceil_div(p.rows, PANEL), panel = PANEL * registers * E::COUNT;
    // Trap: rows a power of two apart share a few places of the cache; an odd number of cache lines between them doesn't.
    const int64_t stride = 64 * (registers | 1);
    Scratch<T> x(panels * panel);
    for (int64_t i = 0; i < panels; ++i) arrange<KIND, E>(p, i * PANEL, PANEL, false, x.data + i * panel);
    parallel(p.threads, ceil_div(p.out, TILE), [&](int64_t from, int64_t to) {
        Scratch<char> tile(TILE * stride);
        memset(tile.data, 0, TILE * stride);
        float sums[TILE * PANEL];
        for (int64_t row = from * TILE; row < smaller(to * TILE, p.out); row += TILE) {
            for (int64_t n = row; n < smaller(row + TILE, p.out); ++n)
                unpack_for<KIND>(p.w, n * p.in, (n + 1) * p.in, (T*)(tile.data + (n - row) * stride));
            for (int64_t i = 0; i < panels; ++i) {
                multiply_tile<E, PANEL>(tile.data, stride, x.data + i * panel, registers, sums);
                store_sums<KIND>(p, sums, row, TILE, i * PANEL, PANEL);
            }
        }
    });
}

// With one or two rows of x memory is the bound, and the more rows of W are read at once, the better it is used.
#if defined(__AVX512F__)
const int STREAMS = 8;
#else
const int STREAMS = 4;                              // as many sums and tables as there are registers
#endif

template <int KIND> void product(const Product& p) {
    const int64_t STEP = 2 * Multiplied<KIND>::type::COUNT;
    bool whole = p.in % p.w.blocksize == 0 && p.w.blocksize % STEP == 0;        // rows are whole blocks, and these registers
    if (!whole || p.rows > 16) many<KIND>(p);
    else if (p.rows == 1) few<KIND, STREAMS, 1>(p);
    else if (p.rows == 2) few<KIND, STREAMS, 2>(p);
    else if (p.rows <= 4) few<KIND, 4, 4>(p);
    else few<KIND, 2, 8>(p);
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
template <int KIND> bool quantize(const void* x, int64_t first, int64_t last, Floats midpoints, int64_t blocksize,
                                  float* absmax, uint8_t* packed) {
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
            pairs = pairs << 4 | pairs >> 32;
            if (full) store_bytes(packed + i / 2, pairs);
            else
                for (int64_t k = i; k < stop; k += 2)
                    packed[k / 2] = (uint8_t)pairs[(k - i) / 2] & (k + 1 < stop ? 0xff : 0xf0);     // half a byte is not ours
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
    parallel(n < ALONE ? 1 : threads, ceil_div(n, part), [&](int64_t from, int64_t to) {
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
    Product p = {*w, out, in, x, rows, bias, y, out * in < 4 * ALONE / (rows + 1) ? 1 : threads};
    if (kind == FLOAT32) product<FLOAT32>(p);
    else product<BFLOAT16>(p);
}

// x (n) of `kind` -> absmax (blocks) and packed ((n + 1) / 2).  Returns whether all of x is finite; else both mean nothing.
int nf4_quantize(const void* x, int kind, int64_t n, const float* code, int64_t blocksize, float* absmax, uint8_t* packed,
                 int padding, int threads) {
    if (kind == FLOAT32) return quantize_all<FLOAT32>(x, n, code, blocksize, absmax, packed, padding, threads);
    if (kind == BFLOAT16) return quantize_all<BFLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
    return quantize_all<FLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
}

}  // extern "C"
