/* verbs.c: how does a call of the API become a job? The operations, as tables of steps, and what each verb fills in. */
#include <string.h>

#include "check.h"
#include "job.h"

enum { ALIGNMENT = 64 };

/* ---- the operations: prepare, reduce, finish, map ---- */

static const fbn_operation FORWARD = {fbn_set_origins, fbn_reduce_moments, fbn_finish_batch, fbn_map_affine};
static const fbn_operation INFER = {NULL, NULL, fbn_finish_statistics, fbn_map_affine};
static const fbn_operation APPLY = {NULL, NULL, fbn_finish_applied, fbn_map_affine};
static const fbn_operation PLAN_RUN = {NULL, NULL, NULL, fbn_map_affine};
static const fbn_operation MOMENTS = {fbn_set_origins, fbn_reduce_moments, fbn_finish_moments, NULL};

/* The gradient's sums are given, or the call computes them, or frozen statistics take them for 0. */
static fbn_operation backward_of(const fbn_backward_args *a) {
    const int needed = !a->frozen || a->dgamma || a->dbeta;
    return (fbn_operation){.prepare = a->from_y ? fbn_set_lines_from_y : fbn_set_lines_known,
                           .reduce = needed && !a->sums ? fbn_reduce_gradient : NULL,
                           .finish = a->sums  ? fbn_finish_given_sums
                                     : needed ? fbn_finish_gradient
                                              : fbn_finish_known_sums,
                           .map = fbn_map_gradient};
}

static fbn_operation sums_of(const fbn_sums_args *a) {
    return (fbn_operation){.prepare = a->from_y ? fbn_set_lines_from_y : fbn_set_lines_known,
                           .reduce = fbn_reduce_gradient,
                           .finish = fbn_finish_sums};
}

/* ---- a job and its workspace ---- */

/* How many float64 numbers fit into a job's workspace, alignment aside. Arrays of the compute type get as much room. */
static int64_t doubles_of(const fbn_split *s) {
    const int64_t rows = FBN_SAVED_ROWS + 2 * s->segments, arrays = FBN_CONSTANTS + 1;
    return rows * s->padded + arrays * s->joined + s->threads * fbn_lane_doubles(s);
}

/* The arrays that a block of a gradient holds: x, dy, and the residual or a costly dz. */
static int arrays_of(const fbn_problem *p, int has_residual) {
    return p->activation && (has_residual || fbn_is_costly(p)) ? 3 : 2;
}

/* The bytes of the blocks of dz, one for each thread; 0 where dz is not kept in blocks. Whole planes alone have such
 * blocks, since dz_of and planes_of say where it lies, and only where x, dy and dz of a block fit into the shared
 * cache.
 */
static int64_t bytes_of_blocks(const fbn_problem *p, const fbn_split *s) {
    if (!fbn_is_costly(p) || s->elem < 4 || !s->around || !s->by_channels || s->columns || s->cuts > 1) return 0;
    const int64_t block = fbn_block_bytes(s, s->block);
    return block <= p->machine->shared_cache / 6 ? s->threads * block : 0;
}

static int64_t most_bytes_of_blocks(const fbn_problem *p) {
    if (!fbn_is_costly(p)) return 0;
    const fbn_split s = fbn_split_of(p, arrays_of(p, 0), FBN_REDUCES);
    return bytes_of_blocks(p, &s);
}

/* The bytes of so many doubles, and `more` bytes; 0 where a size_t cannot hold the sum. */
static size_t bytes_of(int64_t doubles, int64_t more) {
    const uint64_t most = SIZE_MAX, others = (uint64_t)more;
    if (others > most || (uint64_t)doubles > (most - others) / sizeof(double)) return 0;
    return (size_t)doubles * sizeof(double) + (size_t)others;
}

size_t fbn_workspace_bytes(const fbn_problem *p) {
    if (fbn_check_problem(p)) return 0;
    const fbn_split s = fbn_split_of(p, 1, FBN_REDUCES);
    int64_t doubles = doubles_of(&s);
    /* Rows are cut alike whatever a call does. A single thread needs no more to map alone than to reduce first. */
    for (fbn_kind kind = s.threads > 1 ? FBN_MAPS : FBN_MASKED; !s.rows && kind <= FBN_MASKED; kind++) {
        const fbn_split other = fbn_split_of(p, 1, kind);
        const int64_t more = doubles_of(&other);
        doubles = doubles > more ? doubles : more;
    }
    return bytes_of(doubles, 2 * ALIGNMENT + most_bytes_of_blocks(p));
}

