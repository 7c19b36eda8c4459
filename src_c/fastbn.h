/* fastbn.h: the C API. The only header that the Cython bridge and embedders see.
 *
 * Every array is dense and three-dimensional, (outer, channels, inner), last index fastest:
 *     channels-first (N, C, H, W)  ->  (N, C, H*W)
 *     channels-last  (N, H, W, C)  ->  (N*H*W, C, 1)
 *     (N, C)                       ->  (N, C, 1)
 * Pointers to data need the alignment of one element. Nothing here allocates, reads the environment or keeps
 * state: a call works in the `workspace` that its caller hands in, so calls may run in parallel.
 * The result has the same bits for any number of threads.
 */
#ifndef FASTBN_H
#define FASTBN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

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

/* Where a call runs: the kernels, and the data cache that one core has to itself (level 2) and that all share (the
 * last level). The sizes guide the blocking; they never change a bit of the result. */
typedef struct {
    const fbn_kernels *kernels;
    int64_t core_cache, shared_cache;
} fbn_machine;

/* Values that are worth waking a thread for. A call on fewer than twice as many stays in the calling thread. */
enum { FBN_WORK_PER_THREAD = 32768 };

/* What every call shares. `dtype` is that of x, y, residual and their gradients; the statistics dtype is float64 for
 * float64 and float32 for all others. */
typedef struct {
    const fbn_machine *machine;
    fbn_dtype dtype;
    fbn_activation activation;
    double slope; /* of leaky_relu up to 0 */
    int64_t outer, channels, inner;
    int threads; /* the most that may work; 1 runs in the calling thread and never touches OpenMP */
} fbn_problem;

/* gamma and beta, `channels` values each, float64 or float32, or NULL for ones and zeros. */
typedef struct {
    const void *gamma, *beta;
    fbn_dtype dtype;
} fbn_parameters;

/* The rows of `saved`, a (FBN_SAVED_ROWS, channels) float64 array: all that backward needs to know of a forward call.
 * The mean is mean + mean_low. inv_std is 1/sqrt(var + eps), or 0 where var + eps is 0. */
enum { FBN_MEAN, FBN_MEAN_LOW, FBN_VAR, FBN_INV_STD, FBN_GAMMA, FBN_BETA, FBN_SAVED_ROWS };

/* Running statistics in the statistics dtype, updated as old + momentum * (batch - old); NULL to leave them out.
 * The variance is the batch's sum of squares over (M - correction). */
typedef struct {
    void *mean, *var;
    double momentum, correction;
} fbn_running;

/* Bytes of workspace that a call on this problem needs, of any alignment. */
size_t fbn_workspace_bytes(const fbn_problem *problem);

/* A mask has one byte a position, (outer, inner): 1 where it counts towards the statistics, 0 where it does not; or it
 * is NULL, and all count. At least one must. Every position is normalized. */

/* Training: y = activation(xhat * gamma + beta + residual) with the batch's own mean and biased variance.
 * M = outer * inner must be at least 1. residual may be NULL. y may be x. */
void fbn_forward(const fbn_problem *problem, const void *x, const void *residual, const unsigned char *mask,
                 const fbn_parameters *parameters, double eps, const fbn_running *running, void *y, double *saved,
                 void *workspace);

/* The same with given statistics, in the statistics dtype. saved may be NULL (plain inference). y may be x.
 * Where mean is NULL, the rows FBN_MEAN, FBN_MEAN_LOW and FBN_VAR of saved are given instead. */
void fbn_infer(const fbn_problem *problem, const void *x, const void *residual, const fbn_parameters *parameters,
               double eps, const void *mean, const void *var, void *y, double *saved, void *workspace);

/* A plan holds the constants of inference, so that a call does nothing but map x to y. It lives in memory of the
 * caller's, of any alignment, that stays where it is. Once set it is only read: calls may share it, in parallel. */
size_t fbn_plan_bytes(int64_t channels);

/* The constants for the kernels, the channels and the statistics dtype of a problem (all else in it is ignored); the
 * arguments are those of fbn_infer. */
void fbn_plan_set(const fbn_problem *problem, const fbn_parameters *parameters, double eps, const void *mean,
                  const void *var, void *plan);

/* What fbn_infer does, to the bit, for any problem of the same kernels, channels and statistics dtype. */
void fbn_plan_run(const fbn_problem *problem, const void *x, const void *residual, void *y, const void *plan);

/* The batch's moments alone: moments is (3, channels), mean, mean_low and the sum of squares about the mean. */
void fbn_moments(const fbn_problem *problem, const void *x, const unsigned char *mask, double *moments,
                 void *workspace);

/* What the gradient must know of the forward call beside `saved`. */
typedef struct {
    const unsigned char *mask;
    double count;       /* values that the statistics came from */
    int frozen;         /* the statistics were given ones, which do not depend on x (fbn_infer) */
    int from_y;         /* `x` holds y: forward wrote over its x. The activation is identity or leaky_relu with a slope
                         * above 0, and no gamma is so small that y tells too little of x */
    const double *sums; /* (2, channels), to be used instead of the call's own; or NULL */
} fbn_called;

/* The sums that the gradient needs: sums is (2, channels), those of dz and of dz * xhat, dz being dy times the slope of
 * the activation. */
void fbn_backward_sums(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                       const double *saved, int from_y, double *sums, void *workspace);

/* The exact gradient. dresidual is written where there are a residual and an activation (without one it would equal
 * dy). dgamma and dbeta, in the statistics dtype, may be NULL. */
void fbn_backward(const fbn_problem *problem, const void *dy, const void *x, const void *residual, const double *saved,
                  const fbn_called *called, void *dx, void *dresidual, void *dgamma, void *dbeta, void *workspace);

/* The kernel tables that run on this processor, best first; NULL past the end. */
const fbn_kernels *fbn_kernels_at(int index);
const char *fbn_kernels_name(const fbn_kernels *kernels);

/* The OpenMP version that the library was built with (its date, as in _OPENMP), or 0. */
int fbn_openmp(void);

/* Bytes of data cache at a level (1 to 3) of this processor, or 0 where the system does not tell. */
int64_t fbn_cache_bytes(int level);

#ifdef __cplusplus
}
#endif

#endif
