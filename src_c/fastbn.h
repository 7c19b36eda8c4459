/* fastbn.h: what can a caller ask for? The C API, and the only header that the Cython bridge and embedders see.
 *
 * Arrays. Every array is dense and three-dimensional, (outer, channels, inner), last index fastest:
 *     channels-first (N, C, H, W)  ->  (N, C, H*W)
 *     channels-last  (N, H, W, C)  ->  (N*H*W, C, 1)
 *     (N, C)                       ->  (N, C, 1)
 * There are no strides. Sizes are in elements unless they say bytes. A pointer must be aligned to one element of what
 * it points to; memory for workspaces and plans need not be aligned. M = outer * inner is the number of values per
 * channel. A pointer to an array without elements may be NULL.
 *
 * Calls. A verb takes the problem, which says what the arrays are, and a struct of arguments, which says where they
 * are. Set the `size` of the struct to its sizeof, and then the fields that you need. A pointer that may be absent is
 * NULL then; each comment says which may. A dtype is never absent: 0 is FBN_F32, and the dtypes of the problem, of
 * parameters, of running and of given statistics do not depend on each other. Float64 arrays need FBN_F64 in each. A
 * later version of this header may add fields at the end of a struct. `size` tells the library which of them a program
 * knows.
 *
 * Memory. Nothing here allocates memory, reads the environment or keeps state: a call uses the `workspace` that its
 * caller passes. x, residual, dy, mask, gamma, beta and given statistics are only read. y may be x, and dx may be dy;
 * otherwise an array that is written may share no memory with another array of the call. (This is checked for x,
 * residual, dy and their results, but not for the arrays of `channels` values.) Inputs may share memory with each
 * other.
 *
 * Errors. Every verb returns a status. It checks its arguments before it writes anything, so unless the status is
 * FBN_OK, nothing has been changed. It cannot check whether memory is as large as the sizes say, nor whether a
 * machine's kernels came from fbn_kernels_at.
 *
 * Threads. Any number of threads may call any function at once, as long as no two calls write to the same memory, which
 * includes the workspace. A verb may use up to `threads` of OpenMP's threads. GNU OpenMP cannot start threads in a
 * child process that was forked after its parent had started some, so pass 1 there. The result has the same bits for
 * any number of threads.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default) /* the shared library exports only what is declared here */
#endif

/* Increased when a change to this header means that programs must be recompiled; additions do not. A library fits a
 * program if fbn_abi_version(), which is the library's, equals FBN_ABI_VERSION, which is the header's. Never fails. */
#define FBN_ABI_VERSION 2
int fbn_abi_version(void);

typedef enum {
    FBN_OK = 0,
    FBN_NULL_POINTER = 1,    /* a pointer that must be given is NULL */
    FBN_MISALIGNED = 2,      /* a pointer is not a multiple of its element's size */
    FBN_OVERLAP = 3,         /* a result shares memory with an input or another result, and is not y on x or dx on dy */
    FBN_BAD_DTYPE = 4,       /* not an fbn_dtype */
    FBN_BAD_ACTIVATION = 5,  /* not an fbn_activation, a slope that is not finite, or one that from_y cannot invert */
    FBN_BAD_SHAPE = 6,       /* a size is negative, or their product exceeds FBN_MOST_VALUES or a size_t */
    FBN_BAD_THREADS = 7,     /* threads is below 1 or above FBN_MOST_THREADS */
    FBN_BAD_EPS = 8,         /* eps is negative or not finite */
    FBN_BAD_MOMENTUM = 9,    /* momentum is outside 0 to 1, or correction negative or not finite */
    FBN_TOO_FEW_VALUES = 10, /* no values to make statistics of, or at most `correction` for a running variance */
    FBN_BAD_PLAN = 11,       /* not a plan, or it was moved, or is for another machine, dtype or number of channels */
    FBN_BAD_SIZE = 12        /* the `size` of a struct of arguments is not its sizeof */
} fbn_status;

