/* baseline.h: the vector vocabulary in portable C, for any processor, and what each operation means.
 *
 * T is f32 or f64; a T_vec holds T_WIDTH elements.
 *   T_value(p)            the element at p, as a double
 *   T_set(s)              s in every lane
 *   T_load(p), T_store    T_WIDTH elements, any alignment
 *   T_load_n(p, n, fill)  the first n elements, 0 <= n <= T_WIDTH, and fill in the other lanes; touches no other memory
 *   T_store_n(p, a, n)    writes the first n lanes only. FAST_PARTS: whether it takes no longer than T_store
 *   T_stream(p, a)        T_store, around the cache if the processor can (STREAMS); p is aligned to the vector's size
 *   T_join(a, b, n)       the first n lanes of a, then those of b
 *   T_add, T_mul, T_sub   lane by lane
 *   T_fma(a, b, c)        a * b + c, rounded once; in this file, float32 is computed in float64, where the product is
 *                         exact, and rounded to float32 after that, and float64 is rounded twice
 *   T_line(a, b, b_low, c, low, usual_b, usual_c)
 *                         (a * b + c) + low, with a fused multiply-add. Where T_SPLITS_B is 1 the factor is b + b_low
 *                         instead, whose parts have the same sign and are 0 only if the factor is (see f32_line). The
 *                         others do not read b_low. usual_b: 2^-61 < |b| < 2^61 or b = 0; usual_c: |c| < 2^101.
 *   T_muladd(a, b, c)     a * b + c, rounded once or twice, whichever is faster
 *   T_relu(a)             0 where a < 0, else a (so NaN stays)
 *   T_zero_nan(a)         0 where a is NaN, else a
 *   T_keep_if_positive(z, a)  a where z > 0 or z is NaN, else 0
 *   T_minus_abs(a)        -|a|, 0 of any sign
 *   T_where_less(a, b, c, d)  c where a < b, else d (so d where a or b is NaN)
 *   T_min(a, b), T_max    a where a < b or a > b, else b (so b where either is NaN, or both are 0)
 *   T_div(a, b)           a / b
 *   T_ldexp(a, k)         a * 2^k, rounded once where |a| is near 1 or above; k is an integer, twice the dtype's least
 *                         exponent to 0, or NaN if a is
 *   T_scaled(a, s)        a * 2^-k where s = 1.5 * 2^23 + k (f64: 1.5 * 2^52 + k); both are normal numbers
 *   T_all_less(a, b)      whether a < b in every lane
 *   f64_sums(a)           lane i: the sum of the lanes of vector a[i]. Their upper half is added to the lower until one
 *                         is left
 * A T_wide holds the T_WIDTH lanes of a T_vec in float64 (for f64 it is the vector itself):
 *   T_widen(a)            converted, exactly
 *   T_wide_load(p)        T_widen(T_load(p))
 *   T_wide_get(p), T_wide_put(p, a)   T_WIDTH doubles from and to memory
 *   T_wide_set, T_wide_add, T_wide_sub, T_wide_fma
 * H is f16 or bf16. Only elements in memory have 16 bits; the vectors are f32_vec.
 *   H_value, H_load, H_load_n                as for f32; exact, also for subnormals
 *   H_store, H_store_n, H_stream             rounded to nearest, ties to even. A NaN remains one if the lower half of
 *                         its bits is 0, which bf16 may require: it is in constants and in what is loaded, and x86 and
 *                         Arm compute only such NaN from them
 *   H_wide_load(p)          T_widen(H_load(p))
 *   LIGHT_HALVES          whether light loops and plain sums are compiled for 16-bit elements (see kernels/map.h)
 *   f16_load_pair, f16_store_pair            two vectors of adjacent elements. Only where F16_PAIRS is defined
 *   bf16_load_two, bf16_store_two            two vectors of adjacent elements, whose lanes may be mixed. Only where
 *                         that is faster, and BF16_MIXES_TWO is defined. The last takes `stream`
 * prefetch(p)             may fetch the line at p into the cache; any address is allowed
 * stream_fence()          orders streamed stores before later ones
 */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../kernels.h"

