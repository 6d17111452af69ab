// Which experts the next layer may choose: its router applied to this layer's hidden state, before this layer's experts
// and the next attention have changed it. A guess, for reading experts ahead; no result depends on it.
//
// Shapes: T tokens, D hidden, E experts, K chosen, G groups.
#pragma once
#include "forward_router.h"

namespace soli {
namespace {

constexpr int64_t MAX_PREDICTED_TOKENS = 16;  // more tokens choose most of a layer's experts anyway

class PredictionStep {
public:
    PredictionStep(const ForwardState& state, const FeedForward& next, Arena arena)
        : state(state),
          next(next),
          T(std::min(state.args.T, MAX_PREDICTED_TOKENS)),
          input(state.isa, next.router.weight.layout, FLOAT32) {
        const Router& router = next.router;
        take(arena, input, T);
        normed = arena.take<float>(state.args.D);
        logits = arena.take<float>(T * router.E());
        decisions = {nullptr, arena.take<float>(T * router.K), arena.take<float>(T * router.E()),
                     arena.take<float>(T * router.E()), arena.take<uint8_t>(T * router.G)};
        used = arena.used;
    }

    size_t used;

    // Writes the guess of every token to `ids` (T, K).
    void run(int64_t* ids) {
        decisions.ids = ids;
#pragma omp single nowait
        for (int64_t t = 0; t < T; t++) {
            rms_norm(next.norm, state.x + t * state.args.D, state.args.D, normed);
            input.pack(t, normed, FLOAT32);
        }
        state.team.barrier();
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < row_blocks(next.router.E()); i++)
            multiply_row_block(next.router.weight, input, T, i, {}, logits);
        state.team.barrier();
#pragma omp single nowait
        for (int64_t t = 0; t < T; t++) route(next.router, logits + t * next.router.E(), nullptr, t, decisions);
        state.team.barrier();
    }

private:
    const ForwardState& state;
    const FeedForward& next;
    const int64_t T;
    Activations input;
    Routings decisions;
    float* normed;  // (D)
    float* logits;  // (T, E)
};

}  // namespace
}  // namespace soli
