// Attention of many tokens of one text, expanded (paper equations 5-11): keys and values are written out from the latents,
// a block of slots at a time and one head after another, and all of the head's queries meet the block before the next.
//
// A running softmax takes the blocks in order (Latents::join), so a query has the same bits whatever part of the text is
// read with it. Where the processor has bfloat16 products, keys and queries of bfloat16 rows are rounded to that.
#pragma once
#include "forward.h"

namespace soli {
namespace {

constexpr int64_t QUERIES = 64;  // that meet a block together

class PromptStep {
public:
    // Queries of the rows from call.num_decode_tokens on, head by head: put() them, then run() the pieces in any order.
    PromptStep(const ForwardPass& pass, const Attention& a, const void* pages, float* heads, Area& area)
        : pass(pass),
          call(pass.call),
          a(a),
          R(call.T - call.num_decode_tokens),
          W(a.N + a.R),
          C(a.C()),
          X(a.X()),
          pages(pages),
          heads(heads),
          key{call.dtype == HALF && pass.isa.dots16[BF16] ? BF16 : FP32, BLOCK, W, 0},
          queries(pass.isa, key, call.dtype),
          latents(pass.tokens(a.kv_b)) {
        if (!R) return;
        // Few pieces are cut by queries too; each then writes out the keys for itself.
        const int64_t pieces = a.H * call.chunk_count, wanted = 2 * call.threads;
        parts = pieces >= wanted ? 1 : (wanted + pieces - 1) / pieces;
        take(area, queries, R * a.H);
        latents.data = pass.own<uint8_t>(area, latents.bytes(BLOCK));
        keys = pass.own<float>(area, BLOCK * W), values = pass.own<float>(area, BLOCK * a.V);
        narrow = pass.own<uint16_t>(area, key.format == BF16 ? BLOCK * W : 0);
        sums = pass.own<float>(area, R * padded(a.V)), softs = pass.own<Soft>(area, R);
        scores = pass.own<float>(area, QUERIES * BLOCK);
    }

    void put(int64_t t, int64_t head, const float* query) {
        queries.put(head * R + t - call.num_decode_tokens, query, FLOAT);
    }

    int64_t pieces() const { return R ? call.chunk_count * parts * a.H : 0; }

    void run(int64_t piece) const {
        const PrefillChunk& chunk = call.chunks[piece / a.H / parts];
        const int64_t count = chunk.stop - chunk.start, span = (count + parts - 1) / parts, head = piece % a.H;
        const int64_t begin = piece / a.H % parts * span, end = std::min(count, begin + span);
        std::fill(sums, sums + std::max<int64_t>(0, end - begin) * padded(a.V), 0.0f);
        for (int64_t at = 0; at < chunk.first_position + end && begin < end; at += BLOCK) {
            const int64_t slots = std::min(BLOCK, chunk.first_position + end - at);
            write_out_block(chunk.slots + at, slots, head);
            for (int64_t i = begin; i < end; i += QUERIES) meet(chunk, head, begin, i, std::min(QUERIES, end - i), at);
        }
        for (int64_t i = begin; i < end; i++) {
            const float* from = sums + (i - begin) * padded(a.V);
            float* to = heads + ((chunk.start + i) * a.H + head) * a.V;
            for (int64_t v = 0; v < a.V; v++) to[v] = from[v] / softs[i - begin].sum;
        }
    }

private:
    // One head's keys and values of some slots.
    void write_out_block(const int64_t* slots, int64_t count, int64_t head) const {
        Tokens in = latents;
        const int64_t size = call.dtype == FLOAT ? 4 : 2, row = head * (a.N + a.V);
        for (int64_t i = 0; i < count; i++) {
            const uint8_t* slot = static_cast<const uint8_t*>(pages) + slots[i] * X * size;
            in.put(i, slot, call.dtype);
            for (int64_t r = 0; r < a.R; r++) keys[i * W + a.N + r] = Vector{slot, call.dtype}[C + r];
        }
        in.dots(a.kv_b.matrix, row, a.N, 0, count, keys, W);
        in.dots(a.kv_b.matrix, row + a.N, a.V, 0, count, values, a.V);
        for (int64_t i = 0; i < count * W && key.format == BF16; i++) narrow[i] = narrowed(keys[i]);
    }

    // Queries i ... i + count of the chunk, of which `begin` is the piece's first, and the slots from `at` on.
    void meet(const PrefillChunk& chunk, int64_t head, int64_t begin, int64_t i, int64_t count, int64_t at) const {
        const auto seen = [&](int64_t query) { return std::min(BLOCK, chunk.first_position + query + 1 - at); };
        const int64_t most = seen(i + count - 1), stride = padded(a.V);
        if (most <= 0) return;
        const Matrix matrix = {key.format == BF16 ? static_cast<const void*>(narrow) : keys, nullptr};
        queries.dots(matrix, 0, most, head * R + chunk.start - call.num_decode_tokens + i, count, scores, BLOCK);
        for (int64_t n = 0; n < count; n++) {
            const int64_t slots = std::max<int64_t>(0, seen(i + n)), place = i + n - begin;
            float* share = scores + n * BLOCK;
            std::fill(share + slots, share + most, 0.0f);
            if (!slots) continue;
            const Soft soft = pass.isa.soften(share, slots, static_cast<float>(a.scale));
            if (at == 0) softs[place] = soft;
            else join(soft, softs[place], share, slots, sums + place * stride, a.V);
        }
        const Rows rows = {{values, nullptr}, {FP32, BLOCK, a.V, 0}, 0, most};
        pass.isa.mix[FP32](rows, a.V, scores, BLOCK, count, sums + (i - begin) * stride, stride);
    }

    const ForwardPass& pass;
    const ForwardArgs& call;
    const Attention& a;
    const int64_t R, W, C, X;
    const void* pages;
    float* heads;  // (T, H, V)
    const Layout key;
    Tokens queries, latents;
    int64_t parts = 1;
    float *keys = nullptr, *values = nullptr, *sums = nullptr, *scores = nullptr;
    uint16_t* narrow = nullptr;
    Soft* softs = nullptr;
};

}  // namespace
}  // namespace soli