/* GCC and Clang have vectors with the operators of C, where a comparison gives -1 or 0 in each lane. For other
 * compilers a vector is one number, and the same code is compiled for it; as it is on 32-bit ARM, whose vector
 * instructions take subnormal numbers for 0. */
#ifdef __has_builtin
#define FBN_HAS_BUILTIN(name) __has_builtin(name)
#else
#define FBN_HAS_BUILTIN(name) 0
#endif
#if FBN_HAS_BUILTIN(__builtin_convertvector) && !defined(__arm__)
enum { F64_WIDTH = 2, F32_WIDTH = 4 };
typedef double f64_vec __attribute__((vector_size(16)));
typedef int64_t f64_lanes __attribute__((vector_size(16)));
typedef uint64_t f64_unsigned __attribute__((vector_size(16)));
typedef float f32_vec __attribute__((vector_size(16))), f32_half __attribute__((vector_size(8)));
typedef int32_t f32_lanes __attribute__((vector_size(16)));
typedef uint32_t f32_unsigned __attribute__((vector_size(16)));
typedef uint16_t half_lanes __attribute__((vector_size(8)));
#define EACH(comparison) (comparison)
#define CONVERT(a, type) __builtin_convertvector(a, type)
#ifdef __SSE2__
#define FBN_SSE2 1
#endif
static inline f32_half f32_lower(f32_vec a) { return (f32_half){a[0], a[1]}; }
static inline f32_half f32_upper(f32_vec a) { return (f32_half){a[2], a[3]}; }
static inline f32_vec f32_both(f32_half lo, f32_half hi) { return (f32_vec){lo[0], lo[1], hi[0], hi[1]}; }
#else
enum { F64_WIDTH = 1, F32_WIDTH = 1 };
typedef double f64_vec;
typedef int64_t f64_lanes;
typedef uint64_t f64_unsigned;
typedef float f32_vec, f32_half;
typedef int32_t f32_lanes;
typedef uint32_t f32_unsigned;
typedef uint16_t half_lanes;
#define EACH(comparison) (-(comparison))
#define CONVERT(a, type) ((type)(a))
static inline f32_half f32_lower(f32_vec a) { return a; }
static inline f32_half f32_upper(f32_vec a) { return a; }
static inline f32_vec f32_both(f32_half lo, f32_half hi) {
    (void)hi;
    return lo;
}
#endif

enum { F64_SPLITS_B = 0, F32_SPLITS_B = 1, FAST_PARTS = 0, STREAMS = 0, LIGHT_HALVES = 0 };

/* float64 */
static inline f64_lanes f64_bits(f64_vec a) {
    f64_lanes bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}
