// The AVX2 kernels for bfloat16 tokens and weights in int8 or int4: vpmaddubsw multiplies 32 bytes at a time.
//
// It adds two products of an unsigned and a signed byte into 16 bits. Those hold eight such sums of nibbles (16 * 15 *
// 127 = 30,480), and of bytes not even one. So many tokens are multiplied with int8 as two planes of nibbles, 16 * high
// + low, and few tokens with the weights' magnitudes, with their signs moved over to the token (2 * 128 * 127 =
// 32,512).
//
// Names: G quantization group, n a token of N, r a row of the tile, C inputs of one step.
#include "avx2.h"
#include "int8_tokens.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int64_t TILE_ROWS = 8;  // one for each lane of a vector
constexpr int PLANES = 2;  // of a transposed tile: of int4 two times eight rows, of int8 two nibbles of eight rows
constexpr int64_t UNIT_BYTES = 32 * PLANES;  // of four inputs, transposed

constexpr int64_t FEW_TILE = 3;               // tokens at a time along the inputs
constexpr int64_t MIN_TRANSPOSED_TOKENS = 8;  // from which rows are transposed
constexpr int64_t TOKEN_TILE = 4;             // tokens at a time along the rows

SOLI_INLINE __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

SOLI_INLINE __m256i load_half(const uint8_t* from) {
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

SOLI_INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

SOLI_INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// sum + product, at this point: otherwise GCC computes all products first, for a tree of sums, and runs out of
// registers.
SOLI_INLINE __m256i add_in_order(__m256i sum, __m256i product) {
    sum = _mm256_add_epi16(sum, product);
    __asm__("" : "+x"(sum));
    return sum;
}

// Eight rows of a matrix from `first` on, the last one again where there are fewer.
struct RowTile {
    const uint8_t* weight[TILE_ROWS];
    const uint8_t* scale[TILE_ROWS];
    int64_t I;
    bool has_bf16_scales;

    RowTile(const RowBlock& rows, int64_t first) : I(rows.layout.I), has_bf16_scales(rows.layout.has_bf16_scales()) {
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const int64_t row = first + r < rows.count ? first + r : rows.count - 1;
            weight[r] = rows.weight(row);
            scale[r] = rows.scale(row);
        }
    }
};

// Stores the results of the first `count` rows.
void store(__m256 sum, int64_t count, float* y) {
    if (count >= TILE_ROWS) return _mm256_storeu_ps(y, sum);
    alignas(32) float lanes[TILE_ROWS];
    _mm256_store_ps(lanes, sum);
    __builtin_memcpy(y, lanes, 4 * count);
}

// Floats of a tile's transposed scales: of whole eights of groups.
SOLI_INLINE int64_t scale_floats(int64_t groups) { return (groups + 7) / 8 * 64; }

