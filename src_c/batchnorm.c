/* batchnorm.c: the foreman. Splits a call into tiles, hands them to kernels, and does what is O(channels) between.
 *
 * A call reduces (sums over each channel), finishes (a channel's constants from its sums) and maps (y or dx from the
 * constants). Where a block of channels fits in a core's cache, one thread does all three on it, and memory sees one
 * read and one write. Otherwise all threads reduce, then finish, then map, from the end backwards: the end is what
 * the cache still holds.
 *
 * The sums of a channel are taken by segments, whose bounds follow from the shape alone, and segments are added in
 * order. So neither the blocking nor the number of threads changes a bit.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

enum {
    SEGMENT = 32768,       /* values of a channel that a channels-first segment has at least, and a cut of a plane */
    SEGMENT_ROWS = 128,    /* rows that a channels-last segment has at least, */
    SEGMENTS_MOST = 64,    /* and how many of these there are at most */
    BLOCK_CHANNELS = 64,   /* channels that a channels-first block has at most */
    RUN_BYTES = 256,       /* of a row that a block takes at least: narrower, each row costs a cache miss */
    WORK_PER_THREAD = 32768, /* values that are worth waking a thread for */
    CHUNK_BYTES = 65536,   /* of the rows mapped at a time, from the end backwards */
    ALIGNMENT = 64
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/* How a call is split. A unit is a row (channels-last), or a plane or a cut of one (channels-first). */
typedef struct {
    int rows;                       /* channels-last */
    int64_t elem;                   /* bytes of an element */
    int64_t cut, cuts;              /* elements in a cut of a plane; cuts in a plane */
    int64_t units, segment;         /* units in all; in a segment */
    int64_t segments, padded;       /* segments in all; channels with padding */
    int threads, by_channels;
    int64_t block;                  /* channels in a block */
} plan;

/* Channels in a block, so that what the block's channels hold fits in half of a core's cache. */
static int64_t block_of(const fbn_problem *p, const plan *s) {
    const int64_t budget = p->machine->core_cache / 2, channel = p->outer * p->inner * s->elem;
    const int64_t fit = budget / larger(channel, 1);
    const int64_t share = divide_up(p->channels, s->threads);
    if (s->rows) return smaller(round_up(share, FBN_CHANNEL_PAD), fit / FBN_CHANNEL_PAD * FBN_CHANNEL_PAD);
    if (s->cuts > 1) return 1;
    return larger(1, smaller(smaller(share, fit), BLOCK_CHANNELS));
}

/* By channels wastes no memory traffic, but needs blocks that are worth it and enough of them for every thread. */
static int by_channels(const fbn_problem *p, const plan *s) {
    if (s->rows && s->block * s->elem < RUN_BYTES && s->block < p->channels) return 0;
    const int64_t blocks = divide_up(p->channels, s->block);
    return 5 * divide_up(blocks, s->threads) * s->threads <= 7 * blocks;
}

static plan plan_of(const fbn_problem *p) {
    plan s = {0};
    s.rows = p->inner == 1;
    s.elem = p->dtype == FBN_F64 ? 8 : 4;
    s.cut = p->inner <= 2 * SEGMENT ? p->inner : SEGMENT;
    s.cuts = s.rows ? 1 : divide_up(p->inner, larger(s.cut, 1));
    s.units = p->outer * s.cuts;
    s.segment = s.rows ? larger(SEGMENT_ROWS, divide_up(s.units, SEGMENTS_MOST)) : larger(1, SEGMENT / larger(s.cut, 1));
    s.segments = divide_up(s.units, s.segment);
    s.padded = round_up(p->channels, FBN_CHANNEL_PAD);
    s.threads = (int)larger(1, smaller(p->threads, p->outer * p->inner * p->channels / WORK_PER_THREAD));
    s.block = block_of(p, &s);
    s.by_channels = s.block > 0 && by_channels(p, &s);
    if (!s.by_channels && s.rows) s.block = p->channels;
    return s;
}

