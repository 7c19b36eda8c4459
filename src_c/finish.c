/* finish.c: what is computed once per channel? Origins before a reduction; after it statistics, running statistics,
 * sums, and the constants of maps.
 */
#include <string.h>

#include "job.h"
#include "values.h"

/* Values that are converted from or to another dtype, or blended, at a time. */
enum { SOME = 64 };
static int64_t some(int64_t n) { return n < SOME ? n : SOME; }

static fbn_dtype statistics_dtype(const fbn_job *j) { return j->p->dtype == FBN_F64 ? FBN_F64 : FBN_F32; }

/* ---- before a reduction ---- */

/* The origin of a channel's sums: one of its values. */
void fbn_set_origins(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels, n = j->p->inner;
    const char *at[3];
    for (int i = 0; i < 3; i++) at[i] = j->x + ((j->origins[i] / n * C + c0) * n + j->origins[i] % n) * j->split.elem;
    j->kernels->set_origin(at[0], at[1], at[2], c1 - c0, n, j->origin + c0);
    fbn_repeat_columns(j, c0, c1, -1, 0);
}

static fbn_channels known_at(const fbn_job *j, int64_t c) {
    const double *rows = j->known + c;
    const int64_t C = j->p->channels;
    return (fbn_channels){rows + FBN_MEAN * C, rows + FBN_MEAN_LOW * C, rows + FBN_INV_STD * C, rows + FBN_GAMMA * C,
                          rows + FBN_BETA * C};
}

static void set_lines(fbn_job *j, int64_t c0, int64_t c1) {
    const fbn_channels known = known_at(j, c0);
    const fbn_constants constants = fbn_constants_at(j, c0);
    j->kernels->set_line(&known, c1 - c0, &constants);
    fbn_repeat_columns(j, c0, c1, j->kernels->first_constant, FBN_CONSTANTS_OF_Y);
}

/* The sums of a gradient are taken about the mean. */
void fbn_set_lines_known(fbn_job *j, int64_t c0, int64_t c1) {
    set_lines(j, c0, c1);
    memcpy(j->origin + c0, j->known + FBN_MEAN * j->p->channels + c0, (size_t)(c1 - c0) * sizeof(double));
    fbn_repeat_columns(j, c0, c1, -1, 0);
}

/* The same where `x` holds y. Then gamma * xhat + beta takes the place of x, beta that of its mean and gamma that of
 * its standard deviation. The rows are such that gamma * inv_std is still that of x. */
void fbn_set_lines_from_y(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const double *gamma = j->of_x + FBN_GAMMA * C, *inv_std = j->of_x + FBN_INV_STD * C;
    for (int64_t c = c0; c < c1; c++) {
        j->saved[FBN_MEAN * C + c] = j->of_x[FBN_BETA * C + c];
        j->saved[FBN_MEAN_LOW * C + c] = 0;
        j->saved[FBN_INV_STD * C + c] = 1 / gamma[c];
        j->saved[FBN_GAMMA * C + c] = gamma[c] * (gamma[c] * inv_std[c]);
        j->saved[FBN_BETA * C + c] = j->of_x[FBN_BETA * C + c];
    }
    fbn_set_lines_known(j, c0, c1);
}

/* ---- after a reduction ---- */

/* Adds up the sums of all segments, in order, in the place of the first segment's. */
static void total(fbn_job *j, int64_t c0, int64_t c1) {
    double *first = fbn_first_sums(j), *second = fbn_second_sums(j);
    for (int64_t s = 1; s < j->split.segments; s++) {
        const double *more = j->partial + 2 * s * j->split.padded;
        for (int64_t c = c0; c < c1; c++) first[c] += more[c];
        for (int64_t c = c0; c < c1; c++) second[c] += more[j->split.padded + c];
    }
}

/* ---- forward ---- */

/* The statistics of the batch, from the sums about the origin. */
static void set_moments(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    double *saved = j->saved + c0;
    total(j, c0, c1);
    j->kernels->set_moments(j->origin + c0, fbn_first_sums(j) + c0, j->count, c1 - c0, fbn_second_sums(j) + c0,
                            saved + FBN_MEAN * C, saved + FBN_MEAN_LOW * C, saved + FBN_VAR * C);
}

/* The kernels of an array whose values are of a compute type. */
static const fbn_dtype_kernels *of_real(const fbn_job *j, fbn_dtype dtype) { return j->p->machine->kernels->of[dtype]; }

/* Moves a running statistic towards that of the batch, batch[c] * factor. */
static void blend(const fbn_job *j, void *running, const double *batch, double factor, int64_t c0, int64_t c1) {
    const fbn_running *r = &j->running;
    const size_t size = fbn_element(r->dtype);
    if (size >= sizeof(float)) {
        of_real(j, r->dtype)->blend((char *)running + (size_t)c0 * size, batch + c0, r->momentum, factor, c1 - c0);
        return;
    }
    for (int64_t c = c0, n; c < c1; c += n) {
        double values[SOME];
        n = some(c1 - c);
        fbn_get_all(running, c, r->dtype, n, values);
        of_real(j, FBN_F64)->blend(values, batch + c, r->momentum, factor, n);
        fbn_put_all(running, c, r->dtype, n, values);
    }
}

static void update_running(const fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const fbn_running *r = &j->running;
    if (!r->mean) return;
    blend(j, r->mean, j->saved + FBN_MEAN * C, 1, c0, c1);
    blend(j, r->var, j->saved + FBN_VAR * C, j->count / (j->count - r->correction), c0, c1);
}

