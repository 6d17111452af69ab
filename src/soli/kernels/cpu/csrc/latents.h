// Attention of one query per row over paged latents: absorbed MLA (DeepSeek-V2 report, section 2.1.2). All heads share
// one key per slot, the latent and the rotated key side by side; the value is the latent itself.
//
// The slots of a row are cut into at most SPLITS parts, each a piece of work that goes through its slots in blocks with a
// running softmax: a block's latents stay in the second-level cache while all heads read them. Where blocks and parts end
// depends on the row's length alone; pages and their size only say where slots lie. So a row has the same bits in any
// company, in pages of any size and with any number of threads.
//
// Shapes: B rows, H heads, P pages, S slots of a page, M pages of a table's row, X = C latent + R rotary width.
#pragma once
#include <algorithm>
#include <cmath>

#include "driver.h"

namespace soli {
namespace {

constexpr int64_t BLOCK = 128, SPLITS = 8, HEADS = 16;  // slots of a block; parts of a row; heads whose scores are held

// The running softmax takes a block in: what has the smaller maximum is scaled down. `sums` are C values mixed so far,
// `shares` the block's.
inline void join(Soft block, Soft& soft, float* shares, int64_t slots, float* sums, int64_t C) {
    const float top = std::max(soft.most, block.most), old = std::exp(soft.most - top),
                now = std::exp(block.most - top);
    if (old != 1.0f)
        for (int64_t i = 0; i < C; i++) sums[i] *= old;
    if (now != 1.0f)
        for (int64_t i = 0; i < slots; i++) shares[i] *= now;
    soft = {top, soft.sum * old + block.sum * now};
}

struct Latents {
    const Kernels& isa;
    Layout slot;  // of a page's rows: FP32 or BF16, S slots of X
    int64_t P, H, C;
    float scale;  // of the scores
    const uint8_t* pages;

    int64_t part_floats() const { return H * (padded(C) + 2); }

    // How the slots of a row are shared out: `parts` parts of `span` slots.
    struct Cut {
        int64_t parts, span;
        explicit Cut(int64_t length) {
            const int64_t blocks = (length + BLOCK - 1) / BLOCK, each = (blocks + SPLITS - 1) / SPLITS;
            span = each * BLOCK, parts = each ? (blocks + each - 1) / each : 0;
        }
    };

    // Calls run(rows, at) for each stretch of slots begin ... end that lies within one page.
    template <class Run>
    void each_run(const int32_t* table, int64_t begin, int64_t end, Run run) const {
        const int64_t S = slot.O;
        for (int64_t at = begin; at < end;) {
            const int64_t count = std::min(S - at % S, end - at);
            const Matrix page = {pages + table[at / S] * S * slot.row_bytes(), nullptr};
            run(Rows{page, slot, at % S, count}, at - begin);
            at += count;
        }
    }

    // Heads head ... head + heads of one row over slots begin ... end. `q` holds the row's heads from `first` on; `part`
    // takes C sums per head, then most and sum of each head.
    void attend(const int32_t* table, int64_t begin, int64_t end, const Tokens& q, int64_t first, int64_t head,
                int64_t heads, float* part) const {
        const int64_t stride = padded(C);
        for (; heads > 0; head += HEADS, heads -= HEADS) {
            const int64_t count = std::min(HEADS, heads);
            alignas(64) float scores[HEADS * BLOCK];
            float *sums = part + head * stride, *most = part + H * stride + head, *sum = most + H;
            std::fill(sums, sums + count * stride, 0.0f);
            for (int64_t at = begin; at < end; at += BLOCK) {
                const int64_t slots = std::min(BLOCK, end - at);
                each_run(table, at, at + slots, [&](const Rows& rows, int64_t place) {
                    q.dots(rows.matrix, rows.first, rows.count, first + head, count, scores + place, BLOCK);
                });
                for (int64_t h = 0; h < count; h++) {
                    Soft soft = isa.soften(scores + h * BLOCK, slots, scale), all = {most[h], sum[h]};
                    if (at == begin) all = soft;
                    else join(soft, all, scores + h * BLOCK, slots, sums + h * stride, C);
                    most[h] = all.most, sum[h] = all.sum;
                }
                each_run(table, at, at + slots, [&](const Rows& rows, int64_t place) {
                    isa.mix[slot.format](rows, C, scores + place, BLOCK, count, sums, stride);
                });
            }
        }
    }

    // All parts of one row and head into the first, C floats.
    const float* merged(float* part, int64_t parts, int64_t head) const {
        const int64_t stride = padded(C), most = H * stride + head;
        float top = -INFINITY, total = 0, *mixed = part + head * stride;
        for (int64_t i = 0; i < parts; i++) top = std::max(top, part[i * part_floats() + most]);
        for (int64_t i = 0; i < parts; i++, part += part_floats()) {
            const float share = std::exp(part[most] - top), *sums = part + head * stride;
            for (int64_t c = 0; c < C; c++) mixed[c] = i == 0 ? share * sums[c] : mixed[c] + share * sums[c];
            total += share * part[most + H];
        }
        for (int64_t c = 0; c < C; c++) mixed[c] /= total;
        return mixed;
    }
};

// Whether each of B rows has a slot, and all its slots lie in pages.
inline bool readable(const int32_t* table, int64_t M, const int32_t* lengths, int64_t B, int64_t P, int64_t S) {
    for (int64_t b = 0; b < B; b++) {
        const int64_t pages = (lengths[b] + S - 1) / S;
        if (lengths[b] < 1 || pages > M) return false;
        for (int64_t m = 0; m < pages; m++)
            if (table[b * M + m] < 0 || table[b * M + m] >= P) return false;
    }
    return true;
}

// The rows of one call, cut into pieces of work for a team of threads.
struct Batch {
    const Latents& latents;
    int64_t B, M;
    const int32_t *table, *lengths;
    int64_t most, heads;  // parts of the longest row; heads of a piece
    float* parts = nullptr;

    Batch(const Latents& latents, int64_t B, int64_t M, const int32_t* table, const int32_t* lengths, int64_t threads)
        : latents(latents),
          B(B),
          M(M),
          table(table),
          lengths(lengths),
          most(0) {
        for (int64_t b = 0; b < B; b++) most = std::max(most, Latents::Cut(lengths[b]).parts);
        // Few pieces are cut by heads too; each then reads the latents for itself.
        heads = B * most >= 2 * threads ? latents.H : std::max<int64_t>(1, std::min(HEADS, latents.H / threads));
    }

    int64_t part_floats() const { return B * most * latents.part_floats(); }
    int64_t groups() const { return (latents.H + heads - 1) / heads; }
    int64_t pieces() const { return B * most * groups(); }

    // Queries are b * H + head.
    void attend(const Tokens& queries, int64_t piece) const {
        const int64_t b = piece / groups() / most, part = piece / groups() % most, head = piece % groups() * heads;
        const Latents::Cut cut(lengths[b]);
        if (part >= cut.parts) return;
        const int64_t begin = part * cut.span, end = std::min<int64_t>(lengths[b], begin + cut.span);
        latents.attend(table + b * M, begin, end, queries, b * latents.H, head, std::min(heads, latents.H - head),
                       parts + (b * most + part) * latents.part_floats());
    }

    const float* merged(int64_t b, int64_t head) const {
        return latents.merged(parts + b * most * latents.part_floats(), Latents::Cut(lengths[b]).parts, head);
    }
};

}  // namespace
}  // namespace soli
