// The kernels for AVX2 with FMA and F16C: eight floats at a time, every weight converted to float32 on its way.
#include <immintrin.h>

#include "avx2.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 8;
    static constexpr int ROWS = 2;  // of a register tile
    static constexpr int TILE_TOKENS =
        3;  // of a register tile with many tokens: 4 x 3 sums and operands fit 16 registers
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static float sum(Vec a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    // The sums of four vectors, in the same order.
    static void sum4(const Vec* a, float* to) {
        __m128 s[4];
        for (int i = 0; i < 4; i++) s[i] = _mm_add_ps(_mm256_castps256_ps128(a[i].v), _mm256_extractf128_ps(a[i].v, 1));
        const __m128 ab = _mm_add_ps(_mm_movelh_ps(s[0], s[1]), _mm_movehl_ps(s[1], s[0]));
        const __m128 cd = _mm_add_ps(_mm_movelh_ps(s[2], s[3]), _mm_movehl_ps(s[3], s[2]));
        _mm_storeu_ps(to, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
    }
};

#include "matmul_f32.inc"
#include "weighted_sum_f32.inc"

__m256 broadcast_f16(const uint8_t* base, int64_t index) {
    uint16_t f16;
    __builtin_memcpy(&f16, base + 2 * index, 2);
    return _mm256_set1_ps(_cvtsh_ss(f16));
}

__m256 broadcast_bf16(const uint8_t* base, int64_t index) {
    uint16_t bf16;
    __builtin_memcpy(&bf16, base + 2 * index, 2);
    return _mm256_set1_ps(float_from_bf16(bf16));
}

__m256i load_8_bytes_as_32_bits(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

// Prefetches a line of the rows that come next, once per line: hardware prefetching follows a row but not the jump to
// another.
template <int BYTES>
void prefetch_line(const uint8_t* weight, int64_t at, int64_t distance) {
    if (at % 64 < BYTES) prefetch_l2(weight + at + distance);
}

struct Fp32 {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        out->v = _mm256_loadu_ps(reinterpret_cast<const float*>(row.weight + 4 * k));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<32>(row.weight, 4 * k, distance);
    }
};

struct Bf16 {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.weight + 2 * k));
        out->v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<16>(row.weight, 2 * k, distance);
    }
};

template <bool BY_ROW>
struct Fp8OfScales {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.weight + k));
        const __m256i e4m3 = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
        const __m256i magnitude_mask = _mm256_set1_epi16(0x7f00);
        // Shifted right by one bit, E4M3 is a float16 of 2^-8 the value, subnormal numbers too: the biases are 7 and
        // 15.
        const __m256i shifted =
            _mm256_and_si256(_mm256_srai_epi16(e4m3, 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(e4m3, magnitude_mask), magnitude_mask);
        const __m256i f16 = _mm256_or_si256(shifted, nan);
        float scale;
        __builtin_memcpy(&scale, row.scale + (BY_ROW ? 0 : k / 128 * 4), 4);
        const __m256 factor = _mm256_set1_ps(scale * 256.0f);
        out[0].v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(f16)), factor);
        out[1].v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(f16, 1)), factor);
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) { prefetch_line<16>(row.weight, k, distance); }
};

using Fp8 = Fp8OfScales<false>;
using Fp8Row = Fp8OfScales<true>;

struct Int8 {
    static constexpr int STEP = 32;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256 scale = broadcast_f16(row.scale, k / row.group);
        for (int v = 0; v < 4; v++) {
            const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.weight + k + 8 * v));
            out[v].v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)), scale);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) { prefetch_line<32>(row.weight, k, distance); }
};

// A run of 16 bytes holds 32 inputs: the low nibbles the first 16, the high nibbles the others (diagram:
// int8_tokens.h).
template <bool BF16_SCALES>
struct Int4OfScales {
    static constexpr int STEP = 32;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256 scale =
            BF16_SCALES ? broadcast_bf16(row.scale, k / row.group) : broadcast_f16(row.scale, k / row.group);
        const __m256 minus_8 = _mm256_mul_ps(scale, _mm256_set1_ps(-8.0f));
        for (int v = 0; v < 2; v++) {
            const __m256i bytes = load_8_bytes_as_32_bits(row.weight + k / 2 + 8 * v);
            const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
            const __m256i high = _mm256_srli_epi32(bytes, 4);
            out[v].v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), scale, minus_8);  // one rounding, as of value * scale
            out[v + 2].v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), scale, minus_8);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<16>(row.weight, k / 2, distance);
    }
};

using Int4 = Int4OfScales<false>;
using Int4Bf16 = Int4OfScales<true>;

// E2M1: a byte holds two neighbours, the first in its low half; a nibble is a sign and the number of a magnitude.
struct Fp4 {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 1;  // not used: rows are a multiple of 16
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256 magnitudes = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
        const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        const __m256 sign = _mm256_set1_ps(-0.0f);
        float scale;
        __builtin_memcpy(&scale, row.scale + k / row.group * 4, 4);
        const __m256 factor = _mm256_set1_ps(scale);
        for (int v = 0; v < 2; v++) {
            int32_t word;
            __builtin_memcpy(&word, row.weight + k / 2 + 4 * v, 4);
            const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);  // and what is above them
            const __m256 signs = _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)), sign);
            const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, nibbles);  // by the low three bits
            out[v].v = _mm256_mul_ps(_mm256_or_ps(magnitude, signs), factor);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<8>(row.weight, k / 2, distance);
        prefetch_line<4>(row.scale, k / row.group * 4, distance * 8 / row.group);
    }
};

}  // namespace

const Kernels AVX2 = {
    "avx2",
    {matmul_f32<Fp32>, matmul_f32<Bf16>, matmul_f32<Fp8>, matmul_f32<Int8>, matmul_f32<Int4>, matmul_f32<Int4Bf16>,
     matmul_f32<Fp8Row>, matmul_f32<Fp4>},
    {nullptr, nullptr, nullptr, matmul_int8_avx2, matmul_int4_avx2, matmul_int4_avx2, nullptr, nullptr},
    pack_token_int8,
    silu_mul,
    {weighted_sum_f32<Fp32>, weighted_sum_f32<Bf16>, weighted_sum_f32<Fp8>, weighted_sum_f32<Int8>,
     weighted_sum_f32<Int4>, weighted_sum_f32<Int4Bf16>, weighted_sum_f32<Fp8Row>, weighted_sum_f32<Fp4>},
    exp_scores,
};

}  // namespace soli
