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
#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.h"
#include "kernels.h"

enum {
    SEGMENT = 32768,      /* values of a channel that a channels-first segment has at least, and a cut of a plane */
    SEGMENT_ROWS = 128,   /* rows that a channels-last segment has at least, */
    SEGMENTS_MOST = 64,   /* and how many of these there are at most */
    BLOCK_CHANNELS = 64,  /* channels that a channels-first block has at most */
    CHUNK_BYTES = 262144, /* of the rows mapped at a time, from the end backwards */
    SUM_IMAGES = 8,       /* planes of a channel that are summed in turns, */
    MAP_IMAGES = 8,       /* and mapped in turns */
    ALIGNMENT = 64
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/* How a call is split. A unit is a row (channels-last), or a plane or a cut of one (channels-first). */
typedef struct {
    int rows;                 /* channels-last */
    int64_t elem, real;       /* bytes of an element, and of a channel's constant */
    int64_t cut, cuts;        /* elements in a cut of a plane; cuts in a plane */
    int64_t units, segment;   /* units in all; in a segment */
    int64_t segments, padded; /* segments in all; channels with padding */
    int threads, by_channels;
    int arrays;    /* that are read */
    int64_t block; /* channels in a block */
} plan;

/* Channels in a block, so that what the block's channels hold takes a third of a core's cache: there is room for
 * what is fetched ahead, and for the results on their way. */
static int64_t block_of(const fbn_problem *p, const plan *s) {
    const int64_t budget = p->machine->core_cache / 3, channel = p->outer * p->inner * s->elem * s->arrays;
    const int64_t fit = budget / larger(channel, 1);
    const int64_t share = divide_up(p->channels, s->threads);
    if (s->rows) return p->channels;
    if (s->cuts > 1) return 1;
    const int64_t most = smaller(smaller(share, fit), BLOCK_CHANNELS);
    return most >= FBN_CHANNEL_PAD ? most / FBN_CHANNEL_PAD * FBN_CHANNEL_PAD : larger(1, most);
}

/* By channels wastes no memory traffic, but needs blocks that are worth it and enough of them for every thread. */
static int by_channels(const fbn_problem *p, const plan *s) {
    if (s->rows) return 0;
    const int64_t blocks = divide_up(p->channels, s->block);
    return 5 * divide_up(blocks, s->threads) * s->threads <= 7 * blocks;
}

/* Room for padding on the right and, for the constants of rows, on the left. */
static int64_t padded_of(int64_t channels) { return round_up(channels, FBN_CHANNEL_PAD) + 2 * FBN_CHANNEL_PAD; }

static plan plan_of(const fbn_problem *p, int arrays) {
    plan s = {0};
    s.arrays = arrays;
    s.rows = p->inner == 1;
    s.real = p->dtype == FBN_F64 ? 8 : 4;
    s.elem = p->dtype == FBN_F16 || p->dtype == FBN_BF16 ? 2 : s.real;
    s.cut = p->inner <= 2 * SEGMENT ? p->inner : SEGMENT;
    s.cuts = s.rows ? 1 : divide_up(p->inner, larger(s.cut, 1));
    s.units = p->outer * s.cuts;
    s.segment = s.rows ? larger(SEGMENT_ROWS, divide_up(s.units, SEGMENTS_MOST))
                       : larger(SUM_IMAGES, SEGMENT / larger(s.cut, 1));
    s.segments = larger(1, divide_up(s.units, s.segment));
    s.padded = padded_of(p->channels);
    s.threads = (int)larger(1, smaller(p->threads, p->outer * p->inner * p->channels / FBN_WORK_PER_THREAD));
    s.block = block_of(p, &s);
    s.by_channels = by_channels(p, &s);
    return s;
}

enum { CHANNEL_ARRAYS = 9 };

/* One call. The per-channel arrays live in the workspace; those of void are of the compute type. */
typedef struct {
    const fbn_problem *p;
    const fbn_dtype_kernels *kernels;
    plan plan;
    const char *x, *residual, *dy;
    char *y, *dx, *dresidual;
    int backward; /* the call has a dy, which may be NULL where there are no values */
    double eps;
    const fbn_parameters *parameters;
    const fbn_running *running;
    const void *given_mean, *given_var;
    int given; /* the statistics: as given_mean and given_var, or in saved */
    double *saved;
    const double *seen, *of_x; /* what backward knows of what it gets as x, and of x itself */
    int frozen, from_y, stream;
    int planned;               /* the constants are there */
    const unsigned char *mask; /* by position, (outer, inner): which count */
    double count;              /* values that the statistics come from */
    int64_t origins[3];        /* positions whose values the origin is taken from */
    const double *given_sums;
    double *moments_out, *sums_out;
    void *dgamma, *dbeta;
    double *origin; /* padded: what the sums of a channel are about, the mean in backward */
    double *partial, *lanes;
    void *arrays[CHANNEL_ARRAYS]; /* those of line and slopes */
    fbn_line line;
    fbn_slopes slopes;
} job;

static int64_t lane_doubles(const plan *s) { return s->rows ? 0 : s->block * 2 * FBN_LANES; }

size_t fbn_workspace_bytes(const fbn_problem *p) {
    if (fbn_check_problem(p)) return 0;
    const plan s = plan_of(p, 1);
    const int64_t rows = CHANNEL_ARRAYS + FBN_SAVED_ROWS + 1 + 2 * s.segments;
    const int64_t doubles = rows * s.padded + s.threads * lane_doubles(&s);
    return (size_t)doubles * sizeof(double) + ALIGNMENT;
}

/* `out` is what a map will write; NULL where there is none or calls share the constants. A map of rows goes by `out`'s
 * vectors, and the constants of a vector should not lie across two cache lines. */
static job job_of(const fbn_problem *p, int arrays, const void *out, void *workspace) {
    job j;
    memset(&j, 0, sizeof j);
    j.p = p;
    j.kernels = p->machine->kernels->of[p->dtype];
    j.plan = plan_of(p, arrays);
    const int64_t values = ALIGNMENT / j.plan.real, elem = j.plan.elem;
    const int64_t lead = j.plan.rows ? (int64_t)((uintptr_t)out / (uintptr_t)elem % (uintptr_t)values) : 0;
    double *at = (double *)(((uintptr_t)workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    for (int i = 0; i < CHANNEL_ARRAYS; i++, at += j.plan.padded) j.arrays[i] = (char *)at + lead * j.plan.real;
    j.line = (fbn_line){j.arrays[0], j.arrays[1], j.arrays[2], j.arrays[3], j.arrays[4], p->slope};
    j.slopes = (fbn_slopes){j.arrays[5], j.arrays[6], j.arrays[7], j.arrays[8]};
    j.saved = at;
    j.origin = at + FBN_SAVED_ROWS * j.plan.padded;
    j.partial = j.origin + j.plan.padded;
    j.lanes = j.partial + 2 * j.plan.segments * j.plan.padded;
    return j;
}

/* Streaming saves the read that a store into memory costs, but sends what would have stayed in cache away. */
static int streams(const job *j, const void *out) {
    const int64_t bytes = j->p->outer * j->p->channels * j->p->inner * j->plan.elem;
    return bytes > j->p->machine->shared_cache / 8 && (uintptr_t)out % (size_t)j->plan.elem == 0;
}

/* Values in the statistics dtype of a dtype. */
static double get(const void *array, int64_t i, fbn_dtype dtype) {
    return dtype == FBN_F64 ? ((const double *)array)[i] : ((const float *)array)[i];
}

static void put(void *array, int64_t i, double value, fbn_dtype dtype) {
    if (dtype == FBN_F64) ((double *)array)[i] = value;
    else ((float *)array)[i] = (float)value;
}

/* ---- the constants of channels [c0, c1) ---- */

static int has_sums(const job *j) {
    if (!j->backward) return !j->given;
    return !j->given_sums && (!j->frozen || j->dgamma || j->dbeta || j->sums_out);
}

static int maps(const job *j) { return j->y || j->dx; }

static fbn_line line_at(const job *j, int64_t c) {
    const int64_t skip = c * j->plan.real;
    return (fbn_line){(char *)j->line.prescale + skip, (char *)j->line.neg_mean + skip,  (char *)j->line.scale + skip,
                      (char *)j->line.shift + skip,    (char *)j->line.shift_low + skip, j->p->slope};
}

/* The origin of a channel's sums: one of its values. */
static void set_origin(job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels, n = j->p->inner;
    const char *at[3];
    for (int i = 0; i < 3; i++) at[i] = j->x + ((j->origins[i] / n * C + c0) * n + j->origins[i] % n) * j->plan.elem;
    j->kernels->set_origin(at[0], at[1], at[2], c1 - c0, n, j->origin + c0);
}

static fbn_slopes slopes_at(const job *j, int64_t c) {
    const int64_t skip = c * j->plan.real;
    return (fbn_slopes){(char *)j->slopes.on_dy + skip, (char *)j->slopes.on_x + skip,
                        (char *)j->slopes.constant + skip, (char *)j->slopes.postscale + skip};
}

static const double *known_row(const job *j, int row) {
    return (j->backward ? j->seen : j->saved) + row * j->p->channels;
}

static fbn_channels known_at(const job *j, int64_t c) {
    return (fbn_channels){known_row(j, FBN_MEAN) + c, known_row(j, FBN_MEAN_LOW) + c, known_row(j, FBN_INV_STD) + c,
                          known_row(j, FBN_GAMMA) + c, known_row(j, FBN_BETA) + c};
}

static void set_lines(job *j, int64_t c0, int64_t c1) {
    const fbn_channels known = known_at(j, c0);
    const fbn_line line = line_at(j, c0);
    j->kernels->set_line(&known, c1 - c0, &line);
}

/* Repeats the first channels' constants behind the last's, for runs of rows. Whoever has channel 0 has all of them. */
static void wrap(job *j, int64_t c0, int64_t c1) {
    void *const *arrays = j->arrays;
    if (!j->plan.rows || c0 || c0 == c1 || j->plan.units < 2) return;
    for (int i = 0; i < CHANNEL_ARRAYS; i++)
        for (int64_t k = 0; k < FBN_CHANNEL_PAD; k++) {
            const int64_t to = (j->p->channels + k) * j->plan.real, from = k % j->p->channels * j->plan.real;
            memcpy((char *)arrays[i] + to, (char *)arrays[i] + from, (size_t)j->plan.real);
        }
}

/* Adds the segments' sums up in order, into the first segment's place. */
static void total(job *j, int64_t c0, int64_t c1) {
    double *first = j->partial, *second = j->partial + j->plan.padded;
    for (int64_t s = 1; s < j->plan.segments; s++) {
        const double *more = j->partial + 2 * s * j->plan.padded;
        for (int64_t c = c0; c < c1; c++) first[c] += more[c];
        for (int64_t c = c0; c < c1; c++) second[c] += more[j->plan.padded + c];
    }
}

/* Mean and variance of the batch, from sums about the origin; the sum of squares about the mean stays in their place.
 */
static void set_moments(job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const double count = j->count;
    double *sums = j->partial, *squares = j->partial + j->plan.padded, *origin = j->origin;
    double *mean = j->saved + FBN_MEAN * C, *low = j->saved + FBN_MEAN_LOW * C, *var = j->saved + FBN_VAR * C;
    for (int64_t c = c0; c < c1; c++) {
        const double offset = sums[c] / count, m2 = squares[c] - sums[c] * offset;
        mean[c] = origin[c] + offset;
        /* What that addition rounded away (Knuth's two-sum); nothing where it was infinite. */
        const double back = mean[c] - origin[c], lost = (origin[c] - (mean[c] - back)) + (offset - back);
        low[c] = lost == lost ? lost : 0;
        squares[c] = m2 < 0 ? 0 : m2;
        var[c] = squares[c] / count;
    }
}

static void blend(void *running, const double *batch, double factor, double momentum, int64_t c0, int64_t c1,
                  fbn_dtype dtype) {
    for (int64_t c = c0; c < c1; c++)
        put(running, c, (1 - momentum) * get(running, c, dtype) + momentum * (batch[c] * factor), dtype);
}

static void update_running(const job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const fbn_running *r = j->running;
    if (!r || !r->mean) return;
    blend(r->mean, j->saved + FBN_MEAN * C, 1, r->momentum, c0, c1, j->p->dtype);
    blend(r->var, j->saved + FBN_VAR * C, j->count / (j->count - r->correction), r->momentum, c0, c1, j->p->dtype);
}

/* A row of saved, from an array of any dtype, or all `absent` where there is none. */
static void set_row(job *j, int row, const void *array, fbn_dtype dtype, double absent, int64_t c0, int64_t c1) {
    double *to = j->saved + row * j->p->channels;
    if (!array)
        for (int64_t c = c0; c < c1; c++) to[c] = absent;
    else if (dtype == FBN_F64) memcpy(to + c0, (const double *)array + c0, (size_t)(c1 - c0) * sizeof(double));
    else
        for (int64_t c = c0; c < c1; c++) to[c] = ((const float *)array)[c];
}

static void put_moments(const job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const double *rows[] = {j->saved + FBN_MEAN * C, j->saved + FBN_MEAN_LOW * C, j->partial + j->plan.padded};
    for (int row = 0; row < 3; row++)
        memcpy(j->moments_out + row * C + c0, rows[row] + c0, (size_t)(c1 - c0) * sizeof(double));
}

static void finish_forward(job *j, int64_t c0, int64_t c1) {
    const double *var = j->saved + FBN_VAR * j->p->channels;
    double *inv_std = j->saved + FBN_INV_STD * j->p->channels;
    const double eps = j->eps;
    if (j->given_mean) {
        set_row(j, FBN_MEAN, j->given_mean, j->p->dtype, 0, c0, c1);
        set_row(j, FBN_MEAN_LOW, NULL, j->p->dtype, 0, c0, c1);
        set_row(j, FBN_VAR, j->given_var, j->p->dtype, 0, c0, c1);
    } else if (!j->given) {
        total(j, c0, c1);
        set_moments(j, c0, c1);
        update_running(j, c0, c1);
    }
    if (j->moments_out) {
        put_moments(j, c0, c1);
        return;
    }
    for (int64_t c = c0; c < c1; c++) {
        const double inverse = 1 / sqrt(var[c] + eps);
        inv_std[c] = var[c] + eps == 0 ? 0 : inverse;
    }
    set_row(j, FBN_GAMMA, j->parameters->gamma, j->parameters->dtype, 1, c0, c1);
    set_row(j, FBN_BETA, j->parameters->beta, j->parameters->dtype, 0, c0, c1);
    set_lines(j, c0, c1);
}

static void finish_backward(job *j, int64_t c0, int64_t c1) {
    double *sums = j->partial, *products = j->partial + j->plan.padded;
    const double *low = known_row(j, FBN_MEAN_LOW), *inv_std = known_row(j, FBN_INV_STD);
    const int64_t C = j->p->channels;
    if (has_sums(j)) {
        total(j, c0, c1);
        for (int64_t c = c0; c < c1; c++) products[c] -= sums[c] * low[c];
    } else if (j->given_sums) {
        memcpy(sums + c0, j->given_sums + c0, (size_t)(c1 - c0) * sizeof(double));
        for (int64_t c = c0; c < c1; c++) products[c] = inv_std[c] == 0 ? 0 : j->given_sums[C + c] / inv_std[c];
    } else {
        memset(sums + c0, 0, (size_t)(c1 - c0) * sizeof(double));
        memset(products + c0, 0, (size_t)(c1 - c0) * sizeof(double));
    }
    for (int64_t c = c0; j->dgamma && c < c1; c++) put(j->dgamma, c, products[c] * inv_std[c], j->p->dtype);
    for (int64_t c = c0; j->dbeta && c < c1; c++) put(j->dbeta, c, sums[c], j->p->dtype);
    if (j->sums_out) {
        memcpy(j->sums_out + c0, sums + c0, (size_t)(c1 - c0) * sizeof(double));
        for (int64_t c = c0; c < c1; c++) j->sums_out[C + c] = products[c] * inv_std[c];
        return;
    }
    const fbn_channels known = known_at(j, c0);
    const fbn_line line = line_at(j, c0);
    const fbn_slopes slopes = slopes_at(j, c0);
    j->kernels->set_slopes(&known, sums + c0, products + c0, j->count, c1 - c0, &line, &slopes);
}

/* What is known of gamma * xhat + beta, which stands for x where backward gets y. The slope gamma * inv_std is x's. */
static void set_seen_from_y(job *j, int64_t c0, int64_t c1) {
    const int64_t C = j->p->channels;
    const double *gamma = j->of_x + FBN_GAMMA * C, *inv_std = j->of_x + FBN_INV_STD * C;
    for (int64_t c = c0; c < c1; c++) {
        j->saved[FBN_MEAN * C + c] = j->of_x[FBN_BETA * C + c];
        j->saved[FBN_MEAN_LOW * C + c] = 0;
        j->saved[FBN_INV_STD * C + c] = 1 / gamma[c];
        j->saved[FBN_GAMMA * C + c] = gamma[c] * (gamma[c] * inv_std[c]);
        j->saved[FBN_BETA * C + c] = j->of_x[FBN_BETA * C + c];
    }
}

/* What a reduction needs before it starts. */
static void prepare(job *j, int64_t c0, int64_t c1) {
    if (j->backward) {
        if (j->from_y) set_seen_from_y(j, c0, c1);
        set_lines(j, c0, c1);
        memcpy(j->origin + c0, known_row(j, FBN_MEAN) + c0, (size_t)(c1 - c0) * sizeof(double));
    } else if (has_sums(j)) set_origin(j, c0, c1);
}

static void finish(job *j, int64_t c0, int64_t c1) {
    if (j->planned) return;
    if (j->backward) finish_backward(j, c0, c1);
    else finish_forward(j, c0, c1);
    wrap(j, c0, c1);
}

/* ---- tiles ---- */

static int gradient_activation(const job *j) { return (int)j->p->activation | (j->from_y ? FBN_FROM_Y : 0); }

/* The index of a unit's first element of channel c, and the elements in it (of one channel). */
static int64_t start_of(const job *j, int64_t unit, int64_t c) {
    const int64_t plane = unit / j->plan.cuts, cut = unit % j->plan.cuts;
    return (plane * j->p->channels + c) * j->p->inner + cut * j->plan.cut;
}

static int64_t length_of(const job *j, int64_t unit) {
    return smaller(j->plan.cut, j->p->inner - unit % j->plan.cuts * j->plan.cut);
}

/* A part of the batch that a kernel takes at once: rows, or planes of `images` units. With a mask, a run of positions
 * that all count or all do not. */
typedef struct {
    int64_t unit, from; /* where it starts: a unit, and an element in it */
    int64_t rows;
    fbn_planes planes;
    int counts;
    int64_t next_unit, next_from;
} tile;

static tile tile_of_rows(const job *j, int64_t unit, int64_t last, int by_mask) {
    int64_t next = last;
    if (by_mask)
        for (next = unit + 1; next < last && j->mask[next] == j->mask[unit];) next++;
    return (tile){.unit = unit, .rows = next - unit, .counts = !by_mask || j->mask[unit], .next_unit = next};
}

static tile tile_of_masked(const job *j, int64_t unit, int64_t from) {
    const int64_t inner = j->p->inner, length = length_of(j, unit);
    const unsigned char *mask = j->mask + unit / j->plan.cuts * inner + unit % j->plan.cuts * j->plan.cut;
    int64_t to = from + 1;
    while (to < length && mask[to] == mask[from]) to++;
    const int ends = to == length;
    return (tile){.unit = unit,
                  .from = from,
                  .planes = {1, 0, 0, inner, to - from},
                  .counts = mask[from],
                  .next_unit = unit + ends,
                  .next_from = ends ? 0 : to};
}

/* At most `most` units, of one length and evenly apart. */
static tile tile_of_planes(const job *j, int64_t unit, int64_t last, int64_t most) {
    const int64_t start = start_of(j, unit, 0), length = length_of(j, unit);
    const int64_t apart = unit + 1 < last ? start_of(j, unit + 1, 0) - start : 0;
    int64_t n = 1;
    while (n < most && unit + n < last && length_of(j, unit + n) == length &&
           start_of(j, unit + n, 0) == start + n * apart)
        n++;
    return (tile){.unit = unit, .planes = {n, apart, 0, j->p->inner, length}, .counts = 1, .next_unit = unit + n};
}

static tile tile_from(const job *j, int64_t unit, int64_t from, int64_t last, int64_t most, int by_mask) {
    if (j->plan.rows) return tile_of_rows(j, unit, last, by_mask);
    return by_mask ? tile_of_masked(j, unit, from) : tile_of_planes(j, unit, last, most);
}

/* Pointers into arrays that may be absent. */
static const char *at(const char *array, int64_t bytes) { return array ? array + bytes : NULL; }
static char *at_out(char *array, int64_t bytes) { return array ? array + bytes : NULL; }

static fbn_grad_moments grad_moments_at(const job *j, int64_t start, int64_t c) {
    const int64_t skip = start * j->plan.elem;
    return (fbn_grad_moments){j->dy + skip,           j->x + skip,  at(j->residual, skip), line_at(j, c),
                              gradient_activation(j), j->origin + c};
}

/* Adds a channel's lanes, in one order everywhere. */
static double fold(double *lanes) {
    for (int n = FBN_LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

/* Adds a tile to the sums of channels [c0, c1). */
static void reduce_tile(const job *j, const tile *t, int64_t c0, int64_t c1, double *sums, double *others) {
    const int64_t start = start_of(j, t->unit, c0) + t->from, n = c1 - c0;
    const char *x = j->x + start * j->plan.elem;
    fbn_planes planes = t->planes;
    planes.channels = n;
    if (j->backward) {
        const fbn_grad_moments g = grad_moments_at(j, start, c0);
        if (j->plan.rows) j->kernels->grad_moments_cl(&g, t->rows, n, sums, others);
        else j->kernels->grad_moments_cf(&g, planes, sums);
    } else if (j->plan.rows) j->kernels->moments_cl(x, t->rows, n, j->origin + c0, sums, others);
    else j->kernels->moments_cf(x, planes, j->origin + c0, sums);
}

/* The sums of one segment. Those of planes are gathered in lanes. */
static void reduce_segment(job *j, int64_t segment, int64_t c0, int64_t c1, double *lanes) {
    const int64_t first = segment * j->plan.segment, last = smaller(first + j->plan.segment, j->plan.units);
    const int by_mask = j->mask && !j->backward;
    double *sums = j->partial + 2 * segment * j->plan.padded + c0, *others = sums + j->plan.padded;
    if (j->plan.rows) {
        const size_t bytes = (size_t)round_up(c1 - c0, FBN_CHANNEL_PAD) * sizeof(double);
        memset(sums, 0, bytes);
        memset(others, 0, bytes);
    } else memset(lanes, 0, (size_t)(c1 - c0) * 2 * FBN_LANES * sizeof(double));
    for (int64_t unit = first, from = 0; unit < last;) {
        const tile t = tile_from(j, unit, from, last, SUM_IMAGES, by_mask);
        if (t.counts) reduce_tile(j, &t, c0, c1, j->plan.rows ? sums : lanes, others);
        unit = t.next_unit;
        from = t.next_from;
    }
    for (int64_t c = 0; c < c1 - c0 && !j->plan.rows; c++, lanes += 2 * FBN_LANES) {
        sums[c] = fold(lanes);
        others[c] = fold(lanes + FBN_LANES);
    }
}

static void reduce(job *j, int64_t s0, int64_t s1, int64_t c0, int64_t c1, int thread) {
    for (int64_t s = s0; s < s1; s++)
        for (int64_t c = c0; c < c1; c += j->plan.block)
            reduce_segment(j, s, c, smaller(c + j->plan.block, c1), j->lanes + thread * lane_doubles(&j->plan));
}

static void map_tile(const job *j, const tile *t, int64_t c0, int64_t c1) {
    const int64_t start = start_of(j, t->unit, c0) + t->from, skip = start * j->plan.elem, n = c1 - c0;
    const fbn_line line = line_at(j, c0);
    fbn_planes planes = t->planes;
    planes.channels = n;
    if (j->backward) {
        const fbn_grad_affine g = {.dy = j->dy + skip,
                                   .x = j->x + skip,
                                   .residual = at(j->residual, skip),
                                   .dx = j->dx + skip,
                                   .dresidual = at_out(j->dresidual, skip),
                                   .line = line,
                                   .activation = gradient_activation(j),
                                   .slopes = slopes_at(j, c0),
                                   .frozen = j->frozen || !t->counts,
                                   .stream = j->stream};
        if (j->plan.rows) j->kernels->grad_affine_cl(&g, t->rows, n);
        else j->kernels->grad_affine_cf(&g, planes);
    } else {
        const fbn_affine a = {j->x + skip, at(j->residual, skip), j->y + skip, line, j->p->activation, j->stream};
        if (j->plan.rows) j->kernels->affine_cl(&a, t->rows, n);
        else j->kernels->affine_cf(&a, planes);
    }
}

/* Positions that do not count are mapped as if the statistics were frozen: those do not depend on them. */
static void map_units(const job *j, int64_t first, int64_t last, int64_t c0, int64_t c1) {
    const int by_mask = j->mask && j->backward && !j->frozen;
    for (int64_t unit = first, from = 0; unit < last;) {
        const tile t = tile_from(j, unit, from, last, MAP_IMAGES, by_mask);
        for (int64_t c = c0; c < c1; c += j->plan.block) map_tile(j, &t, c, smaller(c + j->plan.block, c1));
        unit = t.next_unit;
        from = t.next_from;
    }
}

/* After a reduction from the end backwards, which begins with what it has just left in the cache. */
static void map(const job *j, int64_t u0, int64_t u1, int64_t c0, int64_t c1) {
    const int64_t row = (c1 - c0) * j->plan.elem;
    const int64_t chunk = j->plan.rows ? round_up(divide_up(CHUNK_BYTES, row), FBN_STREAMS) : MAP_IMAGES;
    const int64_t chunks = divide_up(u1 - u0, chunk);
    for (int64_t k = 0; k < chunks; k++) {
        const int64_t first = u0 + (has_sums(j) ? chunks - 1 - k : k) * chunk;
        map_units(j, first, smaller(first + chunk, u1), c0, c1);
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
    if (j->plan.by_channels && has_sums(j)) {
        const int64_t blocks = divide_up(C, j->plan.block);
        for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
            const int64_t c0 = b * j->plan.block, c1 = smaller(c0 + j->plan.block, C);
            prepare(j, c0, c1);
            if (has_sums(j)) reduce(j, 0, j->plan.segments, c0, c1, (int)t);
            finish(j, c0, c1);
            if (maps(j)) map(j, 0, j->plan.units, c0, c1);
        }
        return;
    }
    const int64_t c0 = groups * t / threads * pad, c1 = smaller(groups * (t + 1) / threads * pad, C);
    prepare(j, c0, c1);
    if (has_sums(j)) {
        barrier(threads);
        reduce(j, j->plan.segments * t / threads, j->plan.segments * (t + 1) / threads, 0, C, (int)t);
        barrier(threads);
    }
    finish(j, c0, c1);
    if (!maps(j)) return;
    barrier(threads);
    map(j, j->plan.units * t / threads, j->plan.units * (t + 1) / threads, 0, C);
}

static fbn_status run(job *j) {
    if (j->p->channels == 0) return FBN_OK;
#ifdef _OPENMP
    if (j->plan.threads > 1) {
#pragma omp parallel num_threads(j->plan.threads)
        work(j, omp_get_thread_num(), omp_get_num_threads());
        return FBN_OK;
    }
#endif
    work(j, 0, 1);
    return FBN_OK;
}

/* ---- the verbs ---- */

/* Which positions count: how many, and where the first, a middle and the last of them are. */
static void set_mask(job *j, const unsigned char *mask) {
    const int64_t positions = j->p->outer * j->p->inner, inner = j->p->inner;
    int64_t first = 0, middle = j->p->outer / 2 * inner + inner / 2, last = positions - 1, count = 0;
    j->mask = mask;
    for (int64_t i = 0; mask && i < positions; i++) count += mask[i];
    if (count) {
        while (!mask[first]) first++;
        while (!mask[last]) last--;
        while (middle < last && !mask[middle]) middle++;
        middle = smaller(middle, last);
    }
    j->origins[0] = first;
    j->origins[1] = middle;
    j->origins[2] = last;
    j->count = mask ? (double)count : (double)positions;
}

static job job_of_x(const fbn_problem *problem, const void *x, const void *residual, const fbn_parameters *parameters,
                    double eps, void *y, double *saved, void *workspace) {
    static const fbn_parameters absent = {NULL, NULL, FBN_F32};
    job j = job_of(problem, residual ? 2 : 1, y, workspace);
    j.x = x;
    j.residual = residual;
    j.parameters = parameters ? parameters : &absent;
    j.eps = eps;
    j.y = y;
    if (saved) j.saved = saved;
    j.stream = streams(&j, y);
    return j;
}

fbn_status fbn_forward(const fbn_problem *problem, const void *x, const void *residual, const unsigned char *mask,
                       const fbn_parameters *parameters, double eps, const fbn_running *running, void *y, double *saved,
                       void *workspace) {
    const fbn_status status = fbn_check_forward(problem, x, residual, parameters, eps, running, y, saved, workspace);
    if (status) return status;
    job j = job_of_x(problem, x, residual, parameters, eps, y, saved, workspace);
    j.running = running;
    set_mask(&j, mask);
    if (j.count < 1 || (running && running->mean && j.count <= running->correction)) return FBN_TOO_FEW_VALUES;
    return run(&j);
}

fbn_status fbn_infer(const fbn_problem *problem, const void *x, const void *residual, const fbn_parameters *parameters,
                     double eps, const void *mean, const void *var, void *y, double *saved, void *workspace) {
    const fbn_status status = fbn_check_infer(problem, x, residual, parameters, eps, mean, var, y, saved, workspace);
    if (status) return status;
    job j = job_of_x(problem, x, residual, parameters, eps, y, saved, workspace);
    j.given = 1;
    j.given_mean = mean;
    j.given_var = var;
    return run(&j);
}

/* A plan is a label, and then the start of a workspace, with its lines set. */
typedef struct {
    const void *at;
    const fbn_kernels *kernels;
    int64_t channels, real;
} label;

static label label_of(const fbn_problem *p, const void *plan) {
    return (label){plan, p->machine->kernels, p->channels, p->dtype == FBN_F64 ? 8 : 4};
}

size_t fbn_plan_bytes(int64_t channels) {
    if (!fbn_valid_channels(channels)) return 0;
    const int64_t padded = padded_of(channels);
    return (size_t)((CHANNEL_ARRAYS + FBN_SAVED_ROWS) * padded) * sizeof(double) + ALIGNMENT + sizeof(label);
}

fbn_status fbn_plan_set(const fbn_problem *problem, const fbn_parameters *parameters, double eps, const void *mean,
                        const void *var, void *plan) {
    const fbn_status status = fbn_check_plan_set(problem, parameters, eps, mean, var, plan);
    if (status) return status;
    const label labelled = label_of(problem, plan);
    fbn_problem rows = *problem;
    rows.outer = 2; /* so that the constants are repeated */
    rows.inner = 1;
    job j = job_of_x(&rows, NULL, NULL, parameters, eps, NULL, NULL, (char *)plan + sizeof(label));
    j.given = 1;
    j.given_mean = mean;
    j.given_var = var;
    finish(&j, 0, rows.channels);
    memcpy(plan, &labelled, sizeof labelled);
    return FBN_OK;
}

fbn_status fbn_plan_run(const fbn_problem *problem, const void *x, const void *residual, void *y, const void *plan) {
    const fbn_status status = fbn_check_plan_run(problem, x, residual, y, plan);
    if (status) return status;
    const label wanted = label_of(problem, plan);
    if (memcmp(&wanted, plan, sizeof wanted) != 0) return FBN_BAD_PLAN;
    job j = job_of_x(problem, x, residual, NULL, 0, NULL, NULL, (char *)plan + sizeof(label));
    j.y = y;
    j.stream = streams(&j, y);
    j.given = 1;
    j.planned = 1;
    return run(&j);
}

fbn_status fbn_moments(const fbn_problem *problem, const void *x, const unsigned char *mask, double *moments,
                       void *workspace) {
    const fbn_status status = fbn_check_moments(problem, x, moments, workspace);
    if (status) return status;
    job j = job_of(problem, 1, NULL, workspace);
    j.x = x;
    j.moments_out = moments;
    set_mask(&j, mask);
    return j.count < 1 ? FBN_TOO_FEW_VALUES : run(&j);
}

static job job_of_dy(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                     const double *saved, int from_y, const void *dx, void *workspace) {
    job j = job_of(problem, residual && problem->activation ? 3 : 2, dx, workspace);
    j.backward = 1;
    j.dy = dy;
    j.x = x;
    j.residual = residual;
    j.of_x = saved;
    j.seen = from_y ? j.saved : saved;
    j.from_y = from_y;
    return j;
}

fbn_status fbn_backward_sums(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                             const double *saved, int from_y, double *sums, void *workspace) {
    const fbn_status status = fbn_check_backward_sums(problem, dy, x, residual, saved, from_y, sums, workspace);
    if (status) return status;
    job j = job_of_dy(problem, dy, x, residual, saved, from_y != 0, NULL, workspace);
    j.sums_out = sums;
    return run(&j);
}

fbn_status fbn_backward(const fbn_problem *problem, const void *dy, const void *x, const void *residual,
                        const double *saved, const fbn_called *called, void *dx, void *dresidual, void *dgamma,
                        void *dbeta, void *workspace) {
    const fbn_status status =
        fbn_check_backward(problem, dy, x, residual, saved, called, dx, dresidual, dgamma, dbeta, workspace);
    if (status) return status;
    job j = job_of_dy(problem, dy, x, residual, saved, called->from_y != 0, dx, workspace);
    j.mask = called->mask;
    j.count = called->count;
    j.frozen = called->frozen;
    j.given_sums = called->sums;
    j.dx = dx;
    j.dresidual = dresidual;
    j.dgamma = dgamma;
    j.dbeta = dbeta;
    j.stream = streams(&j, dx);
    return run(&j);
}

int fbn_abi_version(void) { return FBN_ABI_VERSION; }

int fbn_openmp(void) {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}