/* What a status means, in one line. Never NULL, whatever the number. */
const char *fbn_status_text(fbn_status status);

/* ---- what a call is about ---- */

typedef enum { FBN_F32 = 0, FBN_F64 = 1, FBN_F16 = 2, FBN_BF16 = 3 } fbn_dtype;

/* What is computed of z; `slope` is that of the problem. */
typedef enum {
    FBN_IDENTITY = 0,   /* z */
    FBN_RELU = 1,       /* max(z, 0) */
    FBN_RELU6 = 2,      /* min(max(z, 0), 6) */
    FBN_LEAKY_RELU = 3, /* z where z > 0, and slope * z elsewhere */
    FBN_SILU = 4,       /* z * sigmoid(z) */
    FBN_HARDSWISH = 5,  /* z * relu6(z + 3) / 6 */
    FBN_SIGMOID = 6,    /* 1 / (1 + exp(-z)) */
    FBN_ACTIVATIONS     /* how many there are */
} fbn_activation;

/* The kernels of one instruction set. Opaque; see fbn_kernels_at. */
typedef struct fbn_kernels fbn_kernels;

/* How this machine's memory is used best. A field that is 0 stands for fastbn's default. No bit of a result depends on
 * them, but for the sign and payload of a NaN, and any number is valid. */
typedef struct {
    int64_t streams;     /* planes and arrays that are far apart and read in turns, at most 8 planes at once */
    int64_t row_streams; /* the same for rows and small planes. If it is 2 or 3, most maps of short float32 rows take
                          * one more */
    int64_t turn;        /* the bytes of a turn. But for gradients with an activation, 16-bit values take four times as
                          * many, and sums that read 8 bytes or more for each position half as many, unless half would
                          * be less than 256 bytes. Maps of short float64 rows take four times as many, too */
    int64_t ahead;       /* how many bytes ahead sums, and maps of 16-bit planes, fetch what they read. If row_streams
                          * is 1, rows and small planes fetch an eighth of that, since several are read in turns, as do
                          * maps of rows that were summed; calls that only map fetch a third; and each at least 256
                          * bytes, unless `ahead` is less. Negative: only the processor itself fetches ahead */
    int64_t stream_from; /* a result of at least so many bytes is written around the cache. In a call that only maps, it
                          * must have half as many again; and in a call of several threads, the large arrays together
                          * five times as many. One that replaces an input never is. Negative: none is */
    int64_t block;       /* the bytes of arrays that stay in a core's cache from one step of a call to the next */
} fbn_habits;

/* Where a call runs: the kernels, the bytes of data cache that a core has for itself (level 2) and that the cores share
 * (the last level), and habits. The sizes guide how the work is split. They never change a bit of the result, and any
 * number is valid. */
typedef struct {
    const fbn_kernels *kernels;
    int64_t core_cache, shared_cache;
    fbn_habits habits;
} fbn_machine;

/* The least values that a thread is used for. A call on fewer than twice as many stays in the calling thread. */
enum { FBN_WORK_PER_THREAD = 32768 };

/* The most threads that a call may ask for. */
enum { FBN_MOST_THREADS = 1024 };

/* The most that outer * channels * inner may be, where a size of 0 counts as 1. */
#define FBN_MOST_VALUES (INT64_C(1) << 50)

/* What all calls have in common. `dtype` is that of x, y, residual and their gradients. The statistics dtype is float64
 * for float64, and float32 for the others. */
typedef struct {
    const fbn_machine *machine;
    fbn_dtype dtype;
    fbn_activation activation;
    double slope; /* of leaky_relu: finite; 0, also if it is left out, makes a relu. Others ignore it */
    int64_t outer, channels, inner;
    int threads; /* the most that may work, 1 to FBN_MOST_THREADS, never 0; 1: the calling thread, without OpenMP */
} fbn_problem;

