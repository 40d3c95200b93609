// Products with NF4 weights on the CPU.
//
// y = x Wᵀ + bias, or x W, and W never lies in memory: weights live in registers, or for some microseconds in the first caches.
//
// The idea of all these files: NF4 has sixteen values, and sixteen float32 are exactly one 512-bit register.  The table *is* a
// register, and looking sixteen weights up is one permutation of it (nf4_vectors.h; with smaller registers it is two or four).
// Scaling the table once a block makes the lookups yield finished weights (nf4_blocks.h).
//
// The types below say what one register of weights holds, how a scaled table and such registers are made, and how a register
// of weights meets one of x.
//
// 2 · COUNT weights make two registers, `even` (by the high nibbles) and `odd` (by the low ones).  Putting them in order would
// cost more than looking them up, so x is split the same way instead, once a call (`arrange`).  For many rows of x AVX-512 has
// another way (nf4_turned.h).
//
// Lesson 17 explains it.

#include "nf4_call.h"
#include "nf4_one_row.h"
#include "nf4_turned.h"

namespace {

struct Singles {
    typedef float type;
    static const int WEIGHT = FLOAT32;                          // what weights are rounded to
    static const int COUNT = LANES;
    static const int FEW = 16;                                  // rows of x up to which `few` is the faster way
    static const bool KEPT_PAYS = false;                        // to read weights again takes longer than to look them up again
    static INLINE Table table(const Table& code, float absmax) { return scaled_table<FLOAT32>(code, absmax); }
    static INLINE void weights(const Table& table, const uint8_t* from, Words& even, Words& odd) {
        lookup_bytes(table, from, even, odd);
    }
    static INLINE Floats step(Floats sum, Words weight, Words x) { return multiply_add(sum, (Floats)weight, (Floats)x); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// bfloat16: twice as many to a register, and two products a place and instruction, summed in float32.
// Trap: these instructions take subnormal numbers (below 1.2e-38) for zero, in the table as in the product.
struct ShortSingles {
    typedef uint16_t type;
    static const int WEIGHT = BFLOAT16, COUNT = 32, FEW = 48;
    static const bool KEPT_PAYS = true;                         // for sixteen rows a fifth of the time
    static INLINE Table table(const Table& code, float absmax) {
        __m512 table = (__m512)((Floats)code.part[0] * absmax);
        return Table{{(Words)_mm512_cvtne2ps_pbh(table, table)}};   // twice: an index has five bits here
    }
    static INLINE void weights(const Table& table, const uint8_t* from, Words& even, Words& odd) {
        __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
        even = (Words)_mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), (__m512i)table.part[0]);
        odd = (Words)_mm512_permutexvar_epi16(byte, (__m512i)table.part[0]);
    }
    static INLINE Floats step(Floats sum, Words weight, Words x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)weight, (__m512bh)(__m512i)x);
    }
};
#else
// bfloat16 without such instructions: the weights are rounded to it, and held and multiplied in float32.
struct ShortSingles : Singles {
    static const int WEIGHT = BFLOAT16;
    static INLINE Table table(const Table& code, float absmax) {
        Table table = scaled_table<FLOAT32>(code, absmax);
        UNROLL for (int i = 0; i < PARTS; ++i) table.part[i] = to_bfloat16((Floats)table.part[i]) << 16;
        return table;
    }
};
#endif

#if defined(__AVX512BW__)
const Words EVERY_SECOND = {0x20000, 0x60004, 0xa0008, 0xe000c, 0x120010, 0x160014, 0x1a0018, 0x1e001c,     // halves 0, 2, 4
                            0x220020, 0x260024, 0x2a0028, 0x2e002c, 0x320030, 0x360034, 0x3a0038, 0x3e003c};
#endif

