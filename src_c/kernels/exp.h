/* exp.h: exp(-z), for the sigmoid and the SiLU.
 *
 * z = k ln 2 + r with |r| <= ln(2) / 2 (Cody & Waite: ln 2 in two pieces, of which the first has so few bits that k
 * times it is exact), and exp(-z) = 2^-k exp(-r). exp(-r) is 1 - (r + r^2 c(r)), where c is a polynomial: the Taylor
 * series up to r^13 in float64, and in float32 the best approximation of degree 6, with errors below 0.1 ulp. Terms are
 * added in pairs, since a chain of additions that wait for each other would take longer. The error of exp is below 1.1
 * ulp.
 */

/* How many vectors loops compute at once. A function's `count` is at most that. Each operation is done for all of
 * them before the next, since those on one vector wait for each other, and processors do not look far enough ahead to
 * find others. Where float32's scale is split there are registers for two (x86 without AVX2). */
enum { NAME(AT_ONCE) = F32_SPLITS_B ? 2 : 4 };

/* 2^-k (1 - less), |less| < 1/2. k was added to a shift, which rounded it to an integer. */
typedef struct {
    vec less, shifted;
} NAME(parts_of_exp);

/* Up to NEAR, the square of exp(|z|) is finite. From NEAR on, 1 + exp(-|z|) is 1. Beyond FAR, exp(-|z|) and
 * z * exp(-|z|) are 0. */
enum { NAME(NEAR) = sizeof(real) == 8 ? 354 : 44, NAME(FAR) = sizeof(real) == 8 ? 800 : 128 };

FBN_INLINE vec NAME(shift)(void) { return vset((real)(sizeof(real) == 8 ? 0x1.8p52 : 0x1.8p23)); }

/* c0 + c1 r + c2 r^2 + ... + c5 r^5, or without the last term in float32 */
FBN_INLINE vec NAME(terms)(const double *c, vec r, vec square) {
    const vec first = vmuladd(vset((real)c[1]), r, vset((real)c[0])),
              second = vmuladd(vset((real)c[3]), r, vset((real)c[2]));
    const vec third = sizeof(real) == 8 ? vmuladd(vset((real)c[5]), r, vset((real)c[4])) : vset((real)c[4]);
    return vmuladd(vmuladd(third, square, second), square, first);
}

FBN_INLINE void NAME(exps_of_minus)(const vec *z, int count, NAME(parts_of_exp) * e) {
    static const double best[] = {-0x1.fffffcp-2, 0x1.555492p-3, -0x1.5558f2p-5, 0x1.1239d6p-7, -0x1.6a2448p-10};
    static const double factors[] = {-1.0 / 2,       1.0 / 6,        -1.0 / 24,        1.0 / 120,
                                     -1.0 / 720,     1.0 / 5040,     -1.0 / 40320,     1.0 / 362880,
                                     -1.0 / 3628800, 1.0 / 39916800, -1.0 / 479001600, 1.0 / 6227020800};
    const double high = sizeof(real) == 8 ? 0x1.62e42feep-1 : 0x1.62e4p-1;
    const double low = sizeof(real) == 8 ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cf79abcap-20;
    vec k[NAME(AT_ONCE)], r[NAME(AT_ONCE)], square[NAME(AT_ONCE)], c[NAME(AT_ONCE)];
    for (int j = 0; j < count; j++) e[j].shifted = vmuladd(z[j], vset((real)0x1.71547652b82fep0), NAME(shift)());
    for (int j = 0; j < count; j++) k[j] = vsub(e[j].shifted, NAME(shift)());
    for (int j = 0; j < count; j++) r[j] = vmuladd(k[j], vset((real)-high), z[j]);
    for (int j = 0; j < count; j++) r[j] = vmuladd(k[j], vset((real)-low), r[j]);
    for (int j = 0; j < count; j++) square[j] = vmul(r[j], r[j]);
    for (int j = 0; j < count; j++) c[j] = NAME(terms)(sizeof(real) == 8 ? factors : best, r[j], square[j]);
    for (int j = 0; sizeof(real) == 8 && j < count; j++)
        c[j] = vmuladd(NAME(terms)(factors + 6, r[j], square[j]), vmul(vmul(square[j], square[j]), square[j]), c[j]);
    for (int j = 0; j < count; j++) e[j].less = vmuladd(square[j], c[j], r[j]);
}

/* exp(-z) where |z| < NEAR */
FBN_INLINE void NAME(near_exps)(const vec *z, int count, vec *to) {
    NAME(parts_of_exp) e[NAME(AT_ONCE)];
    NAME(exps_of_minus)(z, count, e);
    for (int j = 0; j < count; j++) to[j] = vscaled(vsub(vset(1), e[j].less), e[j].shifted);
}

/* a * exp(-min(|z|, FAR)). A power of two is multiplied by last, so that a subnormal result is rounded only once. */
FBN_INLINE vec NAME(times_far_exp)(vec a, vec z) {
    const vec size = vsub(vset(0), vminus_abs(z));
    const vec limited = vmin(vset(NAME(FAR)), size);
    NAME(parts_of_exp) e;
    NAME(exps_of_minus)(&limited, 1, &e);
    return vldexp(vmuladd(a, vsub(vset(0), e.less), a), vsub(NAME(shift)(), e.shifted));
}
