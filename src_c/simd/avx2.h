/* avx2.h: the vector vocabulary on AVX2 with FMA. See baseline.h for what each operation means. */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <immintrin.h>

#include "../kernels.h"

/* float64 */
typedef __m256d f64_vec;
enum { F64_WIDTH = 4 };

FBN_INLINE __m256i f64_first(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FBN_INLINE f64_vec f64_set(double s) { return _mm256_set1_pd(s); }
FBN_INLINE f64_vec f64_load(const double *p) { return _mm256_loadu_pd(p); }
FBN_INLINE f64_vec f64_load_n(const double *p, int64_t n, f64_vec fill) {
    const __m256i first = f64_first(n);
    return _mm256_blendv_pd(fill, _mm256_maskload_pd(p, first), _mm256_castsi256_pd(first));
}
FBN_INLINE void f64_store(double *p, f64_vec a) { _mm256_storeu_pd(p, a); }
FBN_INLINE void f64_store_n(double *p, f64_vec a, int64_t n) { _mm256_maskstore_pd(p, f64_first(n), a); }
FBN_INLINE void f64_stream(double *p, f64_vec a) { _mm256_stream_pd(p, a); }
FBN_INLINE f64_vec f64_join(f64_vec a, f64_vec b, int64_t n) {
    return _mm256_blendv_pd(b, a, _mm256_castsi256_pd(f64_first(n)));
}
FBN_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return _mm256_add_pd(a, b); }
FBN_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return _mm256_sub_pd(a, b); }
FBN_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return _mm256_mul_pd(a, b); }
FBN_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return _mm256_fmadd_pd(a, b, c); }
FBN_INLINE f64_vec f64_relu(f64_vec a) { return _mm256_max_pd(_mm256_setzero_pd(), a); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) {
    return _mm256_and_pd(_mm256_cmp_pd(z, _mm256_setzero_pd(), _CMP_NLE_UQ), a);
}
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return _mm256_and_pd(_mm256_cmp_pd(a, a, _CMP_ORD_Q), a); }

/* float32 */
typedef __m256 f32_vec;
enum { F32_WIDTH = 8 };

FBN_INLINE __m256i f32_first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FBN_INLINE f32_vec f32_set(float s) { return _mm256_set1_ps(s); }
FBN_INLINE f32_vec f32_load(const float *p) { return _mm256_loadu_ps(p); }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    const __m256i first = f32_first(n);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, first), _mm256_castsi256_ps(first));
}
FBN_INLINE void f32_store(float *p, f32_vec a) { _mm256_storeu_ps(p, a); }
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) { _mm256_maskstore_ps(p, f32_first(n), a); }
FBN_INLINE void f32_stream(float *p, f32_vec a) { _mm256_stream_ps(p, a); }
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) {
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(f32_first(n)));
}
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return _mm256_add_ps(a, b); }
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return _mm256_sub_ps(a, b); }
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return _mm256_mul_ps(a, b); }
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return _mm256_fmadd_ps(a, b, c); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) {
    return _mm256_and_ps(_mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ), a);
}
FBN_INLINE f32_vec f32_zero_nan(f32_vec a) { return _mm256_and_ps(_mm256_cmp_ps(a, a, _CMP_ORD_Q), a); }

/* float32 widened to float64 */
typedef struct {
    __m256d lo, hi;
} f32_wide;

FBN_INLINE f32_wide f32_widen(f32_vec a) {
    return (f32_wide){_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}
FBN_INLINE f32_wide f32_wide_load(const float *p) {
    return (f32_wide){_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
FBN_INLINE f32_wide f32_wide_set(double s) { return (f32_wide){f64_set(s), f64_set(s)}; }
FBN_INLINE f32_wide f32_wide_get(const double *p) { return (f32_wide){f64_load(p), f64_load(p + 4)}; }
FBN_INLINE void f32_wide_put(double *p, f32_wide a) {
    f64_store(p, a.lo);
    f64_store(p + 4, a.hi);
}
FBN_INLINE f32_wide f32_wide_add(f32_wide a, f32_wide b) {
    return (f32_wide){f64_add(a.lo, b.lo), f64_add(a.hi, b.hi)};
}
FBN_INLINE f32_wide f32_wide_sub(f32_wide a, f32_wide b) {
    return (f32_wide){f64_sub(a.lo, b.lo), f64_sub(a.hi, b.hi)};
}
FBN_INLINE f32_wide f32_wide_fma(f32_wide a, f32_wide b, f32_wide c) {
    return (f32_wide){f64_fma(a.lo, b.lo, c.lo), f64_fma(a.hi, b.hi, c.hi)};
}

FBN_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
FBN_INLINE void stream_fence(void) { _mm_sfence(); }

#endif
