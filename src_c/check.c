/* check.c: is this call valid? Gives every status but FBN_BAD_PLAN. The verbs give that, and FBN_TOO_FEW_VALUES and
 * FBN_BAD_SHAPE where these depend on more than the arguments. */
#include "check.h"

#include <math.h>

#include "values.h"

const char *fbn_status_text(fbn_status status) {
    static const char *const texts[] = {
        [FBN_OK] = "no error",
        [FBN_NULL_POINTER] = "a pointer that must be given is NULL",
        [FBN_MISALIGNED] = "a pointer is not a multiple of its element's size",
        [FBN_OVERLAP] = "a result shares memory with an input or another result",
        [FBN_BAD_DTYPE] = "no such dtype",
        [FBN_BAD_ACTIVATION] = "no such activation, a slope that is not finite, or one that cannot be inverted",
        [FBN_BAD_SHAPE] = "a size is negative, or their product is too large",
        [FBN_BAD_THREADS] = "threads is below 1 or above FBN_MOST_THREADS",
        [FBN_BAD_EPS] = "eps is negative or not finite",
        [FBN_BAD_MOMENTUM] = "momentum is outside 0 to 1, or correction negative or not finite",
        [FBN_TOO_FEW_VALUES] = "too few values per channel for statistics",
        [FBN_BAD_PLAN] = "not a plan, or it was moved, or is for another machine, dtype or number of channels",
        [FBN_BAD_SIZE] = "size is not the sizeof of the struct of arguments",
    };
    const int known = (int)status >= 0 && (int)status <= FBN_BAD_SIZE;
    return known ? texts[status] : "no such status";
}

/* ---- numbers ---- */

