// What the seams share: activations in the form that a kernel reads, results in their dtype, and how work is divided.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace soli {

constexpr int64_t READ_PAST_TOKENS = 15;  // after the last token, which a kernel may read: it takes up to 16 at a time

// Tokens in the form that a kernel reads: float32, or what matmul_bf16 takes.
struct Activations {
    const Kernels& isa;
    Layout layout;  // of the weight that they are multiplied with
    bool is_bf16;   // for matmul_bf16
    uint8_t* data;

    Activations(const Kernels& isa, const Layout& layout, int64_t dtype)
        : isa(isa),
          layout(layout),
          is_bf16(dtype == BFLOAT16 && isa.matmul_bf16[layout.format]),
          data(nullptr) {}

    int64_t token_bytes() const { return is_bf16 ? layout.bf16_token_bytes() : 4 * padded(layout.I); }
    // Of `count` tokens and those that are read past them, whose results are not used.
    int64_t bytes(int64_t count) const { return token_bytes() * (count + READ_PAST_TOKENS); }

    // Packs token t from `from`, I values of `dtype`.
    void pack(int64_t t, const void* from, int64_t dtype) {
        if (dtype == FLOAT32) pack_part(t, 0, static_cast<const float*>(from), layout.I);
        else pack_part(t, 0, static_cast<const uint16_t*>(from), layout.I);
    }

    // Packs the part of token t from `at` on, a multiple of STEP: n values, and zeros up to the next multiple.
    template <class V>
    void pack_part(int64_t t, int64_t at, const V* from, int64_t n) {
        uint8_t* token = data + t * token_bytes();
        alignas(64) uint16_t step[STEP];
        for (int64_t k = 0; k < n; k += STEP) {
            const int64_t count = std::min(STEP, n - k);
            if (is_bf16) {
                convert(from + k, count, step);
                std::memset(step + count, 0, 2 * (STEP - count));
                isa.pack_token(layout, step, token, at + k);
            } else {
                float* to = reinterpret_cast<float*>(token) + at + k;
                convert(from + k, count, to);
                std::memset(to + count, 0, 4 * (STEP - count));
            }
        }
    }

    // y[t * y_stride + r] for `count` tokens from `first` on and `rows` rows of the matrix from `row` on.
    void multiply(const Matrix& matrix, int64_t row, int64_t rows, int64_t first, int64_t count, float* y,
                  int64_t y_stride) const {
        const RowBlock block = {matrix, layout, row, rows};
        const uint8_t* x = data + first * token_bytes();
        if (is_bf16) isa.matmul_bf16[layout.format](block, x, count, y, y_stride);
        else isa.matmul_f32[layout.format](block, reinterpret_cast<const float*>(x), count, y, y_stride);
    }

private:
    static void convert(const float* from, int64_t n, float* to) { std::memcpy(to, from, 4 * n); }
    static void convert(const uint16_t* from, int64_t n, uint16_t* to) { std::memcpy(to, from, 2 * n); }
    static void convert(const uint16_t* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; i++) to[i] = float_from_bf16(from[i]);
    }
    static void convert(const float* from, int64_t n, uint16_t* to) {
        for (int64_t i = 0; i < n; i++) to[i] = bf16_from_float(from[i]);
    }
};

// Stores n values at `to` + `at` in `dtype`.
inline void store_as(int64_t dtype, const float* from, int64_t n, void* to, int64_t at) {
    if (dtype == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + at, from, 4 * n);
    } else {
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[at + i] = bf16_from_float(from[i]);
    }
}

constexpr int64_t ROW_BLOCK = 32;     // rows of a work item: few enough for an even share
constexpr int64_t TOKEN_BLOCK = 128;  // tokens of a work item: their activations stay in the second-level cache
constexpr int64_t FEW_TOKENS = 8;     // with fewer, reading weights takes the time, and long runs of rows read faster

// The chunk of a dynamic OpenMP loop over work items, in `shares` shares. With few tokens a thread gets consecutive
// items: what it prefetched past the end of one is then seldom another thread's.
inline int64_t omp_chunk(int64_t items, int64_t tokens, int64_t shares) {
    return tokens < FEW_TOKENS ? std::max<int64_t>(1, items / shares) : 1;
}

// Rows of a matrix for one work item with so many tokens, for at least `shares` items.
inline int64_t rows_per_item(int64_t rows, int64_t tokens, int64_t shares) {
    if (tokens >= FEW_TOKENS) return ROW_BLOCK;
    return std::min((rows + ROW_BLOCK * shares - 1) / (ROW_BLOCK * shares), TOKEN_BLOCK / FEW_TOKENS) * ROW_BLOCK;
}

}  // namespace soli