// x's rows first … first + rows, as the loops below read them: a register of each row, then the next register of each.
// With `split` registers 2s and 2s + 1 hold the even and the odd elements of what they would hold otherwise.
template <int KIND, class E> void arrange(const Product& p, int64_t first, int rows, bool split, typename E::type* to) {
    typedef typename Input<KIND>::type From;
    const int64_t COUNT = E::COUNT, registers = ceil_div(p.in, COUNT);
    memset(to, 0, registers * rows * WIDTH);
    for (int64_t s = 0; s < registers; ++s)
        for (int r = 0; r < rows && first + r < p.rows; ++r) {
            int64_t start = split ? s / 2 * 2 * COUNT + s % 2 : s * COUNT, by = split ? 2 : 1;
            const From* from = (const From*)p.x + (first + r) * p.in + start;
            typename E::type* piece = to + (s * rows + r) * COUNT;
            const int64_t count = smaller(COUNT, ceil_div(p.in - start, by));
#if defined(__AVX512BW__)
            if (split && sizeof(From) == 2 && sizeof *piece == 2 && count == 32) {
                const __m512i low = _mm512_loadu_si512(from - s % 2), high = _mm512_loadu_si512(from - s % 2 + 32);
                store(piece, _mm512_permutex2var_epi16(low, (__m512i)(EVERY_SECOND + (uint32_t)(s % 2 * 0x10001)), high));
                continue;
            }
#endif
            if (split)
                for (int64_t k = 0; k < count; ++k) copy(piece + k, from + 2 * k);
            else if (sizeof(From) == sizeof *piece)
                memcpy(piece, from, smaller(COUNT, p.in - start) * sizeof(From));
            else
                for (int64_t k = 0; k < count; ++k) copy(piece + k, from + k);
        }
}

// sums (ROWS, W_ROWS) of x's rows first … and weight rows row …, as far as there are such, to y.
template <int KIND, int W_ROWS, int ROWS> void store_sums(const Product& p, const Sums<W_ROWS * ROWS>& sums, int64_t row,
                                                          int64_t first) {
    typedef typename Stored<KIND>::type To;
    const int64_t w_rows = smaller(W_ROWS, p.out - row), rows = smaller(ROWS, p.rows - first);
    Sums<W_ROWS * ROWS> all = sums;
    if (p.bias)
        for (int64_t r = 0; r < ROWS; ++r)
            for (int64_t n = 0; n < w_rows; ++n) all.at[r * W_ROWS + n] += p.bias[row + n];
    To rounded[Sums<W_ROWS * ROWS>::ROOM];
    round_sums<KIND, Sums<W_ROWS * ROWS>::ROOM>(all.at, rounded);
    for (int64_t r = 0; r < rows; ++r) put<W_ROWS>((To*)p.y + (first + r) * p.out + row, rounded + r * W_ROWS, w_rows);
}

// Bytes of packed weights that are asked for before they are needed, beyond the next rows: into L2, since L1 is x's.  Measured
// from DRAM: each line asked for where its own row is read, into L1, takes a fifth to a third longer.
const int64_t AHEAD = 4096;

// Few rows: a weight meets ROWS of them straight from the register it was looked up in.  W_ROWS rows of W share each load of x.
// Where there are more than ROWS, the next ones meet it from `kept`, which is small enough to stay in the first caches, or in a
// register again.
enum Weights { USED_ONCE, KEPT, USED_AGAIN };

template <class E, int W_ROWS, int ROWS, Weights WEIGHTS>
void multiply_few(const Product& p, int64_t row, const typename E::type* x, const float* absmax,
                  const RowConstants& row_constants, char* kept, float* sums) {
    const int64_t blocks = p.in / p.w.blocksize, bytes = p.w.blocksize / 2;
    int64_t w_rows = smaller(W_ROWS, p.out - row);
    const Table code = load_table(p.w.code);
    const float* dynamic = row_constants.dynamic;
    const uint8_t* codes = row_constants.codes;
    float* looked_up = row_constants.looked_up;
    Floats sum[W_ROWS * ROWS] = {};
    const uint8_t* packed[W_ROWS];
    const float* constants[W_ROWS];
    UNROLL for (int n = 0; n < W_ROWS; ++n) {       // past the matrix's last row the last one is computed again, and dropped
        int64_t real = smaller(n, w_rows - 1);
        packed[n] = p.w.packed + (row + real) * p.in / 2;
        constants[n] = absmax + real * blocks;
    }
    const uint8_t* ahead = p.w.packed + (row + W_ROWS) * p.in / 2 + AHEAD;      // read in order, though W_ROWS streams use it
    for (int64_t b = 0; b < blocks; ++b) {
        Table table[W_ROWS];
        if (WEIGHTS != USED_AGAIN) {
            for (const uint8_t* stop = ahead + W_ROWS * bytes; ahead < stop; ahead += 64) __builtin_prefetch(ahead, 0, 2);
            UNROLL for (int n = 0; n < W_ROWS; ++n) look_up(dynamic, codes + b * W_ROWS + n, 1, looked_up + b * W_ROWS + n);
            UNROLL for (int n = 0; n < W_ROWS; ++n) table[n] = E::table(code, constants[n][b]);
        }
        for (int64_t at = b * bytes; at < (b + 1) * bytes; at += E::COUNT) {
            const typename E::type* pieces = x + 2 * at * ROWS;
            if (WEIGHTS == USED_ONCE) {
                UNROLL for (int n = 0; n < W_ROWS; ++n) {
                    Words even, odd;
                    E::weights(table[n], packed[n] + at, even, odd);
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        Floats& place = sum[r * W_ROWS + n];
                        place = E::step(place, even, load<Words>(pieces + r * E::COUNT));
                        place = E::step(place, odd, load<Words>(pieces + (ROWS + r) * E::COUNT));
                    }
                }
                continue;
            }
            Words even[W_ROWS], odd[W_ROWS];
            UNROLL for (int n = 0; n < W_ROWS; ++n) {
                char* place = kept + 2 * n * WIDTH;
                if (WEIGHTS == KEPT) {
                    E::weights(table[n], packed[n] + at, even[n], odd[n]);
                    store(place, even[n]);
                    store(place + WIDTH, odd[n]);
                } else {
                    even[n] = load<Words>(place);
                    odd[n] = load<Words>(place + WIDTH);
                }
            }
            kept += 2 * W_ROWS * WIDTH;
            UNROLL for (int r = 0; r < ROWS; ++r) {
                Words piece = load<Words>(pieces + r * E::COUNT);
                UNROLL for (int n = 0; n < W_ROWS; ++n) sum[r * W_ROWS + n] = E::step(sum[r * W_ROWS + n], even[n], piece);
            }
            UNROLL for (int r = 0; r < ROWS; ++r) {
                Words piece = load<Words>(pieces + (ROWS + r) * E::COUNT);
                UNROLL for (int n = 0; n < W_ROWS; ++n) sum[r * W_ROWS + n] = E::step(sum[r * W_ROWS + n], odd[n], piece);
            }
        }
    }
    totals<W_ROWS * ROWS>(sum, sums);
}

