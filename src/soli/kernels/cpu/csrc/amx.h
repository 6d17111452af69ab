// The tile registers of AMX: eight, of up to 16 rows of 64 bytes; a product adds a (rows of a, k) times (k, columns of b)
// into a third. Here the left side holds tokens or weights as they lie, in rows; the right side holds columns, units of
// four bytes of each side by side, which for one column is a token as it lies.
//
// Written as assembly, because a compiler may move a store past the load of a tile that reads it.
#pragma once
#include "avx512.h"

namespace soli {
namespace {

// Sets the tiles' shapes; gives the registers back at the end, since a processor that holds tiles sleeps less deeply.
class Tiles {
public:
    ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

    // Tile `first` and `count - 1` after it.
    void shape(int first, int count, int rows, int bytes) {
        for (int t = first; t < first + count; t++)
            config_.rows[t] = static_cast<uint8_t>(rows), config_.bytes[t] = static_cast<uint16_t>(bytes);
    }
    void set() const { __asm__ volatile("ldtilecfg %0" ::"m"(config_) : "memory"); }

private:
    struct Config {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {};
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

// Tile SUM += tile A times tile B: of bfloat16 in float32, or of signed bytes in whole numbers.
template <int SUM, int A, int B>
SOLI_INLINE void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B) : "memory");
}

template <int SUM, int A, int B>
SOLI_INLINE void tile_dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B) : "memory");
}

}  // namespace
}  // namespace soli
