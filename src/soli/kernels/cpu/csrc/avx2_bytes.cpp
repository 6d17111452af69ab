// The AVX2 kernels for bfloat16 tokens and weights in int8 or int4: vpmaddubsw multiplies 32 bytes at once.
//
// It adds two products of a byte without and a byte with sign into 16 bits. Those hold eight such sums of nibbles
// (16 * 15 * 127 = 30,480) and of bytes not even one. So many tokens meet int8 as two planes of nibbles, 16 * high + low,
// and a few meet the weights' sizes, with their signs moved over to the token (2 * 128 * 127 = 32,512).
#include "avx2.h"
#include "bytes.h"
#include "scratch.h"

namespace soli {
namespace {

constexpr int64_t EIGHT = 8;  // rows: one for each lane of a vector
constexpr int PLANES = 2;     // beside many tokens: of int4 two times eight rows, of int8 two nibbles of eight rows
constexpr int64_t UNIT = 32 * PLANES;  // bytes of four inputs, turned

SOLI_INLINE __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

SOLI_INLINE __m256i nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }

// sum + product, now: left alone, GCC makes all products first, for a tree of sums, and runs out of registers.
SOLI_INLINE __m256i add_now(__m256i sum, __m256i product) {
    sum = _mm256_add_epi16(sum, product);
    __asm__("" : "+x"(sum));
    return sum;
}

// Eight rows of a matrix from `first` on, the last one again where there are fewer.
struct Strip {
    const uint8_t* weight[EIGHT];
    const uint8_t* scale[EIGHT];
    int64_t I;

    Strip(const Rows& rows, int64_t first) : I(rows.layout.I) {
        for (int64_t r = 0; r < EIGHT; r++) {
            const int64_t row = first + r < rows.count ? first + r : rows.count - 1;
            weight[r] = rows.weight(row), scale[r] = rows.scale(row);
        }
    }
};

void store(__m256 sum, int64_t count, float* y) {
    if (count >= EIGHT) return _mm256_storeu_ps(y, sum);
    alignas(32) float each[EIGHT];
    _mm256_store_ps(each, sum);
    __builtin_memcpy(y, each, 4 * count);
}

// The scales of eight rows, group after group: to[8 * g + r], up to a whole eight of groups. Those of eight rows further
// than the next are asked for.
void transpose_scales(const Strip& strip, int64_t groups, float* to) {
    for (int64_t line = 0; line < 2 * groups * EIGHT; line += 64) ask(strip.scale[0] + 4 * groups * EIGHT + line);
    for (int64_t g = 0; g < groups; g += 8) {
        __m128i a[8], b[8];
        for (int r = 0; r < 8; r++) {
            alignas(16) uint16_t part[8] = {};
            if (groups - g >= 8) __builtin_memcpy(part, strip.scale[r] + 2 * g, 16);
            else __builtin_memcpy(part, strip.scale[r] + 2 * g, 2 * (groups - g));
            a[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(part));
        }
        for (int level = 0; level < 3; level++) {
            for (int r = 0; r < 4; r++)
                b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]), b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
            for (int r = 0; r < 8; r++) a[r] = b[r];
        }
        for (int c = 0; c < 8; c++, to += 8) _mm256_store_ps(to, _mm256_cvtph_ps(a[c]));
    }
}

// The products of one row with N tokens, `C` inputs from k on; of int4 the first 128 bits belong to another run of 32 than
// the last.
template <int64_t FORMAT, int C, int N, bool FULL>
SOLI_INLINE void multiply(const uint8_t* row, int64_t k, const uint8_t* x, int64_t stride, __m256i (*part)[EIGHT],
                          int r) {
    for (int n = 0; n < N; n++) part[n][r] = _mm256_setzero_si256();
    for (int64_t at = k; at < k + C; at += FORMAT == INT4 ? 64 : 32) {
        if (FORMAT == INT4) {
            const __m128i* half = reinterpret_cast<const __m128i*>(row + at / 2);
            const __m256i w = FULL ? load(row + at / 2) : _mm256_zextsi128_si256(_mm_loadu_si128(half));
            const __m256i first = nibbles(w), second = nibbles(_mm256_srli_epi16(w, 4));
            const uint8_t* codes = x + at / 128 * 128 + at % 128 / 2;
            for (int n = 0; n < N; n++, codes += stride) {
                const __m256i sums = _mm256_maddubs_epi16(first, load(codes));
                part[n][r] =
                    _mm256_add_epi32(part[n][r],
                                     paired(_mm256_add_epi16(sums, _mm256_maddubs_epi16(second, load(codes + 64)))));
            }
        } else {
            const __m256i w = load(row + at), size = _mm256_abs_epi8(w);
            for (int n = 0; n < N; n++) {
                const __m256i turned = _mm256_sign_epi8(load(x + n * stride + at), w);
                part[n][r] = _mm256_add_epi32(part[n][r], paired(_mm256_maddubs_epi16(size, turned)));
            }
        }
    }
}