// The scales of eight rows, group after group: to[8 * g + r]. Prefetches those of the rows after the next tile.
void transpose_scales(const RowTile& tile, int64_t groups, float* to) {
    for (int64_t line = 0; line < 2 * groups * TILE_ROWS; line += 64)
        prefetch_l2(tile.scale[0] + 4 * groups * TILE_ROWS + line);
    for (int64_t g = 0; g < groups; g += 8) {
        __m128i a[8];
        __m128i b[8];
        for (int r = 0; r < 8; r++) {
            alignas(16) uint16_t scales[8] = {};
            if (groups - g >= 8) __builtin_memcpy(scales, tile.scale[r] + 2 * g, 16);
            else __builtin_memcpy(scales, tile.scale[r] + 2 * g, 2 * (groups - g));
            a[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
        }
        for (int level = 0; level < 3; level++) {
            for (int r = 0; r < 4; r++) {
                b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
                b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
            }
            for (int r = 0; r < 8; r++) a[r] = b[r];
        }
        for (int c = 0; c < 8; c++, to += 8)
            _mm256_store_ps(to, tile.has_bf16_scales ? floats_from_bf16(a[c]) : _mm256_cvtph_ps(a[c]));
    }
}

// Few tokens: along the inputs.

// The products of one row with N tokens, C inputs from k on: part[n][r]. Of int4 the first 128 bits belong to another
// run of 32 than the last; without FULL there is one run left.
template <int64_t FORMAT, int C, int N, bool FULL>
SOLI_INLINE void multiply(const uint8_t* row, int64_t k, const uint8_t* x, int64_t stride, __m256i (*part)[TILE_ROWS],
                          int r) {
    for (int n = 0; n < N; n++) part[n][r] = _mm256_setzero_si256();
    for (int64_t at = k; at < k + C; at += FORMAT == INT4 ? 64 : 32) {
        if (FORMAT == INT4) {
            const __m256i w = FULL ? load(row + at / 2) : load_half(row + at / 2);
            const __m256i low = low_nibbles(w);
            const __m256i high = high_nibbles(w);
            const uint8_t* values = x + at / 128 * 128 + at % 128 / 2;
            for (int n = 0; n < N; n++, values += stride) {
                const __m256i low_sums = _mm256_maddubs_epi16(low, load(values));
                const __m256i sums = _mm256_add_epi16(low_sums, _mm256_maddubs_epi16(high, load(values + 64)));
                part[n][r] = _mm256_add_epi32(part[n][r], add_lane_pairs(sums));
            }
        } else {
            const __m256i w = load(row + at);
            const __m256i magnitude = _mm256_abs_epi8(w);
            for (int n = 0; n < N; n++) {
                const __m256i signed_token = _mm256_sign_epi8(load(x + n * stride + at), w);
                part[n][r] =
                    _mm256_add_epi32(part[n][r], add_lane_pairs(_mm256_maddubs_epi16(magnitude, signed_token)));
            }
        }
    }
}

// Adds inputs k ... k + C - 1 to eight results of each of N tokens; prefetches LINES of each row.
template <int64_t FORMAT, int G, int C, int N, int LINES, bool FULL = true>
SOLI_INLINE void add_few_tokens(const RowTile& tile, const float* scales, int64_t k, int64_t distance, const uint8_t* x,
                                int64_t stride, __m256* sum) {
    __m256i part[N][TILE_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++) {
        multiply<FORMAT, C, N, FULL>(tile.weight[r], k, x, stride, part, r);
        const uint8_t* line = tile.weight[r] + (FORMAT == INT4 ? k / 2 : k) + distance;
        for (int i = 0; i < LINES; i++) prefetch_l2(line + 64 * i);
    }
    for (int n = 0; n < N; n++) {
        const Int8Token token(x + n * stride, padded(tile.I));
        const __m256i upper = add_lanes_of_4(part[n]);
        const __m256i lower = add_lanes_of_4(part[n] + 4);
        __m256i total[2] = {_mm256_permute2x128_si256(upper, lower, 0x20),
                            _mm256_permute2x128_si256(upper, lower, 0x31)};
        if (C == G) total[0] = _mm256_add_epi32(total[0], total[1]);  // else the two halves are two groups
        const __m256 token_scale = _mm256_set1_ps(token.scales[k / 128]);
        for (int g = 0; g < (FULL ? C / G : 1); g++) {
            __m256i exact = total[g];
            if (FORMAT == INT4)
                exact = _mm256_add_epi32(exact, _mm256_set1_epi32(token.corrections[k / 32 + g * (G / 32)]));
            const __m256 scale = _mm256_mul_ps(_mm256_load_ps(scales + 8 * (k / G + g)), token_scale);
            sum[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), scale, sum[n]);
        }
    }
}

