/* kernels.h: the contract of each kernel, and the table that an instruction set fills.
 *
 * A kernel is a loop over one tile. It starts no threads, allocates nothing and reads only the arrays in its arguments.
 * There are two shapes. Planes are runs of contiguous elements of one channel each, so that a channel's constants are
 * in every lane of a vector. Columns are runs of contiguous elements that have constants of their own: the channels of
 * rows (channels-last), or whole small planes, whose constants have been spread over their elements.
 */
#ifndef FBN_KERNELS_H
#define FBN_KERNELS_H

#include <float.h>

#include "fastbn.h"

/* Every operation must round to its own type: the mean in two pieces depends on it, as do the bits. */
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "fastbn needs arithmetic without excess precision: compile for 32-bit x86 with -msse2 -mfpmath=sse"
#endif

/* FBN_APART is for what is seldom run, or called from many places: it is compiled once, not in each of them. */
#if defined(_MSC_VER)
#define FBN_INLINE static __forceinline
#define FBN_APART static __declspec(noinline)
#elif defined(__clang__)
#define FBN_INLINE static inline __attribute__((always_inline))
#define FBN_APART static __attribute__((noinline))
#else /* GCC, which would copy a function for each constant that it is called with */
#define FBN_INLINE static inline __attribute__((always_inline))
#define FBN_APART static __attribute__((noinline, noclone))
#endif

/* The lanes of a sum over a plane: element i is added to lane i % FBN_LANES on every instruction set. All instruction
 * sets with a fused multiply-add therefore give the same bits. */
enum { FBN_LANES = 16 };

enum { FBN_LINE = 64 }; /* bytes of a cache line */

/* Arrays with a value per channel or per column have room for this many values more, so that kernels may load and store
 * whole vectors. */
enum { FBN_CHANNEL_PAD = 16 };

/* Or'ed to an activation that has an inverse (identity, leaky_relu). The kernel then gets y = activation(gamma * xhat +
 * beta + residual) instead of x, and gamma * xhat + beta takes the place of x. */
enum { FBN_FROM_Y = 256 };

/* Or'ed to the activation of a gradient's kernel for positions that do not count towards the statistics. Where dy is 0,
 * they add nothing and their results are 0, whatever x, the residual and the constants are. */
enum { FBN_OUTSIDE = 1024, FBN_WHICH = 255 }; /* `activation & FBN_WHICH` is the fbn_activation */

_Static_assert(FBN_ACTIVATIONS <= FBN_WHICH + 1, "the flags must not be bits of an activation");

/* The constants of a channel, in the compute type (float or double) of the dtype. With them
 *     y = ((x * prescale^2 + neg_mean) * (scale + scale_low) + shift) + shift_low
 *     dx = (on_dy * dz + on_x * (x * prescale^2 + neg_mean) + constant) * postscale^2
 * scale_low belongs to float32 without a fused multiply-add (see T_line in simd/baseline.h); elsewhere it is neither
 * set nor read, and counts as 0. shift_low is the rounding error of shift, and +0 if there is none. prescale^2 and
 * postscale^2 are powers of two, which may be too large or too small for the compute type. prescale and postscale are 1
 * unless a channel's spread or gain is near an end of the exponent range, its dx is tiny or, with a scale_low, its
 * shift is large (see kernels/constants.h). */
enum {
    FBN_SCALE_LOW,
    FBN_PRESCALE,
    FBN_NEG_MEAN,
    FBN_SCALE,
    FBN_SHIFT,
    FBN_SHIFT_LOW,
    FBN_CONSTANTS_OF_Y, /* how many there are so far */
    FBN_ON_DY = FBN_CONSTANTS_OF_Y,
    FBN_ON_X,
    FBN_CONSTANT,
    FBN_POSTSCALE,
    FBN_CONSTANTS
};
typedef struct {
    void *of[FBN_CONSTANTS]; /* each with a value per channel or column */
} fbn_constants;

/* What is known about channels, from which their constants are computed: float64 arrays, one value per channel. */
typedef struct {
    const double *mean, *mean_low, *inv_std, *gamma, *beta;
} fbn_channels;

/* Sets origin[c] to the median of three values of channel c, or to 0 if that is not finite. Each pointer is to a value
 * of the first channel; the values of the following channels are `apart` elements apart. */
typedef void fbn_set_origin(const void *first, const void *middle, const void *last, int64_t n, int64_t apart,
                            double *origin);

/* Converts n values of the compute type to double. */
typedef void fbn_get_values(const void *from, int64_t n, double *to);

/* Moves n running statistics, of the compute type, towards those of the batch, batch[c] * factor. */
typedef void fbn_blend(void *running, const double *batch, double momentum, double factor, int64_t n);

/* The statistics of n channels, from the sums of x - origin and of its square: the mean in two pieces, the variance,
 * and in the place of the sum of squares that about the mean. */
typedef void fbn_set_moments(const double *origin, const double *sums, double count, int64_t n, double *squares,
                             double *mean, double *mean_low, double *var);

/* inv_std = 1 / sqrt(var + eps), or 0 where that would be infinite. */
typedef void fbn_invert(const double *var, double eps, int64_t n, double *inv_std);

/* Computes the constants of y for n channels. */
typedef void fbn_set_line(const fbn_channels *known, int64_t n, const fbn_constants *constants);

/* Computes those of dx, from the sums of dz and of dz * (x - mean), M = count and the constants of y. The latter may
 * change with the powers of two; they still serve to compute z if the map does, which it may with an activation. */
typedef void fbn_set_gradient(const fbn_channels *known, const double *sums, const double *products, double count,
                              int computes_z, int64_t n, const fbn_constants *constants);