// Eight results of each of N tokens, along the inputs, for inputs k ... k + C. LINES of each row are asked for.
template <int64_t FORMAT, int G, int C, int N, int LINES, bool FULL = true>
SOLI_INLINE void few_step(const Strip& strip, const float* scales, int64_t k, int64_t ahead, const uint8_t* x,
                          int64_t stride, __m256* sum) {
    __m256i part[N][EIGHT];
#pragma GCC unroll 8
    for (int r = 0; r < EIGHT; r++) {
        multiply<FORMAT, C, N, FULL>(strip.weight[r], k, x, stride, part, r);
        const uint8_t* line = strip.weight[r] + (FORMAT == INT4 ? k / 2 : k) + ahead;
        for (int i = 0; i < LINES; i++) ask(line + 64 * i);
    }
    for (int n = 0; n < N; n++) {
        const Token token(x + n * stride, padded(strip.I));
        const __m256i upper = four(part[n]), lower = four(part[n] + 4);
        __m256i total[2] = {_mm256_permute2x128_si256(upper, lower, 0x20),
                            _mm256_permute2x128_si256(upper, lower, 0x31)};
        if (C == G) total[0] = _mm256_add_epi32(total[0], total[1]);
        const __m256 of_token = _mm256_set1_ps(token.scales[k / 128]);
        for (int g = 0; g < (FULL ? C / G : 1); g++) {
            __m256i exact = total[g];
            if (FORMAT == INT4) exact = _mm256_add_epi32(exact, _mm256_set1_epi32(token.starts[k / 32 + g * (G / 32)]));
            const __m256 each = _mm256_mul_ps(_mm256_load_ps(scales + 8 * (k / G + g)), of_token);
            sum[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), each, sum[n]);
        }
    }
}

template <int64_t FORMAT, int G, int N>
void few(const Strip& strip, const float* scales, const uint8_t* x, int64_t stride, int64_t row_bytes, __m256* sum) {
    constexpr int C = FORMAT == INT4 && G == 32 ? 64 : G;
    const int64_t next = EIGHT * row_bytes, ahead = next < LEAST_AHEAD ? LEAST_AHEAD : next;
    for (int n = 0; n < N; n++) sum[n] = _mm256_setzero_ps();
    constexpr int LINES = FORMAT == INT4 ? 1 : 2;  // of 128 inputs
    int64_t k = 0;
    for (; k + 128 <= strip.I; k += 128) {
        few_step<FORMAT, G, C, N, LINES>(strip, scales, k, ahead, x, stride, sum);
#pragma GCC unroll 4
        for (int64_t more = C; more < 128; more += C)
            few_step<FORMAT, G, C, N, 0>(strip, scales, k + more, 0, x, stride, sum);
    }
    for (; k + C <= strip.I; k += C) few_step<FORMAT, G, C, N, 0>(strip, scales, k, 0, x, stride, sum);
    if (C > G && k < strip.I) few_step<FORMAT, G, C, N, 0, false>(strip, scales, k, 0, x, stride, sum);
}

// Eight rows of eight units of four bytes to columns, UNIT bytes apart.
SOLI_INLINE void turn(const __m256i* a, uint8_t* const* to) {
    __m256i b[8];
    for (int q = 0; q < 2; q++) {
        const __m256i *in = a + 4 * q, low = _mm256_unpacklo_epi32(in[0], in[1]),
                      high = _mm256_unpackhi_epi32(in[0], in[1]);
        const __m256i low2 = _mm256_unpacklo_epi32(in[2], in[3]), high2 = _mm256_unpackhi_epi32(in[2], in[3]);
        b[4 * q] = _mm256_unpacklo_epi64(low, low2), b[4 * q + 1] = _mm256_unpackhi_epi64(low, low2);
        b[4 * q + 2] = _mm256_unpacklo_epi64(high, high2), b[4 * q + 3] = _mm256_unpackhi_epi64(high, high2);
    }  // b[4 q + u]: in 128 bits i unit 4 i + u of rows 4 q ... 4 q + 3
    for (int i = 0; i < 2; i++)
        for (int u = 0; u < 4; u++) {
            const __m256i unit =
                i ? _mm256_permute2x128_si256(b[u], b[4 + u], 0x31) : _mm256_permute2x128_si256(b[u], b[4 + u], 0x20);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to[i] + UNIT * u), unit);
        }
}

