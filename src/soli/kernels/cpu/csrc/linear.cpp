// y = x W^T: the linear seam. A work item is a block of rows of W, which is read once for up to TOKEN_BLOCK tokens.
#include <algorithm>

#include "activations.h"
#include "team.h"

namespace soli {

// x (T, I) and y (T, O) of `dtype`. Returns NO_ERROR or NO_MEMORY.
extern "C" int soli_linear(int64_t isa, int64_t format, int64_t O, int64_t I, int64_t group, const void* weight,
                           const void* scale, int64_t T, int64_t dtype, const void* x, void* y, int64_t max_threads) {
    static thread_local Scratch scratch;
    static thread_local ThreadBudget budget;
    Team team(budget, max_threads);
    const int64_t threads = team.threads;
    const Layout layout = {format, O, I, group};
    const Matrix matrix = {weight, scale};
    Activations tokens(kernels(isa), layout, dtype);
    if (!scratch.reserve(tokens.bytes(T))) return NO_MEMORY;
    tokens.data = scratch.take<uint8_t>(tokens.bytes(T));
    const int64_t x_bytes = I * dtype_bytes(dtype);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for nowait
        for (int64_t t = 0; t < T; t++) tokens.pack(t, static_cast<const uint8_t*>(x) + t * x_bytes, dtype);
        team.barrier();
#pragma omp for schedule(dynamic, omp_chunk((O + ROW_BLOCK - 1) / ROW_BLOCK, T, 8 * threads)) nowait
        for (int64_t row = 0; row < O; row += ROW_BLOCK) {
            alignas(64) float tile[TOKEN_BLOCK * ROW_BLOCK];
            const int64_t rows = std::min(ROW_BLOCK, O - row);
            for (int64_t t = 0; t < T; t += TOKEN_BLOCK) {
                const int64_t count = std::min(TOKEN_BLOCK, T - t);
                tokens.multiply(matrix, row, rows, t, count, tile, ROW_BLOCK);
                for (int64_t i = 0; i < count; i++) store_as(dtype, tile + i * ROW_BLOCK, rows, y, (t + i) * O + row);
            }
        }
        team.barrier();
    }
    return NO_ERROR;
}

}  // namespace soli
