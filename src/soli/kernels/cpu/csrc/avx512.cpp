// The kernels for AVX-512 with BF16, VNNI and VBMI (Zen 4, Sapphire Rapids and later), for float32 tokens: sixteen
// floats at a time. Those for bfloat16 tokens are in avx512_bf16.cpp and avx512_vnni.cpp.
#include "avx512.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 16;
    static constexpr int ROWS = 4;         // of a register tile
    static constexpr int TILE_TOKENS = 4;  // of a register tile with many tokens
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
    static void sum4(const Vec* a, float* to) {
        for (int i = 0; i < 4; i++) to[i] = sum(a[i]);
    }
};

#include "matmul_f32.inc"
#include "weighted_sum_f32.inc"

__m512 broadcast_f16(const uint8_t* base, int64_t index) {
    uint16_t f16;
    __builtin_memcpy(&f16, base + 2 * index, 2);
    return _mm512_set1_ps(_cvtsh_ss(f16));
}

__m512 broadcast_bf16(const uint8_t* base, int64_t index) {
    uint16_t bf16;
    __builtin_memcpy(&bf16, base + 2 * index, 2);
    return _mm512_set1_ps(float_from_bf16(bf16));
}

__m128i load_16_bytes(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

struct Fp32 {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        out->v = _mm512_loadu_ps(reinterpret_cast<const float*>(row.weight + 4 * k));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<64>(row.weight, 4 * k, distance);
    }
};

struct Bf16 {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.weight + 2 * k));
        out->v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<32>(row.weight, 2 * k, distance);
    }
};

template <bool BY_ROW>
struct Fp8OfScales {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512i e4m3 = _mm512_cvtepu8_epi32(load_16_bytes(row.weight + k));
        const __m512i magnitude = _mm512_and_si512(e4m3, _mm512_set1_epi32(127));
        const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(127), e4m3), 24);
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127));
        // E4M3 has the bit order of a float32 with another exponent bias; below 8 it is subnormal, in units of 2^-9.
        const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
        const __m512 subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
        const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
        __m512 value = _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_subnormal, subnormal);
        value =
            _mm512_mask_mov_ps(_mm512_or_ps(value, _mm512_castsi512_ps(sign)), nan, _mm512_set1_ps(__builtin_nanf("")));
        float scale;
        __builtin_memcpy(&scale, row.scale + (BY_ROW ? 0 : k / 128 * 4), 4);
        out->v = _mm512_mul_ps(value, _mm512_set1_ps(scale));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) { prefetch_line<16>(row.weight, k, distance); }
};

using Fp8 = Fp8OfScales<false>;
using Fp8Row = Fp8OfScales<true>;

struct Int8 {
    static constexpr int STEP = 32;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512 scale = broadcast_f16(row.scale, k / row.group);
        for (int v = 0; v < 2; v++)
            out[v].v =
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(row.weight + k + 16 * v))), scale);
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
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512 scale =
            BF16_SCALES ? broadcast_bf16(row.scale, k / row.group) : broadcast_f16(row.scale, k / row.group);
        const __m512i bytes =
            _mm512_cvtepu8_epi32(load_16_bytes(row.weight + k / 2));  // the permutation reads the low four bits
        out[0].v = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, values), scale);
        out[1].v = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values), scale);
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<16>(row.weight, k / 2, distance);
    }
};

using Int4 = Int4OfScales<false>;
using Int4Bf16 = Int4OfScales<true>;

// E2M1: a byte holds two neighbours, the first in its low half.
struct Fp4 {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 1;  // not used: rows are a multiple of 16
    static void decode(const Row& row, int64_t k, Vec* out) {
        const __m512 values = _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
        float scale;
        __builtin_memcpy(&scale, row.scale + k / row.group * 4, 4);
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.weight + k / 2));
        const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
        // A nibble in the lowest four bits of each lane of 32; the permutation reads no others.
        const __m512i nibbles = _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
        out->v = _mm512_mul_ps(_mm512_permutexvar_ps(nibbles, values), _mm512_set1_ps(scale));
    }
    static void prefetch(const Row& row, int64_t k, int64_t distance) {
        prefetch_line<8>(row.weight, k / 2, distance);
        prefetch_line<4>(row.scale, k / row.group * 4, distance * 8 / row.group);
    }
};

// AVX-512 and AMX differ in their products of bfloat16 tokens only.
constexpr Kernels with_bf16(const char* name, MatmulBf16 bf16, MatmulBf16 fp8, MatmulBf16 int8, MatmulBf16 int4,
                            MatmulBf16 fp8_row) {
    return {
        name,
        {matmul_f32<Fp32>, matmul_f32<Bf16>, matmul_f32<Fp8>, matmul_f32<Int8>, matmul_f32<Int4>, matmul_f32<Int4Bf16>,
         matmul_f32<Fp8Row>, matmul_f32<Fp4>},
        {nullptr, bf16, fp8, int8, int4, int4, fp8_row, matmul_fp4_avx512},
        pack_token,
        silu_mul,
        {weighted_sum_f32<Fp32>, weighted_sum_f32<Bf16>, weighted_sum_f32<Fp8>, weighted_sum_f32<Int8>,
         weighted_sum_f32<Int4>, weighted_sum_f32<Int4Bf16>, weighted_sum_f32<Fp8Row>, weighted_sum_f32<Fp4>},
        exp_scores,
    };
}

}  // namespace

constexpr Kernels AVX512 = with_bf16("avx512", matmul_bf16_avx512, matmul_fp8_avx512, matmul_int8_avx512,
                                     matmul_int4_avx512, matmul_fp8_row_avx512);
#ifdef SOLI_AMX
constexpr Kernels AMX =
    with_bf16("amx", matmul_bf16_amx, matmul_fp8_amx, matmul_int8_amx, matmul_int4_amx, matmul_fp8_row_amx);
#endif

}  // namespace soli
