/* values.c: how does a value of any dtype become a double, and how is a double rounded to it? */
#include "values.h"

#include <math.h>
#include <string.h>

/* A format of 16 bits. A number is 1.fraction * 2^exponent, or subnormal where the exponent would be below `lowest`. */
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

/* The bits of the number that is nearest to v, of two the even one. The fraction of the largest exponent may carry
 * into infinity, and that of a subnormal into the smallest normal number: their bits follow one another. */
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

size_t fbn_element(fbn_dtype dtype) { return dtype == FBN_F64 ? 8 : dtype == FBN_F32 ? 4 : 2; }

double fbn_get(const void *array, int64_t i, fbn_dtype dtype) {
    if (dtype == FBN_F64) return ((const double *)array)[i];
    if (dtype == FBN_F32) return ((const float *)array)[i];
    return exact(((const uint16_t *)array)[i], dtype == FBN_F16 ? &HALF : &BFLOAT);
}

void fbn_put(void *array, int64_t i, double value, fbn_dtype dtype) {
    if (dtype == FBN_F64) ((double *)array)[i] = value;
    else if (dtype == FBN_F32) ((float *)array)[i] = (float)value;
    else ((uint16_t *)array)[i] = rounded(value, dtype == FBN_F16 ? &HALF : &BFLOAT);
}
