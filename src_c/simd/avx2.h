/* avx2.h: the vector vocabulary on AVX2 with FMA and F16C. See baseline.h for what each operation means. */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <immintrin.h>
#include <string.h>

#include "../kernels.h"

/* float64 */
typedef __m256d f64_vec;
enum { F64_WIDTH = 4, F64_SPLITS_B = 0 };

FBN_INLINE __m256i f64_first(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FBN_INLINE f64_vec f64_set(double s) { return _mm256_set1_pd(s); }
FBN_INLINE double f64_value(const double *p) { return *p; }
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
FBN_INLINE f64_vec f64_line(f64_vec a, f64_vec b, f64_vec b_low, f64_vec c, f64_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f64_add(f64_fma(a, b, c), low);
}
FBN_INLINE f64_vec f64_muladd(f64_vec a, f64_vec b, f64_vec c) { return f64_fma(a, b, c); }
FBN_INLINE f64_vec f64_relu(f64_vec a) { return _mm256_max_pd(_mm256_setzero_pd(), a); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) {
    return _mm256_and_pd(_mm256_cmp_pd(z, _mm256_setzero_pd(), _CMP_NLE_UQ), a);
}
FBN_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return _mm256_div_pd(a, b); }
FBN_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return _mm256_min_pd(a, b); }
FBN_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return _mm256_max_pd(a, b); }
FBN_INLINE f64_vec f64_minus_abs(f64_vec a) { return _mm256_or_pd(a, _mm256_set1_pd(-0.0)); }
FBN_INLINE f64_vec f64_where_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return _mm256_blendv_pd(d, c, _mm256_cmp_pd(a, b, _CMP_LT_OQ));
}
FBN_INLINE f64_vec f64_power_of_2(__m128i e) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(e, _mm_set1_epi32(1023))), 52));
}
FBN_INLINE f64_vec f64_ldexp(f64_vec a, f64_vec k) {
    const __m128i e = _mm256_cvtpd_epi32(k), half = _mm_srai_epi32(e, 1);
    return f64_mul(f64_mul(a, f64_power_of_2(half)), f64_power_of_2(_mm_sub_epi32(e, half)));
}
FBN_INLINE f64_vec f64_scaled(f64_vec a, f64_vec shifted) {
    const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52);
    return _mm256_castsi256_pd(_mm256_sub_epi64(_mm256_castpd_si256(a), exponent));
}
FBN_INLINE int f64_all_less(f64_vec a, f64_vec b) { return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_LT_OQ)) == 0xf; }
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return _mm256_and_pd(_mm256_cmp_pd(a, a, _CMP_ORD_Q), a); }
FBN_INLINE f64_vec f64_halves(f64_vec a, f64_vec b) {
    return f64_add(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31));
}
FBN_INLINE f64_vec f64_sums(const f64_vec *a) {
    const f64_vec first = f64_halves(a[0], a[1]), second = f64_halves(a[2], a[3]);
    const f64_vec mixed = f64_add(_mm256_unpacklo_pd(first, second), _mm256_unpackhi_pd(first, second));
    return _mm256_permute4x64_pd(mixed, 0xd8);
}

/* float32 */
typedef __m256 f32_vec;
enum { F32_WIDTH = 8, F32_SPLITS_B = 0, FAST_PARTS = 0, STREAMS = 1, LIGHT_HALVES = 1 };

FBN_INLINE __m256i f32_first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FBN_INLINE f32_vec f32_set(float s) { return _mm256_set1_ps(s); }
FBN_INLINE double f32_value(const float *p) { return *p; }
FBN_INLINE f32_vec f32_load(const float *p) { return _mm256_loadu_ps(p); }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    const __m256i first = f32_first(n);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, first), _mm256_castsi256_ps(first));
}
FBN_INLINE void f32_store(float *p, f32_vec a) { _mm256_storeu_ps(p, a); }
/* In halves: a masked store takes longer than all of these together (Zen 3). */
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) {
    __m128 rest = _mm256_castps256_ps128(a);
    if (n >= F32_WIDTH) {
        f32_store(p, a);
        return;
    }
    if (n & 4) {
        _mm_storeu_ps(p, rest);
        rest = _mm256_extractf128_ps(a, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)p, rest);
        rest = _mm_movehl_ps(rest, rest);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
}
FBN_INLINE void f32_stream(float *p, f32_vec a) { _mm256_stream_ps(p, a); }
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) {
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(f32_first(n)));
}
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return _mm256_add_ps(a, b); }
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return _mm256_sub_ps(a, b); }
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return _mm256_mul_ps(a, b); }
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return _mm256_fmadd_ps(a, b, c); }
FBN_INLINE f32_vec f32_line(f32_vec a, f32_vec b, f32_vec b_low, f32_vec c, f32_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f32_add(f32_fma(a, b, c), low);
}
FBN_INLINE f32_vec f32_muladd(f32_vec a, f32_vec b, f32_vec c) { return f32_fma(a, b, c); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) {
    return _mm256_and_ps(_mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ), a);
}
FBN_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return _mm256_div_ps(a, b); }
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return _mm256_min_ps(a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return _mm256_max_ps(a, b); }
FBN_INLINE f32_vec f32_minus_abs(f32_vec a) { return _mm256_or_ps(a, _mm256_set1_ps(-0.0f)); }
FBN_INLINE f32_vec f32_where_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return _mm256_blendv_ps(d, c, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FBN_INLINE f32_vec f32_power_of_2(__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
}
FBN_INLINE f32_vec f32_ldexp(f32_vec a, f32_vec k) {
    const __m256i e = _mm256_cvtps_epi32(k), half = _mm256_srai_epi32(e, 1);
    return f32_mul(f32_mul(a, f32_power_of_2(half)), f32_power_of_2(_mm256_sub_epi32(e, half)));
}
FBN_INLINE f32_vec f32_scaled(f32_vec a, f32_vec shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(a), exponent));
}
FBN_INLINE int f32_all_less(f32_vec a, f32_vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) == 0xff;
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
/* a + b, as a product with 1: the units that multiply have less to do in sums than those that add, which convert and
 * subtract. Compilers would make an addition of it, so they must not see the 1. */
