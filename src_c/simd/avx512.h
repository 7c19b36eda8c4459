/* avx512.h: the vector vocabulary on AVX-512 (F, BW, DQ, VL). See baseline.h for what each operation means. */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <immintrin.h>

#include "../kernels.h"

/* float64 */
typedef __m512d f64_vec;
enum { F64_WIDTH = 8, F64_SPLITS_B = 0 };

FBN_INLINE __mmask8 f64_first(int64_t n) { return (__mmask8)((1u << n) - 1u); }
FBN_INLINE f64_vec f64_set(double s) { return _mm512_set1_pd(s); }
FBN_INLINE double f64_value(const double *p) { return *p; }
FBN_INLINE f64_vec f64_load(const double *p) { return _mm512_loadu_pd(p); }
FBN_INLINE f64_vec f64_load_n(const double *p, int64_t n, f64_vec fill) {
    return _mm512_mask_loadu_pd(fill, f64_first(n), p);
}
FBN_INLINE void f64_store(double *p, f64_vec a) { _mm512_storeu_pd(p, a); }
FBN_INLINE void f64_store_n(double *p, f64_vec a, int64_t n) { _mm512_mask_storeu_pd(p, f64_first(n), a); }
FBN_INLINE void f64_stream(double *p, f64_vec a) { _mm512_stream_pd(p, a); }
FBN_INLINE f64_vec f64_join(f64_vec a, f64_vec b, int64_t n) { return _mm512_mask_blend_pd(f64_first(n), b, a); }
FBN_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return _mm512_add_pd(a, b); }
FBN_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return _mm512_sub_pd(a, b); }
FBN_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return _mm512_mul_pd(a, b); }
FBN_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return _mm512_fmadd_pd(a, b, c); }
FBN_INLINE f64_vec f64_line(f64_vec a, f64_vec b, f64_vec b_low, f64_vec c, f64_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f64_add(f64_fma(a, b, c), low);
}
FBN_INLINE f64_vec f64_muladd(f64_vec a, f64_vec b, f64_vec c) { return f64_fma(a, b, c); }
FBN_INLINE f64_vec f64_relu(f64_vec a) { return _mm512_max_pd(_mm512_setzero_pd(), a); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(z, _mm512_setzero_pd(), _CMP_NLE_UQ), a);
}
FBN_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return _mm512_div_pd(a, b); }
FBN_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return _mm512_min_pd(a, b); }
FBN_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return _mm512_max_pd(a, b); }
FBN_INLINE f64_vec f64_minus_abs(f64_vec a) { return _mm512_or_pd(a, _mm512_set1_pd(-0.0)); }
FBN_INLINE f64_vec f64_where_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), d, c);
}
FBN_INLINE f64_vec f64_ldexp(f64_vec a, f64_vec k) { return _mm512_scalef_pd(a, k); }
FBN_INLINE f64_vec f64_scaled(f64_vec a, f64_vec shifted) {
    const __m512i exponent = _mm512_slli_epi64(_mm512_castpd_si512(shifted), 52);
    return _mm512_castsi512_pd(_mm512_sub_epi64(_mm512_castpd_si512(a), exponent));
}
FBN_INLINE int f64_all_less(f64_vec a, f64_vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ) == 0; }
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, a, _CMP_ORD_Q), a); }
FBN_INLINE f64_vec f64_halves(f64_vec a, f64_vec b) {
    return f64_add(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
}
FBN_INLINE f64_vec f64_quarters(f64_vec a, f64_vec b) {
    return f64_add(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}
FBN_INLINE f64_vec f64_sums(const f64_vec *a) {
    const f64_vec first = f64_quarters(f64_halves(a[0], a[1]), f64_halves(a[2], a[3]));
    const f64_vec second = f64_quarters(f64_halves(a[4], a[5]), f64_halves(a[6], a[7]));
    const f64_vec mixed = f64_add(_mm512_unpacklo_pd(first, second), _mm512_unpackhi_pd(first, second));
    return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed);
}

/* float32 */
typedef __m512 f32_vec;
enum { F32_WIDTH = 16, F32_SPLITS_B = 0, FAST_PARTS = 1, STREAMS = 1, LIGHT_HALVES = 0 };

FBN_INLINE __mmask16 f32_first(int64_t n) { return (__mmask16)((1u << n) - 1u); }
FBN_INLINE f32_vec f32_set(float s) { return _mm512_set1_ps(s); }
FBN_INLINE double f32_value(const float *p) { return *p; }
FBN_INLINE f32_vec f32_load(const float *p) { return _mm512_loadu_ps(p); }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    return _mm512_mask_loadu_ps(fill, f32_first(n), p);
}
FBN_INLINE void f32_store(float *p, f32_vec a) { _mm512_storeu_ps(p, a); }
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) { _mm512_mask_storeu_ps(p, f32_first(n), a); }
FBN_INLINE void f32_stream(float *p, f32_vec a) { _mm512_stream_ps(p, a); }
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) { return _mm512_mask_blend_ps(f32_first(n), b, a); }
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return _mm512_add_ps(a, b); }
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return _mm512_sub_ps(a, b); }
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return _mm512_mul_ps(a, b); }
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return _mm512_fmadd_ps(a, b, c); }
FBN_INLINE f32_vec f32_line(f32_vec a, f32_vec b, f32_vec b_low, f32_vec c, f32_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f32_add(f32_fma(a, b, c), low);
}
FBN_INLINE f32_vec f32_muladd(f32_vec a, f32_vec b, f32_vec c) { return f32_fma(a, b, c); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), a);
}
FBN_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return _mm512_div_ps(a, b); }
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return _mm512_min_ps(a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return _mm512_max_ps(a, b); }
FBN_INLINE f32_vec f32_minus_abs(f32_vec a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
FBN_INLINE f32_vec f32_where_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), d, c);
}
FBN_INLINE f32_vec f32_ldexp(f32_vec a, f32_vec k) { return _mm512_scalef_ps(a, k); }
FBN_INLINE f32_vec f32_scaled(f32_vec a, f32_vec shifted) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(a), exponent));
}
FBN_INLINE int f32_all_less(f32_vec a, f32_vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) == 0; }
FBN_INLINE f32_vec f32_zero_nan(f32_vec a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }

