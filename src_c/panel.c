/* panel.c: how do kernels get the channels of a panel, and what becomes of its sums?
 *
 * Planes and rows use the constants of the channels themselves. Where several rows are joined, finish.c has repeated
 * the constants for each of them. The columns of small planes need each channel's constants once per element of a
 * plane: they are spread for one panel at a time, so that they stay in the nearest cache, unless whole images are one.
 */
#include <math.h>
#include <string.h>

#include "job.h"

static int spreads(const fbn_split *s) { return s->columns && !s->rows; }

/* ---- constants ---- */

fbn_constants fbn_constants_at(const fbn_job *j, int64_t c) {
    fbn_constants at;
    for (int i = 0; i < FBN_CONSTANTS; i++) at.of[i] = (char *)j->constants.of[i] + c * j->split.real;
    return at;
}

/* Whether n constants from channel c on are all of this value. */
static int all_are(const fbn_job *j, int which, int64_t c, int64_t n, double value) {
    const void *array = j->constants.of[which];
    const float narrow = (float)value;
    int others = 0;
    if (j->split.real == 8)
        for (int64_t i = c; i < c + n; i++) others |= ((const double *)array)[i] != value;
    else
        for (int64_t i = c; i < c + n; i++) others |= ((const float *)array)[i] != narrow;
    return others == 0;
}

/* Writes n values of `size` bytes again behind themselves, until there are `all`. */
static void recur(char *values, int64_t n, int64_t all, int64_t size) {
    for (int64_t to = n; to < all; to *= 2) /* `to` is n times a power of two, so the copy goes on where it stops */
        memcpy(values + to * size, values, (size_t)((2 * to < all ? to : all - to) * size));
}

/* Spreads the constants of a panel, up to `last`, over the columns of so many joined images, in `room`, without those
 * that are not read. The first of them recur for vectors that reach into the next image. */
static void spread(const fbn_job *j, fbn_panel *panel, int last, int64_t images, void *room) {
    const int64_t columns = fbn_columns(&j->split, panel->c1 - panel->c0), joined = columns * images;
    char *next = room;
    for (int i = j->kernels->first_constant; i < last; i++) {
        if (panel->usual && (i == FBN_PRESCALE || i == FBN_POSTSCALE)) continue;
        if (panel->exact && i == FBN_SHIFT_LOW) continue;
        j->kernels->spread(panel->constants.of[i], panel->c1 - panel->c0, j->split.inner, next);
        recur(next, columns, joined + FBN_CHANNEL_PAD, j->split.real);
        panel->constants.of[i] = next;
        next += (fbn_padded(joined) - FBN_CHANNEL_PAD) * j->split.real;
    }
}

/* Repeats the constants [first, last), or where first is negative the origins, of the channels [c0, c1) for each of the
 * rows that are joined, and for vectors that reach into the next row. */
void fbn_repeat_columns(fbn_job *j, int64_t c0, int64_t c1, int first, int last) {
    const int64_t C = j->split.channels, columns = C * j->split.repeat + FBN_CHANNEL_PAD;
    if (!j->split.rows || j->split.units < 2 || C == 0) return;
    for (int i = first; i < last; i++) {
        const int64_t size = i < 0 ? (int64_t)sizeof(double) : j->split.real;
        char *array = i < 0 ? (char *)j->origin : j->constants.of[i];
        for (int64_t to = C; to + c0 < columns; to += C) {
            const int64_t n = to + c1 < columns ? c1 - c0 : columns - to - c0;
            memcpy(array + (to + c0) * size, array + c0 * size, (size_t)(n * size));
        }
    }
}

/* ---- panels ---- */

/* The sums of moments need no constants, and those of a gradient only with an activation. */
fbn_panel fbn_panel_to_sum(const fbn_job *j, int64_t c0, int64_t c1, double *lanes, void *room) {
    fbn_panel panel = {c0, c1, fbn_constants_at(j, c0), j->origin + c0, .usual = 1};
    if (j->dy && j->activation) panel.usual = all_are(j, FBN_PRESCALE, c0, c1 - c0, 1);
    if (!spreads(&j->split) || j->split.stacks) return panel;
    double *origin = lanes + 2 * fbn_padded(fbn_columns(&j->split, j->split.panel));
    j->p->machine->kernels->of[FBN_F64]->spread(panel.origin, c1 - c0, j->split.inner, origin);
    panel.origin = origin;
    if (j->dy && j->activation) spread(j, &panel, FBN_CONSTANTS_OF_Y, 1, room);
    return panel;
}

/* Whether on_dy of n channels is finite: without an activation, dx is then 0 where dy is 0, whatever x is. */
static int keeps_zeros(const fbn_job *j, int64_t c, int64_t n) {
    const double *wide = j->constants.of[FBN_ON_DY];
    const float *narrow = j->constants.of[FBN_ON_DY];
    int others = 0;
    for (int64_t i = c; i < c + n; i++)
        others |= !(j->split.real == 8 ? fabs(wide[i]) <= DBL_MAX : fabsf(narrow[i]) <= FLT_MAX);
    return !others;
}

