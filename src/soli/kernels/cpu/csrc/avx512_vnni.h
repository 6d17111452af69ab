// Weights in int8 and int4 beside tokens of 8 bits (bytes.h), for the two files that multiply them: avx512_vnni.cpp and
// amx_vnni.cpp.
//
// Codes lie in units of four. int4's runs of 32 give one vector of first halves and one of second ones, and int8 in groups
// below 128 is put into the same order: lanes 4 i ... 4 i + 3 of both vectors belong to the numbers 32 i ... 32 i + 31.
#pragma once
#include "avx512_band.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int EIGHT = 8;  // rows that a few tokens read at once: more streams are slower

// 128 weights from k on of which `left` exist, as two vectors of bytes: with their sign, or counted from the lowest code.
template <int64_t FORMAT, int G, bool FULL, bool SIGNED = false>
SOLI_INLINE void codes(const uint8_t* row, int64_t k, int64_t left, __m512i* out) {
    if (FORMAT == INT4) {
        const __m512i packed = bytes<FULL>(row + k / 2, left / 2), mask = _mm512_set1_epi8(15);
        out[0] = _mm512_and_si512(packed, mask), out[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
        for (int v = 0; SIGNED && v < 2; v++) out[v] = _mm512_sub_epi8(out[v], _mm512_set1_epi8(8));
    } else {
        for (int v = 0; v < 2; v++)
            out[v] =
                _mm512_xor_si512(bytes<FULL>(row + k + 64 * v, left - 64 * v), _mm512_set1_epi8(SIGNED ? 0 : -128));
        if (G < 128) halves(out);
    }
}

// Eight rows of float16 numbers to columns: in its 128 bits i, a[c] becomes column 8 i + c of all rows.
SOLI_INLINE void columns(__m512i* a) {
    for (int level = 0; level < 3; level++) {
        __m512i b[8];
        for (int r = 0; r < 4; r++)
            b[2 * r] = _mm512_unpacklo_epi16(a[r], a[r + 4]), b[2 * r + 1] = _mm512_unpackhi_epi16(a[r], a[r + 4]);
        for (int r = 0; r < 8; r++) a[r] = b[r];
    }
}

// The scales of a band, group after group: to[16 * g + r], up to a whole eight of groups. The next band's are asked for.
void transpose_scales(const Band& band, int64_t groups, float* to) {
    for (int64_t line = 0; line < 2 * groups * BAND; line += 64) ask(band.scale[0] + 2 * groups * BAND + line);
    const __m512i pairs[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                              _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    for (int64_t g = 0; g < groups; g += 32, to += 32 * BAND) {
        const int64_t count = groups - g;
        const __mmask32 there = count < 32 ? (1u << count) - 1 : ~0u;
        __m512i a[BAND];
        for (int r = 0; r < BAND; r++) a[r] = _mm512_maskz_loadu_epi16(there, band.scale[r] + 2 * g);
        columns(a), columns(a + 8);
        for (int i = 0; i < 2 && 16 * i < count; i++)
            for (int c = 0; c < 8; c++) {
                const __m512i two =
                    _mm512_permutex2var_epi64(a[c], pairs[i], a[8 + c]);  // columns 16 i + c and 8 further
                float* at = to + BAND * (16 * i + c);
                _mm512_store_ps(at, _mm512_cvtph_ps(_mm512_castsi512_si256(two)));
                if (16 * i + 8 < count)
                    _mm512_store_ps(at + BAND * 8, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(two, 1)));
            }
    }
}

// Sums of neighbouring lanes of two vectors, and of four: each 128 bits hold one sum of every one of the four.
SOLI_INLINE __m512i two(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

SOLI_INLINE __m512i four(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = two(a, b), cd = two(c, d);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// From sums with four rows to a vector, eight rows in `upper` and eight in `lower`, to one vector of sixteen for each group.
template <int G>
SOLI_INLINE void by_group(const __m512i* upper, const __m512i* lower, __m512i* out) {
    constexpr int FIRST = G == 64 ? 0x88 : 0x44, SECOND = G == 64 ? 0xdd : 0xee;
    const __m512i a = _mm512_shuffle_i32x4(upper[0], upper[1], FIRST),
                  b = _mm512_shuffle_i32x4(upper[0], upper[1], SECOND);
    const __m512i c = _mm512_shuffle_i32x4(lower[0], lower[1], FIRST),
                  d = _mm512_shuffle_i32x4(lower[0], lower[1], SECOND);
    if (G == 32) {
        out[0] = _mm512_shuffle_i32x4(a, c, 0x88), out[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
        out[2] = _mm512_shuffle_i32x4(b, d, 0x88), out[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
        return;
    }
    const __m512i ab = _mm512_add_epi32(a, b), cd = _mm512_add_epi32(c, d);
    out[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), out[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    if (G == 128) out[0] = _mm512_add_epi32(out[0], out[1]);
}

// The exact sums of N tokens' products, along the inputs, with eight rows of 128 weights: to[2 * n] and to[2 * n + 1] hold
// four rows each, side by side in each 128 bits. Lines `ahead` are asked for.
template <int64_t FORMAT, int G, int N, bool FULL>
SOLI_INLINE void multiply(const uint8_t* const* rows, int64_t k, int64_t left, int64_t ahead, const uint8_t* x,
                          int64_t stride, __m512i* to) {
    constexpr int LINES = FORMAT == INT4 ? 1 : 2;
    __m512i part[N][EIGHT];
#pragma GCC unroll 8
    for (int r = 0; r < EIGHT; r++) {
        __m512i w[2];
        codes<FORMAT, G, FULL>(rows[r], k, left, w);
        for (int n = 0; n < N; n++) {
            part[n][r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[0], _mm512_load_si512(x + n * stride + k));
            part[n][r] = _mm512_dpbusd_epi32(part[n][r], w[1], _mm512_load_si512(x + n * stride + k + 64));
        }
        const uint8_t* line = rows[r] + (FORMAT == INT4 ? k / 2 : k) + ahead;
        for (int i = 0; i < LINES; i++) ask(line + 64 * i);
    }
    for (int n = 0; n < N; n++) {
        const __m512i* p = part[n];
        to[2 * n] = four(p[0], p[1], p[2], p[3]), to[2 * n + 1] = four(p[4], p[5], p[6], p[7]);
    }
}

// Sixteen results of each of N tokens, along the inputs.
template <int64_t FORMAT, int G, int N>
void few(const Band& band, const float* scales, const uint8_t* x, int64_t stride, int64_t row_bytes, __m512i* quads,
         __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t P = padded(band.I), whole = band.I / 128 * 128, next = EIGHT * row_bytes;
    const int64_t ahead = next < LEAST_AHEAD ? LEAST_AHEAD : next;
    for (int half = 0; half < BAND / EIGHT; half++) {
        const uint8_t* const* rows = band.weight + half * EIGHT;
        __m512i* to = quads + half * N * P / 64;
        for (int64_t k = 0; k < whole; k += 128, to += 2 * N)
            multiply<FORMAT, G, N, true>(rows, k, 128, ahead, x, stride, to);
        if (whole < band.I) multiply<FORMAT, G, N, false>(rows, whole, band.I - whole, ahead, x, stride, to);
    }
    for (int n = 0; n < N; n++) {
        const Token token(x + n * stride, P);
        sum[n] = _mm512_setzero_ps();
        for (int64_t k = 0; k < band.I; k += 128) {
            __m512i total[4];
            const __m512i *upper = quads + k / 64 * N + 2 * n, *lower = upper + N * P / 64;
            by_group<G>(upper, lower, total);
            const __m512 of_token = _mm512_set1_ps(token.scales[k / 128]);
            for (int g = 0; g < GROUPS && k + g * G < band.I; g++) {
                const __m512i exact =
                    _mm512_add_epi32(total[g], _mm512_set1_epi32(token.starts[k / 32 + g * (G / 32)]));
                const __m512 each = _mm512_mul_ps(_mm512_load_ps(scales + 16 * (k / G + g)), of_token);
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), each, sum[n]);
            }
        }
    }
}

// A band for many tokens, units of four codes of sixteen rows side by side: to[64 * unit + 4 * row].
template <int64_t FORMAT, int G, bool SIGNED>
void turn_band(const Band& band, uint8_t* to) {
    for (int64_t k = 0; k < band.I; k += 128) {
        __m512i w[2][BAND], row[2];
        for (int r = 0; r < BAND; r++) {
            codes<FORMAT, G, false, SIGNED>(band.weight[r], k, band.I - k, row);
            w[0][r] = row[0], w[1][r] = row[1];
        }
        for (int v = 0; v < 2; v++, to += 1024) turn(w[v], to);
    }
}

using Few = void (*)(const Band&, const float*, const uint8_t*, int64_t, int64_t, __m512i*, __m512*);
template <int64_t FORMAT, int G>
constexpr Few FEW[] = {few<FORMAT, G, 1>, few<FORMAT, G, 2>, few<FORMAT, G, 3>};
constexpr int64_t MOST_FEW = 3;

// Few tokens along the inputs; from Many::FROM on a band is turned once, and Many multiplies it along the rows.
template <int64_t FORMAT, int G, class Many>
void run(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    const int64_t P = padded(layout.I), groups = layout.I / G, stride = layout.token16_bytes(),
                  bytes = layout.row_bytes() * BAND;
    if (!scratch.reserve(64 * (groups + 7) + BAND * P)) __builtin_trap();
    float* scales = scratch.take<float>(16 * ((groups + 7) / 8 * 8));
    uint8_t* turned = scratch.take<uint8_t>(BAND * P);  // or up to seven eighths of it, sums
    for (int64_t r = 0; r < rows.count; r += BAND) {
        const Band band(rows, r);
        transpose_scales(band, groups, scales);
        if (tokens >= Many::FROM) {
            turn_band<FORMAT, G, Many::SIGNED>(band, turned);
            const Turned all = {turned, scales, layout.I, stride, band.weight[0] + bytes, bytes};
            Many::template multiply<G>(all, x, tokens, band.there(), y + r, y_stride);
            continue;
        }
        for (int64_t t = 0; t < tokens;) {
            const int64_t count = portion(tokens - t, MOST_FEW);
            __m512 sum[MOST_FEW];
            FEW<FORMAT, G>[count - 1](band, scales, x + t * stride, stride, layout.row_bytes(),
                                      reinterpret_cast<__m512i*>(turned), sum);
            for (int64_t n = 0; n < count; n++) _mm512_mask_storeu_ps(y + (t + n) * y_stride + r, band.there(), sum[n]);
            t += count;
        }
    }
}

template <int64_t FORMAT, class Many>
void dots16_whole(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    const int64_t G = rows.layout.group;
    (G == 32   ? run<FORMAT, 32, Many>
     : G == 64 ? run<FORMAT, 64, Many>
               : run<FORMAT, 128, Many>)(rows, x, tokens, y, y_stride);
}

}  // namespace
}  // namespace soli
