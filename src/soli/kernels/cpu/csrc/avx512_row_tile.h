// Sixteen rows of a matrix at a time: what the kernels share that multiply along the rows.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

constexpr int64_t TILE_ROWS = 16;  // one for each lane of a float32 vector, and for each row of an AMX tile

// Sixteen rows of a matrix from `first` on, the last one again where there are fewer.
struct RowTile {
    const uint8_t* weight[TILE_ROWS];
    const uint8_t* scale[TILE_ROWS];
    int64_t I;
    int64_t count;  // rows that exist
    bool has_bf16_scales;

    RowTile(const RowBlock& rows, int64_t first)
        : I(rows.layout.I),
          count(rows.count - first < TILE_ROWS ? rows.count - first : TILE_ROWS),
          has_bf16_scales(rows.layout.has_bf16_scales()) {
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const int64_t row = first + (r < count ? r : count - 1);
            weight[r] = rows.weight(row);
            scale[r] = rows.scale(row);
        }
    }
    // A bit for each row that exists.
    __mmask16 row_mask() const { return static_cast<__mmask16>((1 << count) - 1); }
};

// Transposes sixteen rows a[0] ... a[15] of sixteen units of four bytes: to[64 * unit + 4 * row].
SOLI_INLINE void transpose(const __m512i* a, uint8_t* to) {
    __m512i b[16];  // b[4 q + u]: in 128 bits i unit 4 i + u of rows 4 q ... 4 q + 3
    for (int q = 0; q < 4; q++) {
        const __m512i* rows = a + 4 * q;
        const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]);
        const __m512i high = _mm512_unpackhi_epi32(rows[0], rows[1]);
        const __m512i low2 = _mm512_unpacklo_epi32(rows[2], rows[3]);
        const __m512i high2 = _mm512_unpackhi_epi32(rows[2], rows[3]);
        b[4 * q] = _mm512_unpacklo_epi64(low, low2);
        b[4 * q + 1] = _mm512_unpackhi_epi64(low, low2);
        b[4 * q + 2] = _mm512_unpacklo_epi64(high, high2);
        b[4 * q + 3] = _mm512_unpackhi_epi64(high, high2);
    }
    for (int u = 0; u < 4; u++) {
        const __m512i low = _mm512_shuffle_i32x4(b[u], b[4 + u], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(b[u], b[4 + u], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + u], b[12 + u], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(b[8 + u], b[12 + u], 0xee);
        _mm512_store_si512(to + 64 * u, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_store_si512(to + 64 * (4 + u), _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_store_si512(to + 64 * (8 + u), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_store_si512(to + 64 * (12 + u), _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

}  // namespace
}  // namespace soli
