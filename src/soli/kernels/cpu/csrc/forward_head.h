// From hidden states to logits: the head, after the last norm, for the tokens that get logits.
//
// Shapes: T tokens, N of them with logits, D hidden, V vocabulary.
#pragma once
#include "forward.h"

namespace soli {
namespace {

class HeadStep {
public:
    HeadStep(const ForwardState& state, Arena arena)
        : team(state.team),
          args(state.args),
          N(args.logit_count),
          V(args.vocab_size),
          x(state.activations(args.head)) {
        take(arena, x, N);
        used = arena.used;
    }

    size_t used;

    void run() {
        const int64_t token_bytes = args.D * dtype_bytes(args.dtype);
        const int64_t items = row_blocks(V);
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < N; n++)
            x.pack(n, static_cast<const uint8_t*>(args.y) + args.logit_indices[n] * token_bytes, args.dtype);
        team.barrier();
#pragma omp for schedule(dynamic, omp_chunk(items, N, 8 * args.threads)) nowait
        for (int64_t item = 0; item < items; item++) {
            multiply_row_block(args.head, x, N, item, {}, args.logits);
            if (args.dtype == BFLOAT16) round_to_bf16(item * ROW_BLOCK, std::min(V, (item + 1) * ROW_BLOCK));
        }
        team.barrier();
    }

private:
    // Logits first ... last - 1 of every token, as a bfloat16 product returns them.
    void round_to_bf16(int64_t first, int64_t last) {
        for (int64_t n = 0; n < N; n++)
            for (float* logit = args.logits + n * V + first; logit < args.logits + n * V + last; logit++)
                *logit = float_from_bf16(bf16_from_float(*logit));
    }

    Team& team;
    const ForwardArgs& args;
    const int64_t N, V;
    Activations x;
};

}  // namespace
}  // namespace soli
