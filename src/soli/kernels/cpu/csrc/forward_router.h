// The router's decision for one row: soli.model.router in C++, float32 throughout (equations 12-16).
#pragma once
#include "forward.h"

namespace soli {
namespace {

// A NaN counts as the greatest, as torch has it, so that every place is filled.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The `count` best of n values into `best`, best first; of equals the first. Skips what `skipped` says.
template <class Skip>
void top(const float* values, int64_t n, int64_t count, int64_t* best, Skip skipped) {
    int64_t held = 0;
    for (int64_t i = 0; i < n; i++) {
        if (skipped(i) || (held == count && !before(values[i], values[best[held - 1]]))) continue;
        int64_t place = held < count ? held++ : held - 1;
        for (; place > 0 && before(values[i], values[best[place - 1]]); place--) best[place] = best[place - 1];
        best[place] = i;
    }
}

inline void affinities(const Router& router, const float* logits, float* scores) {
    const int64_t E = router.E();
    float most = -INFINITY, sum = 0;
    if (!router.softmax) {
        for (int64_t e = 0; e < E; e++) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        return;
    }
    for (int64_t e = 0; e < E; e++) most = std::max(most, logits[e]);
    for (int64_t e = 0; e < E; e++) sum += scores[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < E; e++) scores[e] /= sum;
}

// Groups by the sum of their best experts; `kept` of them survive.
inline void survive(const Router& router, const float* biased, uint8_t* groups) {
    const int64_t size = router.E() / router.G;
    float rank[MAX_GROUPS];
    int64_t best[MAX_GROUPS];
    for (int64_t g = 0; g < router.G; g++) {
        int64_t first[2] = {};
        top(biased + g * size, size, std::min(router.experts_per_group_score, size), first,
            [](int64_t) { return false; });
        rank[g] = biased[g * size + first[0]] +
                  (router.experts_per_group_score > 1 && size > 1 ? biased[g * size + first[1]] : 0.0f);
        groups[g] = 0;
    }
    top(rank, router.G, router.topk_group, best, [](int64_t) { return false; });
    for (int64_t i = 0; i < router.topk_group; i++) groups[best[i]] = 1;
}

// Row t's part of `out` from its logits.
inline void decide(const Router& router, const float* logits, const uint8_t* muted, int64_t t, const Routings& out) {
    const int64_t E = router.E(), K = router.K, size = E / router.G;
    float *scores = out.scores + t * E, *biased = out.biased + t * E, *weights = out.weights + t * K, sum = 1e-20f;
    int64_t* ids = out.ids + t * K;
    uint8_t* groups = out.groups + t * router.G;
    affinities(router, logits, scores);
    for (int64_t e = 0; e < E; e++) {
        biased[e] = scores[e] + (router.bias.data ? router.bias[e] : 0.0f);
        if (muted && muted[t * E + e]) biased[e] = -INFINITY;
    }
    if (router.G > 1) survive(router, biased, groups);
    top(biased, E, K, ids, [&](int64_t e) { return router.G > 1 && !groups[e / size]; });
    for (int64_t k = 0; k < K; k++) sum += weights[k] = scores[ids[k]];
    for (int64_t k = 0; k < K; k++)
        weights[k] = (router.normalise ? weights[k] / sum : weights[k]) * static_cast<float>(router.scaling);
}

}  // namespace
}  // namespace soli
