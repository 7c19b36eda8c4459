/* fastbn.h: the C API. The only header that the Cython bridge and embedders see.
 *
 * Arrays. Every array is dense and three-dimensional, (outer, channels, inner), last index fastest:
 *     channels-first (N, C, H, W)  ->  (N, C, H*W)
 *     channels-last  (N, H, W, C)  ->  (N*H*W, C, 1)
 *     (N, C)                       ->  (N, C, 1)
 * There are no strides; sizes are counted in elements unless they say bytes. A pointer needs the alignment of one
 * element of what it points to, memory for workspaces and plans none. M = outer * inner is the number of values per
 * channel. Where a size is 0, pointers to arrays without elements may be NULL.
 *
 * Calls. A verb takes the problem, which says what the arrays are, and one struct that says where they are. Set the
 * struct's `size` to its sizeof and every field that you need; a field that is zero is absent. A later version of this
 * header may add fields at the end: a library that is newer than a program takes them for absent.
 *
 * Memory. Nothing here allocates, reads the environment or keeps state: a call works in the `workspace` that its
 * caller hands in. x, residual, dy, mask, gamma, beta and given statistics are only read. y may be x and dx may be dy,
 * exactly; else what is written shares no memory with anything else of the call. (Of x, residual, dy and their results
 * that is checked; of the arrays of `channels` values it is not.) Inputs may share memory with each other.
 *
 * Errors. Every verb returns a status. It checks its arguments before it writes anything: unless it is FBN_OK, nothing
 * was changed. What it cannot see is whether memory is as large as the sizes say, and whether a machine's kernels are
 * those that fbn_kernels_at gave.
 *
 * Threads. Every function may be called by any number of threads at once, as long as no two write to the same memory
 * (workspaces included). A verb may use up to `threads` of OpenMP's threads; GNU OpenMP cannot do so in a child that
 * was forked after its parent had, so pass 1 there. The result has the same bits for any number of threads.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default) /* the shared library exports what is declared here, and nothing else */
#endif

/* Goes up when what is declared here changes so that a program must be compiled anew; additions leave it. The library
 * fits a program where fbn_abi_version(), the library's, is FBN_ABI_VERSION, the header's. Never fails. */
#define FBN_ABI_VERSION 2
int fbn_abi_version(void);

typedef enum {
    FBN_OK = 0,
    FBN_NULL_POINTER = 1,    /* a pointer that must be given is NULL */
    FBN_MISALIGNED = 2,      /* a pointer is no multiple of its element's size */
    FBN_OVERLAP = 3,         /* a result shares memory with an input or another result, and is not y on x or dx on dy */
    FBN_BAD_DTYPE = 4,       /* no fbn_dtype */
    FBN_BAD_ACTIVATION = 5,  /* no fbn_activation, a slope that is not finite, or one that from_y cannot invert */
    FBN_BAD_SHAPE = 6,       /* a size is negative, or all together they are beyond FBN_MOST_VALUES or a size_t */
    FBN_BAD_THREADS = 7,     /* threads is below 1 or above FBN_MOST_THREADS */
    FBN_BAD_EPS = 8,         /* eps is negative or not finite */
    FBN_BAD_MOMENTUM = 9,    /* momentum is outside 0 to 1, or correction negative or not finite */
    FBN_TOO_FEW_VALUES = 10, /* statistics of no values, or a running variance of no more than `correction` values */
    FBN_BAD_PLAN = 11,       /* no plan, one that was moved, or one of another machine, dtype or number of channels */
    FBN_BAD_SIZE = 12        /* `size` of a struct of arguments is not its sizeof */
} fbn_status;

/* One line that says what a status means; never NULL, for other numbers either. */
const char *fbn_status_text(fbn_status status);

/* ---- what a call is about ---- */

typedef enum { FBN_F32 = 0, FBN_F64 = 1, FBN_F16 = 2, FBN_BF16 = 3 } fbn_dtype;

/* z is what comes in: relu max(z, 0), relu6 min(max(z, 0), 6), leaky_relu z or, up to 0, slope * z,
 * silu z * sigmoid(z), hardswish z * relu6(z + 3) / 6, sigmoid 1 / (1 + exp(-z)). */
typedef enum {
    FBN_IDENTITY = 0,
    FBN_RELU = 1,
    FBN_RELU6 = 2,
    FBN_LEAKY_RELU = 3,
    FBN_SILU = 4,
    FBN_HARDSWISH = 5,
    FBN_SIGMOID = 6
} fbn_activation;

