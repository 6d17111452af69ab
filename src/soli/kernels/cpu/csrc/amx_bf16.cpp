// The AMX kernels for bfloat16 tokens and weights in bfloat16 or FP8, decoded to exact bfloat16. A tile product adds 32
// terms in one order whatever its sides hold. So a single token, a column beside weights in place, and many tokens,
// rows beside transposed weights, have the same bits.
//
// Template parameters: D decoder; N tokens beside a tile of weights; TOKEN_TILES and ROW_TILES of a register block.
#include "amx.h"
#include "avx512_bf16.h"
#include "avx512_row_tile.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int64_t TOKEN_TILE = 16;
constexpr int64_t MAX_COLUMNS = 2;            // tokens, one column each, beside one tile of weights
constexpr int64_t MIN_TRANSPOSED_TOKENS = 7;  // from which weights are transposed
constexpr int64_t PREFETCH_DISTANCE = 256;  // bytes, of FP8; beside bfloat16 prefetching takes more time than it saves
constexpr int64_t TILE_BYTES = 1024;

Row row_of(const RowTile& tile, int64_t r) { return {tile.weight[r], tile.scale[r], nullptr}; }

// FP8's scales of a tile's rows, which have one of their own, or one for 128 rows.
template <class D>
__m512 tile_scale(const RowTile& tile, int64_t k) {
    __m512 scale;
    if (tile.scale[0] == tile.scale[TILE_ROWS - 1]) {
        D::template scales<true>(row_of(tile, 0), k, D::CHUNK, &scale);
        return scale;
    }
    alignas(64) float scales[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; r++) {
        D::template scales<true>(row_of(tile, r), k, D::CHUNK, &scale);
        _mm_store_ss(scales + r, _mm512_castps512_ps128(scale));
    }
    return _mm512_load_ps(scales);
}

// Few tokens: tiles of weights, alternately of two row tiles, beside one column for each token. Tile registers:
enum { COLUMNS = 0, WEIGHTS = 4, TOKEN = 6 };

template <int n, int N>
SOLI_INLINE void zero_columns() {
    tile_zero<COLUMNS + 2 * n>();
    tile_zero<COLUMNS + 2 * n + 1>();
    if constexpr (n + 1 < N) zero_columns<n + 1, N>();
}

template <int n, int N, int ROW_TILES>
SOLI_INLINE void add_columns(const uint16_t* x, int64_t x_stride) {
    tile_load<TOKEN + n>(x, 4);
    tile_multiply_bf16<COLUMNS + 2 * n, WEIGHTS, TOKEN + n>();
    if constexpr (ROW_TILES > 1) tile_multiply_bf16<COLUMNS + 2 * n + 1, WEIGHTS + 1, TOKEN + n>();
    if constexpr (n + 1 < N) add_columns<n + 1, N, ROW_TILES>(x + x_stride, x_stride);
}

template <int n, int N>
SOLI_INLINE void store_columns(float (*to)[TILE_ROWS]) {
    tile_store<COLUMNS + 2 * n>(to[2 * n], 4);
    tile_store<COLUMNS + 2 * n + 1>(to[2 * n + 1], 4);
    if constexpr (n + 1 < N) store_columns<n + 1, N>(to);
}

// The address of a tile's weights from k on, `stride` bytes from row to row: in place, or decoded into `decoded`.
template <class D>
SOLI_INLINE const uint8_t* tile_weights(const RowTile& tile, int64_t row_bytes, int64_t k,
                                        uint16_t (*decoded)[D::CHUNK], int64_t& stride) {
    if (!D::SCALED && tile.count == TILE_ROWS && tile.I - k >= D::CHUNK) {
        stride = row_bytes;
        return tile.weight[0] + 2 * k;
    }
    for (int64_t r = 0; r < TILE_ROWS; r++) {
        __m512i w[D::VECS];
        D::template decode<false>(row_of(tile, r), k, tile.I - k, w);
        for (int v = 0; v < D::VECS; v++) _mm512_store_si512(decoded[r] + 32 * v, w[v]);
    }
    stride = sizeof decoded[0];
    return reinterpret_cast<const uint8_t*>(decoded);
}

