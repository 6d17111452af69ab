// What the AVX-512 files share.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace soli {

void dots16_bf16(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_fp8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int4(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void put16_fp8(const uint16_t* x, uint16_t* to);
void put16(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

// Ask for a line of the rows that come next, once per line: hardware follows a row but not the jump to another.
template <int BYTES>
static inline void prefetch_line(const uint8_t* weight, int64_t at, int64_t ahead) {
    if (at % 64 < BYTES) _mm_prefetch(reinterpret_cast<const char*>(weight + at + ahead), _MM_HINT_T0);
}

}  // namespace soli
