// The AVX-512 kernels for bfloat16 tokens and weights in bfloat16 or FP8: either becomes exact bfloat16 codes, multiplied
// 32 at a time by vdpbf16ps with float32 sums; each block's sum is then multiplied by the block's scale. Scales and codes
// are never rounded.
#include "avx512_bf16.h"
#include "scratch.h"

namespace soli {
namespace {

__m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// One row after another, so that nothing need be asked for: hardware follows a single stream from memory faster (Zen 4: 30
// GB/s a core) than it answers what is asked for (22). More tokens take longer over a row than reading it does, and smaller
// matrices are likely in a cache.
constexpr int64_t STREAM = 1 << 18, STREAM_TOKENS = 3;  // bytes; tokens

template <class D>
struct Streamed : D {
    static void prefetch(const Row&, int64_t, int64_t) {}
};

// Format D with its codes unpacked before: the same numbers in the same order, so the same bits.
template <class D>
struct Unpacked : Streamed<D> {
    template <bool FULL>
    static void codes(const Row& row, int64_t k, int64_t, __m512i* out) {
        for (int v = 0; v < D::VECS; v++) out[v] = _mm512_loadu_si512(row.codes + k + 32 * v);
    }
};

template <class D, int R, int N, bool FULL>
inline void step(const Row* row, int64_t k, int64_t left, const uint16_t* x, int64_t x_stride, __m512 (*sum)[N]) {
    for (int r = 0; r < R; r++) {
        __m512i w[D::VECS];
        D::template codes<FULL>(row[r], k, left, w);
        const __m512 scale = D::template scale<FULL>(row[r], k, left);
        for (int n = 0; n < N; n++) {
            const uint16_t* token = x + n * x_stride + k;
            __m512 part = D::SCALED ? _mm512_setzero_ps() : sum[r][n];
            for (int v = 0; v < D::VECS; v++) part = dot(part, w[v], _mm512_loadu_si512(token + 32 * v));
            sum[r][n] = D::SCALED ? _mm512_fmadd_ps(part, scale, sum[r][n]) : part;
        }
    }
}

template <class D, int R, int N>
void tile(const Row* row, const Layout& layout, const uint16_t* x, int64_t x_stride, float* y, int64_t y_stride) {
    const int64_t I = layout.I, whole = I / D::CHUNK * D::CHUNK;
    // What is asked for ahead: the next band of rows, or with short rows the one after it, so that it comes in time.
    const int64_t bands = layout.row_bytes() < 1024 ? 2 : 1, ahead = layout.row_bytes() * bands * R;
    for (int r = 0; D::SCALED && r < R; r++) prefetch_line<64>(row[r].scale, 0, layout.scale_bytes() * bands * R);
    __m512 sum[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < whole; k += D::CHUNK) {
        step<D, R, N, true>(row, k, D::CHUNK, x, x_stride, sum);
        for (int r = 0; r < R; r++) D::prefetch(row[r], k, ahead);
    }
    if (whole < I) step<D, R, N, false>(row, whole, I - whole, x, x_stride, sum);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) y[n * y_stride + r] = _mm512_reduce_add_ps(sum[r][n]);
}

// R rows for all tokens.
template <class D, int R>
void band(const Row* row, const Layout& layout, const uint16_t* x, int64_t tokens, float* y, int64_t y_stride) {
    const int64_t stride = padded(layout.I);
    for (; tokens >= 4; tokens -= 4, x += 4 * stride, y += 4 * y_stride)
        tile<D, R, 4>(row, layout, x, stride, y, y_stride);
    if (tokens == 3) tile<D, R, 3>(row, layout, x, stride, y, y_stride);
    if (tokens == 2) tile<D, R, 2>(row, layout, x, stride, y, y_stride);
    if (tokens == 1) tile<D, R, 1>(row, layout, x, stride, y, y_stride);
}

constexpr int64_t BAND = 4, UNPACK_FROM = 8;  // rows at a time; tokens from which a row is unpacked once for all

template <class D>
void unpack(Row* row, int64_t count, int64_t I, uint16_t* codes) {
    for (int64_t r = 0; r < count; r++) {
        uint16_t* to = codes + r * padded(I);
        for (int64_t k = 0; k < I; k += D::CHUNK) {
            __m512i w[D::VECS];
            D::template codes<false>(row[r], k, I - k, w);
            for (int v = 0; v < D::VECS; v++) _mm512_storeu_si512(to + k + 32 * v, w[v]);
        }
        row[r].codes = to;
    }
}

template <class D>
void dots16(const Rows& rows, const uint8_t* token, int64_t tokens, float* y, int64_t y_stride) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(token);
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    uint16_t* codes = nullptr;
    if (D::SCALED && tokens >= UNPACK_FROM && scratch.reserve(BAND * padded(layout.I) * 2))
        codes = scratch.take<uint16_t>(BAND * padded(layout.I));
    if (!D::SCALED && tokens <= STREAM_TOKENS && layout.O * layout.row_bytes() >= STREAM) {
        for (int64_t r = 0; r < rows.count; r++) {
            const Row row = {rows.weight(r), rows.scale(r), nullptr};
            band<Streamed<D>, 1>(&row, layout, x, tokens, y + r, y_stride);
        }
        return;
    }
    for (int64_t r = 0; r < rows.count;) {
        const int64_t count = rows.count - r >= 8 && tokens == 1 ? 8 : rows.count - r >= BAND ? BAND : 1;
        Row row[8];
        for (int64_t i = 0; i < count; i++) row[i] = {rows.weight(r + i), rows.scale(r + i), nullptr};
        if (count == 8) tile<D, 8, 1>(row, layout, x, 0, y + r, y_stride);
        else if (codes) {
            unpack<D>(row, count, layout.I, codes);
            if (count == BAND) band<Unpacked<D>, BAND>(row, layout, x, tokens, y + r, y_stride);
            else band<Unpacked<D>, 1>(row, layout, x, tokens, y + r, y_stride);
        } else if (count == BAND) band<D, BAND>(row, layout, x, tokens, y + r, y_stride);
        else band<D, 1>(row, layout, x, tokens, y + r, y_stride);
        r += count;
    }
}

}  // namespace

void dots16_bf16(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16<Bf16>(rows, x, tokens, y, y_stride);
}

void dots16_fp8(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    dots16<Fp8>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
