/* values.c: how does a value of 16 bits become a double, and how is a double rounded to it? */
#include "values.h"

#include <math.h>

/* A format of 16 bits: the bits of the fraction, and the range of exponents. A number is 1.fraction * 2^exponent, or
 * subnormal where the exponent would be below `lowest`. */
typedef struct {
    int fraction, lowest, highest;
} format;

static const format HALF = {10, -14, 15}, BFLOAT = {7, -126, 127};

static double exact(uint16_t bits, const format *f) {
    const int fraction = bits & ((1 << f->fraction) - 1), field = (bits & 0x7fff) >> f->fraction;
    const double sign = bits >> 15 ? -1 : 1, unit = ldexp(sign, f->lowest - f->fraction);
    if (field > f->highest - f->lowest + 1) return fraction ? (double)NAN : sign * (double)INFINITY;
    return field ? ldexp((1 << f->fraction | fraction) * unit, field - 1) : fraction * unit;
}

/* The bits of the number nearest to v; of two equally near, the even one. A fraction that is rounded up may carry into
 * the exponent: the bits are then those of the next number, be it the smallest normal one or infinity. */
static uint16_t rounded(double v, const format *f) {
    const unsigned sign = signbit(v) ? 0x8000u : 0, infinity = (unsigned)(f->highest - f->lowest + 2) << f->fraction;
    const double size = fabs(v);
    if (size != size) return (uint16_t)(sign | infinity | 1u << (f->fraction - 1));
    if (size >= ldexp(1, f->highest + 1)) return (uint16_t)(sign | infinity);
    if (size == 0) return (uint16_t)sign;
    const int e = ilogb(size), exponent = e > f->lowest ? e : f->lowest;
    const unsigned steps = (unsigned)nearbyint(ldexp(size, f->fraction - exponent));
    return (uint16_t)(sign | (((unsigned)(exponent - f->lowest) << f->fraction) + steps));
}

double fbn_of_half(uint16_t bits, fbn_dtype dtype) { return exact(bits, dtype == FBN_F16 ? &HALF : &BFLOAT); }

uint16_t fbn_half_of(double value, fbn_dtype dtype) { return rounded(value, dtype == FBN_F16 ? &HALF : &BFLOAT); }
