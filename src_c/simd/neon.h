/* neon.h: the vector vocabulary on AArch64. See baseline.h for what each operation means. */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <arm_neon.h>

#include "../kernels.h"

/* float64 */
typedef float64x2_t f64_vec;
enum { F64_WIDTH = 2 };

FBN_INLINE f64_vec f64_set(double s) { return vdupq_n_f64(s); }
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
FBN_INLINE f64_vec f64_relu(f64_vec a) { return vbslq_f64(vcltzq_f64(a), f64_set(0), a); }
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) { return vbslq_f64(vclezq_f64(z), f64_set(0), a); }
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) { return vbslq_f64(vceqq_f64(a, a), a, f64_set(0)); }

/* float32 */
typedef float32x4_t f32_vec;
enum { F32_WIDTH = 4 };

FBN_INLINE f32_vec f32_set(float s) { return vdupq_n_f32(s); }
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
FBN_INLINE f32_vec f32_relu(f32_vec a) { return vbslq_f32(vcltzq_f32(a), f32_set(0), a); }
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) { return vbslq_f32(vclezq_f32(z), f32_set(0), a); }
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

FBN_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
FBN_INLINE void stream_fence(void) {}

#endif
