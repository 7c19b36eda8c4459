/* values.c: how does a value of 16 bits become a double, and how is a double rounded to it? */
#include "values.h"

#include <math.h>
#include <string.h>

/* A format of 16 bits: the bits of the fraction, the range of exponents, and the smallest number above 0. A number is
 * 1.fraction * 2^exponent, or subnormal where the exponent would be below `lowest`. */
typedef struct {
    int fraction, lowest, highest;
    double unit;
} format;

static const format HALF = {10, -14, 15, 0x1p-24}, BFLOAT = {7, -126, 127, 0x1p-133};

/* ldexp, ilogb and nearbyint would take most of the time of a small call. */
enum { EXPONENT_AT = 52, BIAS = 1023 }; /* where a double has its exponent, and what is added to it there */
static const double WHOLE = 0x1p52;     /* added to a number from 0 to 2^51, it rounds that to an integer */

/* 2^n, which is a normal number. */
static double power(int n) {
    const uint64_t bits = (uint64_t)(n + BIAS) << EXPONENT_AT;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The exponent of a number that is positive and finite; less than that of any normal number if it is subnormal. */
static int exponent_of(double size) {
    uint64_t bits;
    memcpy(&bits, &size, sizeof bits);
    return (int)(bits >> EXPONENT_AT) - BIAS;
}

static double exact(uint16_t bits, const format *f) {
    const int fraction = bits & ((1 << f->fraction) - 1), field = (bits & 0x7fff) >> f->fraction;
    const double sign = bits >> 15 ? -1 : 1, unit = sign * f->unit;
    if (field > f->highest - f->lowest + 1) return fraction ? (double)NAN : sign * (double)INFINITY;
    return field ? (1 << f->fraction | fraction) * unit * power(field - 1) : fraction * unit;
}

/* The bits of the number nearest to v; of two equally near, the even one. A fraction that is rounded up may carry into
 * the exponent: the bits are then those of the next number, be it the smallest normal one or infinity. */
static uint16_t rounded(double v, const format *f) {
    const unsigned sign = signbit(v) ? 0x8000u : 0, infinity = (unsigned)(f->highest - f->lowest + 2) << f->fraction;
    const double size = fabs(v);
    if (size != size) return (uint16_t)(sign | infinity | 1u << (f->fraction - 1));
    if (size >= power(f->highest + 1)) return (uint16_t)(sign | infinity);
    const int e = exponent_of(size), exponent = e > f->lowest ? e : f->lowest;
    const unsigned steps = (unsigned)(size * power(f->fraction - exponent) + WHOLE - WHOLE);
    return (uint16_t)(sign | (((unsigned)(exponent - f->lowest) << f->fraction) + steps));
}

double fbn_of_half(uint16_t bits, fbn_dtype dtype) { return exact(bits, dtype == FBN_F16 ? &HALF : &BFLOAT); }

uint16_t fbn_half_of(double value, fbn_dtype dtype) { return rounded(value, dtype == FBN_F16 ? &HALF : &BFLOAT); }
