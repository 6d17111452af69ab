// One pass of T rows, a token each, through a run of layers: what Python hands over, and what the steps share.
//
// Each struct from Vector to Call has the same fields in src/soli/kernels/cpu/fused.py. Weights stay where they are, in any
// format; between products everything is float32: rows are rounded only into the tokens of a bfloat16 product, into the
// cache, and on leaving. Every thread of the team runs every step and shares its loops; a step's buffers lie in one area
// that each thread lays out for itself, at the same addresses. What is small is done by every thread for itself where
// there are fewer rows than threads, and loops are shared out beforehand: both take less time than waiting for each other.
//
// Shapes: T rows, D hidden, H heads, N nope, R rotary and V value width, C latent, X = C + R, L query latent, E experts,
// K chosen, G groups, F width of a feed-forward network, W words of the vocabulary.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "experts.h"
#include "forward_args.h"
#include "latents.h"

namespace soli {

namespace {

// Memory handed out in order; without a base it only counts.
struct Area {
    uint8_t* base;
    size_t used = 0;

    template <class V>
    V* take(int64_t count) {
        V* part = reinterpret_cast<V*>(base + used);
        used += Scratch::bytes<V>(count);
        return part;
    }
};

// What all layers share.
struct ForwardPass {
    const ForwardArgs& call;
    const Kernels& isa;
    float *x, *cos, *sin;  // (T, D) the rows between layers; (T, R / 2)
    int64_t* slots;        // (T) of the flattened pages: where each row's latent is kept

    bool alone() const { return call.T < call.threads; }  // every thread does what is small for itself

    // Memory for what each_row makes: of its own for every thread that works alone.
    template <class V>
    V* made(Area& area, int64_t count) const {
        return alone() ? own<V>(area, count) : area.take<V>(count);
    }

    // Memory of its own for every thread.
    template <class V>
    V* own(Area& area, int64_t count) const {
        const int64_t each = Scratch::bytes<V>(count) / sizeof(V);
        return area.take<V>(each * call.threads) + each * thread();
    }

    // Calls run(t) for each row; then all rows are done, as far as this thread can see.
    template <class Run>
    void each_row(Run run) const {
        if (alone()) {
            for (int64_t t = 0; t < call.T; t++) run(t);
        } else {
#pragma omp for
            for (int64_t t = 0; t < call.T; t++) run(t);
        }
    }

    static int64_t thread() {
#ifdef _OPENMP
        return omp_get_thread_num();
#else
        return 0;
#endif
    }

    Tokens tokens(const Weight& weight) const { return Tokens(isa, weight.layout, call.dtype); }
};

inline void take(Area& area, Tokens& tokens, int64_t count) { tokens.data = area.take<uint8_t>(tokens.bytes(count)); }

inline void take_made(const ForwardPass& pass, Area& area, Tokens& tokens, int64_t count) {
    tokens.data = pass.made<uint8_t>(area, tokens.bytes(count));
}

// y = x / sqrt(mean(x^2) + eps) * weight. Sixteen sums, so that the compiler may add side by side.
inline void normed(const Norm& norm, const float* x, int64_t n, float* y) {
    float lanes[16] = {}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
    for (; i < n; i++) lanes[0] += x[i] * x[i];
    for (float lane : lanes) sum += lane;
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + static_cast<float>(norm.eps));
    if (norm.weight.dtype == FLOAT) {
        const float* weight = static_cast<const float*>(norm.weight.data);
        for (i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
    } else {
        const uint16_t* weight = static_cast<const uint16_t*>(norm.weight.data);
        for (i = 0; i < n; i++) y[i] = x[i] * factor * widened(weight[i]);
    }
}

// Calls run(first, count) for each portion of T rows that a product takes at once.
template <class Run>
void portions(int64_t T, Run run) {
    for (int64_t t = 0; t < T; t += TOKENS) run(t, std::min(TOKENS, T - t));
}

inline int64_t blocks(int64_t rows) { return (rows + ROWS - 1) / ROWS; }

// Rows of one block of a matrix for all T tokens: y (T, O).
inline void product(const Weight& weight, const Tokens& tokens, int64_t T, int64_t block, const Vector& bias,
                    float* y) {
    const int64_t O = weight.layout.O, row = block * ROWS, rows = std::min(ROWS, O - row);
    portions(T, [&](int64_t t, int64_t count) { tokens.dots(weight.matrix, row, rows, t, count, y + t * O + row, O); });
    for (int64_t t = 0; t < T && bias.data; t++)
        for (int64_t r = row; r < row + rows; r++) y[t * O + r] += bias[r];
}

}  // namespace
}  // namespace soli