// Eight rows for many tokens. Of each 32 inputs come eight units in turn; of int4 four of the run's first half, then four
// of its second: to[UNIT * unit + 4 * row].
template <int64_t FORMAT>
void turn_strip(const Strip& strip, uint8_t* to) {
    constexpr int64_t RUN = 8 * UNIT, INPUTS = FORMAT == INT4 ? 64 : 32;
    for (int64_t k = 0; k < strip.I; k += INPUTS) {
        __m256i first[EIGHT], second[EIGHT];
        for (int64_t r = 0; r < EIGHT; r++) {
            const uint8_t* from = strip.weight[r] + (FORMAT == INT4 ? k / 2 : k);
            const bool half = FORMAT == INT4 && k + 32 == strip.I;
            __m256i w =
                half ? _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))) : load(from);
            if (FORMAT == INT8) w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            first[r] = nibbles(w), second[r] = nibbles(_mm256_srli_epi16(w, 4));
        }
        uint8_t* run = to + k / 32 * RUN;
        uint8_t* const halves[2] = {run, run + RUN};                    // of two runs the first half
        uint8_t* const others[2] = {run + RUN / 2, run + RUN * 3 / 2};  // and the second
        uint8_t* const low[2] = {run, run + RUN / 2};                   // of one run the low nibbles
        uint8_t* const high[2] = {low[0] + 32, low[1] + 32};
        turn(first, FORMAT == INT4 ? halves : low), turn(second, FORMAT == INT4 ? others : high);
    }
}

// A band's results for each of N tokens, along the rows: int4's sixteen rows, or int8's eight.
template <int64_t FORMAT, int G, int N>
void some(const Turned& band, Turned::Ahead ahead, const uint8_t* x, __m256 (*sum)[PLANES]) {
    const int64_t stride = band.stride, P = padded(band.I), of_strip = (band.I / G + 7) / 8 * 64;
    __m256i total[N][PLANES];
    for (int n = 0; n < N; n++) sum[n][0] = sum[n][1] = _mm256_setzero_ps();
    const uint8_t* weights = band.weights;
    for (int64_t k = 0; k < band.I; k += 32) {
        if (k % 128 == 0) ahead.ask();
        const uint8_t* codes = x + (FORMAT == INT4 ? k / 128 * 128 + k % 128 / 2 : k);
        __m256i part[N][PLANES];
        for (int n = 0; n < N; n++) part[n][0] = part[n][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int u = 0; u < 8; u++, weights += UNIT) {
            const __m256i w0 = load(weights), w1 = load(weights + 32);
            for (int n = 0; n < N; n++) {
                int32_t unit;
                __builtin_memcpy(&unit, codes + n * stride + 4 * u + (FORMAT == INT4 && u >= 4 ? 48 : 0), 4);
                const __m256i four_codes = _mm256_set1_epi32(unit);
                part[n][0] = add_now(part[n][0], _mm256_maddubs_epi16(w0, four_codes));
                part[n][1] = add_now(part[n][1], _mm256_maddubs_epi16(w1, four_codes));
            }
        }
        for (int n = 0; n < N; n++)
            for (int p = 0; p < PLANES; p++) {
                const __m256i found = paired(part[n][p]);
                total[n][p] = k % G ? _mm256_add_epi32(total[n][p], found) : found;
            }
        if ((k + 32) % G) continue;
        const int64_t g = k / G;
        const __m256 scale0 = _mm256_load_ps(band.scales + 8 * g);
        const __m256 scale1 = FORMAT == INT4 ? _mm256_load_ps(band.scales + of_strip + 8 * g) : scale0;
        for (int n = 0; n < N; n++) {
            const Token token(x + n * stride, P);
            const __m256i start = _mm256_set1_epi32(token.starts[g * (G / 32)]);
            const __m256 of_token = _mm256_set1_ps(token.scales[k / 128]);
            const __m256i second = FORMAT == INT4 ? total[n][1] : _mm256_slli_epi32(total[n][1], 4);
            const __m256i exact =
                _mm256_add_epi32(start, FORMAT == INT4 ? total[n][0] : _mm256_add_epi32(total[n][0], second));
            sum[n][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_mul_ps(scale0, of_token), sum[n][0]);
            if (FORMAT != INT4) continue;
            const __m256i exact1 = _mm256_add_epi32(start, second);
            sum[n][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact1), _mm256_mul_ps(scale1, of_token), sum[n][1]);
        }
    }
}

