/* dispatch.h: which kernel tables does this build hold? fbn_kernels_at tells which of them this processor can run. */
#ifndef FBN_DISPATCH_H
#define FBN_DISPATCH_H

#include "kernels.h"

#if defined(FBN_BASELINE_ALONE)
#elif defined(__x86_64__) || defined(_M_X64)
#define FBN_X86 1
extern const fbn_kernels fbn_kernels_avx512, fbn_kernels_avx2;
extern const fbn_dtype_kernels *const fbn_dtypes_avx512[], *const fbn_dtypes_avx2[];
#elif defined(__aarch64__) || defined(_M_ARM64)
#define FBN_ARM 1
extern const fbn_kernels fbn_kernels_neon;
#endif

extern const fbn_kernels fbn_kernels_baseline;

#endif
