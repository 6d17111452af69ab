// The router's decision for one token: soli.model.router in C++, float32 throughout (equations 12-16).
#pragma once
#include "forward.h"

namespace soli {
namespace {

// A NaN ranks first, as in torch.topk, so that K experts are always selected.
inline bool ranks_before(float a, float b) { return a > b || (a != a && b == b); }

// Indices of the k largest of n values into `top`, largest first; of equal ones the first. Ignores i where skip(i).
template <class Skip>
void top_k(const float* values, int64_t n, int64_t k, int64_t* top, Skip skip) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        if (skip(i) || (count == k && !ranks_before(values[i], values[top[count - 1]]))) continue;
        int64_t place = count < k ? count++ : count - 1;
        for (; place > 0 && ranks_before(values[i], values[top[place - 1]]); place--) top[place] = top[place - 1];
        top[place] = i;
    }
}

// Equation 15: a sigmoid of each logit, or a softmax over the experts.
inline void expert_scores(const Router& router, const float* logits, float* scores) {
    const int64_t E = router.E();
    if (!router.softmax) {
        for (int64_t e = 0; e < E; e++) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
        return;
    }
    float max = -INFINITY;
    float sum = 0;
    for (int64_t e = 0; e < E; e++) max = std::max(max, logits[e]);
    for (int64_t e = 0; e < E; e++) {
        scores[e] = std::exp(logits[e] - max);
        sum += scores[e];
    }
    for (int64_t e = 0; e < E; e++) scores[e] /= sum;
}

// Node-limited routing: selects the topk_group groups whose best experts have the largest sum.
inline void select_groups(const Router& router, const float* biased, uint8_t* groups) {
    const int64_t size = router.E() / router.G;
    const auto skip_none = [](int64_t) { return false; };
    float group_scores[MAX_GROUPS];
    int64_t selected[MAX_GROUPS];
    for (int64_t g = 0; g < router.G; g++) {
        const float* scores = biased + g * size;
        int64_t best[2] = {};
        top_k(scores, size, std::min(router.experts_per_group_score, size), best, skip_none);
        const bool has_second = router.experts_per_group_score > 1 && size > 1;
        group_scores[g] = scores[best[0]] + (has_second ? scores[best[1]] : 0.0f);
        groups[g] = 0;
    }
    top_k(group_scores, router.G, router.topk_group, selected, skip_none);
    for (int64_t i = 0; i < router.topk_group; i++) groups[selected[i]] = 1;
}

// Token t's part of `out` from its logits (E). `masked_experts` is null or (T, E).
inline void route(const Router& router, const float* logits, const uint8_t* masked_experts, int64_t t,
                  const Routings& out) {
    const int64_t E = router.E();
    const int64_t K = router.K;
    const int64_t group_size = E / router.G;
    float* scores = out.scores + t * E;
    float* biased = out.biased + t * E;
    float* weights = out.weights + t * K;
    int64_t* ids = out.ids + t * K;
    uint8_t* groups = out.groups + t * router.G;
    expert_scores(router, logits, scores);
    for (int64_t e = 0; e < E; e++) {
        biased[e] = scores[e] + (router.bias.data ? router.bias[e] : 0.0f);
        if (masked_experts && masked_experts[t * E + e]) biased[e] = -INFINITY;
    }
    if (router.G > 1) select_groups(router, biased, groups);
    top_k(biased, E, K, ids, [&](int64_t e) { return router.G > 1 && !groups[e / group_size]; });
    // Equations 13 and 16: the bias only selects; weights are the scores without it.
    float sum = 1e-20f;
    for (int64_t k = 0; k < K; k++) {
        weights[k] = scores[ids[k]];
        sum += weights[k];
    }
    for (int64_t k = 0; k < K; k++)
        weights[k] = (router.normalise ? weights[k] / sum : weights[k]) * static_cast<float>(router.scaling);
}

}  // namespace
}  // namespace soli
