/* values.h: how is one value of an array of any dtype read as a double, and how is it written, rounded once? For arrays
 * with one value per channel; the kernels use vectors for all others.
 */
#ifndef FBN_VALUES_H
#define FBN_VALUES_H

#include "fastbn.h"

static inline size_t fbn_element(fbn_dtype dtype) { return dtype == FBN_F64 ? 8 : dtype == FBN_F32 ? 4 : 2; }

/* Of FBN_F16 and FBN_BF16. */
double fbn_of_half(uint16_t bits, fbn_dtype dtype);
uint16_t fbn_half_of(double value, fbn_dtype dtype);

static inline double fbn_get(const void *array, int64_t i, fbn_dtype dtype) {
    if (dtype == FBN_F64) return ((const double *)array)[i];
    if (dtype == FBN_F32) return ((const float *)array)[i];
    return fbn_of_half(((const uint16_t *)array)[i], dtype);
}

static inline void fbn_put(void *array, int64_t i, double value, fbn_dtype dtype) {
    if (dtype == FBN_F64) ((double *)array)[i] = value;
    else if (dtype == FBN_F32) ((float *)array)[i] = (float)value;
    else ((uint16_t *)array)[i] = fbn_half_of(value, dtype);
}

/* n values from element i on. */
static inline void fbn_get_all(const void *array, int64_t i, fbn_dtype dtype, int64_t n, double *to) {
    for (int64_t k = 0; k < n; k++) to[k] = fbn_get(array, i + k, dtype);
}

/* The loop of float32 is apart, so that compilers make vectors of it. */
static inline void fbn_put_all(void *array, int64_t i, fbn_dtype dtype, int64_t n, const double *from) {
    float *floats = (float *)array + (dtype == FBN_F32 ? i : 0);
    if (dtype == FBN_F32)
        for (int64_t k = 0; k < n; k++) floats[k] = (float)from[k];
    else
        for (int64_t k = 0; k < n; k++) fbn_put(array, i + k, from[k], dtype);
}

#endif
