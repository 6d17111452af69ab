// The AVX-512 kernels for bfloat16 tokens and weights in int8 or int4: vpdpbusd multiplies 64 bytes at a time.
#include "avx512_vnni.h"

namespace soli {
namespace {

// Where in a step of 128 transposed inputs unit u of group g is: first halves before second halves, as nibbles are.
template <int G>
SOLI_INLINE int unit_of_group(int g, int u) {
    if (G == 128) return u;
    return (u < G / 8 ? 0 : 16 - G / 8) + g * (G / 8) + u;
}

// Sixteen results of each of N tokens, along the rows.
template <int G, int N>
void multiply_transposed(const TransposedTile& tile, TransposedTile::Prefetcher prefetcher, const uint8_t* x,
                         __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t stride = tile.token_stride;
    const int64_t P = padded(tile.I);
    for (int n = 0; n < N; n++) sum[n] = _mm512_setzero_ps();
    const uint8_t* weights = tile.weights;
    const float* scales = tile.scales;
    for (int64_t k = 0; k < tile.I; k += 128, weights += 128 * TILE_ROWS, scales += 16 * GROUPS) {
        prefetcher.prefetch_step();
        for (int g = 0; g < GROUPS && k + g * G < tile.I; g++) {
            __m512i exact[N];
            for (int n = 0; n < N; n++)
                exact[n] = _mm512_set1_epi32(Int8Token(x + n * stride, P).corrections[k / 32 + g * (G / 32)]);
#pragma GCC unroll 8
            for (int u = 0; u < G / 4; u++) {
                const int unit = unit_of_group<G>(g, u);
                const __m512i w = _mm512_load_si512(weights + 64 * unit);
                for (int n = 0; n < N; n++) {
                    int32_t values;
                    __builtin_memcpy(&values, x + n * stride + k + 4 * unit, 4);
                    exact[n] = _mm512_dpbusd_epi32(exact[n], w, _mm512_set1_epi32(values));
                }
            }
            const __m512 weight_scale = _mm512_load_ps(scales + 16 * g);
            for (int n = 0; n < N; n++) {
                const float token_scale = Int8Token(x + n * stride, P).scales[k / 128];
                const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(token_scale));
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[n]), scale, sum[n]);
            }
        }
    }
}

// By number of tokens, from one.
using MultiplyTransposed = void (*)(const TransposedTile&, TransposedTile::Prefetcher, const uint8_t*, __m512*);
template <int G>
constexpr MultiplyTransposed MULTIPLY_TRANSPOSED[] = {multiply_transposed<G, 1>, multiply_transposed<G, 2>,
                                                      multiply_transposed<G, 3>, multiply_transposed<G, 4>,
                                                      multiply_transposed<G, 5>, multiply_transposed<G, 6>,
                                                      multiply_transposed<G, 7>, multiply_transposed<G, 8>};

struct TransposedVnni {
    static constexpr int64_t MIN_TOKENS = 12;
    static constexpr int64_t TOKEN_TILE = 8;
    static constexpr bool SIGNED = false;

    template <int G>
    static void multiply(const TransposedTile& tile, const uint8_t* x, int64_t tokens, __mmask16 row_mask, float* y,
                         int64_t y_stride) {
        const int64_t token_tiles = (tokens + TOKEN_TILE - 1) / TOKEN_TILE;
        for (int64_t i = 0, t = 0; i < token_tiles; i++) {
            const int64_t count = balanced_tile(tokens - t, TOKEN_TILE);
            __m512 sum[TOKEN_TILE];
            MULTIPLY_TRANSPOSED<G>[count - 1](tile, tile.prefetcher(i, token_tiles), x + t * tile.token_stride, sum);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(y + (t + n) * y_stride, row_mask, sum[n]);
            t += count;
        }
    }
};

}  // namespace

void matmul_int8_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_integer<INT8, TransposedVnni>(rows, x, tokens, y, y_stride);
}

void matmul_int4_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_integer<INT4, TransposedVnni>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
