// The AMX kernels for bfloat16 tokens and weights in int8 or int4: few tokens as with AVX-512, many by tiles, with the same
// bits, since a group's sum is exact in both.
#include "amx.h"
#include "avx512_vnni.h"

namespace soli {
namespace {

constexpr int64_t BLOCK = 16;  // tokens of a tile
enum { SUM, TOKENS0, TOKENS1, BAND0, BAND1 };

// Results of sixteen rows for N tokens of a block.
template <int G, int N>
void block(const Turned& band, Turned::Ahead ahead, const uint8_t* x, __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t stride = band.stride, P = padded(band.I);
    const uint8_t* weights = band.weights;
    const float* scales = band.scales;
    for (int n = 0; n < N; n++) sum[n] = _mm512_setzero_ps();
    alignas(64) int32_t exact[2][BLOCK * BAND];  // in turns: the next sums may be written while the last are read
    for (int64_t k = 0, turn = 0; k < band.I; k += 128, weights += 128 * BAND, scales += 16 * GROUPS) {
        ahead.ask();
        for (int g = 0; g < GROUPS && k + g * G < band.I; g++, turn ^= 1) {
            const uint8_t *token = x + k + g * (G / 2), *unit = weights + 64 * g * (G / 8);
            tile_zero<SUM>();
            tile_load<TOKENS0>(token, stride), tile_load<BAND0>(unit, 64), tile_dot_int8<SUM, TOKENS0, BAND0>();
            tile_load<TOKENS1>(token + 64, stride), tile_load<BAND1>(unit + 1024, 64),
                tile_dot_int8<SUM, TOKENS1, BAND1>();
            tile_store<SUM>(exact[turn], 64);
            const __m512 scale = _mm512_load_ps(scales + 16 * g);
#pragma GCC unroll 16
            for (int n = 0; n < N; n++) {
                const __m512 each = _mm512_mul_ps(scale, _mm512_set1_ps(Token(x + n * stride, P).scales[k / 128]));
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(exact[turn] + BAND * n)), each, sum[n]);
            }
        }
    }
}

struct Many {
    static constexpr int64_t FROM = 5;  // tokens from which a band is turned
    static constexpr bool SIGNED = true;

    template <int G>
    static void multiply(const Turned& band, const uint8_t* x, int64_t tokens, __mmask16 there, float* y,
                         int64_t y_stride) {
        Tiles tiles;
        tiles.shape(SUM, 1, BLOCK, 4 * BAND), tiles.shape(TOKENS0, 2, BLOCK, G / 2),
            tiles.shape(BAND0, 2, G / 8, 4 * BAND);
        tiles.set();
        const int64_t pieces = (tokens + BLOCK - 1) / BLOCK;
        for (int64_t piece = 0, t = 0; t < tokens; piece++, t += BLOCK) {
            const int64_t count = tokens - t < BLOCK ? tokens - t : BLOCK;
            __m512 sum[BLOCK];
            (count > 8   ? block<G, 16>
             : count > 4 ? block<G, 8>
                         : block<G, 4>)(band, band.ahead(piece, pieces), x + t * band.stride, sum);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(y + (t + n) * y_stride, there, sum[n]);
        }
    }
};

}  // namespace

void dots16_int8_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16_whole<INT8, Many>(rows, x, tokens, y, y_stride);
}

void dots16_int4_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16_whole<INT4, Many>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