/* Whether a valid call has a workspace whose size a size_t can hold: one of 64 bits always can. */
static fbn_status if_fits(const fbn_problem *p, fbn_status status) {
    return status || sizeof(size_t) >= sizeof(int64_t) || fbn_workspace_bytes(p) ? status : FBN_BAD_SHAPE;
}

/* The bytes from one array of constants to the next, which have room for so many doubles each. About a page apart,
 * seven arrays of half a page would be in each other's way in the nearest cache (Zen 4: 1.2 of the time of a gradient
 * with an activation). Those of float32 need half of their room, and can be closer. */
static int64_t bytes_apart(const fbn_split *s, int64_t joined) {
    enum { PAGE = 4096, CLOSER = 1152 };
    const int64_t bytes = joined * (int64_t)sizeof(double), is_page = bytes > PAGE - 256 && bytes < PAGE + 512;
    return s->real == sizeof(float) && is_page ? bytes - CLOSER : bytes;
}

/* `out` is what the map will write; NULL where there is no map, or where calls share the constants. A map of rows
 * follows the alignment of `out`. The constants get the same alignment, so that those of a vector lie in one cache
 * line. A plan has room for those of joined rows, whether or not a run joins rows. */
static fbn_job job_of(const fbn_problem *p, const fbn_operation *operation, int arrays, const unsigned char *mask,
                      void *out, void *workspace) {
    fbn_job j;
    memset(&j, 0, sizeof j);
    j.p = p;
    j.operation = operation;
    j.kernels = p->machine->kernels->of[p->dtype];
    j.sums = p->machine->kernels->sums[p->dtype];
    j.split = fbn_split_of(p, arrays,
                           operation == &PLAN_RUN                                   ? FBN_PLANNED
                           : mask && !fbn_masks_images(p, mask)                     ? FBN_MASKED
                           : operation->map == fbn_map_affine && !operation->reduce ? FBN_MAPS
                                                                                    : FBN_REDUCES);
    /* Joined planes need no constants for each column, so a panel may be as large as a block, or have all channels. */
    if (j.split.joins) j.split.map_panel = j.split.by_channels ? j.split.block : p->channels;
    j.activation = (int)p->activation;
    j.result = out;
    const int64_t values = ALIGNMENT / j.split.real, elem = j.split.elem;
    const int64_t lead = j.split.rows ? (int64_t)((uintptr_t)out / (uintptr_t)elem % (uintptr_t)values) : 0;
    const int64_t joined = operation == &PLAN_RUN ? fbn_joined(p->channels) : j.split.joined;
    const int64_t apart = bytes_apart(&j.split, joined);
    char *start = (char *)(((uintptr_t)workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    for (int i = 0; i < FBN_CONSTANTS; i++) j.constants.of[i] = start + i * apart + lead * j.split.real;
    double *next = (double *)start + FBN_CONSTANTS * joined;
    j.saved = next;
    j.known = j.saved;
    j.origin = next + FBN_SAVED_ROWS * j.split.padded;
    j.partial = j.origin + j.split.joined;
    j.lanes = j.partial + 2 * j.split.segments * j.split.padded;
    return j;
}

/* A job that maps x to y. Its rows go to `saved`, unless that is NULL. */
static fbn_job job_of_x(const fbn_problem *p, const fbn_operation *operation, const void *x, const void *residual,
                        const unsigned char *mask, void *y, double *saved, void *workspace) {
    fbn_job j = job_of(p, operation, residual ? 2 : 1, mask, y, workspace);
    j.x = x;
    j.residual = residual;
    if (saved) j.known = j.saved = saved;
    return j;
}

/* Whether all positions count, and dz is dy or that of a relu without a residual: the gradients of stacks are of these.
 */
static int is_simple(const fbn_job *j) {
    return !j->reduce_mask && (!j->activation || (j->activation == FBN_RELU && !j->residual));
}

/* A job that differentiates. Where `x` holds y, the rows that describe it are in the workspace. */
static fbn_job job_of_dy(const fbn_problem *p, const fbn_operation *operation, const fbn_sums_args *a, void *dx,
                         void *workspace) {
    fbn_job j = job_of(p, operation, arrays_of(p, a->residual != NULL), a->mask, dx, workspace);
    j.dy = a->dy;
    j.x = a->x;
    j.residual = a->residual;
    j.reduce_mask = j.map_mask = a->mask;
    j.of_x = a->saved;
    j.known = a->from_y ? j.saved : a->saved;
    j.activation |= a->from_y ? FBN_FROM_Y : 0;
    j.split.stacks &= is_simple(&j);
    return j;
}

/* Counts the positions that count towards the statistics, and finds the first, a middle and the last of them. */
static void set_mask(fbn_job *j, const unsigned char *mask) {
    const int64_t outer = j->split.outer, inner = j->split.inner, positions = outer * inner;
    int64_t first = 0, middle = outer / 2 * inner + inner / 2, last = positions - 1, count = 0;
    j->reduce_mask = mask;
    for (int64_t i = 0; mask && i < positions; i++) count += mask[i] != 0;
    if (count) {
        while (!mask[first]) first++;
        while (!mask[last]) last--;
        while (middle < last && !mask[middle]) middle++;
        middle = middle < last ? middle : last;
    }
    j->origins[0] = first;
    j->origins[1] = middle;
    j->origins[2] = last;
    j->count = mask ? (double)count : (double)positions;
}

static fbn_status run(fbn_job *j) {
    fbn_run(j);
    return FBN_OK;
}

/* ---- forward ---- */

fbn_status fbn_forward(const fbn_problem *p, const fbn_forward_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_forward(p, a, workspace));
    if (status) return status;
    fbn_job j = job_of_x(p, &FORWARD, a->x, a->residual, a->mask, a->y, a->saved, workspace);
    j.parameters = a->parameters;
    j.running = a->running;
    j.eps = a->eps;
    set_mask(&j, a->mask);
    if (j.count < 1 || (j.running.mean && j.count <= j.running.correction)) return FBN_TOO_FEW_VALUES;
    return run(&j);
}

fbn_status fbn_infer(const fbn_problem *p, const fbn_infer_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_infer(p, a, workspace));
    if (status) return status;
    fbn_job j = job_of_x(p, &INFER, a->x, a->residual, NULL, a->y, a->saved, workspace);
    j.parameters = a->parameters;
    j.statistics = a->statistics;
    j.eps = a->eps;
    return run(&j);
}

