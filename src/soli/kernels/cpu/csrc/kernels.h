// What the seams (linear.cpp, experts.cpp, latent_attention.cpp, forward.cpp) and the instruction sets (portable.cpp,
// avx2.cpp, avx512.cpp, amx_*.cpp) agree on.
//
// Every output is one dot product of one weight row with one token, and each kernel adds its terms up in an order that
// depends on the length of the row alone: never on how many tokens or rows are computed beside it. So results are
// batch-invariant: a token has the same bits alone and in any batch, and with any number of threads.
//
// Names: O output features (rows of a weight), I input features, T tokens; t a token, r a row, k an input, n a token of
// a tile, v a vector, g a quantization group.
#pragma once
#include <cstddef>
#include <cstdint>

// Everything here is inlined by force: a function that the linker shares between files could be the one compiled for an
// instruction set that this processor lacks.
#define SOLI_INLINE inline __attribute__((always_inline))

namespace soli {

// Of weights: the order of FORMATS in native.py. INT4_BF16 is int4 with scales in bfloat16 instead of float16, FP8_ROW
// has a scale for each row, FP4 one for 16 or 32 inputs.
enum Format { FP32, BF16, FP8, INT8, INT4, INT4_BF16, FP8_ROW, FP4, FORMATS };
enum Dtype { FLOAT32, BFLOAT16 };  // of activations: the order of DTYPES in native.py

SOLI_INLINE int64_t dtype_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// What a function of the library returns.
enum ErrorCode {
    NO_ERROR,
    BAD_EXPERT_ID,    // an expert id is not in 0 ... E - 1
    NO_MEMORY,        // for the scratch
    BAD_SLOT,         // a sequence has no slot, or one outside the KV blocks
    TOO_MANY_TOKENS,  // more than MAX_TOKENS in one forward
    BAD_TOKEN_ID,     // a token id is not in the vocabulary
    READ_FAILED,      // an expert's weights could not be read
    CANNOT_CONTINUE,  // another forward ran on this thread since the one that is to continue
};

// The addresses of one matrix; `scale` is null for FP32 and BF16.
struct Matrix {
    const void* weight;
    const void* scale;
};

// Activations are padded with zeros to whole steps of the widest kernel, so only rows of weights end inside a step.
constexpr int64_t STEP = 128;
SOLI_INLINE int64_t padded(int64_t I) { return (I + STEP - 1) / STEP * STEP; }

// What all matrices of a stack have in common.
struct Layout {
    int64_t format, O, I, group;

    SOLI_INLINE int64_t row_bytes() const {
        const int64_t sizes[FORMATS] = {4 * I, 2 * I, I, I, I / 2, I / 2, I, I / 2};
        return sizes[format];
    }
    SOLI_INLINE int64_t scale_bytes() const {  // of one row, or of FP8 of 128 rows
        if (format == FP8) return 4 * ((I + 127) / 128);
        if (format == FP8_ROW) return 4;
        if (format == FP4) return 4 * (I / group);
        return is_integer() ? 2 * (I / group) : 0;
    }
    SOLI_INLINE bool is_int4() const { return format == INT4 || format == INT4_BF16; }
    SOLI_INLINE bool is_integer() const { return format == INT8 || is_int4(); }
    SOLI_INLINE bool has_bf16_scales() const { return format == INT4_BF16; }
    // Of one token for matmul_bf16: bfloat16 numbers; beside integer weights an Int8Token (int8_tokens.h).
    SOLI_INLINE int64_t bf16_token_bytes() const {
        const int64_t P = padded(I);
        return is_integer() ? (P + P / 8 + P / 32 + 63) / 64 * 64 : 2 * P;
    }
};

// Rows first ... first + count - 1 of a matrix.
struct RowBlock {
    Matrix matrix;
    Layout layout;
    int64_t first, count;

    SOLI_INLINE const uint8_t* weight(int64_t row) const {
        return static_cast<const uint8_t*>(matrix.weight) + (first + row) * layout.row_bytes();
    }
    SOLI_INLINE const uint8_t* scale(int64_t row) const {
        const int64_t scale_row = layout.format == FP8 ? (first + row) / 128 : first + row;
        return static_cast<const uint8_t*>(matrix.scale) + scale_row * layout.scale_bytes();
    }
};

// Prefetch a line into the second-level cache: Zen 4 then reads up to three times as fast as when it has to make room
// in the first.
SOLI_INLINE void prefetch_l2(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

constexpr int64_t MIN_PREFETCH_DISTANCE = 8192;  // bytes; what is prefetched from nearer comes late

// y[t * y_stride + r] = rows[r] . x[t] for `tokens` tokens and all rows; a token has padded(I) floats, or
// bf16_token_bytes().
using MatmulF32 = void (*)(const RowBlock& rows, const float* x, int64_t tokens, float* y, int64_t y_stride);
using MatmulBf16 = void (*)(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);

// y[t * y_stride + i] += sum over r of p[t * p_stride + r] * rows[r][i] for the first `columns` numbers of each row,
// row after row; y has padded(columns) numbers per token.
using WeightedSum = void (*)(const RowBlock& rows, int64_t columns, const float* p, int64_t p_stride, int64_t tokens,
                             float* y, int64_t y_stride);

// Of a softmax over several blocks, what one block contributes: its largest value, and the sum of exp(value - max).
struct SoftmaxState {
    float max, sum;
};

// One instruction set. `matmul_bf16` is null where there is no bfloat16 product: bfloat16 tokens then become float32.
struct Kernels {
    const char* name;
    MatmulF32 matmul_f32[FORMATS];
    MatmulBf16 matmul_bf16[FORMATS];
    // STEP numbers of a bfloat16 token, from `at` on, as matmul_bf16 takes them.
    void (*pack_token)(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);
    void (*silu_mul)(const float* gate, const float* up, float* out, int64_t n);
    WeightedSum weighted_sum[FORMATS];
    // In place: exp(scale * value - max).
    SoftmaxState (*exp_scores)(float* values, int64_t n, float scale);
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

SOLI_INLINE float float_from_bf16(uint16_t bf16) { return as_float(static_cast<uint32_t>(bf16) << 16); }

// To nearest even; NaN stays NaN.
SOLI_INLINE uint16_t bf16_from_float(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(value == value ? rounded >> 16 : bits >> 16 | 0x40);
}

}  // namespace soli
