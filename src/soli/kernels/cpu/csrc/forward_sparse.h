// Sparse attention (DeepSeek-V3.2 report, eq. 1): an indexer scores every token up to the query's own, and absorbed
// attention reads the latents of the `topk` best. What a score costs is one product with a key of I numbers for each of
// J heads; what attention costs no longer grows with the sequence.
//
// A score is sum over j of w_j relu(q_j k / sqrt(I)) / sqrt(J). Of equal scores the first positions are selected, so
// that a selection does not depend on what is computed beside it. Tokens are computed in groups of consecutive ones,
// which bound the memory and change no result.
//
// Shapes: see forward_args.h; n tokens of a group.
#pragma once
#include <functional>

#include "forward_absorbed.h"

namespace soli {
namespace {

constexpr int64_t GROUP_BYTES = 64 << 20;  // of a group's buffers, about
constexpr int64_t MIN_GROUP = 4;
constexpr int64_t MAX_GROUP = 64;              // tokens
constexpr int64_t SCORE_SPAN = 8 * SLOT_TILE;  // slots of a work item

// How many tokens up to its own token t could attend to.
inline int64_t visible_tokens(const ForwardArgs& args, const PrefillChunk* chunk, int64_t t) {
    return chunk ? chunk->first_position + t - chunk->start + 1 : args.lengths[t];
}

class SparseAttention {
public:
    SparseAttention(const ForwardState& state, const Attention& a, const void* kv_blocks, const void* index_keys,
                    float* heads, Arena& arena)
        : state(state),
          args(state.args),
          a(a),
          S(args.block_size),
          slot_bytes(a.X() * dtype_bytes(args.dtype)),
          kv_blocks(static_cast<const uint8_t*>(kv_blocks)),
          key_matrix{index_keys, nullptr},
          key_layout{args.dtype == FLOAT32 ? FP32 : BF16, args.block_count * S, a.I(), 0},
          index_queries(state.isa, key_layout, args.dtype),
          capacity(group_tokens()) {
        if (!capacity) return;
        absorbed.emplace(state, a, capacity, a.topk, heads, arena);
        gathered = arena.take<uint8_t>(capacity * a.topk * slot_bytes);
        lengths = state.take_per_thread<int32_t>(arena, capacity);
        blocks = state.take_per_thread<int32_t>(arena, capacity);
        if (!a.has_indexer()) return;
        max_visible = 0;
        for (int64_t i = 0; i < state.sparse.count; i++)
            max_visible = std::max(max_visible, visible(state.sparse.tokens[i]));
        take(arena, index_queries, capacity * a.J);
        index_q = arena.take<float>(capacity * a.J * a.I());
        scores = arena.take<float>(capacity * padded(max_visible));
        head_scores = state.take_per_thread<float>(arena, a.J * SLOT_TILE);
        factors = state.take_per_thread<float>(arena, a.J);
        sorted = state.take_per_thread<float>(arena, max_visible);
        score_scale = 1.0f / std::sqrt(static_cast<float>(a.J * a.I()));
    }

    // Attention of all sparse tokens. `q`: the rotated queries (H, T, N + R); `index_input`: the query latents, packed
    // for index_q; `index_weights`: (T, J).
    void run(const float* q, const Activations& index_input, const float* index_weights) {
        const SparseTokens& sparse = state.sparse;
        for (int64_t i = 0, n; i < sparse.count; i += n) {
            for (n = 1; n < capacity && i + n < sparse.count && sparse.tokens[i + n] == sparse.tokens[i] + n;) n++;
            const int64_t first = sparse.tokens[i];
            for (int64_t t = 0; t < n; t++) {
                lengths[t] = static_cast<int32_t>(std::min(a.topk, visible(first + t)));
                blocks[t] = static_cast<int32_t>(t);
            }
            absorb_and_project(q, index_input, first, n);
            int32_t* selected = sparse.selected + i * a.topk;
            if (a.has_indexer()) select(index_weights, first, n, selected);
            gather(n, selected);
            absorbed->attend(absorbed->attention(gathered, n, a.topk), first, n, 1, blocks, lengths);
        }
    }

private:
    int64_t group_tokens() const {
        if (!state.sparse.count) return 0;
        const int64_t bytes = a.topk * slot_bytes +
                              4 * a.H * (padded(a.X()) + LatentAttention::Splits(a.topk).count * (padded(a.C()) + 2));
        return std::min({state.sparse.count, std::max(GROUP_BYTES / bytes, MIN_GROUP), MAX_GROUP});
    }

    const PrefillChunk* chunk_of(int64_t t) const {
        if (t < args.num_decode_tokens) return nullptr;
        const PrefillChunk* chunk = args.chunks;
        while (chunk->stop <= t) chunk++;
        return chunk;
    }
    int64_t visible(int64_t t) const { return visible_tokens(args, chunk_of(t), t); }

    // The slot of a position of token t's sequence.
    int64_t slot(const PrefillChunk* chunk, int64_t t, int64_t position) const {
        if (chunk) return chunk->slots[position];
        return args.block_table[t * args.blocks_per_sequence + position / S] * S + position % S;
    }

