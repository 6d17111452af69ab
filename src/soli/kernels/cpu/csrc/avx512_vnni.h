// int8 and int4 weights beside tokens of 8 bits (int8_tokens.h), for the two files that multiply them: avx512_vnni.cpp
// and amx_int8.cpp.
//
// Values are multiplied in units of four, one lane of 32 bits each. int4's nibbles (diagram: int8_tokens.h), and int8
// in groups below 128, give two vectors whose lanes belong to these of 128 inputs:
//     lanes        0-3      4-7     8-11    12-15
//     vector 0    0-15    32-47    64-79   96-111    first halves of the runs of 32
//     vector 1   16-31    48-63    80-95  112-127    second halves
// so a group of 32 is the same four lanes of both. int8 in groups of 128 stays in its order: 0-63, then 64-127.
//
// Names: G quantization group, n a token of N, r a row of the tile, g a group.
#pragma once
#include "avx512_row_tile.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int STREAMED_ROWS = 8;  // that few tokens read side by side: more streams are slower
constexpr int64_t FEW_TILE = 3;   // tokens at a time along the inputs

// 128 weights from k on, of which `remaining` exist, as two vectors of bytes: signed, or counted from the lowest value.
template <int64_t FORMAT, int G, bool FULL, bool SIGNED = false>
SOLI_INLINE void load_values(const uint8_t* row, int64_t k, int64_t remaining, __m512i* out) {
    if (FORMAT == INT4) {
        const __m512i nibbles = load_bytes<FULL>(row + k / 2, remaining / 2);
        const __m512i mask = _mm512_set1_epi8(15);
        out[0] = _mm512_and_si512(nibbles, mask);
        out[1] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
        for (int v = 0; SIGNED && v < 2; v++) out[v] = _mm512_sub_epi8(out[v], _mm512_set1_epi8(8));
    } else {
        for (int v = 0; v < 2; v++) {
            const __m512i bytes = load_bytes<FULL>(row + k + 64 * v, remaining - 64 * v);
            out[v] = _mm512_xor_si512(bytes, _mm512_set1_epi8(SIGNED ? 0 : -128));
        }
        if (G < 128) order_as_nibbles(out);
    }
}

// Transposes eight rows of 16-bit numbers in place: in its 128 bits i, a[c] becomes column 8 i + c of all rows.
SOLI_INLINE void transpose_16_bits(__m512i* a) {
    for (int level = 0; level < 3; level++) {
        __m512i b[8];
        for (int r = 0; r < 4; r++) {
            b[2 * r] = _mm512_unpacklo_epi16(a[r], a[r + 4]);
            b[2 * r + 1] = _mm512_unpackhi_epi16(a[r], a[r + 4]);
        }
        for (int r = 0; r < 8; r++) a[r] = b[r];
    }
}

// Floats of a tile's transposed scales: of whole eights of groups.
SOLI_INLINE int64_t scale_floats(int64_t groups) { return 16 * ((groups + 7) / 8 * 8); }

template <bool BF16_SCALES>
SOLI_INLINE __m512 floats_of_scales(__m256i bits) {
    return BF16_SCALES ? floats_from_bf16(bits) : _mm512_cvtph_ps(bits);
}

