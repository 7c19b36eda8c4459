/* baseline.h: the vector vocabulary in portable C, for any processor, and what each operation means.
 *
 * T is f32 or f64; a T_vec holds T_WIDTH elements.
 *   T_value(p)            the element at p, as a double
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
 *   T_minus_abs(a)        -|a|, 0 of any sign
 *   T_where_less(a, b, c, d)  c where a < b, else d (so d where a or b is NaN)
 *   T_min(a, b), T_max    a where a < b or a > b, else b (so b where either is NaN, or both are 0)
 *   T_div(a, b)           a / b
 *   T_ldexp(a, k)         a * 2^k, rounded once where |a| is near 1 or above; k is an integer, twice the dtype's least
 *                         exponent to 0, or NaN if a is
 * A T_wide holds the T_WIDTH lanes of a T_vec in float64 (for f64 it is the vector itself):
 *   T_widen(a)            converted, exactly
 *   T_wide_load(p)        T_widen(T_load(p))
 *   T_wide_get(p), T_wide_put(p, a)   T_WIDTH doubles from and to memory
 *   T_wide_set, T_wide_add, T_wide_sub, T_wide_fma
 * H is f16 or bf16: 16-bit elements, in memory alone; its vectors are f32_vec.
 *   H_value, H_load, H_load_n, H_wide_load   as those of f32; exact, subnormals too
 *   H_store, H_store_n, H_stream             rounded to nearest, ties to even; NaN becomes a quiet one
 * OWN_LOOPS               whether identity and relu have loops of their own, or one serves every activation
 * prefetch(p)             may fetch the line at p into the cache; any address will do
 * stream_fence()          orders streamed stores before what follows
 */
#ifndef FBN_SIMD_H
#define FBN_SIMD_H

#include <string.h>

#include "../kernels.h"

/* float64 */
enum { F64_WIDTH = 4, F32_WIDTH = 4 };
typedef struct {
    double lane[F64_WIDTH];
} f64_vec;