/* float32 widened to float64 */
typedef struct {
    __m512d lo, hi;
} f32_wide;

FBN_INLINE f32_wide f32_widen(f32_vec a) {
    return (f32_wide){_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1))};
}
FBN_INLINE f32_wide f32_wide_load(const float *p) {
    return (f32_wide){_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
FBN_INLINE f32_wide f32_wide_set(double s) { return (f32_wide){f64_set(s), f64_set(s)}; }
FBN_INLINE f32_wide f32_wide_get(const double *p) { return (f32_wide){f64_load(p), f64_load(p + 8)}; }
FBN_INLINE void f32_wide_put(double *p, f32_wide a) {
    f64_store(p, a.lo);
    f64_store(p + 8, a.hi);
}
/* a + b, as a product with 1: the units that multiply have less to do in sums than those that add, which convert and
 * subtract. Compilers would make an addition of it, so they must not see the 1. */
FBN_INLINE f64_vec f64_add_by_product(f64_vec a, f64_vec b) {
    f64_vec one = f64_set(1);
#if defined(__GNUC__) && defined(__AVX512F__) /* without it, a test emulates the instructions */
    __asm__("" : "+v"(one));
#endif
    return f64_fma(b, one, a);
}
FBN_INLINE f32_wide f32_wide_add(f32_wide a, f32_wide b) {
    return (f32_wide){f64_add_by_product(a.lo, b.lo), f64_add_by_product(a.hi, b.hi)};
}
FBN_INLINE f32_wide f32_wide_sub(f32_wide a, f32_wide b) {
    return (f32_wide){f64_sub(a.lo, b.lo), f64_sub(a.hi, b.hi)};
}
FBN_INLINE f32_wide f32_wide_fma(f32_wide a, f32_wide b, f32_wide c) {
    return (f32_wide){f64_fma(a.lo, b.lo, c.lo), f64_fma(a.hi, b.hi, c.hi)};
}
FBN_INLINE f32_wide f32_wide_keep_if_positive(f32_wide z, f32_wide a) {
    return (f32_wide){f64_keep_if_positive(z.lo, a.lo), f64_keep_if_positive(z.hi, a.hi)};
}

/* 16-bit elements, which are computed in float32 */
FBN_INLINE __m256i half_load(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
FBN_INLINE __m256i half_load_n(const uint16_t *p, int64_t n) { return _mm256_maskz_loadu_epi16(f32_first(n), p); }
FBN_INLINE void half_store(uint16_t *p, __m256i a) { _mm256_storeu_si256((__m256i *)p, a); }
FBN_INLINE void half_store_n(uint16_t *p, __m256i a, int64_t n) { _mm256_mask_storeu_epi16(p, f32_first(n), a); }
FBN_INLINE void half_stream(uint16_t *p, __m256i a) { _mm256_stream_si256((__m256i *)p, a); }
FBN_INLINE f32_vec f32_first_of(f32_vec a, int64_t n, f32_vec fill) {
    return _mm512_mask_blend_ps(f32_first(n), fill, a);
}

/* float16 */
FBN_INLINE __m256i f16_round(f32_vec a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FBN_INLINE double f16_value(const uint16_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p))); }
FBN_INLINE f32_vec f16_load(const uint16_t *p) { return _mm512_cvtph_ps(half_load(p)); }
FBN_INLINE f32_vec f16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_first_of(_mm512_cvtph_ps(half_load_n(p, n)), n, fill);
}
FBN_INLINE void f16_store(uint16_t *p, f32_vec a) { half_store(p, f16_round(a)); }
FBN_INLINE void f16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, f16_round(a), n); }
FBN_INLINE void f16_stream(uint16_t *p, f32_vec a) { half_stream(p, f16_round(a)); }
FBN_INLINE f32_wide f16_wide_load(const uint16_t *p) { return f32_widen(f16_load(p)); }

/* bfloat16, converted by integer operations, since vcvtneps2bf16 treats subnormals as 0 */
FBN_INLINE f32_vec bf16_exact(__m256i a) {
    const __m512i highs = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                           3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, highs, _mm512_castsi256_si512(a)));
}
FBN_INLINE __m256i bf16_round(f32_vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    const __m512i highs = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19,
                                           17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(highs, _mm512_add_epi32(bits, half)));
}
FBN_INLINE double bf16_value(const uint16_t *p) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)((uint32_t)*p << 16))));
}
FBN_INLINE f32_vec bf16_load(const uint16_t *p) { return bf16_exact(half_load(p)); }
FBN_INLINE f32_vec bf16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_first_of(bf16_exact(half_load_n(p, n)), n, fill);
}
FBN_INLINE void bf16_store(uint16_t *p, f32_vec a) { half_store(p, bf16_round(a)); }
FBN_INLINE void bf16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, bf16_round(a), n); }
FBN_INLINE void bf16_stream(uint16_t *p, f32_vec a) { half_stream(p, bf16_round(a)); }
FBN_INLINE f32_wide bf16_wide_load(const uint16_t *p) { return f32_widen(bf16_load(p)); }

FBN_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
FBN_INLINE void stream_fence(void) { _mm_sfence(); }

#endif
