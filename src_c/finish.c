/* finish.c: what is computed once per channel? Origins before a reduction; after it statistics, running statistics,
 * sums, and the constants of maps.
 */
#include <math.h>
#include <string.h>

#include "job.h"
#include "values.h"

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
    fbn_repeat_columns(j, c0, c1, 0, FBN_CONSTANTS_OF_Y);
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

/* The mean and the variance of the batch, from the sums about the origin. The sum of squares about the mean replaces
 * that about the origin. */
static void set_moments(fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const double count = j->count, *origin = j->origin;
    double *sums = fbn_first_sums(j), *squares = fbn_second_sums(j);
    double *mean = j->saved + FBN_MEAN * C, *low = j->saved + FBN_MEAN_LOW * C, *var = j->saved + FBN_VAR * C;
    total(j, c0, c1);
    for (int64_t c = c0; c < c1; c++) {
        const double offset = sums[c] / count, m2 = squares[c] - sums[c] * offset;
        mean[c] = origin[c] + offset;
        /* What the addition rounded away (Knuth's two-sum), or 0 where the sum was infinite. */
        const double back = mean[c] - origin[c], lost = (origin[c] - (mean[c] - back)) + (offset - back);
        low[c] = lost == lost ? lost : 0;
        squares[c] = m2 < 0 ? 0 : m2;
        var[c] = squares[c] / count;
    }
}

/* Moves a running statistic towards that of the batch, batch[c] * factor. */
static void blend(void *running, const double *batch, double factor, const fbn_running *r, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++)
        fbn_put(running, c, (1 - r->momentum) * fbn_get(running, c, r->dtype) + r->momentum * (batch[c] * factor),
                r->dtype);
}

static void update_running(const fbn_job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const fbn_running *r = &j->running;
    if (!r->mean) return;
    blend(r->mean, j->saved + FBN_MEAN * C, 1, r, c0, c1);
    blend(r->var, j->saved + FBN_VAR * C, j->count / (j->count - r->correction), r, c0, c1);
}

/* Fills a row of `saved` from an array of any dtype, or with `absent` where the array is NULL. */
static void set_row(fbn_job *j, int row, const void *array, fbn_dtype dtype, double absent, int64_t c0, int64_t c1) {
    double *to = j->saved + row * j->p->channels;
    if (!array)
        for (int64_t c = c0; c < c1; c++) to[c] = absent;
    else
        for (int64_t c = c0; c < c1; c++) to[c] = fbn_get(array, c, dtype);
}

/* Fills the other rows of `saved`, which has the statistics, and the constants of the map. */
void fbn_finish_applied(fbn_job *j, int64_t c0, int64_t c1) {
    const double *var = j->saved + FBN_VAR * j->p->channels, eps = j->eps;
    double *inv_std = j->saved + FBN_INV_STD * j->p->channels;
    for (int64_t c = c0; c < c1; c++) {
        const double inverse = 1 / sqrt(var[c] + eps);
        inv_std[c] = var[c] + eps == 0 ? 0 : inverse;
    }
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

/* The gradients of gamma and beta, and the constants of dx. */
static void finish_known_sums(fbn_job *j, int64_t c0, int64_t c1) {
    const double *sums = fbn_first_sums(j), *products = fbn_second_sums(j), *inv_std = known_row(j, FBN_INV_STD);
    for (int64_t c = c0; j->dgamma && c < c1; c++) fbn_put(j->dgamma, c, products[c] * inv_std[c], statistics_dtype(j));
    for (int64_t c = c0; j->dbeta && c < c1; c++) fbn_put(j->dbeta, c, sums[c], statistics_dtype(j));
    const fbn_channels known = known_at(j, c0);
    const fbn_constants constants = fbn_constants_at(j, c0);
    j->kernels->set_gradient(&known, sums + c0, products + c0, j->count, c1 - c0, &constants);
    fbn_repeat_columns(j, c0, c1, FBN_CONSTANTS_OF_Y, FBN_CONSTANTS);
}

void fbn_finish_gradient(fbn_job *j, int64_t c0, int64_t c1) {
    total_gradient(j, c0, c1);
    finish_known_sums(j, c0, c1);
}

void fbn_finish_given_sums(fbn_job *j, int64_t c0, int64_t c1) {
    double *sums = fbn_first_sums(j), *products = fbn_second_sums(j);
    const double *inv_std = known_row(j, FBN_INV_STD), *given = j->given_sums;
    memcpy(sums + c0, given + c0, (size_t)(c1 - c0) * sizeof(double));
    for (int64_t c = c0; c < c1; c++) products[c] = inv_std[c] == 0 ? 0 : given[j->p->channels + c] / inv_std[c];
    finish_known_sums(j, c0, c1);
}

/* With frozen statistics dx does not need the sums. */
void fbn_finish_no_sums(fbn_job *j, int64_t c0, int64_t c1) {
    memset(fbn_first_sums(j) + c0, 0, (size_t)(c1 - c0) * sizeof(double));
    memset(fbn_second_sums(j) + c0, 0, (size_t)(c1 - c0) * sizeof(double));
    finish_known_sums(j, c0, c1);
}

void fbn_finish_sums(fbn_job *j, int64_t c0, int64_t c1) {
    const double *sums = fbn_first_sums(j), *products = fbn_second_sums(j), *inv_std = known_row(j, FBN_INV_STD);
    total_gradient(j, c0, c1);
    memcpy(j->sums_out + c0, sums + c0, (size_t)(c1 - c0) * sizeof(double));
    for (int64_t c = c0; c < c1; c++) j->sums_out[j->p->channels + c] = products[c] * inv_std[c];
}
