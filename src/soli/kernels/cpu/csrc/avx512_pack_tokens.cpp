// bfloat16 tokens as matmul_bf16 takes them, 128 numbers at a time: unchanged, in another order, or rounded to 8 bits.
#include "avx512.h"

namespace soli {
namespace {

// The largest magnitude of 128 bfloat16 numbers.
SOLI_INLINE float max_magnitude(const __m512i* numbers) {
    __m512i max = _mm512_setzero_si512();
    for (int v = 0; v < 4; v++) max = _mm512_max_epu16(max, _mm512_and_si512(numbers[v], _mm512_set1_epi16(0x7fff)));
    max = _mm512_max_epu16(max, _mm512_srli_epi32(max, 16));
    return as_float(_mm512_reduce_max_epu32(_mm512_and_si512(max, _mm512_set1_epi32(0xffff))) << 16);
}

// Sixteen bfloat16 numbers times `factor`, rounded to bytes.
SOLI_INLINE __m128i quantize_16(__m256i bf16, float factor) {
    const __m512 numbers = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
    return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, _mm512_set1_ps(factor))));
}

// The corrections of 128 values (int8_tokens.h): minus offset * sum, of each group.
SOLI_INLINE __m128i group_corrections(const Layout& layout, const __m512i* values) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(layout.is_int4() ? 8 : 128));
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, values[0]);
    sum = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_dpbusd_epi32(sum, offset, values[1]));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));  // each lane the sum of its four
    sum = _mm512_maskz_compress_epi32(0x1111, sum);                         // of 32 values each
    if (layout.group > 32) sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));
    if (layout.group > 64) sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    return _mm512_castsi512_si128(sum);
}

// Beside int8 and int4 weights: an Int8Token.
void pack_token_int8(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    __m512i numbers[4];
    for (int v = 0; v < 4; v++) numbers[v] = _mm512_loadu_si512(x + 32 * v);
    const TokenScale scale(max_magnitude(numbers));
    alignas(64) __m128i bytes[8];
    for (int v = 0; v < 4; v++) {
        bytes[2 * v] = quantize_16(_mm512_castsi512_si256(numbers[v]), scale.factor);
        bytes[2 * v + 1] = quantize_16(_mm512_extracti64x4_epi64(numbers[v], 1), scale.factor);
    }
    __m512i values[2] = {_mm512_load_si512(bytes), _mm512_load_si512(bytes + 4)};
    if (layout.is_int4() || layout.group < 128) order_as_nibbles(values);
    const __m128i corrections = group_corrections(layout, values);
    const Int8Token to(token, padded(layout.I));
    for (int v = 0; v < 2; v++) _mm512_store_si512(to.values + at + 64 * v, values[v]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.corrections + at / 32), corrections);
    to.scales[at / 128] = scale.scale;
}

// Beside FP8, whose decoded vectors hold units of eight neighbours: unit u of the token is unit ORDER[u] of the input.
void pack_token_fp8(const uint16_t* x, uint16_t* to) {
    static const int ORDER[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    for (int u = 0; u < 16; u++) __builtin_memcpy(to + 8 * u, x + 8 * ORDER[u], 16);
}

// Beside FP4: the four vectors of Fp4::decode.
void pack_token_fp4(const uint16_t* x, uint16_t* to) {
    alignas(64) static const uint16_t ORDER[32] = {0,  2,  4,  6,  8,  10, 12, 14, 1,  3,  5,  7,  9,  11, 13, 15,
                                                   16, 18, 20, 22, 24, 26, 28, 30, 17, 19, 21, 23, 25, 27, 29, 31};
    for (int run = 0; run < 4; run++) {
        alignas(64) uint16_t numbers[32];
        const __m512i values = _mm512_loadu_si512(x + 32 * run);
        _mm512_store_si512(numbers, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), values));
        for (int v = 0; v < 4; v++) __builtin_memcpy(to + 32 * v + 8 * run, numbers + 8 * v, 16);
    }
}

}  // namespace

void pack_token(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at) {
    uint16_t* to = reinterpret_cast<uint16_t*>(token) + at;
    if (layout.is_integer()) pack_token_int8(layout, x, token, at);
    else if (layout.format == FP8 || layout.format == FP8_ROW) pack_token_fp8(x, to);
    else if (layout.format == FP4) pack_token_fp4(x, to);
    else __builtin_memcpy(to, x, 2 * STEP);
}

}  // namespace soli
