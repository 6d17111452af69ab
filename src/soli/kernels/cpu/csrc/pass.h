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
#include "latents.h"

namespace soli {

constexpr int64_t MOST_ROWS = 512, MOST_GROUPS = 64;

// float32 or bfloat16 numbers as they lie; without data there is none.
struct Vector {
    const void* data;
    int64_t dtype;

    float operator[](int64_t i) const {
        return dtype == FLOAT ? static_cast<const float*>(data)[i] : widened(static_cast<const uint16_t*>(data)[i]);
    }
    // n numbers from `at` on.
    void copy(int64_t at, int64_t n, float* to) const {
        if (dtype == FLOAT) std::copy_n(static_cast<const float*>(data) + at, n, to);
        else for (int64_t i = 0; i < n; i++) to[i] = widened(static_cast<const uint16_t*>(data)[at + i]);
    }
};

struct Norm {
    Vector weight;
    double eps;
};

// A matrix in any format; with no rows there is none.
struct Weight {
    Matrix matrix;
    Layout layout;
};

struct Attention {
    Norm norm, q_norm, kv_norm;    // before everything; of the query's and of the keys' latent
    Weight q_a, q_b, kv_a, kv_b, o;  // without a latent for queries q_a is none and q_b reads the row itself
    Vector q_a_bias, kv_a_bias, o_bias;
    int64_t H, N, R, V, interleaved;
    double scale;  // of the scores

    int64_t C() const { return kv_b.layout.I; }
    int64_t X() const { return C() + R; }
    bool low() const { return q_a.layout.O > 0; }
};

struct Router {
    Weight weight;  // (E, D); none in a dense layer
    Vector bias;    // (E), for selection alone
    int64_t K, G, kept, best;      // chosen; groups, surviving ones, and how many of its best experts rank a group
    int64_t softmax, normalise;  // else sigmoid; else gates as they are
    double scaling;

    int64_t E() const { return weight.layout.O; }
};

struct FeedForward {
    Norm norm;
    Weight gate, up, down;  // for every row: the dense network or the shared experts
    Router router;
    Layout in, out;          // of routed experts
    const Matrix* experts;  // gates, then ups, then downs
};

struct Layer {
    Attention attention;
    FeedForward feed_forward;
};

// The routers' decisions, a layer with a router after another: see soli.model.router.Routing.
struct Routings {
    int64_t* ids;             // (T, K)
    float* weights;           // (T, K)
    float *scores, *biased;  // (T, E)
    uint8_t* groups;          // (T, G)
};

// Rows start ... stop - 1: one text's tokens, at places from `first` on. `slots`: where in the flattened pages its places lie,
// from 0 to that of its last token.
struct Chunk {
    int64_t start, stop, first;
    const int64_t* slots;
};

struct Call {
    int64_t isa, dtype, threads, T, D, count;
    const Layer* layers;          // `count` of them
    void* const* pages;         // of each layer: (P, S, X)
    int64_t P, S, M, singles, chunk_count;
    const int32_t* table;        // (singles, M) page numbers: of rows that are queries by themselves
    const int32_t* lengths;      // (singles) slots to attend to; the last is the row's own
    const Chunk* chunks;          // the other rows, in order
    const int64_t* positions;   // (T) for the rotation
    const float* frequencies;   // (R / 2) radians per position
    double cos_sin_scale;
    Vector x;                       // (T, D) the rows; or (W, D) the embedding, and
    const int64_t* words;        // (T) which of it they are; or null
    Norm norm;                     // after the last layer
    void* y;                        // (T, D) of dtype
    Weight head;                   // (W, D)
    const int64_t* ends;          // rows whose logits are wanted
    int64_t end_count, W;
    float* logits;                  // (end_count, W), rounded to dtype
    const uint8_t* const* muted;  // of each layer null or (T, E): 1 for an expert that must not play; or null
    Routings routings;            // of the first layer that has a router; the others' follow
};

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
struct Pass {
    const Call& call;
    const Kernels& isa;
    float *x, *cos, *sin;  // (T, D) the rows between layers; (T, R / 2)
    int64_t* slots;          // (T) of the flattened pages: where each row's latent is kept

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

inline void take(Area& area, Tokens& tokens, int64_t count) {
    tokens.data = area.take<uint8_t>(tokens.bytes(count));
}

inline void take_made(const Pass& pass, Area& area, Tokens& tokens, int64_t count) {
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
inline void product(const Weight& weight, const Tokens& tokens, int64_t T, int64_t block, const Vector& bias, float* y) {
    const int64_t O = weight.layout.O, row = block * ROWS, rows = std::min(ROWS, O - row);
    portions(T, [&](int64_t t, int64_t count) { tokens.dots(weight.matrix, row, rows, t, count, y + t * O + row, O); });
    for (int64_t t = 0; t < T && bias.data; t++)
        for (int64_t r = row; r < row + rows; r++) y[t * O + r] += bias[r];
}

}  // namespace
}  // namespace soli