static inline f64_vec f64_of_bits(f64_lanes bits) {
    f64_vec a;
    memcpy(&a, &bits, sizeof a);
    return a;
}
FBN_INLINE f64_vec f64_set(double s) { return s - (f64_vec){0}; }
FBN_INLINE double f64_value(const double *p) { return *p; }
FBN_INLINE f64_vec f64_load(const double *p) {
    f64_vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
FBN_INLINE void f64_store(double *p, f64_vec a) { memcpy(p, &a, sizeof a); }
FBN_INLINE void f64_stream(double *p, f64_vec a) { f64_store(p, a); }
FBN_INLINE f64_vec f64_load_n(const double *p, int64_t n, f64_vec fill) {
    double lane[F64_WIDTH];
    f64_store(lane, fill);
    for (int i = 0; i < F64_WIDTH; i++)
        if (i < n) lane[i] = p[i];
    return f64_load(lane);
}
FBN_INLINE void f64_store_n(double *p, f64_vec a, int64_t n) {
    double lane[F64_WIDTH];
    f64_store(lane, a);
    for (int i = 0; i < F64_WIDTH; i++)
        if (i < n) p[i] = lane[i];
}
FBN_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return a + b; }
FBN_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return a - b; }
FBN_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return a * b; }
FBN_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return a / b; }
static inline f64_vec f64_where(f64_lanes condition, f64_vec a, f64_vec b) {
    return f64_of_bits((condition & f64_bits(a)) | (~condition & f64_bits(b)));
}
FBN_INLINE f64_vec f64_join(f64_vec a, f64_vec b, int64_t n) {
    static const int64_t lane_numbers[] = {0, 1, 2, 3};
    f64_lanes lanes;
    memcpy(&lanes, lane_numbers, sizeof lanes);
    return f64_where(EACH(lanes < (int64_t)n - (f64_lanes){0}), a, b);
}
FBN_INLINE f64_vec f64_where_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) { return f64_where(EACH(a < b), c, d); }
FBN_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return f64_where_less(a, b, a, b); }
FBN_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return f64_where_less(b, a, a, b); }
FBN_INLINE f64_vec f64_relu(f64_vec a) { return f64_of_bits(~EACH(a < 0) & f64_bits(a)); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) { return f64_of_bits(~EACH(z <= 0) & f64_bits(a)); }
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return f64_of_bits(EACH(a == a) & f64_bits(a)); }
FBN_INLINE f64_vec f64_minus_abs(f64_vec a) { return f64_of_bits(f64_bits(f64_set(-(double)0)) | f64_bits(a)); }
static inline f64_vec f64_power_of_2(f64_lanes e) { return f64_of_bits((e + 1023) << 52); }
FBN_INLINE f64_vec f64_ldexp(f64_vec a, f64_vec k) {
    const f64_lanes e = CONVERT(f64_zero_nan(k), f64_lanes), half = e >> 1;
    return a * f64_power_of_2(half) * f64_power_of_2(e - half);
}
FBN_INLINE f64_vec f64_scaled(f64_vec a, f64_vec shifted) {
    return f64_of_bits((f64_lanes)((f64_unsigned)f64_bits(a) - ((f64_unsigned)f64_bits(shifted) << 52)));
}
static inline int f64_all(f64_lanes a) {
    int64_t lane[F64_WIDTH], all = -1;
    memcpy(lane, &a, sizeof lane);
    for (int i = 0; i < F64_WIDTH; i++) all &= lane[i];
    return all == -1;
}
FBN_INLINE int f64_all_less(f64_vec a, f64_vec b) { return f64_all(EACH(a < b)); }
FBN_INLINE f64_vec f64_sums(const f64_vec *a) {
    double sums[F64_WIDTH];
    for (int i = 0; i < F64_WIDTH; i++) {
        double lane[F64_WIDTH];
        f64_store(lane, a[i]);
        for (int half = F64_WIDTH / 2; half; half /= 2)
            for (int k = 0; k < half; k++) lane[k] += lane[k + half];
        sums[i] = lane[0];
    }
    return f64_load(sums);
}
FBN_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return a * b + c; }
FBN_INLINE f64_vec f64_line(f64_vec a, f64_vec b, f64_vec b_low, f64_vec c, f64_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return a * b + c + low;
}
FBN_INLINE f64_vec f64_muladd(f64_vec a, f64_vec b, f64_vec c) { return a * b + c; }

/* float32 */
static inline f32_lanes f32_bits(f32_vec a) {
    f32_lanes bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}
