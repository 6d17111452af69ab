// Attention of one query per sequence over the latent cache in KV blocks: absorbed MLA (DeepSeek-V2 report, section
// 2.1.2). All heads share one key per slot, the latent and the rotated key side by side; the value is the latent
// itself.
//
// The slots of a sequence are cut into at most MAX_SPLITS splits. A split is a work item and goes through its slots in
// tiles with a running softmax: a tile's latents stay in the second-level cache while all heads read them. Where tiles
// and splits end depends on the sequence's length alone; KV blocks only say where slots are. So results are
// batch-invariant, with blocks of any size and any number of threads.
//
// Shapes: B sequences, H heads, P KV blocks of S slots, W blocks of a block table's row, X = C latent + R rotary width.
#pragma once
#include <algorithm>
#include <cmath>

#include "activations.h"

namespace soli {
namespace {

constexpr int64_t SLOT_TILE = 128;
constexpr int64_t MAX_SPLITS = 8;  // of a sequence
constexpr int64_t HEAD_TILE = 16;  // heads whose scores are computed together

// Online softmax: merges a tile of `slots` exponentials into `state`. What has the smaller maximum is scaled down:
// `output`, the C values summed so far, or `exponentials`, the tile's.
inline void merge_softmax(SoftmaxState tile, SoftmaxState& state, float* exponentials, int64_t slots, float* output,
                          int64_t C) {
    const float max = std::max(state.max, tile.max);
    const float state_factor = std::exp(state.max - max);
    const float tile_factor = std::exp(tile.max - max);
    if (state_factor != 1.0f)
        for (int64_t i = 0; i < C; i++) output[i] *= state_factor;
    if (tile_factor != 1.0f)
        for (int64_t i = 0; i < slots; i++) exponentials[i] *= tile_factor;
    state = {max, state.sum * state_factor + tile.sum * tile_factor};
}

struct LatentAttention {
    const Kernels& isa;
    Layout block;  // of a KV block as a matrix: FP32 or BF16, S rows of X
    int64_t P, H, C;
    float scale;  // of the scores
    const uint8_t* kv_blocks;

    // Of one split: outputs (H, padded(C)), then max (H), then sum (H).
    int64_t split_floats() const { return H * (padded(C) + 2); }

    // How the slots of a sequence are cut: `count` splits of `slots` slots.
    struct Splits {
        int64_t count, slots;
        explicit Splits(int64_t length) {
            const int64_t tiles = (length + SLOT_TILE - 1) / SLOT_TILE;
            const int64_t tiles_per_split = (tiles + MAX_SPLITS - 1) / MAX_SPLITS;
            slots = tiles_per_split * SLOT_TILE;
            count = tiles_per_split ? (tiles + tiles_per_split - 1) / tiles_per_split : 0;
        }
    };

    // Calls run(rows, offset) for the part of the slots begin ... end - 1 in each KV block.
    template <class Run>
    void for_each_block(const int32_t* block_table, int64_t begin, int64_t end, Run run) const {
        const int64_t S = block.O;
        for (int64_t at = begin; at < end;) {
            const int64_t count = std::min(S - at % S, end - at);
            const Matrix matrix = {kv_blocks + block_table[at / S] * S * block.row_bytes(), nullptr};
            run(RowBlock{matrix, block, at % S, count}, at - begin);
            at += count;
        }
    }

    // Heads head ... head + heads - 1 of one sequence over slots begin ... end - 1, into `split` (see split_floats).
    // `queries` has the sequence's heads from `first_query` on.
    void attend_latents(const int32_t* block_table, int64_t begin, int64_t end, const Activations& queries,
                        int64_t first_query, int64_t head, int64_t heads, float* split) const {
        for (; heads > 0; head += HEAD_TILE, heads -= HEAD_TILE)
            attend_head_tile(block_table, begin, end, queries, first_query, head, std::min(HEAD_TILE, heads), split);
    }

