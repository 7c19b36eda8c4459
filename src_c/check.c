/* check.c: is this call valid? Every status but those of too few values and of plans, which the foreman sees. */
#include "check.h"

#include <math.h>

const char *fbn_status_text(fbn_status status) {
    static const char *const texts[] = {
        [FBN_OK] = "no error",
        [FBN_NULL_POINTER] = "a pointer that must be given is NULL",
        [FBN_MISALIGNED] = "a pointer is no multiple of its element's size",
        [FBN_OVERLAP] = "a result shares memory with an input or another result",
        [FBN_BAD_DTYPE] = "no such dtype, or not one that gamma and beta may have",
        [FBN_BAD_ACTIVATION] = "no such activation, a slope that is not finite, or one that cannot be inverted",
        [FBN_BAD_SHAPE] = "a size is negative, or all together are too large",
        [FBN_BAD_THREADS] = "threads is below 1",
        [FBN_BAD_EPS] = "eps is negative or not finite",
        [FBN_BAD_MOMENTUM] = "momentum is outside 0 to 1, or correction negative or not finite",
        [FBN_TOO_FEW_VALUES] = "too few values per channel for statistics",
        [FBN_BAD_PLAN] = "no plan, one that was moved, or one of another machine, dtype or number of channels",
    };
    const int known = (int)status >= 0 && (int)status <= FBN_BAD_PLAN;
    return known ? texts[status] : "no such status";
}

/* ---- numbers ---- */

static fbn_status check_activation(const fbn_problem *p) {
    if ((int)p->activation < FBN_IDENTITY || (int)p->activation > FBN_SIGMOID) return FBN_BAD_ACTIVATION;
    return p->activation != FBN_LEAKY_RELU || isfinite(p->slope) ? FBN_OK : FBN_BAD_ACTIVATION;
}

static fbn_status check_sizes(int64_t outer, int64_t channels, int64_t inner) {
    const int64_t sizes[] = {outer, channels, inner};
    int64_t room = FBN_MOST_VALUES;
    for (int i = 0; i < 3; i++) {
        if (sizes[i] < 0 || sizes[i] > room) return FBN_BAD_SHAPE;
        room /= sizes[i] ? sizes[i] : 1;
    }
    return FBN_OK;
}

int fbn_valid_channels(int64_t channels) { return channels >= 0 && channels <= FBN_MOST_VALUES; }

static fbn_status check_machine(const fbn_problem *p) {
    if (!p || !p->machine || !p->machine->kernels) return FBN_NULL_POINTER;
    return (int)p->dtype >= FBN_F32 && (int)p->dtype <= FBN_BF16 ? FBN_OK : FBN_BAD_DTYPE;
}

fbn_status fbn_check_problem(const fbn_problem *p) {
    fbn_status status = check_machine(p);
    if (!status) status = check_activation(p);
    if (!status) status = check_sizes(p->outer, p->channels, p->inner);
    return status || p->threads >= 1 ? status : FBN_BAD_THREADS;
}

static fbn_status check_eps(double eps) { return isfinite(eps) && eps >= 0 ? FBN_OK : FBN_BAD_EPS; }

/* ---- pointers ---- */

static size_t element(fbn_dtype dtype) { return dtype == FBN_F64 ? 8 : dtype == FBN_F32 ? 4 : 2; }

static fbn_dtype statistics(const fbn_problem *p) { return p->dtype == FBN_F64 ? FBN_F64 : FBN_F32; }

static int64_t values(const fbn_problem *p) { return p->outer * p->channels * p->inner; }

/* Where there are no values, any pointer will do. */
static fbn_status check_optional(const void *array, fbn_dtype dtype, int64_t size) {
    return size && (uintptr_t)array % element(dtype) ? FBN_MISALIGNED : FBN_OK;
}

static fbn_status check_array(const void *array, fbn_dtype dtype, int64_t size) {
    return size && !array ? FBN_NULL_POINTER : check_optional(array, dtype, size);
}

static fbn_status check_workspace(const void *memory) { return memory ? FBN_OK : FBN_NULL_POINTER; }

/* One of the large arrays, of the problem's dtype and size. */
static fbn_status check_data(const fbn_problem *p, const void *array) {
    return check_array(array, p->dtype, values(p));
}

/* A result shares no memory with another large array. */
static fbn_status check_apart(const fbn_problem *p, const void *result, const void *other) {
    const uintptr_t a = (uintptr_t)result, b = (uintptr_t)other, bytes = (uintptr_t)values(p) * element(p->dtype);
    return !a || !b || (a > b ? a - b : b - a) >= bytes ? FBN_OK : FBN_OVERLAP;
}

static fbn_status check_parameters(const fbn_problem *p, const fbn_parameters *given) {
    if (!given || (!given->gamma && !given->beta) || !p->channels) return FBN_OK;
    if (given->dtype != FBN_F32 && given->dtype != FBN_F64) return FBN_BAD_DTYPE;
    const fbn_status status = check_optional(given->gamma, given->dtype, p->channels);
    return status ? status : check_optional(given->beta, given->dtype, p->channels);
}

static fbn_status check_statistics(const fbn_problem *p, const void *mean, const void *var) {
    const fbn_status status = check_array(mean, statistics(p), p->channels);
    return status ? status : check_array(var, statistics(p), p->channels);
}

