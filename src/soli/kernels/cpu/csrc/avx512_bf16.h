// Weights in bfloat16, FP8 and FP4, decoded to bfloat16, for the two files that multiply them: avx512_bf16.cpp and
// amx_bf16.cpp (without FP4).
//
// An FP8 byte becomes a bfloat16 by looking up its upper and its lower byte and interleaving the two, which works
// within 16 bytes: pack_token puts tokens into the order that comes out. FP4's nibbles likewise.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

struct Row {
    const uint8_t* weight;
    const uint8_t* scale;
    const uint16_t* decoded;  // the row in bfloat16, where it has been decoded before
};

// Per format: CHUNK weights give VECS = CHUNK / 32 vectors of bfloat16 and, where SCALED, scales for their products:
// for the first VECS / PARTS vectors, and for the others, one per float32 lane.
struct Bf16 {
    static constexpr int CHUNK = 32;
    static constexpr int VECS = 1;
    static constexpr bool SCALED = false;
    static constexpr int PARTS = 1;
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t remaining, __m512i* out) {
        out[0] = load_bytes<FULL>(row.weight + 2 * k, 2 * remaining);
    }
    template <bool FULL>
    static void scales(const Row&, int64_t, int64_t, __m512* out) {
        out[0] = _mm512_setzero_ps();
    }
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

template <bool BY_ROW>
struct Fp8OfScales {
    static constexpr int CHUNK = 128;
    static constexpr int VECS = 4;
    static constexpr bool SCALED = true;
    static constexpr int PARTS = 1;
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t remaining, __m512i* out) {
        for (int half = 0; half < 2; half++)
            E4M3.look_up(load_bytes<FULL>(row.weight + k + 64 * half, remaining - 64 * half), out + 2 * half);
    }
    template <bool FULL>
    static void scales(const Row& row, int64_t k, int64_t, __m512* out) {
        float scale;
        __builtin_memcpy(&scale, row.scale + (BY_ROW ? 0 : k / 128 * 4), 4);
        out[0] = _mm512_set1_ps(scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<128>(row.weight, k, distance);
        prefetch_line<128>(row.weight, k, distance + 64);
    }
};

using Fp8 = Fp8OfScales<false>;
using Fp8Row = Fp8OfScales<true>;

// E2M1, whose eight magnitudes and signs are exact in bfloat16. Of each 16 bytes, 32 inputs, the four vectors have in
// their 128 bits
//     vector 0    inputs  0,  2 ... 14        vector 1    inputs  1,  3 ... 15
//     vector 2    inputs 16, 18 ... 30        vector 3    inputs 17, 19 ... 31
// so a group of 16 is in two vectors, and one of 32 in all four.
template <int G>
struct Fp4 {
    static constexpr int CHUNK = 128;
    static constexpr int VECS = 4;
    static constexpr bool SCALED = true;
    static constexpr int PARTS = 32 / G;
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t remaining, __m512i* out) {
        const __m512i upper = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80,
                                                                   -0x41, -0x41, -0x41, -0x40, -0x40, -0x40, -0x40));
        const __m512i lower = _mm512_broadcast_i32x4(
            _mm_setr_epi8(0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40));
        const __m512i bytes = load_bytes<FULL>(row.weight + k / 2, remaining / 2);
        for (int half = 0; half < 2; half++) {
            const __m512i nibbles = _mm512_and_si512(half ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
            const __m512i high = _mm512_shuffle_epi8(upper, nibbles);
            const __m512i low = _mm512_shuffle_epi8(lower, nibbles);
            out[half] = _mm512_unpacklo_epi8(low, high);
            out[2 + half] = _mm512_unpackhi_epi8(low, high);
        }
    }
    template <bool FULL>
    static void scales(const Row& row, int64_t k, int64_t remaining, __m512* out) {
        const __mmask16 groups = static_cast<__mmask16>(FULL ? (1 << 128 / G) - 1 : (1 << remaining / G) - 1);
        const __m512 scales = _mm512_maskz_loadu_ps(groups, row.scale + k / G * 4);
        for (int part = 0; part < PARTS; part++) {
            const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            const __m512i group = _mm512_add_epi32(_mm512_slli_epi32(lanes, PARTS - 1), _mm512_set1_epi32(part));
            out[part] = _mm512_permutexvar_ps(group, scales);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<64>(row.weight, k / 2, distance);
        prefetch_line<512 / G>(row.scale, k / G * 4, distance * 8 / G);
    }
};

}  // namespace
}  // namespace soli
