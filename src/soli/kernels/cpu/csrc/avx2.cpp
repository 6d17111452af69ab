// The kernels for AVX2 with FMA and F16C: eight floats at a time, every weight widened to float32 on its way.
#include <immintrin.h>

#include "avx2.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 8, ROWS = 2,
                         TOGETHER = 3;  // 4 rows x 3 tokens: sums and operands fit sixteen registers
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static Vec all(float value) { return {_mm256_set1_ps(value)}; }
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

#include "dots32.inc"
#include "mix32.inc"

__m256 half_at(const uint8_t* base, int64_t index) {
    uint16_t half;
    __builtin_memcpy(&half, base + 2 * index, 2);
    return _mm256_set1_ps(_cvtsh_ss(half));
}

__m256i eight_bytes(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

// Ask for a line of the rows that come next, once per line: hardware follows a row but not the jump to another.
template <int BYTES>
void prefetch_line(const uint8_t* weight, int64_t at, int64_t ahead) {
    if (at % 64 < BYTES) ask(weight + at + ahead);
}

struct Fp32 {
    static constexpr int STEP = 8, BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        out->v = _mm256_loadu_ps(reinterpret_cast<const float*>(row.weight + 4 * k));
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<32>(row.weight, 4 * k, ahead); }
};

struct Bf16 {
    static constexpr int STEP = 8, BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.weight + 2 * k));
        out->v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<16>(row.weight, 2 * k, ahead); }
};

struct Fp8 {
    static constexpr int STEP = 16, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.weight + k));
        const __m256i code = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), all = _mm256_set1_epi16(0x7f00);
        // A place further right the seven bits are float16's, with a bias that makes them 2^-8 of the number, small ones too.
        const __m256i half =
            _mm256_and_si256(_mm256_srai_epi16(code, 1), _mm256_set1_epi16(static_cast<short>(0xbf80)));
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(code, all), all), found = _mm256_or_si256(half, nan);
        float scale;
        __builtin_memcpy(&scale, row.scale + k / 128 * 4, 4);
        const __m256 each = _mm256_set1_ps(scale * 256.0f);
        out[0].v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(found)), each);
        out[1].v = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(found, 1)), each);
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<16>(row.weight, k, ahead); }
};

struct Int8 {
    static constexpr int STEP = 32, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256 scale = half_at(row.scale, k / row.group);
        for (int v = 0; v < 4; v++) {
            const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.weight + k + 8 * v));
            out[v].v = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), scale);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<32>(row.weight, k, ahead); }
};

struct Int4 {
    static constexpr int STEP = 32, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256 scale = half_at(row.scale, k / row.group), minus8 = _mm256_mul_ps(scale, _mm256_set1_ps(-8.0f));
        for (int v = 0; v < 2; v++) {
            const __m256i bytes = eight_bytes(row.weight + k / 2 + 8 * v);
            const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi32(15)), high = _mm256_srli_epi32(bytes, 4);
            out[v].v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), scale, minus8);  // exact up to the one rounding of fma
            out[v + 2].v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), scale, minus8);
        }
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<16>(row.weight, k / 2, ahead); }
};

}  // namespace

const Kernels AVX2 = {
    "avx2",
    {dots32<Fp32>, dots32<Bf16>, dots32<Fp8>, dots32<Int8>, dots32<Int4>},
    {nullptr, nullptr, nullptr, dots16_int8_avx2, dots16_int4_avx2},
    put16_bytes,
    silu_mul,
    {mix32<Fp32>, mix32<Bf16>, mix32<Fp8>, mix32<Int8>, mix32<Int4>},
    soften,
};

}  // namespace soli
