// What the AVX-512 files share.
#pragma once
#include <immintrin.h>

#include "bytes.h"

namespace soli {

void dots16_bf16(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_fp8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int4(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_bf16_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_fp8_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int8_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int4_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void put16(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

// Ask for a line of the rows that come next, once per line: hardware follows a row but not the jump to another.
template <int BYTES>
static inline void prefetch_line(const uint8_t* weight, int64_t at, int64_t ahead) {
    if (at % 64 < BYTES) ask(weight + at + ahead);
}

// `left` of 64 bytes; what is masked out is neither read nor a fault.
template <bool FULL>
static SOLI_INLINE __m512i bytes(const uint8_t* from, int64_t left) {
    if (FULL || left >= 64) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(left > 0 ? (1ull << left) - 1 : 0, from);
}

// 2 x 64 bytes in the order of int4's halves: of each 32 the first 16, then the others.
static SOLI_INLINE void halves(__m512i* v) {
    const __m512i first = v[0];
    v[0] = _mm512_shuffle_i32x4(first, v[1], 0x88), v[1] = _mm512_shuffle_i32x4(first, v[1], 0xdd);
}

}  // namespace soli
