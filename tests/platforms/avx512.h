/* avx512.h: the operations of AVX-512 that src_c/simd/avx512.h uses, an element at a time, for processors without them.
 * A compiler for AVX2 with GNU C's vectors includes it first (-include). The functions read and write exactly the
 * memory that the instructions would. A streamed store that is not aligned ends the program, as it would there.
 */
#ifndef FBN_TEST_AVX512_H
#define FBN_TEST_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

/* A function that gives a vector, r, of n elements. */
#define OF_ELEMENTS(type, name, n, given, element)                                                                     \
    static inline type name given {                                                                                    \
        type r = {0};                                                                                                  \
        for (int i = 0; i < (n); i++) r[i] = element;                                                                  \
        return r;                                                                                                      \
    }

/* A function that gives the mask of the elements for which a condition holds. */
#define MASK(type, name, n, given, condition)                                                                          \
    static inline type name given {                                                                                    \
        unsigned r = 0;                                                                                                \
        for (int i = 0; i < (n); i++) r |= (unsigned)((condition) != 0) << i;                                          \
        return (type)r;                                                                                                \
    }

static inline int compares(double a, double b, int how) {
    switch (how) {
    case _CMP_LT_OQ:
        return a < b;
    case _CMP_NLT_UQ:
        return !(a < b);
    case _CMP_NLE_UQ:
        return !(a <= b);
    case _CMP_ORD_Q:
        return a == a && b == b;
    default:
        abort();
    }
}

/* x * 2^floor(k), rounded once, also to float32. No kernel has an infinite k. */
static inline double scaled_by(double x, double k) {
    if (isinf(k)) abort();
    return isnan(k) ? k : ldexp(x, (int)fmax(-1e4, fmin(1e4, floor(k))));
}

static inline void store_elements(void *to, const void *from, unsigned mask, int n, size_t size) {
    for (int i = 0; i < n; i++)
        if (mask >> i & 1) memcpy((char *)to + (size_t)i * size, (const char *)from + (size_t)i * size, size);
}

static inline void check_aligned(const void *p) {
    if ((uintptr_t)p % 64) abort();
}

