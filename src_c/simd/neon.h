/* neon.h: the vector vocabulary on AArch64. See baseline.h for what each operation means. */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <arm_neon.h>
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

#include "../kernels.h"

/* float64 */
typedef float64x2_t f64_vec;
enum { F64_WIDTH = 2, F64_SPLITS_B = 0 };

FBN_INLINE f64_vec f64_set(double s) { return vdupq_n_f64(s); }
FBN_INLINE double f64_value(const double *p) { return *p; }
FBN_INLINE f64_vec f64_load(const double *p) { return vld1q_f64(p); }
FBN_INLINE f64_vec f64_load_n(const double *p, int64_t n, f64_vec fill) {
    if (n >= 2) return vld1q_f64(p);
    return n == 1 ? vld1q_lane_f64(p, fill, 0) : fill;
}
FBN_INLINE void f64_store(double *p, f64_vec a) { vst1q_f64(p, a); }
FBN_INLINE void f64_store_n(double *p, f64_vec a, int64_t n) {
    if (n >= 2) vst1q_f64(p, a);
    else if (n == 1) vst1q_lane_f64(p, a, 0);
}
FBN_INLINE void f64_stream(double *p, f64_vec a) { vst1q_f64(p, a); }
FBN_INLINE f64_vec f64_join(f64_vec a, f64_vec b, int64_t n) {
    double lanes[F64_WIDTH];
    f64_store(lanes, a);
    return f64_load_n(lanes, n, b);
}
FBN_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return vaddq_f64(a, b); }
FBN_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return vsubq_f64(a, b); }
FBN_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return vmulq_f64(a, b); }
FBN_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return vfmaq_f64(c, a, b); }
FBN_INLINE f64_vec f64_line(f64_vec a, f64_vec b, f64_vec b_low, f64_vec c, f64_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f64_add(f64_fma(a, b, c), low);
}
FBN_INLINE f64_vec f64_muladd(f64_vec a, f64_vec b, f64_vec c) { return f64_fma(a, b, c); }
FBN_INLINE f64_vec f64_relu(f64_vec a) { return vbslq_f64(vcltzq_f64(a), f64_set(0), a); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) { return vbslq_f64(vclezq_f64(z), f64_set(0), a); }
FBN_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return vdivq_f64(a, b); }
FBN_INLINE f64_vec f64_minus_abs(f64_vec a) { return vnegq_f64(vabsq_f64(a)); }
FBN_INLINE f64_vec f64_where_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return vbslq_f64(vcltq_f64(a, b), c, d);
}
FBN_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return f64_where_less(a, b, a, b); }
FBN_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return f64_where_less(b, a, a, b); }
FBN_INLINE f64_vec f64_power_of_2(int64x2_t e) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vaddq_s64(e, vdupq_n_s64(1023)), 52));
}
FBN_INLINE f64_vec f64_ldexp(f64_vec a, f64_vec k) {
    const int64x2_t e = vcvtq_s64_f64(k), half = vshrq_n_s64(e, 1);
    return f64_mul(f64_mul(a, f64_power_of_2(half)), f64_power_of_2(vsubq_s64(e, half)));
}
FBN_INLINE f64_vec f64_scaled(f64_vec a, f64_vec shifted) {
    const int64x2_t exponent = vshlq_n_s64(vreinterpretq_s64_f64(shifted), 52);
    return vreinterpretq_f64_s64(vsubq_s64(vreinterpretq_s64_f64(a), exponent));
}
FBN_INLINE int f64_all_less(f64_vec a, f64_vec b) {
    return vminvq_u32(vreinterpretq_u32_u64(vcltq_f64(a, b))) == UINT32_MAX;
}
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return vbslq_f64(vceqq_f64(a, a), a, f64_set(0)); }
FBN_INLINE f64_vec f64_sums(const f64_vec *a) { return vpaddq_f64(a[0], a[1]); }

/* float32 */
typedef float32x4_t f32_vec;
enum { F32_WIDTH = 4, F32_SPLITS_B = 0, FAST_PARTS = 0, STREAMS = 0, LIGHT_HALVES = 0 };

