// The attention of one layer for T tokens: x += o(heads(norm x)), paper section 2.1.1. Decode tokens use absorbed
// attention (forward_absorbed.h), prefill chunks expanded attention (forward_prefill.h), and tokens with more before
// them than sparse attention selects, absorbed attention to the selection (forward_sparse.h).
//
// Shapes: see forward_args.h; B decode tokens, the first of the T.
#pragma once
#include <optional>

#include "forward_prefill.h"
#include "forward_sparse.h"

namespace soli {
namespace {

class AttentionStep {
public:
    AttentionStep(const ForwardState& state, const Attention& a, void* kv_blocks, void* index_keys, Arena arena)
        : state(state),
          args(state.args),
          a(a),
          T(args.T),
          B(state.sparse.has_decode_tokens() ? 0 : args.num_decode_tokens),
          H(a.H),
          C(a.C()),
          X(a.X()),
          kv_blocks(kv_blocks),
          index_keys(index_keys),
          q_input(state.activations(a.has_query_latent() ? a.q_a : a.q_b)),
          q_latent_input(state.activations(a.q_b)),
          kv_input(state.activations(a.kv_a)),
          o_input(state.activations(a.o)),
          index_k_input(state.activations(a.index_k)),
          index_q_input(state.activations(a.index_q)),
          index_weights_input(state.isa, a.index_weights.layout, FLOAT32) {
        state.take_for_tokens(arena, q_input, T);
        state.take_for_tokens(arena, q_latent_input, a.has_query_latent() ? T : 0);
        state.take_for_tokens(arena, kv_input, T);
        state.take_for_tokens(arena, o_input, T);
        if (a.has_indexer()) {
            state.take_for_tokens(arena, index_k_input, T);
            state.take_for_tokens(arena, index_q_input, T);
            state.take_for_tokens(arena, index_weights_input, T);
        }
        normed = state.take_per_thread<float>(arena, std::max(args.D, a.q_a.layout.O));
        q_latent = arena.take<float>(T * a.q_a.layout.O);
        kv = arena.take<float>(T * X);
        index_key = arena.take<float>(T * a.I());
        index_weights = arena.take<float>(T * a.index_weights.layout.O);
        q = arena.take<float>(T * H * (a.N + a.R));
        heads = arena.take<float>(T * H * a.V);
        int64_t max_length = 0;
        for (int64_t b = 0; b < B; b++) max_length = std::max<int64_t>(max_length, args.lengths[b]);
        decode.emplace(state, a, B, max_length, heads, arena);
        prefill.emplace(state, a, kv_blocks, heads, arena);
        sparse.emplace(state, a, kv_blocks, index_keys, heads, arena);
        used = arena.used;
    }

    size_t used;

    void run() {
        state.for_each_token([&](int64_t t) { norm_input(t); });
        project_input();
        if (a.has_query_latent()) state.for_each_token([&](int64_t t) { norm_query_latent(t); });
        // Without a barrier after it: queries do not read the cache.
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < T; t++) norm_rope_and_cache(t);
#pragma omp for schedule(static) nowait
        for (int64_t h = 0; h < H; h++) rope_and_absorb_query(h);
        state.team.barrier();
        if (T > args.num_decode_tokens) {
#pragma omp for schedule(dynamic) nowait
            for (int64_t item = 0; item < prefill->items(); item++) prefill->attend(item);
            state.team.barrier();
        }
        if (B)
            decode->attend(decode->attention(kv_blocks, args.block_count, args.block_size), 0, B,
                           args.blocks_per_sequence, args.block_table, args.lengths);
        sparse->run(q, index_q_input, index_weights);
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
        if (!a.has_indexer()) return;
        index_k_input.pack(t, normed, FLOAT32);
        index_weights_input.pack(t, normed, FLOAT32);
    }

