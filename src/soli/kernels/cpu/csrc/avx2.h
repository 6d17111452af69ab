// What the AVX2 files share.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace soli {

void dots16_int8_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int4_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void put16_bytes(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

// Sums of neighbours of 16 bits, in 32.
static SOLI_INLINE __m256i paired(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// Sums of neighbouring lanes of four vectors: each 128 bits hold one sum of every one.
static SOLI_INLINE __m256i four(const __m256i* p) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(p[0], p[1]), _mm256_unpackhi_epi32(p[0], p[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(p[2], p[3]), _mm256_unpackhi_epi32(p[2], p[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

}  // namespace soli