// Eight results of each of N tokens.
template <int64_t FORMAT, int G, int N>
void multiply_few_tokens(const RowTile& tile, const float* scales, const uint8_t* x, int64_t stride, int64_t row_bytes,
                         __m256* sum) {
    constexpr int C = FORMAT == INT4 && G == 32 ? 64 : G;
    constexpr int LINES = FORMAT == INT4 ? 1 : 2;  // of 128 inputs
    const int64_t next = TILE_ROWS * row_bytes;
    const int64_t distance = next < MIN_PREFETCH_DISTANCE ? MIN_PREFETCH_DISTANCE : next;
    for (int n = 0; n < N; n++) sum[n] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 128 <= tile.I; k += 128) {
        add_few_tokens<FORMAT, G, C, N, LINES>(tile, scales, k, distance, x, stride, sum);
#pragma GCC unroll 4
        for (int64_t more = C; more < 128; more += C)
            add_few_tokens<FORMAT, G, C, N, 0>(tile, scales, k + more, 0, x, stride, sum);
    }
    for (; k + C <= tile.I; k += C) add_few_tokens<FORMAT, G, C, N, 0>(tile, scales, k, 0, x, stride, sum);
    if (C > G && k < tile.I) add_few_tokens<FORMAT, G, C, N, 0, false>(tile, scales, k, 0, x, stride, sum);
}

// Many tokens: along the rows of a transposed tile.

// Transposes eight rows of eight units of four bytes; units are UNIT_BYTES apart, the first four at to[0], the others
// at to[1].
SOLI_INLINE void transpose(const __m256i* a, uint8_t* const* to) {
    __m256i b[8];  // b[4 q + u]: in 128 bits i unit 4 i + u of rows 4 q ... 4 q + 3
    for (int q = 0; q < 2; q++) {
        const __m256i* rows = a + 4 * q;
        const __m256i low = _mm256_unpacklo_epi32(rows[0], rows[1]);
        const __m256i high = _mm256_unpackhi_epi32(rows[0], rows[1]);
        const __m256i low2 = _mm256_unpacklo_epi32(rows[2], rows[3]);
        const __m256i high2 = _mm256_unpackhi_epi32(rows[2], rows[3]);
        b[4 * q] = _mm256_unpacklo_epi64(low, low2);
        b[4 * q + 1] = _mm256_unpackhi_epi64(low, low2);
        b[4 * q + 2] = _mm256_unpacklo_epi64(high, high2);
        b[4 * q + 3] = _mm256_unpackhi_epi64(high, high2);
    }
    for (int i = 0; i < 2; i++)
        for (int u = 0; u < 4; u++) {
            const __m256i unit =
                i ? _mm256_permute2x128_si256(b[u], b[4 + u], 0x31) : _mm256_permute2x128_si256(b[u], b[4 + u], 0x20);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to[i] + UNIT_BYTES * u), unit);
        }
}

// Eight rows for many tokens: to[UNIT_BYTES * unit + 4 * row]. Each 32 inputs are eight units; of int4 four of the
// run's first half, then four of its second.
template <int64_t FORMAT>
void transpose_tile(const RowTile& tile, uint8_t* to) {
    constexpr int64_t RUN_BYTES = 8 * UNIT_BYTES;
    constexpr int64_t INPUTS = FORMAT == INT4 ? 64 : 32;
    for (int64_t k = 0; k < tile.I; k += INPUTS) {
        __m256i low[TILE_ROWS];
        __m256i high[TILE_ROWS];
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const uint8_t* from = tile.weight[r] + (FORMAT == INT4 ? k / 2 : k);
            const bool one_run = FORMAT == INT4 && k + 32 == tile.I;
            __m256i w = one_run ? load_half(from) : load(from);
            if (FORMAT == INT8) w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            low[r] = low_nibbles(w);
            high[r] = high_nibbles(w);
        }
        uint8_t* run = to + k / 32 * RUN_BYTES;
        if (FORMAT == INT4) {  // two runs
            uint8_t* const first_halves[2] = {run, run + RUN_BYTES};
            uint8_t* const second_halves[2] = {run + RUN_BYTES / 2, run + RUN_BYTES * 3 / 2};
            transpose(low, first_halves);
            transpose(high, second_halves);
        } else {  // one run, in two planes
            uint8_t* const low_plane[2] = {run, run + RUN_BYTES / 2};
            uint8_t* const high_plane[2] = {low_plane[0] + 32, low_plane[1] + 32};
            transpose(low, low_plane);
            transpose(high, high_plane);
        }
    }
}

