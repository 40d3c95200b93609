// Decoding: one token a sequence through all blocks, in one call.  A token is some four hundred small operations in a model of 22
// blocks; asked for one by one from Python they take, for one sequence, a third as long as the products among them.  Each is
// made by the code that makes it elsewhere, is rounded where it is rounded there, and so has the same bits.

#pragma once

#include "block_query.h"

extern "C" {
void block_norm(const Norm*, int);
void block_rotation(const Rotation*, int64_t, int);
void block_query(const Query*, int);
void block_swiglu(const SwiGLU*, int64_t, int);
}

namespace {

// A linear layer over 4-bit weights, with or without a low-rank update:  y = x Ŵᵀ + b  (+ scaling (x Aᵀ) Bᵀ).
struct Linear {
    const void* weight;                                         // `Packed` of nf4_blocks.h
    int64_t out, in, r;                                         // r = 0: no update
    const float* bias;                                          // (out), or null
    const uint16_t *a, *b;                                      // (r, in), (out, r)
    float scaling;
};

struct Layer {
    const uint16_t *input_norm, *post_attention_norm;           // (hidden)
    Linear q, k, v, o, gate, up, down;
    uint16_t *keys, *values;                                    // (B, Hkv, room, d): the layer's part of the cache
    const uint8_t* mask;                                        // as `Query` has it
    int64_t mask_row;
};

struct Token {
    uint16_t* x;                                                // (B, hidden): what comes in, and what goes out
    const uint16_t *cos, *sin;                                  // (B, d), or (1, d) for all B where `same`
    int64_t batch, hidden, inner, heads, kv_heads, head_dim, past, room, same, layers;
    int64_t widest, rank;                                       // the largest `out` and `r` of a layer with an update
    float eps, scale;                                           // of the norms; of the scores, 1 / √d
    // `nf4_product` of nf4_product.cpp and `dense_product` of dense_rows.h, which are in another library.
    void (*product)(const void*, int64_t, int64_t, const void*, int64_t, int, const float*, void*, int);
    void (*dense_product)(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, uint16_t*, int);
};

// y = a + b; y may be either.
void add(uint16_t* y, const uint16_t* a, const uint16_t* b, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) narrow(y + i, widen(a + i) + widen(b + i));
}

// What the parts of a block leave to each other.
struct Between {
    Scratch<uint16_t> normed, q, k, v, turned, attended, gate, up, base, low;
    Scratch<float> inverse;
    explicit Between(const Token& t)
        : normed(t.batch * t.hidden), q(t.batch * t.heads * t.head_dim), k(t.batch * t.kv_heads * t.head_dim),
          v(t.batch * t.kv_heads * t.head_dim), turned(t.batch * t.heads * t.head_dim),
          attended(t.batch * t.heads * t.head_dim), gate(t.batch * t.inner), up(t.batch * t.inner),
          base(t.batch * t.widest), low(t.batch * t.rank + 16), inverse(t.batch) {}
};

void linear(const Token& t, const Between& between, const Linear& l, const uint16_t* x, uint16_t* y, int threads) {
    const int BFLOAT16 = 1;                                     // as `KINDS` of cpu.py has it
    if (!l.r) return t.product(l.weight, l.out, l.in, x, t.batch, BFLOAT16, l.bias, y, threads);
    uint16_t *low = between.low.data, *base = between.base.data;
    t.dense_product(l.a, l.r, l.in, x, t.batch, low, threads);
    for (int64_t i = 0; i < t.batch * l.r; i += 16) narrow(low + i, widen(low + i) * all(l.scaling));
    t.dense_product(l.b, l.out, l.r, low, t.batch, y, threads);
    t.product(l.weight, l.out, l.in, x, t.batch, BFLOAT16, nullptr, base, threads);
    add(y, y, base, t.batch * l.out);
    for (int64_t i = 0; l.bias && i < t.batch * l.out; i += 16) narrow(y + i, widen(y + i) + load(l.bias + i % l.out));
}

void normalize(const Token& t, const Between& between, const uint16_t* weight, int threads) {
    const Norm call = {t.x, weight, nullptr, between.normed.data, nullptr, between.inverse.data, t.batch, t.hidden, 0, t.eps};
    block_norm(&call, threads);
}

void attention_half(const Token& t, const Between& between, const Layer& l, int threads) {
    normalize(t, between, l.input_norm, threads);
    linear(t, between, l.q, between.normed.data, between.q.data, threads);
    linear(t, between, l.k, between.normed.data, between.k.data, threads);
    linear(t, between, l.v, between.normed.data, between.v.data, threads);
    const int64_t d = t.head_dim, of_q = t.heads * d, of_k = t.kv_heads * d, of_cache = t.kv_heads * t.room * d;
    const View keys = {l.keys, of_cache, t.room * d, d}, values = {l.values, of_cache, t.room * d, d};
    const View turned = {between.turned.data, of_q, d, of_q}, here = {keys.rows(0, 0, t.past), of_cache, t.room * d, d};
    const Rotation queries = {{between.q.data, of_q, d, of_q}, turned, t.cos, t.sin, t.heads, 1, d, t.same, 0};
    const Rotation shared = {{between.k.data, of_k, d, of_k}, here, t.cos, t.sin, t.kv_heads, 1, d, t.same, 0};
    block_rotation(&queries, t.batch, threads);
    block_rotation(&shared, t.batch, threads);
    for (int64_t b = 0; b < t.batch; ++b)
        for (int64_t h = 0; h < t.kv_heads; ++h)
            memcpy(values.rows(b, h, t.past), between.v.data + b * of_k + h * d, 2 * d);
    const Query call = {turned, keys, values, {between.attended.data, of_q, d, of_q}, l.mask, t.batch, t.heads, t.kv_heads,
                        t.past + 1, d, l.mask_row, t.scale};
    block_query(&call, threads);
    linear(t, between, l.o, between.attended.data, between.normed.data, threads);
    add(t.x, t.x, between.normed.data, t.batch * t.hidden);
}

void mlp_half(const Token& t, const Between& between, const Layer& l, int threads) {
    normalize(t, between, l.post_attention_norm, threads);
    linear(t, between, l.gate, between.normed.data, between.gate.data, threads);
    linear(t, between, l.up, between.normed.data, between.up.data, threads);
    const SwiGLU call = {between.gate.data, between.up.data, nullptr, between.gate.data, nullptr, nullptr, 0};
    block_swiglu(&call, t.batch * t.inner, threads);
    linear(t, between, l.down, between.gate.data, between.normed.data, threads);
    add(t.x, t.x, between.normed.data, t.batch * t.hidden);
}

}  // namespace