template <int KIND, class E, int W_ROWS, int ROWS, bool KEEPS = false> void few(const Product& p) {
    const int64_t panels = ceil_div(p.rows, ROWS), panel = ROWS * p.in;
    Scratch<typename E::type> x(panels * panel);
    for (int64_t i = 0; i < panels; ++i) arrange<KIND, E>(p, i * ROWS, ROWS, true, x.data + i * panel);
    parallel(p.threads, ceil_div(p.out, W_ROWS), [&](int64_t from, int64_t to) {
        const int64_t last = smaller(to * W_ROWS, p.out);
        RowConstants constants(p.w, p.in / p.w.blocksize, W_ROWS, last, true);
        Scratch<typename E::type> kept(KEEPS && panels > 1 ? W_ROWS * p.in : 0);
        Sums<W_ROWS * ROWS> sums;
        for (int64_t row = from * W_ROWS; row < last; row += W_ROWS) {
            const float* absmax = constants.take(row);
            for (int64_t i = 0; i < panels; ++i) {
                auto multiply = multiply_few<E, W_ROWS, ROWS, USED_ONCE>;
                if constexpr (KEEPS)
                    if (panels > 1)
                        multiply = i ? multiply_few<E, W_ROWS, ROWS, USED_AGAIN> : multiply_few<E, W_ROWS, ROWS, KEPT>;
                multiply(p, row, x.data + i * panel, absmax, constants, (char*)kept.data, sums.at);
                store_sums<KIND, W_ROWS, ROWS>(p, sums, row, i * ROWS);
            }
        }
    });
}

// More rows, or blocks that straddle rows: some rows of W are unpacked into a tile that stays in the first caches, and meet a
// panel of x's rows at a time, so that a load of either serves several multiply-adds while all sums stay in registers.
//
// An x that is too large for the second cache would come from the third for each tile.  It is taken a stretch of columns at a
// time instead, of which a panel's part stays in the first cache while it meets a group of tiles.
//
// What a group of tiles gives is a cache line of each row of y, written at once: rows of y a power of two apart share a few
// places of the cache, and a line that is written bit by bit would be pushed out in between.
#if defined(__AVX512F__) || defined(NEON)
const int PANEL = 6, TILE = 4;                      // 24 sums in 32 registers
#else
const int PANEL = 3, TILE = 4;                      // 12 in 16
#endif
const int GROUP = 8;                                // tiles
const int64_t SECOND_CACHE = 768 << 10;             // bytes of x that it holds beside a tile
const int64_t STRETCH = 4096 / WIDTH;               // registers

