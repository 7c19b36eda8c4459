/* dispatch.c: which kernel tables can this processor run? */
#include "dispatch.h"

#if defined(FBN_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#elif defined(FBN_X86)
#include <cpuid.h>
#endif

#if defined(FBN_X86) && defined(_MSC_VER)

/* The operating system must save the registers as well: bits 1 and 2 of XCR0 say so for AVX, bits 5 to 7 for AVX-512.
 */
static int saves(unsigned long long state) {
    int id[4];
    __cpuid(id, 1);
    return (id[2] >> 27 & 1) && (_xgetbv(0) & state) == state;
}

static int has_avx2(void) {
    int one[4], seven[4];
    __cpuid(one, 1);
    __cpuidex(seven, 7, 0);
    return (one[2] >> 12 & 1) && (one[2] >> 29 & 1) && (seven[1] >> 5 & 1) && saves(0x6); /* FMA, F16C, AVX2 */
}

static int has_avx512(void) {
    const int needed = 1 << 16 | 1 << 17 | 1 << 30 | (int)(1u << 31); /* F, DQ, BW, VL */
    int seven[4];
    __cpuidex(seven, 7, 0);
    return (seven[1] & needed) == needed && has_avx2() && saves(0xe6);
}
#elif defined(FBN_X86)
/* Asked of the processor itself: not every compiler's __builtin_cpu_supports knows it. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && has_avx2();
}
#endif

const fbn_kernels *fbn_kernels_at(int index) {
    const fbn_kernels *usable[4] = {NULL};
    int n = 0;
#if defined(FBN_X86)
    if (has_avx512()) usable[n++] = &fbn_kernels_avx512;
    if (has_avx2()) usable[n++] = &fbn_kernels_avx2;
#elif defined(FBN_ARM)
    usable[n++] = &fbn_kernels_neon;
#endif
    usable[n++] = &fbn_kernels_baseline;
    return index >= 0 && index < n ? usable[index] : NULL;
}

const char *fbn_kernels_name(const fbn_kernels *kernels) { return kernels ? kernels->name : NULL; }
