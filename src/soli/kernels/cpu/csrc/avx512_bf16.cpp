// The AVX-512 kernels for bfloat16 tokens and weights in bfloat16, FP8 or FP4: all are decoded to exact bfloat16, and
// vdpbf16ps multiplies 32 at a time with float32 sums; the sum of those that share a scale is then multiplied by it.
// Neither weights nor scales are rounded.
//
// Template parameters: D decoder, R rows and N tokens of a register tile.
#include "avx512_bf16.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int64_t TILE_ROWS = 4;
constexpr int64_t ONE_TOKEN_ROWS = 8;      // of a tile for a single token
constexpr int64_t MIN_DECODED_TOKENS = 8;  // from which an FP8 or FP4 row is decoded once for all

// Large bfloat16 matrices are read one row after another, without prefetching: hardware follows a single stream from
// memory faster (Zen 4: 30 GB/s a core) than it answers prefetches (22). More tokens take longer over a row than
// reading it does, and smaller matrices are likely in a cache.
constexpr int64_t MIN_STREAMED_BYTES = 1 << 18;
constexpr int64_t MAX_STREAMED_TOKENS = 3;

__m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

template <class D>
struct WithoutPrefetch : D {
    static void prefetch(const Row&, int64_t, int64_t) {}
};

// Format D, decoded before: the same numbers in the same order, so the same bits.
template <class D>
struct Decoded : WithoutPrefetch<D> {
    template <bool FULL>
    static void decode(const Row& row, int64_t k, int64_t, __m512i* out) {
        for (int v = 0; v < D::VECS; v++) out[v] = _mm512_loadu_si512(row.decoded + k + 32 * v);
    }
};

// Adds one chunk of inputs from k on.
template <class D, int R, int N, bool FULL>
inline void add_chunk(const Row* row, int64_t k, int64_t remaining, const uint16_t* x, int64_t x_stride,
                      __m512 (*sum)[N]) {
    for (int r = 0; r < R; r++) {
        __m512i w[D::VECS];
        D::template decode<FULL>(row[r], k, remaining, w);
        __m512 scale[D::PARTS];
        D::template scales<FULL>(row[r], k, remaining, scale);
        for (int n = 0; n < N; n++) {
            const uint16_t* token = x + n * x_stride + k;
            for (int p = 0; p < D::PARTS; p++) {
                __m512 part = D::SCALED ? _mm512_setzero_ps() : sum[r][n];
                for (int v = p * D::VECS / D::PARTS; v < (p + 1) * D::VECS / D::PARTS; v++)
                    part = dot(part, w[v], _mm512_loadu_si512(token + 32 * v));
                sum[r][n] = D::SCALED ? _mm512_fmadd_ps(part, scale[p], sum[r][n]) : part;
            }
        }
    }
}

template <class D, int R, int N>
void register_tile(const Row* row, const Layout& layout, const uint16_t* x, int64_t x_stride, float* y,
                   int64_t y_stride) {
    const int64_t I = layout.I;
    const int64_t full_chunks_end = I / D::CHUNK * D::CHUNK;
    // Prefetches the next tile of rows, or with short rows the one after it, so that it comes in time.
    const int64_t tiles_ahead = layout.row_bytes() < 1024 ? 2 : 1;
    const int64_t distance = layout.row_bytes() * tiles_ahead * R;
    for (int r = 0; D::SCALED && r < R; r++) prefetch_line<64>(row[r].scale, 0, layout.scale_bytes() * tiles_ahead * R);
    __m512 sum[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < full_chunks_end; k += D::CHUNK) {
        add_chunk<D, R, N, true>(row, k, D::CHUNK, x, x_stride, sum);
        for (int r = 0; r < R; r++) D::prefetch(row[r], k, distance);
    }
    if (full_chunks_end < I) add_chunk<D, R, N, false>(row, full_chunks_end, I - full_chunks_end, x, x_stride, sum);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) y[n * y_stride + r] = _mm512_reduce_add_ps(sum[r][n]);
}

