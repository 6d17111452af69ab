// Absorbed attention of consecutive tokens, each to slots of its own: W_UK is folded into each query as a weighted sum
// of kv_b's rows, and W_UV is applied to the latents that a head has combined, both straight from kv_b in its own
// format.
//
// Shapes: see forward_args.h; n tokens.
#pragma once
#include "forward.h"

namespace soli {
namespace {

class AbsorbedAttention {
public:
    // For up to `tokens` tokens of up to `max_length` slots each.
    AbsorbedAttention(const ForwardState& state, const Attention& a, int64_t tokens, int64_t max_length, float* heads,
                      Arena& arena)
        : state(state),
          a(a),
          H(a.H),
          C(a.C()),
          X(a.X()),
          queries(state.isa, {state.args.dtype == FLOAT32 ? FP32 : BF16, 1, X, 0}, state.args.dtype),
          combined_latents(state.activations(a.kv_b)),
          heads(heads) {
        take(arena, queries, tokens * H);
        take(arena, combined_latents, tokens * H);
        absorbed = arena.take<float>(tokens * H * padded(X));
        const LatentAttention latents = attention(nullptr, 0, 0);
        splits = arena.take<float>(tokens * LatentAttention::Splits(max_length).count * latents.split_floats());
    }

    // The latents of `blocks` KV blocks of `block_size` slots.
    LatentAttention attention(const void* kv_blocks, int64_t blocks, int64_t block_size) const {
        const Layout block = {state.args.dtype == FLOAT32 ? FP32 : BF16, block_size, X, 0};
        return {state.isa, block, blocks, H, C, static_cast<float>(a.scale), static_cast<const uint8_t*>(kv_blocks)};
    }

    // Queries of head h for n tokens, (n, N + R).
    void absorb(int64_t h, const float* query, int64_t n) {
        const int64_t width = a.N + a.R;
        const int64_t stride = padded(X);
        float* absorbed_query = absorbed + h * n * stride;
        std::fill(absorbed_query, absorbed_query + n * stride, 0.0f);
        const RowBlock w_uk = {a.kv_b.matrix, a.kv_b.layout, h * (a.N + a.V), a.N};
        state.isa.weighted_sum[a.kv_b.layout.format](w_uk, C, query, width, n, absorbed_query, stride);
        for (int64_t t = 0; t < n; t++) {
            std::copy(query + t * width + a.N, query + (t + 1) * width, absorbed_query + t * stride + C);
            queries.pack(t * H + h, absorbed_query + t * stride, FLOAT32);
        }
    }

    // Attention of the n tokens from `first` on, whose queries have been absorbed, up to `heads`. `block_table` (n, W).
    void attend(const LatentAttention& latents, int64_t first, int64_t n, int64_t W, const int32_t* block_table,
                const int32_t* lengths) {
        LatentAttentionBatch batch(latents, n, W, block_table, lengths, state.args.threads);
        batch.splits = splits;
        const int64_t groups = batch.head_groups();
        if (groups > 1) {
            // A thread that attends for a group of heads also combines their values: no barrier between the two.
#pragma omp for schedule(static) nowait
            for (int64_t g = 0; g < groups; g++) {
                for (int64_t item = g; item < batch.items(); item += groups) batch.attend(queries, item);
                for (int64_t h = g * batch.heads_per_item; h < std::min(H, (g + 1) * batch.heads_per_item); h++)
                    combine_values(batch, first, h);
            }
        } else {
#pragma omp for schedule(static) nowait
            for (int64_t item = 0; item < batch.items(); item++) batch.attend(queries, item);
            state.team.barrier();
#pragma omp for schedule(static) nowait
            for (int64_t h = 0; h < H; h++) combine_values(batch, first, h);
        }
        state.team.barrier();
    }

private:
    // W_UV times the latents that head h has combined.
    void combine_values(const LatentAttentionBatch& batch, int64_t first, int64_t h) {
        const int64_t n = batch.B;
        for (int64_t t = 0; t < n; t++) combined_latents.pack(h * n + t, batch.output(t, h), FLOAT32);
        const int64_t w_uv = h * (a.N + a.V) + a.N;  // first row in kv_b
        for_each_token_block(n, [&](int64_t t, int64_t count) {
            float* values = heads + ((first + t) * H + h) * a.V;
            combined_latents.multiply(a.kv_b.matrix, w_uv, a.V, h * n + t, count, values, H * a.V);
        });
    }

    const ForwardState& state;
    const Attention& a;
    const int64_t H, C, X;
    Activations queries, combined_latents;
    float* heads;     // (T, H, V)
    float* absorbed;  // (H, n, padded(X))
    float* splits;    // see LatentAttentionBatch
};

}  // namespace
}  // namespace soli
