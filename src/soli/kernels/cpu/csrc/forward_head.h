// From rows to logits: the head, for those rows that want them, after the last norm.
#pragma once
#include "forward.h"

namespace soli {
namespace {

class HeadStep {
public:
    HeadStep(const ForwardPass& pass, Area area) : call(pass.call), N(call.logit_count), in(pass.tokens(call.head)) {
        take(area, in, N);
        used = area.used;
    }

    size_t used;

    void run() {
        const int64_t size = call.dtype == FLOAT ? 4 : 2, pieces = blocks(call.vocab_size);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n++)
            in.put(n, static_cast<const uint8_t*>(call.y) + call.logit_indices[n] * call.D * size, call.dtype);
#pragma omp for schedule(dynamic, at_once(pieces, N, 8 * call.threads))
        for (int64_t i = 0; i < pieces; i++) {
            product(call.head, in, N, i, {}, call.logits);
            if (call.dtype == HALF) round(i * ROWS, std::min(call.vocab_size, (i + 1) * ROWS));
        }
    }

private:
    // The logits of some words, as a result of bfloat16 has them.
    void round(int64_t first, int64_t last) {
        for (int64_t n = 0; n < N; n++)
            for (float* at = call.logits + n * call.vocab_size + first; at < call.logits + n * call.vocab_size + last;
                 at++)
                *at = widened(narrowed(*at));
    }

    const ForwardArgs& call;
    const int64_t N;
    Tokens in;
};

}  // namespace
}  // namespace soli
