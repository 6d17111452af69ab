// bfloat16 tokens as dots16 wants them, 128 numbers at a time: as they are, in another order, or rounded to 8 bits.
#include "avx512.h"

namespace soli {
namespace {

// The largest of 128 bfloat16 numbers, without signs.
SOLI_INLINE float largest(const __m512i* number) {
    __m512i most = _mm512_setzero_si512();
    for (int v = 0; v < 4; v++) most = _mm512_max_epu16(most, _mm512_and_si512(number[v], _mm512_set1_epi16(0x7fff)));
    most = _mm512_max_epu16(most, _mm512_srli_epi32(most, 16));
    return as_float(_mm512_reduce_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xffff))) << 16);
}

// Sixteen bfloat16 numbers to codes.
SOLI_INLINE __m128i rounded(__m256i part, float factor) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(wide, _mm512_set1_ps(factor))));
}

// Beside weights of whole numbers: 8 bits.
void put16_whole(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    __m512i number[4];
    for (int v = 0; v < 4; v++) number[v] = _mm512_loadu_si512(x + 32 * v);
    const Scale scale(largest(number));
    alignas(64) __m128i part[8];
    for (int v = 0; v < 4; v++) {
        part[2 * v] = rounded(_mm512_castsi512_si256(number[v]), scale.factor);
        part[2 * v + 1] = rounded(_mm512_extracti64x4_epi64(number[v], 1), scale.factor);
    }
    __m512i code[2] = {_mm512_load_si512(part), _mm512_load_si512(part + 4)};
    if (layout.format == INT4 || layout.group < 128) halves(code);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(layout.format == INT4 ? 8 : 128));
    __m512i start = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, code[0]);
    start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(start, offset, code[1]));
    start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_BADC));
    start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_CDAB));  // each lane the sum of its four
    start = _mm512_maskz_compress_epi32(0x1111, start);                           // of 32 codes each
    if (layout.group > 32) start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_CDAB));
    if (layout.group > 64) start = _mm512_add_epi32(start, _mm512_shuffle_epi32(start, _MM_PERM_BADC));
    const Token to(token, padded(layout.I));
    for (int v = 0; v < 2; v++) _mm512_store_si512(to.codes + at + 64 * v, code[v]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.starts + at / 32), _mm512_castsi512_si128(start));
    to.scales[at / 128] = scale.scale;
}

// Beside FP8, whose vectors of codes hold units of eight neighbours: unit u of the token is unit ORDER[u] of the natural one.
void put16_fp8(const uint16_t* x, uint16_t* to) {
    static const int ORDER[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    for (int u = 0; u < 16; u++) __builtin_memcpy(to + 8 * u, x + 8 * ORDER[u], 16);
}

}  // namespace

void put16(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    uint16_t* to = reinterpret_cast<uint16_t*>(token) + at;
    if (layout.whole()) put16_whole(layout, x, token, at);
    else if (layout.format == FP8) put16_fp8(x, to);
    else __builtin_memcpy(to, x, 2 * STEP);
}

}  // namespace soli
