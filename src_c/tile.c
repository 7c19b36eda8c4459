/* tile.c: which loops does a tile pass through, and what do they get? The steps that read values: sums and maps. */
#include "mixed.h"

static const char *at(const void *array, int64_t bytes) { return array ? (const char *)array + bytes : NULL; }

static int64_t bytes_to(const fbn_job *j, const fbn_tile *t, int64_t c) {
    return (fbn_start(&j->split, t->unit, c) + t->from) * j->split.elem;
}

static fbn_planes planes_of(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    fbn_planes planes = t->planes;
    planes.channels = panel->c1 - panel->c0;
    planes.by_image = !j->split.by_channels && j->split.cuts == 1; /* several cuts of a plane follow each other */
    if (panel->dz) {
        planes.dz_apart = j->split.inner;
        planes.dz_step = j->split.outer * j->split.inner;
    }
    return planes;
}

/* Where a tile's dz is kept, or NULL. */
static char *dz_of(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    if (panel->dz) return panel->dz + t->unit * j->split.inner * j->split.elem;
    return j->dz ? j->dz + bytes_to(j, t, panel->c0) : NULL;
}

/* Whether the result is written around the cache. One that replaces an input, or a dz that was kept there, is not,
 * however large: its cache lines have been read anyway. */
static int is_written_around(const fbn_job *j) {
    return j->split.around && j->result != j->x && j->result != j->dy && j->result != j->dz;
}

static fbn_operands operands_of(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    const int64_t skip = bytes_to(j, t, panel->c0);
    return (fbn_operands){.x = j->x + skip,
                          .dy = at(j->dy, skip),
                          .residual = at(j->residual, skip),
                          .constants = panel->constants,
                          .origin = panel->origin,
                          .slope = j->p->slope,
                          .activation = j->activation | (t->counts || !j->dy ? 0 : panel->outside),
                          .usual = panel->usual,
                          .exact = panel->exact,
                          .stream = is_written_around(j),
                          .inner = j->split.inner,
                          .walk = j->split.walk};
}

/* ---- sums ---- */

/* How many groups of rows a loop gets at once. Those of short rows are as many as stay in the nearest cache, so that it
 * loads and stores the sums of some columns once for all of them. */
static int64_t groups_of(const fbn_job *j, const fbn_operands *o, int64_t rows, int64_t length) {
    enum { SHORT_ROW = 192, IN_CACHE = 8192 }; /* bytes */
    const int64_t bytes = length * j->split.elem;
    const int is_plain = !o->dy || o->activation == FBN_IDENTITY;
    return j->sums->adds_groups && is_plain && bytes <= SHORT_ROW ? IN_CACHE / (rows * bytes) : 1;
}

/* Small planes are runs of the panel's columns. Rows are runs of `repeat` rows that are joined, and what is left. */
static void sum_columns(const fbn_job *j, fbn_loop *loop, int64_t rows, const fbn_operands *operands, const fbn_tile *t,
                        const fbn_panel *panel, double *sums, double *others) {
    fbn_operands o = *operands;
    const int64_t step = fbn_columns(&j->split, j->split.channels), repeat = j->split.repeat, runs = t->rows / repeat;
    const int64_t skip = runs * step * j->split.elem, rest = t->rows % repeat * j->split.channels;
    const int64_t length = fbn_columns(&j->split, panel->c1 - panel->c0), groups = groups_of(j, &o, rows, length);
    fbn_sum_runs(loop, &o, rows, groups, (fbn_runs){runs, step, length, 0, 0}, sums, others);
    if (rest == 0) return;
    o.x = at(o.x, skip);
    o.dy = at(o.dy, skip);
    o.residual = at(o.residual, skip);
    o.dz = o.dz ? (char *)o.dz + skip : NULL;
    fbn_sum_runs(loop, &o, rows, 1, (fbn_runs){1, rest, rest, 0, 0}, sums, others);
}

/* The units of a tile are images. */
static void sum_stacks(const fbn_split *s, fbn_loop *loop, const fbn_operands *o, const fbn_tile *t,
                       const fbn_panel *panel, double *lanes) {
    loop(o, &(fbn_stretch){.n = s->inner,
                           .channels = panel->c1 - panel->c0,
                           .rows = t->rows,
                           .apart = s->channels * s->inner,
                           .sums = lanes,
                           .others = lanes + FBN_LANES});
}

