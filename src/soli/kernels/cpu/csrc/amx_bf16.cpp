// The AMX kernels for bfloat16 tokens and weights in bfloat16 or FP8, as exact bfloat16 codes. A tile product adds 32 terms in
// one order whatever its sides hold, so a single token, a column beside weights as they lie, and many, rows beside weights
// turned into columns, get the same bits.
#include "amx.h"
#include "avx512_band.h"
#include "avx512_bf16.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int64_t BLOCK = 16;              // tokens of a tile
constexpr int64_t MOST_FEW = 2, MANY = 7;  // tokens beside one tile of weights; from which weights are turned
constexpr int64_t AHEAD = 256;  // bytes that FP8 asks for ahead; beside bfloat16 asking takes more time than it saves

Row row_of(const Band& band, int64_t r) { return {band.weight[r], band.scale[r], nullptr}; }

// FP8's scales of a band's rows; sixteen rows seldom lie in two blocks.
template <class D>
__m512 scale_of(const Band& band, int64_t k) {
    if (band.scale[0] == band.scale[BAND - 1]) return D::template scale<true>(row_of(band, 0), k, 0);
    alignas(64) float all[BAND];
    for (int64_t r = 0; r < BAND; r++)
        _mm_store_ss(all + r, _mm512_castps512_ps128(D::template scale<true>(row_of(band, r), k, 0)));
    return _mm512_load_ps(all);
}

// Few tokens: tiles of weights, of two bands in turns, beside one column for each token.
enum { COLUMNS = 0, WEIGHTS = 4, TOKEN = 6 };

template <int n, int N>
SOLI_INLINE void columns_zero() {
    tile_zero<COLUMNS + 2 * n>(), tile_zero<COLUMNS + 2 * n + 1>();
    if constexpr (n + 1 < N) columns_zero<n + 1, N>();
}

template <int n, int N, int BANDS>
SOLI_INLINE void columns_add(const uint16_t* x, int64_t x_stride) {
    tile_load<TOKEN + n>(x, 4), tile_dot_bf16<COLUMNS + 2 * n, WEIGHTS, TOKEN + n>();
    if constexpr (BANDS > 1) tile_dot_bf16<COLUMNS + 2 * n + 1, WEIGHTS + 1, TOKEN + n>();
    if constexpr (n + 1 < N) columns_add<n + 1, N, BANDS>(x + x_stride, x_stride);
}

template <int n, int N>
SOLI_INLINE void columns_take(float (*to)[BAND]) {
    tile_store<COLUMNS + 2 * n>(to[2 * n], 4), tile_store<COLUMNS + 2 * n + 1>(to[2 * n + 1], 4);
    if constexpr (n + 1 < N) columns_take<n + 1, N>(to);
}

// Where a band's codes from k on lie, `stride` bytes from row to row: in the file, or put on `stage`.
template <class D>
SOLI_INLINE const uint8_t* placed(const Band& band, int64_t row_bytes, int64_t k, uint16_t (*stage)[D::CHUNK],
                                  int64_t& stride) {
    if (!D::SCALED && band.count == BAND && band.I - k >= D::CHUNK) {
        stride = row_bytes;
        return band.weight[0] + 2 * k;
    }
    for (int64_t r = 0; r < BAND; r++) {
        __m512i codes[D::VECS];
        D::template codes<false>(row_of(band, r), k, band.I - k, codes);
        for (int v = 0; v < D::VECS; v++) _mm512_store_si512(stage[r] + 32 * v, codes[v]);
    }
    stride = sizeof stage[0];
    return reinterpret_cast<const uint8_t*>(stage);
}

