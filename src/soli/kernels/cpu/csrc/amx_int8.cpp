// The AMX kernels for bfloat16 tokens and weights in int8 or int4: few tokens as with AVX-512, many by tiles, with the
// same bits, since a group's sum is exact in both.
#include "amx.h"
#include "avx512_vnni.h"

namespace soli {
namespace {

constexpr int64_t TOKEN_TILE = 16;
enum { SUM, TOKENS0, TOKENS1, WEIGHTS0, WEIGHTS1 };  // tile registers; 0 and 1 as the two vectors of load_values

// Results of sixteen rows for N tokens of a tile.
template <int G, int N>
void multiply_token_tile(const TransposedTile& tile, TransposedTile::Prefetcher prefetcher, const uint8_t* x,
                         __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t stride = tile.token_stride;
    const int64_t P = padded(tile.I);
    const uint8_t* weights = tile.weights;
    const float* scales = tile.scales;
    for (int n = 0; n < N; n++) sum[n] = _mm512_setzero_ps();
    alignas(64) int32_t exact[2][TOKEN_TILE * TILE_ROWS];  // alternating: one is written while the other is read
    for (int64_t k = 0, buffer = 0; k < tile.I; k += 128, weights += 128 * TILE_ROWS, scales += 16 * GROUPS) {
        prefetcher.prefetch_step();
        for (int g = 0; g < GROUPS && k + g * G < tile.I; g++, buffer ^= 1) {
            const uint8_t* token = x + k + g * (G / 2);
            const uint8_t* unit = weights + 64 * g * (G / 8);
            tile_zero<SUM>();
            tile_load<TOKENS0>(token, stride);
            tile_load<WEIGHTS0>(unit, 64);
            tile_multiply_int8<SUM, TOKENS0, WEIGHTS0>();
            tile_load<TOKENS1>(token + 64, stride);
            tile_load<WEIGHTS1>(unit + 1024, 64);
            tile_multiply_int8<SUM, TOKENS1, WEIGHTS1>();
            tile_store<SUM>(exact[buffer], 64);
            const __m512 weight_scale = _mm512_load_ps(scales + 16 * g);
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                const float token_scale = Int8Token(x + n * stride, P).scales[k / 128];
                const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(token_scale));
                const __m512i group_sum = _mm512_load_si512(exact[buffer] + TILE_ROWS * n);
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(group_sum), scale, sum[n]);
            }
        }
    }
}

struct TransposedAmx {
    static constexpr int64_t MIN_TOKENS = 5;
    static constexpr bool SIGNED = true;

    template <int G>
    static void multiply(const TransposedTile& tile, const uint8_t* x, int64_t tokens, __mmask16 row_mask, float* y,
                         int64_t y_stride) {
        TileConfig config;
        config.set_shape(SUM, 1, TOKEN_TILE, 4 * TILE_ROWS);
        config.set_shape(TOKENS0, 2, TOKEN_TILE, G / 2);
        config.set_shape(WEIGHTS0, 2, G / 8, 4 * TILE_ROWS);
        config.load();
        const int64_t token_tiles = (tokens + TOKEN_TILE - 1) / TOKEN_TILE;
        for (int64_t i = 0, t = 0; t < tokens; i++, t += TOKEN_TILE) {
            const int64_t count = tokens - t < TOKEN_TILE ? tokens - t : TOKEN_TILE;
            const auto multiply_tile = count > 8   ? multiply_token_tile<G, 16>
                                       : count > 4 ? multiply_token_tile<G, 8>
                                                   : multiply_token_tile<G, 4>;
            __m512 sum[TOKEN_TILE];
            multiply_tile(tile, tile.prefetcher(i, token_tiles), x + t * tile.token_stride, sum);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(y + (t + n) * y_stride, row_mask, sum[n]);
        }
    }
};

}  // namespace

void matmul_int8_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_integer<INT8, TransposedAmx>(rows, x, tokens, y, y_stride);
}

void matmul_int4_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_integer<INT4, TransposedAmx>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