FBN_INLINE f32_vec f32_set(float s) { return vdupq_n_f32(s); }
FBN_INLINE double f32_value(const float *p) { return *p; }
FBN_INLINE f32_vec f32_load(const float *p) { return vld1q_f32(p); }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    if (n >= 4) return vld1q_f32(p);
    if (n >= 1) fill = vld1q_lane_f32(p, fill, 0);
    if (n >= 2) fill = vld1q_lane_f32(p + 1, fill, 1);
    if (n >= 3) fill = vld1q_lane_f32(p + 2, fill, 2);
    return fill;
}
FBN_INLINE void f32_store(float *p, f32_vec a) { vst1q_f32(p, a); }
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) {
    if (n >= 4) {
        vst1q_f32(p, a);
        return;
    }
    if (n >= 1) vst1q_lane_f32(p, a, 0);
    if (n >= 2) vst1q_lane_f32(p + 1, a, 1);
    if (n >= 3) vst1q_lane_f32(p + 2, a, 2);
}
FBN_INLINE void f32_stream(float *p, f32_vec a) { vst1q_f32(p, a); }
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) {
    float lanes[F32_WIDTH];
    f32_store(lanes, a);
    return f32_load_n(lanes, n, b);
}
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return vaddq_f32(a, b); }
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return vsubq_f32(a, b); }
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return vmulq_f32(a, b); }
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return vfmaq_f32(c, a, b); }
FBN_INLINE f32_vec f32_line(f32_vec a, f32_vec b, f32_vec b_low, f32_vec c, f32_vec low, int usual_b, int usual_c) {
    (void)b_low, (void)usual_b, (void)usual_c;
    return f32_add(f32_fma(a, b, c), low);
}
FBN_INLINE f32_vec f32_muladd(f32_vec a, f32_vec b, f32_vec c) { return f32_fma(a, b, c); }
FBN_INLINE f32_vec f32_relu(f32_vec a) { return vbslq_f32(vcltzq_f32(a), f32_set(0), a); }
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) { return vbslq_f32(vclezq_f32(z), f32_set(0), a); }
FBN_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return vdivq_f32(a, b); }
FBN_INLINE f32_vec f32_minus_abs(f32_vec a) { return vnegq_f32(vabsq_f32(a)); }
FBN_INLINE f32_vec f32_where_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return vbslq_f32(vcltq_f32(a, b), c, d);
}
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return f32_where_less(a, b, a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return f32_where_less(b, a, a, b); }
FBN_INLINE f32_vec f32_power_of_2(int32x4_t e) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
}
FBN_INLINE f32_vec f32_ldexp(f32_vec a, f32_vec k) {
    const int32x4_t e = vcvtq_s32_f32(k), half = vshrq_n_s32(e, 1);
    return f32_mul(f32_mul(a, f32_power_of_2(half)), f32_power_of_2(vsubq_s32(e, half)));
}
FBN_INLINE f32_vec f32_scaled(f32_vec a, f32_vec shifted) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23);
    return vreinterpretq_f32_s32(vsubq_s32(vreinterpretq_s32_f32(a), exponent));
}
FBN_INLINE int f32_all_less(f32_vec a, f32_vec b) { return vminvq_u32(vcltq_f32(a, b)) == UINT32_MAX; }
FBN_INLINE f32_vec f32_zero_nan(f32_vec a) { return vbslq_f32(vceqq_f32(a, a), a, f32_set(0)); }

/* float32 widened to float64 */
typedef struct {
    float64x2_t lo, hi;
} f32_wide;

