/* exp.h: exp(-|z|), in two factors, for sigmoid and what is made of it.
 *
 * -|z| = k ln 2 + r with |r| <= ln(2) / 2 (Cody & Waite: ln 2 in two pieces, of which the first has so few bits that k
 * times it is exact), and exp(-|z|) = 2^k exp(r). exp(r) is its Taylor series up to r^7 (float32) or r^13 (float64),
 * whose rest is below 0.1 ulp. The error of exp is below 1 ulp.
 *
 * Apart from 2^k, exp(r) can be worked with before the one rounding that a subnormal result may have.
 */

/* 2^exponent * mantissa; mantissa is near 1. */
typedef struct {
    vec mantissa, exponent;
} NAME(scaled);

/* Where exp(-|z|) and z * exp(-|z|) have long been 0. */
enum { NAME(FAR) = sizeof(real) == 8 ? 800 : 128, NAME(TERMS) = sizeof(real) == 8 ? 12 : 6 };

FBN_INLINE NAME(scaled) NAME(exp_of_minus)(vec z) {
    static const double factors[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                     1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                     1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    const double high = sizeof(real) == 8 ? 0x1.62e42feep-1 : 0x1.62e4p-1;
    const double low = sizeof(real) == 8 ? 0x1.a39ef35793c76p-33 : 0x1.7f7d1cf79abcap-20;
    /* Adding it rounds to an integer. */
    const vec shift = vset((real)(sizeof(real) == 8 ? 0x1.8p52 : 0x1.8p23));
    const vec m = vmax(vset(-NAME(FAR)), vmin(z, vsub(vset(0), z)));
    const vec k = vsub(vfma(m, vset((real)0x1.71547652b82fep0), shift), shift);
    const vec r = vfma(k, vset((real)-low), vfma(k, vset((real)-high), m));
    vec q = vset((real)factors[NAME(TERMS) - 1]);
    for (int i = NAME(TERMS) - 2; i >= 0; i--) q = vfma(q, r, vset((real)factors[i]));
    return (NAME(scaled)){vadd(vset(1), vfma(vmul(r, r), q, r)), k};
}
