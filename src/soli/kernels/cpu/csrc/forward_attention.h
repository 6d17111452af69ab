// The attention of one layer for T rows: x += o(heads(norm x)), paper section 2.1.1. Rows that are queries by themselves go
// the absorbed way (latents.h), chunks the expanded way (forward_prefill.h).
//
// Absorbed, W_UK is folded into each query as a weighted sum of kv_b's rows and W_UV is applied to what a head has mixed,
// both straight from kv_b in its own format.
#pragma once
#include <optional>

#include "forward_prefill.h"

namespace soli {
namespace {

class AttentionStep {
public:
    AttentionStep(const ForwardPass& pass, const Attention& a, void* pages, Area area)
        : pass(pass),
          call(pass.call),
          a(a),
          T(call.T),
          B(call.num_decode_tokens),
          H(a.H),
          C(a.C()),
          X(a.X()),
          pages(pages),
          latents{pass.isa,
                  {call.dtype == FLOAT ? FP32 : BF16, call.block_size, X, 0},
                  call.block_count,
                  H,
                  C,
                  static_cast<float>(a.scale),
                  static_cast<const uint8_t*>(pages)},
          batch(latents, B, call.blocks_per_sequence, call.block_table, call.lengths, call.threads),
          q_in(pass.tokens(a.has_query_latent() ? a.q_a : a.q_b)),
          low_in(pass.tokens(a.q_b)),
          kv_in(pass.tokens(a.kv_a)),
          queries(pass.isa, latents.slot, call.dtype),
          mixed_in(pass.tokens(a.kv_b)),
          o_in(pass.tokens(a.o)) {
        take_made(pass, area, q_in, T), take_made(pass, area, low_in, a.has_query_latent() ? T : 0),
            take_made(pass, area, kv_in, T);
        take_made(pass, area, o_in, T), take(area, queries, B * H), take(area, mixed_in, B * H);
        row = pass.own<float>(area, std::max(call.D, a.q_a.layout.O));
        low = area.take<float>(T * a.q_a.layout.O), kv = area.take<float>(T * X);
        q = area.take<float>(T * H * (a.N + a.R)), absorbed = area.take<float>(B * H * padded(X));
        heads = area.take<float>(T * H * a.V), batch.parts = area.take<float>(batch.part_floats());
        prompt.emplace(pass, a, pages, heads, area);
        used = area.used;
    }

    size_t used;

    void run() {
        pass.each_row([&](int64_t t) { begin(t); });
        const int64_t low_blocks = blocks(a.q_a.layout.O), kv_blocks = blocks(X);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < low_blocks + kv_blocks; i++)
            if (i < low_blocks) product(a.q_a, q_in, T, i, a.q_a_bias, low);
            else product(a.kv_a, kv_in, T, i - low_blocks, a.kv_a_bias, kv);
        if (a.has_query_latent()) pass.each_row([&](int64_t t) { follow(t); });
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < T; t++) keep(t);
#pragma omp for schedule(static)
        for (int64_t h = 0; h < H; h++) query(h);
        if (T > B) {
#pragma omp for schedule(dynamic)
            for (int64_t piece = 0; piece < prompt->pieces(); piece++) prompt->run(piece);
        }
        if (B) absorb();
        pass.each_row([&](int64_t t) { o_in.put(t, heads + t * H * a.V, FLOAT); });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks(call.D); i++) end(i);
    }

