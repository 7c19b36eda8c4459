/* baseline.h: the vector vocabulary in portable C, for any processor, and what each operation means.
 *
 * T is f32 or f64; a T_vec holds T_WIDTH elements.
 *   T_set(s)              s in every lane
 *   T_load(p), T_store    T_WIDTH elements, any alignment
 *   T_load_n(p, n, fill)  the first n elements, 0 <= n <= T_WIDTH, and fill in the other lanes; touches no other memory
 *   T_store_n(p, a, n)    writes the first n lanes only
 *   T_stream(p, a)        T_store, around the cache where the processor can; p is aligned to the vector's size
 *   T_join(a, b, n)       the first n lanes of a, then those of b
 *   T_add, T_mul, T_sub   lane by lane
 *   T_fma(a, b, c)        a * b + c, rounded once. Here float32 goes through float64, where the product is exact, and
 *                         float64 is rounded twice.
 *   T_relu(a)             0 where a < 0, else a (so NaN stays)
 *   T_zero_nan(a)         0 where a is NaN, else a
 *   T_keep_if_positive(z, a)  a where z > 0 or z is NaN, else 0
 * A T_wide holds the T_WIDTH lanes of a T_vec in float64 (for f64 it is the vector itself):
 *   T_widen(a)            converted, exactly
 *   T_wide_load(p)        T_widen(T_load(p))
 *   T_wide_get(p), T_wide_put(p, a)   T_WIDTH doubles from and to memory
 *   T_wide_set, T_wide_add, T_wide_sub, T_wide_fma
 * prefetch(p)             may fetch the line at p into the cache; any address will do
 * stream_fence()          orders streamed stores before what follows
 */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include "../kernels.h"

/* float64 */
enum { F64_WIDTH = 4, F32_WIDTH = 4 };
typedef struct {
    double lane[F64_WIDTH];
} f64_vec;

FBN_INLINE f64_vec f64_set(double s) { return (f64_vec){{s, s, s, s}}; }
FBN_INLINE f64_vec f64_load(const double *p) { return (f64_vec){{p[0], p[1], p[2], p[3]}}; }
FBN_INLINE f64_vec f64_load_n(const double *p, int64_t n, f64_vec fill) {
    for (int64_t i = 0; i < n; i++) fill.lane[i] = p[i];
    return fill;
}
FBN_INLINE void f64_store_n(double *p, f64_vec a, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = a.lane[i];
}
FBN_INLINE void f64_store(double *p, f64_vec a) { f64_store_n(p, a, F64_WIDTH); }
FBN_INLINE void f64_stream(double *p, f64_vec a) { f64_store(p, a); }
FBN_INLINE f64_vec f64_join(f64_vec a, f64_vec b, int64_t n) { return f64_load_n(a.lane, n, b); }
FBN_INLINE f64_vec f64_add(f64_vec a, f64_vec b) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] += b.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] -= b.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] *= b.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return f64_add(f64_mul(a, b), c); }
FBN_INLINE f64_vec f64_relu(f64_vec a) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] = a.lane[i] < 0 ? 0 : a.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_keep_if_positive(f64_vec z, f64_vec a) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] = z.lane[i] <= 0 ? 0 : a.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_zero_nan(f64_vec a) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] = a.lane[i] == a.lane[i] ? a.lane[i] : 0;
    return a;
}

/* float32 */
typedef struct {
    float lane[F32_WIDTH];
} f32_vec;

FBN_INLINE f32_vec f32_set(float s) { return (f32_vec){{s, s, s, s}}; }
FBN_INLINE f32_vec f32_load(const float *p) { return (f32_vec){{p[0], p[1], p[2], p[3]}}; }
FBN_INLINE f32_vec f32_load_n(const float *p, int64_t n, f32_vec fill) {
    for (int64_t i = 0; i < n; i++) fill.lane[i] = p[i];
    return fill;
}
FBN_INLINE void f32_store_n(float *p, f32_vec a, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = a.lane[i];
}
FBN_INLINE void f32_store(float *p, f32_vec a) { f32_store_n(p, a, F32_WIDTH); }
FBN_INLINE void f32_stream(float *p, f32_vec a) { f32_store(p, a); }
FBN_INLINE f32_vec f32_join(f32_vec a, f32_vec b, int64_t n) { return f32_load_n(a.lane, n, b); }
FBN_INLINE f32_vec f32_add(f32_vec a, f32_vec b) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] += b.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] -= b.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] *= b.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) {
    for (int i = 0; i < F32_WIDTH; i++) c.lane[i] = (float)((double)a.lane[i] * b.lane[i] + c.lane[i]);
    return c;
}
FBN_INLINE f32_vec f32_relu(f32_vec a) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] = a.lane[i] < 0 ? 0 : a.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_keep_if_positive(f32_vec z, f32_vec a) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] = z.lane[i] <= 0 ? 0 : a.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_zero_nan(f32_vec a) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] = a.lane[i] == a.lane[i] ? a.lane[i] : 0;
    return a;
}

/* float32 widened to float64 */
typedef f64_vec f32_wide;

FBN_INLINE f32_wide f32_widen(f32_vec a) { return (f32_wide){{a.lane[0], a.lane[1], a.lane[2], a.lane[3]}}; }
FBN_INLINE f32_wide f32_wide_load(const float *p) { return f32_widen(f32_load(p)); }
FBN_INLINE f32_wide f32_wide_set(double s) { return f64_set(s); }
FBN_INLINE f32_wide f32_wide_get(const double *p) { return f64_load(p); }
FBN_INLINE void f32_wide_put(double *p, f32_wide a) { f64_store(p, a); }
FBN_INLINE f32_wide f32_wide_add(f32_wide a, f32_wide b) { return f64_add(a, b); }
FBN_INLINE f32_wide f32_wide_sub(f32_wide a, f32_wide b) { return f64_sub(a, b); }
FBN_INLINE f32_wide f32_wide_fma(f32_wide a, f32_wide b, f32_wide c) { return f64_fma(a, b, c); }

FBN_INLINE void prefetch(const void *p) { (void)p; }
FBN_INLINE void stream_fence(void) {}

#endif