// Sums of a tile and a panel over some registers, or added to what is there; a row's AT_ONCE numbers behind the row's before.
template <class E, int AT_ONCE> void multiply_tile(const char* tile, int64_t stride, const typename E::type* x,
                                                   int64_t registers, bool add, float* sums) {
    Floats sum[PANEL * TILE] = {};
    for (int64_t s = 0; s < registers; ++s) {
        Words weight[TILE];
        UNROLL for (int n = 0; n < TILE; ++n) weight[n] = load<Words>(tile + n * stride + WIDTH * s);
        UNROLL for (int r = 0; r < PANEL; ++r) {
            Words piece = load<Words>(x + (s * PANEL + r) * E::COUNT);
            UNROLL for (int n = 0; n < TILE; ++n) sum[r * TILE + n] = E::step(sum[r * TILE + n], weight[n], piece);
        }
    }
    float total[PANEL * TILE];
    totals<PANEL * TILE>(sum, total);
    for (int r = 0; r < PANEL; ++r)
        UNROLL for (int n = 0; n < TILE; ++n)
            sums[r * AT_ONCE + n] = add ? sums[r * AT_ONCE + n] + total[r * TILE + n] : total[r * TILE + n];
}

// Weights first … last in the type they are multiplied in, in order: as they are, or bfloat16 widened to float32.
template <int KIND> void unpack_for(const Packed& w, int64_t first, int64_t last, uint16_t* to) {
    unpack<KIND>(w, first, last, to);
}
template <int KIND> void unpack_for(const Packed& w, int64_t first, int64_t last, float* to) {
    if (KIND == FLOAT32) return unpack<FLOAT32>(w, first, last, (uint32_t*)to);
    uint16_t* half = (uint16_t*)to + (last - first);                // the second half of the room: widened from the front,
    unpack<BFLOAT16>(w, first, last, half);                         // each is read before its place is written
    for (int64_t i = 0; i < last - first; ++i) copy(to + i, half + i);
}

// The same as registers of even and of odd ones, which takes less; `first`, `last` and all blocks are pairs of registers.
template <class E> void unpack_split(const Packed& w, int64_t first, int64_t last, typename E::type* to) {
    const Table code = load_table(w.code);
    float absmax[128];
    int64_t block = first / w.blocksize, ready = block;             // constants of `block` … `ready` are there
    for (const float* constant = absmax; first < last; ++block, ++constant) {
        if (block == ready) {
            ready = smaller(block + 128, (last - 1) / w.blocksize + 1);
            decode_absmax(w, block, ready - block, absmax);
            constant = absmax;
        }
        const Table table = E::table(code, *constant);
        const uint8_t* packed = w.packed + first / 2;
        __builtin_prefetch(packed + 1024);
        for (const int64_t stop = smaller(last, (block + 1) * w.blocksize); first < stop; first += 2 * E::COUNT) {
            Words even, odd;
            E::weights(table, packed, even, odd);
            store(to, even);
            store(to + E::COUNT, odd);
            to += 2 * E::COUNT;
            packed += E::COUNT;
        }
    }
}

template <int KIND, class E> void many(const Product& p, bool split) {
    typedef typename E::type T;
    const int AT_ONCE = GROUP * TILE;                               // rows of W
    const int64_t registers = ceil_div(p.in, E::COUNT), panels = ceil_div(p.rows, PANEL), panel = PANEL * registers * E::COUNT;
    const bool fits = panels * panel * (int64_t)sizeof(T) <= SECOND_CACHE;
    const int64_t stretch = fits ? registers : smaller(STRETCH, registers), tiles = fits ? 1 : GROUP;   // that meet it together
    // Trap: rows a power of two apart share a few places of the cache; an odd number of cache lines between them doesn't.
    const int64_t stride = 64 * (ceil_div(stretch * WIDTH, 64) | 1);
    Scratch<T> x(panels * panel);
    for (int64_t i = 0; i < panels; ++i) arrange<KIND, E>(p, i * PANEL, PANEL, split, x.data + i * panel);
    parallel(p.threads, ceil_div(p.out, AT_ONCE), [&](int64_t from, int64_t to) {
        Scratch<char> tile(tiles * TILE * stride);
        Scratch<float> sums(panels * PANEL * AT_ONCE);              // (rows of x, rows of W)
        memset(tile.data, 0, tiles * TILE * stride);
        for (int64_t row = from * AT_ONCE; row < smaller(to * AT_ONCE, p.out); row += AT_ONCE) {
            const int64_t w_rows = smaller(AT_ONCE, p.out - row);
            for (int64_t s = 0; s < registers; s += stretch) {
                const int64_t width = smaller(stretch, registers - s), count = smaller(width * E::COUNT, p.in - s * E::COUNT);
                for (int64_t first = 0; first < w_rows; first += tiles * TILE) {
                    const int64_t some = smaller(tiles * TILE, w_rows - first);
                    for (int64_t n = 0; n < some; ++n) {
                        const int64_t start = (row + first + n) * p.in + s * E::COUNT;
                        T* weights = (T*)(tile.data + n * stride);
                        if (split) unpack_split<E>(p.w, start, start + count, weights);
                        else unpack_for<E::WEIGHT>(p.w, start, start + count, weights);
                        for (int64_t k = count; k < width * E::COUNT; ++k) weights[k] = 0;
                    }
                    for (int64_t i = 0; i < panels; ++i)
                        for (int64_t n = 0; n < some; n += TILE)
                            multiply_tile<E, AT_ONCE>(tile.data + n * stride, stride, x.data + i * panel + s * PANEL * E::COUNT,
                                                      width, s > 0, sums.data + i * PANEL * AT_ONCE + first + n);
                }
            }
            store_lines<KIND, AT_ONCE>(p, sums.data, row, w_rows);
        }
    });
}