/* The part of a mixed tile whose places count, or do not. Where these follow each other, it is a tile that needs no
 * gathering. Otherwise it is gathered to rows or a plane of its own. */
static fbn_tile part_of(const fbn_job *j, const fbn_tile *t, int counts, const fbn_places *places) {
    const int64_t n = places->count[counts], first = n ? places->at[counts][0] : 0;
    fbn_tile part = *t;
    part.counts = counts;
    part.rows = part.planes.inner = n;
    part.mixed = n && places->at[counts][n - 1] - first > n - 1;
    if (part.mixed) return part;
    if (j->split.rows) part.unit += first;
    else part.from += first;
    return part;
}

static void find_places(const fbn_split *s, const fbn_tile *t, const unsigned char *mask, fbn_places *places) {
    fbn_find_places(mask + fbn_position(s, t->unit, t->from), s->rows ? t->rows : t->planes.inner, places);
}

/* How often a mixed tile is gathered: once a channel, or once. */
static int64_t times_of(const fbn_split *s, const fbn_panel *panel) { return s->rows ? 1 : panel->c1 - panel->c0; }

/* Adds a mixed tile: what does not count only to the sums of a gradient. */
FBN_APART void sum_mixed(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel, fbn_loop *of_plane,
                         fbn_loop *of_columns, int64_t rows, double *sums, double *others) {
    const fbn_split *s = &j->split;
    fbn_places places;
    fbn_gathered room;
    find_places(s, t, j->reduce_mask, &places);
    for (int counts = j->dy ? 0 : 1; counts < 2; counts++) {
        const fbn_tile part = part_of(j, t, counts, &places);
        if (!part.mixed) {
            if (part.rows) j->operation->reduce(j, &part, panel, sums, others);
            continue;
        }
        const fbn_operands o = operands_of(j, &part, panel), own = fbn_gathered_operands(&o, &room);
        for (int64_t c = 0; c < times_of(s, panel); c++) {
            double *lanes = sums + c * 2 * FBN_LANES;
            const fbn_stretch plane = {
                .n = part.rows, .c = c, .rows = 1, .sums = lanes, .others = lanes + FBN_LANES, .whole = 1};
            fbn_gather(&o, c * s->inner, s->elem, fbn_width(s), places.at[counts], part.rows, &room);
            if (s->rows) sum_columns(j, of_columns, rows, &own, &part, panel, sums, others);
            else of_plane(&own, &plane);
        }
    }
}

void fbn_reduce_moments(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel, double *sums, double *others) {
    const fbn_operands o = operands_of(j, t, panel);
    const fbn_dtype_kernels *k = j->sums;
    if (t->mixed) sum_mixed(j, t, panel, k->moments_plane, k->moments_columns, FBN_ROWS, sums, others);
    if (t->mixed || !t->counts) return;
    if (j->split.stacks) sum_stacks(&j->split, k->moments_stack, &o, t, panel, sums);
    else if (j->split.columns) sum_columns(j, k->moments_columns, FBN_ROWS, &o, t, panel, sums, others);
    else fbn_sum_planes(k->moments_plane, &o, j->split.elem, planes_of(j, t, panel), sums);
}

/* With an activation more is computed than converted, for which the longest vectors are best. */
void fbn_reduce_gradient(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel, double *sums, double *others) {
    fbn_operands o = operands_of(j, t, panel);
    o.dz = dz_of(j, t, panel);
    const fbn_dtype_kernels *k = (j->activation & FBN_WHICH) ? j->kernels : j->sums;
    if (t->mixed) sum_mixed(j, t, panel, k->grad_moments_plane, k->grad_moments_columns, FBN_GRAD_ROWS, sums, others);
    else if (j->split.stacks) sum_stacks(&j->split, k->grad_moments_stack, &o, t, panel, sums);
    else if (j->split.columns) sum_columns(j, k->grad_moments_columns, FBN_GRAD_ROWS, &o, t, panel, sums, others);
    else fbn_sum_planes(k->grad_moments_plane, &o, j->split.elem, planes_of(j, t, panel), sums);
}

/* ---- maps ---- */

/* A tile's stretches of memory, in which images recur. */
static fbn_runs stretches_of(const fbn_split *s, const fbn_tile *t) {
    const int64_t image = s->channels * s->inner, start = t->unit * s->cut, end = t->next_unit * s->cut;
    const int64_t all = s->outer * image;
    return (fbn_runs){1, 0, (end < all ? end : all) - start, image, start % image};
}