/* One instruction set's kernels. Opaque; see fbn_kernels_at. */
typedef struct fbn_kernels fbn_kernels;

/* Where a call runs: the kernels, and the bytes of data cache that one core has to itself (level 2) and that all share
 * (the last level). The caches guide the blocking; they never change a bit of the result, and any number is valid. */
typedef struct {
    const fbn_kernels *kernels;
    int64_t core_cache, shared_cache;
} fbn_machine;

/* Values that are worth waking a thread for. A call on fewer than twice as many stays in the calling thread. */
enum { FBN_WORK_PER_THREAD = 32768 };

/* The most threads that a call may ask for. */
enum { FBN_MOST_THREADS = 1024 };

/* outer * channels * inner is at most this, where a size of 0 counts as 1. */
#define FBN_MOST_VALUES (INT64_C(1) << 50)

/* What every call shares. `dtype` is that of x, y, residual and their gradients; the statistics dtype is float64 for
 * float64 and float32 for all others. */
typedef struct {
    const fbn_machine *machine;
    fbn_dtype dtype;
    fbn_activation activation;
    double slope; /* of leaky_relu up to 0; finite for it, and else ignored */
    int64_t outer, channels, inner;
    int threads; /* the most that may work, 1 to FBN_MOST_THREADS; 1 runs in the calling thread without OpenMP */
} fbn_problem;

/* gamma and beta, `channels` values each, of any one dtype, or NULL for ones and zeros. */
typedef struct {
    const void *gamma, *beta;
    fbn_dtype dtype;
} fbn_parameters;

/* Given statistics, `channels` values each, of any one dtype. */
typedef struct {
    const void *mean, *var;
    fbn_dtype dtype;
} fbn_statistics;

/* The rows of `saved`, a (FBN_SAVED_ROWS, channels) float64 array: all that backward needs to know of a forward call.
 * The mean is mean + mean_low. inv_std is 1/sqrt(var + eps), or 0 where var + eps is 0. */
enum { FBN_MEAN, FBN_MEAN_LOW, FBN_VAR, FBN_INV_STD, FBN_GAMMA, FBN_BETA, FBN_SAVED_ROWS };

/* Running statistics of any one dtype, both or neither, updated as (1 - momentum) * old + momentum * batch, which is
 * computed in float64 and rounded once. momentum is 0 to 1. The batch's variance is its sum of squares over
 * (M - correction): 1 is PyTorch's convention, 0 Keras's. */
typedef struct {
    void *mean, *var;
    fbn_dtype dtype;
    double momentum, correction;
} fbn_running;

/* A mask has one byte a position, (outer, inner): 0 where the position does not count towards the statistics, and any
 * other value where it does. NULL means that all count. Every position is normalized. M is then the number of those
 * that count. A position that does not count and whose dy is 0 adds nothing to a gradient, and its dx and dresidual
 * are 0, whatever x, residual and the statistics are: memory that was never written will do there. */

/* ---- the verbs ---- */

/* Bytes of workspace that any verb needs on this problem. It depends on the shape, the dtype, the threads and the
 * machine's caches. 0 for a problem that is not valid. */
size_t fbn_workspace_bytes(const fbn_problem *problem);

/* Training: y = activation(xhat * gamma + beta + residual), xhat = (x - mean) / sqrt(var + eps), with the batch's own
 * mean and biased variance. M must be at least 1. With M = 1 y is activation(beta + residual), and dx is 0 but for
 * rounding; running statistics need M > correction. */
typedef struct {
    size_t size;
    const void *x, *residual;  /* (outer, channels, inner) of the problem's dtype; residual may be NULL */
    const unsigned char *mask; /* (outer, inner), or NULL; takes time in proportion to M, like all that is done to x */
    fbn_parameters parameters;
    double eps;
    fbn_running running; /* updated where it is given */
    void *y;             /* as large as x, and may be x */
    double *saved;       /* (FBN_SAVED_ROWS, channels), written, for the backward pass */
} fbn_forward_args;
fbn_status fbn_forward(const fbn_problem *problem, const fbn_forward_args *args, void *workspace);

/* Inference: the same with given statistics, for any M, 0 included. */
typedef struct {
    size_t size;
    const void *x, *residual;
    fbn_parameters parameters;
    double eps;
    fbn_statistics statistics;
    void *y;
    double *saved; /* as in fbn_forward, for a backward pass with frozen statistics; or NULL */
} fbn_infer_args;
fbn_status fbn_infer(const fbn_problem *problem, const fbn_infer_args *args, void *workspace);

