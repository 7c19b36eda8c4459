/* run.c: in which order, and by which threads, is an operation carried out? The only file that uses OpenMP.
 *
 * A thread may do all steps on a block of channels that stays in a cache, so that memory is read once and written once.
 * Otherwise all threads reduce, then finish, then map (split.c chooses). The map starts at the end of the array, which
 * the reduction has just left in the cache. Threads wait for each other only where a step needs what other threads
 * computed: on a busy machine, time is lost at barriers.
 *
 * Neither the blocks nor the number of threads change a bit of the result; split.h says why.
 */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "job.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Where a thread keeps the constants of columns. */
static void *room_of(const fbn_job *j, int64_t thread, void *on_stack) {
    const int64_t all = fbn_lane_doubles(&j->split), room = fbn_room_doubles(&j->split);
    return room ? j->lanes + (thread + 1) * all - room : on_stack;
}

/* The place of channel c in a thread's block of dz, which starts with channel c0. */
static char *dz_at(const fbn_job *j, char *dz, int64_t c0, int64_t c) {
    return dz ? dz + fbn_block_bytes(&j->split, c - c0) : NULL;
}

/* The sums of the segments [s0, s1) and the channels [c0, c1). */
static void reduce(fbn_job *j, int64_t s0, int64_t s1, int64_t c0, int64_t c1, int thread, void *room, char *dz) {
    double *lanes = j->lanes + thread * fbn_lane_doubles(&j->split);
    const int64_t step = j->split.stacks ? FBN_STACKS : j->split.panel;
    for (int64_t c = c0; c < c1; c += step) {
        fbn_panel panel = fbn_panel_to_sum(j, c, smaller(c + step, c1), lanes, room);
        panel.dz = dz_at(j, dz, c0, c);
        for (int64_t s = s0; s < s1; s++) fbn_reduce_panel(j, s, &panel, lanes);
    }
}

static void map_units(const fbn_job *j, int64_t first, int64_t last, const fbn_panel *panel) {
    for (int64_t unit = first, from = 0; unit < last;) {
        const fbn_tile t = fbn_tile_at(&j->split, unit, from, last, j->map_mask);
        j->operation->map(j, &t, panel);
        unit = t.next_unit;
        from = t.next_from;
    }
}

/* After a reduction the map goes from the end backwards, chunk by chunk, since the reduction has left the end in the
 * cache. A panel that is kept is prepared once: the only one, or one of a few of rows. Several of small planes are not
 * kept, since their constants share the room. */
static void map(const fbn_job *j, int64_t u0, int64_t u1, int64_t c0, int64_t c1, void *room, char *dz) {
    enum { KEPT = 16 };
    fbn_panel kept[KEPT];
    const int64_t units = u1 > u0 ? u1 - u0 : 1, step = j->split.map_panel, panels = divide_up(c1 - c0, step);
    const int64_t chunk = j->operation->reduce ? fbn_chunk(&j->split, c1 - c0) : units;
    const int keeps = panels == 1 || (panels <= KEPT && j->split.rows);
    for (int64_t left = divide_up(u1 - u0, chunk), first_time = 1; left > 0; left--, first_time = 0) {
        const int64_t first = u0 + (left - 1) * chunk;
        for (int64_t n = 0; n < panels; n++) {
            const int64_t c = c0 + n * step;
            fbn_panel *panel = &kept[keeps ? n : 0];
            if (first_time || !keeps) *panel = fbn_panel_to_map(j, c, smaller(c + step, c1), room);
            panel->dz = dz_at(j, dz, c0, c);
            map_units(j, first, smaller(first + chunk, u1), panel);
        }
    }
}

/* What is done before any value is read. An operation without a reduction can be finished here, too. */
static void begin(fbn_job *j, int64_t c0, int64_t c1) {
    const fbn_operation *o = j->operation;
    if (o->prepare) o->prepare(j, c0, c1);
    if (!o->reduce && o->finish) o->finish(j, c0, c1);
}

/* All steps on one of this thread's blocks of channels, then on the next. */
static void work_by_channels(fbn_job *j, int64_t t, int threads) {
    _Alignas(64) double on_stack[FBN_ROOM / sizeof(double)]; /* as kernels.h says of the stack */
    void *room = room_of(j, t, on_stack);
    const fbn_operation *o = j->operation;
    const int64_t C = j->split.channels, block = j->split.block, blocks = divide_up(C, block);
    char *dz = j->dz_blocks ? j->dz_blocks + t * fbn_block_bytes(&j->split, block) : NULL;
    for (int64_t b = blocks * t / threads; b < blocks * (t + 1) / threads; b++) {
        const int64_t c0 = b * block, c1 = smaller(c0 + block, C);
        o->prepare(j, c0, c1);
        reduce(j, 0, j->split.segments, c0, c1, (int)t, room, dz);
        o->finish(j, c0, c1);
        if (o->map) map(j, 0, j->split.units, c0, c1, room, dz);
    }
}

static void barrier(int threads) {
    if (threads == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* This thread's share of the first step, then of the next. Share t of n things is [n * t / threads, n * (t + 1) /
 * threads). */
static void work_by_steps(fbn_job *j, int64_t t, int threads) {
    _Alignas(64) double on_stack[FBN_ROOM / sizeof(double)]; /* as kernels.h says of the stack */
    void *room = room_of(j, t, on_stack);
    const fbn_operation *o = j->operation;
    const int64_t C = j->split.channels, pad = FBN_CHANNEL_PAD, groups = divide_up(C, pad);
    const int64_t c0 = groups * t / threads * pad, c1 = smaller(groups * (t + 1) / threads * pad, C);
    if (j->split.shares_channels) {
        begin(j, c0, c1);
        barrier(threads);
    }
    if (o->reduce) {
        reduce(j, j->split.segments * t / threads, j->split.segments * (t + 1) / threads, 0, C, (int)t, room, NULL);
        barrier(threads);
        o->finish(j, c0, c1);
        if (o->map) barrier(threads);
    }
    if (o->map) map(j, j->split.units * t / threads, j->split.units * (t + 1) / threads, 0, C, room, NULL);
}

void fbn_run(fbn_job *j) {
    const int by_channels = j->split.by_channels && j->operation->reduce;
    if (j->split.channels == 0) return;
    if (!by_channels && !j->split.shares_channels) begin(j, 0, j->split.channels);
    void (*const work)(fbn_job *, int64_t, int) = by_channels ? work_by_channels : work_by_steps;
#ifdef _OPENMP
    if (j->split.threads > 1) {
#pragma omp parallel num_threads(j->split.threads)
        work(j, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(j, 0, 1);
}

int fbn_openmp(void) {
#ifdef _OPENMP
    return _OPENMP;
#else
    return 0;
#endif
}

int fbn_openmp_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