constexpr int64_t MOST_FEW = 3, FROM = 8,
                  MOST = 4;  // tokens: along the inputs at once; from which rows are turned; then at once

using Few = void (*)(const Strip&, const float*, const uint8_t*, int64_t, int64_t, __m256*);
template <int64_t FORMAT, int G>
constexpr Few FEW[] = {few<FORMAT, G, 1>, few<FORMAT, G, 2>, few<FORMAT, G, 3>};
using Some = void (*)(const Turned&, Turned::Ahead, const uint8_t*, __m256 (*)[PLANES]);
template <int64_t FORMAT, int G>
constexpr Some SOME[] = {some<FORMAT, G, 1>, some<FORMAT, G, 2>, some<FORMAT, G, 3>, some<FORMAT, G, 4>};

template <int64_t FORMAT, int G>
void many_tokens(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride, Scratch& scratch) {
    constexpr int64_t BAND = FORMAT == INT4 ? 2 * EIGHT : EIGHT;
    const Layout& layout = rows.layout;
    const int64_t of_strip = (layout.I / G + 7) / 8 * 64, bytes = layout.row_bytes() * BAND;
    float* scales = scratch.take<float>(PLANES * of_strip);
    uint8_t* turned = scratch.take<uint8_t>(8 * PLANES * padded(layout.I));
    for (int64_t r = 0; r < rows.count; r += BAND) {
        for (int64_t s = 0; s < BAND / EIGHT; s++) {
            const Strip strip(rows, r + s * EIGHT);
            transpose_scales(strip, layout.I / G, scales + s * of_strip), turn_strip<FORMAT>(strip, turned + 32 * s);
        }
        const Turned band = {turned, scales, layout.I, layout.token16_bytes(), rows.weight(r) + bytes, bytes};
        const int64_t pieces = (tokens + MOST - 1) / MOST;
        for (int64_t t = 0, piece = 0; t < tokens; piece++) {
            const int64_t count = portion(tokens - t, MOST);
            __m256 sum[MOST][PLANES];
            SOME<FORMAT, G>[count - 1](band, band.ahead(piece, pieces), x + t * band.stride, sum);
            for (int64_t n = 0; n < count; n++)
                for (int64_t s = 0; s < BAND / EIGHT && r + s * EIGHT < rows.count; s++)
                    store(sum[n][s], rows.count - r - s * EIGHT, y + (t + n) * y_stride + r + s * EIGHT);
            t += count;
        }
    }
}

template <int64_t FORMAT, int G>
void run(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    static thread_local Scratch scratch;
    const Layout& layout = rows.layout;
    const int64_t groups = layout.I / G, stride = layout.token16_bytes();
    if (!scratch.reserve(4 * PLANES * 8 * (groups + 7) + 8 * PLANES * padded(layout.I))) __builtin_trap();
    if (tokens >= FROM) return many_tokens<FORMAT, G>(rows, x, tokens, y, y_stride, scratch);
    float* scales = scratch.take<float>((groups + 7) / 8 * 64);
    for (int64_t r = 0; r < rows.count; r += EIGHT) {
        const Strip strip(rows, r);
        transpose_scales(strip, groups, scales);
        for (int64_t t = 0; t < tokens;) {
            const int64_t count = portion(tokens - t, MOST_FEW);
            __m256 sum[MOST_FEW];
            FEW<FORMAT, G>[count - 1](strip, scales, x + t * stride, stride, layout.row_bytes(), sum);
            for (int64_t n = 0; n < count; n++) store(sum[n], rows.count - r, y + (t + n) * y_stride + r);
            t += count;
        }
    }
}

template <int64_t FORMAT>
void any_group(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    const int64_t G = rows.layout.group;
    (G == 32 ? run<FORMAT, 32> : G == 64 ? run<FORMAT, 64> : run<FORMAT, 128>)(rows, x, tokens, y, y_stride);
}

}  // namespace

void dots16_int8_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    any_group<INT8>(rows, x, tokens, y, y_stride);
}

void dots16_int4_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride) {
    any_group<INT4>(rows, x, tokens, y, y_stride);
}

}  // namespace soli