/* One call. The per-channel arrays live in the workspace; those of void are of the compute type. */
typedef struct {
    const fbn_problem *p;
    const fbn_dtype_kernels *kernels;
    plan plan;
    const char *x, *residual, *dy;
    char *y, *dx, *dresidual;
    double eps;
    const fbn_parameters *parameters;
    const fbn_running *running;
    const void *given_mean, *given_var;
    double *saved;
    const double *seen;
    int frozen, stream;
    void *dgamma, *dbeta;
    double *origin, *partial, *lanes;
    void *prescale, *neg_mean, *scale, *shift, *shift_low, *on_dy, *on_x, *constant;
} job;

enum { CHANNEL_ARRAYS = 8 };

static int64_t lane_doubles(const plan *s) { return s->rows ? 0 : s->block * 2 * FBN_LANES; }

size_t fbn_workspace_bytes(const fbn_problem *p) {
    const plan s = plan_of(p);
    const int64_t rows = CHANNEL_ARRAYS + FBN_SAVED_ROWS + 1 + 2 * s.segments;
    const int64_t doubles = rows * s.padded + s.threads * lane_doubles(&s);
    return (size_t)doubles * sizeof(double) + ALIGNMENT;
}

static job job_of(const fbn_problem *p, void *workspace) {
    job j;
    memset(&j, 0, sizeof j);
    j.p = p;
    j.kernels = p->machine->kernels->of[p->dtype];
    j.plan = plan_of(p);
    double *at = (double *)(((uintptr_t)workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    void **arrays[CHANNEL_ARRAYS] = {&j.prescale,  &j.neg_mean, &j.scale, &j.shift,
                                    &j.shift_low, &j.on_dy,    &j.on_x,  &j.constant};
    for (int i = 0; i < CHANNEL_ARRAYS; i++, at += j.plan.padded) *arrays[i] = at;
    j.saved = at;
    j.origin = at + FBN_SAVED_ROWS * j.plan.padded;
    j.partial = j.origin + j.plan.padded;
    j.lanes = j.partial + 2 * j.plan.segments * j.plan.padded;
    return j;
}

/* Streaming saves the read that a store into memory costs, but sends what would have stayed in cache away. */
static int streams(const job *j, const void *out) {
    const int64_t bytes = j->p->outer * j->p->channels * j->p->inner * j->plan.elem;
    if (bytes <= j->p->machine->shared_cache / 2 || (uintptr_t)out % (size_t)j->plan.elem) return 0;
    return !j->plan.rows || (((uintptr_t)out | (uintptr_t)(j->p->channels * j->plan.elem)) % ALIGNMENT) == 0;
}

static double get(const void *array, int64_t i, fbn_dtype dtype) {
    return dtype == FBN_F64 ? ((const double *)array)[i] : ((const float *)array)[i];
}

static void put(void *array, int64_t i, double value, fbn_dtype dtype) {
    if (dtype == FBN_F64) ((double *)array)[i] = value;
    else ((float *)array)[i] = (float)value;
}

/* ---- a channel's constants ---- */

/* x - mean and its products stay inside the exponent range if both are scaled by 2^e. That is 0 for any usual
 * channel; where the spread is below 2^-60 or above 2^60 it brings x - mean near 1. */
static int prescale_exponent(double mean, double inv_std, fbn_dtype dtype) {
    const int most = dtype == FBN_F64 ? 1020 : 124;
    const int usual = dtype == FBN_F64 ? 500 : 60;
    if (!(inv_std > 0) || !isfinite(inv_std) || !isfinite(mean)) return 0;
    int e = ilogb(inv_std);
    if (e >= -usual && e <= usual) e = 0;
    if (mean != 0 && e > most - 2 - ilogb(mean)) e = most - 2 - ilogb(mean);
    return e < -most ? -most : e > most ? most : e;
}

/* The line of channel c from what is saved of it: y = ((x - mean_hi) - mean_lo) * inv_std * gamma + beta, where
 * mean_lo * inv_std * gamma moves into the shift. */
static void set_line(job *j, int64_t c, const double *saved) {
    const int64_t C = j->p->channels;
    const fbn_dtype dtype = j->p->dtype;
    const double mean = saved[FBN_MEAN * C + c], inv_std = saved[FBN_INV_STD * C + c];
    const double slope = inv_std * saved[FBN_GAMMA * C + c];
    const double mean_hi = dtype == FBN_F64 ? mean : (float)mean;
    const double mean_lo = (mean - mean_hi) + saved[FBN_MEAN_LOW * C + c];
    const double prescale = ldexp(1.0, prescale_exponent(mean, inv_std, dtype));
    put(j->prescale, c, prescale, dtype);
    put(j->neg_mean, c, -mean_hi * prescale, dtype);
    put(j->scale, c, slope / prescale, dtype);
    const double beta = saved[FBN_BETA * C + c], shift = beta - mean_lo * slope;
    put(j->shift, c, shift, dtype);
    const double shift_hi = get(j->shift, c, dtype);
    put(j->shift_low, c, dtype == FBN_F64 ? (beta - shift_hi) - mean_lo * slope : shift - shift_hi, dtype);
}

static void save(job *j, int64_t c, double mean, double mean_low, double var) {
    const int64_t C = j->p->channels;
    const fbn_parameters *given = j->parameters;
    j->saved[FBN_MEAN * C + c] = mean;
    j->saved[FBN_MEAN_LOW * C + c] = mean_low;
    j->saved[FBN_VAR * C + c] = var;
    j->saved[FBN_INV_STD * C + c] = var + j->eps == 0 ? 0 : 1 / sqrt(var + j->eps);
    j->saved[FBN_GAMMA * C + c] = given->gamma ? get(given->gamma, c, given->dtype) : 1;
    j->saved[FBN_BETA * C + c] = given->beta ? get(given->beta, c, given->dtype) : 0;
    set_line(j, c, j->saved);
}

static void blend(void *running, int64_t c, double momentum, double batch, fbn_dtype dtype) {
    put(running, c, (1 - momentum) * get(running, c, dtype) + momentum * batch, dtype);
}

/* The sums of a channel over its segments, in order. */
static void total(const job *j, int64_t c, double *first, double *second) {
    const double *at = j->partial + c;
    *first = *second = 0;
    for (int64_t s = 0; s < j->plan.segments; s++, at += 2 * j->plan.padded) {
        *first += at[0];
        *second += at[j->plan.padded];
    }
}

static void finish_forward(job *j, int64_t c) {
    const double count = (double)j->p->outer * (double)j->p->inner;
    double sum, square;
    total(j, c, &sum, &square);
    const double offset = sum / count, mean = j->origin[c] + offset;
    /* What the addition rounded away (Knuth's two-sum). */
    const double back = mean - j->origin[c];
    const double mean_low = (j->origin[c] - (mean - back)) + (offset - back);
    double m2 = square - sum * offset;
    m2 = m2 < 0 ? 0 : m2;
    save(j, c, mean, isfinite(mean) ? mean_low : 0, m2 / count);
    if (!j->running || !j->running->mean) return;
    blend(j->running->mean, c, j->running->momentum, mean, j->p->dtype);
    blend(j->running->var, c, j->running->momentum, m2 / (count - j->running->correction), j->p->dtype);
}

static void finish_infer(job *j, int64_t c) {
    save(j, c, get(j->given_mean, c, j->p->dtype), 0, get(j->given_var, c, j->p->dtype));
}

/* dx = A dz + B (x - mean) + D, with A = gamma/std, B = -A sum(dz (x - mean)) / (M var), D = -A sum(dz) / M
 * (Ioffe & Szegedy 2015, section 3, gathered by input). */
static void finish_backward(job *j, int64_t c) {
    const int64_t C = j->p->channels;
    const fbn_dtype dtype = j->p->dtype;
    const double count = (double)j->p->outer * (double)j->p->inner;
    const double inv_std = j->seen[FBN_INV_STD * C + c], slope = inv_std * j->seen[FBN_GAMMA * C + c];
    double sum = 0, product = 0;
    if (!j->frozen || j->dgamma || j->dbeta) total(j, c, &sum, &product);
    product -= sum * j->seen[FBN_MEAN_LOW * C + c];
    if (j->dgamma) put(j->dgamma, c, product * inv_std, dtype);
    if (j->dbeta) put(j->dbeta, c, sum, dtype);
    set_line(j, c, j->seen);
    put(j->on_dy, c, slope, dtype);
    if (j->frozen) return;
    const double on_x = -slope * inv_std * inv_std * product / count;
    const double mean = j->seen[FBN_MEAN * C + c], mean_hi = dtype == FBN_F64 ? mean : (float)mean;
    const double mean_lo = (mean - mean_hi) + j->seen[FBN_MEAN_LOW * C + c];
    put(j->on_x, c, on_x / get(j->prescale, c, dtype), dtype);
    put(j->constant, c, -slope * sum / count - on_x * mean_lo, dtype);
}

static void finish(job *j, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++)
        if (j->dy) finish_backward(j, c);
        else if (j->given_mean) finish_infer(j, c);
        else finish_forward(j, c);
}

/* ---- tiles ---- */

/* The index of a unit's first element of channel c, and the elements in it (of one channel). */
static int64_t start_of(const job *j, int64_t unit, int64_t c) {
    const int64_t plane = unit / j->plan.cuts, cut = unit % j->plan.cuts;
    return (plane * j->p->channels + c) * j->p->inner + cut * j->plan.cut;
}

static int64_t length_of(const job *j, int64_t unit) {
    return smaller(j->plan.cut, j->p->inner - unit % j->plan.cuts * j->plan.cut);
}

static fbn_line line_at(const job *j, int64_t c) {
    const int64_t skip = c * j->plan.elem;
    return (fbn_line){(char *)j->prescale + skip, (char *)j->neg_mean + skip, (char *)j->scale + skip,
                      (char *)j->shift + skip, (char *)j->shift_low + skip};
}

/* Pointers into arrays that may be absent. */
static const char *at(const char *array, int64_t bytes) { return array ? array + bytes : NULL; }
static char *at_out(char *array, int64_t bytes) { return array ? array + bytes : NULL; }

static fbn_grad_moments grad_moments_at(const job *j, int64_t start, int64_t c) {
    const int64_t skip = start * j->plan.elem;
    return (fbn_grad_moments){j->dy + skip,   j->x + skip,        at(j->residual, skip), line_at(j, c),
                              j->p->activation, j->seen + FBN_MEAN * j->p->channels + c};
}

/* The origin of a channel's sums: the median of three of its values, so that one outlier does not matter. */
static void set_origin(job *j, int64_t c0, int64_t c1) {
    const int64_t N = j->p->outer, C = j->p->channels, n = j->p->inner;
    for (int64_t c = c0; c < c1; c++) {
        const double a = get(j->x, c * n, j->p->dtype);
        const double b = get(j->x, (N / 2 * C + c) * n + n / 2, j->p->dtype);
        const double d = get(j->x, ((N - 1) * C + c) * n + n - 1, j->p->dtype);
        const double median = fmax(fmin(a, b), fmin(fmax(a, b), d));
        j->origin[c] = isfinite(median) ? median : 0;
    }
}

/* Adds a channel's lanes, in one order everywhere. */
static double fold(double *lanes) {
    for (int n = FBN_LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

static void reduce_planes(job *j, int64_t segment, int64_t c0, int64_t c1, double *lanes) {
    const int64_t first = segment * j->plan.segment, last = smaller(first + j->plan.segment, j->plan.units);
    double *sums = j->partial + 2 * segment * j->plan.padded;
    memset(lanes, 0, (size_t)(c1 - c0) * 2 * FBN_LANES * sizeof(double));
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t start = start_of(j, unit, c0), n = length_of(j, unit);
        if (j->dy) {
            const fbn_grad_moments g = grad_moments_at(j, start, c0);
            j->kernels->grad_moments_cf(&g, c1 - c0, n, lanes);
        } else j->kernels->moments_cf(j->x + start * j->plan.elem, c1 - c0, n, j->origin + c0, lanes);
    }
    for (int64_t c = c0; c < c1; c++, lanes += 2 * FBN_LANES) {
        sums[c] = fold(lanes);
        sums[j->plan.padded + c] = fold(lanes + FBN_LANES);
    }
}

static void reduce_rows(job *j, int64_t segment, int64_t c0, int64_t c1) {
    const int64_t first = segment * j->plan.segment, last = smaller(first + j->plan.segment, j->plan.units);
    const int64_t start = start_of(j, first, c0), C = j->p->channels;
    double *sums = j->partial + 2 * segment * j->plan.padded + c0, *others = sums + j->plan.padded;
    const size_t bytes = (size_t)round_up(c1 - c0, FBN_CHANNEL_PAD) * sizeof(double);
    memset(sums, 0, bytes);
    memset(others, 0, bytes);
    if (j->dy) {
        const fbn_grad_moments g = grad_moments_at(j, start, c0);
        j->kernels->grad_moments_cl(&g, last - first, c1 - c0, C, sums, others);
    } else
        j->kernels->moments_cl(j->x + start * j->plan.elem, last - first, c1 - c0, C, j->origin + c0, sums, others);
}

static void reduce(job *j, int64_t s0, int64_t s1, int64_t c0, int64_t c1, int thread) {
    for (int64_t s = s0; s < s1; s++) {
        if (j->plan.rows) reduce_rows(j, s, c0, c1);
        else
            for (int64_t c = c0; c < c1; c += j->plan.block)
                reduce_planes(j, s, c, smaller(c + j->plan.block, c1), j->lanes + thread * lane_doubles(&j->plan));
    }
}

/* Maps `rows` rows, or one unit of planes. */
static void map_tile(const job *j, int64_t unit, int64_t rows, int64_t c0, int64_t c1) {
    const int64_t start = start_of(j, unit, c0), skip = start * j->plan.elem, C = j->p->channels;
    const int64_t n = c1 - c0, length = length_of(j, unit);
    const fbn_line line = line_at(j, c0);
    if (j->dy) {
        const int64_t row = c0 * j->plan.elem;
        const fbn_grad_affine g = {j->dy + skip,
                                   j->x + skip,
                                   at(j->residual, skip),
                                   j->dx + skip,
                                   at_out(j->dresidual, skip),
                                   line,
                                   j->p->activation,
                                   (char *)j->on_dy + row,
                                   (char *)j->on_x + row,
                                   (char *)j->constant + row,
                                   j->frozen,
                                   j->stream};
        if (j->plan.rows) j->kernels->grad_affine_cl(&g, rows, n, C);
        else j->kernels->grad_affine_cf(&g, n, length);
    } else {
        const fbn_affine a = {j->x + skip, at(j->residual, skip), j->y + skip, line, j->p->activation, j->stream};
        if (j->plan.rows) j->kernels->affine_cl(&a, rows, n, C);
        else j->kernels->affine_cf(&a, n, length);
    }
}

/* From the end backwards, which begins with what the reduction has just left in the cache. */
static void map(const job *j, int64_t u0, int64_t u1, int64_t c0, int64_t c1) {
    const int64_t chunk = j->plan.rows ? larger(1, CHUNK_BYTES / ((c1 - c0) * j->plan.elem)) : 1;
    for (int64_t end = u1; end > u0; end -= chunk) {
        const int64_t first = larger(u0, end - chunk);
        if (j->plan.rows) map_tile(j, first, end - first, c0, c1);
        else
            for (int64_t c = c0; c < c1; c += j->plan.block)
                map_tile(j, first, 1, c, smaller(c + j->plan.block, c1));
    }
}

/* ---- threads ---- */

static void barrier(int threads) {
    if (threads == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* What thread `t` of `threads` does. Each step's share is [n * t / threads, n * (t + 1) / threads). */
static void work(job *j, int64_t t, int threads) {
    const int64_t C = j->p->channels, pad = FBN_CHANNEL_PAD, groups = divide_up(C, pad);
    const int reduces = j->dy ? !j->frozen || j->dgamma || j->dbeta : !j->given_mean;
    if (j->plan.by_channels) {
        const int64_t blocks = divide_up(C, j->plan.block);
        for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
            const int64_t c0 = b * j->plan.block, c1 = smaller(c0 + j->plan.block, C);
            if (reduces && !j->dy) set_origin(j, c0, c1);
            if (reduces && j->dy) for (int64_t c = c0; c < c1; c++) set_line(j, c, j->seen);
            if (reduces) reduce(j, 0, j->plan.segments, c0, c1, (int)t);
            finish(j, c0, c1);
            map(j, 0, j->plan.units, c0, c1);
        }
        return;
    }
    const int64_t c0 = groups * t / threads * pad, c1 = smaller(groups * (t + 1) / threads * pad, C);
    if (reduces) {
        if (j->dy) for (int64_t c = c0; c < c1; c++) set_line(j, c, j->seen);
        else set_origin(j, c0, c1);
        barrier(threads);
        reduce(j, j->plan.segments * t / threads, j->plan.segments * (t + 1) / threads, 0, C, (int)t);
        barrier(threads);
    }
    finish(j, c0, c1);
    barrier(threads);
    map(j, j->plan.units * t / threads, j->plan.units * (t + 1) / threads, 0, C);
}

static void run(job *j) {
#ifdef _OPENMP
    if (j->plan.threads > 1) {
#pragma omp parallel num_threads(j->plan.threads)
        work(j, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(j, 0, 1);
}

/* ---- the verbs ---- */

void fbn_forward(const fbn_problem *problem, const void *x, const void *residual, const fbn_parameters *parameters,
                 double eps, const fbn_running *running, void *y, double *saved, void *workspace) {
    job j = job_of(problem, workspace);
    j.x = x;
    j.residual = residual;
    j.parameters = parameters;
    j.eps = eps;
    j.running = running;
    j.y = y;
    j.saved = saved;
    j.stream = streams(&j, y);
    run(&j);
}

void fbn_infer(const fbn_problem *problem, const void *x, const void *residual, const fbn_parameters *parameters,
               double eps, const void *mean, const void *var, void *y, double *saved, void *workspace) {
    job j = job_of(problem, workspace);
    j.x = x;
    j.residual = residual;
    j.parameters = parameters;
    j.eps = eps;
    j.given_mean = mean;
    j.given_var = var;
    j.y = y;
    if (saved) j.saved = saved;
    j.stream = streams(&j, y);
    run(&j);
}

void fbn_backward(const fbn_problem *problem, const void *dy, const void *x, const void *residual, const double *saved,
                  int frozen, void *dx, void *dresidual, void *dgamma, void *dbeta, void *workspace) {
    job j = job_of(problem, workspace);
    j.dy = dy;
    j.x = x;
    j.residual = residual;
    j.seen = saved;
    j.frozen = frozen;
    j.dx = dx;
    j.dresidual = dresidual;
    j.dgamma = dgamma;
    j.dbeta = dbeta;
    j.stream = streams(&j, dx);
    run(&j);
}

int fbn_openmp(void) {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}