static inline f32_vec f32_of_bits(f32_lanes bits) {
    f32_vec a;
    memcpy(&a, &bits, sizeof a);
    return a;
}
FBN_INLINE f32_vec f32_set(float s) { return s - (f32_vec){0}; }
FBN_INLINE double f32_value(const float *p) { return *p; }
FBN_INLINE f32_vec f32_load(const float *p) {
    f32_vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
FBN_INLINE void f32_store(float *p, f32_vec a) { memcpy(p, &a, sizeof a); }
FBN_INLINE void f32_stream(float *p, f32_vec a) { f32_store(p, a); }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    float lane[F32_WIDTH];
    f32_store(lane, fill);
    for (int i = 0; i < F32_WIDTH; i++)
        if (i < n) lane[i] = p[i];
    return f32_load(lane);
}
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) {
    float lane[F32_WIDTH];
    f32_store(lane, a);
    for (int i = 0; i < F32_WIDTH; i++)
        if (i < n) p[i] = lane[i];
}
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return a + b; }
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return a - b; }
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return a * b; }
FBN_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return a / b; }
static inline f32_vec f32_where(f32_lanes condition, f32_vec a, f32_vec b) {
    return f32_of_bits((condition & f32_bits(a)) | (~condition & f32_bits(b)));
}
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) {
    static const int32_t lane_numbers[] = {0, 1, 2, 3};
    f32_lanes lanes;
    memcpy(&lanes, lane_numbers, sizeof lanes);
    return f32_where(EACH(lanes < (int32_t)n - (f32_lanes){0}), a, b);
}
FBN_INLINE f32_vec f32_where_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) { return f32_where(EACH(a < b), c, d); }
#ifdef FBN_SSE2
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return _mm_min_ps(a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return _mm_max_ps(a, b); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return _mm_max_ps(_mm_setzero_ps(), a); }
#else
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return f32_where_less(a, b, a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return f32_where_less(b, a, a, b); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return f32_of_bits(~EACH(a < 0) & f32_bits(a)); }
#endif
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) { return f32_of_bits(~EACH(z <= 0) & f32_bits(a)); }
FBN_INLINE f32_vec f32_zero_nan(f32_vec a) { return f32_of_bits(EACH(a == a) & f32_bits(a)); }
FBN_INLINE f32_vec f32_minus_abs(f32_vec a) { return f32_of_bits(f32_bits(f32_set(-(float)0)) | f32_bits(a)); }
static inline f32_vec f32_power_of_2(f32_lanes e) { return f32_of_bits((e + 127) << 23); }
FBN_INLINE f32_vec f32_ldexp(f32_vec a, f32_vec k) {
    const f32_lanes e = CONVERT(f32_zero_nan(k), f32_lanes), half = e >> 1;
    return a * f32_power_of_2(half) * f32_power_of_2(e - half);
}
/* Whether all lanes are -1. */
static inline int f32_all(f32_lanes a) {
#ifdef FBN_SSE2
    __m128 mask;
    memcpy(&mask, &a, sizeof mask);
    return _mm_movemask_ps(mask) == 15;
#else
    int32_t lane[F32_WIDTH], all = -1;
    memcpy(lane, &a, sizeof lane);
    for (int i = 0; i < F32_WIDTH; i++) all &= lane[i];
    return all == -1;
#endif
}
FBN_INLINE int f32_all_less(f32_vec a, f32_vec b) { return f32_all(EACH(a < b)); }
FBN_INLINE f32_vec f32_scaled(f32_vec a, f32_vec shifted) {
    return f32_of_bits((f32_lanes)((f32_unsigned)f32_bits(a) - ((f32_unsigned)f32_bits(shifted) << 23)));
}

/* float32 widened to float64. A vector of one number has no upper half; the compiler removes the code for it. */
typedef struct {
    f64_vec lo, hi;
} f32_wide;

