// NF4's blocks unpacked, equal to reference.py to the bit; and the threads that share such work.
//
//     weight[i] = code[nibble i] * absmax[i / blocksize]           packed[i / 2] holds two nibbles, the even i in the high one
//
// All weights of a block share absmax, so the table of sixteen is scaled (and rounded to 16 bits, if so wanted) once a block,
// sixteen products in place of sixty-four, and holds the finished weights.
//
// Trap: floating-point contraction must be off (-ffp-contract=off).  The reference rounds after the product and again after
// the sum in `dynamic[code] * nested + offset`; a fused multiply-add there would be another absmax.

#pragma once

#include "nf4_vectors.h"

namespace {

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

// Parts that threads take as they come: where one may be held up, as by a thread that reads ahead.  No part's result may depend
// on another's.
template <class Body> void deal(int threads, int64_t parts, Body body) {
    if (threads > parts) threads = parts > 0 ? (int)parts : 1;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part) body(part);
        return;
    }
#endif
    for (int64_t part = 0; part < parts; ++part) body(part);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// COUNT numbers, and room for a last register of them.
template <int COUNT> struct Sums {
    static const int ROOM = (COUNT + LANES - 1) / LANES * LANES;
    float at[ROOM];
};

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

// Constants of blocks first … first + count out of what was looked up for them, in place.
inline void scale_absmax(const Packed& w, int64_t first, int64_t count, float* absmax) {
    for (int64_t i = 0; i < count;) {
        int64_t group = (first + i) / w.nested_blocksize;
        int64_t stop = smaller(count, (group + 1) * w.nested_blocksize - first);
        const float scale = w.nested_absmax[group], offset = w.offset;
        for (; i + LANES <= stop; i += LANES) store(absmax + i, load<Floats>(absmax + i) * scale + offset);
        for (; i < stop; ++i) absmax[i] = absmax[i] * scale + offset;
    }
}

// dynamic[code], moved as an integer: a product leaves the units for that idle.
INLINE void look_up(const float* dynamic, const uint8_t* codes, int64_t count, float* absmax) {
    for (int64_t i = 0; i < count; ++i) memcpy(absmax + i, dynamic + codes[i], sizeof *absmax);
}

// The float32 constants of blocks first … first + count.
inline void decode_absmax(const Packed& w, int64_t first, int64_t count, float* absmax) {
    if (w.absmax) {
        memcpy(absmax, w.absmax + first, count * sizeof(float));
        return;
    }
    look_up(w.dynamic, w.nested_codes + first, count, absmax);
    scale_absmax(w, first, count, absmax);
}

// The constants of rows that a thread takes `at_once`.  Those of the next rows may be looked up while these are multiplied
// (`looks_ahead`): a loop over blocks then does `look_up(dynamic, codes + i, 1, looked_up + i)` for all i < at_once · blocks.
// It asks nothing, as a branch would cost what this saves: where there are fewer next rows it looks up others, for nobody.
struct RowConstants {
    const Packed& w;
    const int64_t blocks, at_once, last;                        // blocks of a row; and the row behind the thread's last
    const bool looks_ahead;
    Scratch<float> room;
    const float* dynamic;
    const uint8_t* codes;
    float *looked_up, *taken;
    int64_t ready = -1;                                         // the row from which on they are looked up by now, or none

    RowConstants(const Packed& w, int64_t blocks, int64_t at_once, int64_t last, bool looks_ahead)
        : w(w), blocks(blocks), at_once(at_once), last(last), looks_ahead(looks_ahead), room(3 * at_once * blocks),
          dynamic(w.absmax ? room.data : w.dynamic), looked_up(room.data), taken(looked_up + at_once * blocks) {
        codes = (uint8_t*)(taken + at_once * blocks);           // zeros, for a weight whose constants are no codes
        memset(room.data, 0, 3 * at_once * blocks * sizeof(float));
    }

    // Those of the rows from `row` on, in the order in which the thread takes its rows.
    const float* take(int64_t row) {
        if (w.absmax) return w.absmax + row * blocks;
        const int64_t first = row * blocks, count = smaller(at_once, last - row) * blocks;
        if (row != ready) look_up(w.dynamic, w.nested_codes + first, count, looked_up);
        scale_absmax(w, first, count, looked_up);
        float* own = looked_up;
        looked_up = taken;
        taken = own;
        const bool follow = looks_ahead && row + 2 * at_once <= last;
        ready = follow ? row + at_once : -1;
        if (follow) codes = w.nested_codes + first + count;
        return own;
    }
};

// A block's sixteen weights in the output's type, each in 32 bits; 16-bit ones stand in both halves.
template <int KIND> INLINE Table scaled_table(const Table& code, float absmax) {
    Table table;
    UNROLL for (int i = 0; i < PARTS; ++i) {
        Floats part = (Floats)code.part[i] * absmax;
        if (KIND == FLOAT32) {
            table.part[i] = (Words)part;
        } else {
            Words half = KIND == BFLOAT16 ? to_bfloat16(part) : to_float16(part);
            table.part[i] = half | half << 16;
        }
    }
    return table;
}

template <int KIND> struct Stored { typedef uint16_t type; };
template <> struct Stored<FLOAT32> { typedef uint32_t type; };

// A register of weights from the bytes at `from`.
template <int KIND> INLINE Words unpack_register(const Table& table, const uint8_t* from) {
    return KIND == FLOAT32 ? lookup_in_order(table, from) : lookup_halves_in_order(table, from);
}

// Weights first … last of one block to `out`; they may start and end within a byte, and end within a register.
template <int KIND, class T>
__attribute__((noinline)) void unpack_piece(const Table& table, const uint8_t* packed, int64_t first, int64_t last, T* out) {
    const int64_t STEP = WIDTH / sizeof(T);
    if (first % 2) *out++ = (T)entry(table, packed[first++ / 2] & 15);
    for (; first + STEP <= last; first += STEP, out += STEP) store(out, unpack_register<KIND>(table, packed + first / 2));
    for (; first + 1 < last; first += 2) {
        *out++ = (T)entry(table, packed[first / 2] >> 4);
        *out++ = (T)entry(table, packed[first / 2] & 15);
    }
    if (first < last) *out++ = (T)entry(table, packed[first / 2] >> 4);
}

// Weights first … last of the flattened tensor to `out`, whatever blocks they lie in; `past_cache` where `out` starts a line.
template <int KIND, class T = typename Stored<KIND>::type>
void unpack(const Packed& w, int64_t first, int64_t last, T* out, bool past_cache = false) {
    const int64_t AT_ONCE = 128, STEP = WIDTH / sizeof(T), blocksize = w.blocksize;
    const uint8_t* packed = w.packed;
    const Table code = load_table(w.code);
    const bool whole = blocksize % STEP == 0 && first % blocksize == 0;         // blocks are whole registers, but for the last
    float absmax[AT_ONCE];
    for (int64_t block = first / blocksize; first < last; block += AT_ONCE) {
        int64_t blocks = smaller(AT_ONCE, (last - 1) / blocksize + 1 - block);
        decode_absmax(w, block, blocks, absmax);
        for (int64_t b = 0; b < blocks; ++b) {
            const Table table = scaled_table<KIND>(code, absmax[b]);
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
        stores_are_seen();
    });
}

}  // namespace