// Results of one or two bands for N tokens: sum[2 * n + band].
template <class D, int N, int BANDS>
void few(const Band* band, int64_t row_bytes, const uint16_t* x, int64_t x_stride, __m512* sum) {
    alignas(64) uint16_t stage[BANDS][BAND][D::CHUNK];
    alignas(64) float part[2 * N][BAND];
    for (int n = 0; n < 2 * N; n++) sum[n] = _mm512_setzero_ps();
    columns_zero<0, N>();
    for (int64_t k = 0; k < band->I; k += D::CHUNK) {
        for (int64_t r = 0; D::SCALED && r < BANDS * BAND; r++) D::prefetch(row_of(band[r / BAND], r % BAND), k, AHEAD);
        int64_t stride[2];
        const uint8_t* from[2] = {placed<D>(band[0], row_bytes, k, stage[0], stride[0])};
        if (BANDS > 1) from[1] = placed<D>(band[1], row_bytes, k, stage[BANDS - 1], stride[1]);
        for (int v = 0; v < D::VECS; v++) {
            tile_load<WEIGHTS>(from[0] + 64 * v, stride[0]);
            if (BANDS > 1) tile_load<WEIGHTS + 1>(from[1] + 64 * v, stride[1]);
            columns_add<0, N, BANDS>(x + k + 32 * v, x_stride);
        }
        if (D::SCALED) {
            columns_take<0, N>(part), columns_zero<0, N>();
            for (int j = 0; j < BANDS; j++) {
                const __m512 scale = scale_of<D>(band[j], k);
                for (int n = 0; n < N; n++)
                    sum[2 * n + j] = _mm512_fmadd_ps(_mm512_load_ps(part[2 * n + j]), scale, sum[2 * n + j]);
            }
        }
    }
    if (D::SCALED) return;
    columns_take<0, N>(part);
    for (int n = 0; n < 2 * N; n++) sum[n] = _mm512_load_ps(part[n]);
}

// Many tokens: rows of tokens beside columns of weights, two blocks of tokens and two bands at a time.
enum { SUMS = 0, LEFT = 4, RIGHT = 6 };

// A band's codes as columns, a tile for every 32.
template <class D>
void turn_band(const Band& band, uint8_t* to) {
    for (int64_t k = 0; k < band.I; k += D::CHUNK) {
        __m512i w[D::VECS][BAND], codes[D::VECS];
        for (int64_t r = 0; r < BAND; r++) {
            D::template codes<false>(row_of(band, r), k, band.I - k, codes);
            for (int v = 0; v < D::VECS; v++) w[v][r] = codes[v];
        }
        for (int v = 0; v < D::VECS; v++, to += 1024) turn(w[v], to);
    }
}

template <int BLOCKS, int BANDS>
SOLI_INLINE void tiles_zero() {
    tile_zero<SUMS>();
    if (BANDS > 1) tile_zero<SUMS + 1>();
    if (BLOCKS > 1) tile_zero<SUMS + 2>();
    if (BLOCKS > 1 && BANDS > 1) tile_zero<SUMS + 3>();
}

template <int BLOCKS, int BANDS>
SOLI_INLINE void tiles_add(const uint8_t* x, int64_t x_bytes, const uint8_t* weights, int64_t band_bytes) {
    tile_load<LEFT>(x, x_bytes), tile_load<RIGHT>(weights, 64), tile_dot_bf16<SUMS, LEFT, RIGHT>();
    if (BANDS > 1) tile_load<RIGHT + 1>(weights + band_bytes, 64), tile_dot_bf16<SUMS + 1, LEFT, RIGHT + 1>();
    if (BLOCKS > 1) tile_load<LEFT + 1>(x + BLOCK * x_bytes, x_bytes), tile_dot_bf16<SUMS + 2, LEFT + 1, RIGHT>();
    if (BLOCKS > 1 && BANDS > 1) tile_dot_bf16<SUMS + 3, LEFT + 1, RIGHT + 1>();
}

// The sums of block i and band j as to[2 * i + j].
using Part = float[BLOCK][BAND];
template <int BLOCKS, int BANDS>
SOLI_INLINE void tiles_take(Part* to) {
    tile_store<SUMS>(to[0], 64);
    if (BANDS > 1) tile_store<SUMS + 1>(to[1], 64);
    if (BLOCKS > 1) tile_store<SUMS + 2>(to[2], 64);
    if (BLOCKS > 1 && BANDS > 1) tile_store<SUMS + 3>(to[3], 64);
}

