/* dispatch.c: which kernel tables can this processor run? */
#include "dispatch.h"

#include "processor.h"

#if defined(FBN_X86)
static int has(uint32_t bits, uint32_t needed) { return (bits & needed) == needed; }

/* Which instructions the processor has, if the operating system saves their registers: 2 for AVX-512 and AVX2, 1 for
 * AVX2, 0 for neither. macOS only says that it saves those of AVX-512 once they have been used. */
static int level(void) {
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29, AVX2 = 1 << 5 };
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
#if defined(__APPLE__)
    const uint32_t registers_256 = 0x6, registers_512 = 0x6;
#else
    const uint32_t registers_256 = 0x6, registers_512 = 0xe6;
#endif
    uint32_t zero[4], one[4], seven[4];
    fbn_cpuid(0, 0, zero);
    if (zero[0] < 7) return 0; /* the last leaf */
    fbn_cpuid(1, 0, one);
    fbn_cpuid(7, 0, seven);
    if (!has(one[2], FMA | OSXSAVE | AVX | F16C) || !has(seven[1], AVX2)) return 0;
    if (!has(fbn_xgetbv(), registers_256)) return 0;
    return has(seven[1], avx512) && has(fbn_xgetbv(), registers_512) ? 2 : 1;
}

/* Zen 4 computes vectors of 512 bits in two halves, and converts float32 to float64 more slowly than that: its sums are
 * faster in vectors of 256 bits. */
static const fbn_kernels zen4 = {"avx512", fbn_dtypes_avx512, fbn_dtypes_avx2};

static const fbn_kernels *best_of_avx512(void) {
    enum { ZEN_3_AND_4 = 0x19 };
    return fbn_is_amd() && fbn_family() == ZEN_3_AND_4 ? &zen4 : &fbn_kernels_avx512;
}
#endif

const fbn_kernels *fbn_kernels_at(int index) {
    const fbn_kernels *usable[4] = {NULL};
    int n = 0;
#if defined(FBN_X86)
    const int most = level();
    if (most == 2) usable[n++] = best_of_avx512();
    if (most >= 1) usable[n++] = &fbn_kernels_avx2;
#elif defined(FBN_ARM)
    usable[n++] = &fbn_kernels_neon;
#endif
    usable[n++] = &fbn_kernels_baseline;
    return index >= 0 && index < n ? usable[index] : NULL;
}

const char *fbn_kernels_name(const fbn_kernels *kernels) { return kernels ? kernels->name : NULL; }