// Rows of W that are read at once, for one row of x, two, four and eight.  With one row memory is the bound, and the more
// streams, the better it is used; with more what fits the registers.
#if defined(__AVX512F__)
const int FOR_ONE = 12, FOR_TWO = 8, FOR_FOUR = 4, FOR_EIGHT = 2;
#else
const int FOR_ONE = 4, FOR_TWO = 4, FOR_FOUR = 2, FOR_EIGHT = 1;    // sums, tables, and a register of even and of odd weights
#endif                                                              // are 16 or fewer

template <int KIND, class E> void product(const Product& p) {
    bool whole = p.in % p.w.blocksize == 0 && p.w.blocksize % (2 * E::COUNT) == 0;  // rows are blocks, and these registers
#if defined(__AVX512F__)
    if (whole && p.rows > E::FEW) return turned_in_parts<KIND, E>(p, false);
#endif
    if (!whole || p.rows > E::FEW) return many<KIND, E>(p, whole);
    if constexpr (E::WEIGHT == FLOAT32)                         // see `one_short_row`
        if (p.rows == 1) return few<KIND, E, FOR_ONE, 1>(p);
    if (p.rows <= 2) few<KIND, E, FOR_TWO, 2>(p);
    else if (p.rows <= 4 || E::KEPT_PAYS) few<KIND, E, FOR_FOUR, 4, E::KEPT_PAYS>(p);
    else few<KIND, E, FOR_EIGHT, 8>(p);
}

// One row of bfloat16 meets the weights as they are, in float32.
void one_short_row(const Product& p) {
    Scratch<float> x(p.in), y(p.out);
    int64_t i = 0;
    for (; i + LANES <= p.in; i += LANES) store(x.data + i, load_floats<BFLOAT16>(p.x, i));
    for (; i < p.in; ++i) copy(x.data + i, (const uint16_t*)p.x + i);
#if defined(__AVX512F__)
    if (one_row(p.w, p.out, p.in, x.data, p.threads, [&](int64_t row, const Sums<ONE_ROWS>& sums) {
            store_sums<BFLOAT16, ONE_ROWS, 1>(p, sums, row, 0);
        })) return;
#endif
    product<FLOAT32, Singles>(Product{p.w, p.out, p.in, x.data, 1, p.bias, y.data, p.threads});
    for (i = 0; i < p.out; ++i) ((uint16_t*)p.y)[i] = to_bfloat16(y.data[i]);
}

}  // namespace

// y (rows, out) = x (rows, in) Wᵀ + bias, x and y both float32 or both bfloat16; bias float32 (out) or null.
extern "C" void nf4_product(const Packed* w, int64_t out, int64_t in, const void* x, int64_t rows, int kind, const float* bias,
                            void* y, int threads) {
    Product p = {*w, out, in, x, rows, bias, y, out * in < 4 * ALONE / (rows + 1) ? 1 : threads};
    if (kind == FLOAT32) product<FLOAT32, Singles>(p);
    else if (rows == 1) one_short_row(p);
    else product<BFLOAT16, ShortSingles>(p);
}

// y (rows, in) = x (rows, out) W, of the same types; or false, and nothing was done.
extern "C" int nf4_product_transposed(const Packed* w, int64_t out, int64_t in, const void* x, int64_t rows, int kind, void* y,
                                int threads) {
#if defined(__AVX512F__)
    if (in % w->blocksize == 0 && w->blocksize % 64 == 0) {
        Product p = {*w, in, out, x, rows, nullptr, y, out * in < 4 * ALONE / (rows + 1) ? 1 : threads};
        if (kind == FLOAT32) turned_in_parts<FLOAT32, Singles>(p, true);
        else turned_in_parts<BFLOAT16, ShortSingles>(p, true);
        return 1;
    }
#endif
    return 0;
}