fbn_status fbn_apply(const fbn_problem *p, const fbn_apply_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_apply(p, a, workspace));
    if (status) return status;
    fbn_job j = job_of_x(p, &APPLY, a->x, a->residual, NULL, a->y, a->saved, workspace);
    j.parameters = a->parameters;
    j.eps = a->eps;
    return run(&j);
}

fbn_status fbn_moments(const fbn_problem *p, const fbn_moments_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_moments(p, a, workspace));
    if (status) return status;
    fbn_job j = job_of(p, &MOMENTS, 1, a->mask, NULL, workspace);
    j.x = a->x;
    j.moments_out = a->moments;
    set_mask(&j, a->mask);
    return j.count < 1 ? FBN_TOO_FEW_VALUES : run(&j);
}

/* ---- plans: a plan is a label, followed by the start of a workspace that has its lines set ---- */

typedef struct {
    const void *at;
    const fbn_kernels *kernels;
    int64_t channels, real;
} label;

static label label_of(const fbn_problem *p, const void *plan) {
    label l;
    memset(&l, 0, sizeof l); /* the padding as well, since labels are compared byte by byte */
    l.at = plan;
    l.kernels = p->machine->kernels;
    l.channels = p->channels;
    l.real = p->dtype == FBN_F64 ? 8 : 4;
    return l;
}

size_t fbn_plan_bytes(int64_t channels) {
    if (!fbn_valid_channels(channels)) return 0;
    return bytes_of(FBN_CONSTANTS * fbn_joined(channels) + FBN_SAVED_ROWS * fbn_padded(channels),
                    ALIGNMENT + (int64_t)sizeof(label));
}

