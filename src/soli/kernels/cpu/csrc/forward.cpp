// One call for the tokens of some requests, one of each or many: from rows or token ids through all layers and the norm after
// them, and to the logits of those that want them, by one team of threads.
#include "forward_attention.h"
#include "forward_feed_forward.h"
#include "forward_head.h"

namespace soli {
namespace {

void start_row(const ForwardPass& pass, int64_t pairs, int64_t t) {
    const ForwardArgs& call = pass.call;
    call.x.copy((call.token_ids ? call.token_ids[t] : t) * call.D, call.D, pass.x + t * call.D);
    for (int64_t i = 0; i < pairs; i++) {
        const float angle = static_cast<float>(call.positions[t]) * call.frequencies[i];
        pass.cos[t * pairs + i] = std::cos(angle) * static_cast<float>(call.cos_sin_scale);
        pass.sin[t * pairs + i] = std::sin(angle) * static_cast<float>(call.cos_sin_scale);
    }
}

void finish_row(const ForwardPass& pass, int64_t t) {
    float* row = pass.x + t * pass.call.D;
    normed(pass.call.norm, row, pass.call.D, row);
    write_out(row, pass.call.D, pass.call.y, t * pass.call.D, pass.call.dtype);
}

// The decisions of the next layer that has a router.
Routings after(const Routings& now, const Router& router, int64_t T) {
    const int64_t E = T * router.E(), K = E ? T * router.K : 0, G = E ? T * router.G : 0;
    return {now.ids + K, now.weights + K, now.scores + E, now.biased + E, now.groups + G};
}

// Where each row's latent is kept; false when a slot lies in no page, or the chunks are not the rows after the singles.
bool find_slots(const ForwardArgs& call, int64_t* slots) {
    if (!readable(call.block_table, call.blocks_per_sequence, call.lengths, call.num_decode_tokens, call.block_count,
                  call.block_size))
        return false;
    for (int64_t t = 0; t < call.num_decode_tokens; t++) {
        const int64_t place = call.lengths[t] - 1;
        slots[t] = call.block_table[t * call.blocks_per_sequence + place / call.block_size] * call.block_size +
                   place % call.block_size;
    }
    int64_t t = call.num_decode_tokens;
    for (const PrefillChunk* chunk = call.chunks; chunk < call.chunks + call.chunk_count; chunk++) {
        if (chunk->start != t || chunk->stop <= t || chunk->stop > call.T || chunk->first_position < 0) return false;
        const int64_t places = chunk->first_position + chunk->stop - t;
        for (int64_t i = 0; i < places; i++)
            if (chunk->slots[i] < 0 || chunk->slots[i] >= call.block_count * call.block_size) return false;
        for (; t < chunk->stop; t++) slots[t] = chunk->slots[chunk->first_position + t - chunk->start];
    }
    return t == call.T;
}

size_t most_used(const ForwardPass& pass) {
    size_t most = HeadStep(pass, {nullptr}).used;
    for (const Layer* layer = pass.call.layers; layer < pass.call.layers + pass.call.layer_count; layer++)
        most = std::max({most, AttentionStep(pass, layer->attention, nullptr, {nullptr}).used,
                         FeedForwardStep(pass, layer->feed_forward, {}, nullptr, {nullptr}).used});
    return most;
}

}  // namespace

// Writes the rows' latents into the pages, the routers' decisions, and y. Returns 0; 2 when there is no memory for the
// scratch; 3 when a row has a slot that lies in no page; 4 for more rows than MAX_TOKENS; 5 for a word that does not exist.
extern "C" int soli_forward(const ForwardArgs* given) {
    static thread_local Scratch scratch;
    const ForwardArgs& call = *given;
    int64_t slots[MAX_TOKENS];
    if (call.T > MAX_TOKENS) return TOO_MANY_TOKENS;
    if (!find_slots(call, slots)) return BAD_SLOT;
    for (int64_t t = 0; t < call.T && call.token_ids; t++)
        if (call.token_ids[t] < 0 || call.token_ids[t] >= call.vocab_size) return BAD_TOKEN_ID;
    const int64_t pairs = call.layer_count ? call.layers->attention.R / 2 : 0;
    ForwardPass pass = {call, kernels(call.isa), nullptr, nullptr, nullptr, slots};
    const size_t used = most_used(pass), rows = Scratch::bytes<float>(call.T * call.D),
                 turns = Scratch::bytes<float>(call.T * pairs);
    if (!scratch.reserve(rows + 2 * turns + used)) return NO_MEMORY;
    pass.x = scratch.take<float>(call.T * call.D);
    pass.cos = scratch.take<float>(call.T * pairs), pass.sin = scratch.take<float>(call.T * pairs);
    const Area area = {scratch.take<uint8_t>(used)};
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
#pragma omp for
        for (int64_t t = 0; t < call.T; t++) start_row(pass, pairs, t);
        Routings decisions = call.routings;
        for (int64_t i = 0; i < call.layer_count; i++) {
            const Layer& layer = call.layers[i];
            AttentionStep(pass, layer.attention, call.kv_blocks[i], area).run();
            FeedForwardStep(pass, layer.feed_forward, decisions, call.masked_experts ? call.masked_experts[i] : nullptr,
                            area)
                .run();
            decisions = after(decisions, layer.feed_forward.router, call.T);
        }
#pragma omp for
        for (int64_t t = 0; t < call.T; t++) finish_row(pass, t);
        if (call.logit_count) HeadStep(pass, area).run();
    }
    return NO_ERROR;
}

}  // namespace soli
