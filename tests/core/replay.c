/* replay.c: what does a program without Python get? Reads a call from stdin, and writes what each verb fills to stdout.
 *
 * In: the numbers of `Call`, then x, dy, residual, gamma, beta, mean, var. Out: y of fbn_infer, y of a plan, y of
 * fbn_forward, mean and var updated, moments, sums, dx, dresidual, dgamma, dbeta.
 */
#include <fastbn.h>

#include <stdio.h>
#include <stdlib.h>

typedef struct {
    int64_t dtype, activation, outer, channels, inner, threads, has_residual;
    double slope, eps, momentum;
} Call;

static void *memory(size_t bytes) {
    void *found = malloc(bytes + 1);
    if (!found) exit(3);
    return found;
}

static void *next(size_t bytes) {
    void *found = memory(bytes);
    if (fread(found, 1, bytes, stdin) != bytes) exit(4);
    return found;
}

static void give(const void *array, size_t bytes) {
    if (fwrite(array, 1, bytes, stdout) != bytes) exit(5);
}

static void expect(fbn_status status) {
    if (status == FBN_OK) return;
    fprintf(stderr, "%s\n", fbn_status_text(status));
    exit(6);
}

int main(void) {
    const Call *call = next(sizeof *call);
    const fbn_machine machine = fbn_this_machine();
    const fbn_problem p = {.machine = &machine,
                           .dtype = (fbn_dtype)call->dtype,
                           .activation = (fbn_activation)call->activation,
                           .slope = call->slope,
                           .outer = call->outer,
                           .channels = call->channels,
                           .inner = call->inner,
                           .threads = (int)call->threads};
    const size_t C = (size_t)p.channels, M = (size_t)(p.outer * p.inner);
    const size_t real = p.dtype == FBN_F64 ? 8 : 4, elem = p.dtype == FBN_F64 ? 8 : p.dtype == FBN_F32 ? 4 : 2;
    const void *x = next(M * C * elem), *dy = next(M * C * elem), *given = next(M * C * elem);
    const void *residual = call->has_residual ? given : NULL;
    const fbn_dtype wide = real == 8 ? FBN_F64 : FBN_F32;
    const fbn_parameters parameters = {next(C * real), next(C * real), wide};
    const fbn_running running = {next(C * real), next(C * real), wide, call->momentum, 1};
    const fbn_statistics statistics = {running.mean, running.var, wide};
    void *y = memory(M * C * elem), *dresidual = memory(M * C * elem), *workspace = memory(fbn_workspace_bytes(&p));
    void *dgamma = memory(C * real), *dbeta = memory(C * real), *plan = memory(fbn_plan_bytes(p.channels));
    double *saved = memory(FBN_SAVED_ROWS * C * sizeof(double)), *rows = memory(3 * C * sizeof(double));

    const fbn_infer_args infer = {.size = sizeof infer,
                                  .x = x,
                                  .residual = residual,
                                  .parameters = parameters,
                                  .eps = call->eps,
                                  .statistics = statistics,
                                  .y = y};
    expect(fbn_infer(&p, &infer, workspace));
    give(y, M * C * elem);
    const fbn_plan_args set = {sizeof set, parameters, call->eps, statistics};
    const fbn_run_args run = {sizeof run, x, residual, y};
    expect(fbn_plan_set(&p, &set, plan));
    expect(fbn_plan_run(&p, &run, plan));
    give(y, M * C * elem);
    const fbn_forward_args forward = {.size = sizeof forward,
                                      .x = x,
                                      .residual = residual,
                                      .parameters = parameters,
                                      .eps = call->eps,
                                      .running = running,
                                      .y = y,
                                      .saved = saved};
    expect(fbn_forward(&p, &forward, workspace));
    give(y, M * C * elem);
    give(running.mean, C * real);
    give(running.var, C * real);
    const fbn_moments_args moments = {.size = sizeof moments, .x = x, .moments = rows};
    expect(fbn_moments(&p, &moments, workspace));
    give(rows, 3 * C * sizeof(double));
    const fbn_sums_args sums = {
        .size = sizeof sums, .dy = dy, .x = x, .residual = residual, .saved = saved, .sums = rows};
    expect(fbn_backward_sums(&p, &sums, workspace));
    give(rows, 2 * C * sizeof(double));
    const fbn_backward_args backward = {.size = sizeof backward,
                                        .dy = dy,
                                        .x = x,
                                        .residual = residual,
                                        .saved = saved,
                                        .count = (double)M,
                                        .dx = y,
                                        .dresidual = dresidual,
                                        .dgamma = dgamma,
                                        .dbeta = dbeta};
    expect(fbn_backward(&p, &backward, workspace));
    give(y, M * C * elem);
    if (residual && p.activation != FBN_IDENTITY) give(dresidual, M * C * elem);
    give(dgamma, C * real);
    give(dbeta, C * real);
    return 0;
}