/* GCC makes scalar instructions of conversions of two elements. */
#ifdef FBN_SSE2
static inline f64_vec f32_two(const float *p) {
    return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
}
FBN_INLINE f32_wide f32_widen(f32_vec a) { return (f32_wide){_mm_cvtps_pd(a), _mm_cvtps_pd(_mm_movehl_ps(a, a))}; }
FBN_INLINE f32_wide f32_wide_load(const float *p) { return (f32_wide){f32_two(p), f32_two(p + 2)}; }
static inline f32_vec f32_narrow(f32_wide a) { return _mm_movelh_ps(_mm_cvtpd_ps(a.lo), _mm_cvtpd_ps(a.hi)); }
#else
FBN_INLINE f32_wide f32_widen(f32_vec a) {
    return (f32_wide){CONVERT(f32_lower(a), f64_vec), CONVERT(f32_upper(a), f64_vec)};
}
FBN_INLINE f32_wide f32_wide_load(const float *p) { return f32_widen(f32_load(p)); }
static inline f32_vec f32_narrow(f32_wide a) { return f32_both(CONVERT(a.lo, f32_half), CONVERT(a.hi, f32_half)); }
#endif
FBN_INLINE f32_wide f32_wide_set(double s) { return (f32_wide){f64_set(s), f64_set(s)}; }
FBN_INLINE f32_wide f32_wide_get(const double *p) {
    return (f32_wide){f64_load(p), f64_load(p + F32_WIDTH - F64_WIDTH)};
}
FBN_INLINE void f32_wide_put(double *p, f32_wide a) {
    f64_store(p + F32_WIDTH - F64_WIDTH, a.hi);
    f64_store(p, a.lo);
}
FBN_INLINE f32_wide f32_wide_add(f32_wide a, f32_wide b) { return (f32_wide){a.lo + b.lo, a.hi + b.hi}; }
FBN_INLINE f32_wide f32_wide_sub(f32_wide a, f32_wide b) { return (f32_wide){a.lo - b.lo, a.hi - b.hi}; }
FBN_INLINE f32_wide f32_wide_fma(f32_wide a, f32_wide b, f32_wide c) {
    return (f32_wide){f64_fma(a.lo, b.lo, c.lo), f64_fma(a.hi, b.hi, c.hi)};
}
FBN_INLINE f32_wide f32_wide_keep_if_positive(f32_wide z, f32_wide a) {
    return (f32_wide){f64_keep_if_positive(z.lo, a.lo), f64_keep_if_positive(z.hi, a.hi)};
}
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) {
    return f32_narrow(f32_wide_fma(f32_widen(a), f32_widen(b), f32_widen(c)));
}
/* With a fused multiply-add, b is the factor rounded to float32, and a * b is not rounded. Here b + b_low is the factor
 * to within 2^-47 of it, and a * b is rounded. Either way the error is at most u = 2^-24 of the product and half an ulp
 * of each of the two sums. (That of a sum just above a power of 2 is an ulp of a result just below.) What b_low adds is
 * less than 2^-23 of the product, so it and its sum with low are rounded by less than 2^-46 of the product and of c.
 * The rounding of a adds another u of the product: 2 u |xhat gamma| is less than 2 ulp of |xhat| times |gamma|.
 *
 * If c is usual, it is less than half an ulp of the largest number, so that a * b overflows only where the result does,
 * by no more than its rounding. An infinite a gives two infinities of one sign. What a * b and a * b_low lose to
 * underflow is 2^-149 at most. If b is usual, gamma is at least 2^-120 (see kernels/constants.h), and its ulp 2^-143.
 *
 * Whether a lane needs float64 depends on its b and c alone. So do its bits, whatever is known about the other lanes.
 */
static inline f32_vec f32_line_in_f64(f32_vec a, f32_vec b, f32_vec b_low, f32_vec c, f32_vec low) {
    const f32_wide factor = f32_wide_add(f32_widen(b), f32_widen(b_low));
    return f32_narrow(f32_wide_fma(f32_widen(a), factor, f32_widen(c))) + low;
}
FBN_INLINE f32_vec f32_line(f32_vec a, f32_vec b, f32_vec b_low, f32_vec c, f32_vec low, int usual_b, int usual_c) {
    const f32_vec y = (a * b + c) + (a * b_low + low);
    if (usual_b && usual_c) return y;
    const f32_lanes usual =
        (EACH(b * b > 0x1p-124f) | EACH(b == 0) | -usual_b) & EACH(c < 0x1p101f) & EACH(c > -0x1p101f);
    return f32_all(usual) ? y : f32_where(usual, y, f32_line_in_f64(a, b, b_low, c, low));
}
FBN_INLINE f32_vec f32_muladd(f32_vec a, f32_vec b, f32_vec c) { return a * b + c; }