/* Whether y of rows in the cache is mapped row by row, though a panel has all channels. Rows that are not whole vectors
 * are: they can be taken in pairs, and the constants of a vector lie in one cache line. Joined rows, and those that are
 * shorter than a vector, are faster as one run. */
static int are_apart(const fbn_split *s, const fbn_operands *o) {
    const int ragged = s->channels > FBN_CHANNEL_PAD && s->channels % FBN_CHANNEL_PAD;
    return s->rows && s->repeat == 1 && ragged && !s->around && !o->dy;
}

/* The columns of a tile: one run, in which they recur, or a run for each row or image. */
static fbn_runs columns_of(const fbn_split *s, const fbn_operands *o, const fbn_tile *t, const fbn_panel *panel) {
    const int64_t channels = panel->c1 - panel->c0, columns = channels * s->inner;
    if (channels == s->channels && !are_apart(s, o))
        return (fbn_runs){1, 0, t->rows * columns, columns * s->map_repeat, 0};
    return (fbn_runs){t->rows, s->channels * s->inner, columns, columns, 0};
}

static void map_by(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel, fbn_loop *of_planes, fbn_loop *of_runs,
                   const fbn_operands *o) {
    const fbn_split *s = &j->split;
    if (s->stretches) fbn_map_runs(of_runs, o, s->elem, stretches_of(s, t));
    else if (s->columns) fbn_map_runs(of_runs, o, s->elem, columns_of(s, o, t, panel));
    else fbn_map_planes(of_planes, o, s->elem, planes_of(j, t, panel));
    if (o->stream) j->kernels->fence();
}

void fbn_map_affine(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    const fbn_dtype_kernels *k = j->kernels;
    fbn_operands o = operands_of(j, t, panel);
    o.out = j->result + bytes_to(j, t, panel->c0);
    map_by(j, t, panel, k->affine_planes, j->split.joins ? k->affine_planes : k->affine_columns, &o);
}

FBN_APART void map_mixed_gradient(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    const fbn_split *s = &j->split;
    const fbn_dtype_kernels *k = j->kernels;
    const int64_t width = fbn_width(s);
    fbn_places places;
    fbn_gathered room;
    find_places(s, t, j->map_mask, &places);
    for (int counts = 0; counts < 2; counts++) {
        const fbn_tile part = part_of(j, t, counts, &places);
        const uint16_t *at = places.at[counts];
        if (!part.mixed) {
            if (part.rows) fbn_map_gradient(j, &part, panel);
            continue;
        }
        fbn_operands o = operands_of(j, &part, panel);
        o.frozen = j->frozen || !counts;
        const fbn_operands own = fbn_gathered_operands(&o, &room);
        for (int64_t c = 0; c < times_of(s, panel); c++) {
            const int64_t skip = bytes_to(j, t, panel->c0 + c);
            fbn_gather(&o, c * s->inner, s->elem, width, at, part.rows, &room);
            if (s->rows) fbn_map_runs(k->grad_affine_columns, &own, s->elem, columns_of(s, &own, &part, panel));
            else k->grad_affine_planes(&own, &(fbn_stretch){.n = part.rows, .c = c, .rows = 1});
            fbn_scatter(own.out, width, at, part.rows, j->result + skip);
            if (j->dresidual && own.residual && own.activation & FBN_WHICH)
                fbn_scatter(own.dresidual, width, at, part.rows, j->dresidual + skip);
        }
    }
}

/* Positions that do not count are mapped as with frozen statistics, since the statistics do not depend on them. */
void fbn_map_gradient(const fbn_job *j, const fbn_tile *t, const fbn_panel *panel) {
    if (t->mixed) {
        map_mixed_gradient(j, t, panel);
        return;
    }
    const int64_t skip = bytes_to(j, t, panel->c0);
    fbn_operands o = operands_of(j, t, panel);
    o.out = j->result + skip;
    o.dresidual = j->dresidual ? j->dresidual + skip : NULL;
    o.frozen = j->frozen || !t->counts;
    o.dz = dz_of(j, t, panel);
    if (o.dz) {
        o.dy = o.dz;
        o.residual = NULL;
        o.dresidual = NULL;
        o.activation = FBN_IDENTITY;
    }
    const fbn_dtype_kernels *k = j->kernels;
    map_by(j, t, panel, k->grad_affine_planes, j->split.joins ? k->grad_affine_planes : k->grad_affine_columns, &o);
}
