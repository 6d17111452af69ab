// What both drivers share: activations made ready for a kernel, and results written out.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace soli {

constexpr int64_t SPARE = 15;  // tokens past the last that a kernel may read: it takes up to sixteen at once

// Tokens in the form that a kernel reads: what dots16 takes, or float32.
struct Tokens {
    const Kernels& isa;
    Layout layout;
    bool narrow;  // for dots16
    uint8_t* data;

    Tokens(const Kernels& isa, const Layout& layout, int64_t dtype)
        : isa(isa),
          layout(layout),
          narrow(dtype == HALF && isa.dots16[layout.format]),
          data(nullptr) {}

    int64_t token_bytes() const { return narrow ? layout.token16_bytes() : 4 * padded(layout.I); }
    // Of `count` tokens. What a kernel makes of the spare ones nobody sees.
    int64_t bytes(int64_t count) const { return token_bytes() * (count + SPARE); }

    // Token t from `from`, I values of `dtype`.
    void put(int64_t t, const void* from, int64_t dtype) {
        if (dtype == FLOAT) put_part(t, 0, static_cast<const float*>(from), layout.I);
        else put_part(t, 0, static_cast<const uint16_t*>(from), layout.I);
    }

    // The part of token t from `at` on, a multiple of STEP: n values, and zeros up to the next multiple.
    template <class V>
    void put_part(int64_t t, int64_t at, const V* from, int64_t n) {
        uint8_t* token = data + t * token_bytes();
        alignas(64) uint16_t half[STEP];
        for (int64_t k = 0; k < n; k += STEP) {
            const int64_t count = std::min(STEP, n - k);
            if (narrow) {
                copy(from + k, count, half), std::memset(half + count, 0, 2 * (STEP - count));
                isa.put16(layout, half, token, at + k);
            } else {
                float* to = reinterpret_cast<float*>(token) + at + k;
                copy(from + k, count, to), std::memset(to + count, 0, 4 * (STEP - count));
            }
        }
    }

    // y[t * y_stride + r] for `count` tokens from `first` on and all rows.
    void dots(const Matrix& matrix, int64_t row, int64_t rows, int64_t first, int64_t count, float* y,
              int64_t y_stride) const {
        const Rows block = {matrix, layout, row, rows};
        const uint8_t* x = data + first * token_bytes();
        if (narrow) isa.dots16[layout.format](block, x, count, y, y_stride);
        else isa.dots32[layout.format](block, reinterpret_cast<const float*>(x), count, y, y_stride);
    }

private:
    static void copy(const float* from, int64_t n, float* to) { std::memcpy(to, from, 4 * n); }
    static void copy(const uint16_t* from, int64_t n, uint16_t* to) { std::memcpy(to, from, 2 * n); }
    static void copy(const uint16_t* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; i++) to[i] = widened(from[i]);
    }
    static void copy(const float* from, int64_t n, uint16_t* to) {
        for (int64_t i = 0; i < n; i++) to[i] = narrowed(from[i]);
    }
};

inline void write_out(const float* from, int64_t n, void* to, int64_t at, int64_t dtype) {
    if (dtype == FLOAT) std::memcpy(static_cast<float*>(to) + at, from, 4 * n);
    else
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[at + i] = narrowed(from[i]);
}

constexpr int64_t ROWS = 32;     // rows of a piece of work: small enough to share out evenly
constexpr int64_t TOKENS = 128;  // tokens of a piece of work: their activations stay in the second-level cache
constexpr int64_t FEW = 8;  // tokens, less than this: reading is what takes time, and long stretches are read faster

// Pieces of work to hand out at once, in `shares` portions. Few tokens keep pieces that follow each other with one thread:
// what it asked for ahead of a piece's end is then seldom another's.
inline int64_t at_once(int64_t pieces, int64_t tokens, int64_t shares) {
    return tokens < FEW ? std::max<int64_t>(1, pieces / shares) : 1;
}

// Rows of a matrix to multiply in one go for so many tokens, when at least `shares` portions are wanted.
inline int64_t stretch(int64_t rows, int64_t tokens, int64_t shares) {
    return tokens < FEW ? std::min((rows + ROWS * shares - 1) / (ROWS * shares), TOKENS / FEW) * ROWS : ROWS;
}

}  // namespace soli