    // Merges all splits of one sequence and head into the first, and normalises: C floats.
    const float* merge_splits(float* split, int64_t splits, int64_t head) const {
        const int64_t stride = padded(C);
        const int64_t max_at = H * stride + head;
        float max = -INFINITY;
        float sum = 0;
        float* output = split + head * stride;
        for (int64_t i = 0; i < splits; i++) max = std::max(max, split[i * split_floats() + max_at]);
        for (int64_t i = 0; i < splits; i++, split += split_floats()) {
            const float factor = std::exp(split[max_at] - max);
            const float* values = split + head * stride;
            for (int64_t c = 0; c < C; c++) output[c] = i == 0 ? factor * values[c] : output[c] + factor * values[c];
            sum += factor * split[max_at + H];
        }
        for (int64_t c = 0; c < C; c++) output[c] /= sum;
        return output;
    }

private:
    void attend_head_tile(const int32_t* block_table, int64_t begin, int64_t end, const Activations& queries,
                          int64_t first_query, int64_t head, int64_t count, float* split) const {
        const int64_t stride = padded(C);
        alignas(64) float scores[HEAD_TILE * SLOT_TILE];
        float* output = split + head * stride;
        float* max = split + H * stride + head;
        float* sum = max + H;
        std::fill(output, output + count * stride, 0.0f);
        for (int64_t at = begin; at < end; at += SLOT_TILE) {
            const int64_t slots = std::min(SLOT_TILE, end - at);
            for_each_block(block_table, at, at + slots, [&](const RowBlock& rows, int64_t offset) {
                queries.multiply(rows.matrix, rows.first, rows.count, first_query + head, count, scores + offset,
                                 SLOT_TILE);
            });
            for (int64_t h = 0; h < count; h++) {
                float* exponentials = scores + h * SLOT_TILE;
                const SoftmaxState tile = isa.exp_scores(exponentials, slots, scale);
                SoftmaxState state = {max[h], sum[h]};
                if (at == begin) state = tile;
                else merge_softmax(tile, state, exponentials, slots, output + h * stride, C);
                max[h] = state.max;
                sum[h] = state.sum;
            }
            for_each_block(block_table, at, at + slots, [&](const RowBlock& rows, int64_t offset) {
                isa.weighted_sum[block.format](rows, C, scores + offset, SLOT_TILE, count, output, stride);
            });
        }
    }
};

// Whether each of B sequences has a slot, and all its slots are in KV blocks that exist.
inline bool all_slots_exist(const int32_t* block_table, int64_t W, const int32_t* lengths, int64_t B, int64_t P,
                            int64_t S) {
    for (int64_t b = 0; b < B; b++) {
        const int64_t blocks = (lengths[b] + S - 1) / S;
        if (lengths[b] < 1 || blocks > W) return false;
        for (int64_t w = 0; w < blocks; w++)
            if (block_table[b * W + w] < 0 || block_table[b * W + w] >= P) return false;
    }
    return true;
}

// The sequences of one call, cut into work items for a team of threads.
struct LatentAttentionBatch {
    const LatentAttention& attention;
    int64_t B, W;
    const int32_t* block_table;
    const int32_t* lengths;
    int64_t max_splits;  // of the longest sequence
    int64_t heads_per_item;
    float* splits = nullptr;  // (B, max_splits, split_floats)

    LatentAttentionBatch(const LatentAttention& attention, int64_t B, int64_t W, const int32_t* block_table,
                         const int32_t* lengths, int64_t threads)
        : attention(attention),
          B(B),
          W(W),
          block_table(block_table),
          lengths(lengths),
          max_splits(0) {
        for (int64_t b = 0; b < B; b++) max_splits = std::max(max_splits, LatentAttention::Splits(lengths[b]).count);
        // Few items are cut by heads too; each then reads the latents for itself.
        const bool enough_items = B * max_splits >= 2 * threads;
        heads_per_item = enough_items ? attention.H : std::max<int64_t>(1, std::min(HEAD_TILE, attention.H / threads));
    }

    int64_t floats() const { return B * max_splits * attention.split_floats(); }
    int64_t head_groups() const { return (attention.H + heads_per_item - 1) / heads_per_item; }
    int64_t items() const { return B * max_splits * head_groups(); }

    // Work item: a sequence, a split and a group of heads. The query of sequence b and head h is b * H + h.
    void attend(const Activations& queries, int64_t item) const {
        const int64_t b = item / head_groups() / max_splits;
        const int64_t split = item / head_groups() % max_splits;
        const int64_t head = item % head_groups() * heads_per_item;
        const LatentAttention::Splits cut(lengths[b]);
        if (split >= cut.count) return;
        const int64_t begin = split * cut.slots;
        const int64_t end = std::min<int64_t>(lengths[b], begin + cut.slots);
        attention.attend_latents(block_table + b * W, begin, end, queries, b * attention.H, head,
                                 std::min(heads_per_item, attention.H - head),
                                 splits + (b * max_splits + split) * attention.split_floats());
    }

    const float* output(int64_t b, int64_t head) const {
        return attention.merge_splits(splits + b * max_splits * attention.split_floats(),
                                      LatentAttention::Splits(lengths[b]).count, head);
    }
};

}  // namespace
}  // namespace soli
