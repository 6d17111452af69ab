// The attention of one layer for T tokens: x += o(heads(norm x)), paper section 2.1.1. Decode tokens use absorbed
// attention (latent_attention.h), prefill chunks expanded attention (forward_prefill.h).
//
// Absorbed, W_UK is folded into each query as a weighted sum of kv_b's rows, and W_UV is applied to the latents that a
// head has combined, both straight from kv_b in its own format.
//
// Shapes: see forward_args.h; B decode tokens, the first of the T.
#pragma once
#include <optional>

#include "forward_prefill.h"

namespace soli {
namespace {

class AttentionStep {
public:
    AttentionStep(const ForwardState& state, const Attention& a, void* kv_blocks, Arena arena)
        : state(state),
          args(state.args),
          a(a),
          T(args.T),
          B(args.num_decode_tokens),
          H(a.H),
          C(a.C()),
          X(a.X()),
          kv_blocks(kv_blocks),
          latent_attention{state.isa,
                           {args.dtype == FLOAT32 ? FP32 : BF16, args.block_size, X, 0},
                           args.block_count,
                           H,
                           C,
                           static_cast<float>(a.scale),
                           static_cast<const uint8_t*>(kv_blocks)},
          decode(latent_attention, B, args.blocks_per_sequence, args.block_table, args.lengths, args.threads),
          q_input(state.activations(a.has_query_latent() ? a.q_a : a.q_b)),
          q_latent_input(state.activations(a.q_b)),
          kv_input(state.activations(a.kv_a)),
          absorbed_queries(state.isa, latent_attention.block, args.dtype),
          combined_latents(state.activations(a.kv_b)),
          o_input(state.activations(a.o)) {
        state.take_for_tokens(arena, q_input, T);
        state.take_for_tokens(arena, q_latent_input, a.has_query_latent() ? T : 0);
        state.take_for_tokens(arena, kv_input, T);
        state.take_for_tokens(arena, o_input, T);
        take(arena, absorbed_queries, B * H);
        take(arena, combined_latents, B * H);
        normed = state.take_per_thread<float>(arena, std::max(args.D, a.q_a.layout.O));
        q_latent = arena.take<float>(T * a.q_a.layout.O);
        kv = arena.take<float>(T * X);
        q = arena.take<float>(T * H * (a.N + a.R));
        absorbed = arena.take<float>(B * H * padded(X));
        heads = arena.take<float>(T * H * a.V);
        decode.splits = arena.take<float>(decode.floats());
        prefill.emplace(state, a, kv_blocks, heads, arena);
        used = arena.used;
    }

    size_t used;

    void run() {
        state.for_each_token([&](int64_t t) { norm_input(t); });
        project_q_kv();
        if (a.has_query_latent()) state.for_each_token([&](int64_t t) { norm_query_latent(t); });
        // Without a barrier after it: queries do not read the cache.
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < T; t++) norm_rope_and_cache_latent(t);
#pragma omp for schedule(static) nowait
        for (int64_t h = 0; h < H; h++) rope_and_absorb_query(h);
        state.team.barrier();
        if (T > B) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t item = 0; item < prefill->items(); item++) prefill->attend(item);
            state.team.barrier();
        }
        if (B) attend_latents();
        state.for_each_token([&](int64_t t) { o_input.pack(t, heads + t * H * a.V, FLOAT32); });
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < row_blocks(args.D); block++) project_output(block);
        state.team.barrier();
    }

