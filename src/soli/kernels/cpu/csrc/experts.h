// The experts of a layer, the tokens of each, and the two steps of their work, shared by experts.cpp and the fused
// forward (forward_feed_forward.h). A network that every token goes through is one expert with all tokens.
//
// Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T * K pairs of token and expert.
#pragma once
#include <algorithm>

#include "activations.h"
#include "paging.h"

namespace soli {
namespace {

struct Experts {
    const Kernels& isa;
    int64_t E, K;
    Layout in, out;                  // gate and up (F, D); down (D, F)
    const Matrix *gate, *up, *down;  // tables of E matrices
};

// Pairs of token and expert, sorted by expert and then by token: pair p is token[p], weighted with weight[p].
struct ExpertPairs {
    int64_t* start;   // (E + 1) where each expert's pairs begin
    int64_t* active;  // experts that have any
    int64_t* token;   // (P)
    float* weight;    // (P)
    int64_t active_count;

    static size_t bytes(int64_t E, int64_t P) {
        return Scratch::bytes<int64_t>(E + 1) + Scratch::bytes<int64_t>(E) + Scratch::bytes<int64_t>(P) +
               Scratch::bytes<float>(P);
    }

    template <class Memory>
    ExpertPairs(Memory& memory, int64_t E, int64_t P) : active_count(0) {
        start = memory.template take<int64_t>(E + 1);
        active = memory.template take<int64_t>(E);
        token = memory.template take<int64_t>(P);
        weight = memory.template take<float>(P);
    }

    // Counting sort of P pairs: ids (T, K), weights (T, K).
    void sort_by_expert(int64_t E, int64_t K, int64_t P, const int64_t* ids, const float* weights) {
        active_count = 0;
        std::fill(start, start + E + 1, 0);
        for (int64_t p = 0; p < P; p++) start[ids[p] + 1]++;
        for (int64_t e = 0; e < E; e++) {
            if (start[e + 1]) active[active_count++] = e;
            start[e + 1] += start[e];
        }
        for (int64_t p = 0; p < P; p++) {  // moves start[e] to the end of e's pairs ...
            const int64_t place = start[ids[p]]++;
            token[place] = p / K;
            weight[place] = weights[p];
        }
        std::copy_backward(start, start + E, start + E + 1);  // ... which is the start of the next expert's
        start[0] = 0;
    }

    // One expert with all T tokens, each with weight one.
    void assign_all(int64_t T) {
        active_count = 1;
        active[0] = 0;
        start[0] = 0;
        start[1] = T;
        for (int64_t t = 0; t < T; t++) {
            token[t] = t;
            weight[t] = 1.0f;
        }
    }
};

// hidden (P, F) = silu(gate x) * (up x) for the pairs begin ... end - 1 of expert e, in up to max_rows rows from `row`
// on.
void gate_up(const Experts& layer, int64_t e, const Activations& x, int64_t begin, int64_t end, int64_t row,
             int64_t max_rows, float* hidden) {
    alignas(64) float gate[TOKEN_BLOCK * ROW_BLOCK], up[TOKEN_BLOCK * ROW_BLOCK];
    const int64_t F = layer.in.O;
    const int64_t rows = std::min(max_rows, F - row);
    for (int64_t p = begin; p < end; p += TOKEN_BLOCK) {
        const int64_t count = std::min(TOKEN_BLOCK, end - p);
        x.multiply(layer.gate[e], row, rows, p, count, gate, max_rows);
        x.multiply(layer.up[e], row, rows, p, count, up, max_rows);
        for (int64_t i = 0; i < count; i++)
            layer.isa.silu_mul(gate + i * max_rows, up + i * max_rows, hidden + (p + i) * F + row, rows);
    }
}

// Rows of y that one work item of the down product adds to, where P pairs belong to `experts` experts: more rows where
// an expert has few tokens.
int64_t down_rows_per_item(int64_t D, int64_t T, int64_t P, int64_t experts, int64_t threads) {
    return rows_per_item(D, experts ? P / experts : T, T < FEW_TOKENS ? threads : 4 * threads);
}

// y_t += weight_p * (down h_p) for the pairs of expert e, in up to max_rows rows of y (T, D) from `row` on.
void down_and_combine(const Experts& layer, int64_t e, const Activations& h, const ExpertPairs& pairs, int64_t row,
                      int64_t max_rows, float* y) {
    alignas(64) float tile[TOKEN_BLOCK * ROW_BLOCK];
    const int64_t D = layer.out.O;
    const int64_t last = std::min(D, row + max_rows);
    const int64_t end = pairs.start[e + 1];
    for (int64_t p = pairs.start[e]; p < end; p += TOKEN_BLOCK) {
        const int64_t count = std::min(TOKEN_BLOCK, end - p);
        const int64_t span = std::min(last - row, TOKEN_BLOCK / count * ROW_BLOCK);  // the tile holds count * span
        for (int64_t at = row; at < last; at += span) {
            const int64_t rows = std::min(span, last - at);
            h.multiply(layer.down[e], at, rows, p, count, tile, span);
            for (int64_t i = 0; i < count; i++) {
                float* to = y + pairs.token[p + i] * D + at;
                for (int64_t r = 0; r < rows; r++) to[r] += pairs.weight[p + i] * tile[i * span + r];
            }
        }
    }
}

}  // namespace
}  // namespace soli
