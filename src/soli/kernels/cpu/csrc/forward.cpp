// The fused forward: from hidden states or token ids through all layers and the norm after them, and to the logits of
// the tokens that get some, by one team of threads. Decode tokens of many sequences and prefill chunks come in one
// batch. Where a layer's experts are not all in memory the pass stops, and another call continues it there: what it
// has computed so far stays in the thread's scratch.
#include "forward_attention.h"
#include "forward_feed_forward.h"
#include "forward_head.h"
#include "forward_prediction.h"

namespace soli {
namespace {

// Row t of the residual stream, and the cosines and sines of its rotary pairs.
void embed_token(const ForwardState& state, int64_t pairs, int64_t t) {
    const ForwardArgs& args = state.args;
    args.x.copy((args.token_ids ? args.token_ids[t] : t) * args.D, args.D, state.x + t * args.D);
    for (int64_t i = 0; i < pairs; i++) {
        const float angle = static_cast<float>(args.positions[t]) * args.frequencies[i];
        state.cos[t * pairs + i] = std::cos(angle) * static_cast<float>(args.cos_sin_scale);
        state.sin[t * pairs + i] = std::sin(angle) * static_cast<float>(args.cos_sin_scale);
    }
}

void store_final_norm(const ForwardState& state, int64_t t) {
    const ForwardArgs& args = state.args;
    float* x = state.x + t * args.D;
    rms_norm(args.norm, x, args.D, x);
    store_as(args.dtype, x, args.D, args.y, t * args.D);
}

// Where the decisions after this router's are stored; a dense layer has none.
Routings next_routings(const Routings& current, const Router& router, int64_t T) {
    const int64_t scores = T * router.E();
    const int64_t ids = scores ? T * router.K : 0;
    const int64_t groups = scores ? T * router.G : 0;
    return {current.ids + ids,
            current.weights + ids,
            current.scores + scores,
            current.biased + scores,
            current.groups + groups,
            current.states ? current.states + router.E() : nullptr,
            current.waited && scores ? current.waited + 1 : current.waited};
}

// The slot that each token's latent is written to; false when a slot is outside the KV blocks, or the chunks are not
// the tokens after the decode tokens.
bool assign_slots(const ForwardArgs& args, int64_t* slots) {
    const int64_t W = args.blocks_per_sequence;
    const int64_t S = args.block_size;
    if (!all_slots_exist(args.block_table, W, args.lengths, args.num_decode_tokens, args.block_count, S)) return false;
    for (int64_t t = 0; t < args.num_decode_tokens; t++) {
        const int64_t position = args.lengths[t] - 1;
        slots[t] = args.block_table[t * W + position / S] * S + position % S;
    }
    int64_t t = args.num_decode_tokens;
    for (const PrefillChunk* chunk = args.chunks; chunk < args.chunks + args.chunk_count; chunk++) {
        if (chunk->start != t || chunk->stop <= t || chunk->stop > args.T || chunk->first_position < 0) return false;
        const int64_t positions = chunk->first_position + chunk->stop - t;
        for (int64_t i = 0; i < positions; i++)
            if (chunk->slots[i] < 0 || chunk->slots[i] >= args.block_count * S) return false;
        for (; t < chunk->stop; t++) slots[t] = chunk->slots[chunk->first_position + t - chunk->start];
    }
    return t == args.T;
}

// Writes the tokens that attend to a selection, and returns how many they are. One decode token that does makes all
// decode tokens do so: they are computed together.
int64_t find_sparse_tokens(const ForwardArgs& args, int64_t topk, int64_t* tokens) {
    int64_t count = 0;
    for (int64_t t = 0; t < args.num_decode_tokens; t++)
        if (args.lengths[t] > topk) count = args.num_decode_tokens;
    for (int64_t t = 0; t < count; t++) tokens[t] = t;
    for (const PrefillChunk* chunk = args.chunks; chunk < args.chunks + args.chunk_count; chunk++)
        for (int64_t t = chunk->start + dense_tokens(*chunk, topk); t < chunk->stop; t++) tokens[count++] = t;
    return count;
}

// Bytes that the arena needs: of the step that takes most.
size_t arena_bytes(const ForwardState& state) {
    size_t bytes = HeadStep(state, {nullptr}).used;
    for (const Layer* layer = state.args.layers; layer < state.args.layers + state.args.layer_count; layer++)
        bytes = std::max({bytes, AttentionStep(state, layer->attention, nullptr, nullptr, {nullptr}).used,
                          FeedForwardStep(state, layer->feed_forward, {}, nullptr, {nullptr}).used});
    return bytes;
}

// Whether the experts of the layer after layer i are to be predicted.
bool next_router(const ForwardArgs& args, int64_t i) {
    return args.paging && args.paging->predicted && i + 1 < args.layer_count &&
           args.layers[i + 1].feed_forward.router.E();
}

// Bytes that predictions need.
size_t prediction_bytes(const ForwardState& state) {
    size_t bytes = 0;
    for (int64_t i = 0; i < state.args.layer_count; i++)
        if (next_router(state.args, i))
            bytes = std::max(bytes, PredictionStep(state, state.args.layers[i + 1].feed_forward, {nullptr}).used);
    return bytes;
}

// One layer. `paging`: where the pass stops, or which experts it continues with. False where it has stopped or failed.
bool run_layer(const ForwardState& state, int64_t i, const Routings& routings, bool continues, Arena arena,
               Arena prediction, std::atomic<bool>& read_failed) {
    const ForwardArgs& args = state.args;
    const Layer& layer = args.layers[i];
    const uint8_t* masked_experts = args.masked_experts ? args.masked_experts[i] : nullptr;
    void* index_keys = args.index_keys ? args.index_keys[i] : nullptr;
    if (!continues) AttentionStep(state, layer.attention, args.kv_blocks[i], index_keys, arena).run();
    FeedForwardStep feed_forward(state, layer.feed_forward, routings, masked_experts, arena);
    const int64_t E = layer.feed_forward.router.E();
    if (!continues && !feed_forward.choose_experts()) {
        if (next_router(args, i))
            PredictionStep(state, args.layers[i + 1].feed_forward, prediction).run(args.paging->predicted);
        return false;
    }
    const int64_t begin = continues ? args.paging->begin : 0;
    const int64_t end = continues ? args.paging->end : E;
    const bool complete = feed_forward.compute(begin, end, continues);
    if (!complete) read_failed = true;
    return complete && end == E;
}

}  // namespace

// Writes the tokens' latents into the KV blocks, the routers' decisions, y and the logits. Returns an ErrorCode.
extern "C" int soli_forward(const ForwardArgs* arguments) {
    static thread_local Scratch scratch;
    static thread_local ThreadBudget budget;
    static thread_local int64_t pass = 0;
    ForwardArgs args = *arguments;
    const int64_t start = args.paging ? args.paging->layer : -1;
    if (start >= 0 && args.paging->pass != pass) return CANNOT_CONTINUE;
    if (start < 0) pass++;
    Team team(budget, args.threads, start < 0 ? 0 : args.paging->threads);
    args.threads = team.threads;
    int64_t slots[MAX_TOKENS];
    int64_t sparse_tokens[MAX_TOKENS];
    if (args.T > MAX_TOKENS) return TOO_MANY_TOKENS;
    if (!assign_slots(args, slots)) return BAD_SLOT;
    for (int64_t t = 0; t < args.T && args.token_ids; t++)
        if (args.token_ids[t] < 0 || args.token_ids[t] >= args.vocab_size) return BAD_TOKEN_ID;
    const int64_t pairs = args.layer_count ? args.layers->attention.R / 2 : 0;
    const int64_t topk = args.layer_count ? args.layers->attention.topk : 0;
    const SparseTokens sparse = {sparse_tokens, topk ? find_sparse_tokens(args, topk, sparse_tokens) : 0, nullptr};
    ForwardState state = {args, kernels(args.isa), nullptr, nullptr, nullptr, slots, team, sparse};
    const size_t step_bytes = arena_bytes(state);
    const size_t x_bytes = Scratch::bytes<float>(args.T * args.D);
    const size_t rope_bytes = Scratch::bytes<float>(args.T * pairs);
    const size_t guess_bytes = prediction_bytes(state);
    const size_t selected_bytes = Scratch::bytes<int32_t>(sparse.count * topk);
    if (!scratch.reserve(x_bytes + 2 * rope_bytes + selected_bytes + step_bytes + guess_bytes)) return NO_MEMORY;
    state.x = scratch.take<float>(args.T * args.D);
    state.cos = scratch.take<float>(args.T * pairs);
    state.sin = scratch.take<float>(args.T * pairs);
    state.sparse.selected = scratch.take<int32_t>(sparse.count * topk);
    const Arena arena = {scratch.take<uint8_t>(step_bytes)};
    const Arena prediction = {scratch.take<uint8_t>(guess_bytes)};
    std::atomic<bool> read_failed{false};
    std::atomic<int64_t> stopped_at{-1};
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
    {
        if (start < 0) {
#pragma omp for nowait
            for (int64_t t = 0; t < args.T; t++) embed_token(state, pairs, t);
            team.barrier();
        }
        Routings routings = args.routings;
        int64_t i = 0;
        for (; i < args.layer_count; i++) {
            if (i >= start && !run_layer(state, i, routings, i == start, arena, prediction, read_failed)) break;
            routings = next_routings(routings, args.layers[i].feed_forward.router, args.T);
        }
        if (i < args.layer_count) {
            stopped_at = i;
        } else {
#pragma omp for nowait
            for (int64_t t = 0; t < args.T; t++) store_final_norm(state, t);
            team.barrier();
            if (args.logit_count) HeadStep(state, arena).run();
        }
    }
    if (args.paging) {
        if (stopped_at >= 0) team.forget();
        args.paging->layer = stopped_at;
        args.paging->predicted_tokens =
            stopped_at >= 0 && next_router(args, stopped_at) ? std::min(args.T, MAX_PREDICTED_TOKENS) : 0;
        args.paging->pass = pass;
        args.paging->threads = args.threads;
    }
    return read_failed ? READ_FAILED : NO_ERROR;
}

}  // namespace soli