FBN_INLINE f32_wide f32_widen(f32_vec a) { return (f32_wide){vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a)}; }
FBN_INLINE f32_wide f32_wide_load(const float *p) { return f32_widen(vld1q_f32(p)); }
FBN_INLINE f32_wide f32_wide_set(double s) { return (f32_wide){f64_set(s), f64_set(s)}; }
FBN_INLINE f32_wide f32_wide_get(const double *p) { return (f32_wide){f64_load(p), f64_load(p + 2)}; }
FBN_INLINE void f32_wide_put(double *p, f32_wide a) {
    f64_store(p, a.lo);
    f64_store(p + 2, a.hi);
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
FBN_INLINE f32_wide f32_wide_keep_if_positive(f32_wide z, f32_wide a) {
    return (f32_wide){f64_keep_if_positive(z.lo, a.lo), f64_keep_if_positive(z.hi, a.hi)};
}

/* 16-bit elements, which are computed in float32 */
FBN_INLINE uint16x4_t half_load_n(const uint16_t *p, int64_t n) {
    uint16x4_t a = vdup_n_u16(0);
    if (n >= 4) return vld1_u16(p);
    if (n >= 1) a = vld1_lane_u16(p, a, 0);
    if (n >= 2) a = vld1_lane_u16(p + 1, a, 1);
    if (n >= 3) a = vld1_lane_u16(p + 2, a, 2);
    return a;
}
FBN_INLINE void half_store_n(uint16_t *p, uint16x4_t a, int64_t n) {
    if (n >= 4) {
        vst1_u16(p, a);
        return;
    }
    if (n >= 1) vst1_lane_u16(p, a, 0);
    if (n >= 2) vst1_lane_u16(p + 1, a, 1);
    if (n >= 3) vst1_lane_u16(p + 2, a, 2);
}
FBN_INLINE f32_vec f32_first_of(f32_vec a, int64_t n, f32_vec fill) {
    static const uint32_t lanes[F32_WIDTH] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_u32(vld1q_u32(lanes), vdupq_n_u32((uint32_t)n)), a, fill);
}

/* float16 */
FBN_INLINE f32_vec f16_exact(uint16x4_t a) { return vcvt_f32_f16(vreinterpret_f16_u16(a)); }
FBN_INLINE uint16x4_t f16_round(f32_vec a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
FBN_INLINE double f16_value(const uint16_t *p) { return vgetq_lane_f32(f16_exact(vdup_n_u16(*p)), 0); }
FBN_INLINE f32_vec f16_load(const uint16_t *p) { return f16_exact(vld1_u16(p)); }
FBN_INLINE f32_vec f16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_first_of(f16_exact(half_load_n(p, n)), n, fill);
}
FBN_INLINE void f16_store(uint16_t *p, f32_vec a) { vst1_u16(p, f16_round(a)); }
FBN_INLINE void f16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, f16_round(a), n); }
FBN_INLINE void f16_stream(uint16_t *p, f32_vec a) { f16_store(p, a); }
FBN_INLINE f32_wide f16_wide_load(const uint16_t *p) { return f32_widen(f16_load(p)); }

/* bfloat16, converted by integer operations, since AArch64 has an instruction for it only from version 8.6 on. */
FBN_INLINE f32_vec bf16_exact(uint16x4_t a) { return vreinterpretq_f32_u32(vshll_n_u16(a, 16)); }
FBN_INLINE uint16x4_t bf16_round(f32_vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
}
FBN_INLINE double bf16_value(const uint16_t *p) { return vgetq_lane_f32(bf16_exact(vdup_n_u16(*p)), 0); }
FBN_INLINE f32_vec bf16_load(const uint16_t *p) { return bf16_exact(vld1_u16(p)); }
FBN_INLINE f32_vec bf16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    return f32_first_of(bf16_exact(half_load_n(p, n)), n, fill);
}
FBN_INLINE void bf16_store(uint16_t *p, f32_vec a) { vst1_u16(p, bf16_round(a)); }
FBN_INLINE void bf16_store_n(uint16_t *p, f32_vec a, int64_t n) { half_store_n(p, bf16_round(a), n); }
FBN_INLINE void bf16_stream(uint16_t *p, f32_vec a) { bf16_store(p, a); }
FBN_INLINE f32_wide bf16_wide_load(const uint16_t *p) { return f32_widen(bf16_load(p)); }

#if defined(_MSC_VER) && !defined(__clang__)
FBN_INLINE void prefetch(const void *p) { __prefetch(p); }
#else
FBN_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
#endif
FBN_INLINE void stream_fence(void) {}

#endif
