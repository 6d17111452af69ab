// What the instruction sets share that multiply weights in int8 and int4 by tokens of 8 bits: avx2_bytes.cpp, avx512_vnni.h.
//
// Tokens are rounded to 8 bits, with a scale for each 128 numbers: x = code * largest / 127, codes -127 ... 127. Where one
// side of the product must have no sign, weights count from their lowest code, w + 128 or w + 8, and `starts`, kept with
// the token, take the difference back. The sum of a group is a whole number and exact, in any order; then
//     y = fma(sum of group g, weight's scale * token's scale, y)      for g = 0, 1, ...
// so a single token, whose products run along the inputs, and many, whose products run along the rows, get the same bits,
// and so they do with any of these instruction sets.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace soli {
namespace {

// A token beside weights in int8 or int4, of `padded` numbers: codes; for each 128 numbers four starts, of which the first
// of each group holds the group's sum of codes times minus the weights' offset; for each 128 a scale.
struct Token {
    uint8_t* codes;
    int32_t* starts;
    float* scales;

    SOLI_INLINE Token(const uint8_t* token, int64_t padded)
        : codes(const_cast<uint8_t*>(token)),
          starts(reinterpret_cast<int32_t*>(codes + padded)),
          scales(reinterpret_cast<float*>(codes + padded + padded / 8)) {}
};

// What 128 bfloat16 numbers are multiplied and divided by, of which `most` is the largest. One that is not finite makes
// the scale NaN; one below 2^-100 makes it 0.
struct Scale {
    float factor, scale;

    SOLI_INLINE explicit Scale(float most) {
        const bool zero = most < 0x1p-100f, finite = most <= 0x1.fep127f;
        factor = zero || !finite ? 0.0f : 127.0f / most;
        scale = zero ? 0.0f : finite ? most / 127.0f : __builtin_nanf("");
    }
};

// Of `left` tokens the first portion, when as few portions as possible, of `most`, are to be of even size.
SOLI_INLINE int64_t portion(int64_t left, int64_t most) {
    const int64_t pieces = (left + most - 1) / most;
    return (left + pieces - 1) / pieces;
}

// A band of rows turned for many tokens, how far these are apart, and what comes after the band: `bytes` to ask for from
// `next` on.
struct Turned {
    const uint8_t* weights;
    const float* scales;
    int64_t I, stride;
    const uint8_t* next;
    int64_t bytes;

    // The share of one of `pieces` that all tokens are cut into, step by step of 128 inputs.
    struct Ahead {
        const uint8_t* next;
        int64_t step;
        SOLI_INLINE void ask() {
            for (int64_t line = 0; line < step; line += 64) soli::ask(next + line);
            next += step;
        }
    };
    SOLI_INLINE Ahead ahead(int64_t piece, int64_t pieces) const {
        const int64_t steps = padded(I) / 128, step = bytes / (pieces * steps) / 64 * 64 + 64;
        return {next + piece * step * steps, step};
    }
};

}  // namespace
}  // namespace soli