fbn_status fbn_plan_set(const fbn_problem *p, const fbn_plan_args *a, void *plan) {
    const fbn_status status = fbn_check_plan_set(p, a, plan);
    if (status) return status;
    const label labelled = label_of(p, plan);
    fbn_problem rows = *p;
    rows.outer = FBN_WORTH_JOINING; /* so many rows that the constants are repeated */
    rows.inner = 1;
    fbn_job j = job_of_x(&rows, &INFER, NULL, NULL, NULL, NULL, NULL, (char *)plan + sizeof(label));
    j.parameters = a->parameters;
    j.statistics = a->statistics;
    j.eps = a->eps;
    fbn_finish_statistics(&j, 0, rows.channels);
    memcpy(plan, &labelled, sizeof labelled);
    return FBN_OK;
}

fbn_status fbn_plan_run(const fbn_problem *p, const fbn_run_args *a, const void *plan) {
    const fbn_status status = fbn_check_plan_run(p, a, plan);
    if (status) return status;
    const label expected = label_of(p, plan);
    if (memcmp(&expected, plan, sizeof expected) != 0) return FBN_BAD_PLAN;
    /* The constants lie where fbn_plan_set, which knew no y, put them. They are only read. */
    fbn_job j = job_of_x(p, &PLAN_RUN, a->x, a->residual, NULL, NULL, NULL, (char *)(uintptr_t)plan + sizeof(label));
    j.result = a->y;
    return run(&j);
}

/* ---- backward ---- */

fbn_status fbn_backward_sums(const fbn_problem *p, const fbn_sums_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_backward_sums(p, a, workspace));
    if (status) return status;
    const fbn_operation operation = sums_of(a);
    fbn_job j = job_of_dy(p, &operation, a, NULL, workspace);
    j.sums_out = a->sums;
    return run(&j);
}

/* Has the sums leave dz, so that the map need not compute it again: in dresidual, which is dz, or in dx while that
 * stays in the cache or where dz of columns is costly, or else in a block for each thread. A dtype of 16 bits would
 * round dz. With a mask the map must see whether dy is 0, and where `x` holds y it needs the activation to find z. */
static void keep_dz(fbn_job *j, const fbn_backward_args *a) {
    if (!j->operation->reduce || !j->activation || a->from_y || a->mask || j->split.elem < 4) return;
    if (a->residual) j->dz = a->dresidual;
    else if (!j->split.around || (j->split.columns && fbn_is_costly(j->p))) j->dz = a->dx;
    else if (bytes_of_blocks(j->p, &j->split)) {
        const uintptr_t end = (uintptr_t)(j->lanes + j->split.threads * fbn_lane_doubles(&j->split));
        j->dz_blocks = (char *)((end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }
}

/* A map that computes dz reads the constants of y as well: with those of dx all but the two powers of two. A costly dz
 * is computed for one channel after another, so its planes are not joined. */
static void set_map_panel(fbn_job *j) {
    if (!j->activation || j->dz || j->dz_blocks) return;
    j->split.joins &= !fbn_is_costly(j->p);
    if (!j->split.joins) j->split.map_panel = fbn_map_panel(&j->split, FBN_CONSTANTS - j->kernels->first_constant - 2);
}

fbn_status fbn_backward(const fbn_problem *p, const fbn_backward_args *a, void *workspace) {
    const fbn_status status = if_fits(p, fbn_check_backward(p, a, workspace));
    if (status) return status;
    const fbn_operation operation = backward_of(a);
    const fbn_sums_args inputs = fbn_inputs_of(a);
    fbn_job j = job_of_dy(p, &operation, &inputs, a->dx, workspace);
    j.frozen = a->frozen;
    j.dresidual = a->dresidual;
    j.count = a->count;
    j.given_sums = a->sums;
    j.dgamma = a->dgamma;
    j.dbeta = a->dbeta;
    keep_dz(&j, a);
    set_map_panel(&j);
    return run(&j);
}

int fbn_abi_version(void) { return FBN_ABI_VERSION; }
