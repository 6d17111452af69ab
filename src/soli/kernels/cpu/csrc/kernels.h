// What the drivers (linear.cpp, experts.cpp) and the instruction sets (portable.cpp, avx2.cpp, avx512.cpp) agree on.
//
// Every output is one dot product of one weight row with one token, and each kernel adds its terms up in an order that
// depends on the length of the row alone: never on how many tokens or rows are computed beside it. So a token gets the
// same bits alone and in any company, and from any number of threads.
//
// Names: O output features (rows of a weight), I input features, T tokens.
#pragma once
#include <cstddef>
#include <cstdint>

// Everything here is inlined by force: a function that the linker shares between files could be the one compiled for an
// instruction set that this processor lacks.
#define SOLI_INLINE inline __attribute__((always_inline))

namespace soli {

enum Format { FP32, BF16, FP8, INT8, INT4, FORMATS };  // the order of FORMATS in native.py
enum Dtype { FLOAT, HALF };                            // activations: float32, bfloat16

// What a function of the library returns.
enum ErrorCode {
    NO_ERROR,
    BAD_EXPERT_ID,    // an expert id is not in 0 ... E - 1
    NO_MEMORY,        // for the scratch
    BAD_SLOT,         // a sequence has no slot, or one outside the KV blocks
    TOO_MANY_TOKENS,  // more than MAX_TOKENS in one forward
    BAD_TOKEN_ID,     // a token id is not in the vocabulary
};

// One matrix as it lies in memory; `scale` is null for FP32 and BF16.
struct Matrix {
    const void* weight;
    const void* scale;
};

// Activations are padded with zeros to whole steps of the widest kernel, so that only weights have ragged ends.
constexpr int64_t STEP = 128;
SOLI_INLINE int64_t padded(int64_t I) { return (I + STEP - 1) / STEP * STEP; }

// What all matrices of a stack share.
struct Layout {
    int64_t format, O, I, group;

    SOLI_INLINE int64_t row_bytes() const {
        const int64_t sizes[FORMATS] = {4 * I, 2 * I, I, I, I / 2};
        return sizes[format];
    }
    SOLI_INLINE int64_t scale_bytes() const {  // of one row (INT8, INT4) or of 128 rows (FP8)
        if (format == FP8) return 4 * ((I + 127) / 128);
        return whole() ? 2 * (I / group) : 0;
    }
    SOLI_INLINE bool whole() const { return format == INT8 || format == INT4; }  // weights are whole numbers
    // Of one token for dots16: bfloat16 numbers; beside whole weights codes, four sums of 32 codes and a scale per STEP.
    SOLI_INLINE int64_t token16_bytes() const {
        const int64_t P = padded(I);
        return whole() ? (P + P / 8 + P / 32 + 63) / 64 * 64 : 2 * P;
    }
};

// The rows first ... first + count of a matrix.
struct Rows {
    Matrix matrix;
    Layout layout;
    int64_t first, count;

    SOLI_INLINE const uint8_t* weight(int64_t row) const {
        return static_cast<const uint8_t*>(matrix.weight) + (first + row) * layout.row_bytes();
    }
    SOLI_INLINE const uint8_t* scale(int64_t row) const {
        const int64_t at = layout.format == FP8 ? (first + row) / 128 : first + row;
        return static_cast<const uint8_t*>(matrix.scale) + at * layout.scale_bytes();
    }
};

// Ask for a line that will be read soon. Into the second-level cache: Zen 4 then reads up to three times as fast as when it
// has to make room in the first.
SOLI_INLINE void ask(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

constexpr int64_t LEAST_AHEAD = 8192;  // bytes: what is asked for nearer than this comes late

// y[t * y_stride + r] = rows[r] . x[t], for `tokens` tokens and all rows; tokens are padded(I) floats or token16_bytes().
using Dots32 = void (*)(const Rows& rows, const float* x, int64_t tokens, float* y, int64_t y_stride);
using Dots16 = void (*)(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);

// y[t * y_stride + i] += sum over r of p[t * p_stride + r] * rows[r][i], for the first `columns` numbers of each row, row
// after row; y has padded(columns) numbers per token.
using Mix = void (*)(const Rows& rows, int64_t columns, const float* p, int64_t p_stride, int64_t tokens, float* y,
                     int64_t y_stride);

// What a softmax over several parts must know of one part: its largest value, and the sum of the exponentials above it.
struct Soft {
    float most, sum;
};

// One instruction set. `dots16` is null where there is no bfloat16 product: bfloat16 tokens are then widened.
struct Kernels {
    const char* name;
    Dots32 dots32[FORMATS];
    Dots16 dots16[FORMATS];
    // STEP numbers, from `at` on, of a token as dots16 wants it.
    void (*put16)(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);
    void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
    Mix mix[FORMATS];
    Soft (*soften)(float* values, int64_t n, float scale);  // in place: exp(scale * value - most)
};

extern const Kernels PORTABLE, AVX2, AVX512, AMX;
const Kernels& kernels(int64_t isa);

SOLI_INLINE float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

SOLI_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

SOLI_INLINE float widened(uint16_t bfloat16) { return as_float(static_cast<uint32_t>(bfloat16) << 16); }

// float32 to bfloat16, to nearest even; NaN stays NaN.
SOLI_INLINE uint16_t narrowed(float value) {
    const uint32_t bits = as_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(value == value ? rounded >> 16 : bits >> 16 | 0x40);
}

}  // namespace soli