/* 16-bit elements, in the lower half of a lane. half_store takes lanes whose upper half repeats the sign bit. */
#ifdef FBN_SSE2
static inline f32_lanes half_load(const uint16_t *p) {
    return (f32_lanes)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i *)p), _mm_setzero_si128());
}
static inline void half_store(uint16_t *p, f32_lanes a) {
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi32((__m128i)a, (__m128i)a));
}
#else
static inline f32_lanes half_load(const uint16_t *p) {
    half_lanes a;
    memcpy(&a, p, sizeof a);
    return CONVERT(a, f32_lanes);
}
static inline void half_store(uint16_t *p, f32_lanes a) {
    const half_lanes halves = CONVERT(a, half_lanes);
    memcpy(p, &halves, sizeof halves);
}
#endif
FBN_INLINE f32_lanes half_load_n(const uint16_t *p, int64_t n) {
    uint16_t lane[F32_WIDTH] = {0};
    for (int i = 0; i < F32_WIDTH; i++)
        if (i < n) lane[i] = p[i];
    return half_load(lane);
}
FBN_INLINE void half_store_n(uint16_t *p, f32_lanes a, int64_t n) {
    uint16_t lane[F32_WIDTH];
    half_store(lane, a);
    for (int i = 0; i < F32_WIDTH; i++)
        if (i < n) p[i] = lane[i];
}

/* float16. A subnormal is converted as the normal number with the same fraction, minus that number's leading 1. */
static inline f32_vec f16_exact(f32_lanes a) {
    const f32_lanes sign = (f32_lanes)((f32_unsigned)(a & 0x8000) << 16), rest = (a & 0x7fff) << 13,
                    more = ((127 - 15) << 23) - (f32_lanes){0};
    const f32_lanes special = EACH(rest > 0x0f7fffff), subnormal = EACH(rest < 1 << 23);
    const f32_lanes scaled = rest + more + (special & more) + (subnormal & 1 << 23);
    return f32_of_bits(sign | f32_bits(f32_of_bits(scaled) - f32_of_bits(subnormal & f32_bits(f32_set(0x1p-14f)))));
}
/* The float16 nearest to `size`, which is at most 2^16 and not negative. The sum with 2^13 times the power of 2 at or
 * below it, or the least one of a normal float16, is rounded where the float16 must be, and ends with its fraction and
 * leading 1. A NaN gives more than any float16 has. */
static inline f32_lanes f16_nearest(f32_vec size) {
    const f32_vec power = f32_max(f32_of_bits(f32_bits(size) & 0x7f800000), f32_set(0x1p-14f)), large = power * 0x1p13f;
    const f32_lanes fraction = f32_bits(large + size) - f32_bits(large);
    return fraction + ((f32_bits(power) - (113 << 23)) >> 13);
}
/* Every NaN becomes 0x7e00 with its sign. */
static inline f32_lanes f16_round(f32_vec a) {
    const f32_vec size = f32_min(f32_of_bits(f32_bits(a) & 0x7fffffff), f32_set(0x1p16f));
    return (f32_bits(a) >> 16 & -0x8000) | f16_nearest(size) | (EACH(a != a) & 0x200);
}
FBN_INLINE f32_vec f16_load(const uint16_t *p) { return f16_exact(half_load(p)); }
FBN_INLINE f32_vec f16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_join(f16_exact(half_load_n(p, n)), fill, n);
}
FBN_INLINE double f16_value(const uint16_t *p) {
    float lane[F32_WIDTH];
    f32_store(lane, f16_load_n(p, 1, f32_set(0)));
    return lane[0];
}
FBN_INLINE void f16_store(uint16_t *p, f32_vec a) { half_store(p, f16_round(a)); }
FBN_INLINE void f16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, f16_round(a), n); }
FBN_INLINE void f16_stream(uint16_t *p, f32_vec a) { f16_store(p, a); }
FBN_INLINE f32_wide f16_wide_load(const uint16_t *p) { return f32_widen(f16_load(p)); }

/* Two vectors, with much of the work in 16-bit lanes. */
#ifdef FBN_SSE2
#define F16_PAIRS
/* n, with the exponent of a normal float16, is right but for subnormals: these are 2 n - 2^-14, which is less than n
 * there and nowhere else. (To multiply subnormal numbers takes Intel's processors long.) */
