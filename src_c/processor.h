/* processor.h: what does an x86 processor say of itself? CPUID, asked in the same way by every compiler: what a
 * compiler knows of the processor by itself (__builtin_cpu_supports) depends on its own run-time library.
 */
#ifndef FBN_PROCESSOR_H
#define FBN_PROCESSOR_H

#include <stdint.h>

#if defined(_MSC_VER) && (defined(_M_X64) || defined(_M_IX86))
#include <immintrin.h>
#include <intrin.h>
#define FBN_CPUID 1
static inline void fbn_cpuid(uint32_t leaf, uint32_t part, uint32_t answer[4]) {
    __cpuidex((int *)answer, (int)leaf, (int)part);
}
static inline uint32_t fbn_xgetbv(void) { return (uint32_t)_xgetbv(0); }
#elif defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FBN_CPUID 1
static inline void fbn_cpuid(uint32_t leaf, uint32_t part, uint32_t answer[4]) {
    __cpuid_count(leaf, part, answer[0], answer[1], answer[2], answer[3]);
}
/* The registers that the operating system saves. Only valid if bit 27 of leaf 1's ecx is set. */
static inline uint32_t fbn_xgetbv(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

#if defined(FBN_CPUID)
/* Whether the maker is AuthenticAMD or HygonGenuine, by the last four letters. */
static inline int fbn_is_amd(void) {
    enum { AMD = 0x444d4163, HYGON = 0x656e6975 };
    uint32_t answer[4];
    fbn_cpuid(0, 0, answer);
    return answer[2] == AMD || answer[2] == HYGON;
}

static inline uint32_t fbn_family(void) {
    uint32_t answer[4];
    fbn_cpuid(1, 0, answer);
    const uint32_t family = answer[0] >> 8 & 15, extended = answer[0] >> 20 & 255;
    return family == 15 ? family + extended : family;
}
#endif

#endif