private:
    void absorb() {
        const int64_t groups = batch.groups();
        if (groups > 1) {  // few pieces: whoever attends for some heads goes on with them
#pragma omp for schedule(static)
            for (int64_t g = 0; g < groups; g++) {
                for (int64_t piece = g; piece < batch.pieces(); piece += groups) batch.attend(queries, piece);
                for (int64_t h = g * batch.heads; h < std::min(H, (g + 1) * batch.heads); h++) value(h);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < batch.pieces(); piece++) batch.attend(queries, piece);
#pragma omp for schedule(static)
            for (int64_t h = 0; h < H; h++) value(h);
        }
    }

    // The row, normed, for the first products.
    void begin(int64_t t) {
        normed(a.norm, pass.x + t * call.D, call.D, row);
        q_in.put(t, row, FLOAT), kv_in.put(t, row, FLOAT);
    }

    // The query's latent, normed.
    void follow(int64_t t) {
        const int64_t L = a.q_a.layout.O;
        normed(a.q_norm, low + t * L, L, row);
        low_in.put(t, row, FLOAT);
    }

    // The keys' latent, normed, and the key, rotated, into their slot of the cache.
    void keep(int64_t t) {
        float* latent = kv + t * X;
        normed(a.kv_norm, latent, C, latent);
        rotate(t, latent + C);
        write_out(latent, X, pages, pass.slots[t] * X, call.dtype);
    }

    // The queries of one head; of those by themselves the own part folded with W_UK, beside the rotated one.
    void query(int64_t h) {
        const int64_t width = a.N + a.R, stride = padded(X);
        float *own = q + h * T * width, *folded = absorbed + h * B * stride;
        portions(T, [&](int64_t t, int64_t count) {
            (a.has_query_latent() ? low_in : q_in)
                .dots(a.q_b.matrix, h * width, width, t, count, own + t * width, width);
        });
        for (int64_t t = 0; t < T; t++) rotate(t, own + t * width + a.N);
        for (int64_t t = B; t < T; t++) prompt->put(t, h, own + t * width);
        if (!B) return;
        std::fill(folded, folded + B * stride, 0.0f);
        const Rows up_k = {a.kv_b.matrix, a.kv_b.layout, h * (a.N + a.V), a.N};
        pass.isa.mix[a.kv_b.layout.format](up_k, C, own, width, B, folded, stride);
        for (int64_t t = 0; t < B; t++) {
            std::copy(own + t * width + a.N, own + (t + 1) * width, folded + t * stride + C);
            queries.put(t * H + h, folded + t * stride, FLOAT);
        }
    }

    // What one head has mixed, through W_UV.
    void value(int64_t h) {
        for (int64_t t = 0; t < B; t++) mixed_in.put(h * B + t, batch.merged(t, h), FLOAT);
        portions(B, [&](int64_t t, int64_t count) {
            mixed_in.dots(a.kv_b.matrix, h * (a.N + a.V) + a.N, a.V, h * B + t, count, heads + (t * H + h) * a.V,
                          H * a.V);
        });
    }

    // One block of the output, added to the rows.
    void end(int64_t block) {
        alignas(64) float tile[TOKENS * ROWS];
        const int64_t row = block * ROWS, rows = std::min(ROWS, call.D - row);
        portions(T, [&](int64_t first, int64_t count) {
            o_in.dots(a.o.matrix, row, rows, first, count, tile, ROWS);
            for (int64_t t = 0; t < count; t++)
                for (int64_t r = 0; r < rows; r++)
                    pass.x[(first + t) * call.D + row + r] +=
                        tile[t * ROWS + r] + (a.o_bias.data ? a.o_bias[row + r] : 0.0f);
        });
    }

    // Turns each pair by its angle (equations 3 and 8): neighbours, or one of each half.
    void rotate(int64_t t, float* x) const {
        const int64_t pairs = a.R / 2, step = a.interleaved ? 1 : pairs;
        for (int64_t i = 0; i < pairs; i++) {
            float* first = x + (a.interleaved ? 2 * i : i);
            const float cos = pass.cos[t * pairs + i], sin = pass.sin[t * pairs + i], p = first[0], q = first[step];
            first[0] = p * cos - q * sin, first[step] = q * cos + p * sin;
        }
    }

    const ForwardPass& pass;
    const ForwardArgs& call;
    const Attention& a;
    const int64_t T, B, H, C, X;  // B: rows that are queries by themselves, the first ones
    void* pages;
    const Latents latents;
    Batch batch;
    std::optional<PromptStep> prompt;
    Tokens q_in, low_in, kv_in, queries, mixed_in, o_in;
    float *row, *low, *kv, *q, *absorbed, *heads;
};

}  // namespace
}  // namespace soli
