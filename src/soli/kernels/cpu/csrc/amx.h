// The tile registers of AMX: eight, of up to 16 rows of 64 bytes. A tile product adds A (rows, k) times B (k, columns)
// to a third tile. Here A holds rows of tokens or of weights, in place. B holds columns, four bytes of each side by
// side (two bfloat16 or four int8 values); for a single column that is a token in place.
//
// Written as assembly, because a compiler may move a store past the load of a tile that reads it.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

// Sets the tiles' shapes; releases the registers at the end, since a processor with tiles in use sleeps less deeply.
class TileConfig {
public:
    ~TileConfig() { __asm__ volatile("tilerelease" ::: "memory"); }

    // Of `count` tiles from `first` on.
    void set_shape(int first, int count, int rows, int row_bytes) {
        for (int t = first; t < first + count; t++) {
            config_.rows[t] = static_cast<uint8_t>(rows);
            config_.row_bytes[t] = static_cast<uint16_t>(row_bytes);
        }
    }
    void load() const { __asm__ volatile("ldtilecfg %0" ::"m"(config_) : "memory"); }

private:
    struct Config {  // as the instruction reads it
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    alignas(64) Config config_;
};

template <int TILE>
SOLI_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE) : "memory");
}

template <int TILE>
SOLI_INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
SOLI_INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}

// Tile SUM += tile A times tile B, of bfloat16, in float32.
template <int SUM, int A, int B>
SOLI_INLINE void tile_multiply_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B) : "memory");
}

// Tile SUM += tile A times tile B, of signed bytes, in int32.
template <int SUM, int A, int B>
SOLI_INLINE void tile_multiply_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B) : "memory");
}

}  // namespace
}  // namespace soli
