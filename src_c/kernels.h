/* kernels.h: the contract of each kernel, and the table that an instruction set fills.
 *
 * A kernel is a loop over one tile. It knows no threads, allocates nothing and reads only what its arguments name.
 * `cf` kernels get planes: runs of contiguous elements of one channel each. `cl` kernels get rows: `rows` runs of
 * `channels` contiguous elements, one after the other.
 */
#ifndef FBN_KERNELS_H
#define FBN_KERNELS_H

#include "fastbn.h"

#if defined(_MSC_VER)
#define FBN_INLINE static __forceinline
#define FBN_APART static __declspec(noinline)
#else
#define FBN_INLINE static inline __attribute__((always_inline))
#define FBN_APART static __attribute__((noinline))
#endif

/* Accumulator lanes of a cf reduction: element i of a plane adds to lane i % FBN_LANES, on every instruction set, so
 * that those with a fused multiply-add give the same bits. */
enum { FBN_LANES = 16 };

/* How far ahead of itself, in bytes, a kernel fetches what it reads from memory. Memory answers several streams faster
 * than one, and takes what is written in stretches better than line by line: so kernels work on FBN_STREAMS
 * or more stretches that lie far apart, in turns of FBN_TURN bytes. */
enum { FBN_AHEAD = 512, FBN_STREAMS = 4, FBN_TURN = 256, FBN_SMALL_PLANE = 1024 };

/* Per-channel arrays have room for this many values more than there are channels, and then up to a multiple of it, so
 * that cl kernels may load and store whole vectors. */
enum { FBN_CHANNEL_PAD = 16 };

/* Or'ed to an activation that has an inverse (identity, leaky_relu): instead of x a kernel gets y = activation(gamma *
 * xhat + beta + residual), and gamma * xhat + beta stands for x. */
enum { FBN_FROM_Y = 256 };

/* Or'ed to the activation of a gradient's kernel for positions that do not count towards the statistics: where dy is 0
 * they add nothing and their results are 0, whatever x, the residual and the constants are. */
enum { FBN_OUTSIDE = 1024, FBN_WHICH = 255 }; /* FBN_WHICH leaves the fbn_activation */

_Static_assert(FBN_ACTIVATIONS <= FBN_WHICH + 1, "the flags must not be bits of an activation");

/* y = ((x * prescale + neg_mean) * scale + shift) + shift_low, per channel, in the compute type (float or double) of
 * the dtype. shift_low is what shift lost to rounding. prescale is a power of two, 1 but for channels whose spread or
 * slope is near the ends of the exponent range; see kernels/constants.h. `slope` is leaky_relu's, of what comes out. */
typedef struct {
    void *prescale, *neg_mean, *scale, *shift, *shift_low;
    double slope;
} fbn_line;

/* What is known of channels before they become a line: pointers to float64, one value a channel. */
typedef struct {
    const double *mean, *mean_low, *inv_std, *gamma, *beta;
} fbn_channels;

/* origin[c]: the median of channel c's values in three places, 0 where it is not finite. Each pointer is to a value of
 * the first channel; those of the next channels follow `apart` elements from one to the next. */
typedef void fbn_set_origin(const void *first, const void *middle, const void *last, int64_t n, int64_t apart,
                            double *origin);

/* The lines of n channels; `line` is written. */
typedef void fbn_set_line(const fbn_channels *known, int64_t n, const fbn_line *line);

/* The constants of grad_affine for n channels, from their sums of dz and of dz * (x - mean), M = count and their
 * lines; `slopes` is written. */
typedef struct {
    void *on_dy, *on_x, *constant, *postscale;
} fbn_slopes;
typedef void fbn_set_slopes(const fbn_channels *known, const double *sums, const double *products, double count,
                            int64_t n, const fbn_line *line, const fbn_slopes *slopes);

/* `channels` runs of `inner` contiguous elements, `step` elements from one to the next, and that `images` times,
 * `apart` elements from one to the next. */
typedef struct {
    int64_t images, apart, channels, step, inner;
} fbn_planes;

/* sums[c] += x - origin[c], squares[c] += (x - origin[c])^2, in float64.
 * cf: sums and squares hold FBN_LANES lanes a channel, sums first: [channels][2][FBN_LANES].
 * origin must be representable in the dtype (tails are padded with it). */
typedef void fbn_moments_cf(const void *x, fbn_planes planes, const double *origin, double *lanes);
typedef void fbn_moments_cl(const void *x, int64_t rows, int64_t channels, const double *origin, double *sums,
                            double *squares);

/* stream: a map writes around the cache. */

/* A map's rows are one run, in which the channels' constants recur: those past the last
 * must repeat the first FBN_CHANNEL_PAD. */

/* y = activation(line(x) + residual); y may be x. residual may be NULL. */
typedef struct {
    const void *x, *residual;
    void *y;
    fbn_line line;
    fbn_activation activation;
    int stream;
} fbn_affine;
typedef void fbn_affine_cf(const fbn_affine *a, fbn_planes planes);
typedef void fbn_affine_cl(const fbn_affine *a, int64_t rows, int64_t channels);

/* dz = dy * activation'(line(x) + residual), where `activation` may have FBN_FROM_Y;  sums[c] += dz,  products[c] += dz
 * * (x - mean[c]), in float64. Laid out as for moments. */
typedef struct {
    const void *dy, *x, *residual;
    fbn_line line;
    int activation;
    const double *mean;
} fbn_grad_moments;
typedef void fbn_grad_moments_cf(const fbn_grad_moments *g, fbn_planes planes, double *lanes);
typedef void fbn_grad_moments_cl(const fbn_grad_moments *g, int64_t rows, int64_t channels, double *sums,
                                 double *products);

/* dx = (on_dy * dz + on_x * (x * prescale + neg_mean) + constant) * postscale, with dz as above; frozen: without on_x
 * and constant. postscale is a power of two, 1 for usual channels. With an activation and a residual, dresidual = dz
 * too. */
typedef struct {
    const void *dy, *x, *residual;
    void *dx, *dresidual;
    fbn_line line;
    int activation;
    fbn_slopes slopes;
    int frozen, stream;
} fbn_grad_affine;
typedef void fbn_grad_affine_cf(const fbn_grad_affine *g, fbn_planes planes);
typedef void fbn_grad_affine_cl(const fbn_grad_affine *g, int64_t rows, int64_t channels);

typedef struct {
    fbn_set_origin *set_origin;
    fbn_set_line *set_line;
    fbn_set_slopes *set_slopes;
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
    const fbn_dtype_kernels *of[4]; /* indexed by fbn_dtype */
};

#endif
