// The AVX-512 kernels for bfloat16 tokens and weights in int8 or int4: vpdpbusd multiplies 64 bytes at once.
#include "avx512_vnni.h"

namespace soli {
namespace {

// Sixteen results of each of N tokens, along the rows.
template <int G, int N>
void some(const Turned& band, Turned::Ahead ahead, const uint8_t* x, __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t stride = band.stride, P = padded(band.I);
    for (int n = 0; n < N; n++) sum[n] = _mm512_setzero_ps();
    const uint8_t* weights = band.weights;
    const float* scales = band.scales;
    for (int64_t k = 0; k < band.I; k += 128, weights += 128 * BAND, scales += 16 * GROUPS) {
        ahead.ask();
        for (int g = 0; g < GROUPS && k + g * G < band.I; g++) {
            __m512i exact[N];
            for (int n = 0; n < N; n++)
                exact[n] = _mm512_set1_epi32(Token(x + n * stride, P).starts[k / 32 + g * (G / 32)]);
#pragma GCC unroll 8
            for (int u = 0; u < G / 4; u++) {
                const int unit = G == 128 ? u : (u < G / 8 ? 0 : 16 - G / 8) + g * (G / 8) + u;
                const __m512i w = _mm512_load_si512(weights + 64 * unit);
                for (int n = 0; n < N; n++) {
                    int32_t codes;
                    __builtin_memcpy(&codes, x + n * stride + k + 4 * unit, 4);
                    exact[n] = _mm512_dpbusd_epi32(exact[n], w, _mm512_set1_epi32(codes));
                }
            }
            const __m512 scale = _mm512_load_ps(scales + 16 * g);
            for (int n = 0; n < N; n++) {
                const __m512 each = _mm512_mul_ps(scale, _mm512_set1_ps(Token(x + n * stride, P).scales[k / 128]));
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[n]), each, sum[n]);
            }
        }
    }
}

using Some = void (*)(const Turned&, Turned::Ahead, const uint8_t*, __m512*);
template <int G>
constexpr Some SOME[] = {some<G, 1>, some<G, 2>, some<G, 3>, some<G, 4>,
                         some<G, 5>, some<G, 6>, some<G, 7>, some<G, 8>};

struct Many {
    static constexpr int64_t FROM = 12, MOST = 8;  // tokens from which a band is turned; tokens at a time
    static constexpr bool SIGNED = false;

    template <int G>
    static void multiply(const Turned& band, const uint8_t* x, int64_t tokens, __mmask16 there, float* y,
                         int64_t y_stride) {
        const int64_t pieces = (tokens + MOST - 1) / MOST;
        for (int64_t piece = 0, t = 0; piece < pieces; piece++) {
            const int64_t count = portion(tokens - t, MOST);
            __m512 sum[MOST];
            SOME<G>[count - 1](band, band.ahead(piece, pieces), x + t * band.stride, sum);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(y + (t + n) * y_stride, there, sum[n]);
            t += count;
        }
    }
};

}  // namespace

void dots16_int8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16_whole<INT8, Many>(rows, x, tokens, y, y_stride);
}

void dots16_int4(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16_whole<INT4, Many>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
