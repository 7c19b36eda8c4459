/* walk.c: streams and turns. */
#include "walk.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The arrays that are read share the streams. */
static int64_t streams_of(const fbn_operands *o, int64_t wanted, int64_t most) {
    const int arrays = 1 + (o->dy != NULL) + (o->residual != NULL);
    const int64_t streams = smaller(wanted / arrays, most);
    return streams < 1 ? 1 : streams;
}

/* Whether dz of an activation is computed, which takes longer than to read it. */
static int computes_dz(const fbn_operands *o) { return o->dy && o->activation != FBN_IDENTITY; }

/* The elements of a turn. A single stream takes one. Turns of 16-bit values are four times as many bytes, which is
 * faster (Zen 4) unless dz is computed. */
static int64_t turn_of(const fbn_operands *o, int64_t elem, int64_t streams, int64_t length) {
    const int64_t times = elem == 2 && !computes_dz(o) ? 4 : 1;
    return streams == 1 ? length : times * o->walk.turn / elem;
}

/* The same for sums. Those that read 8 bytes or more for each position, and compute no dz, wait for memory in any case,
 * and are faster if the streams take shorter turns (Zen 4). */
static int64_t turn_of_sums(const fbn_operands *o, int64_t elem, int64_t streams, int64_t length) {
    enum { STEP = FBN_LANES * 8, LEAST = 2 * STEP }; /* bytes */
    const int64_t turn = turn_of(o, elem, streams, length), half = o->walk.turn / 2 / STEP * STEP;
    const int waits = !computes_dz(o) && elem * (o->dy ? 2 : 1) >= 8;
    return waits && streams > 1 && half >= LEAST ? half / elem : turn;
}

/* The elements of the first turn, which ends where a cache line of the result does: to write a part of one is slow. */
static int64_t first_turn(const fbn_operands *o, int64_t elem, int64_t at, int64_t turn) {
    return turn + (int64_t)(-((uintptr_t)o->out + (uintptr_t)(at * elem)) % FBN_LINE) / elem;
}

/* The operands of one plane of a channel: `own` if its dz, which is where x's index finds it, lies elsewhere. To copy
 * them for each small plane would take as long as its values. */
static const fbn_operands *with_dz(const fbn_operands *o, int64_t elem, const fbn_planes *p, int64_t c, int64_t image,
                                   fbn_operands *own) {
    const int64_t further = c * (p->dz_step - p->step) + image * (p->dz_apart - p->apart);
    if (p->dz_step == 0) return o;
    *own = *o;
    own->dz = (void *)((uintptr_t)o->dz + (uintptr_t)(further * elem));
    return own;
}

/* Planes whose dz lies elsewhere are a single stream, since with_dz makes the operands of one plane, and so are those
 * whose dz is costly, for which loops take longer pieces than a turn. Memory can keep up with either. */
static int64_t streams_of_planes(const fbn_operands *o, const fbn_planes *p, int64_t most) {
    const int which = o->activation & FBN_WHICH, is_costly = o->dy && (which == FBN_SILU || which == FBN_SIGMOID);
    return p->dz_step || is_costly ? 1 : streams_of(o, o->walk.streams, most);
}

/* Adds the planes of a channel in streams, in turns, each to lanes of its own. */
static void sum_in_turns(fbn_loop *loop, const fbn_operands *o, int64_t streams, int64_t turn, const fbn_planes *p,
                         int64_t c, double *lanes) {
    _Alignas(64) double own[FBN_IMAGES][2 * FBN_LANES];
    for (int64_t s = 0; s < p->images; s++)
        for (int k = 0; k < 2 * FBN_LANES; k++) own[s][k] = 0;
    for (int64_t image = 0; image < p->images; image += streams)
        for (int64_t i = 0; i < p->inner; i += turn)
            loop(o, &(fbn_stretch){.at = c * p->step + image * p->apart + i,
                                   .n = smaller(turn, p->inner - i),
                                   .c = c,
                                   .rows = smaller(streams, p->images - image),
                                   .apart = p->apart,
                                   .sums = own[image],
                                   .others = own[image] + FBN_LANES});
    for (int64_t s = 0; s < p->images; s++)
        for (int k = 0; k < 2 * FBN_LANES; k++) lanes[k] += own[s][k];
}

