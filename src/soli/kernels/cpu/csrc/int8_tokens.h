// What the instruction sets share that multiply int8 and int4 weights with tokens of 8 bits: avx2_int8.cpp,
// avx512_vnni.h.
//
// Tokens are rounded to 8 bits, with a scale for each 128 numbers: x = value * scale, scale = max / 127, value in -127
// ... 127. Where one side of the product must be unsigned, weights count from their lowest value, w + 128 or w + 8, and
// `corrections`, stored with the token, take the difference back. The sum of a group is an integer and exact, in any
// order; then
//     y = fma(sum of group g, weight's scale * token's scale, y)      for g = 0, 1, ...
// so a single token, whose products run along the inputs, and many, whose products run along the rows, have the same
// bits, and so they have with any of these instruction sets.
//
// int4 weights: a byte holds two values, each value + 8; 32 inputs of a row are a run of 16 bytes.
//     byte of the run          0        1        2    ...    15
//     low nibble, input        0        1        2    ...    15
//     high nibble, input      16       17       18    ...    31
// so 64 bytes, masked to low and to high nibbles, are the first and the second halves of four runs:
//     inputs of `low`      0-15,  32-47,  64-79,  96-111
//     inputs of `high`    16-31,  48-63,  80-95, 112-127
// Tokens beside int4, and on AVX-512 beside int8 in groups below 128, have their values in that order, low then high.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace soli {
namespace {

// A token of `padded` numbers beside int8 or int4 weights: values; for each 128 numbers four corrections, of which the
// first of each group is minus the weights' offset times the sum of the group's values; for each 128 numbers a scale.
struct Int8Token {
    uint8_t* values;
    int32_t* corrections;
    float* scales;

    SOLI_INLINE Int8Token(const uint8_t* token, int64_t padded)
        : values(const_cast<uint8_t*>(token)),
          corrections(reinterpret_cast<int32_t*>(values + padded)),
          scales(reinterpret_cast<float*>(values + padded + padded / 8)) {}
};

// Quantizes 128 bfloat16 numbers, of which `max` is the largest magnitude: value = round(x * factor), x = value *
// scale. A max that is not finite makes the scale NaN; one below 2^-100 makes it 0.
struct TokenScale {
    float factor;
    float scale;

    SOLI_INLINE explicit TokenScale(float max) {
        const bool is_zero = max < 0x1p-100f;
        const bool is_finite = max <= 0x1.fep127f;
        factor = is_zero || !is_finite ? 0.0f : 127.0f / max;
        scale = is_zero ? 0.0f : is_finite ? max / 127.0f : __builtin_nanf("");
    }
};

// How many of `remaining` tokens to take next, when they are cut into as few tiles as possible, of at most `max` and of
// even size.
SOLI_INLINE int64_t balanced_tile(int64_t remaining, int64_t max) {
    const int64_t tiles = (remaining + max - 1) / max;
    return (remaining + tiles - 1) / tiles;
}

// A tile of rows, transposed for many tokens.
struct TransposedTile {
    const uint8_t* weights;
    const float* scales;
    int64_t I;
    int64_t token_stride;  // bytes
    const uint8_t* next;   // the rows after the tile, in the file's order
    int64_t next_bytes;    // of them to prefetch

    // Prefetches, step by step of 128 inputs, the share of `next` that belongs to one token tile.
    struct Prefetcher {
        const uint8_t* next;
        int64_t step_bytes;
        SOLI_INLINE void prefetch_step() {
            for (int64_t line = 0; line < step_bytes; line += 64) prefetch_l2(next + line);
            next += step_bytes;
        }
    };
    SOLI_INLINE Prefetcher prefetcher(int64_t token_tile, int64_t token_tiles) const {
        const int64_t steps = padded(I) / 128;
        const int64_t step_bytes = next_bytes / (token_tiles * steps) / 64 * 64 + 64;
        return {next + token_tile * step_bytes * steps, step_bytes};
    }
};

}  // namespace
}  // namespace soli
