// bfloat16 tokens as the AVX2 kernels for int8 and int4 take them: rounded to 8 bits, 128 numbers at a time
// (int8_tokens.h).
#include "avx2.h"
#include "int8_tokens.h"

namespace soli {
namespace {

// The largest magnitude of 128 bfloat16 numbers.
float max_magnitude(const uint16_t* x) {
    __m256i max = _mm256_setzero_si256();
    for (int v = 0; v < 8; v++) {
        const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * v));
        max = _mm256_max_epu16(max, _mm256_and_si256(numbers, _mm256_set1_epi16(0x7fff)));
    }
    const __m128i max_8 = _mm_max_epu16(_mm256_castsi256_si128(max), _mm256_extracti128_si256(max, 1));
    // The maximum is the complement of the smallest complement: there is an instruction for minima only.
    const __m128i min = _mm_minpos_epu16(_mm_xor_si128(max_8, _mm_set1_epi16(-1)));
    return float_from_bf16(static_cast<uint16_t>(~_mm_extract_epi16(min, 0)));
}

// 32 bfloat16 numbers times `factor`, rounded to bytes.
__m256i quantize_32(const uint16_t* x, float factor) {
    __m256i integers[4];
    for (int v = 0; v < 4; v++) {
        const __m128i bf16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * v));
        const __m256 numbers = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
        integers[v] = _mm256_cvtps_epi32(_mm256_mul_ps(numbers, _mm256_set1_ps(factor)));
    }
    const __m256i low = _mm256_packs_epi32(integers[0], integers[1]);
    const __m256i high = _mm256_packs_epi32(integers[2], integers[3]);
    // Packing interleaves the 128-bit halves; the permutation restores the order.
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// 128 values into the order of int4's nibbles: the first halves of all runs, then the second ones.
void order_as_nibbles(__m256i* values) {
    const __m256i runs[4] = {values[0], values[1], values[2], values[3]};
    for (int v = 0; v < 2; v++) {
        values[v] = _mm256_permute2x128_si256(runs[2 * v], runs[2 * v + 1], 0x20);
        values[2 + v] = _mm256_permute2x128_si256(runs[2 * v], runs[2 * v + 1], 0x31);
    }
}

}  // namespace

void pack_token_int8(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    const TokenScale scale(max_magnitude(x));
    __m256i values[4];
    __m256i sums[4];
    for (int v = 0; v < 4; v++) {
        values[v] = quantize_32(x + 32 * v, scale.factor);
        sums[v] = add_lane_pairs(_mm256_maddubs_epi16(_mm256_set1_epi8(1), values[v]));
    }
    const __m256i half_sums = add_lanes_of_4(sums);  // of 16 values
    const __m128i run_sums = _mm_add_epi32(_mm256_castsi256_si128(half_sums), _mm256_extracti128_si256(half_sums, 1));
    alignas(16) int32_t corrections[4];
    const int offset = layout.is_int4() ? -8 : -128;
    _mm_store_si128(reinterpret_cast<__m128i*>(corrections), _mm_mullo_epi32(run_sums, _mm_set1_epi32(offset)));
    if (layout.group > 32) {
        corrections[0] += corrections[1];
        corrections[2] += corrections[3];
    }
    if (layout.group > 64) corrections[0] += corrections[2];
    if (layout.is_int4()) order_as_nibbles(values);
    const Int8Token to(token, padded(layout.I));
    for (int v = 0; v < 4; v++) _mm256_store_si256(reinterpret_cast<__m256i*>(to.values + at + 32 * v), values[v]);
    __builtin_memcpy(to.corrections + at / 32, corrections, sizeof corrections);
    to.scales[at / 128] = scale.scale;
}

}  // namespace soli