/* Writes each of n constants `times` times, and may write FBN_CHANNEL_PAD values more. */
typedef void fbn_spread(const void *from, int64_t n, int64_t times, void *to);

/* Sets sums[i], 0 <= i < count, to the sum of the n numbers from values[i * apart] on, whose bits do not depend on the
 * instruction set. */
typedef void fbn_fold(const double *values, int64_t n, int64_t apart, int64_t count, double *sums);

/* How to walk through memory, which changes no bit of a result: in how many streams that are far apart planes are read,
 * and rows, and in turns of how many bytes, of which walk.c takes more or fewer for some dtypes. Sums fetch what they
 * read `ahead` bytes ahead, as do light maps of 16-bit planes and loops for a costly dz. Other light maps of planes,
 * and maps of a single long run of rows, fetch `run_ahead` bytes ahead, or nothing where that is 0. */
typedef struct {
    int64_t streams, row_streams, turn, ahead, run_ahead;
} fbn_walk;

/* What a call works on. Which fields a loop reads is said below.
 *
 * These structures are written and copied in vectors. One that reached from a page of the stack into the next would
 * take longer than a short loop, hence the alignment. */
typedef struct {
    _Alignas(64) const void *x;
    const void *dy, *residual; /* residual may be NULL */
    void *out, *dresidual;
    void *dz;                /* sums of a gradient: where dz is kept for the map; NULL if it is not */
    fbn_constants constants; /* of the first channel or column, and the following ones */
    const double *origin;
    double slope;
    int activation; /* with flags */
    int usual;      /* all prescales and postscales are 1, and are not read */
    int exact;      /* there is no residual, and all shift_low are 0, and are not read */
    int frozen, stream;
    int64_t inner; /* joined planes: the elements of one */
    fbn_walk walk;
} fbn_operands;

/* The elements that a loop passes through. Compilers merge stores of neighbouring fields into one. That of `apart` and
 * `whole` would cross the border of two cache lines (64-bit); their types differ, which keeps their stores apart. */
typedef struct {
    _Alignas(64) double *sums; /* where sums are added: a value per column, or FBN_LANES lanes, ... */
    double *others;            /* ... those of the next stretch 2 * FBN_LANES further, unless it is `whole` */
    int64_t at, n, c;          /* n elements from element `at` on, which is of channel or column c */
    int64_t period;            /* maps of columns: these recur after so many, and the constants of the first
                                * FBN_CHANNEL_PAD are repeated behind the last, so that a vector may reach into the next
                                * period. Planes: 0, or where they are joined the elements of an image, which are
                                * then its columns */
    int64_t rows, apart;       /* so many such stretches, `apart` elements from each other. Sums of columns add them up,
                                * and c is 0; other loops take one after another: in maps that stream, apart is whole
                                * cache lines */
    int whole;        /* sums of planes: each stretch is a plane, whose lanes start at 0 and are then added to `sums` */
    int64_t ahead;    /* maps of columns: they fetch what they read so many bytes ahead; 0: the processor does */
    int64_t channels; /* sums of stacks: planes of n elements, of so many channels, follow each other in each of `rows`
                       * images. The lanes of a channel are 2 * FBN_LANES from those of the one before it */
    int64_t further;  /* sums of columns: the elements from the end of a stretch to those that are added next */
    int64_t groups, step; /* sums of columns: so many times `rows` stretches, each time `step` elements further. More
                           * than one only where the table says so, and without an activation */
} fbn_stretch;

/* Sums are float64. The elements of a column are added in the order of the rows. Those of stacks are added likewise,
 * and then the columns of a channel to its lanes.
 *
 * moments: x - origin, and its square. The origin must be representable in the dtype, since parts of vectors are filled
 * up with it.
 *
 * grad_moments: dz and dz * (x - origin), where dz is dy times the derivative of the activation, and the origin is the
 * mean. If `dz` is given, dz is also stored there, which may be where dy is. Only float32 and float64 keep it, so
 * that nothing is rounded, and no call with a mask does.
 *
 * Maps write `out`, around the cache if `stream`.
 *
 * affine: activation(y + residual), with y as above; `out` may be x.
 *
 * grad_affine: dx as above, and dresidual = dz where there are an activation and a residual; `out` may be dy. If
 * `frozen`, the terms with on_x and constant are left out.
 */
typedef void fbn_loop(const fbn_operands *o, const fbn_stretch *s);

/* The rows that the sums of columns add at a time, so that accumulators are loaded and stored once for all of them. */
enum { FBN_ROWS = 8, FBN_GRAD_ROWS = 4 };

/* Orders streamed stores before later ones. */
typedef void fbn_fence(void);

typedef struct {
    int first_constant; /* FBN_SCALE_LOW or, where that is not read, the one after it */
    int adds_groups;    /* sums of columns may get several groups of rows at once */
    int fast_parts;     /* storing a part of a vector takes no longer than storing all of it */
    fbn_set_origin *set_origin;
    fbn_get_values *get;
    fbn_blend *blend;
    fbn_set_moments *set_moments;
    fbn_invert *invert;
    fbn_set_line *set_line;
    fbn_set_gradient *set_gradient;
    fbn_spread *spread;
    fbn_fold *fold;
    fbn_loop *moments_plane, *moments_stack, *moments_columns;
    fbn_loop *grad_moments_plane, *grad_moments_stack, *grad_moments_columns;
    fbn_loop *affine_planes, *affine_columns;
    fbn_loop *grad_affine_planes, *grad_affine_columns;
    fbn_fence *fence;
} fbn_dtype_kernels;

/* `of` and `sums` are indexed by fbn_dtype. `sums` has the loops of sums, which may be those of another instruction
 * set: they have the same bits. */
struct fbn_kernels {
    const char *name;
    const fbn_dtype_kernels *const *of, *const *sums;
};

#endif