private:
    void norm_input(int64_t t) {
        rms_norm(a.norm, state.x + t * args.D, args.D, normed);
        q_input.pack(t, normed, FLOAT32);
        kv_input.pack(t, normed, FLOAT32);
    }

    // The query latent q_a x, and the key-value latent beside the rotary key, kv_a x.
    void project_q_kv() {
        const int64_t q_row_blocks = row_blocks(a.q_a.layout.O);
        const int64_t kv_row_blocks = row_blocks(X);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < q_row_blocks + kv_row_blocks; i++)
            if (i < q_row_blocks) multiply_row_block(a.q_a, q_input, T, i, a.q_a_bias, q_latent);
            else multiply_row_block(a.kv_a, kv_input, T, i - q_row_blocks, a.kv_a_bias, kv);
        state.team.barrier();
    }

    void norm_query_latent(int64_t t) {
        const int64_t L = a.q_a.layout.O;
        rms_norm(a.q_norm, q_latent + t * L, L, normed);
        q_latent_input.pack(t, normed, FLOAT32);
    }

    void norm_rope_and_cache_latent(int64_t t) {
        float* latent = kv + t * X;
        rms_norm(a.kv_norm, latent, C, latent);
        apply_rope(t, latent + C);
        store_as(args.dtype, latent, X, kv_blocks, state.slots[t] * X);
    }

    // The queries of head h: q_b times the query latent, rotated; of decode tokens the non-rotary part times W_UK.
    void rope_and_absorb_query(int64_t h) {
        const int64_t width = a.N + a.R;
        float* query = q + h * T * width;
        const Activations& input = a.has_query_latent() ? q_latent_input : q_input;
        for_each_token_block(T, [&](int64_t t, int64_t count) {
            input.multiply(a.q_b.matrix, h * width, width, t, count, query + t * width, width);
        });
        for (int64_t t = 0; t < T; t++) apply_rope(t, query + t * width + a.N);
        for (int64_t t = 0; t < T && args.query_scaling != 0; t++) scale_query(t, query + t * width);
        for (int64_t t = B; t < T; t++) prefill->pack_query(t, h, query + t * width);
        if (B) absorb_query(h, query);
    }

    void scale_query(int64_t t, float* query) const {
        const float lengths = std::floor(static_cast<float>(args.positions[t]) / args.query_scaling_length);
        const float scale = 1.0f + static_cast<float>(args.query_scaling) * std::log(1.0f + lengths);
        for (int64_t i = 0; i < a.N + a.R; i++) query[i] *= scale;
    }

    void absorb_query(int64_t h, const float* query) {
        const int64_t width = a.N + a.R;
        const int64_t stride = padded(X);
        float* absorbed_query = absorbed + h * B * stride;
        std::fill(absorbed_query, absorbed_query + B * stride, 0.0f);
        const RowBlock w_uk = {a.kv_b.matrix, a.kv_b.layout, h * (a.N + a.V), a.N};
        state.isa.weighted_sum[a.kv_b.layout.format](w_uk, C, query, width, B, absorbed_query, stride);
        for (int64_t t = 0; t < B; t++) {
            std::copy(query + t * width + a.N, query + (t + 1) * width, absorbed_query + t * stride + C);
            absorbed_queries.pack(t * H + h, absorbed_query + t * stride, FLOAT32);
        }
    }

    // Absorbed attention of the decode tokens, up to `heads`.
    void attend_latents() {
        const int64_t groups = decode.head_groups();
        if (groups > 1) {
            // A thread that attends for a group of heads also combines their values: no barrier between the two.
#pragma omp for schedule(static) nowait
            for (int64_t g = 0; g < groups; g++) {
                for (int64_t item = g; item < decode.items(); item += groups) decode.attend(absorbed_queries, item);
                for (int64_t h = g * decode.heads_per_item; h < std::min(H, (g + 1) * decode.heads_per_item); h++)
                    combine_values(h);
            }
        } else {
#pragma omp for schedule(static) nowait
            for (int64_t item = 0; item < decode.items(); item++) decode.attend(absorbed_queries, item);
            state.team.barrier();
#pragma omp for schedule(static) nowait
            for (int64_t h = 0; h < H; h++) combine_values(h);
        }
        state.team.barrier();
    }

    // W_UV times the latents that head h has combined.
    void combine_values(int64_t h) {
        for (int64_t t = 0; t < B; t++) combined_latents.pack(h * B + t, decode.output(t, h), FLOAT32);
        const int64_t w_uv = h * (a.N + a.V) + a.N;  // first row in kv_b
        for_each_token_block(B, [&](int64_t t, int64_t count) {
            combined_latents.multiply(a.kv_b.matrix, w_uv, a.V, h * B + t, count, heads + (t * H + h) * a.V, H * a.V);
        });
    }

    // x += o heads, for one block of rows.
    void project_output(int64_t block) {
        alignas(64) float tile[TOKEN_BLOCK * ROW_BLOCK];
        const int64_t row = block * ROW_BLOCK;
        const int64_t rows = std::min(ROW_BLOCK, args.D - row);
        for_each_token_block(T, [&](int64_t first, int64_t count) {
            o_input.multiply(a.o.matrix, row, rows, first, count, tile, ROW_BLOCK);
            for (int64_t t = 0; t < count; t++) {
                float* x = state.x + (first + t) * args.D + row;
                for (int64_t r = 0; r < rows; r++)
                    x[r] += tile[t * ROW_BLOCK + r] + (a.o_bias.data ? a.o_bias[row + r] : 0.0f);
            }
        });
    }

    // Rotates each pair by its angle (equations 3 and 8): neighbours, or one of each half.
    void apply_rope(int64_t t, float* x) const {
        const int64_t pairs = a.R / 2;
        const int64_t step = a.interleaved ? 1 : pairs;
        for (int64_t i = 0; i < pairs; i++) {
            float* first = x + (a.interleaved ? 2 * i : i);
            float* second = first + step;
            const float cos = state.cos[t * pairs + i];
            const float sin = state.sin[t * pairs + i];
            const float re = *first;
            const float im = *second;
            *first = re * cos - im * sin;
            *second = im * cos + re * sin;
        }
    }

    const ForwardState& state;
    const ForwardArgs& args;
    const Attention& a;
    const int64_t T, B, H, C, X;
    void* kv_blocks;
    const LatentAttention latent_attention;
    LatentAttentionBatch decode;
    std::optional<PrefillAttention> prefill;
    Activations q_input, q_latent_input, kv_input, absorbed_queries, combined_latents, o_input;
    float* normed;    // (max(D, L)) of this thread
    float* q_latent;  // (T, L)
    float* kv;        // (T, X)
    float* q;         // (H, T, N + R)
    float* absorbed;  // (H, B, padded(X))
    float* heads;     // (T, H, V)
};

}  // namespace
}  // namespace soli