FBN_INLINE f64_vec f64_set(double s) { return (f64_vec){{s, s, s, s}}; }
FBN_INLINE double f64_value(const double *p) { return *p; }
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
FBN_INLINE f64_vec f64_div(f64_vec a, f64_vec b) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] /= b.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_minus_abs(f64_vec a) {
    for (int i = 0; i < F64_WIDTH; i++) a.lane[i] = a.lane[i] < 0 ? a.lane[i] : -a.lane[i];
    return a;
}
FBN_INLINE f64_vec f64_where_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    for (int i = 0; i < F64_WIDTH; i++) d.lane[i] = a.lane[i] < b.lane[i] ? c.lane[i] : d.lane[i];
    return d;
}
FBN_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return f64_where_less(a, b, a, b); }
FBN_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return f64_where_less(b, a, a, b); }
static inline double f64_power_of_2(int e) {
    const uint64_t bits = (uint64_t)(e + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return power;
}
FBN_INLINE f64_vec f64_ldexp(f64_vec a, f64_vec k) {
    for (int i = 0; i < F64_WIDTH; i++) {
        const int e = k.lane[i] == k.lane[i] ? (int)k.lane[i] : 0, half = e / 2;
        a.lane[i] = a.lane[i] * f64_power_of_2(half) * f64_power_of_2(e - half);
    }
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
FBN_INLINE double f32_value(const float *p) { return *p; }
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
FBN_INLINE f32_vec f32_div(f32_vec a, f32_vec b) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] /= b.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_minus_abs(f32_vec a) {
    for (int i = 0; i < F32_WIDTH; i++) a.lane[i] = a.lane[i] < 0 ? a.lane[i] : -a.lane[i];
    return a;
}
FBN_INLINE f32_vec f32_where_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    for (int i = 0; i < F32_WIDTH; i++) d.lane[i] = a.lane[i] < b.lane[i] ? c.lane[i] : d.lane[i];
    return d;
}
FBN_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return f32_where_less(a, b, a, b); }
FBN_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return f32_where_less(b, a, a, b); }
static inline float f32_power_of_2(int e) {
    const uint32_t bits = (uint32_t)(e + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}
FBN_INLINE f32_vec f32_ldexp(f32_vec a, f32_vec k) {
    for (int i = 0; i < F32_WIDTH; i++) {
        const int e = k.lane[i] == k.lane[i] ? (int)k.lane[i] : 0, half = e / 2;
        a.lane[i] = a.lane[i] * f32_power_of_2(half) * f32_power_of_2(e - half);
    }
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
FBN_INLINE f32_wide f32_wide_keep_if_positive(f32_wide z, f32_wide a) { return f64_keep_if_positive(z, a); }

/* float32 as its bits */
static inline uint32_t f32_bits(float a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}
static inline float f32_of_bits(uint32_t bits) {
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}

/* float16. A subnormal is the fraction of a normal number, less what its leading 1 adds. */
static inline float f16_exact(uint16_t a) {
    const uint32_t sign = (uint32_t)(a & 0x8000) << 16, rest = (uint32_t)(a & 0x7fff) << 13;
    const uint32_t scaled = rest + ((uint32_t)(rest < 0x0f800000 ? 127 - 15 : 2 * (127 - 15)) << 23);
    const float subnormal = f32_of_bits(rest | 113u << 23) - 0x1p-14f;
    return f32_of_bits(sign | (rest < 1u << 23 ? f32_bits(subnormal) : scaled));
}
FBN_INLINE uint16_t f16_round(float a) {
    const uint32_t bits = f32_bits(a), rest = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    /* An addition that leaves the bits of a float16 subnormal at the end rounds as it should. */
    const uint32_t subnormal = f32_bits(f32_of_bits(rest) + 0.5f) - f32_bits(0.5f);
    const uint32_t normal = (rest + 0xfff + (rest >> 13 & 1) - ((127u - 15) << 23)) >> 13;
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 | (rest >> 13 & 0x3ff) : 0x7c00;
    return (uint16_t)(sign | (rest < 113u << 23 ? subnormal : rest < 143u << 23 ? normal : special));
}
FBN_INLINE double f16_value(const uint16_t *p) { return f16_exact(*p); }
FBN_INLINE f32_vec f16_load(const uint16_t *p) {
    return (f32_vec){{f16_exact(p[0]), f16_exact(p[1]), f16_exact(p[2]), f16_exact(p[3])}};
}
FBN_INLINE f32_vec f16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    for (int64_t i = 0; i < n; i++) fill.lane[i] = f16_exact(p[i]);
    return fill;
}
FBN_INLINE void f16_store_n(uint16_t *p, f32_vec a, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = f16_round(a.lane[i]);
}
FBN_INLINE void f16_store(uint16_t *p, f32_vec a) { f16_store_n(p, a, F32_WIDTH); }
FBN_INLINE void f16_stream(uint16_t *p, f32_vec a) { f16_store(p, a); }
FBN_INLINE f32_wide f16_wide_load(const uint16_t *p) { return f32_widen(f16_load(p)); }

/* bfloat16: the upper half of a float32 */
FBN_INLINE float bf16_exact(uint16_t a) { return f32_of_bits((uint32_t)a << 16); }
FBN_INLINE uint16_t bf16_round(float a) {
    const uint32_t bits = f32_bits(a), high = bits >> 16;
    return (uint16_t)(a == a ? (bits + 0x7fff + (high & 1)) >> 16 : high | 0x40);
}
FBN_INLINE double bf16_value(const uint16_t *p) { return bf16_exact(*p); }
FBN_INLINE f32_vec bf16_load(const uint16_t *p) {
    return (f32_vec){{bf16_exact(p[0]), bf16_exact(p[1]), bf16_exact(p[2]), bf16_exact(p[3])}};
}
FBN_INLINE f32_vec bf16_load_n(const uint16_t *p, int64_t n, f32_vec fill) {
    for (int64_t i = 0; i < n; i++) fill.lane[i] = bf16_exact(p[i]);
    return fill;
}
FBN_INLINE void bf16_store_n(uint16_t *p, f32_vec a, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = bf16_round(a.lane[i]);
}
FBN_INLINE void bf16_store(uint16_t *p, f32_vec a) { bf16_store_n(p, a, F32_WIDTH); }
FBN_INLINE void bf16_stream(uint16_t *p, f32_vec a) { bf16_store(p, a); }
FBN_INLINE f32_wide bf16_wide_load(const uint16_t *p) { return f32_widen(bf16_load(p)); }

/* Without vectors, what a loop saves is little beside what it computes, and its code is long. */
enum { OWN_LOOPS = 0 };

FBN_INLINE void prefetch(const void *p) { (void)p; }
FBN_INLINE void stream_fence(void) {}

#endif