/* gamma and beta, `channels` values each, both of this dtype (any; left out, it is FBN_F32). Each may be NULL, which
 * means ones and zeros. */
typedef struct {
    const void *gamma, *beta;
    fbn_dtype dtype;
} fbn_parameters;

/* Given statistics, `channels` values each, both of this dtype (any; left out, it is FBN_F32). Both are required. */
typedef struct {
    const void *mean, *var;
    fbn_dtype dtype;
} fbn_statistics;

/* The rows of `saved`, float64 for every dtype, (FBN_SAVED_ROWS, channels): what the backward pass needs to know about
 * a forward call. The mean is mean + mean_low. inv_std is 1/sqrt(var + eps), or 0 where var + eps is 0. */
enum { FBN_MEAN, FBN_MEAN_LOW, FBN_VAR, FBN_INV_STD, FBN_GAMMA, FBN_BETA, FBN_SAVED_ROWS };

/* Running statistics, both of this dtype (any; left out, it is FBN_F32), or both NULL. They are updated to (1 -
 * momentum) * old + momentum * batch, which is computed in float64 and rounded once. momentum is from 0 to 1. The
 * variance of the batch is its sum of squares over M - correction: PyTorch's convention is a correction of 1, that of
 * Keras 0. */
typedef struct {
    void *mean, *var;
    fbn_dtype dtype;
    double momentum, correction;
} fbn_running;

/* A mask has one byte per position, (outer, inner). The byte is 0 where the position does not count towards the
 * statistics; any other byte means that it does, and a NULL mask that all do. M is then the number of positions that
 * count. All positions are normalized. Where a position does not count and its dy is 0, it adds nothing to any
 * gradient, and its dx and dresidual are 0, whatever x, residual and the statistics are; x and residual may be
 * uninitialized there. */

/* ---- the verbs ---- */

/* The bytes of workspace that any verb needs for this problem; 0 if the problem is not valid. They depend on the shape,
 * the dtype, the activation, the threads, and the machine's caches and habits. Every verb that takes a workspace
 * requires it. */
size_t fbn_workspace_bytes(const fbn_problem *problem);

/* Training: y = activation(xhat * gamma + beta + residual), xhat = (x - mean) / sqrt(var + eps), with the batch's own
 * mean and biased variance. M must be at least 1; with running statistics it must exceed `correction`. With M = 1, y is
 * activation(beta + residual), and dx is 0 up to rounding. */
typedef struct {
    size_t size;
    const void *x, *residual;  /* (outer, channels, inner) of the problem's dtype; x required, residual or NULL */
    const unsigned char *mask; /* (outer, inner), or NULL */
    fbn_parameters parameters;
    double eps;
    fbn_running running; /* updated, if given */
    void *y;             /* required; as large as x, and may be x */
    double *saved;       /* required; (FBN_SAVED_ROWS, channels), written, for the backward pass */
} fbn_forward_args;
fbn_status fbn_forward(const fbn_problem *problem, const fbn_forward_args *args, void *workspace);

/* Inference: the same with given statistics, which are required, as x and y are. M may be anything, 0 included. */
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

/* The same with the statistics in the rows FBN_MEAN, FBN_MEAN_LOW and FBN_VAR of `saved`, which may be those of several
 * batches together. The other rows are written. x, y and saved are required. */
typedef struct {
    size_t size;
    const void *x, *residual;
    fbn_parameters parameters;
    double eps;
    void *y;
    double *saved;
} fbn_apply_args;
fbn_status fbn_apply(const fbn_problem *problem, const fbn_apply_args *args, void *workspace);

/* A plan holds the constants of inference, so that a call has only to map x to y. It is in the caller's memory and must
 * not be moved. Once set, it is only read, so calls in several threads may share it.
 * These are the bytes of a plan; 0 if the number of channels is not valid. */
size_t fbn_plan_bytes(int64_t channels);

