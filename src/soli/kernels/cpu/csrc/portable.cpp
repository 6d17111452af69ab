// The kernels for any machine: plain C++ on eight floats at a time, which every compiler turns into what it has.
#include "kernels.h"
#include "scratch.h"

namespace soli {
namespace {

struct Vec {
    static constexpr int WIDTH = 8, ROWS = 2, TOGETHER = 2;
    float lane[WIDTH];

    static Vec zero() { return {}; }
    static Vec load(const float* from) {
        Vec v;
        __builtin_memcpy(v.lane, from, sizeof v.lane);
        return v;
    }
    static Vec all(float value) {
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

#include "dots32.inc"
#include "mix32.inc"

float float_at(const uint8_t* base, int64_t index) {
    float value;
    __builtin_memcpy(&value, base + 4 * index, 4);
    return value;
}

float half_at(const uint8_t* base, int64_t index) {
    uint16_t half;
    __builtin_memcpy(&half, base + 2 * index, 2);
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    // The same trick as for E4M3: exponent and mantissa moved into place are 2^112 too small.
    const float value =
        magnitude >= 0x7c00 ? as_float(0x7f800000u | magnitude << 13) : as_float(magnitude << 13) * 0x1p112f;
    return as_float(as_bits(value) | sign);
}

struct Fp32 {
    static constexpr int STEP = 8, BYTES = 4;
    static void decode(const Row& row, int64_t k, Vec* out) {
        __builtin_memcpy(out->lane, row.weight + 4 * k, sizeof out->lane);
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

struct Bf16 {
    static constexpr int STEP = 8, BYTES = 2;
    static void decode(const Row& row, int64_t k, Vec* out) {
        uint16_t bits[STEP];
        __builtin_memcpy(bits, row.weight + 2 * k, sizeof bits);
        for (int i = 0; i < STEP; i++) out->lane[i] = widened(bits[i]);
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

struct Fp8 {
    static constexpr int STEP = 8, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale = float_at(row.scale, k / 128);
        for (int i = 0; i < STEP; i++) {
            const uint32_t code = row.weight[k + i], magnitude = code & 127;
            // The seven bits lie like the head of a float32 with another bias; below 8 they are a whole number of 2^-9.
            const float number = magnitude < 8 ? magnitude * 0x1p-9f : as_float((magnitude << 20) + (120u << 23));
            const float value = magnitude == 127 ? __builtin_nanf("") : number;
            out->lane[i] = (code & 128 ? -value : value) * scale;
        }
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

struct Int8 {
    static constexpr int STEP = 8, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale = half_at(row.scale, k / row.group);
        for (int i = 0; i < STEP; i++) out->lane[i] = static_cast<int8_t>(row.weight[k + i]) * scale;
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

struct Int4 {  // rows are whole runs of 32: nothing is ragged, and BYTES is never used
    static constexpr int STEP = 32, BYTES = 1;
    static void decode(const Row& row, int64_t k, Vec* out) {
        const float scale = half_at(row.scale, k / row.group);
        const uint8_t* run = row.weight + k / 2;
        for (int i = 0; i < STEP / 2; i++) {
            out[i / 8].lane[i % 8] = ((run[i] & 15) - 8) * scale;
            out[i / 8 + 2].lane[i % 8] = ((run[i] >> 4) - 8) * scale;
        }
    }
    static void prefetch(const Row&, int64_t, int64_t) {}
};

}  // namespace

const Kernels PORTABLE = {
    "portable", {dots32<Fp32>, dots32<Bf16>, dots32<Fp8>, dots32<Int8>, dots32<Int4>}, {},     nullptr,
    silu_mul,   {mix32<Fp32>, mix32<Bf16>, mix32<Fp8>, mix32<Int8>, mix32<Int4>},      soften,
};

}  // namespace soli
