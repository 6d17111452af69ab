// Which instruction sets this processor and its operating system have, and the kernels of each.
#include "kernels.h"

#ifdef __x86_64__
#include <cpuid.h>
#ifdef SOLI_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace soli {
namespace {

// The CPUID instruction.
struct CpuId {
    unsigned a, b, c, d;
    CpuId(unsigned leaf, unsigned subleaf) : a(0), b(0), c(0), d(0) {
        __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d);
    }
};

bool has_bit(unsigned word, int bit) { return word >> bit & 1; }

// Registers that the operating system saves: XCR0 bits 1, 2 (SSE, AVX), 5, 6, 7 (AVX-512) and 17, 18 (tiles).
unsigned saved_registers() {
    if (!has_bit(CpuId(1, 0).c, 27)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool has_avx2() {
    const CpuId leaf1(1, 0);
    const CpuId leaf7(7, 0);
    return (saved_registers() & 0x6) == 0x6 && has_bit(leaf1.c, 12) && has_bit(leaf1.c, 29) &&
           has_bit(leaf7.b, 5);  // FMA, F16C, AVX2
}

// F, DQ, BW, VL, VBMI, VNNI and BF16 together: Zen 4, Sapphire Rapids and later.
bool has_avx512() {
    const CpuId leaf7(7, 0);
    const CpuId leaf7_1(7, 1);
    return has_avx2() && (saved_registers() & 0xe6) == 0xe6 && has_bit(leaf7.b, 16) && has_bit(leaf7.b, 17) &&
           has_bit(leaf7.b, 30) && has_bit(leaf7.b, 31) && has_bit(leaf7.c, 1) && has_bit(leaf7.c, 11) &&
           has_bit(leaf7_1.a, 5);
}

// TILE, BF16 and INT8, and Linux's permission, which a process must request before it uses tiles, because they make its
// signal frames larger than some stacks.
bool has_amx() {
#ifdef SOLI_AMX
    const unsigned bits = CpuId(7, 0).d;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return has_avx512() && has_bit(bits, 22) && has_bit(bits, 24) && has_bit(bits, 25) &&
           (saved_registers() & 0x60000) == 0x60000 && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace

const Kernels& kernels(int64_t isa) {
#ifdef SOLI_AMX
    if (isa == 3) return AMX;
#endif
    return isa == 2 ? AVX512 : isa == 1 ? AVX2 : PORTABLE;
}

// The best instruction set here: 0 portable, 1 AVX2, 2 AVX-512, 3 AMX beside it.
extern "C" int soli_best_isa() { return has_amx() ? 3 : has_avx512() ? 2 : has_avx2() ? 1 : 0; }

}  // namespace soli

#else

namespace soli {

const Kernels& kernels(int64_t) { return PORTABLE; }

extern "C" int soli_best_isa() { return 0; }

}  // namespace soli

#endif