/* Adds so many planes of channel c, of one image and those that follow it. The plane that is read after each is `apart`
 * elements away. */
static void sum_whole(fbn_loop *loop, const fbn_operands *o, int64_t elem, const fbn_planes *p, int64_t c,
                      int64_t image, int64_t images, int64_t apart, double *lanes) {
    fbn_operands own;
    double *sums = lanes + c * 2 * FBN_LANES;
    loop(with_dz(o, elem, p, c, image, &own), &(fbn_stretch){.at = c * p->step + image * p->apart,
                                                             .n = p->inner,
                                                             .c = c,
                                                             .rows = images,
                                                             .apart = apart,
                                                             .sums = sums,
                                                             .others = sums + FBN_LANES,
                                                             .whole = 1});
}

/* Planes in the order of memory. */
static void sum_by_image(fbn_loop *loop, const fbn_operands *o, int64_t elem, const fbn_planes *p, double *lanes) {
    const int64_t last = p->channels - 1, back = p->apart - last * p->step;
    for (int64_t image = 0; image < p->images; image++)
        for (int64_t c = 0; c <= last; c++) sum_whole(loop, o, elem, p, c, image, 1, c < last ? p->step : back, lanes);
}

void fbn_sum_planes(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_planes p, double *lanes) {
    const int64_t streams = streams_of_planes(o, &p, p.images), turn = turn_of_sums(o, elem, streams, p.inner);
    const int64_t together = p.dz_step ? 1 : p.images;
    if (streams == 1 && p.by_image) {
        sum_by_image(loop, o, elem, &p, lanes);
        return;
    }
    for (int64_t c = 0; c < p.channels; c++) {
        if (streams > 1) sum_in_turns(loop, o, streams, turn, &p, c, lanes + c * 2 * FBN_LANES);
        for (int64_t image = 0; streams == 1 && image < p.images; image += together)
            sum_whole(loop, o, elem, &p, c, image, together, p.apart, lanes);
    }
}

/* Rows that are added at a time are far apart, since most processors read several streams faster than one. What
 * would be fetched beyond the end of a run is fetched from the one that comes next. */
void fbn_sum_runs(fbn_loop *loop, const fbn_operands *o, int64_t rows, int64_t groups, fbn_runs r, double *sums,
                  double *others) {
    const int64_t times = r.count / rows;
    fbn_stretch s = {.n = r.length,
                     .rows = rows,
                     .apart = times * r.apart,
                     .step = r.apart,
                     .sums = sums,
                     .others = others,
                     .further = r.apart - r.length};
    for (int64_t i = 0; i < times; i += s.groups) {
        s.at = i * r.apart;
        s.groups = smaller(groups, times - i);
        loop(o, &s);
    }
    s.at = times * rows * r.apart;
    s.rows = r.count - times * rows;
    s.apart = r.apart;
    s.groups = 1;
    if (s.rows) loop(o, &s);
}

void fbn_map_planes(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_planes p) {
    const int64_t streams = streams_of_planes(o, &p, p.apart * elem % FBN_LINE ? 1 : p.images);
    const int64_t turn = turn_of(o, elem, streams, p.inner);
    const int64_t together = streams > 1 || p.dz_step || o->stream ? streams : p.images;
    for (int64_t image = 0; image < p.images; image += together) {
        for (int64_t c = 0; c < p.channels; c++) { /* adjacent planes follow each other */
            const int64_t start = c * p.step, first = streams == 1 ? turn : first_turn(o, elem, start, turn);
            fbn_operands own;
            const fbn_operands *operands = with_dz(o, elem, &p, c, image, &own);
            if (p.dz_step) own.dy = own.dz;
            for (int64_t i = 0, n = smaller(first, p.inner); i < p.inner; i += n, n = smaller(turn, p.inner - i))
                loop(operands, &(fbn_stretch){.at = start + image * p.apart + i,
                                              .n = n,
                                              .c = c,
                                              .rows = smaller(together, p.images - image),
                                              .apart = p.apart});
        }
    }
}