static fbn_status check_activation(const fbn_problem *p) {
    if ((int)p->activation < FBN_IDENTITY || (int)p->activation >= FBN_ACTIVATIONS) return FBN_BAD_ACTIVATION;
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

static int is_dtype(fbn_dtype dtype) { return (int)dtype >= FBN_F32 && (int)dtype <= FBN_BF16; }

static fbn_status check_machine(const fbn_problem *p) {
    if (!p || !p->machine || !p->machine->kernels) return FBN_NULL_POINTER;
    return is_dtype(p->dtype) ? FBN_OK : FBN_BAD_DTYPE;
}

static int64_t values(const fbn_problem *p) { return p->outer * p->channels * p->inner; }

fbn_status fbn_check_problem(const fbn_problem *p) {
    fbn_status status = check_machine(p);
    if (!status) status = check_activation(p);
    if (!status) status = check_sizes(p->outer, p->channels, p->inner);
    if (!status && (p->threads < 1 || p->threads > FBN_MOST_THREADS)) status = FBN_BAD_THREADS;
    return status || (uint64_t)values(p) <= SIZE_MAX / fbn_element(p->dtype) ? status : FBN_BAD_SHAPE;
}

static fbn_status check_eps(double eps) { return isfinite(eps) && eps >= 0 ? FBN_OK : FBN_BAD_EPS; }

/* A struct of arguments: its first member must be its size. */
static fbn_status check_args(const void *args, size_t size) {
    if (!args) return FBN_NULL_POINTER;
    return *(const size_t *)args == size ? FBN_OK : FBN_BAD_SIZE;
}

/* ---- pointers ---- */

static fbn_dtype statistics(const fbn_problem *p) { return p->dtype == FBN_F64 ? FBN_F64 : FBN_F32; }

/* An array that may be NULL; where it has no elements it may be any pointer. */
static fbn_status check_optional(const void *array, fbn_dtype dtype, int64_t size) {
    return size && (uintptr_t)array % fbn_element(dtype) ? FBN_MISALIGNED : FBN_OK;
}

static fbn_status check_array(const void *array, fbn_dtype dtype, int64_t size) {
    return size && !array ? FBN_NULL_POINTER : check_optional(array, dtype, size);
}

static fbn_status check_workspace(const void *memory) { return memory ? FBN_OK : FBN_NULL_POINTER; }

/* A large array: it has the problem's dtype and size. */
static fbn_status check_data(const fbn_problem *p, const void *array) {
    return check_array(array, p->dtype, values(p));
}

/* A result may not share memory with another large array. */
static fbn_status check_apart(const fbn_problem *p, const void *result, const void *other) {
    const uintptr_t a = (uintptr_t)result, b = (uintptr_t)other, bytes = (uintptr_t)values(p) * fbn_element(p->dtype);
    return !a || !b || (a > b ? a - b : b - a) >= bytes ? FBN_OK : FBN_OVERLAP;
}

static fbn_status check_parameters(const fbn_problem *p, const fbn_parameters *given) {
    if ((!given->gamma && !given->beta) || !p->channels) return FBN_OK;
    if (!is_dtype(given->dtype)) return FBN_BAD_DTYPE;
    const fbn_status status = check_optional(given->gamma, given->dtype, p->channels);
    return status ? status : check_optional(given->beta, given->dtype, p->channels);
}

static fbn_status check_both(const fbn_problem *p, const void *mean, const void *var, fbn_dtype dtype) {
    if (!is_dtype(dtype)) return FBN_BAD_DTYPE;
    const fbn_status status = check_array(mean, dtype, p->channels);
    return status ? status : check_array(var, dtype, p->channels);
}

static fbn_status check_running(const fbn_problem *p, const fbn_running *given) {
    if (!given->mean && !given->var) return FBN_OK;
    if (!(given->momentum >= 0 && given->momentum <= 1)) return FBN_BAD_MOMENTUM;
    if (!(given->correction >= 0 && isfinite(given->correction))) return FBN_BAD_MOMENTUM;
    return check_both(p, given->mean, given->var, given->dtype);
}

/* ---- the verbs ---- */

static fbn_status check_map(const fbn_problem *p, const void *x, const void *residual, const void *y) {
    fbn_status status = check_data(p, x);
    if (!status) status = check_optional(residual, p->dtype, values(p));
    if (!status) status = check_data(p, y);
    if (!status && y != x) status = check_apart(p, y, x);
    return status ? status : check_apart(p, y, residual);
}

/* What all verbs that normalize have in common. */
static fbn_status check_normal(const fbn_problem *p, const fbn_parameters *parameters, double eps) {
    fbn_status status = fbn_check_problem(p);
    if (!status) status = check_eps(eps);
    return status ? status : check_parameters(p, parameters);
}

fbn_status fbn_check_forward(const fbn_problem *p, const fbn_forward_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = check_normal(p, &a->parameters, a->eps);
    if (!status) status = check_running(p, &a->running);
    if (!status) status = check_map(p, a->x, a->residual, a->y);
    if (!status) status = check_array(a->saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_infer(const fbn_problem *p, const fbn_infer_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = check_normal(p, &a->parameters, a->eps);
    if (!status) status = check_both(p, a->statistics.mean, a->statistics.var, a->statistics.dtype);
    if (!status) status = check_map(p, a->x, a->residual, a->y);
    if (!status) status = check_optional(a->saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_apply(const fbn_problem *p, const fbn_apply_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = check_normal(p, &a->parameters, a->eps);
    if (!status) status = check_map(p, a->x, a->residual, a->y);
    if (!status) status = check_array(a->saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_plan_set(const fbn_problem *p, const fbn_plan_args *a, const void *plan) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = check_machine(p);
    if (!status) status = fbn_plan_bytes(p->channels) ? FBN_OK : FBN_BAD_SHAPE;
    if (!status) status = check_eps(a->eps);
    if (!status) status = check_parameters(p, &a->parameters);
    if (!status) status = check_both(p, a->statistics.mean, a->statistics.var, a->statistics.dtype);
    return status ? status : check_workspace(plan);
}

fbn_status fbn_check_plan_run(const fbn_problem *p, const fbn_run_args *a, const void *plan) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = fbn_check_problem(p);
    if (!status) status = check_map(p, a->x, a->residual, a->y);
    return status ? status : check_workspace(plan);
}

fbn_status fbn_check_moments(const fbn_problem *p, const fbn_moments_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = fbn_check_problem(p);
    if (!status) status = check_data(p, a->x);
    if (!status) status = check_array(a->moments, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_sums_args fbn_inputs_of(const fbn_backward_args *a) {
    return (fbn_sums_args){sizeof(fbn_sums_args), a->dy, a->x, a->residual, a->mask, a->saved, a->from_y, NULL};
}

/* What the gradient and its sums have in common. */
static fbn_status check_gradient(const fbn_problem *p, const fbn_sums_args *a, const void *workspace) {
    fbn_status status = fbn_check_problem(p);
    if (!status && a->from_y && p->activation != FBN_IDENTITY)
        status = p->activation == FBN_LEAKY_RELU && p->slope > 0 ? FBN_OK : FBN_BAD_ACTIVATION;
    if (!status) status = check_data(p, a->dy);
    if (!status) status = check_data(p, a->x);
    if (!status) status = check_optional(a->residual, p->dtype, values(p));
    if (!status) status = check_array(a->saved, FBN_F64, p->channels);
    return status ? status : check_workspace(workspace);
}

fbn_status fbn_check_backward_sums(const fbn_problem *p, const fbn_sums_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (!status) status = check_gradient(p, a, workspace);
    return status ? status : check_array(a->sums, FBN_F64, p->channels);
}

/* dx may be dy; dresidual may not. */
static fbn_status check_result(const fbn_problem *p, const void *result, const fbn_backward_args *a, int may_be_dy) {
    fbn_status status = check_data(p, result);
    if (!status && !(may_be_dy && result == a->dy)) status = check_apart(p, result, a->dy);
    if (!status) status = check_apart(p, result, a->x);
    return status ? status : check_apart(p, result, a->residual);
}

fbn_status fbn_check_backward(const fbn_problem *p, const fbn_backward_args *a, const void *workspace) {
    fbn_status status = check_args(a, sizeof *a);
    if (status) return status;
    const fbn_sums_args inputs = fbn_inputs_of(a);
    status = check_gradient(p, &inputs, workspace);
    if (!status && !a->frozen && !(a->count >= 1 && isfinite(a->count))) status = FBN_TOO_FEW_VALUES;
    if (!status) status = check_optional(a->sums, FBN_F64, p->channels);
    if (!status) status = check_result(p, a->dx, a, 1);
    if (!status && a->residual && p->activation) status = check_result(p, a->dresidual, a, 0);
    if (!status && a->residual && p->activation) status = check_apart(p, a->dresidual, a->dx);
    if (!status) status = check_optional(a->dgamma, statistics(p), p->channels);
    return status ? status : check_optional(a->dbeta, statistics(p), p->channels);
}
