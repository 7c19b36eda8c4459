/* job.h: what does one call work on? Its arrays, how they are split, the parts of its workspace, and its operation.
 *
 * An operation has four steps: prepare (what the reduction needs to know about a channel), reduce (the sums of each
 * channel), finish (the constants of a channel, from its sums) and map (y or dx, from the constants). A step that an
 * operation does not need is NULL. verbs.c fills a job in and run.c carries it out; finish.c has the steps that are
 * done once per channel, and tile.c those that read values.
 */
#ifndef FBN_JOB_H
#define FBN_JOB_H

#include "split.h"

typedef struct fbn_job fbn_job;

/* A step that is done once per channel, for the channels [c0, c1). */
typedef void fbn_of_channels(fbn_job *job, int64_t c0, int64_t c1);

/* The channels [c0, c1), which kernels get at once, and what is known about them or their columns. */
typedef struct {
    int64_t c0, c1;
    fbn_constants constants;
    const double *origin;
    int usual, exact; /* as in fbn_operands */
    int outside;      /* FBN_OUTSIDE if positions that do not count take loops that ask whether dy is 0 */
    char *dz;         /* the thread's block in which dz is kept for the map; NULL if there is none */
} fbn_panel;

/* Adds a tile to the sums of a panel. Columns are added to `sums` and `others`, planes to the lanes in `sums`. */
typedef void fbn_of_sums(const fbn_job *job, const fbn_tile *tile, const fbn_panel *panel, double *sums,
                         double *others);

/* Fills the part of the result that a tile of a panel covers. */
typedef void fbn_of_results(const fbn_job *job, const fbn_tile *tile, const fbn_panel *panel);

typedef struct {
    fbn_of_channels *prepare;
    fbn_of_sums *reduce;
    fbn_of_channels *finish;
    fbn_of_results *map;
} fbn_operation;

struct fbn_job {
    const fbn_problem *p;
    const fbn_operation *operation;
    const fbn_dtype_kernels *kernels, *sums; /* `sums` has the loops of sums */
    fbn_split split;

    /* The large arrays. */
    const char *x, *residual, *dy;
    char *result, *dresidual;                    /* what the map fills: y or dx, and the residual's gradient */
    char *dz;                                    /* where the sums leave dz for the map; NULL if they do not ... */
    char *dz_blocks;                             /* ... or do so in blocks, one for each thread */
    const unsigned char *reduce_mask, *map_mask; /* NULL where all positions are treated alike */
    int activation;                              /* with the flag FBN_FROM_Y where `x` holds y */
    int frozen;                                  /* whether x has no effect on the statistics */

    /* What is known about each channel. */
    fbn_parameters parameters;
    fbn_statistics statistics;
    fbn_running running;
    double eps, count;        /* `count` values per channel made the statistics */
    int64_t origins[3];       /* positions whose values give the origin */
    const double *given_sums; /* (2, channels) */
    const double *of_x;       /* the rows that a forward call saved, which describe x */
    double *saved;            /* the rows that this call fills */
    const double *known;      /* the rows that describe what `x` holds */

    /* What is computed for each channel, in the workspace. */
    double *origin;          /* what the sums subtract from x: one of its values, or the mean */
    double *partial, *lanes; /* the sums of each segment; the lanes of each thread */
    fbn_constants constants;

    /* The results per channel; NULL where the caller did not ask for them. */
    double *moments_out, *sums_out;
    void *dgamma, *dbeta;
};

/* The first two rows of `partial`, which hold the sums of all segments once these have been added up. */
static inline double *fbn_first_sums(const fbn_job *j) { return j->partial; }
static inline double *fbn_second_sums(const fbn_job *j) { return j->partial + j->split.padded; }

/* The constants from channel c on. */
fbn_constants fbn_constants_at(const fbn_job *job, int64_t c);

/* panel.c: channels as kernels get them. `room` is for the constants of small planes' columns. It has FBN_ROOM bytes,
 * or fbn_room_doubles numbers. */
enum { FBN_ROOM = FBN_CONSTANTS * (FBN_COLUMN_BYTES + FBN_CHANNEL_PAD * (int)sizeof(double)) };
_Static_assert(FBN_CONSTANTS_OF_Y *(FBN_PLANNED_BYTES + 2 * FBN_CHANNEL_PAD * (int)sizeof(double)) <= FBN_ROOM,
               "a plan needs room for whole images");
fbn_panel fbn_panel_to_sum(const fbn_job *job, int64_t c0, int64_t c1, double *lanes, void *room);
fbn_panel fbn_panel_to_map(const fbn_job *job, int64_t c0, int64_t c1, void *room);
void fbn_reduce_panel(const fbn_job *job, int64_t segment, const fbn_panel *panel, double *lanes);
void fbn_repeat_columns(fbn_job *job, int64_t c0, int64_t c1, int first, int last);

/* tile.c: the steps that are done on each tile of a panel. */
fbn_of_sums fbn_reduce_moments, fbn_reduce_gradient;
fbn_of_results fbn_map_affine, fbn_map_gradient;

/* finish.c: the steps that are done once per channel. */
fbn_of_channels fbn_set_origins, fbn_set_lines_known, fbn_set_lines_from_y;
fbn_of_channels fbn_finish_batch, fbn_finish_statistics, fbn_finish_applied, fbn_finish_moments;
fbn_of_channels fbn_finish_gradient, fbn_finish_given_sums, fbn_finish_known_sums, fbn_finish_sums;

/* run.c: carries the operation out. */
void fbn_run(fbn_job *job);

#endif
