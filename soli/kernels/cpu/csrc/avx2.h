// What avx2.cpp takes from avx2_bytes.cpp.
#pragma once
#include "kernels.h"

namespace soli {

void dots16_int8_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void dots16_int4_avx2(const Rows& rows, const uint8_t* x, int64_t tokens, float* y, int64_t y_stride);
void put16_bytes(const Layout& layout, const uint16_t* x, uint8_t* token, int64_t at);

}  // namespace soli