template <class D, int BLOCKS, int BANDS>
void tile(const Band* band, const uint8_t* turned, const uint16_t* x, Part* sum, const uint8_t* next, int64_t step) {
    const int64_t I = band[0].I, x_bytes = 2 * padded(I), band_bytes = BAND * x_bytes;
    tiles_zero<BLOCKS, BANDS>();
    alignas(64) Part part[4];
    if (D::SCALED)
        for (int i = 0; i < 4; i++)
            for (auto& line : sum[i]) _mm512_store_ps(line, _mm512_setzero_ps());
    for (int64_t k = 0; k < I; k += D::CHUNK, next += step) {
        for (int64_t line = 0; line < step; line += 64) ask(next + line);
        for (int v = 0; v < D::VECS; v++)
            tiles_add<BLOCKS, BANDS>(reinterpret_cast<const uint8_t*>(x + k + 32 * v), x_bytes,
                                     turned + (k / 32 + v) * 1024, band_bytes);
        if (!D::SCALED) continue;
        tiles_take<BLOCKS, BANDS>(part), tiles_zero<BLOCKS, BANDS>();
        for (int j = 0; j < BANDS; j++) {
            const __m512 scale = scale_of<D>(band[j], k);
            for (int i = 0; i < BLOCKS; i++)
                for (int64_t n = 0; n < BLOCK; n++) {
                    float* to = sum[2 * i + j][n];
                    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(part[2 * i + j][n]), scale, _mm512_load_ps(to)));
                }
        }
    }
    if (!D::SCALED) tiles_take<BLOCKS, BANDS>(sum);
}

template <class D>
void many(const Rows& rows, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const int64_t I = rows.layout.I, P = padded(I);
    if (!scratch.reserve(2 * BAND * 2 * P)) __builtin_trap();
    uint8_t* turned = scratch.take<uint8_t>(2 * BAND * 2 * P);
    const int64_t pieces = (tokens + 2 * BLOCK - 1) / (2 * BLOCK), steps = (I + D::CHUNK - 1) / D::CHUNK;
    const int64_t step = 2 * BAND * rows.layout.row_bytes() / (pieces * steps) / 64 * 64 + 64;
    for (int64_t r = 0; r < rows.count; r += 2 * BAND) {
        const bool two = rows.count - r > BAND;
        const Band band[2] = {Band(rows, r), Band(rows, two ? r + BAND : r)};
        for (int j = 0; j <= two; j++) turn_band<D>(band[j], turned + j * BAND * 2 * P);
        const uint8_t* next = rows.weight(r + 2 * BAND);
        for (int64_t t = 0; t < tokens; t += 2 * BLOCK, next += step * steps) {
            const int64_t count = tokens - t < 2 * BLOCK ? tokens - t : 2 * BLOCK;
            alignas(64) Part sum[4];
            (count > BLOCK ? two ? tile<D, 2, 2> : tile<D, 2, 1>
             : two ? tile<D, 1, 2>
                           : tile<D, 1, 1>)(band, turned, x + t * P, sum, next, step);
            for (int j = 0; j <= two; j++)
                for (int64_t n = 0; n < count; n++)
                    _mm512_mask_storeu_ps(y + (t + n) * y_stride + r + j * BAND, band[j].there(),
                                          _mm512_load_ps(sum[n / BLOCK * 2 + j][n % BLOCK]));
        }
    }
}

template <class D>
void dots16(const Rows& rows, const uint8_t* token, int64_t tokens, float* y, int64_t y_stride) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(token);
    const int64_t stride = padded(rows.layout.I);
    Tiles tiles;
    if (tokens >= MANY) {
        tiles.shape(SUMS, 4, BLOCK, 4 * BAND), tiles.shape(LEFT, 2, BLOCK, 64), tiles.shape(RIGHT, 2, 16, 4 * BAND),
            tiles.set();
        many<D>(rows, x, tokens, y, y_stride);
        return;
    }
    tiles.shape(COLUMNS, 4, BAND, 4), tiles.shape(WEIGHTS, 2, BAND, 64), tiles.shape(TOKEN, MOST_FEW, 16, 4),
        tiles.set();
    for (int64_t r = 0; r < rows.count; r += 2 * BAND) {
        const bool two = rows.count - r > BAND;
        const Band band[2] = {Band(rows, r), Band(rows, two ? r + BAND : r)};
        for (int64_t t = 0; t < tokens; t += MOST_FEW) {
            const int64_t count = tokens - t < MOST_FEW ? tokens - t : MOST_FEW;
            __m512 sum[2 * MOST_FEW];
            (count == 1 ? two ? few<D, 1, 2> : few<D, 1, 1>
             : two ? few<D, 2, 2>
                        : few<D, 2, 1>)(band, rows.layout.row_bytes(), x + t * stride, stride, sum);
            for (int j = 0; j <= two; j++)
                for (int64_t n = 0; n < count; n++)
                    _mm512_mask_storeu_ps(y + (t + n) * y_stride + r + j * BAND, band[j].there(), sum[2 * n + j]);
        }
    }
}

}  // namespace

void dots16_bf16_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16<Bf16>(rows, x, tokens, y, y_stride);
}

void dots16_fp8_tiles(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16<Fp8>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
