// y = x Wᵀ for a few rows of x and a dense W in bfloat16, as the head of a model is: bound by the reading of W.
//
// Torch's product of one row reads W at half the speed of a plain read.  Here some rows of W are read side by side, as with
// weights of 4 bits, and what comes next is asked for in the order of memory.

#include "nf4_blocks.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

namespace {

const int DENSE_ROWS = 4, DENSE_STREAMS = 6;                    // of x, and of W: 24 sums in 32 registers
const int DENSE_PANEL = 8, DENSE_TILE = 3, DENSE_MOST = 16;     // the same for more rows of x, a panel after the other
const int64_t DENSE_AHEAD = 16384;                              // bytes

struct Dense {
    const uint16_t *w, *x;                                      // (out, in), (rows, in)
    int64_t out, in, rows;
    uint16_t* y;                                                // (rows, out)
};

// Rows row … row + STREAMS of W; past the last one it is computed again, and dropped.
template <int ROWS> void multiply_dense(const Dense& p, int64_t row) {
    const int STREAMS = DENSE_STREAMS;
    const int64_t w_rows = smaller(STREAMS, p.out - row), whole = p.in / 32 * 32;
    const __mmask32 rest = (__mmask32)((1ull << (p.in - whole)) - 1);
    const uint16_t* w[STREAMS];
    UNROLL for (int n = 0; n < STREAMS; ++n) w[n] = p.w + (row + smaller(n, w_rows - 1)) * p.in;
    const char* ahead = (const char*)(p.w + (row + STREAMS) * p.in) + DENSE_AHEAD;
    Floats sum[STREAMS * ROWS] = {};
    for (int64_t i = 0; i < p.in; i += 32) {
        const __mmask32 some = i < whole ? ~(__mmask32)0 : rest;
        UNROLL for (int n = 0; n < STREAMS; ++n) __builtin_prefetch(ahead + 64 * n, 0, 2);
        ahead += 64 * STREAMS;
        __m512bh x[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r) x[r] = (__m512bh)_mm512_maskz_loadu_epi16(some, p.x + r * p.in + i);
        UNROLL for (int n = 0; n < STREAMS; ++n) {
            const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(some, w[n] + i);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                Floats& place = sum[n * ROWS + r];
                place = (Floats)_mm512_dpbf16_ps((__m512)place, weight, x[r]);
            }
        }
    }
    float total[STREAMS * ROWS];
    totals<STREAMS * ROWS>(sum, total);
    for (int n = 0; n < w_rows; ++n)
        for (int r = 0; r < ROWS; ++r) p.y[r * p.out + row + n] = to_bfloat16(total[n * ROWS + r]);
}

template <int ROWS> void dense(const Dense& p, int threads) {
    parallel(threads, ceil_div(p.out, DENSE_STREAMS), [&](int64_t from, int64_t to) {
        for (int64_t group = from; group < to; ++group) multiply_dense<ROWS>(p, group * DENSE_STREAMS);
    });
}

// Rows row … row + TILE of W and a panel of x's rows, of which a register each lie side by side (rows of x a power of two apart
// would share a few places of the cache, and push each other out).
void multiply_panel(const Dense& p, int64_t row, const uint16_t* x, int64_t first) {
    const int64_t w_rows = smaller(DENSE_TILE, p.out - row), rows = smaller(DENSE_PANEL, p.rows - first);
    const uint16_t* w[DENSE_TILE];
    UNROLL for (int n = 0; n < DENSE_TILE; ++n) w[n] = p.w + (row + smaller(n, w_rows - 1)) * p.in;
    const char* ahead = (const char*)(p.w + (row + DENSE_TILE) * p.in) + DENSE_AHEAD;
    Floats sum[DENSE_TILE * DENSE_PANEL] = {};
    for (int64_t i = 0; i < p.in; i += 32) {
        const __mmask32 some = p.in - i >= 32 ? ~(__mmask32)0 : (__mmask32)((1ull << (p.in - i)) - 1);
        __m512bh weight[DENSE_TILE];
        UNROLL for (int n = 0; n < DENSE_TILE; ++n) {
            if (!first) __builtin_prefetch(ahead + 2 * DENSE_TILE * i + 64 * n, 0, 2);
            weight[n] = (__m512bh)_mm512_maskz_loadu_epi16(some, w[n] + i);
        }
        UNROLL for (int r = 0; r < DENSE_PANEL; ++r) {
            const __m512bh piece = (__m512bh)_mm512_load_si512(x + i * DENSE_PANEL + 32 * r);
            UNROLL for (int n = 0; n < DENSE_TILE; ++n) {
                Floats& place = sum[n * DENSE_PANEL + r];
                place = (Floats)_mm512_dpbf16_ps((__m512)place, weight[n], piece);
            }
        }
    }
    float total[DENSE_TILE * DENSE_PANEL];
    totals<DENSE_TILE * DENSE_PANEL>(sum, total);
    for (int n = 0; n < w_rows; ++n)
        for (int r = 0; r < rows; ++r) p.y[(first + r) * p.out + row + n] = to_bfloat16(total[n * DENSE_PANEL + r]);
}

void dense_panels(const Dense& p, int threads) {
    const int64_t pieces = ceil_div(p.in, 32), panels = ceil_div(p.rows, DENSE_PANEL), panel = pieces * 32 * DENSE_PANEL;
    Scratch<uint16_t> x(panels * panel);
    memset(x.data, 0, panels * panel * sizeof *x.data);
    for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t i = 0; i < p.in; i += 32)
            memcpy(x.data + r / DENSE_PANEL * panel + i * DENSE_PANEL + r % DENSE_PANEL * 32, p.x + r * p.in + i,
                   2 * smaller(32, p.in - i));
    parallel(threads, ceil_div(p.out, DENSE_TILE), [&](int64_t from, int64_t to) {
        for (int64_t row = from * DENSE_TILE; row < smaller(to * DENSE_TILE, p.out); row += DENSE_TILE)
            for (int64_t i = 0; i < panels; ++i) multiply_panel(p, row, x.data + i * panel, i * DENSE_PANEL);
    });
}

}  // namespace

extern "C" int dense_rows() { return DENSE_MOST; }

// y (rows, out) = x (rows, in) Wᵀ, all bfloat16; rows at most `dense_rows()`.
extern "C" void dense_product(const uint16_t* w, int64_t out, int64_t in, const uint16_t* x, int64_t rows, uint16_t* y,
                              int threads) {
    const Dense p = {w, x, out, in, rows, y};
    threads = out * in < ALONE ? 1 : threads;
    if (rows == 1) dense<1>(p, threads);
    else if (rows == 2) dense<2>(p, threads);
    else if (rows == 3) dense<3>(p, threads);
    else if (rows == 4) dense<4>(p, threads);
    else dense_panels(p, threads);
}

#else

extern "C" int dense_rows() { return 0; }
extern "C" void dense_product(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, uint16_t*, int) {}

#endif
