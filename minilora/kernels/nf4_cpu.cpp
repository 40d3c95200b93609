// What cpu.py calls by ctypes: unpacking and quantizing, the head's product, and which machine this is compiled for.
//
// Products with 4-bit weights are in nf4_product.cpp: two files are compiled side by side, in half the time.

#include "dense_rows.h"
#include "nf4_quantize.h"

extern "C" {

const char* nf4_machine() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16 products";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(NEON)
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

// x (n) of `kind` -> absmax (blocks) and packed ((n + 1) / 2).  Returns whether all of x is finite; else both mean nothing.
int nf4_quantize(const void* x, int kind, int64_t n, const float* code, int64_t blocksize, float* absmax, uint8_t* packed,
                 int padding, int threads) {
    if (kind == FLOAT32) return quantize_all<FLOAT32>(x, n, code, blocksize, absmax, packed, padding, threads);
    if (kind == BFLOAT16) return quantize_all<BFLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
    return quantize_all<FLOAT16>(x, n, code, blocksize, absmax, packed, padding, threads);
}

// x (n) float32 -> absmax (blocks) and codes (n), indices into `code` (entries, sorted).  Returns as nf4_quantize.
int nf4_quantize_bytes(const float* x, int64_t n, const float* code, int64_t entries, int64_t blocksize, float* absmax,
                       uint8_t* codes, int threads) {
    return quantize_bytes(x, n, Midpoints(code, entries), blocksize, absmax, codes, threads);
}

}  // extern "C"
