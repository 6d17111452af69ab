// y = x W^T: the linear seam. Rows of W are shared out in small blocks; each block is read once for up to TOKENS tokens.
#include <algorithm>

#include "driver.h"

namespace soli {

// x (T, I) and y (T, O) of `dtype`. Returns NO_ERROR or NO_MEMORY.
extern "C" int soli_linear(int64_t isa, int64_t format, int64_t O, int64_t I, int64_t group, const void* weight,
                           const void* scale, int64_t T, int64_t dtype, const void* x, void* y, int64_t threads) {
    static thread_local Scratch scratch;
    const Layout layout = {format, O, I, group};
    const Matrix matrix = {weight, scale};
    Tokens tokens(kernels(isa), layout, dtype);
    if (!scratch.reserve(tokens.bytes(T))) return NO_MEMORY;
    tokens.data = scratch.take<uint8_t>(tokens.bytes(T));
    const int64_t size = dtype == FLOAT ? 4 : 2;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t t = 0; t < T; t++) tokens.put(t, static_cast<const uint8_t*>(x) + t * I * size, dtype);
#pragma omp for schedule(dynamic, at_once((O + ROWS - 1) / ROWS, T, 8 * threads))
        for (int64_t row = 0; row < O; row += ROWS) {
            alignas(64) float tile[TOKENS * ROWS];
            const int64_t rows = std::min(ROWS, O - row);
            for (int64_t t = 0; t < T; t += TOKENS) {
                const int64_t count = std::min(TOKENS, T - t);
                tokens.dots(matrix, row, rows, t, count, tile, ROWS);
                for (int64_t i = 0; i < count; i++) write_out(tile + i * ROWS, rows, y, (t + i) * O + row, dtype);
            }
        }
    }
    return NO_ERROR;
}

}  // namespace soli