// R rows for all tokens.
template <class D, int R>
void all_tokens(const Row* row, const Layout& layout, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    const int64_t stride = padded(layout.I);
    for (; tokens >= 4; tokens -= 4, x += 4 * stride, y += 4 * y_stride)
        register_tile<D, R, 4>(row, layout, x, stride, y, y_stride);
    if (tokens == 3) register_tile<D, R, 3>(row, layout, x, stride, y, y_stride);
    if (tokens == 2) register_tile<D, R, 2>(row, layout, x, stride, y, y_stride);
    if (tokens == 1) register_tile<D, R, 1>(row, layout, x, stride, y, y_stride);
}

template <class D>
void decode_rows(Row* row, int64_t count, int64_t I, uint16_t* decoded) {
    for (int64_t r = 0; r < count; r++) {
        uint16_t* to = decoded + r * padded(I);
        for (int64_t k = 0; k < I; k += D::CHUNK) {
            __m512i w[D::VECS];
            D::template decode<false>(row[r], k, I - k, w);
            for (int v = 0; v < D::VECS; v++) _mm512_storeu_si512(to + k + 32 * v, w[v]);
        }
        row[r].decoded = to;
    }
}

template <class D>
void stream_rows(const RowBlock& rows, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    for (int64_t r = 0; r < rows.count; r++) {
        const Row row = {rows.weight(r), rows.scale(r), nullptr};
        all_tokens<WithoutPrefetch<D>, 1>(&row, rows.layout, x, tokens, y + r, y_stride);
    }
}

template <class D>
void matmul_bf16(const RowBlock& rows, const uint8_t* token, int64_t tokens, float* y, int64_t y_stride) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(token);
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    uint16_t* decoded = nullptr;
    if (D::SCALED && tokens >= MIN_DECODED_TOKENS && scratch.reserve(TILE_ROWS * padded(layout.I) * 2))
        decoded = scratch.take<uint16_t>(TILE_ROWS * padded(layout.I));
    if (!D::SCALED && tokens <= MAX_STREAMED_TOKENS && layout.O * layout.row_bytes() >= MIN_STREAMED_BYTES)
        return stream_rows<D>(rows, x, tokens, y, y_stride);
    for (int64_t r = 0; r < rows.count;) {
        const int64_t remaining = rows.count - r;
        const int64_t count = remaining >= ONE_TOKEN_ROWS && tokens == 1 ? ONE_TOKEN_ROWS
                              : remaining >= TILE_ROWS                   ? TILE_ROWS
                                                                         : 1;
        Row row[ONE_TOKEN_ROWS];
        for (int64_t i = 0; i < count; i++) row[i] = {rows.weight(r + i), rows.scale(r + i), nullptr};
        if (count == ONE_TOKEN_ROWS) {
            register_tile<D, ONE_TOKEN_ROWS, 1>(row, layout, x, 0, y + r, y_stride);
        } else if (decoded) {
            decode_rows<D>(row, count, layout.I, decoded);
            if (count == TILE_ROWS) all_tokens<Decoded<D>, TILE_ROWS>(row, layout, x, tokens, y + r, y_stride);
            else all_tokens<Decoded<D>, 1>(row, layout, x, tokens, y + r, y_stride);
        } else if (count == TILE_ROWS) {
            all_tokens<D, TILE_ROWS>(row, layout, x, tokens, y + r, y_stride);
        } else {
            all_tokens<D, 1>(row, layout, x, tokens, y + r, y_stride);
        }
        r += count;
    }
}

}  // namespace

void matmul_bf16_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_bf16<Bf16>(rows, x, tokens, y, y_stride);
}

void matmul_fp8_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_bf16<Fp8>(rows, x, tokens, y, y_stride);
}

void matmul_fp8_row_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    matmul_bf16<Fp8Row>(rows, x, tokens, y, y_stride);
}

void matmul_fp4_avx512(const RowBlock& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    if (rows.layout.group == 16) matmul_bf16<Fp4<16>>(rows, x, tokens, y, y_stride);
    else matmul_bf16<Fp4<32>>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
