// The feed-forward network of one layer for T tokens: x += network(norm x), a dense network, or routed and shared
// experts (equation 12), whose sum A.X-K1 norms once more. The dense network and the shared experts are one expert that
// all tokens chose with weight one.
//
// Where experts are not all in memory, choose_experts() and compute() may be in two calls of the library, and compute()
// in several, each for some of the experts in ascending order: a token's sum has the same order then. What compute()
// reads is in the arena and does not depend on the calling thread.
//
// Shapes: T tokens, D hidden, E experts, F width, K chosen, P = T * K pairs of token and expert.
#pragma once
#include <utility>

#include "forward_router.h"

namespace soli {
namespace {

constexpr int64_t ROUTE_ALONE = 64;  // tokens up to which one thread routes all

class FeedForwardStep {
public:
    FeedForwardStep(const ForwardState& state, const FeedForward& f, const Routings& routings,
                    const uint8_t* masked_experts, Arena arena)
        : state(state),
          args(state.args),
          f(f),
          routings(routings),
          masked_experts(masked_experts),
          T(args.T),
          E(f.router.E()),
          P(E ? T * f.router.K : 0),
          shared{state.isa, 1, 1, f.gate.layout, f.down.layout, &f.gate.matrix, &f.up.matrix, &f.down.matrix},
          routed{state.isa, E, f.router.K, f.expert_in, f.expert_out, f.experts, f.experts + E, f.experts + 2 * E},
          router_input(state.isa, f.router.weight.layout, FLOAT32),
          shared_input(state.isa, shared.in, args.dtype),
          shared_hidden(state.isa, shared.out, args.dtype),
          expert_input(state.isa, routed.in, args.dtype),
          routed_input(expert_input),
          routed_hidden(state.isa, routed.out, args.dtype),
          shared_pairs(arena, 1, T),
          routed_pairs(arena, E, P) {
        state.take_for_tokens(arena, router_input, T);
        state.take_for_tokens(arena, shared_input, T);
        state.take_for_tokens(arena, expert_input, T);
        take(arena, shared_hidden, T);
        take(arena, routed_input, P);
        take(arena, routed_hidden, P);
        normed = state.take_per_thread<float>(arena, args.D);
        logits = arena.take<float>(T * E);
        order = arena.take<int64_t>(E);
        active_count = arena.take<int64_t>(1);
        failed = arena.take<int64_t>(1);
        longest_wait = arena.take<int64_t>(1);
        shared_values = arena.take<float>(T * shared.in.O);
        routed_values = arena.take<float>(P * routed.in.O);
        output = norms_output() ? arena.take<float>(T * args.D) : state.x;
        used = arena.used;
    }

    size_t used;

    // Routes every token and computes the shared experts' hidden rows; whether all experts that were chosen are in
    // memory, or on their way.
    bool choose_experts() {
        state.for_each_token([&](int64_t t) { norm_input(t); });
        if (norms_output()) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < T * args.D; i++) output[i] = 0;
        }
        // Without a barrier after it: the router does not read the shared experts' hidden rows.
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < spans(shared.in.O); i++)
            gate_up_span(shared, 0, shared_input, 0, T, i, shared_values, shared_hidden);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < row_blocks(E); i++) multiply_row_block(f.router.weight, router_input, T, i, {}, logits);
        state.team.barrier();
        route_tokens();
        bool present = true;
        for (int64_t i = 0; f.states && i < *active_count; i++)
            present &= load_state(f.states + routed_pairs.active[i]) != MISSING;
        return present;
    }

    // Adds the experts `begin` ... `end` - 1 to the output, and with the last ones the shared experts. The output is
    // the residual stream itself where it has no norm. False where an expert's weights could not be read; nothing has
    // been added then. `in_order_of_state`: the experts in memory first, so that the others are read meanwhile.
    bool compute(int64_t begin, int64_t end, bool in_order_of_state) {
        // `active_count` is written by one thread; the pairs' arrays are shared, these fields are not.
        routed_pairs.active_count = *active_count;
        shared_pairs.active_count = end == E && shared.in.O > 0;
        int64_t* active_end = routed_pairs.active + routed_pairs.active_count;
        first_active = std::lower_bound(routed_pairs.active, active_end, begin) - routed_pairs.active;
        last_active = std::lower_bound(routed_pairs.active, active_end, end) - routed_pairs.active;
        if (in_order_of_state) order_by_state();
        gate_up_routed(in_order_of_state ? order : routed_pairs.active + first_active);
        if (f.states && *failed) return false;
        down_and_combine_all();
        if (norms_output() && end == E) add_normed_output();
        return true;
    }

private:
    void norm_input(int64_t t) {
        rms_norm(f.norm, state.x + t * args.D, args.D, normed);
        if (shared.in.O) shared_input.pack(t, normed, FLOAT32);
        if (E) {
            router_input.pack(t, normed, FLOAT32);
            expert_input.pack(t, normed, FLOAT32);
        }
    }

    // Routes every token, and copies tokens into the order of their experts.
    void route_tokens() {
        if (T > ROUTE_ALONE) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < T; t++)
                if (E) route(f.router, logits + t * E, masked_experts, t, routings);
            state.team.barrier();
#pragma omp single nowait
            sort_pairs();
            state.team.barrier();