// Results of one or two row tiles for N tokens: sum[2 * n + row tile].
template <class D, int N, int ROW_TILES>
void multiply_few_tokens(const RowTile* tile, int64_t row_bytes, const uint16_t* x, int64_t x_stride, __m512* sum) {
    alignas(64) uint16_t decoded[ROW_TILES][TILE_ROWS][D::CHUNK];
    alignas(64) float part[2 * N][TILE_ROWS];
    for (int n = 0; n < 2 * N; n++) sum[n] = _mm512_setzero_ps();
    zero_columns<0, N>();
    for (int64_t k = 0; k < tile->I; k += D::CHUNK) {
        for (int64_t r = 0; D::SCALED && r < ROW_TILES * TILE_ROWS; r++)
            D::prefetch(row_of(tile[r / TILE_ROWS], r % TILE_ROWS), k, PREFETCH_DISTANCE);
        int64_t stride[2];
        const uint8_t* weights[2] = {tile_weights<D>(tile[0], row_bytes, k, decoded[0], stride[0])};
        if (ROW_TILES > 1) weights[1] = tile_weights<D>(tile[1], row_bytes, k, decoded[ROW_TILES - 1], stride[1]);
        for (int v = 0; v < D::VECS; v++) {
            tile_load<WEIGHTS>(weights[0] + 64 * v, stride[0]);
            if (ROW_TILES > 1) tile_load<WEIGHTS + 1>(weights[1] + 64 * v, stride[1]);
            add_columns<0, N, ROW_TILES>(x + k + 32 * v, x_stride);
        }
        if (D::SCALED) {
            store_columns<0, N>(part);
            zero_columns<0, N>();
            for (int j = 0; j < ROW_TILES; j++) {
                const __m512 scale = tile_scale<D>(tile[j], k);
                for (int n = 0; n < N; n++)
                    sum[2 * n + j] = _mm512_fmadd_ps(_mm512_load_ps(part[2 * n + j]), scale, sum[2 * n + j]);
            }
        }
    }
    if (D::SCALED) return;
    store_columns<0, N>(part);
    for (int n = 0; n < 2 * N; n++) sum[n] = _mm512_load_ps(part[n]);
}

// Many tokens: rows of tokens beside columns of weights, two token tiles and two row tiles at a time. Tile registers:
enum { SUMS = 0, TOKENS = 4, TRANSPOSED = 6 };

// A row tile's weights as columns, a tile register for every 32 inputs.
template <class D>
void transpose_tile(const RowTile& tile, uint8_t* to) {
    for (int64_t k = 0; k < tile.I; k += D::CHUNK) {
        __m512i w[D::VECS][TILE_ROWS];
        __m512i row[D::VECS];
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            D::template decode<false>(row_of(tile, r), k, tile.I - k, row);
            for (int v = 0; v < D::VECS; v++) w[v][r] = row[v];
        }
        for (int v = 0; v < D::VECS; v++, to += TILE_BYTES) transpose(w[v], to);
    }
}

template <int TOKEN_TILES, int ROW_TILES>
SOLI_INLINE void zero_sums() {
    tile_zero<SUMS>();
    if (ROW_TILES > 1) tile_zero<SUMS + 1>();
    if (TOKEN_TILES > 1) tile_zero<SUMS + 2>();
    if (TOKEN_TILES > 1 && ROW_TILES > 1) tile_zero<SUMS + 3>();
}

template <int TOKEN_TILES, int ROW_TILES>
SOLI_INLINE void add_products(const uint8_t* x, int64_t x_bytes, const uint8_t* weights, int64_t row_tile_bytes) {
    tile_load<TOKENS>(x, x_bytes);
    tile_load<TRANSPOSED>(weights, 64);
    tile_multiply_bf16<SUMS, TOKENS, TRANSPOSED>();
    if (ROW_TILES > 1) {
        tile_load<TRANSPOSED + 1>(weights + row_tile_bytes, 64);
        tile_multiply_bf16<SUMS + 1, TOKENS, TRANSPOSED + 1>();
    }
    if (TOKEN_TILES > 1) {
        tile_load<TOKENS + 1>(x + TOKEN_TILE * x_bytes, x_bytes);
        tile_multiply_bf16<SUMS + 2, TOKENS + 1, TRANSPOSED>();
    }
    if (TOKEN_TILES > 1 && ROW_TILES > 1) tile_multiply_bf16<SUMS + 3, TOKENS + 1, TRANSPOSED + 1>();
}

