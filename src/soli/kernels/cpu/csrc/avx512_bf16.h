// Weights in bfloat16 and FP8 as bfloat16 codes, for the two files that multiply them: avx512_bf16.cpp and amx_bf16.cpp.
//
// Bytes turn into bfloat16 by looking up its upper and lower byte and interleaving the two, which works within 16 bytes:
// put16 puts tokens into the order that comes out.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

struct Row {
    const uint8_t* weight;
    const uint8_t* scale;
    const uint16_t* codes;  // the row as bfloat16 codes, where it has been unpacked
};

// Per format: CHUNK weights give CHUNK / 32 vectors of codes and, where SCALED, one scale per float32 lane.
struct Bf16 {
    static constexpr int CHUNK = 32, VECS = 1;
    static constexpr bool SCALED = false;
    template <bool FULL>
    static void codes(const Row& row, int64_t k, int64_t left, __m512i* out) {
        out[0] = bytes<FULL>(row.weight + 2 * k, 2 * left);
    }
    template <bool FULL>
    static __m512 scale(const Row&, int64_t, int64_t) {
        return _mm512_setzero_ps();
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<64>(row.weight, 2 * k, ahead); }
};

// mantissa * 2^exponent as bfloat16, exact for mantissas below 256.
constexpr uint16_t bfloat16(int mantissa, int exponent) {
    if (mantissa == 0) return 0;
    for (; mantissa < 128; exponent--) mantissa <<= 1;
    return static_cast<uint16_t>((exponent + 7 + 127) << 7 | (mantissa & 127));
}

constexpr uint16_t e4m3(int code) {  // four bits of exponent with bias 7, three of mantissa; 127 is NaN
    return code == 127 ? 0x7fc0 : code < 8 ? bfloat16(code, -9) : bfloat16(8 + (code & 7), (code >> 3) - 10);
}

// Upper and lower byte of the bfloat16 of each seven-bit magnitude. Made by the compiler: code of this file that ran on
// loading would stop a processor without AVX-512.
struct Table {
    alignas(64) uint8_t upper[128], lower[128];
    constexpr explicit Table(uint16_t (*value)(int)) : upper(), lower() {
        for (int code = 0; code < 128; code++) {
            upper[code] = static_cast<uint8_t>(value(code) >> 8);
            lower[code] = static_cast<uint8_t>(value(code) & 255);
        }
    }
    // 64 magnitudes with their signs (bit 7 of `sign`) to two vectors of bfloat16.
    void look_up(__m512i magnitude, __m512i sign, __m512i* out) const {
        __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(upper), magnitude, _mm512_load_si512(upper + 64));
        const __m512i low =
            _mm512_permutex2var_epi8(_mm512_load_si512(lower), magnitude, _mm512_load_si512(lower + 64));
        high = _mm512_ternarylogic_epi64(high, sign, _mm512_set1_epi8(-128), 0xf8);  // high | (sign & 0x80)
        out[0] = _mm512_unpacklo_epi8(low, high), out[1] = _mm512_unpackhi_epi8(low, high);
    }
};

constexpr Table E4M3(e4m3);

struct Fp8 {
    static constexpr int CHUNK = 128, VECS = 4;
    static constexpr bool SCALED = true;
    template <bool FULL>
    static void codes(const Row& row, int64_t k, int64_t left, __m512i* out) {
        for (int half = 0; half < 2; half++) {
            const __m512i code = bytes<FULL>(row.weight + k + 64 * half, left - 64 * half);
            E4M3.look_up(code, code, out + 2 * half);
        }
    }
    template <bool FULL>
    static __m512 scale(const Row& row, int64_t k, int64_t) {
        float scale;
        __builtin_memcpy(&scale, row.scale + k / 128 * 4, 4);
        return _mm512_set1_ps(scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) {
        prefetch_line<128>(row.weight, k, ahead), prefetch_line<128>(row.weight, k, ahead + 64);
    }
};

}  // namespace
}  // namespace soli
