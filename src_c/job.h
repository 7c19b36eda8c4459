/* job.h: one call on its way: what it works on, where its workspace is cut, and which operation it is.
 *
 * An operation prepares (what the reduction must know of a channel), reduces (sums over each channel), finishes (a
 * channel's constants from its sums) and maps (y or dx from the constants). A step that it has no need of is NULL.
 * verbs.c fills a job, run.c carries it out, and finish.c has the steps that are done once a channel.
 */
#ifndef FBN_JOB_H
#define FBN_JOB_H

#include "split.h"

typedef struct fbn_job fbn_job;

/* What is done once for each of the channels [c0, c1). */
typedef void fbn_of_channels(fbn_job *job, int64_t c0, int64_t c1);

/* Adds a tile to the sums of channels [c0, c1): rows to `sums` and `others`, planes to lanes, which `sums` then is. */
typedef void fbn_of_sums(const fbn_job *job, const fbn_tile *tile, int64_t c0, int64_t c1, double *sums,
                         double *others);

/* Fills what a tile has of the channels [c0, c1). */
typedef void fbn_of_results(const fbn_job *job, const fbn_tile *tile, int64_t c0, int64_t c1);

typedef struct {
    fbn_of_channels *prepare;
    fbn_of_sums *reduce;
    fbn_of_channels *finish;
    fbn_of_results *map;
} fbn_operation;

/* The constants of a channel: five of the line, four of the gradient. */
enum { FBN_CONSTANTS = 9 };

struct fbn_job {
    const fbn_problem *p;
    const fbn_operation *operation;
    const fbn_dtype_kernels *kernels;
    fbn_split split;

    /* Memory of all positions. */
    const char *x, *residual, *dy;
    char *result, *dresidual;                    /* what the map fills: y or dx, and the residual's gradient */
    const unsigned char *reduce_mask, *map_mask; /* NULL where all positions are treated alike */
    int activation, stream;                      /* with FBN_FROM_Y where x holds y; writes around the cache */

    /* What is known of each channel. */
    fbn_parameters parameters;
    fbn_statistics statistics;
    fbn_running running;
    double eps, count;        /* values per channel that the statistics come from */
    int64_t origins[3];       /* positions whose values the origin is taken from */
    const double *given_sums; /* (2, channels) */
    const double *of_x;       /* the rows of a forward call, of x itself */
    double *saved;            /* rows that this call fills */
    const double *known;      /* rows that describe what `x` holds */

    /* What is computed for each channel, in the workspace; `arrays` are of the compute type. */
    double *origin;          /* what the sums are about: a value of x, or the mean */
    double *partial, *lanes; /* the segments' sums; the lanes of each thread */
    void *arrays[FBN_CONSTANTS];
    fbn_line line;
    fbn_slopes slopes;

    /* Results of each channel; NULL where nobody asked. */
    double *moments_out, *sums_out;
    void *dgamma, *dbeta;
};

/* The first two rows of `partial`: where the sums of all segments are when a channel is finished. */
static inline double *fbn_first_sums(const fbn_job *j) { return j->partial; }
static inline double *fbn_second_sums(const fbn_job *j) { return j->partial + j->split.padded; }

/* The constants from channel c on. */
fbn_line fbn_line_at(const fbn_job *job, int64_t c);
fbn_slopes fbn_slopes_at(const fbn_job *job, int64_t c);

/* finish.c: the steps of each operation that are done once a channel. */
fbn_of_channels fbn_set_origins, fbn_set_lines_known, fbn_set_lines_from_y;
fbn_of_channels fbn_finish_batch, fbn_finish_statistics, fbn_finish_applied, fbn_finish_moments;
fbn_of_channels fbn_finish_gradient, fbn_finish_given_sums, fbn_finish_no_sums, fbn_finish_sums;

/* run.c: carries out the operation. */
void fbn_run(fbn_job *job);

#endif