    // The group's absorbed queries, and the indexer's, rotated.
    void absorb_and_project(const float* q, const Activations& index_input, int64_t first, int64_t n) {
        const int64_t width = a.N + a.R;
        const int64_t rows = a.has_indexer() ? a.J * a.I() : 0;
#pragma omp for schedule(static) nowait
        for (int64_t h = 0; h < a.H; h++) absorbed->absorb(h, q + (h * args.T + first) * width, n);
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < (rows ? a.J : 0); j++) {
            index_input.multiply(a.index_q.matrix, j * a.I(), a.I(), first, n, index_q + j * a.I(), rows);
            for (int64_t t = 0; t < n; t++) {
                float* query = index_q + t * rows + j * a.I();
                rotate_pairs(state, first + t, a.R / 2, a.index_interleaved, query);
                index_queries.pack(t * a.J + j, query, FLOAT32);
            }
        }
        state.team.barrier();
    }

    void select(const float* index_weights, int64_t first, int64_t n, int32_t* selected) {
        const int64_t spans = (max_visible + SCORE_SPAN - 1) / SCORE_SPAN;
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < n * spans; item++) {
            const int64_t t = item / spans;
            const int64_t end = std::min(visible(first + t), (item % spans + 1) * SCORE_SPAN);
            for (int64_t at = item % spans * SCORE_SPAN; at < end; at += SLOT_TILE)
                score_tile(index_weights + (first + t) * a.J, first, t, at, std::min(SLOT_TILE, end - at));
        }
        state.team.barrier();
#pragma omp for schedule(dynamic) nowait
        for (int64_t t = 0; t < n; t++)
            select_slots(first + t, scores + t * padded(max_visible), selected + t * a.topk);
        state.team.barrier();
    }

    // The scores of `count` positions from `at` on for token first + t.
    void score_tile(const float* weights, int64_t first, int64_t t, int64_t at, int64_t count) const {
        const PrefillChunk* chunk = chunk_of(first + t);
        for (int64_t i = 0, rows; i < count; i += rows) {  // the rows of one KV block, or that are neighbours
            const int64_t row = slot(chunk, first + t, at + i);
            for (rows = 1; i + rows < count && slot(chunk, first + t, at + i + rows) == row + rows;) rows++;
            index_queries.multiply(key_matrix, row, rows, t * a.J, a.J, head_scores + i, SLOT_TILE);
        }
        for (int64_t i = 0; i < a.J * SLOT_TILE; i++) head_scores[i] = head_scores[i] > 0 ? head_scores[i] : 0;
        for (int64_t j = 0; j < a.J; j++) factors[j] = weights[j] * score_scale;
        float* total = scores + t * padded(max_visible) + at;
        std::fill(total, total + SLOT_TILE, 0.0f);
        const RowBlock heads = {{head_scores, nullptr}, {FP32, a.J, SLOT_TILE, 0}, 0, a.J};
        state.isa.weighted_sum[FP32](heads, count, factors, a.J, 1, total, SLOT_TILE);
    }

    // The slots of the topk best scores, in the order of positions.
    void select_slots(int64_t t, float* score, int32_t* selected) const {
        const PrefillChunk* chunk = chunk_of(t);
        const int64_t count = visible_tokens(args, chunk, t);
        float least = -INFINITY;
        int64_t equal = count;  // how many of the least score are selected
        if (count > a.topk) {
            for (int64_t i = 0; i < count; i++) {
                if (score[i] != score[i]) score[i] = -INFINITY;  // a NaN has no place in an order
                sorted[i] = score[i];
            }
            std::nth_element(sorted, sorted + a.topk - 1, sorted + count, std::greater<float>());
            least = sorted[a.topk - 1];
            equal = a.topk;
            for (int64_t i = 0; i < count; i++) equal -= score[i] > least;
        }
        for (int64_t i = 0; i < count; i++) {
            const bool is_above = count > a.topk && score[i] > least;
            if (is_above || ((count <= a.topk || score[i] == least) && equal-- > 0))
                *selected++ = static_cast<int32_t>(slot(chunk, t, i));
        }
    }

    // Copies the selected latents into KV blocks of topk slots, one for each token.
    void gather(int64_t n, const int32_t* selected) {
        const int64_t tiles = (a.topk + SLOT_TILE - 1) / SLOT_TILE;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < n * tiles; item++) {
            const int64_t t = item / tiles;
            const int64_t end = std::min<int64_t>(lengths[t], (item % tiles + 1) * SLOT_TILE);
            for (int64_t i = item % tiles * SLOT_TILE; i < end; i++)
                std::memcpy(gathered + (t * a.topk + i) * slot_bytes, kv_blocks + selected[t * a.topk + i] * slot_bytes,
                            slot_bytes);
        }
        state.team.barrier();
    }

    const ForwardState& state;
    const ForwardArgs& args;
    const Attention& a;
    const int64_t S, slot_bytes;
    const uint8_t* kv_blocks;
    const Matrix key_matrix;  // (P * S, I)
    const Layout key_layout;
    Activations index_queries;  // (n, J)
    const int64_t capacity;     // of a group
    std::optional<AbsorbedAttention> absorbed;
    int64_t max_visible = 0;
    uint8_t* gathered = nullptr;   // (n, topk, X)
    int32_t* lengths = nullptr;    // (n) of this thread
    int32_t* blocks = nullptr;     // (n) of this thread: 0, 1, 2, ...
    float* index_q = nullptr;      // (n, J * I)
    float* scores = nullptr;       // (n, padded(max_visible))
    float* head_scores = nullptr;  // (J, SLOT_TILE) of this thread
    float* factors = nullptr;      // (J) of this thread
    float* sorted = nullptr;       // (max_visible) of this thread
    float score_scale = 0;
};

}  // namespace
}  // namespace soli
