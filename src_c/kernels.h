/* kernels.h: the contract of each kernel, and the table that an instruction set fills.
 *
 * A kernel is a loop over one tile. It starts no threads, allocates nothing and reads only the arrays in its arguments.
 * `cf` kernels get planes, which are runs of contiguous elements of one channel each. `cl` kernels get rows, which are
 * runs of `channels` contiguous elements, one after the other.
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

/* The lanes of a cf reduction: element i of a plane is added to lane i % FBN_LANES on every instruction set. All
 * instruction sets with a fused multiply-add therefore give the same bits. */
enum { FBN_LANES = 16 };

/* Kernels prefetch what they read FBN_AHEAD bytes in advance. Memory serves several streams faster than one, and is
 * written faster in stretches than line by line. Kernels therefore work on several streams that are far apart
 * (FBN_STREAMS for rows), in turns of FBN_TURN bytes. Planes of fewer than FBN_SMALL_PLANE elements may be joined. */
enum { FBN_AHEAD = 512, FBN_STREAMS = 4, FBN_TURN = 256, FBN_SMALL_PLANE = 1024 };

/* Per-channel arrays have room for this many values more than there are channels, rounded up to a multiple of it, so
 * that cl kernels may load and store whole vectors. */
enum { FBN_CHANNEL_PAD = 16 };

/* Or'ed to an activation that has an inverse (identity, leaky_relu). The kernel then gets y = activation(gamma * xhat +
 * beta + residual) instead of x, and gamma * xhat + beta takes the place of x. */
enum { FBN_FROM_Y = 256 };

/* Or'ed to the activation of a gradient's kernel for positions that do not count towards the statistics. Where dy is 0,
 * they add nothing and their results are 0, whatever x, the residual and the constants are. */
enum { FBN_OUTSIDE = 1024, FBN_WHICH = 255 }; /* `activation & FBN_WHICH` is the fbn_activation */

_Static_assert(FBN_ACTIVATIONS <= FBN_WHICH + 1, "the flags must not be bits of an activation");

/* y = ((x * prescale + neg_mean) * scale + shift) + shift_low, per channel, in the compute type (float or double) of
 * the dtype. shift_low is the rounding error of shift. prescale is a power of two; it is 1 unless a channel's spread or
 * gain is near an end of the exponent range (see kernels/constants.h). `slope` is leaky_relu's. */
typedef struct {
    void *prescale, *neg_mean, *scale, *shift, *shift_low;
    double slope;
} fbn_line;

/* What is known about channels, from which their constants are computed: float64 arrays, one value per channel. */
typedef struct {
    const double *mean, *mean_low, *inv_std, *gamma, *beta;
} fbn_channels;

/* Sets origin[c] to the median of three values of channel c, or to 0 if that is not finite. Each pointer is to a value
 * of the first channel; the values of the following channels are `apart` elements apart. */
typedef void fbn_set_origin(const void *first, const void *middle, const void *last, int64_t n, int64_t apart,
                            double *origin);

/* Computes the lines of n channels, and writes them to the arrays of `line`. */
typedef void fbn_set_line(const fbn_channels *known, int64_t n, const fbn_line *line);

/* The constants of a gradient (see fbn_grad_affine). They are computed for n channels from the sums of dz and of
 * dz * (x - mean), M = count and the lines, and written to the arrays of `gradient`. */
typedef struct {
    void *on_dy, *on_x, *constant, *postscale;
} fbn_gradient;
typedef void fbn_set_gradient(const fbn_channels *known, const double *sums, const double *products, double count,
                              int64_t n, const fbn_line *line, const fbn_gradient *gradient);

/* `images` times `channels` runs of `inner` contiguous elements. The runs of an image start `step` elements apart, and
 * images start `apart` elements apart. */
typedef struct {
    int64_t images, apart, channels, step, inner;
} fbn_planes;

/* sums[c] += x - origin[c], squares[c] += (x - origin[c])^2, in float64.
 * cf: each channel has FBN_LANES lanes of sums and then of squares: [channels][2][FBN_LANES].
 * origin must be representable in the dtype, since parts of vectors are padded with it. */
typedef void fbn_moments_cf(const void *x, fbn_planes planes, const double *origin, double *lanes);
typedef void fbn_moments_cl(const void *x, int64_t rows, int64_t channels, const double *origin, double *sums,
                            double *squares);

/* Maps. `stream` says whether results are written around the cache. Rows are mapped as one run, so that a vector may
 * reach into the next row: after the last channel's constants, those of the first FBN_CHANNEL_PAD must be repeated. */

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

/* With dz = dy * activation'(line(x) + residual): sums[c] += dz, products[c] += dz * (x - mean[c]), in float64, laid
 * out as for moments. `activation` may have FBN_FROM_Y. */
typedef struct {
    const void *dy, *x, *residual;
    fbn_line line;
    int activation;
    const double *mean;
} fbn_grad_moments;
typedef void fbn_grad_moments_cf(const fbn_grad_moments *g, fbn_planes planes, double *lanes);
typedef void fbn_grad_moments_cl(const fbn_grad_moments *g, int64_t rows, int64_t channels, double *sums,
                                 double *products);

/* dx = (on_dy * dz + on_x * (x * prescale + neg_mean) + constant) * postscale, with dz as above. If `frozen`, the terms
 * with on_x and constant are left out. postscale is a power of two, 1 for usual channels. With an activation and a
 * residual, dresidual = dz is written, too. */
typedef struct {
    const void *dy, *x, *residual;
    void *dx, *dresidual;
    fbn_line line;
    int activation;
    fbn_gradient gradient;
    int frozen, stream;
} fbn_grad_affine;
typedef void fbn_grad_affine_cf(const fbn_grad_affine *g, fbn_planes planes);
typedef void fbn_grad_affine_cl(const fbn_grad_affine *g, int64_t rows, int64_t channels);

typedef struct {
    fbn_set_origin *set_origin;
    fbn_set_line *set_line;
    fbn_set_gradient *set_gradient;
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