fbn_panel fbn_panel_to_map(const fbn_job *j, int64_t c0, int64_t c1, void *room) {
    const int backward = j->dy != NULL, last = backward ? FBN_CONSTANTS : FBN_CONSTANTS_OF_Y;
    fbn_panel panel = {c0, c1, fbn_constants_at(j, c0), NULL, .usual = 1};
    panel.usual = all_are(j, FBN_PRESCALE, c0, c1 - c0, 1);
    if (backward) panel.usual &= all_are(j, FBN_POSTSCALE, c0, c1 - c0, 1);
    else panel.exact = !j->residual && all_are(j, FBN_SHIFT_LOW, c0, c1 - c0, 0);
    if (j->map_mask && ((j->activation & FBN_WHICH) || !panel.usual || !keeps_zeros(j, c0, c1 - c0)))
        panel.outside = FBN_OUTSIDE;
    if (spreads(&j->split) && !j->split.joins) spread(j, &panel, last, j->split.map_repeat, room);
    return panel;
}

/* ---- sums ---- */

/* Whether all n numbers are finite. */
static int are_finite(const double *numbers, int64_t n) {
    int others = 0;
    for (int64_t i = 0; i < n; i++) others |= !(fabs(numbers[i]) <= DBL_MAX);
    return !others;
}

/* Adds up the columns of joined rows, in order. Those of a few channels are added in registers, since in memory each
 * sum would wait until the one before it is stored. */
static void fold_rows(const double *columns, int64_t channels, int64_t rows, double *sums) {
    enum { FEW = 8 };
    double few[FEW];
    if (channels < FEW) {
        for (int64_t k = 0; k < FEW; k++) few[k] = columns[k]; /* what is behind the last channel is not used */
        for (int64_t r = 1; r < rows; r++)
            for (int64_t k = 0; k < FEW; k++) few[k] += columns[r * channels + k];
        for (int64_t c = 0; c < channels; c++) sums[c] = few[c];
        return;
    }
    memcpy(sums, columns, (size_t)channels * sizeof(double));
    for (int64_t r = 1; r < rows; r++)
        for (int64_t c = 0; c < channels; c++) sums[c] += columns[r * channels + c];
}

/* Adds all tiles of a segment to the sums of a panel, which are 0 before. */
static void add_tiles(const fbn_job *j, int64_t segment, const fbn_panel *panel, double *sums, double *others) {
    const int64_t first = segment * j->split.segment, end = first + j->split.segment;
    const int64_t last = end < j->split.units ? end : j->split.units;
    for (int64_t unit = first, from = 0; unit < last;) {
        const fbn_tile t = fbn_tile_at(&j->split, unit, from, last, j->reduce_mask);
        j->operation->reduce(j, &t, panel, sums, others);
        unit = t.next_unit;
        from = t.next_from;
    }
}

/* The sums of one segment, which are those of a panel's lanes or columns, added up. */
static void reduce_panel(const fbn_job *j, int64_t segment, const fbn_panel *panel, double *lanes, double *sums,
                         double *others) {
    const int64_t n = panel->c1 - panel->c0, columns = fbn_columns(&j->split, n);
    if (!j->split.columns || j->split.stacks) {
        memset(lanes, 0, (size_t)n * 2 * FBN_LANES * sizeof(double));
        add_tiles(j, segment, panel, lanes, NULL);
        j->kernels->fold(lanes, FBN_LANES, 2 * FBN_LANES, n, sums);
        j->kernels->fold(lanes + FBN_LANES, FBN_LANES, 2 * FBN_LANES, n, others);
        return;
    }
    const int direct = columns == n;
    double *first = direct ? sums : lanes, *second = direct ? others : lanes + fbn_padded(columns);
    memset(first, 0, (size_t)(fbn_padded(columns) - 2 * FBN_CHANNEL_PAD) * sizeof(double));
    memset(second, 0, (size_t)(fbn_padded(columns) - 2 * FBN_CHANNEL_PAD) * sizeof(double));
    add_tiles(j, segment, panel, first, second);
    if (direct) return;
    if (j->split.rows) {
        fold_rows(first, n, j->split.repeat, sums);
        fold_rows(second, n, j->split.repeat, others);
        return;
    }
    j->kernels->fold(first, j->split.inner, j->split.inner, n, sums);
    j->kernels->fold(second, j->split.inner, j->split.inner, n, others);
}

/* Where dy is 0, a finite x adds nothing in any loop, and others make a sum NaN. Loops that ask whether dy is 0 take up
 * to three times as long, so they come only then. */
void fbn_reduce_panel(const fbn_job *j, int64_t segment, const fbn_panel *panel, double *lanes) {
    double *sums = j->partial + 2 * segment * j->split.padded + panel->c0, *others = sums + j->split.padded;
    const int64_t n = panel->c1 - panel->c0;
    reduce_panel(j, segment, panel, lanes, sums, others);
    if (!j->dy || !j->reduce_mask || (are_finite(sums, n) && are_finite(others, n))) return;
    fbn_panel again = *panel;
    again.outside = FBN_OUTSIDE;
    reduce_panel(j, segment, &again, lanes, sums, others);
}
