// Weights in bfloat16 and FP8, decoded to bfloat16, for the two files that multiply them: avx512_bf16.cpp and
// amx_bf16.cpp.
//
// An FP8 byte becomes a bfloat16 by looking up its upper and its lower byte and interleaving the two, which works
// within 16 bytes: pack_token puts tokens into the order that comes out.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

struct Row {
    const uint8_t* weight;
    const uint8_t* scale;
    const uint16_t* decoded;  // the row in bfloat16, where it has been decoded before
};

// Per format: CHUNK weights give VECS = CHUNK / 32 vectors of bfloat16 and, where SCALED, one scale per float32 lane.
struct Bf16 {
    static constexpr int CHUNK = 32;
    static constexpr int VECS = 1;
    static constexpr bool SCALED = false;
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t remaining, __m512i* out) {
        out[0] = load_bytes<FULL>(row.weight + 2 * k, 2 * remaining);
    }
    static __m512 scale(const Row&, int64_t) { return _mm512_setzero_ps(); }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<64>(row.weight, 2 * k, distance);
    }
};

// mantissa * 2^exponent as bfloat16, exact for mantissas below 256.
constexpr uint16_t bf16_bits(int mantissa, int exponent) {
    if (mantissa == 0) return 0;
    for (; mantissa < 128; exponent--) mantissa <<= 1;
    return static_cast<uint16_t>((exponent + 7 + 127) << 7 | (mantissa & 127));
}

// E4M3: four bits of exponent with bias 7, three of mantissa; 127 is NaN.
constexpr uint16_t bf16_from_e4m3(int magnitude) {
    if (magnitude == 127) return 0x7fc0;
    return magnitude < 8 ? bf16_bits(magnitude, -9) : bf16_bits(8 + (magnitude & 7), (magnitude >> 3) - 10);
}

// Upper and lower byte of the bfloat16 of each seven-bit magnitude. Computed by the compiler: code of this file that
// ran on loading would stop a processor without AVX-512.
struct ByteTable {
    alignas(64) uint8_t upper[128], lower[128];
    constexpr explicit ByteTable(uint16_t (*bf16)(int)) : upper(), lower() {
        for (int magnitude = 0; magnitude < 128; magnitude++) {
            upper[magnitude] = static_cast<uint8_t>(bf16(magnitude) >> 8);
            lower[magnitude] = static_cast<uint8_t>(bf16(magnitude) & 255);
        }
    }
    // 64 bytes, magnitudes with signs in bit 7, to two vectors of bfloat16.
    void look_up(__m512i bytes, __m512i* out) const {
        __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(upper), bytes, _mm512_load_si512(upper + 64));
        const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(lower), bytes, _mm512_load_si512(lower + 64));
        high = _mm512_ternarylogic_epi64(high, bytes, _mm512_set1_epi8(-128), 0xf8);  // high | (bytes & 0x80)
        out[0] = _mm512_unpacklo_epi8(low, high);
        out[1] = _mm512_unpackhi_epi8(low, high);
    }
};

constexpr ByteTable E4M3(bf16_from_e4m3);

struct Fp8 {
    static constexpr int CHUNK = 128;
    static constexpr int VECS = 4;
    static constexpr bool SCALED = true;
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t remaining, __m512i* out) {
        for (int half = 0; half < 2; half++)
            E4M3.look_up(load_bytes<FULL>(row.weight + k + 64 * half, remaining - 64 * half), out + 2 * half);
    }
    static __m512 scale(const Row& row, int64_t k) {
        float scale;
        __builtin_memcpy(&scale, row.scale + k / 128 * 4, 4);
        return _mm512_set1_ps(scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<128>(row.weight, k, distance);
        prefetch_line<128>(row.weight, k, distance + 64);
    }
};

}  // namespace
}  // namespace soli