/* Sets a plan for the kernels, the channels and the statistics dtype of a problem, whose other fields are ignored. The
 * statistics are required. */
typedef struct {
    size_t size;
    fbn_parameters parameters;
    double eps;
    fbn_statistics statistics;
} fbn_plan_args;
fbn_status fbn_plan_set(const fbn_problem *problem, const fbn_plan_args *args, void *plan);

/* Gives the bits of fbn_infer, for any problem with the kernels, channels and statistics dtype of the plan. x and y
 * are required, and residual may be NULL. */
typedef struct {
    size_t size;
    const void *x, *residual;
    void *y;
} fbn_run_args;
fbn_status fbn_plan_run(const fbn_problem *problem, const fbn_run_args *args, const void *plan);

/* Only the moments of the batch. M must be at least 1. x and moments are required, and mask may be NULL. */
typedef struct {
    size_t size;
    const void *x;
    const unsigned char *mask;
    double *moments; /* (3, channels): mean, mean_low and the sum of squares about the mean */
} fbn_moments_args;
fbn_status fbn_moments(const fbn_problem *problem, const fbn_moments_args *args, void *workspace);

/* Only the sums that the gradient needs: of dz and of dz * xhat, where dz is dy times the activation's derivative. The
 * sums of several batches can be added. The fields are as in fbn_backward_args, and sums is required. */
typedef struct {
    size_t size;
    const void *dy, *x, *residual;
    const unsigned char *mask;
    const double *saved;
    int from_y;
    double *sums; /* (2, channels) */
} fbn_sums_args;
fbn_status fbn_backward_sums(const fbn_problem *problem, const fbn_sums_args *args, void *workspace);

/* The exact gradient of fbn_forward or, with `frozen`, of fbn_infer or fbn_apply. */
typedef struct {
    size_t size;
    const void *dy, *x, *residual; /* as large as x in fbn_forward; dy and x required; x, residual as there */
    const unsigned char *mask;     /* as it was there */
    const double *saved;           /* required; as the forward call left it */
    double count;                  /* required; M, the values per channel of the statistics; ignored if frozen */
    int frozen;                    /* the statistics were given, and do not depend on x (fbn_infer) */
    int from_y;                    /* `x` holds y, since forward wrote y over x. The activation must be identity or
                                    * leaky_relu with a slope above 0, and no gamma so small that x is lost in y */
    const double *sums;            /* (2, channels), used instead of the call's own sums; or NULL */
    void *dx;                      /* required; as large as dy, and may be dy */
    void *dresidual;               /* as large. Needed, and written, if there are a residual and an activation; without
                                    * an activation the residual's gradient is dy */
    void *dgamma, *dbeta;          /* (channels,) in the statistics dtype: double for FBN_F64, else float; or NULL */
} fbn_backward_args;
fbn_status fbn_backward(const fbn_problem *problem, const fbn_backward_args *args, void *workspace);

/* ---- this processor ---- */

/* The best kernels, the caches (1 and 8 MiB where the system does not tell) and the habits of this processor. Never
 * fails. */
fbn_machine fbn_this_machine(void);

/* The kernels that this processor can run, best first; NULL past the end and for a negative index. They are never
 * freed. */
const fbn_kernels *fbn_kernels_at(int index);

/* "avx512", "avx2", "neon" or "baseline"; NULL if kernels is NULL. */
const char *fbn_kernels_name(const fbn_kernels *kernels);

/* The version of OpenMP that the library was built with (a date, as in _OPENMP), or 0. */
int fbn_openmp(void);

/* How many threads OpenMP uses in this thread by default: what omp_set_num_threads set, or OpenMP's own default. 1
 * without OpenMP. */
int fbn_openmp_threads(void);

/* The bytes of data cache of a level (1 to 3) that one core can use: the smallest plausible answer of the processor and
 * the system. 0 if neither answers, and for any other level. */
int64_t fbn_cache_bytes(int level);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
