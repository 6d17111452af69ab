// The kernels for any machine: plain C++ on eight floats at a time, which a compiler maps to the vectors that it knows.
#include "kernels.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 8;
    static constexpr int ROWS = 2;         // of a register tile
    static constexpr int TILE_TOKENS = 2;  // of a register tile with many tokens
    float lane[WIDTH];

    static Vec zero() { return {}; }
    static Vec load(const float* from) {
        Vec v;
        __builtin_memcpy(v.lane, from, sizeof v.lane);
        return v;
    }
    static Vec broadcast(float value) {
        Vec v;
        for (int i = 0; i < WIDTH; i++) v.lane[i] = value;
        return v;
    }
    void store(float* to) const { __builtin_memcpy(to, lane, sizeof lane); }
    static Vec fma(const Vec& a, const Vec& b, Vec c) {
        for (int i = 0; i < WIDTH; i++) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static float sum(const Vec& v) {
        return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) +
               ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
    }
    static void sum4(const Vec* v, float* to) {
        for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
    }
};

#include "matmul_f32.inc"
#include "weighted_sum_f32.inc"

float float_at(const uint8_t* base, int64_t index) {
    float value;
    __builtin_memcpy(&value, base + 4 * index, 4);
    return value;
}

float float_from_bf16_at(const uint8_t* base, int64_t index) {
    uint16_t bf16;
    __builtin_memcpy(&bf16, base + 2 * index, 2);
    return float_from_bf16(bf16);
}

float float_from_f16_at(const uint8_t* base, int64_t index) {
    uint16_t f16;
    __builtin_memcpy(&f16, base + 2 * index, 2);
    const uint32_t sign = (f16 & 0x8000u) << 16;
    const uint32_t magnitude = f16 & 0x7fffu;
    // Shifted into float32's place, exponent and mantissa are 2^112 too small; 0x7c00 and more are infinity and NaN.
    const float value =
        magnitude >= 0x7c00 ? as_float(0x7f800000u | magnitude << 13) : as_float(magnitude << 13) * 0x1p112f;
    return as_float(as_bits(value) | sign);
}

struct Fp32 {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        __builtin_memcpy(out->lane, row.weight + 4 * k, sizeof out->lane);
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

struct Bf16 {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        uint16_t bits[STEP];
        __builtin_memcpy(bits, row.weight + 2 * k, sizeof bits);
        for (int i = 0; i < STEP; i++) out->lane[i] = float_from_bf16(bits[i]);
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

template <bool BY_ROW>
struct Fp8OfScales {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale = float_at(row.scale, BY_ROW ? 0 : k / 128);
        for (int i = 0; i < STEP; i++) {
            const uint32_t e4m3 = row.weight[k + i];
            const uint32_t magnitude = e4m3 & 127;
            // E4M3 has the bit order of a float32 with another exponent bias; below 8 it is subnormal, in units of
            // 2^-9.
            const float number = magnitude < 8 ? magnitude * 0x1p-9f : as_float((magnitude << 20) + (120u << 23));
            const float value = magnitude == 127 ? __builtin_nanf("") : number;
            out->lane[i] = (e4m3 & 128 ? -value : value) * scale;
        }
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

using Fp8 = Fp8OfScales<false>;
using Fp8Row = Fp8OfScales<true>;

struct Int8 {
    static constexpr int STEP = 8;
    static constexpr int BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale = float_from_f16_at(row.scale, k / row.group);
        for (int i = 0; i < STEP; i++) out->lane[i] = static_cast<int8_t>(row.weight[k + i]) * scale;
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

// A run of 16 bytes holds 32 inputs: the low nibbles the first 16, the high nibbles the others (diagram:
// int8_tokens.h).
template <bool BF16_SCALES>
struct Int4OfScales {
    static constexpr int STEP = 32;
    static constexpr int BYTES = 1;  // not used: rows are a multiple of 32
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale =
            BF16_SCALES ? float_from_bf16_at(row.scale, k / row.group) : float_from_f16_at(row.scale, k / row.group);
        const uint8_t* run = row.weight + k / 2;
        for (int i = 0; i < STEP / 2; i++) {
            out[i / 8].lane[i % 8] = ((run[i] & 15) - 8) * scale;
            out[i / 8 + 2].lane[i % 8] = ((run[i] >> 4) - 8) * scale;
        }
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

using Int4 = Int4OfScales<false>;
using Int4Bf16 = Int4OfScales<true>;

// E2M1: a byte holds two neighbours, the first in its low half.
struct Fp4 {
    static constexpr int STEP = 16;
    static constexpr int BYTES = 1;  // not used: rows are a multiple of 16
    static void decode(const Row& row, int64_t k, Vec* out) {
        static const float VALUES[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
        const float scale = float_at(row.scale, k / row.group);
        const uint8_t* bytes = row.weight + k / 2;
        for (int i = 0; i < STEP; i++) out[i / 8].lane[i % 8] = VALUES[bytes[i / 2] >> i % 2 * 4 & 15] * scale;
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

}  // namespace

const Kernels PORTABLE = {
    "portable",
    {matmul_f32<Fp32>, matmul_f32<Bf16>, matmul_f32<Fp8>, matmul_f32<Int8>, matmul_f32<Int4>, matmul_f32<Int4Bf16>,
     matmul_f32<Fp8Row>, matmul_f32<Fp4>},
    {},       // no bfloat16 products
    nullptr,  // and no tokens packed for them
    silu_mul,
    {weighted_sum_f32<Fp32>, weighted_sum_f32<Bf16>, weighted_sum_f32<Fp8>, weighted_sum_f32<Int8>,
     weighted_sum_f32<Int4>, weighted_sum_f32<Int4Bf16>, weighted_sum_f32<Fp8Row>, weighted_sum_f32<Fp4>},
    exp_scores,
};

}  // namespace soli