/* What float64 and float32 have in common: v is the vector, e its element, m the mask. */
#define OF_EITHER(s, v, e, m, n, fused)                                                                                \
    OF_ELEMENTS(v, fmadd_##s, n, (v a, v b, v c), fused(a[i], b[i], c[i]))                                             \
    OF_ELEMENTS(v, min_##s, n, (v a, v b), a[i] < b[i] ? a[i] : b[i])                                                  \
    OF_ELEMENTS(v, max_##s, n, (v a, v b), a[i] > b[i] ? a[i] : b[i])                                                  \
    OF_ELEMENTS(v, set1_##s, n, (e a), a)                                                                              \
    OF_ELEMENTS(v, scalef_##s, n, (v a, v k), (e)scaled_by(a[i], k[i]))                                                \
    OF_ELEMENTS(v, blend_##s, n, (m mask, v a, v b), mask >> i & 1 ? b[i] : a[i])                                      \
    OF_ELEMENTS(v, load_##s, n, (v fill, m mask, const e *p), mask >> i & 1 ? p[i] : fill[i])                          \
    MASK(m, compare_##s, n, (v a, v b, int how), compares(a[i], b[i], how))                                            \
    static inline v loadu_##s(const e *p) {                                                                            \
        v r;                                                                                                           \
        memcpy(&r, p, sizeof r);                                                                                       \
        return r;                                                                                                      \
    }                                                                                                                  \
    static inline void storeu_##s(e *p, v a) { memcpy(p, &a, sizeof a); }                                              \
    static inline void store_some_##s(e *p, m mask, v a) { store_elements(p, &a, mask, n, sizeof *p); }                \
    static inline void stream_##s(e *p, v a) {                                                                         \
        check_aligned(p);                                                                                              \
        storeu_##s(p, a);                                                                                              \
    }

OF_EITHER(pd, __m512d, double, __mmask8, 8, fma)
OF_EITHER(ps, __m512, float, __mmask16, 16, fmaf)

#define _mm512_fmadd_pd fmadd_pd
#define _mm512_fmadd_ps fmadd_ps
#define _mm512_min_pd min_pd
#define _mm512_min_ps min_ps
#define _mm512_max_pd max_pd
#define _mm512_max_ps max_ps
#define _mm512_set1_pd set1_pd
#define _mm512_set1_ps set1_ps
#define _mm512_scalef_pd scalef_pd
#define _mm512_scalef_ps scalef_ps
#define _mm512_mask_blend_pd blend_pd
#define _mm512_mask_blend_ps blend_ps
#define _mm512_mask_loadu_pd load_pd
#define _mm512_mask_loadu_ps load_ps
#define _mm512_loadu_pd loadu_pd
#define _mm512_loadu_ps loadu_ps
#define _mm512_storeu_pd storeu_pd
#define _mm512_storeu_ps storeu_ps
#define _mm512_mask_storeu_pd store_some_pd
#define _mm512_mask_storeu_ps store_some_ps
#define _mm512_stream_pd stream_pd
#define _mm512_stream_ps stream_ps
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_pd_mask compare_pd
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask compare_ps
#define _mm512_setzero_pd() set1_pd(0)
#define _mm512_setzero_ps() set1_ps(0)
#define _mm512_maskz_mov_pd(mask, a) blend_pd(mask, set1_pd(0), a)
#define _mm512_maskz_mov_ps(mask, a) blend_ps(mask, set1_ps(0), a)
#define _mm512_add_pd(a, b) ((a) + (b))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_pd(a, b) ((a) - (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_pd(a, b) ((a) * (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_pd(a, b) ((a) / (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_or_pd(a, b) ((__m512d)((__m512i)(a) | (__m512i)(b)))
#define _mm512_or_ps(a, b) ((__m512)((__m512i)(a) | (__m512i)(b)))

/* float64 alone */
OF_ELEMENTS(__m512d, unpack_pd, 8, (__m512d a, __m512d b, int high), i & 1 ? b[(i & 6) + high] : a[(i & 6) + high])
OF_ELEMENTS(__m512d, permute_pd, 8, (__m512i from, __m512d a), a[from[i] & 7])
OF_ELEMENTS(__m512d, shuffle_pd, 8, (__m512d a, __m512d b, int from),
            (i < 4 ? a : b)[2 * (from >> (i & 6) & 3) + (i & 1)])

#define _mm512_unpacklo_pd(a, b) unpack_pd(a, b, 0)
#define _mm512_unpackhi_pd(a, b) unpack_pd(a, b, 1)
#define _mm512_permutexvar_pd permute_pd
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f64x2 shuffle_pd

/* Conversions */
static inline __m256 half_ps(__m512 a, int high) {
    __m256 halves[2];
    memcpy(halves, &a, sizeof halves);
    return halves[high];
}
static inline __m512 join_ps(__m256 low, __m256 high) {
    __m512 r;
    memcpy(&r, &(__m256[]){low, high}, sizeof r);
    return r;
}
static inline __m256i narrow_ps(__m512 a, int rounding) {
    if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) abort();
    return _mm256_set_m128i(_mm256_cvtps_ph(half_ps(a, 1), 0), _mm256_cvtps_ph(half_ps(a, 0), 0));
}
static inline __m512 widen_ph(__m256i a) {
    return join_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
OF_ELEMENTS(__m512d, widen_ps, 8, (__m256 a), (double)a[i])

#define _mm512_castps512_ps256(a) half_ps(a, 0)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps half_ps
#define _mm512_cvtps_pd widen_ps
#define _mm512_cvtph_ps widen_ph
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph narrow_ps
#define _mm512_castpd_si512(a) ((__m512i)(a))
#define _mm512_castps_si512(a) ((__m512i)(a))
#define _mm512_castsi512_pd(a) ((__m512d)(a))
#define _mm512_castsi512_ps(a) ((__m512)(a))
#define _mm512_castsi256_si512(a) ((__m512i)join_ps((__m256)(a), _mm256_setzero_ps()))
#define _mm512_castsi512_si256(a) ((__m256i)half_ps((__m512)(a), 0))

/* Integers */
OF_ELEMENTS(u32x16, set1_u32, 16, (uint32_t a), a)
OF_ELEMENTS(u32x16, blend_u32, 16, (__mmask16 mask, u32x16 a, u32x16 b), mask >> i & 1 ? b[i] : a[i])
MASK(__mmask16, test_u32, 16, (u32x16 a, u32x16 b), a[i] & b[i])
OF_ELEMENTS(u16x32, permute_u16, 32, (uint32_t mask, u16x32 from, u16x32 a), mask >> i & 1 ? a[from[i] & 31] : 0)
OF_ELEMENTS(u16x16, load_u16, 16, (__mmask16 mask, const uint16_t *p), mask >> i & 1 ? p[i] : 0)
static inline void store_some_u16(uint16_t *p, __mmask16 mask, __m256i a) { store_elements(p, &a, mask, 16, 2); }

#define _mm512_set1_epi32(a) ((__m512i)set1_u32(a))
#define _mm512_mask_blend_epi32(mask, a, b) ((__m512i)blend_u32(mask, (u32x16)(a), (u32x16)(b)))
#define _mm512_test_epi32_mask(a, b) test_u32((u32x16)(a), (u32x16)(b))
#define _mm512_add_epi32(a, b) ((__m512i)((u32x16)(a) + (u32x16)(b)))
#define _mm512_sub_epi32(a, b) ((__m512i)((u32x16)(a) - (u32x16)(b)))
#define _mm512_sub_epi64(a, b) ((__m512i)((u64x8)(a) - (u64x8)(b)))
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(a, bits) ((__m512i)((u32x16)(a) << (bits)))
#undef _mm512_slli_epi64
#define _mm512_slli_epi64(a, bits) ((__m512i)((u64x8)(a) << (bits)))
#define _mm512_maskz_permutexvar_epi16(mask, from, a) ((__m512i)permute_u16(mask, (u16x32)(from), (u16x32)(a)))
#define _mm512_permutexvar_epi16(from, a) _mm512_maskz_permutexvar_epi16(UINT32_MAX, from, a)
#define _mm256_maskz_loadu_epi16(mask, p) ((__m256i)load_u16(mask, p))
#define _mm256_mask_storeu_epi16 store_some_u16
#undef _mm512_setr_epi64
#define _mm512_setr_epi64(...) ((__m512i){__VA_ARGS__})
#define _mm512_set_epi16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ...)                                          \
    ((__m512i)(u16x32){LAST_FIRST(__VA_ARGS__), LAST_FIRST(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)})
#define LAST_FIRST(...) LAST_OF_16(__VA_ARGS__)
#define LAST_OF_16(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) p, o, n, m, l, k, j, i, h, g, f, e, d, c, b, a

#endif
