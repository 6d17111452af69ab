// What both drivers share: activations made ready for a kernel, and results written out.
#pragma once
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace soli {

// Tokens in the form that a kernel reads: bfloat16 in its order, or float32.
struct Tokens {
    const Kernels& isa;
    Layout layout;
    bool narrow;  // bfloat16
    uint8_t* data;

    Tokens(const Kernels& isa, const Layout& layout, int64_t dtype)
        : isa(isa), layout(layout), narrow(dtype == HALF && isa.dots16[layout.format]), data(nullptr) {}

    int64_t stride() const { return padded(layout.I); }
    int64_t token_bytes() const { return stride() * (narrow ? 2 : 4); }

    // Token t from `from`, I values of `dtype`.
    void put(int64_t t, const void* from, int64_t dtype) {
        const int64_t I = layout.I;
        if (narrow) {
            uint16_t* to = reinterpret_cast<uint16_t*>(data + t * token_bytes());
            if (dtype == HALF) std::memcpy(to, from, 2 * I);
            else for (int64_t i = 0; i < I; i++) to[i] = narrowed(static_cast<const float*>(from)[i]);
            std::memset(to + I, 0, 2 * (stride() - I));
            isa.arrange16(layout.format, to, stride());
        } else {
            float* to = reinterpret_cast<float*>(data + t * token_bytes());
            if (dtype == FLOAT) std::memcpy(to, from, 4 * I);
            else for (int64_t i = 0; i < I; i++) to[i] = widened(static_cast<const uint16_t*>(from)[i]);
            std::memset(to + I, 0, 4 * (stride() - I));
        }
    }

    // The part of token t from `at` on, a multiple of STEP: n values, and zeros up to the next multiple.
    void put_part(int64_t t, int64_t at, const float* from, int64_t n) {
        const int64_t whole = padded(n);
        if (narrow) {
            uint16_t* to = reinterpret_cast<uint16_t*>(data + t * token_bytes()) + at;
            for (int64_t i = 0; i < n; i++) to[i] = narrowed(from[i]);
            std::memset(to + n, 0, 2 * (whole - n));
            isa.arrange16(layout.format, to, whole);
        } else {
            float* to = reinterpret_cast<float*>(data + t * token_bytes()) + at;
            std::memcpy(to, from, 4 * n), std::memset(to + n, 0, 4 * (whole - n));
        }
    }

    // y[t * y_stride + r] for `count` tokens from `first` on and all rows.
    void dots(const Matrix& matrix, int64_t row, int64_t rows, int64_t first, int64_t count, float* y, int64_t y_stride) const {
        const Rows block = {matrix, layout, row, rows};
        const uint8_t* x = data + first * token_bytes();
        if (narrow) isa.dots16[layout.format](block, reinterpret_cast<const uint16_t*>(x), count, y, y_stride);
        else isa.dots32[layout.format](block, reinterpret_cast<const float*>(x), count, y, y_stride);
    }
};

inline void write_out(const float* from, int64_t n, void* to, int64_t at, int64_t dtype) {
    if (dtype == FLOAT) std::memcpy(static_cast<float*>(to) + at, from, 4 * n);
    else for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[at + i] = narrowed(from[i]);
}

constexpr int64_t ROWS = 32;          // rows of a piece of work: small enough to share out evenly
constexpr int64_t TOKENS = 128;       // tokens of a piece of work: their activations stay in the second-level cache

}  // namespace soli