    // The query latent q_a x; the key-value latent beside the rotary key, kv_a x; the indexer's key and weights.
    void project_input() {
        const int64_t q_row_blocks = row_blocks(a.q_a.layout.O);
        const int64_t kv_row_blocks = row_blocks(X);
        const int64_t key_row_blocks = row_blocks(a.I());
        const int64_t weight_row_blocks = state.sparse.count ? row_blocks(a.index_weights.layout.O) : 0;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < q_row_blocks + kv_row_blocks + key_row_blocks + weight_row_blocks; i++) {
            int64_t block = i;
            if (block < q_row_blocks) multiply_row_block(a.q_a, q_input, T, block, a.q_a_bias, q_latent);
            else if ((block -= q_row_blocks) < kv_row_blocks)
                multiply_row_block(a.kv_a, kv_input, T, block, a.kv_a_bias, kv);
            else if ((block -= kv_row_blocks) < key_row_blocks)
                multiply_row_block(a.index_k, index_k_input, T, block, {}, index_key);
            else multiply_row_block(a.index_weights, index_weights_input, T, block - key_row_blocks, {}, index_weights);
        }
        state.team.barrier();
    }

    void norm_query_latent(int64_t t) {
        const int64_t L = a.q_a.layout.O;
        rms_norm(a.q_norm, q_latent + t * L, L, normed);
        q_latent_input.pack(t, normed, FLOAT32);
        if (a.has_indexer() && state.sparse.count) index_q_input.pack(t, normed, FLOAT32);
    }

    void norm_rope_and_cache(int64_t t) {
        float* latent = kv + t * X;
        rms_norm(a.kv_norm, latent, C, latent);
        rotate_pairs(state, t, a.R / 2, a.interleaved, latent + C);
        store_as(args.dtype, latent, X, kv_blocks, state.slots[t] * X);
        if (!a.has_indexer()) return;
        const int64_t I = a.I();
        float* key = index_key + t * I;
        layer_norm(a.index_norm, a.index_norm_bias, key, I, key);
        rotate_pairs(state, t, a.R / 2, a.index_interleaved, key);
        store_as(args.dtype, key, I, index_keys, state.slots[t] * I);
    }

    // The queries of head h: q_b times the query latent, rotated; of decode tokens absorbed.
    void rope_and_absorb_query(int64_t h) {
        const int64_t width = a.N + a.R;
        float* query = q + h * T * width;
        const Activations& input = a.has_query_latent() ? q_latent_input : q_input;
        for_each_token_block(T, [&](int64_t t, int64_t count) {
            input.multiply(a.q_b.matrix, h * width, width, t, count, query + t * width, width);
        });
        for (int64_t t = 0; t < T; t++) rotate_pairs(state, t, a.R / 2, a.interleaved, query + t * width + a.N);
        for (int64_t t = 0; t < T && args.query_scaling != 0; t++) scale_query(t, query + t * width);
        for (int64_t t = args.num_decode_tokens; t < T; t++) prefill->pack_query(t, h, query + t * width);
        if (B) decode->absorb(h, query, B);
    }

    void scale_query(int64_t t, float* query) const {
        const float lengths = std::floor(static_cast<float>(args.positions[t]) / args.query_scaling_length);
        const float scale = 1.0f + static_cast<float>(args.query_scaling) * std::log(1.0f + lengths);
        for (int64_t i = 0; i < a.N + a.R; i++) query[i] *= scale;
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

    const ForwardState& state;
    const ForwardArgs& args;
    const Attention& a;
    const int64_t T;
    const int64_t B;  // decode tokens that attend to all tokens before them
    const int64_t H, C, X;
    void* kv_blocks;
    void* index_keys;
    std::optional<AbsorbedAttention> decode;
    std::optional<PrefillAttention> prefill;
    std::optional<SparseAttention> sparse;
    Activations q_input, q_latent_input, kv_input, o_input, index_k_input, index_q_input, index_weights_input;
    float* normed;         // (max(D, L)) of this thread
    float* q_latent;       // (T, L)
    float* kv;             // (T, X)
    float* index_key;      // (T, I)
    float* index_weights;  // (T, J)
    float* q;              // (H, T, N + R)
    float* heads;          // (T, H, V)
};

}  // namespace
}  // namespace soli
