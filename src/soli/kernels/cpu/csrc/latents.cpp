// The latent_decode seam: latents.h for one call.
#include "latents.h"

namespace soli {

// q (B, H, X), pages (P, S, X) and y (B, H, C) of `dtype`; table (B, M) page numbers, lengths (B) slots to attend to.
// Returns NO_ERROR, NO_MEMORY or BAD_SLOT.
extern "C" int soli_latent_decode(int64_t isa, int64_t dtype, int64_t B, int64_t H, int64_t X, int64_t C, const void* q,
                                  const void* pages, int64_t P, int64_t S, const int32_t* table, int64_t M,
                                  const int32_t* lengths, double scale, void* y, int64_t threads) {
    static thread_local Scratch scratch;
    const Latents latents = {kernels(isa),
                             {dtype == FLOAT ? FP32 : BF16, S, X, 0},
                             P,
                             H,
                             C,
                             static_cast<float>(scale),
                             static_cast<const uint8_t*>(pages)};
    if (!readable(table, M, lengths, B, P, S)) return BAD_SLOT;
    Batch batch(latents, B, M, table, lengths, threads);
    Tokens queries(latents.isa, latents.slot, dtype);
    if (!scratch.reserve(queries.bytes(B * H) + Scratch::bytes<float>(batch.part_floats()))) return NO_MEMORY;
    queries.data = scratch.take<uint8_t>(queries.bytes(B * H));
    batch.parts = scratch.take<float>(batch.part_floats());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t i = 0; i < B * H; i++)
            queries.put(i, static_cast<const uint8_t*>(q) + i * X * (dtype == FLOAT ? 4 : 2), dtype);
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < batch.pieces(); piece++) batch.attend(queries, piece);
#pragma omp for
        for (int64_t i = 0; i < B * H; i++) write_out(batch.merged(i / H, i % H), C, y, i * C, dtype);
    }
    return NO_ERROR;
}

}  // namespace soli
