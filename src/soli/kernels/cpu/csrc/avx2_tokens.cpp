// bfloat16 tokens as the AVX2 kernels for int8 and int4 want them: rounded to 8 bits, 128 numbers at a time (bytes.h).
#include "avx2.h"
#include "bytes.h"

namespace soli {
namespace {

// The largest of 128 bfloat16 numbers, without signs.
float largest(const uint16_t* x) {
    __m256i most = _mm256_setzero_si256();
    for (int v = 0; v < 8; v++) {
        const __m256i number = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * v));
        most = _mm256_max_epu16(most, _mm256_and_si256(number, _mm256_set1_epi16(0x7fff)));
    }
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));  // of the complement
    return widened(static_cast<uint16_t>(~_mm_extract_epi16(least, 0)));
}

// 32 bfloat16 numbers to codes.
__m256i rounded(const uint16_t* x, float factor) {
    __m256i whole[4];
    for (int v = 0; v < 4; v++) {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * v));
        const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(part), 16));
        whole[v] = _mm256_cvtps_epi32(_mm256_mul_ps(wide, _mm256_set1_ps(factor)));
    }
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

}  // namespace

void put16_bytes(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    const Scale scale(largest(x));
    __m256i code[4], sums[4];
    for (int v = 0; v < 4; v++) {
        code[v] = rounded(x + 32 * v, scale.factor);
        sums[v] = paired(_mm256_maddubs_epi16(_mm256_set1_epi8(1), code[v]));
    }
    const __m256i of_halves = four(sums);
    const __m128i of_runs = _mm_add_epi32(_mm256_castsi256_si128(of_halves), _mm256_extracti128_si256(of_halves, 1));
    alignas(16) int32_t start[4];
    const int offset = layout.format == INT4 ? -8 : -128;
    _mm_store_si128(reinterpret_cast<__m128i*>(start), _mm_mullo_epi32(of_runs, _mm_set1_epi32(offset)));
    if (layout.group > 32) start[0] += start[1], start[2] += start[3];
    if (layout.group > 64) start[0] += start[2];
    if (layout.format == INT4) {  // the order of its nibbles: the first halves of all runs, then the second
        const __m256i c[4] = {code[0], code[1], code[2], code[3]};
        for (int v = 0; v < 2; v++) {
            code[v] = _mm256_permute2x128_si256(c[2 * v], c[2 * v + 1], 0x20);
            code[2 + v] = _mm256_permute2x128_si256(c[2 * v], c[2 * v + 1], 0x31);
        }
    }
    const Token to(token, padded(layout.I));
    for (int v = 0; v < 4; v++) _mm256_store_si256(reinterpret_cast<__m256i*>(to.codes + at + 32 * v), code[v]);
    __builtin_memcpy(to.starts + at / 32, start, sizeof start);
    to.scales[at / 128] = scale.scale;
}

}  // namespace soli