static inline f32_vec f16_signed(__m128i fraction_and_exponent, __m128i sign) {
    const f32_vec n = _mm_castsi128_ps(fraction_and_exponent), size = _mm_min_ps(n, n + n - 0x1p-14f);
    return _mm_or_ps(size, _mm_castsi128_ps(sign));
}
FBN_INLINE void f16_load_pair(const uint16_t *p, f32_vec *to) {
    const __m128i a = _mm_loadu_si128((const __m128i *)p), zero = _mm_setzero_si128();
    const __m128i sign = _mm_and_si128(a, _mm_set1_epi16(-0x8000)), rest = _mm_xor_si128(a, sign);
    const __m128i more = _mm_set1_epi16((127 - 15) << 7), special = _mm_cmpgt_epi16(rest, _mm_set1_epi16(0x7bff));
    const __m128i low = _mm_slli_epi16(a, 13), exponent = _mm_add_epi16(_mm_srli_epi16(rest, 3), more);
    const __m128i high = _mm_add_epi16(exponent, _mm_and_si128(special, more));
    to[0] = f16_signed(_mm_unpacklo_epi16(low, high), _mm_unpacklo_epi16(zero, sign));
    to[1] = f16_signed(_mm_unpackhi_epi16(low, high), _mm_unpackhi_epi16(zero, sign));
}
/* Packing limits what a NaN gives to 0x7fff, and to the least number what is negative, as bits of an integer. */
FBN_INLINE void f16_store_pair(uint16_t *p, const f32_vec *a) {
    const __m128 most = _mm_set1_ps(0x1p16f), rest = _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff));
    const f32_lanes first = f16_nearest(_mm_min_ps(most, _mm_and_ps(a[0], rest)));
    const f32_lanes second = f16_nearest(_mm_min_ps(most, _mm_and_ps(a[1], rest)));
    const __m128i number = _mm_packs_epi32((__m128i)first, (__m128i)second);
    const __m128i nan = _mm_cmpgt_epi16(number, _mm_set1_epi16(0x7c00));
    const __m128i sign = _mm_and_si128(_mm_packs_epi32((__m128i)a[0], (__m128i)a[1]), _mm_set1_epi16(-0x8000));
    const __m128i plain = _mm_andnot_si128(_mm_and_si128(nan, _mm_set1_epi16(0x1ff)), number);
    _mm_storeu_si128((__m128i *)p, _mm_or_si128(sign, plain));
}
#endif

/* bfloat16: the upper half of a float32. A NaN is cut off rather than rounded, which could carry into its sign: other
 * processors may set any bits of a NaN that they compute. */
FBN_INLINE f32_vec bf16_exact(f32_lanes a) { return f32_of_bits((f32_lanes)((f32_unsigned)a << 16)); }
FBN_INLINE f32_lanes bf16_round(f32_vec a) {
    const f32_lanes bits = f32_bits(a), half = 0x7fff + (bits >> 16 & 1);
    return (bits + (EACH(a == a) & half)) >> 16;
}
FBN_INLINE f32_vec bf16_load(const uint16_t *p) { return bf16_exact(half_load(p)); }
FBN_INLINE f32_vec bf16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_join(bf16_exact(half_load_n(p, n)), fill, n);
}
FBN_INLINE double bf16_value(const uint16_t *p) {
    float lane[F32_WIDTH];
    f32_store(lane, bf16_load_n(p, 1, f32_set(0)));
    return lane[0];
}
FBN_INLINE void bf16_store(uint16_t *p, f32_vec a) { half_store(p, bf16_round(a)); }
FBN_INLINE void bf16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, bf16_round(a), n); }
FBN_INLINE void bf16_stream(uint16_t *p, f32_vec a) { bf16_store(p, a); }
FBN_INLINE f32_wide bf16_wide_load(const uint16_t *p) { return f32_widen(bf16_load(p)); }

FBN_INLINE void prefetch(const void *p) { (void)p; }
FBN_INLINE void stream_fence(void) {}

#endif