static fbn_status check_running(const fbn_problem *p, const fbn_running *given) {
    if (!given || (!given->mean && !given->var)) return FBN_OK;
    if (!(given->momentum >= 0 && given->momentum <= 1)) return FBN_BAD_MOMENTUM;
    if (!(given->correction >= 0 && isfinite(given->correction))) return FBN_BAD_MOMENTUM;
    return check_statistics(p, given->mean, given->var);
}

/* ---- the verbs ---- */

static fbn_status check_map(const fbn_problem *p, const void *x, const void *residual, const void *y) {
    fbn_status status = check_data(p, x);
    if (!status) status = check_optional(residual, p->dtype, values(p));
    if (!status) status = check_data(p, y);
    if (!status && y != x) status = check_apart(p, y, x);
    return status ? status : check_apart(p, y, residual);
}

fbn_status fbn_check_forward(const fbn_problem *p, const void *x, const void *residual,
                             const fbn_parameters *parameters, double eps, const fbn_running *running, const void *y,
                             const double *saved, const void *workspace) {
    fbn_status status = fbn_check_problem(p);
    if (!status) status = check_eps(eps);
    if (!status) status = check_parameters(p, parameters);
    if (!status) status = check_running(p, running);
    if (!status) status = check_map(p, x, residual, y);
    if (!status) status = check_array(saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_infer(const fbn_problem *p, const void *x, const void *residual, const fbn_parameters *parameters,
                           double eps, const void *mean, const void *var, const void *y, const double *saved,
                           const void *workspace) {
    fbn_status status = fbn_check_problem(p);
    if (!status) status = check_eps(eps);
    if (!status) status = check_parameters(p, parameters);
    if (!status && mean) status = check_statistics(p, mean, var);
    if (!status) status = check_map(p, x, residual, y);
    if (!status) status = mean ? check_optional(saved, FBN_F64, p->channels) : check_array(saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_plan_set(const fbn_problem *p, const fbn_parameters *parameters, double eps, const void *mean,
                              const void *var, const void *plan) {
    fbn_status status = check_machine(p);
    if (!status) status = check_sizes(1, p->channels, 1);
    if (!status) status = check_eps(eps);
    if (!status) status = check_parameters(p, parameters);
    if (!status) status = check_statistics(p, mean, var);
    return status ? status : check_workspace(plan);
}

fbn_status fbn_check_plan_run(const fbn_problem *p, const void *x, const void *residual, const void *y,
                              const void *plan) {
    fbn_status status = fbn_check_problem(p);
    if (!status) status = check_map(p, x, residual, y);
    return status ? status : check_workspace(plan);
}

fbn_status fbn_check_moments(const fbn_problem *p, const void *x, const double *moments, const void *workspace) {
    fbn_status status = fbn_check_problem(p);
    if (!status) status = check_data(p, x);
    if (!status) status = check_array(moments, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

/* What the gradient and its sums share. */
static fbn_status check_gradient(const fbn_problem *p, const void *dy, const void *x, const void *residual,
                                 const double *saved, int from_y, const void *workspace) {
    fbn_status status = fbn_check_problem(p);
    if (!status && from_y && p->activation != FBN_IDENTITY)
        status = p->activation == FBN_LEAKY_RELU && p->slope > 0 ? FBN_OK : FBN_BAD_ACTIVATION;
    if (!status) status = check_data(p, dy);
    if (!status) status = check_data(p, x);
    if (!status) status = check_optional(residual, p->dtype, values(p));
    if (!status) status = check_array(saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_backward_sums(const fbn_problem *p, const void *dy, const void *x, const void *residual,
                                   const double *saved, int from_y, const double *sums, const void *workspace) {
    const fbn_status status = check_gradient(p, dy, x, residual, saved, from_y, workspace);
    return status ? status : check_array(sums, FBN_F64, p->channels);
}

static fbn_status check_result(const fbn_problem *p, const void *result, const void *dy, const void *x,
                               const void *residual) {
    fbn_status status = check_data(p, result);
    if (!status) status = check_apart(p, result, dy);
    if (!status) status = check_apart(p, result, x);
    return status ? status : check_apart(p, result, residual);
}

fbn_status fbn_check_backward(const fbn_problem *p, const void *dy, const void *x, const void *residual,
                              const double *saved, const fbn_called *called, const void *dx, const void *dresidual,
                              const void *dgamma, const void *dbeta, const void *workspace) {
    fbn_status status =
        called ? check_gradient(p, dy, x, residual, saved, called->from_y, workspace) : FBN_NULL_POINTER;
    if (!status && !called->frozen && !(called->count >= 1 && isfinite(called->count))) status = FBN_TOO_FEW_VALUES;
    if (!status) status = check_optional(called->sums, FBN_F64, p->channels);
    if (!status) status = check_result(p, dx, dy, x, residual);
    if (!status && residual && p->activation) status = check_result(p, dresidual, dy, x, residual);
    if (!status && residual && p->activation) status = check_apart(p, dresidual, dx);
    if (!status) status = check_optional(dgamma, statistics(p), p->channels);
    return status ? status : check_optional(dbeta, statistics(p), p->channels);
}