#pragma omp for schedule(static) nowait
            for (int64_t p = 0; p < P; p++) copy_token(p);
        } else {
#pragma omp single nowait
            route_alone();
        }
        state.team.barrier();
    }

    void route_alone() {
        for (int64_t t = 0; t < T && E; t++) route(f.router, logits + t * E, masked_experts, t, routings);
        sort_pairs();
        for (int64_t p = 0; p < P; p++) copy_token(p);
    }

    void sort_pairs() {
        shared_pairs.assign_all(T);
        routed_pairs.sort_by_expert(E, f.router.K, P, routings.ids, routings.weights);
        *active_count = routed_pairs.active_count;
        *failed = *longest_wait = 0;
        for (int64_t i = 0; f.states && i < *active_count; i++)
            routings.states[routed_pairs.active[i]] = load_state(f.states + routed_pairs.active[i]);
    }

    void order_by_state() {
#pragma omp single nowait
        {
            std::copy(routed_pairs.active + first_active, routed_pairs.active + last_active, order);
            std::stable_partition(order, order + last_active - first_active,
                                  [&](int64_t e) { return load_state(f.states + e) == PRESENT; });
        }
        state.team.barrier();
    }

    void copy_token(int64_t p) {
        const int64_t bytes = expert_input.token_bytes();
        std::memcpy(routed_input.data + p * bytes, expert_input.data + routed_pairs.token[p] * bytes, bytes);
    }

    void gate_up_routed(const int64_t* experts) {
        const int64_t expert_spans = spans(routed.in.O);
        const int64_t items = (last_active - first_active) * expert_spans;
        int64_t waited = 0;
        // Dynamic: experts have different numbers of tokens.
#pragma omp for schedule(dynamic, omp_chunk(items, T, 3 * args.threads)) nowait
        for (int64_t i = 0; i < items; i++) {
            const int64_t e = experts[i / expert_spans];
            if (f.states && !wait_until_present(f.states + e, waited)) {
                __atomic_store_n(failed, 1, __ATOMIC_RELAXED);
                continue;
            }
            gate_up_span(routed, e, routed_input, routed_pairs.start[e], routed_pairs.start[e + 1], i % expert_spans,
                         routed_values, routed_hidden);
        }
        if (waited) record_longest(waited);
        state.team.barrier();
        if (f.states) add_wait();
    }

    void add_wait() {
#pragma omp single nowait
        {
            if (*longest_wait) state.team.forget();
            routings.waited[0] += std::exchange(*longest_wait, 0);
        }
    }

    // Threads wait at the same time, so the layer waited as long as the one that waited longest.
    void record_longest(int64_t waited) {
        int64_t longest = __atomic_load_n(longest_wait, __ATOMIC_RELAXED);
        constexpr int relaxed = __ATOMIC_RELAXED;
        while (waited > longest &&
               !__atomic_compare_exchange_n(longest_wait, &longest, waited, true, relaxed, relaxed)) {}
    }

    void down_and_combine_all() {
        const int64_t rows = down_rows_per_item(args.D, T, P, routed_pairs.active_count, args.threads);
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < args.D; row += rows) {
            for (int64_t i = first_active; i < last_active; i++)
                down_and_combine(routed, routed_pairs.active[i], routed_hidden, routed_pairs, row, rows, output);
            if (shared_pairs.active_count) down_and_combine(shared, 0, shared_hidden, shared_pairs, row, rows, output);
        }
        state.team.barrier();
    }

    bool norms_output() const { return f.output_norm.weight.data != nullptr; }

    void add_normed_output() {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < T; t++) {
            rms_norm(f.output_norm, output + t * args.D, args.D, normed);
            for (int64_t i = 0; i < args.D; i++) state.x[t * args.D + i] += normed[i];
        }
        state.team.barrier();
    }

    static int64_t spans(int64_t F) { return (F + STEP - 1) / STEP; }

    // STEP hidden values of each pair of one expert, computed and packed for the down product.
    void gate_up_span(const Experts& layer, int64_t e, const Activations& in, int64_t begin, int64_t end, int64_t span,
                      float* values, Activations& hidden) {
        const int64_t F = layer.in.O;
        const int64_t first = span * STEP;
        const int64_t last = std::min(F, first + STEP);
        const int64_t rows = end - begin < FEW_TOKENS ? STEP : ROW_BLOCK;
        for (int64_t at = first; at < last; at += rows) gate_up(layer, e, in, begin, end, at, rows, values);
        for (int64_t p = begin; p < end; p++) hidden.pack_part(p, first, values + p * F + first, last - first);
    }

    const ForwardState& state;
    const ForwardArgs& args;
    const FeedForward& f;
    const Routings& routings;
    const uint8_t* masked_experts;
    const int64_t T, E, P;
    const Experts shared, routed;
    Activations router_input, shared_input, shared_hidden;
    Activations expert_input;  // in the order of tokens; then, in the order of experts,
    Activations routed_input, routed_hidden;
    ExpertPairs shared_pairs, routed_pairs;
    float* normed;          // (D) of this thread
    float* logits;          // (T, E)
    float* shared_values;   // (T, F)
    float* routed_values;   // (P, F)
    float* output;          // (T, D)
    int64_t* order;         // (E) the experts to compute, in the order of their gate and up products
    int64_t* active_count;  // of routed_pairs
    int64_t* failed;        // 1 where an expert could not be read
    int64_t* longest_wait;  // nanoseconds, of the thread that waited longest for experts
    int64_t first_active = 0, last_active = 0;  // of the active experts, the ones to compute
};

}  // namespace
}  // namespace soli