// The sums of token tile i and row tile j are to[2 * i + j].
using TileSums = float[TOKEN_TILE][TILE_ROWS];
template <int TOKEN_TILES, int ROW_TILES>
SOLI_INLINE void store_sums(TileSums* to) {
    tile_store<SUMS>(to[0], 64);
    if (ROW_TILES > 1) tile_store<SUMS + 1>(to[1], 64);
    if (TOKEN_TILES > 1) tile_store<SUMS + 2>(to[2], 64);
    if (TOKEN_TILES > 1 && ROW_TILES > 1) tile_store<SUMS + 3>(to[3], 64);
}

// sum += part * scale, for one token tile and row tile.
SOLI_INLINE void add_scaled(const TileSums& part, __m512 scale, TileSums& sum) {
    for (int64_t n = 0; n < TOKEN_TILE; n++)
        _mm512_store_ps(sum[n], _mm512_fmadd_ps(_mm512_load_ps(part[n]), scale, _mm512_load_ps(sum[n])));
}

// Prefetches `step_bytes` of `next` with every chunk.
template <class D, int TOKEN_TILES, int ROW_TILES>
void multiply_transposed(const RowTile* tile, const uint8_t* transposed, const uint16_t* x, TileSums* sum,
                         const uint8_t* next, int64_t step_bytes) {
    const int64_t I = tile[0].I;
    const int64_t x_bytes = 2 * padded(I);
    const int64_t row_tile_bytes = TILE_ROWS * x_bytes;
    zero_sums<TOKEN_TILES, ROW_TILES>();
    alignas(64) TileSums part[4];
    if (D::SCALED)
        for (int i = 0; i < 4; i++)
            for (auto& line : sum[i]) _mm512_store_ps(line, _mm512_setzero_ps());
    for (int64_t k = 0; k < I; k += D::CHUNK, next += step_bytes) {
        for (int64_t line = 0; line < step_bytes; line += 64) prefetch_l2(next + line);
        for (int v = 0; v < D::VECS; v++)
            add_products<TOKEN_TILES, ROW_TILES>(reinterpret_cast<const uint8_t*>(x + k + 32 * v), x_bytes,
                                                 transposed + (k / 32 + v) * TILE_BYTES, row_tile_bytes);
        if (!D::SCALED) continue;
        store_sums<TOKEN_TILES, ROW_TILES>(part);
        zero_sums<TOKEN_TILES, ROW_TILES>();
        for (int j = 0; j < ROW_TILES; j++) {
            const __m512 scale = tile_scale<D>(tile[j], k);
            for (int i = 0; i < TOKEN_TILES; i++) add_scaled(part[2 * i + j], scale, sum[2 * i + j]);
        }
    }
    if (!D::SCALED) store_sums<TOKEN_TILES, ROW_TILES>(sum);
}