// A transposed tile's results for each of N tokens: int4's sixteen rows, or int8's eight.
template <int64_t FORMAT, int G, int N>
void multiply_transposed(const TransposedTile& tile, TransposedTile::Prefetcher prefetcher, const uint8_t* x,
                         __m256 (*sum)[PLANES]) {
    const int64_t stride = tile.token_stride;
    const int64_t P = padded(tile.I);
    const float* second_scales = tile.scales + scale_floats(tile.I / G);  // of int4's rows 8 ... 15
    __m256i total[N][PLANES];
    for (int n = 0; n < N; n++) sum[n][0] = sum[n][1] = _mm256_setzero_ps();
    const uint8_t* weights = tile.weights;
    for (int64_t k = 0; k < tile.I; k += 32) {
        if (k % 128 == 0) prefetcher.prefetch_step();
        const uint8_t* values = x + (FORMAT == INT4 ? k / 128 * 128 + k % 128 / 2 : k);
        __m256i part[N][PLANES];
        for (int n = 0; n < N; n++) part[n][0] = part[n][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int u = 0; u < 8; u++, weights += UNIT_BYTES) {
            const __m256i w0 = load(weights);
            const __m256i w1 = load(weights + 32);
            for (int n = 0; n < N; n++) {
                int32_t unit;
                __builtin_memcpy(&unit, values + n * stride + 4 * u + (FORMAT == INT4 && u >= 4 ? 48 : 0), 4);
                const __m256i token_unit = _mm256_set1_epi32(unit);
                part[n][0] = add_in_order(part[n][0], _mm256_maddubs_epi16(w0, token_unit));
                part[n][1] = add_in_order(part[n][1], _mm256_maddubs_epi16(w1, token_unit));
            }
        }
        for (int n = 0; n < N; n++)
            for (int p = 0; p < PLANES; p++) {
                const __m256i run_sum = add_lane_pairs(part[n][p]);
                total[n][p] = k % G ? _mm256_add_epi32(total[n][p], run_sum) : run_sum;
            }
        if ((k + 32) % G) continue;
        const int64_t g = k / G;
        const __m256 scale0 = _mm256_load_ps(tile.scales + 8 * g);
        const __m256 scale1 = FORMAT == INT4 ? _mm256_load_ps(second_scales + 8 * g) : scale0;
        for (int n = 0; n < N; n++) {
            const Int8Token token(x + n * stride, P);
            const __m256i correction = _mm256_set1_epi32(token.corrections[g * (G / 32)]);
            const __m256 token_scale = _mm256_set1_ps(token.scales[k / 128]);
            const __m256i second = FORMAT == INT4 ? total[n][1] : _mm256_slli_epi32(total[n][1], 4);
            const __m256i first = FORMAT == INT4 ? total[n][0] : _mm256_add_epi32(total[n][0], second);
            const __m256i exact0 = _mm256_add_epi32(correction, first);
            sum[n][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact0), _mm256_mul_ps(scale0, token_scale), sum[n][0]);
            if (FORMAT != INT4) continue;
            const __m256i exact1 = _mm256_add_epi32(correction, second);
            sum[n][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact1), _mm256_mul_ps(scale1, token_scale), sum[n][1]);
        }
    }
}

// By number of tokens, from one.
using MultiplyFew = void (*)(const RowTile&, const float*, const uint8_t*, int64_t, int64_t, __m256*);
template <int64_t FORMAT, int G>
constexpr MultiplyFew MULTIPLY_FEW[] = {multiply_few_tokens<FORMAT, G, 1>, multiply_few_tokens<FORMAT, G, 2>,
                                        multiply_few_tokens<FORMAT, G, 3>};
using MultiplyTransposed = void (*)(const TransposedTile&, TransposedTile::Prefetcher, const uint8_t*,
                                    __m256 (*)[PLANES]);