template <bool BF16_SCALES>
void transpose_scales_as(const RowTile& tile, int64_t groups, float* to) {
    for (int64_t line = 0; line < 2 * groups * TILE_ROWS; line += 64)
        prefetch_l2(tile.scale[0] + 2 * groups * TILE_ROWS + line);
    const __m512i pairs[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                              _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    for (int64_t g = 0; g < groups; g += 32, to += 32 * TILE_ROWS) {
        const int64_t count = groups - g;
        const __mmask32 mask = count < 32 ? (1u << count) - 1 : ~0u;
        __m512i a[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; r++) a[r] = _mm512_maskz_loadu_epi16(mask, tile.scale[r] + 2 * g);
        transpose_16_bits(a);
        transpose_16_bits(a + 8);
        for (int i = 0; i < 2 && 16 * i < count; i++)
            for (int c = 0; c < 8; c++) {
                // Columns 16 i + c and 8 further, of sixteen rows each.
                const __m512i columns = _mm512_permutex2var_epi64(a[c], pairs[i], a[8 + c]);
                float* at = to + TILE_ROWS * (16 * i + c);
                _mm512_store_ps(at, floats_of_scales<BF16_SCALES>(_mm512_castsi512_si256(columns)));
                if (16 * i + 8 < count)
                    _mm512_store_ps(at + TILE_ROWS * 8,
                                    floats_of_scales<BF16_SCALES>(_mm512_extracti64x4_epi64(columns, 1)));
            }
    }
}

// The scales of a tile, group after group: to[16 * g + r]. Prefetches the next tile's.
void transpose_scales(const RowTile& tile, int64_t groups, float* to) {
    // A template for each dtype: a branch on the tile's flag would be taken anew at every store of this inner loop.
    (tile.has_bf16_scales ? transpose_scales_as<true> : transpose_scales_as<false>)(tile, groups, to);
}

// Few tokens: along the inputs.

// Sums of neighbouring lanes of two vectors, interleaved.
SOLI_INLINE __m512i add_lanes_of_2(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

// In each 128 bits, the sums of the four lanes of a, b, c and d.
SOLI_INLINE __m512i add_lanes_of_4(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = add_lanes_of_2(a, b);
    const __m512i cd = add_lanes_of_2(c, d);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// From sums with four rows to a vector, eight rows in `upper` and eight in `lower`, to one vector of sixteen rows for
// each group.
template <int G>
SOLI_INLINE void sums_by_group(const __m512i* upper, const __m512i* lower, __m512i* out) {
    constexpr int FIRST = G == 64 ? 0x88 : 0x44;
    constexpr int SECOND = G == 64 ? 0xdd : 0xee;
    const __m512i a = _mm512_shuffle_i32x4(upper[0], upper[1], FIRST);
    const __m512i b = _mm512_shuffle_i32x4(upper[0], upper[1], SECOND);
    const __m512i c = _mm512_shuffle_i32x4(lower[0], lower[1], FIRST);
    const __m512i d = _mm512_shuffle_i32x4(lower[0], lower[1], SECOND);
    if (G == 32) {
        out[0] = _mm512_shuffle_i32x4(a, c, 0x88);
        out[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
        out[2] = _mm512_shuffle_i32x4(b, d, 0x88);
        out[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
        return;
    }
    const __m512i ab = _mm512_add_epi32(a, b);
    const __m512i cd = _mm512_add_epi32(c, d);
    out[0] = _mm512_shuffle_i32x4(ab, cd, 0x88);
    out[1] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    if (G == 128) out[0] = _mm512_add_epi32(out[0], out[1]);
}

// The exact sums of N tokens' products with 128 weights of eight rows: to[2 * n] and to[2 * n + 1] hold four rows each,
// side by side in each 128 bits. Prefetches at `distance`.
template <int64_t FORMAT, int G, int N, bool FULL>
SOLI_INLINE void multiply(const uint8_t* const* rows, int64_t k, int64_t remaining, int64_t distance, const uint8_t* x,
                          int64_t stride, __m512i* to) {
    constexpr int LINES = FORMAT == INT4 ? 1 : 2;
    __m512i part[N][STREAMED_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < STREAMED_ROWS; r++) {
        __m512i w[2];
        load_values<FORMAT, G, FULL>(rows[r], k, remaining, w);
        for (int n = 0; n < N; n++) {
            const uint8_t* token = x + n * stride + k;
            part[n][r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[0], _mm512_load_si512(token));
            part[n][r] = _mm512_dpbusd_epi32(part[n][r], w[1], _mm512_load_si512(token + 64));
        }
        const uint8_t* line = rows[r] + (FORMAT == INT4 ? k / 2 : k) + distance;
        for (int i = 0; i < LINES; i++) prefetch_l2(line + 64 * i);
    }
    for (int n = 0; n < N; n++) {
        const __m512i* p = part[n];
        to[2 * n] = add_lanes_of_4(p[0], p[1], p[2], p[3]);
        to[2 * n + 1] = add_lanes_of_4(p[4], p[5], p[6], p[7]);
    }
}

// Sixteen results of each of N tokens. `quads`: memory for the sums of multiply().
template <int64_t FORMAT, int G, int N>
void multiply_few_tokens(const RowTile& tile, const float* scales, const uint8_t* x, int64_t stride, int64_t row_bytes,
                         __m512i* quads, __m512* sum) {
    constexpr int GROUPS = 128 / G;
    const int64_t P = padded(tile.I);
    const int64_t full_steps_end = tile.I / 128 * 128;
    const int64_t next = STREAMED_ROWS * row_bytes;
    const int64_t distance = next < MIN_PREFETCH_DISTANCE ? MIN_PREFETCH_DISTANCE : next;
    for (int half = 0; half < TILE_ROWS / STREAMED_ROWS; half++) {
        const uint8_t* const* rows = tile.weight + half * STREAMED_ROWS;
        __m512i* to = quads + half * N * P / 64;
        for (int64_t k = 0; k < full_steps_end; k += 128, to += 2 * N)
            multiply<FORMAT, G, N, true>(rows, k, 128, distance, x, stride, to);
        if (full_steps_end < tile.I)
            multiply<FORMAT, G, N, false>(rows, full_steps_end, tile.I - full_steps_end, distance, x, stride, to);
    }
    for (int n = 0; n < N; n++) {
        const Int8Token token(x + n * stride, P);
        sum[n] = _mm512_setzero_ps();
        for (int64_t k = 0; k < tile.I; k += 128) {
            __m512i total[4];
            const __m512i* upper = quads + k / 64 * N + 2 * n;
            const __m512i* lower = upper + N * P / 64;
            sums_by_group<G>(upper, lower, total);
            const __m512 token_scale = _mm512_set1_ps(token.scales[k / 128]);
            for (int g = 0; g < GROUPS && k + g * G < tile.I; g++) {
                const __m512i correction = _mm512_set1_epi32(token.corrections[k / 32 + g * (G / 32)]);
                const __m512i exact = _mm512_add_epi32(total[g], correction);
                const __m512 scale = _mm512_mul_ps(_mm512_load_ps(scales + 16 * (k / G + g)), token_scale);
                sum[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, sum[n]);
            }
        }
    }
}

// Many tokens: along the rows of a transposed tile.

// A tile for many tokens, units of four values of sixteen rows side by side: to[64 * unit + 4 * row].
template <int64_t FORMAT, int G, bool SIGNED>
void transpose_tile(const RowTile& tile, uint8_t* to) {
    for (int64_t k = 0; k < tile.I; k += 128) {
        __m512i w[2][TILE_ROWS];
        __m512i row[2];
        for (int r = 0; r < TILE_ROWS; r++) {
            load_values<FORMAT, G, false, SIGNED>(tile.weight[r], k, tile.I - k, row);
            w[0][r] = row[0];
            w[1][r] = row[1];
        }
        for (int v = 0; v < 2; v++, to += 1024) transpose(w[v], to);
    }
}

// By number of tokens, from one.
using MultiplyFew = void (*)(const RowTile&, const float*, const uint8_t*, int64_t, int64_t, __m512i*, __m512*);
template <int64_t FORMAT, int G>
constexpr MultiplyFew MULTIPLY_FEW[] = {multiply_few_tokens<FORMAT, G, 1>, multiply_few_tokens<FORMAT, G, 2>,
                                        multiply_few_tokens<FORMAT, G, 3>};

// Few tokens are multiplied along the inputs; from Transposed::MIN_TOKENS on a tile is transposed once, and
// Transposed::multiply runs along the rows.
template <int64_t FORMAT, int G, class Transposed>
void matmul_group(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    const int64_t P = padded(layout.I);
    const int64_t groups = layout.I / G;
    const int64_t stride = layout.bf16_token_bytes();
    const int64_t bytes = layout.row_bytes() * TILE_ROWS;
    if (!scratch.reserve(64 * (groups + 7) + TILE_ROWS * P)) __builtin_trap();
    float* scales = scratch.take<float>(scale_floats(groups));
    uint8_t* transposed = scratch.take<uint8_t>(TILE_ROWS * P);  // or quads, which take up to seven eighths of it
    for (int64_t r = 0; r < rows.count; r += TILE_ROWS) {
        const RowTile tile(rows, r);
        transpose_scales(tile, groups, scales);
        if (tokens >= Transposed::MIN_TOKENS) {
            transpose_tile<FORMAT, G, Transposed::SIGNED>(tile, transposed);
            const TransposedTile columns = {transposed, scales, layout.I, stride, tile.weight[0] + bytes, bytes};
            Transposed::template multiply<G>(columns, x, tokens, tile.row_mask(), y + r, y_stride);
            continue;
        }
        __m512i* quads = reinterpret_cast<__m512i*>(transposed);
        for (int64_t t = 0; t < tokens;) {
            const int64_t count = balanced_tile(tokens - t, FEW_TILE);
            __m512 sum[FEW_TILE];
            MULTIPLY_FEW<FORMAT, G>[count - 1](tile, scales, x + t * stride, stride, layout.row_bytes(), quads, sum);
            for (int64_t n = 0; n < count; n++)
                _mm512_mask_storeu_ps(y + (t + n) * y_stride + r, tile.row_mask(), sum[n]);
            t += count;
        }
    }
}

template <int64_t FORMAT, class Transposed>
void matmul_integer(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    switch (rows.layout.group) {
        case 32:
            return matmul_group<FORMAT, 32, Transposed>(rows, x, tokens, y, y_stride);
        case 64:
            return matmul_group<FORMAT, 64, Transposed>(rows, x, tokens, y, y_stride);
        default:
            return matmul_group<FORMAT, 128, Transposed>(rows, x, tokens, y, y_stride);
    }
}

}  // namespace
}  // namespace soli
