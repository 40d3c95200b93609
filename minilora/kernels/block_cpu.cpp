// What a block of a Llama does beside its linears, in bfloat16 on a CPU with AVX-512, as block.py calls it by ctypes: in
// block_rows.h SwiGLU, RMSNorm and rotations, each with its gradients; forward only, attention of one position in block_query.h
// and of sequences without padding in block_trees.h.  Inputs and results are bfloat16, all arithmetic is float32, each result is
// rounded once, where nothing else is said.
//
// Causal attention with its gradients is in block_attention.cpp: two files are compiled side by side, in half the time.
//
// Without AVX-512 the library says that it has nothing to offer (block_machine), and torch's operations are used: a slower
// form of a loop that is here for its speed would be for nothing.

#ifndef __AVX512F__

extern "C" int block_machine() { return 0; }

#else

#include "block_query.h"
#include "block_token.h"
#include "block_trees.h"

extern "C" {

int block_machine() { return 1; }

void block_trees(const Trees* a, int threads) {
    deal(threads, a->groups * a->kv_heads, [&](int64_t task) { attend(*a, task); });
}

void block_query(const Query* a, int threads) {
    deal(threads, a->batch * a->kv_heads, [&](int64_t task) { query(*a, task); });
}

// Some 10 µs of work a task; n and the size of a row are multiples of 16.
void block_swiglu(const SwiGLU* a, int64_t n, int threads) {
    deal(threads, (n + 16383) / 16384, [&](int64_t task) { swiglu(*a, task * 16384, smaller(n, (task + 1) * 16384)); });
}

void block_norm(const Norm* a, int threads) {
    deal(threads, (a->rows + 15) / 16, [&](int64_t task) {
        for (int64_t row = task * 16; row < smaller(a->rows, (task + 1) * 16); ++row)
            a->stepwise ? norm_stepwise(*a, row) : norm(*a, row);
    });
}

void block_rotation(const Rotation* a, int64_t batch, int threads) {
    const int64_t rows = batch * a->length;
    deal(threads, (rows + 15) / 16, [&](int64_t task) {
        for (int64_t row = task * 16; row < smaller(rows, (task + 1) * 16); ++row) rotate(*a, row);
    });
}

// x, a token of each sequence, through all blocks, in place; their keys and values go into the cache.
void block_token(const Token* t, const Layer* layers, int threads) {
    const Between between(*t);
    for (int64_t i = 0; i < t->layers; ++i) {
        attention_half(*t, between, layers[i], threads);
        mlp_half(*t, between, layers[i], threads);
    }
}

// For the test of its error.
void block_exp2(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store(x + i, exp2(load(x + i)));
}

}  // extern "C"

#endif
