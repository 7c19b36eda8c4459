/* dispatch.c: what can this processor do? The only place that asks it. */
#include "dispatch.h"

#if defined(__linux__)
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(FBN_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#elif defined(FBN_X86)
#include <cpuid.h>
#endif

#if defined(FBN_X86) && defined(_MSC_VER)

/* The operating system must save the registers too: bits 1-2 of XCR0 for AVX, 5-7 for AVX-512. */
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

fbn_machine fbn_this_machine(void) {
    const int64_t core = fbn_cache_bytes(2), shared = fbn_cache_bytes(3);
    return (fbn_machine){fbn_kernels_at(0), core ? core : 1 << 20, shared ? shared : 8 << 20};
}

int64_t fbn_cache_bytes(int level) {
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    const int names[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
    const long bytes = level >= 1 && level <= 3 ? sysconf(names[level - 1]) : 0;
    return bytes > 0 ? bytes : 0;
#elif defined(__APPLE__)
    const char *names[] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
    int64_t bytes = 0;
    size_t size = sizeof bytes;
    if (level < 1 || level > 3 || sysctlbyname(names[level - 1], &bytes, &size, NULL, 0)) return 0;
    return bytes;
#else
    (void)level;
    return 0;
#endif
}
