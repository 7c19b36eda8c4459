/* kernels.h: the contract of each kernel, and the table that an instruction set fills.
 *
 * A kernel is a loop over one tile. It knows no threads, allocates nothing and reads only what its arguments name.
 * `cf` kernels get planes: `channels` runs of `inner` contiguous elements, one after the other.
 * `cl` kernels get rows: `rows` runs of `channels` contiguous elements, `stride` elements apart.
 */
#ifndef FBN_KERNELS_H
#define FBN_KERNELS_H

#include "fastbn.h"

#if defined(_MSC_VER)
#define FBN_INLINE static __forceinline
#else
#define FBN_INLINE static inline __attribute__((always_inline))
#endif

/* Accumulator lanes of a cf reduction: element i of a plane adds to lane i % FBN_LANES, on every instruction set, so
 * that those with a fused multiply-add give the same bits. */
enum { FBN_LANES = 16 };

/* Per-channel arrays are padded to a multiple of this many, so that cl kernels may load and store whole vectors. */
enum { FBN_CHANNEL_PAD = 16 };

/* y = (x * prescale + neg_mean) * scale + shift + shift_low, per channel, in the compute type (float or double) of the
 * dtype. shift_low is what shift lost to rounding; it counts only where a residual may cancel the shift. prescale is 1 but for channels whose spread is near the ends of the exponent range; see batchnorm.c. */
typedef struct {
    const void *prescale, *neg_mean, *scale, *shift, *shift_low;
} fbn_line;

/* sums[c] += x - origin[c], squares[c] += (x - origin[c])^2, in float64.
 * cf: sums and squares hold FBN_LANES lanes a channel, sums first: [channels][2][FBN_LANES].
 * origin must be representable in the dtype (tails are padded with it). */
typedef void fbn_moments_cf(const void *x, int64_t channels, int64_t inner, const double *origin, double *lanes);
typedef void fbn_moments_cl(const void *x, int64_t rows, int64_t channels, int64_t stride, const double *origin,
                            double *sums, double *squares);

/* y = activation(line(x) + residual); y may be x. residual may be NULL. stream: write around the cache. */
typedef struct {
    const void *x, *residual;
    void *y;
    fbn_line line;
    fbn_activation activation;
    int stream;
} fbn_affine;
typedef void fbn_affine_cf(const fbn_affine *a, int64_t channels, int64_t inner);
typedef void fbn_affine_cl(const fbn_affine *a, int64_t rows, int64_t channels, int64_t stride);

/* dz = dy * activation'(line(x) + residual);  sums[c] += dz,  products[c] += dz * (x - mean[c]), in float64.
 * Laid out as for moments. */
typedef struct {
    const void *dy, *x, *residual;
    fbn_line line;
    fbn_activation activation;
    const double *mean;
} fbn_grad_moments;
typedef void fbn_grad_moments_cf(const fbn_grad_moments *g, int64_t channels, int64_t inner, double *lanes);
typedef void fbn_grad_moments_cl(const fbn_grad_moments *g, int64_t rows, int64_t channels, int64_t stride,
                                 double *sums, double *products);

/* dx = on_dy * dz + on_x * (x * prescale + neg_mean) + constant, with dz as above; dresidual = dz if not NULL.
 * frozen: dx = on_dy * dz. */
typedef struct {
    const void *dy, *x, *residual;
    void *dx, *dresidual;
    fbn_line line;
    fbn_activation activation;
    const void *on_dy, *on_x, *constant;
    int frozen, stream;
} fbn_grad_affine;
typedef void fbn_grad_affine_cf(const fbn_grad_affine *g, int64_t channels, int64_t inner);
typedef void fbn_grad_affine_cl(const fbn_grad_affine *g, int64_t rows, int64_t channels, int64_t stride);

typedef struct {
    fbn_moments_cf *moments_cf;
    fbn_moments_cl *moments_cl;
    fbn_affine_cf *affine_cf;
    fbn_affine_cl *affine_cl;
    fbn_grad_moments_cf *grad_moments_cf;
    fbn_grad_moments_cl *grad_moments_cl;
    fbn_grad_affine_cf *grad_affine_cf;
    fbn_grad_affine_cl *grad_affine_cl;
} fbn_dtype_kernels;

struct fbn_kernels {
    const char *name;
    const fbn_dtype_kernels *of[2]; /* indexed by fbn_dtype */
};

#endif
