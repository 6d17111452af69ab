// What the steps of the fused forward share: T tokens through all layers by one team of threads.
//
// Weights stay in place, in any format. Between products everything is float32: numbers are rounded only as inputs of a
// bfloat16 product, into the cache and in the result. Every thread of the team runs every step and takes its share of
// the step's loops; a step's buffers are in one arena, which each thread lays out for itself, at the same addresses.
// Where there are fewer tokens than threads, every thread does what is small for itself, and loops have static
// schedules: both take less time than a barrier or a shared counter.
//
// Shapes: see forward_args.h.
#pragma once
#include "experts.h"
#include "forward_args.h"
#include "latent_attention.h"
#include "team.h"

namespace soli {
namespace {

// Memory handed out in order; without a base it only counts.
struct Arena {
    uint8_t* base;
    size_t used = 0;

    template <class V>
    V* take(int64_t count) {
        V* values = reinterpret_cast<V*>(base + used);
        used += Scratch::bytes<V>(count);
        return values;
    }
};

// The tokens that attend to a selection. A model without sparse attention has none.
struct SparseTokens {
    const int64_t* tokens;  // in order: the decode tokens, all or none, and those of the chunks after dense_tokens()
    int64_t count;
    int32_t* selected;  // (count, topk) slots of the flattened KV blocks, in the order of positions

    bool has_decode_tokens() const { return count && tokens[0] == 0; }
};

// How many tokens of a chunk, its first, attend to all tokens before them.
inline int64_t dense_tokens(const PrefillChunk& chunk, int64_t topk) {
    const int64_t count = chunk.stop - chunk.start;
    return topk ? std::max<int64_t>(0, std::min(count, topk - chunk.first_position)) : count;
}

// What all layers share.
struct ForwardState {
    const ForwardArgs& args;
    const Kernels& isa;
    float* x;          // (T, D) the residual stream
    float *cos, *sin;  // (T, R / 2)
    int64_t* slots;    // (T) slot of the flattened KV blocks that each token's latent is written to
    Team& team;
    SparseTokens sparse;  // of a model with sparse attention

    // Whether every thread does the small steps for itself, with buffers of its own.
    bool replicates_small_steps() const { return args.T < args.threads; }

    // Memory for the results of for_each_token.
    template <class V>
    V* take_for_tokens(Arena& arena, int64_t count) const {
        return replicates_small_steps() ? take_per_thread<V>(arena, count) : arena.take<V>(count);
    }
    void take_for_tokens(Arena& arena, Activations& activations, int64_t count) const {
        activations.data = take_for_tokens<uint8_t>(arena, activations.bytes(count));
    }

    // Memory that each thread has for itself.
    template <class V>
    V* take_per_thread(Arena& arena, int64_t count) const {
        const int64_t per_thread = Scratch::bytes<V>(count) / sizeof(V);
        return arena.take<V>(per_thread * args.threads) + per_thread * team_thread();
    }

    // Calls run(t) for each token; afterwards this thread sees the results of all.
    template <class Run>
    void for_each_token(Run run) const {
        if (replicates_small_steps()) {
            for (int64_t t = 0; t < args.T; t++) run(t);
        } else {
#pragma omp for nowait
            for (int64_t t = 0; t < args.T; t++) run(t);
            team.barrier();
        }
    }

    Activations activations(const Weight& weight) const { return Activations(isa, weight.layout, args.dtype); }
};

inline void take(Arena& arena, Activations& activations, int64_t count) {
    activations.data = arena.take<uint8_t>(activations.bytes(count));
}

// y = x / sqrt(mean(x^2) + eps) * weight. Sixteen partial sums, so that the compiler may use vectors.
inline void rms_norm(const Norm& norm, const float* x, int64_t n, float* y) {
    float lanes[16] = {};
    float sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
    for (; i < n; i++) lanes[0] += x[i] * x[i];
    for (float lane : lanes) sum += lane;
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + static_cast<float>(norm.eps));
    if (norm.weight.dtype == FLOAT32) {
        const float* weight = static_cast<const float*>(norm.weight.data);
        for (i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
    } else {
        const uint16_t* weight = static_cast<const uint16_t*>(norm.weight.data);
        for (i = 0; i < n; i++) y[i] = x[i] * factor * float_from_bf16(weight[i]);
    }
}

// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
inline void layer_norm(const Norm& norm, const Vector& bias, const float* x, int64_t n, float* y) {
    float sum = 0;
    float squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = sum / static_cast<float>(n);
    for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + static_cast<float>(norm.eps));
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + bias[i];
}

// Rotates each of the first `pairs` pairs of x by its angle for token t (equations 3 and 8): neighbours, or one of each
// half.
inline void rotate_pairs(const ForwardState& state, int64_t t, int64_t pairs, bool interleaved, float* x) {
    const int64_t step = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; i++) {
        float* first = x + (interleaved ? 2 * i : i);
        float* second = first + step;
        const float cos = state.cos[t * pairs + i];
        const float sin = state.sin[t * pairs + i];
        const float re = *first;
        const float im = *second;
        *first = re * cos - im * sin;
        *second = im * cos + re * sin;
    }
}

// Calls run(first, count) for each block of T tokens.
template <class Run>
void for_each_token_block(int64_t T, Run run) {
    for (int64_t t = 0; t < T; t += TOKEN_BLOCK) run(t, std::min(TOKEN_BLOCK, T - t));
}

inline int64_t row_blocks(int64_t rows) { return (rows + ROW_BLOCK - 1) / ROW_BLOCK; }

// Block `block` of the rows of y (T, O) = weight x + bias.
inline void multiply_row_block(const Weight& weight, const Activations& x, int64_t T, int64_t block, const Vector& bias,
                               float* y) {
    const int64_t O = weight.layout.O;
    const int64_t row = block * ROW_BLOCK;
    const int64_t rows = std::min(ROW_BLOCK, O - row);
    for_each_token_block(T, [&](int64_t t, int64_t count) {
        x.multiply(weight.matrix, row, rows, t, count, y + t * O + row, O);
    });
    for (int64_t t = 0; t < T && bias.data; t++)
        for (int64_t r = row; r < row + rows; r++) y[t * O + r] += bias[r];
}

}  // namespace
}  // namespace soli