/* The same with the statistics that the rows FBN_MEAN, FBN_MEAN_LOW and FBN_VAR of `saved` hold already: those of
 * several batches together, say. The other rows are written. */
typedef struct {
    size_t size;
    const void *x, *residual;
    fbn_parameters parameters;
    double eps;
    void *y;
    double *saved;
} fbn_apply_args;
fbn_status fbn_apply(const fbn_problem *problem, const fbn_apply_args *args, void *workspace);

/* A plan holds the constants of inference, so that a call does nothing but map x to y. It lives in memory of the
 * caller's, that stays where it is. Once set it is only read: calls may share it, in parallel.
 * Bytes of a plan; 0 for a number of channels that is not valid. */
size_t fbn_plan_bytes(int64_t channels);

/* Sets a plan for the kernels, the channels and the statistics dtype of a problem (all else in it is ignored). */
typedef struct {
    size_t size;
    fbn_parameters parameters;
    double eps;
    fbn_statistics statistics;
} fbn_plan_args;
fbn_status fbn_plan_set(const fbn_problem *problem, const fbn_plan_args *args, void *plan);

/* What fbn_infer does, to the bit, for any problem of the same kernels, channels and statistics dtype. */
typedef struct {
    size_t size;
    const void *x, *residual;
    void *y;
} fbn_run_args;
fbn_status fbn_plan_run(const fbn_problem *problem, const fbn_run_args *args, const void *plan);

/* The batch's moments alone. M must be at least 1. */
typedef struct {
    size_t size;
    const void *x;
    const unsigned char *mask;
    double *moments; /* (3, channels): mean, mean_low and the sum of squares about the mean */
} fbn_moments_args;
fbn_status fbn_moments(const fbn_problem *problem, const fbn_moments_args *args, void *workspace);

/* The sums that the gradient needs, those of dz and of dz * xhat, dz being dy times the slope of the activation.
 * Those of several batches add up. The fields are as in fbn_backward_args. */
typedef struct {
    size_t size;
    const void *dy, *x, *residual;
    const unsigned char *mask;
    const double *saved;
    int from_y;
    double *sums; /* (2, channels) */
} fbn_sums_args;
fbn_status fbn_backward_sums(const fbn_problem *problem, const fbn_sums_args *args, void *workspace);

/* The exact gradient of fbn_forward, or of fbn_infer with `saved` where frozen. */
typedef struct {
    size_t size;
    const void *dy, *x, *residual; /* as large as x in fbn_forward; x and residual as they were there */
    const unsigned char *mask;     /* as it was there */
    const double *saved;           /* as the forward call left it */
    double count;                  /* values per channel that the statistics came from, M; ignored where frozen */
    int frozen;                    /* the statistics were given ones, which do not depend on x (fbn_infer) */
    int from_y;                    /* `x` holds y: forward wrote over its x. The activation is identity or leaky_relu
                                    * with a slope above 0, and no gamma is so small that y tells too little of x */
    const double *sums;            /* (2, channels), to be used instead of the call's own; or NULL */
    void *dx;                      /* as large as dy, and may be dy */
    void *dresidual;               /* as large; written where there are a residual and an activation, and must then be
                                    * given (without an activation it would equal dy) */
    void *dgamma, *dbeta;          /* (channels,) in the statistics dtype; or NULL */
} fbn_backward_args;
fbn_status fbn_backward(const fbn_problem *problem, const fbn_backward_args *args, void *workspace);

/* ---- this processor ---- */

/* Its best kernels and its caches; common sizes (1 and 8 MiB) where the system does not tell. Never fails. */
fbn_machine fbn_this_machine(void);

/* The kernel tables that run on this processor, best first; NULL past the end and for a negative index. They live as
 * long as the program. */
const fbn_kernels *fbn_kernels_at(int index);

/* "avx512", "avx2", "neon" or "baseline"; NULL for NULL. */
const char *fbn_kernels_name(const fbn_kernels *kernels);

/* The OpenMP version that the library was built with (its date, as in _OPENMP), or 0. */
int fbn_openmp(void);

/* How many threads OpenMP would use here for a program that does not say: what omp_set_num_threads set in this thread,
 * or its default. 1 without OpenMP. */
int fbn_openmp_threads(void);

/* Bytes of data cache at a level (1 to 3) that one core can use: the smallest plausible number among those that the
 * processor and the system tell. 0 where neither tells, and for any other level. */
int64_t fbn_cache_bytes(int level);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
