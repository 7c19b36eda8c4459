/* values.h: one value of an array of any dtype, as a double, and back with one rounding. For what is O(channels); the
 * kernels have vectors for the rest.
 */
#ifndef FBN_VALUES_H
#define FBN_VALUES_H

#include "fastbn.h"

size_t fbn_element(fbn_dtype dtype); /* its bytes */
double fbn_get(const void *array, int64_t i, fbn_dtype dtype);
void fbn_put(void *array, int64_t i, double value, fbn_dtype dtype);

#endif
