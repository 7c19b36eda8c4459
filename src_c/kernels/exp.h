/* exp.h: exp(-|z|), as a product of two factors, for the sigmoid and the SiLU.
 *
 * -|z| = k ln 2 + r with |r| <= ln(2) / 2 (Cody & Waite: ln 2 in two pieces, of which the first has so few bits that k
 * times it is exact), and exp(-|z|) = 2^k exp(r). exp(r) is its Taylor series up to r^7 (float32) or r^13 (float64),
 * whose remainder is below 0.1 ulp. Terms are added in pairs, since a chain of additions that wait for each other would
 * take longer. The error of exp is below 1.1 ulp.
 *
 * 2^k is a factor of its own, which comes last, so that a subnormal result is rounded only once.
 */

/* 2^exponent * (1 + excess), |excess| < 1/2. A product with it uses the excess before it is rounded into the sum. */
typedef struct {
    vec excess, exponent;
} NAME(scaled);

FBN_INLINE vec NAME(times)(vec a, NAME(scaled) e) { return vmuladd(a, e.excess, a); }

/* If |z| is larger, exp(-|z|) and z * exp(-|z|) are 0. */
enum { NAME(FAR) = sizeof(real) == 8 ? 800 : 128 };

/* c0 + c1 r + c2 r^2 + ... + c5 r^5 */
FBN_INLINE vec NAME(six_terms)(const double *c, vec r, vec square) {
    const vec first = vmuladd(vset((real)c[1]), r, vset((real)c[0])),
              second = vmuladd(vset((real)c[3]), r, vset((real)c[2]));
    const vec third = vmuladd(vset((real)c[5]), r, vset((real)c[4]));
    return vmuladd(vmuladd(third, square, second), square, first);
}

FBN_INLINE NAME(scaled) NAME(exp_of_minus)(vec z) {
    static const double factors[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                     1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                     1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const double high = sizeof(real) == 8 ? 0x1.62e42feep-1 : 0x1.62e4p-1;
    const double low = sizeof(real) == 8 ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cf79abcap-20;
    /* Adding the shift rounds to an integer. */
    const vec shift = vset((real)(sizeof(real) == 8 ? 0x1.8p52 : 0x1.8p23));
    const vec m = vmax(vset(-NAME(FAR)), vminus_abs(z));
    const vec k = vsub(vmuladd(m, vset((real)0x1.71547652b82fep0), shift), shift);
    const vec r = vmuladd(k, vset((real)-low), vmuladd(k, vset((real)-high), m)), square = vmul(r, r);
    vec q = NAME(six_terms)(factors, r, square);
    if (sizeof(real) == 8) q = vmuladd(NAME(six_terms)(factors + 6, r, square), vmul(vmul(square, square), square), q);
    return (NAME(scaled)){vmuladd(square, q, r), k};
}
