// The experts of a layer, their tokens, and the two steps of their work: shared by experts.cpp and the pass through whole
// layers (forward.h). A network that every token goes through is one expert with all tokens.
//
// Shapes: T tokens, D hidden, E experts, F expert width, K chosen, P = T * K pairs of token and expert.
#pragma once
#include <algorithm>

#include "driver.h"

namespace soli {
namespace {

struct Experts {
    const Kernels& isa;
    int64_t E, K;
    Layout in, out;                  // gate and up (F, D); down (D, F)
    const Matrix *gate, *up, *down;  // tables of E matrices
};

// Pairs sorted by expert, tokens ascending within an expert: pair p is token[p], chosen with weight[p].
struct Pairs {
    int64_t* start;   // E + 1: where each expert's pairs begin
    int64_t* chosen;  // experts that have any
    int64_t* token;
    float* weight;
    int64_t experts;

    static size_t bytes(int64_t E, int64_t P) {
        return Scratch::bytes<int64_t>(E + 1) + Scratch::bytes<int64_t>(E) + Scratch::bytes<int64_t>(P) +
               Scratch::bytes<float>(P);
    }

    template <class Area>
    Pairs(Area& area, int64_t E, int64_t P) : experts(0) {
        start = area.template take<int64_t>(E + 1), chosen = area.template take<int64_t>(E);
        token = area.template take<int64_t>(P), weight = area.template take<float>(P);
    }

    void sort(int64_t E, int64_t K, int64_t P, const int64_t* ids, const float* weights) {
        experts = 0;
        std::fill(start, start + E + 1, 0);
        for (int64_t p = 0; p < P; p++) start[ids[p] + 1]++;
        for (int64_t e = 0; e < E; e++) {
            if (start[e + 1]) chosen[experts++] = e;
            start[e + 1] += start[e];
        }
        for (int64_t p = 0; p < P; p++) {  // moves start[e] to the end of e's pairs ...
            const int64_t place = start[ids[p]]++;
            token[place] = p / K, weight[place] = weights[p];
        }
        std::copy_backward(start, start + E, start + E + 1);  // ... which is the start of the next
        start[0] = 0;
    }

    // One expert that all T tokens chose with weight one.
    void everyone(int64_t T) {
        experts = 1, start[0] = 0, start[1] = T, chosen[0] = 0;
        for (int64_t t = 0; t < T; t++) token[t] = t, weight[t] = 1.0f;
    }
};

// silu(gate) * up for rows row ... row + most of one expert, of those that exist.
void hidden_rows(const Experts& layer, int64_t e, const Tokens& x, int64_t begin, int64_t end, int64_t row,
                 int64_t most, float* hidden) {
    alignas(64) float gate[TOKENS * ROWS], up[TOKENS * ROWS];
    const int64_t F = layer.in.O, rows = std::min(most, F - row);
    for (int64_t p = begin; p < end; p += TOKENS) {
        const int64_t count = std::min(TOKENS, end - p);
        x.dots(layer.gate[e], row, rows, p, count, gate, most);
        x.dots(layer.up[e], row, rows, p, count, up, most);
        for (int64_t i = 0; i < count; i++)
            layer.isa.silu_mul(gate + i * most, up + i * most, hidden + (p + i) * F + row, rows);
    }
}

// Rows of y that a piece of work adds to, where P pairs are shared by so many experts: more where an expert has few tokens.
int64_t down_rows(int64_t D, int64_t T, int64_t P, int64_t experts, int64_t threads) {
    return stretch(D, experts ? P / experts : T, T < FEW ? threads : 4 * threads);
}

// Adds weight * down for rows row ... row + most of y, of those that exist, and one expert.
void add_rows(const Experts& layer, int64_t e, const Tokens& h, const Pairs& pairs, int64_t row, int64_t most,
              float* y) {
    alignas(64) float tile[TOKENS * ROWS];
    const int64_t D = layer.out.O, last = std::min(D, row + most), end = pairs.start[e + 1];
    for (int64_t p = pairs.start[e]; p < end; p += TOKENS) {
        const int64_t count = std::min(TOKENS, end - p), span = std::min(last - row, TOKENS / count * ROWS);
        for (int64_t at = row; at < last; at += span) {
            const int64_t rows = std::min(span, last - at);
            h.dots(layer.down[e], at, rows, p, count, tile, span);
            for (int64_t i = 0; i < count; i++) {
                float* to = y + pairs.token[p + i] * D + at;
                for (int64_t r = 0; r < rows; r++) to[r] += pairs.weight[p + i] * tile[i * span + r];
            }
        }
    }
}

}  // namespace
}  // namespace soli