template <int64_t FORMAT, int G>
constexpr MultiplyTransposed MULTIPLY_TRANSPOSED[] = {multiply_transposed<FORMAT, G, 1>,
                                                      multiply_transposed<FORMAT, G, 2>,
                                                      multiply_transposed<FORMAT, G, 3>,
                                                      multiply_transposed<FORMAT, G, 4>};

template <int64_t FORMAT, int G>
void matmul_many_tokens(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride,
                        Scratch& scratch) {
    constexpr int64_t ROW_TILES = FORMAT == INT4 ? 2 : 1;  // of a transposed tile
    constexpr int64_t ROWS = ROW_TILES * TILE_ROWS;
    const Layout& layout = rows.layout;
    const int64_t tile_scales = scale_floats(layout.I / G);
    const int64_t bytes = layout.row_bytes() * ROWS;
    float* scales = scratch.take<float>(PLANES * tile_scales);
    uint8_t* transposed = scratch.take<uint8_t>(8 * PLANES * padded(layout.I));
    for (int64_t r = 0; r < rows.count; r += ROWS) {
        for (int64_t s = 0; s < ROW_TILES; s++) {
            const RowTile tile(rows, r + s * TILE_ROWS);
            transpose_scales(tile, layout.I / G, scales + s * tile_scales);
            transpose_tile<FORMAT>(tile, transposed + 32 * s);
        }
        const TransposedTile tile = {transposed, scales, layout.I, layout.bf16_token_bytes(), rows.weight(r) + bytes,
                                     bytes};
        const int64_t token_tiles = (tokens + TOKEN_TILE - 1) / TOKEN_TILE;
        for (int64_t t = 0, i = 0; t < tokens; i++) {
            const int64_t count = balanced_tile(tokens - t, TOKEN_TILE);
            __m256 sum[TOKEN_TILE][PLANES];
            MULTIPLY_TRANSPOSED<FORMAT, G>[count - 1](tile, tile.prefetcher(i, token_tiles), x + t * tile.token_stride,
                                                      sum);
            for (int64_t n = 0; n < count; n++)
                for (int64_t s = 0; s < ROW_TILES && r + s * TILE_ROWS < rows.count; s++)
                    store(sum[n][s], rows.count - r - s * TILE_ROWS, y + (t + n) * y_stride + r + s * TILE_ROWS);
            t += count;
        }
    }
}

template <int64_t FORMAT, int G>
void matmul(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    const int64_t groups = layout.I / G;
    const int64_t stride = layout.bf16_token_bytes();
    if (!scratch.reserve(4 * PLANES * 8 * (groups + 7) + 8 * PLANES * padded(layout.I))) __builtin_trap();
    if (tokens >= MIN_TRANSPOSED_TOKENS) return matmul_many_tokens<FORMAT, G>(rows, x, tokens, y, y_stride, scratch);
    float* scales = scratch.take<float>(scale_floats(groups));
    for (int64_t r = 0; r < rows.count; r += TILE_ROWS) {
        const RowTile tile(rows, r);
        transpose_scales(tile, groups, scales);
        for (int64_t t = 0; t < tokens;) {
            const int64_t count = balanced_tile(tokens - t, FEW_TILE);
            __m256 sum[FEW_TILE];
            MULTIPLY_FEW<FORMAT, G>[count - 1](tile, scales, x + t * stride, stride, layout.row_bytes(), sum);
            for (int64_t n = 0; n < count; n++) store(sum[n], rows.count - r, y + (t + n) * y_stride + r);
            t += count;
        }
    }
}

template <int64_t FORMAT>
void matmul_any_group(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    switch (rows.layout.group) {
        case 32:
            return matmul<FORMAT, 32>(rows, x, tokens, y, y_stride);
        case 64:
            return matmul<FORMAT, 64>(rows, x, tokens, y, y_stride);
        default:
            return matmul<FORMAT, 128>(rows, x, tokens, y, y_stride);
    }
}

}  // namespace

void matmul_int8_avx2(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_any_group<INT8>(rows, x, tokens, y, y_stride);
}

void matmul_int4_avx2(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_any_group<INT4>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
