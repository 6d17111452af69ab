// The kernels for AVX-512 with BF16, VNNI and VBMI (Zen 4, Sapphire Rapids and later), for float32 tokens: sixteen floats at a
// time. Those for bfloat16 tokens are in avx512_bf16.cpp and avx512_vnni.cpp.
#include "avx512.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 16, ROWS = 4, TOGETHER = 4;  // 4 rows x 4 tokens
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vec all(float value) { return {_mm512_set1_ps(value)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
    static void sum4(const Vec* a, float* to) {
        for (int i = 0; i < 4; i++) to[i] = sum(a[i]);
    }
};

#include "dots32.inc"
#include "mix32.inc"

__m512 half_at(const uint8_t* base, int64_t index) {
    uint16_t half;
    __builtin_memcpy(&half, base + 2 * index, 2);
    return _mm512_set1_ps(_cvtsh_ss(half));
}

__m128i sixteen(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

struct Fp32 {
    static constexpr int STEP = 16, BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        out->v = _mm512_loadu_ps(reinterpret_cast<const float*>(row.weight + 4 * k));
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<64>(row.weight, 4 * k, ahead); }
};

struct Bf16 {
    static constexpr int STEP = 16, BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.weight + 2 * k));
        out->v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<32>(row.weight, 2 * k, ahead); }
};

struct Fp8 {
    static constexpr int STEP = 16, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512i code = _mm512_cvtepu8_epi32(sixteen(row.weight + k));
        const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(127));
        const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(127), code), 24);
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127));
        // The seven bits lie like the head of a float32 with another bias; below 8 they are a whole number of 2^-9.
        const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
        const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
        const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
        __m512 value = _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_small, small);
        value =
            _mm512_mask_mov_ps(_mm512_or_ps(value, _mm512_castsi512_ps(sign)), nan, _mm512_set1_ps(__builtin_nanf("")));
        float scale;
        __builtin_memcpy(&scale, row.scale + k / 128 * 4, 4);
        out->v = _mm512_mul_ps(value, _mm512_set1_ps(scale));
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<16>(row.weight, k, ahead); }
};

struct Int8 {
    static constexpr int STEP = 32, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512 scale = half_at(row.scale, k / row.group);
        for (int v = 0; v < 2; v++)
            out[v].v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(row.weight + k + 16 * v))), scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<32>(row.weight, k, ahead); }
};

struct Int4 {
    static constexpr int STEP = 32, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512 scale = half_at(row.scale, k / row.group);
        const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(row.weight + k / 2));  // the table takes the low four bits
        out[0].v = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, values), scale);
        out[1].v = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values), scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t ahead) { prefetch_line<16>(row.weight, k / 2, ahead); }
};

// Both sets differ in their products for bfloat16 tokens alone.
constexpr Kernels with(const char* name, Dots16 bf16, Dots16 fp8, Dots16 int8, Dots16 int4) {
    return {
        name,
        {dots32<Fp32>, dots32<Bf16>, dots32<Fp8>, dots32<Int8>, dots32<Int4>},
        {nullptr, bf16, fp8, int8, int4},
        put16,
        silu_mul,
        {mix32<Fp32>, mix32<Bf16>, mix32<Fp8>, mix32<Int8>, mix32<Int4>},
        soften,
    };
}

}  // namespace

constexpr Kernels AVX512 = with("avx512", dots16_bf16, dots16_fp8, dots16_int8, dots16_int4);
#ifdef SOLI_AMX
constexpr Kernels AMX = with("amx", dots16_bf16_tiles, dots16_fp8_tiles, dots16_int8_tiles, dots16_int4_tiles);
#endif

}  // namespace soli
