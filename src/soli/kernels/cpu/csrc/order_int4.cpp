// int4 of other programs, whose bytes hold neighbours, in the order of Soli's (diagram: int8_tokens.h).
//
// Of a run of 32 numbers in 16 bytes, byte j holds numbers 2 j and 2 j + 1 before, and j and j + 16 after: bytes j and
// j + 8 become bytes 2 j, of their low nibbles, and 2 j + 1, of their high ones.
#include "kernels.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace soli {
namespace {

constexpr uint64_t LOW = 0x0f0f0f0f0f0f0f0f;  // nibbles of eight bytes

// The bytes of `even` and of `odd` in turn.
SOLI_INLINE void interleave(uint64_t even, uint64_t odd, uint8_t* to) {
#ifdef __SSE2__
    const __m128i bytes = _mm_unpacklo_epi8(_mm_cvtsi64_si128(static_cast<long long>(even)),
                                            _mm_cvtsi64_si128(static_cast<long long>(odd)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
#else
    uint8_t bytes[2][8];
    __builtin_memcpy(bytes[0], &even, 8);
    __builtin_memcpy(bytes[1], &odd, 8);
    for (int i = 0; i < 16; i++) to[i] = bytes[i % 2][i / 2];
#endif
}

}  // namespace

// `runs` of 16 bytes, in place where `from` is `to`.
extern "C" int soli_order_int4(const uint8_t* from, uint8_t* to, int64_t runs) {
    for (int64_t r = 0; r < runs; r++) {
        uint64_t first, second;
        __builtin_memcpy(&first, from + 16 * r, 8);
        __builtin_memcpy(&second, from + 16 * r + 8, 8);
        const uint64_t even = (first & LOW) | (second & LOW) << 4;
        const uint64_t odd = (first >> 4 & LOW) | (second & ~LOW);
        interleave(even, odd, to + 16 * r);
    }
    return NO_ERROR;
}

}  // namespace soli
