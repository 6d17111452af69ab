// What the AVX-512 files share.
#pragma once
#include <immintrin.h>

#include "int8_tokens.h"

namespace soli {

void matmul_bf16_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_fp8_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_fp8_row_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_fp4_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_int8_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_int4_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_bf16_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_fp8_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_fp8_row_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_int8_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_int4_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void pack_token(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

// Prefetches a line of the rows that come next, once per line: hardware prefetching follows a row but not the jump to
// another.
template <int BYTES>
static inline void prefetch_line(const uint8_t* weight, int64_t at, int64_t distance) {
    if (at % 64 < BYTES) prefetch_l2(weight + at + distance);
}

static SOLI_INLINE __m512 floats_from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 64 bytes, of which `remaining` exist: the others are zero, and are neither read nor a fault.
template <bool FULL>
static SOLI_INLINE __m512i load_bytes(const uint8_t* from, int64_t remaining) {
    if (FULL || remaining >= 64) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(remaining > 0 ? (1ull << remaining) - 1 : 0, from);
}

// 2 x 64 bytes into the order of int4's nibbles: of each 32 the first 16, then the others (diagram: int8_tokens.h).
static SOLI_INLINE void order_as_nibbles(__m512i* v) {
    const __m512i first = v[0];
    v[0] = _mm512_shuffle_i32x4(first, v[1], 0x88);
    v[1] = _mm512_shuffle_i32x4(first, v[1], 0xdd);
}

}  // namespace soli