/* The elements of a turn of runs: four times as many of float64, if columns recur within half a page (Zen 4). */
static int64_t turn_of_runs(const fbn_operands *o, int64_t elem, int64_t streams, const fbn_runs *r) {
    enum { HALF_PAGE = 2048 };
    const int64_t turn = turn_of(o, elem, streams, r->length);
    return elem == 8 && streams > 1 && r->period * elem <= HALF_PAGE ? 4 * turn : turn;
}

/* Maps the runs, which are streams. A single stream may be one run after another. */
static void map_streams(fbn_loop *loop, const fbn_operands *o, int64_t elem, int64_t start, int64_t streams,
                        int64_t ahead, fbn_runs r) {
    const int64_t turn = turn_of_runs(o, elem, streams, &r), first = first_turn(o, elem, start, turn);
    for (int64_t i = 0, n = smaller(first, r.length); i < r.length; i += n, n = smaller(turn, r.length - i))
        loop(o, &(fbn_stretch){.at = start + i,
                               .n = n,
                               .c = (r.first + i) % r.period,
                               .period = r.period,
                               .rows = r.count,
                               .apart = r.apart,
                               .ahead = ahead});
}

/* Whether streams would be in each other's way. If columns recur after whole pages, all streams are at the same place
 * of their pages. On Zen 4 a read then waits for the writes of other streams, and takes half as long again, if the
 * result is between an eighth and three quarters of a page ahead of x, counted from the start of a page. */
static int collides(const fbn_operands *o, int64_t elem, const fbn_runs *r) {
    enum { PAGE = 4096, MOST = 8 * PAGE };
    const int64_t period = r->period * elem, lag = (int64_t)(((uintptr_t)o->out - (uintptr_t)o->x) % PAGE);
    return period % PAGE == 0 && period <= MOST && lag >= PAGE / 8 && lag < PAGE / 4 * 3;
}

/* The streams that a long run is mapped in. Where several are best, float32 columns that recur after little more than a
 * kilobyte take one more, up to 4, unless there is a residual, or an activation in a gradient (Zen 4). */
static int64_t streams_of_run(const fbn_operands *o, int64_t elem, const fbn_runs *r) {
    enum { SHORT = 1280 /* bytes */, MOST = 4 };
    const int64_t habit = o->walk.row_streams;
    const int gains = !o->residual && !computes_dz(o);
    return gains && habit > 1 && habit < MOST && elem == 4 && r->period * elem <= SHORT ? habit + 1 : habit;
}

/* A long run is mapped in parts of whole periods, as streams, and then what is left of it. */
static void map_long_run(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_runs r) {
    enum { LEAST = 16384 }; /* bytes of a part */
    const int64_t most = collides(o, elem, &r) ? 1 : FBN_IMAGES;
    const int64_t periods = r.length / r.period, streams = streams_of(o, streams_of_run(o, elem, &r), most);
    const int64_t part = periods / streams * r.period, left = r.length - streams * part;
    if (streams == 1 || part * elem % FBN_LINE || part * elem < LEAST)
        map_streams(loop, o, elem, 0, 1, o->walk.run_ahead, r);
    else {
        map_streams(loop, o, elem, 0, streams, 0, (fbn_runs){streams, part, part, r.period, r.first});
        if (left) map_streams(loop, o, elem, streams * part, 1, 0, (fbn_runs){1, 0, left, r.period, r.first});
    }
}

/* Runs that are apart are pieces of rows. The processor fetches ahead within a piece, and the loops the next piece. */
void fbn_map_runs(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_runs r) {
    const int64_t streams = streams_of(o, o->walk.row_streams, FBN_IMAGES);
    const int alike = r.apart * elem % FBN_LINE == 0; /* all runs start at the same place of a cache line */
    const int64_t at_once = streams == 1 && (alike || !o->stream) ? r.count : alike ? streams : 1;
    const int64_t ahead = (streams == 1 ? 1 : at_once) * r.apart * elem;
    if (r.count == 1) map_long_run(loop, o, elem, r);
    else
        for (int64_t i = 0; i < r.count; i += at_once)
            map_streams(loop, o, elem, i * r.apart, smaller(at_once, streams), ahead,
                        (fbn_runs){smaller(at_once, r.count - i), r.apart, r.length, r.period, r.first});
}