FBN_INLINE f64_vec f64_add_by_product(f64_vec a, f64_vec b) {
    f64_vec one = f64_set(1);
#if defined(__GNUC__)
    __asm__("" : "+x"(one));
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
FBN_INLINE __m128i half_load(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)p); }
/* The first n elements, where n is at most 3. */
FBN_INLINE uint64_t half_few(const uint16_t *p, int64_t n) {
    uint32_t two = 0;
    if (n & 2) memcpy(&two, p, sizeof two);
    return n & 1 ? two | (uint64_t)p[n & 2] << 16 * (n & 2) : two;
}
FBN_INLINE __m128i half_load_n(const uint16_t *p, int64_t n) {
    if (n >= F32_WIDTH) return half_load(p);
    uint64_t four;
    if (n < 4) return _mm_set_epi64x(0, (long long)half_few(p, n));
    memcpy(&four, p, sizeof four);
    return _mm_set_epi64x((long long)half_few(p + 4, n - 4), (long long)four);
}
FBN_INLINE void half_store(uint16_t *p, __m128i a) { _mm_storeu_si128((__m128i *)p, a); }
FBN_INLINE void half_store_n(uint16_t *p, __m128i a, int64_t n) {
    if (n >= F32_WIDTH) {
        half_store(p, a);
        return;
    }
    uint64_t rest = (uint64_t)_mm_cvtsi128_si64(a);
    if (n & 4) {
        memcpy(p, &rest, 4 * sizeof *p);
        rest = (uint64_t)_mm_extract_epi64(a, 1);
        p += 4;
    }
    if (n & 2) {
        memcpy(p, &rest, 2 * sizeof *p);
        rest >>= 32;
        p += 2;
    }
    if (n & 1) memcpy(p, &rest, sizeof *p);
}
FBN_INLINE void half_stream(uint16_t *p, __m128i a) { _mm_stream_si128((__m128i *)p, a); }
FBN_INLINE f32_vec f32_first_of(f32_vec a, int64_t n, f32_vec fill) {
    return _mm256_blendv_ps(fill, a, _mm256_castsi256_ps(f32_first(n)));
}

/* float16 */
FBN_INLINE __m128i f16_round(f32_vec a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FBN_INLINE double f16_value(const uint16_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p))); }
FBN_INLINE f32_vec f16_load(const uint16_t *p) { return _mm256_cvtph_ps(half_load(p)); }
FBN_INLINE f32_vec f16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_first_of(_mm256_cvtph_ps(half_load_n(p, n)), n, fill);
}
FBN_INLINE void f16_store(uint16_t *p, f32_vec a) { half_store(p, f16_round(a)); }
FBN_INLINE void f16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, f16_round(a), n); }
FBN_INLINE void f16_stream(uint16_t *p, f32_vec a) { half_stream(p, f16_round(a)); }
FBN_INLINE f64_vec f16_wide_half(const uint16_t *p) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
}
FBN_INLINE f32_wide f16_wide_load(const uint16_t *p) { return (f32_wide){f16_wide_half(p), f16_wide_half(p + 4)}; }

/* bfloat16 */
FBN_INLINE f32_vec bf16_exact(__m128i a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
/* The rounded element is in the upper half of each lane. A comparison, which is -1, adds 1 to an odd one: there are
 * more units for it than for a shift. */
FBN_INLINE __m256i bf16_round_upper(f32_vec a) {
    const __m256i bits = _mm256_castps_si256(a), last = _mm256_set1_epi32(0x10000);
    const __m256i odd = _mm256_cmpeq_epi32(_mm256_and_si256(bits, last), last);
    return _mm256_sub_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
FBN_INLINE __m128i bf16_round(f32_vec a) {
    const __m256i rounded = _mm256_srli_epi32(bf16_round_upper(a), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
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
FBN_INLINE f32_wide bf16_wide_load(const uint16_t *p) {
    const __m128i zero = _mm_setzero_si128(), a = half_load(p);
    return (f32_wide){_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(zero, a))),
                      _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpackhi_epi16(zero, a)))};
}

/* Two vectors whose lanes are mixed: those of even elements, and those of odd ones. */
#define BF16_MIXES_TWO
FBN_INLINE void bf16_load_two(const uint16_t *p, f32_vec *to) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)p), upper = _mm256_set1_epi32(-0x10000);
    to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    to[1] = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
}
FBN_INLINE void bf16_store_two(uint16_t *p, const f32_vec *a, int stream) {
    const __m256i even = _mm256_srli_epi32(bf16_round_upper(a[0]), 16), odd = bf16_round_upper(a[1]);
    const __m256i both = _mm256_blend_epi16(even, odd, 0xaa);
    if (stream) {
        half_stream(p, _mm256_castsi256_si128(both));
        half_stream(p + F32_WIDTH, _mm256_extracti128_si256(both, 1));
    } else _mm256_storeu_si256((__m256i *)p, both);
}

FBN_INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
FBN_INLINE void stream_fence(void) { _mm_sfence(); }

#endif
