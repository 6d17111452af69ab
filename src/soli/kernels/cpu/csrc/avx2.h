// What the AVX2 files share.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace soli {

void matmul_int8_avx2(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void matmul_int4_avx2(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void pack_token_int8(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

static SOLI_INLINE __m256 floats_from_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Sums of neighbouring lanes of 16 bits, in lanes of 32.
static SOLI_INLINE __m256i add_lane_pairs(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

// In each 128 bits, the sums of the four lanes of p[0], p[1], p[2] and p[3].
static SOLI_INLINE __m256i add_lanes_of_4(const __m256i* p) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0], p[1]), _mm256_unpackhi_epi32(p[0], p[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(p[2], p[3]), _mm256_unpackhi_epi32(p[2], p[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

}  // namespace soli