/* Fills a row of `saved` from an array of any dtype, or with `absent` where the array is NULL. */
static void set_row(fbn_job *j, int row, const void *array, fbn_dtype dtype, double absent, int64_t c0, int64_t c1) {
    double *to = j->saved + row * j->p->channels;
    if (!array)
        for (int64_t c = c0; c < c1; c++) to[c] = absent;
    else if (dtype == FBN_F32) of_real(j, dtype)->get((const float *)array + c0, c1 - c0, to + c0);
    else fbn_get_all(array, c0, dtype, c1 - c0, to + c0);
}

/* Fills the other rows of `saved`, which has the statistics, and the constants of the map. */
void fbn_finish_applied(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    j->kernels->invert(j->saved + FBN_VAR * C + c0, j->eps, c1 - c0, j->saved + FBN_INV_STD * C + c0);
    set_row(j, FBN_GAMMA, j->parameters.gamma, j->parameters.dtype, 1, c0, c1);
    set_row(j, FBN_BETA, j->parameters.beta, j->parameters.dtype, 0, c0, c1);
    set_lines(j, c0, c1);
}

void fbn_finish_statistics(fbn_job *j, int64_t c0, int64_t c1) {
    set_row(j, FBN_MEAN, j->statistics.mean, j->statistics.dtype, 0, c0, c1);
    set_row(j, FBN_MEAN_LOW, NULL, FBN_F64, 0, c0, c1);
    set_row(j, FBN_VAR, j->statistics.var, j->statistics.dtype, 0, c0, c1);
    fbn_finish_applied(j, c0, c1);
}

void fbn_finish_batch(fbn_job *j, int64_t c0, int64_t c1) {
    set_moments(j, c0, c1);
    update_running(j, c0, c1);
    fbn_finish_applied(j, c0, c1);
}

void fbn_finish_moments(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    set_moments(j, c0, c1);
    const double *rows[] = {j->saved + FBN_MEAN * C, j->saved + FBN_MEAN_LOW * C, fbn_second_sums(j)};
    for (int row = 0; row < 3; row++)
        memcpy(j->moments_out + row * C + c0, rows[row] + c0, (size_t)(c1 - c0) * sizeof(double));
}

/* ---- backward: `partial` holds the sums of dz and of dz * (x - mean) ---- */

static const double *known_row(const fbn_job *j, int row) { return j->known + row * j->p->channels; }

static void total_gradient(fbn_job *j, int64_t c0, int64_t c1) {
    double *sums = fbn_first_sums(j), *products = fbn_second_sums(j);
    const double *low = known_row(j, FBN_MEAN_LOW);
    total(j, c0, c1);
    for (int64_t c = c0; c < c1; c++) products[c] -= sums[c] * low[c];
}

/* The gradients of gamma and beta, and the constants of dx. Frozen statistics do not depend on x, so that dx is gain *
 * dz, as if the sums were 0. (So is dx of positions that do not count, but they use the constants of those that do.) */
void fbn_finish_known_sums(fbn_job *j, int64_t c0, int64_t c1) {
    double *sums = fbn_first_sums(j), *products = fbn_second_sums(j);
    const double *inv_std = known_row(j, FBN_INV_STD);
    for (int64_t c = c0, n; j->dgamma && c < c1; c += n) {
        double values[SOME];
        n = some(c1 - c);
        for (int64_t k = 0; k < n; k++) values[k] = products[c + k] * inv_std[c + k];
        fbn_put_all(j->dgamma, c, statistics_dtype(j), n, values);
    }
    if (j->dbeta) fbn_put_all(j->dbeta, c0, statistics_dtype(j), c1 - c0, sums + c0);
    if (j->frozen) {
        memset(sums + c0, 0, (size_t)(c1 - c0) * sizeof(double));
        memset(products + c0, 0, (size_t)(c1 - c0) * sizeof(double));
    }
    const fbn_channels known = known_at(j, c0);
    const fbn_constants constants = fbn_constants_at(j, c0);
    j->kernels->set_gradient(&known, sums + c0, products + c0, j->count, (j->activation & FBN_WHICH) != 0, c1 - c0,
                             &constants);
    fbn_repeat_columns(j, c0, c1, j->kernels->first_constant, FBN_CONSTANTS); /* those of y may have got a prescale */
}

void fbn_finish_gradient(fbn_job *j, int64_t c0, int64_t c1) {
    total_gradient(j, c0, c1);
    fbn_finish_known_sums(j, c0, c1);
}

void fbn_finish_given_sums(fbn_job *j, int64_t c0, int64_t c1) {
    double *sums = fbn_first_sums(j), *products = fbn_second_sums(j);
    const double *inv_std = known_row(j, FBN_INV_STD), *given = j->given_sums;
    memcpy(sums + c0, given + c0, (size_t)(c1 - c0) * sizeof(double));
    for (int64_t c = c0; c < c1; c++) products[c] = inv_std[c] == 0 ? 0 : given[j->p->channels + c] / inv_std[c];
    fbn_finish_known_sums(j, c0, c1);
}

void fbn_finish_sums(fbn_job *j, int64_t c0, int64_t c1) {
    const double *sums = fbn_first_sums(j), *products = fbn_second_sums(j), *inv_std = known_row(j, FBN_INV_STD);
    total_gradient(j, c0, c1);
    memcpy(j->sums_out + c0, sums + c0, (size_t)(c1 - c0) * sizeof(double));
    for (int64_t c = c0; c < c1; c++) j->sums_out[j->p->channels + c] = products[c] * inv_std[c];
}
