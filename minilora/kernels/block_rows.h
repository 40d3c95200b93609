// What is done to each row by itself, one pass forward and one backward: SwiGLU, RMSNorm and the rotation of heads.
//
// `stepwise` forms, forward only, round where a chain of torch's operations does, and give its bits
// (tests/kernels/test_block.py).

#pragma once

#include "block_vectors.h"

namespace {

// y = silu(gate) · up with silu(g) = g σ(g); and, with d_y given,  d_up = d_y silu(gate),
// d_gate = d_y up σ(g) (1 + g (1 - σ(g))).  All n numbers of them one after the other.
struct SwiGLU {
    const uint16_t *gate, *up, *d_y;
    uint16_t *y, *d_gate, *d_up;
    int64_t stepwise;
};

inline Floats sigmoid(Floats x) { return all(1.0f) / (all(1.0f) + exp2(x * all(-LOG2_E))); }

void swiglu(const SwiGLU& a, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += 16) {
        Floats gate = widen(a.gate + i), up = widen(a.up + i);
        if (a.stepwise) {
            narrow(a.y + i, rounded(gate / (all(1.0f) + exp2(gate * all(-LOG2_E)))) * up);
            continue;
        }
        Floats share = sigmoid(gate);
        if (!a.d_y) {
            narrow(a.y + i, gate * share * up);
            continue;
        }
        Floats d_y = widen(a.d_y + i);
        narrow(a.d_up + i, d_y * gate * share);
        narrow(a.d_gate + i, d_y * up * share * multiply_add(all(1.0f), gate, all(1.0f) - share));
    }
}

// y = x · inverse · weight with inverse = 1 / √(mean(x²) + ε); and, with d_y given and g = d_y · weight,
// d_x = inverse · g - x · inverse³ · mean(g · x).
struct Norm {
    const uint16_t *x, *weight, *d_y;
    uint16_t *y, *d_x;
    float* inverse;                                             // (rows)
    int64_t rows, size, stepwise;
    float eps;
};

// Σ x² as torch sums a row of 32 n numbers, n < 256: four registers of eight side by side, sixteen turns at a time, then these
// registers in turn, then their eight places.
float sum_of_squares(const uint16_t* x, int64_t size) {
    Floats now[2] = {}, before[2] = {};
    for (int64_t i = 0; i < size; i += 32) {
        UNROLL for (int n = 0; n < 2; ++n) now[n] += widen(x + i + 16 * n) * widen(x + i + 16 * n);
        if (i % 512 == 480)
            UNROLL for (int n = 0; n < 2; ++n) {
                before[n] += now[n];
                now[n] = all(0.0f);
            }
    }
    alignas(64) float at[32];
    UNROLL for (int n = 0; n < 2; ++n) store(at + 16 * n, now[n] + before[n]);
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += at[i] + at[8 + i] + at[16 + i] + at[24 + i];
    return sum;
}

void norm_stepwise(const Norm& a, int64_t row) {
    const uint16_t* x = a.x + row * a.size;
    const float inverse = 1 / __builtin_sqrtf(sum_of_squares(x, a.size) / (float)a.size + a.eps);
    a.inverse[row] = inverse;
    for (int64_t i = 0; i < a.size; i += 16)
        narrow(a.y + row * a.size + i, widen(a.weight + i) * rounded(widen(x + i) * all(inverse)));
}

void norm(const Norm& a, int64_t row) {
    const uint16_t *x = a.x + row * a.size, *d_y = a.d_y + row * a.size;
    Floats sum = {};
    if (!a.d_y) {
        for (int64_t i = 0; i < a.size; i += 16) sum = multiply_add(sum, widen(x + i), widen(x + i));
        const float inverse = 1 / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / (float)a.size + a.eps);
        a.inverse[row] = inverse;
        for (int64_t i = 0; i < a.size; i += 16)
            narrow(a.y + row * a.size + i, widen(x + i) * all(inverse) * widen(a.weight + i));
        return;
    }
    for (int64_t i = 0; i < a.size; i += 16) sum = multiply_add(sum, widen(d_y + i) * widen(a.weight + i), widen(x + i));
    const float inverse = a.inverse[row];
    const Floats share = all(-_mm512_reduce_add_ps(sum) / (float)a.size * inverse * inverse * inverse);
    for (int64_t i = 0; i < a.size; i += 16)
        narrow(a.d_x + row * a.size + i,
               multiply_add(share * widen(x + i), widen(d_y + i) * widen(a.weight + i), all(inverse)));
}

// (B, H, T, d), d side by side, other strides counted in elements: one of q, k, v, o or their gradients.
struct View {
    uint16_t* data;
    int64_t batch, head, row;
    uint16_t* rows(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * row; }
};

// y₁ = x₁ cos₁ - x₂ sin₁ and y₂ = x₂ cos₂ + x₁ sin₂ for the halves 1 and 2 of each row.
struct Rotation {
    View x, y;
    const uint16_t *cos, *sin;                                  // (B, T, d), or (1, T, d) for all B where `same`
    int64_t heads, length, head_dim, same, stepwise;
};

void rotate(const Rotation& a, int64_t task) {
    const int64_t b = task / a.length, t = task % a.length, half = a.head_dim / 2;
    const int64_t angle = ((a.same ? 0 : b) * a.length + t) * a.head_dim;
    for (int64_t i = 0; i < half; i += 16) {
        const Floats cos_1 = widen(a.cos + angle + i), cos_2 = widen(a.cos + angle + half + i);
        const Floats sin_1 = widen(a.sin + angle + i), sin_2 = widen(a.sin + angle + half + i);
        for (int64_t h = 0; h < a.heads; ++h) {
            const uint16_t* x = a.x.rows(b, h, t) + i;
            Floats x_1 = widen(x), x_2 = widen(x + half);
            if (a.stepwise) {
                narrow(a.y.rows(b, h, t) + i, rounded(x_1 * cos_1) - rounded(x_2 * sin_1));
                narrow(a.y.rows(b, h, t) + half + i, rounded(x_2 * cos_2) + rounded(x_1 * sin_2));
                continue;
            }
            narrow(a.y.rows(b, h, t) + i, x_1 * cos_1 - x_2 * sin_1);
            narrow(a.y.rows(b, h, t) + half + i, multiply_add(x_2 * cos_2, x_1, sin_2));
        }
    }
}

}  // namespace