template <class D>
void matmul_many_tokens(const RowBlock& rows, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const int64_t I = rows.layout.I;
    const int64_t P = padded(I);
    if (!scratch.reserve(2 * TILE_ROWS * 2 * P)) __builtin_trap();
    uint8_t* transposed = scratch.take<uint8_t>(2 * TILE_ROWS * 2 * P);
    const int64_t token_blocks = (tokens + 2 * TOKEN_TILE - 1) / (2 * TOKEN_TILE);
    const int64_t steps = (I + D::CHUNK - 1) / D::CHUNK;
    const int64_t step_bytes = 2 * TILE_ROWS * rows.layout.row_bytes() / (token_blocks * steps) / 64 * 64 + 64;
    for (int64_t r = 0; r < rows.count; r += 2 * TILE_ROWS) {
        const bool two = rows.count - r > TILE_ROWS;
        const RowTile tile[2] = {RowTile(rows, r), RowTile(rows, two ? r + TILE_ROWS : r)};
        for (int j = 0; j <= two; j++) transpose_tile<D>(tile[j], transposed + j * TILE_ROWS * 2 * P);
        const uint8_t* next = rows.weight(r + 2 * TILE_ROWS);
        for (int64_t t = 0; t < tokens; t += 2 * TOKEN_TILE, next += step_bytes * steps) {
            const int64_t count = tokens - t < 2 * TOKEN_TILE ? tokens - t : 2 * TOKEN_TILE;
            alignas(64) TileSums sum[4];
            const auto two_tiles = two ? multiply_transposed<D, 2, 2> : multiply_transposed<D, 2, 1>;
            const auto one_tile = two ? multiply_transposed<D, 1, 2> : multiply_transposed<D, 1, 1>;
            (count > TOKEN_TILE ? two_tiles : one_tile)(tile, transposed, x + t * P, sum, next, step_bytes);
            for (int j = 0; j <= two; j++)
                for (int64_t n = 0; n < count; n++) {
                    const float* sums = sum[n / TOKEN_TILE * 2 + j][n % TOKEN_TILE];
                    float* to = y + (t + n) * y_stride + r + j * TILE_ROWS;
                    _mm512_mask_storeu_ps(to, tile[j].row_mask(), _mm512_load_ps(sums));
                }
        }
    }
}

template <class D>
void matmul_few_tokens(const RowBlock& rows, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    const int64_t stride = padded(rows.layout.I);
    for (int64_t r = 0; r < rows.count; r += 2 * TILE_ROWS) {
        const bool two = rows.count - r > TILE_ROWS;
        const RowTile tile[2] = {RowTile(rows, r), RowTile(rows, two ? r + TILE_ROWS : r)};
        const auto one_token = two ? multiply_few_tokens<D, 1, 2> : multiply_few_tokens<D, 1, 1>;
        const auto two_tokens = two ? multiply_few_tokens<D, 2, 2> : multiply_few_tokens<D, 2, 1>;
        for (int64_t t = 0; t < tokens; t += MAX_COLUMNS) {
            const int64_t count = tokens - t < MAX_COLUMNS ? tokens - t : MAX_COLUMNS;
            __m512 sum[2 * MAX_COLUMNS];
            (count == 1 ? one_token : two_tokens)(tile, rows.layout.row_bytes(), x + t * stride, stride, sum);
            for (int j = 0; j <= two; j++)
                for (int64_t n = 0; n < count; n++) {
                    float* to = y + (t + n) * y_stride + r + j * TILE_ROWS;
                    _mm512_mask_storeu_ps(to, tile[j].row_mask(), sum[2 * n + j]);
                }
        }
    }
}

template <class D>
void matmul(const RowBlock& rows, const uint8_t* token, int64_t tokens, float* y, int64_t y_stride) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(token);
    TileConfig config;
    if (tokens >= MIN_TRANSPOSED_TOKENS) {
        config.set_shape(SUMS, 4, TOKEN_TILE, 4 * TILE_ROWS);
        config.set_shape(TOKENS, 2, TOKEN_TILE, 64);
        config.set_shape(TRANSPOSED, 2, 16, 4 * TILE_ROWS);
        config.load();
        matmul_many_tokens<D>(rows, x, tokens, y, y_stride);
    } else {
        config.set_shape(COLUMNS, 4, TILE_ROWS, 4);
        config.set_shape(WEIGHTS, 2, TILE_ROWS, 64);
        config.set_shape(TOKEN, MAX_COLUMNS, 16, 4);
        config.load();
        matmul_few_tokens<D>(rows, x, tokens, y, y_stride);
    }
}

}  // namespace

void matmul_bf16_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul<Bf16>(rows, x, tokens, y, y_stride);
}

void matmul_fp8_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul<Fp8>(rows, x, tokens, y, y_stride);
}

void matmul_fp8_row_amx(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul<Fp8Row>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
