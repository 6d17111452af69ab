// Attention of many tokens of one sequence, expanded (paper equations 5-11): keys and values are computed from the
// latents, a tile of slots at a time and one head after another, and all of the head's queries attend to the tile
// before the next.
//
// A running softmax merges the tiles in order (merge_softmax), so a query has the same bits whatever part of the
// sequence is read with it. Where the processor has bfloat16 products, keys and queries of a bfloat16 model are rounded
// to that.
//
// Shapes: see forward_args.h; Q prefill tokens, the last of the T; a key has N + R numbers.
#pragma once
#include "forward.h"

namespace soli {
namespace {

constexpr int64_t QUERY_TILE = 64;

class PrefillAttention {
public:
    // First pack_query() of each prefill token and head; then attend() to the items in any order.
    PrefillAttention(const ForwardState& state, const Attention& a, const void* kv_blocks, float* heads, Arena& arena)
        : state(state),
          args(state.args),
          a(a),
          Q(args.T - args.num_decode_tokens),
          key_width(a.N + a.R),
          C(a.C()),
          X(a.X()),
          kv_blocks(kv_blocks),
          heads(heads),
          key_layout{args.dtype == BFLOAT16 && state.isa.matmul_bf16[BF16] ? BF16 : FP32, SLOT_TILE, key_width, 0},
          queries(state.isa, key_layout, args.dtype),
          latents(state.activations(a.kv_b)) {
        if (!Q) return;
        // Few items are cut by queries too; each then computes the keys for itself.
        const int64_t head_items = a.H * args.chunk_count;
        const int64_t enough_items = 2 * args.threads;
        query_parts = head_items >= enough_items ? 1 : (enough_items + head_items - 1) / head_items;
        take(arena, queries, Q * a.H);
        latents.data = state.take_per_thread<uint8_t>(arena, latents.bytes(SLOT_TILE));
        keys = state.take_per_thread<float>(arena, SLOT_TILE * key_width);
        values = state.take_per_thread<float>(arena, SLOT_TILE * a.V);
        bf16_keys = state.take_per_thread<uint16_t>(arena, key_layout.format == BF16 ? SLOT_TILE * key_width : 0);
        outputs = state.take_per_thread<float>(arena, Q * padded(a.V));
        softmax = state.take_per_thread<SoftmaxState>(arena, Q);
        scores = state.take_per_thread<float>(arena, QUERY_TILE * SLOT_TILE);
    }

    void pack_query(int64_t t, int64_t head, const float* query) {
        queries.pack(head * Q + t - args.num_decode_tokens, query, FLOAT32);
    }

    int64_t items() const { return Q ? args.chunk_count * query_parts * a.H : 0; }

    // Work item: a chunk, a part of its queries and a head.
    void attend(int64_t item) const {
        const PrefillChunk& chunk = args.chunks[item / a.H / query_parts];
        const int64_t head = item % a.H;
        const int64_t count = dense_tokens(chunk, a.topk);
        const int64_t span = (count + query_parts - 1) / query_parts;
        const int64_t begin = item / a.H % query_parts * span;
        const int64_t end = std::min(count, begin + span);
        std::fill(outputs, outputs + std::max<int64_t>(0, end - begin) * padded(a.V), 0.0f);
        for (int64_t at = 0; at < chunk.first_position + end && begin < end; at += SLOT_TILE) {
            const int64_t slots = std::min(SLOT_TILE, chunk.first_position + end - at);
            expand_keys_values(chunk.slots + at, slots, head);
            for (int64_t i = begin; i < end; i += QUERY_TILE)
                attend_tile(chunk, head, begin, i, std::min(QUERY_TILE, end - i), at);
        }
        for (int64_t i = begin; i < end; i++) {
            const float* output = outputs + (i - begin) * padded(a.V);
            float* to = heads + ((chunk.start + i) * a.H + head) * a.V;
            for (int64_t v = 0; v < a.V; v++) to[v] = output[v] / softmax[i - begin].sum;
        }
    }

private:
    // One head's keys and values of `count` slots: kv_b times their latents, and their rotary keys.
    void expand_keys_values(const int64_t* slots, int64_t count, int64_t head) const {
        Activations input = latents;
        const int64_t slot_bytes = X * dtype_bytes(args.dtype);
        const int64_t row = head * (a.N + a.V);
        for (int64_t i = 0; i < count; i++) {
            const uint8_t* slot = static_cast<const uint8_t*>(kv_blocks) + slots[i] * slot_bytes;
            input.pack(i, slot, args.dtype);
            for (int64_t r = 0; r < a.R; r++) keys[i * key_width + a.N + r] = Vector{slot, args.dtype}[C + r];
        }
        input.multiply(a.kv_b.matrix, row, a.N, 0, count, keys, key_width);
        input.multiply(a.kv_b.matrix, row + a.N, a.V, 0, count, values, a.V);
        for (int64_t i = 0; i < count * key_width && key_layout.format == BF16; i++)
            bf16_keys[i] = bf16_from_float(keys[i]);
    }

    // Queries i ... i + count - 1 of the chunk, of which `begin` is the item's first, and the tile of slots from `at`
    // on.
    void attend_tile(const PrefillChunk& chunk, int64_t head, int64_t begin, int64_t i, int64_t count,
                     int64_t at) const {
        // Causal mask: how many slots of the tile a query attends to; zero or less for one before the tile.
        const auto visible = [&](int64_t query) { return std::min(SLOT_TILE, chunk.first_position + query + 1 - at); };
        const int64_t max_slots = visible(i + count - 1);
        if (max_slots <= 0) return;
        const int64_t stride = padded(a.V);
        const int64_t first_query = head * Q + chunk.start - args.num_decode_tokens + i;
        const Matrix key_matrix = {key_layout.format == BF16 ? static_cast<const void*>(bf16_keys) : keys, nullptr};
        queries.multiply(key_matrix, 0, max_slots, first_query, count, scores, SLOT_TILE);
        for (int64_t n = 0; n < count; n++) {
            const int64_t slots = std::max<int64_t>(0, visible(i + n));
            const int64_t query = i + n - begin;
            float* exponentials = scores + n * SLOT_TILE;
            std::fill(exponentials + slots, exponentials + max_slots, 0.0f);
            if (!slots) continue;
            const SoftmaxState tile = state.isa.exp_scores(exponentials, slots, static_cast<float>(a.scale));
            if (at == 0) softmax[query] = tile;
            else merge_softmax(tile, softmax[query], exponentials, slots, outputs + query * stride, a.V);
        }
        const RowBlock value_rows = {{values, nullptr}, {FP32, SLOT_TILE, a.V, 0}, 0, max_slots};
        state.isa.weighted_sum[FP32](value_rows, a.V, scores, SLOT_TILE, count, outputs + (i - begin) * stride, stride);
    }

    const ForwardState& state;
    const ForwardArgs& args;
    const Attention& a;
    const int64_t Q, key_width, C, X;
    const void* kv_blocks;
    float* heads;  // (T, H, V)
    const Layout key_layout;
    Activations queries;  // (H, Q)
    Activations latents;  // (SLOT_TILE) of this thread, as all below
    int64_t query_parts = 1;
    float* keys = nullptr;            // (SLOT_TILE, N + R)
    uint16_t* bf16_keys = nullptr;    // the same, where products are bfloat16
    float* values = nullptr;          // (SLOT_TILE, V)
    float* scores = nullptr;          // (QUERY_TILE, SLOT_TILE)
    float* outputs = nullptr;         // (Q, padded(V))
    SoftmaxState* softmax = nullptr;  // (Q)
};

}  // namespace
}  // namespace soli
