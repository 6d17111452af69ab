// The latent_decode seam: latent_attention.h for one call.
#include "latent_attention.h"

#include "team.h"

namespace soli {

// q (B, H, X), kv_blocks (P, S, X) and y (B, H, C) of `dtype`; block_table (B, W), lengths (B) slots to attend to.
// Returns NO_ERROR, NO_MEMORY or BAD_SLOT.
extern "C" int soli_latent_decode(int64_t isa, int64_t dtype, int64_t B, int64_t H, int64_t X, int64_t C, const void* q,
                                  const void* kv_blocks, int64_t P, int64_t S, const int32_t* block_table, int64_t W,
                                  const int32_t* lengths, double scale, void* y, int64_t max_threads) {
    static thread_local Scratch scratch;
    static thread_local ThreadBudget budget;
    Team team(budget, max_threads);
    const int64_t threads = team.threads;
    const Layout block = {dtype == FLOAT32 ? FP32 : BF16, S, X, 0};
    const LatentAttention attention = {
        kernels(isa), block, P, H, C, static_cast<float>(scale), static_cast<const uint8_t*>(kv_blocks)};
    if (!all_slots_exist(block_table, W, lengths, B, P, S)) return BAD_SLOT;
    LatentAttentionBatch batch(attention, B, W, block_table, lengths, threads);
    Activations queries(attention.isa, attention.block, dtype);
    if (!scratch.reserve(queries.bytes(B * H) + Scratch::bytes<float>(batch.floats()))) return NO_MEMORY;
    queries.data = scratch.take<uint8_t>(queries.bytes(B * H));
    batch.splits = scratch.take<float>(batch.floats());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for nowait
        for (int64_t i = 0; i < B * H; i++)
            queries.pack(i, static_cast<const uint8_t*>(q) + i * X * dtype_bytes(dtype), dtype);
        team.barrier();
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = 0; item < batch.items(); item++) batch.attend(queries, item);
        team.barrier();
#pragma omp for nowait
        for (int64_t i = 0; i < B * H; i++) store_as(dtype, batch.output(i / H, i % H), C, y, i * C);
        team.barrier();
    }
    return NO_ERROR;
}

}  // namespace soli
