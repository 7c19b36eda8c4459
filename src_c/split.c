/* split.c: segments, blocks, panels and tiles, from the shape, the caches and habits, and the number of threads. */
#include "split.h"

#include "values.h"

enum {
    SEGMENT = 32768,    /* the least values of a channel in a channels-first segment; those in a cut plane's piece */
    SEGMENT_ROWS = 128, /* the least rows in a channels-last segment, counted after joining */
    SEGMENTS_MOST = 64, /* the most channels-last segments */
    SMALL_PLANE = 512,  /* planes of fewer elements are taken as columns, ... */
    MASKED_PLANE = 128, /* ... and those of so many if a mask leaves out images */
    SHORT_PLANE = 4096, /* bytes of planes that are read faster in the order of memory if a channel has many, ... */
    LONG_BLOCK = 4,     /* ... which fill a core's cache so many times */
    LARGE_STACK = 40,   /* planes of so many elements are summed channel by channel if there are FBN_ROWS images, ... */
    LARGE_STACKS = 256, /* ... and those of so many in calls that read more than x */
    LEAST_JOINED = 40,  /* planes of so many elements are mapped joined: most vectors lie within one */
    LEAST_RAGGED = 24,  /* ... and those of so many if they would be slow as columns */
    STRETCH = 4096,     /* the elements of a unit of joined planes */
    SMALL_PLANES = 64,  /* the least small planes of a channel that are mapped at a time */
    MAPPED_BYTES = 1 << 14, /* of the constants of the channels of rows that are mapped at a time */
    JOINED = 512,           /* sums join shorter rows to so many columns */
    JOINED_TO_MAP = 256,    /* maps to so many, whose constants leave room in the nearest cache */
    WHOLE_BYTES = 1 << 16,  /* of each constant of the columns of whole images that are written around the cache, ... */
    WHOLE_IN_CACHE = 5 << 10,  /* ... and of others */
    BLOCK_CHANNELS = 64,       /* the most channels in a channels-first block ... */
    MASKED_CHANNELS = 8,       /* ... and the least that are looked for with a mask */
    CHUNK = 1 << 18,           /* bytes of rows that are mapped at a time, on the way from the end backwards */
    LARGE_CHUNK = 1 << 22,     /* the same where memory, not a cache, is read: changes of direction are slow there */
    CHANNELS_TO_SHARE = 16384, /* from so many channels on, threads share what is done once per channel */
    PART_OF_CACHE = 8,         /* a result larger than this part of the shared cache is large */
    LONGEST_TURN = 1 << 20     /* bytes */
};

/* repeat_of gives up to twice as many columns. */
_Static_assert(2 * JOINED_TO_MAP * (int)sizeof(double) <= FBN_COLUMN_BYTES, "a panel needs room for joined images");

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
static int64_t in_steps(int64_t a, int64_t step) { return a < step ? larger(a, 1) : a / step * step; }

/* The least number whose product with n is a multiple of `power`, which is a power of two. */
static int64_t to_multiple(int64_t n, int64_t power) {
    while (power > 1 && n % 2 == 0) n /= 2, power /= 2;
    return power;
}

/* How many rows are joined to at least so many columns: to whole vectors, if that takes at most twice as many. Those of
 * a single channel are not joined, since they are one plane. */
static int64_t repeat_of(int64_t channels, int64_t columns) {
    if (channels < 2 || channels >= columns) return 1;
    const int64_t least = divide_up(columns, channels), whole = round_up(least, to_multiple(channels, FBN_CHANNEL_PAD));
    return whole * channels <= 2 * columns ? whole : least;
}

/* How many rows, or images of small planes, maps join. Images are joined only where a panel has all of their channels,
 * and no more of them than there are, since their constants are spread anew in each call. */
static int64_t map_repeat_of(const fbn_split *s) {
    if (s->rows) return smaller(s->repeat, repeat_of(s->channels, JOINED_TO_MAP));
    if (!s->columns || s->joins || s->panel < s->channels) return 1;
    return smaller(larger(s->outer, 1), repeat_of(s->channels * s->inner, JOINED_TO_MAP));
}

/* Whether so many parts, which take equally long, can be shared by the threads: at most two sevenths of their time may
 * be lost. */
static int share_well(int64_t parts, int64_t threads) { return 5 * divide_up(parts, threads) * threads <= 7 * parts; }

/* The most bytes of each constant of the columns of whole images. */
static int64_t whole_bytes(const fbn_split *s) {
    const int64_t most = s->large ? WHOLE_BYTES : WHOLE_IN_CACHE;
    return s->planned ? smaller(most, FBN_PLANNED_BYTES) : most;
}

static int is_ragged(const fbn_split *s) { return s->channels * s->inner * s->elem % FBN_LINE != 0; }

/* Whether a panel has all channels of small planes, though their constants do not stay in the nearest cache. Images
 * then follow each other as one run. In panels each image begins and ends within a cache line, a part of which takes
 * long to write, above all around the cache. Threads that reduce share the segments. */
static int has_whole_images(const fbn_split *s) {
    const int64_t bytes = s->channels * s->inner * s->real;
    if (!s->columns || s->rows || s->joins || bytes <= FBN_COLUMN_BYTES || !is_ragged(s)) return 0;
    return bytes <= whole_bytes(s) && (s->maps || share_well(s->segments, s->threads));
}

/* The channels of small planes that kernels get at once: all, if those have no more than FBN_COLUMN_BYTES of each
 * constant. Otherwise panels are equally large, so that none is only a few columns, and of whole cache lines of
 * elements if possible. */
static int64_t panel_of(const fbn_split *s) {
    const int64_t most = FBN_COLUMN_BYTES / s->real / s->inner, line = to_multiple(s->inner, FBN_LINE / s->elem);
    const int64_t largest = in_steps(most, line), panels = divide_up(s->channels, largest);
    if (s->whole_images || s->channels <= most) return larger(s->channels, 1);
    return smaller(round_up(divide_up(s->channels, panels), line), largest);
}

/* The bytes of a channel in all the arrays that a call reads. */
static int64_t channel_bytes(const fbn_split *s, int arrays) { return s->outer * s->inner * s->elem * arrays; }

/* Channels in a block: as many as fill two thirds of a core's cache, or a third if they are small planes of several
 * arrays, which leaves room for what is fetched ahead and for the results. Fewer small planes than a panel has would be
 * slow, and so would fewer channels with a mask, which is looked through for each block. */
static int64_t block_of(const fbn_split *s, const fbn_machine *machine, int arrays, fbn_kind kind) {
    const int64_t usual = machine->core_cache / 3 * (s->columns && arrays > 1 ? 1 : 2);
    const int64_t room = machine->habits.block > 0 ? machine->habits.block : usual;
    const int64_t least = kind == FBN_MASKED ? MASKED_CHANNELS : 0;
    const int64_t fit = larger(room / larger(channel_bytes(s, arrays), 1), least),
                  panel = s->columns && !s->rows ? panel_of(s) : 1;
    if (s->rows || s->stretches) return larger(s->channels, 1);
    if (s->cuts > 1) return 1;
    const int64_t most = smaller(smaller(divide_up(s->channels, s->threads), fit), BLOCK_CHANNELS);
    return smaller(larger(in_steps(in_steps(most, FBN_CHANNEL_PAD), panel), panel), larger(s->channels, 1));
}

/* Whether rows had better be mapped whole than in panels that begin and end within a cache line: where results are
 * written around the cache, or parts of vectors are slow to store. */
static int are_whole(const fbn_split *s, const fbn_problem *p) {
    const int slow_parts = !p->machine->kernels->of[p->dtype]->fast_parts;
    return s->rows && s->channels * s->elem % FBN_LINE && (s->around || slow_parts);
}

int64_t fbn_map_panel(const fbn_split *s, int constants) {
    const int64_t most = MAPPED_BYTES / (constants * s->real);
    const int64_t whole = s->whole_rows ? 8 * most : most + most / (s->maps ? 3 : 8);
    if (!s->rows) return s->panel;
    if (s->channels <= whole) return s->channels;
    return round_up(divide_up(s->channels, divide_up(s->channels, most)), larger(FBN_CHANNEL_PAD, FBN_LINE / s->elem));
}

/* Whether planes are short, as small ones are. */
static int is_short(const fbn_split *s) { return s->inner * s->elem <= SHORT_PLANE; }

/* Whether sums may read planes in the order of memory: where one stream is best. */
static int in_order(const fbn_machine *machine) { return machine->habits.streams == 1; }

/* Whether planes are faster passed through from end to end than block by block. Short ones are where a block is far
 * larger than a core's cache. Joined ones are where no block fits into that, but x as a whole into the shared cache, or
 * where a block takes a large part of this. It may take less where planes of different blocks share cache lines. */
static int passes_through(const fbn_split *s, const fbn_machine *machine, int arrays) {
    const int64_t bytes = channel_bytes(s, 1), block = s->block * bytes, part = is_ragged(s) ? 16 : 8;
    const int fits = block * arrays <= machine->core_cache, all_fit = s->channels * bytes <= machine->shared_cache / 2;
    const int far_larger = block / LONG_BLOCK > machine->core_cache;
    if (!s->columns && in_order(machine) && is_short(s) && s->threads == 1 && far_larger) return 1;
    return s->joins && ((!fits && all_fit) || block > machine->shared_cache / part);
}

/* Whether the shared cache has room for a block: if planes are short, beside its results and what others leave there.
 * Planes that are read in several streams are blocks in any case. */
static int has_room(const fbn_split *s, const fbn_machine *machine, int arrays) {
    if (!s->columns && !in_order(machine)) return 1;
    return s->block * channel_bytes(s, arrays) <= machine->shared_cache / (is_short(s) ? 3 : 1);
}

/* Going block by block saves memory traffic, but the blocks must divide well among the threads. A single thread passes
 * small planes that stay in the cache through from end to end: blocks save no traffic there, and one long run is
 * fetched better than their short ones. */
static int by_channels(const fbn_split *s, const fbn_machine *machine, int arrays) {
    if (s->rows || (s->columns && s->threads == 1 && !s->large)) return 0;
    if (!has_room(s, machine, arrays) || passes_through(s, machine, arrays)) return 0;
    return share_well(divide_up(s->channels, s->block), s->threads);
}

/* The channels of planes, or of rows, that kernels get at once: a block or, where planes are passed through from end to
 * end, as many as have their lanes in the nearest cache. */
static int64_t panel_of_planes(const fbn_split *s) {
    return s->rows || s->stretches || s->by_channels || s->cuts > 1 ? s->block : smaller(s->channels, BLOCK_CHANNELS);
}

/* One pad is for vectors that reach beyond the last channel. The other is for the constants of rows, which may start
 * at any place in a cache line (see job_of). */
int64_t fbn_padded(int64_t channels) { return round_up(channels, FBN_CHANNEL_PAD) + 2 * FBN_CHANNEL_PAD; }

int64_t fbn_joined(int64_t channels) { return fbn_padded(channels * repeat_of(channels, JOINED)); }

/* Whether it is faster to sum small planes channel by channel, without storing the sums of columns: those of a few
 * images are. */
static int are_stacks(int64_t images, int64_t inner, int arrays) {
    const int64_t large = arrays == 1 ? LARGE_STACK : LARGE_STACKS;
    return inner >= FBN_LANES && (images < FBN_ROWS || (images == FBN_ROWS && inner >= large));
}

/* Whether it is faster to map adjacent planes as one run, in which constants need not be spread over columns. Planes of
 * two vectors or more are if these are whole, or if there are few images. */
static int can_join(int64_t images, int64_t inner) {
    const int has_two = inner >= 2 * FBN_LANES;
    return inner >= LEAST_JOINED || (has_two && (inner % FBN_LANES == 0 || images < FBN_ROWS));
}

/* Whether what is only mapped is passed through from end to end: planes that can be joined, and somewhat smaller ones
 * of large ragged images which have too many columns for whole images. A vector of two planes is computed twice. */
static int are_stretches(const fbn_split *s, const fbn_problem *p) {
    const int too_many = s->channels * s->inner * s->real > whole_bytes(s);
    const int slow = s->large && is_ragged(s) && too_many && !fbn_is_costly(p);
    return s->maps && (can_join(s->outer, s->inner) || (s->inner >= LEAST_RAGGED && slow));
}

static int64_t or_usual(int64_t habit, int64_t usual) { return habit ? habit : usual; }

/* How far ahead is fetched: this part of the habit where one stream of rows is best (Zen 3). Sums of rows and small
 * planes read up to FBN_ROWS of them in turns, and what all of them fetch would push itself out of the nearest cache.
 */
static int64_t ahead_of(const fbn_habits *h, int part) {
    enum { LEAST_OF_ROW = 256 };
    const int64_t all = smaller(larger(or_usual(h->ahead, 1024), 0), LONGEST_TURN);
    return h->row_streams == 1 ? smaller(all, larger(all / part, LEAST_OF_ROW)) : all;
}

/* How far ahead maps fetch: rows that sums have read, of which a part is still in a cache, less far than what is only
 * mapped, and planes that sums have read not at all. Where several streams are best, the processor fetches enough. */
static int64_t run_ahead_of(const fbn_habits *h, const fbn_split *s) {
    if (!s->large || h->row_streams != 1 || !(s->maps || s->rows)) return 0;
    return ahead_of(h, s->maps ? 3 : FBN_ROWS);
}

/* Whether the shared cache cannot hold what a call reads, and its result unless that is written around the cache. An
 * eighth is left to the constants and to other programs. Planes that are only mapped gain by streams from half of the
 * cache on. A division, since a product could overflow. */
static int is_beyond_cache(const fbn_split *s, const fbn_problem *p, int arrays) {
    const int64_t bytes = fbn_block_bytes(s, s->channels), cache = p->machine->shared_cache;
    return bytes > (s->stretches ? cache / 2 : cache / 8 * 7 / (arrays + !s->around));
}

/* What is in a cache is read best without streams. A turn is a multiple of FBN_LANES elements of any dtype. */
static fbn_walk walk_of(const fbn_habits *h, const fbn_split *s, int beyond_cache) {
    const int64_t turn = smaller(or_usual(h->turn, 256), LONGEST_TURN);
    return (fbn_walk){.streams = s->large ? or_usual(h->streams, FBN_IMAGES) : 1,
                      .row_streams = beyond_cache ? smaller(or_usual(h->row_streams, 4), FBN_IMAGES) : 1,
                      .turn = in_steps(larger(turn, FBN_LANES * 8), FBN_LANES * 8),
                      .ahead = ahead_of(h, s->columns ? FBN_ROWS : 1),
                      .run_ahead = run_ahead_of(h, s)};
}

static int maps(fbn_kind kind) { return kind == FBN_MAPS || kind == FBN_PLANNED; }

/* From what size on results are large. */
static int64_t large_from(const fbn_machine *machine) {
    const int64_t from = machine->habits.stream_from;
    return from > 0 ? from : from < 0 ? INT64_MAX : machine->shared_cache / PART_OF_CACHE + 1;
}

/* Whether a result of so many bytes is large. A call that only maps reads nothing twice, so that the cache holds half
 * as large a result again. */
static int is_large(int64_t result, const fbn_machine *machine, fbn_kind kind) {
    return (maps(kind) ? result / 3 * 2 : result) >= large_from(machine);
}

/* Whether a result is written around the cache, unless it replaces what was read. That saves the read of each line that
 * is written, but drops from the cache what could have stayed there. Several threads read a cache faster than one does,
 * but memory hardly so: what counts for them is whether the cache holds all arrays of the call. */
static int is_around(int64_t result, int arrays, const fbn_machine *machine, const fbn_split *s) {
    return s->large && (s->threads == 1 || result / 5 * (arrays + 1) >= large_from(machine));
}

fbn_split fbn_split_of(const fbn_problem *p, int arrays, fbn_kind kind) {
    const int64_t values = p->outer * p->channels * p->inner;
    const int is_plane = p->channels == 1 && p->outer > 0; /* one channel is one plane */
    fbn_split s = {.outer = is_plane ? 1 : p->outer, .channels = p->channels, .inner = is_plane ? values : p->inner};
    s.real = p->dtype == FBN_F64 ? 8 : 4;
    s.elem = (int64_t)fbn_element(p->dtype);
    s.rows = s.inner == 1;
    s.maps = maps(kind);
    s.planned = kind == FBN_PLANNED;
    s.large = is_large(values * s.elem, p->machine, kind);
    s.stretches = are_stretches(&s, p);
    s.columns = s.rows || (s.inner > 1 && kind != FBN_MASKED && !s.stretches && s.inner < SMALL_PLANE);
    s.stacks = s.columns && !s.rows && are_stacks(s.outer, s.inner, arrays);
    s.joins = s.stretches || (s.columns && !s.rows && can_join(s.outer, s.inner));
    s.repeat = s.rows && values >= FBN_WORTH_JOINING ? repeat_of(p->channels, JOINED) : 1;
    s.cut = s.stretches ? STRETCH : s.inner <= 2 * SEGMENT ? s.inner : SEGMENT;
    s.cuts = s.rows || s.stretches ? 1 : divide_up(s.inner, larger(s.cut, 1));
    s.units = s.stretches ? divide_up(values, STRETCH) : s.outer * s.cuts;
    s.segment = s.stretches ? larger(s.units, 1)
                : s.rows    ? larger(SEGMENT_ROWS * s.repeat, divide_up(s.units, SEGMENTS_MOST))
                            : larger(FBN_IMAGES, SEGMENT / larger(s.cut, 1));
    s.segments = larger(1, divide_up(s.units, s.segment));
    s.padded = fbn_padded(p->channels);
    s.joined = fbn_padded(p->channels * s.repeat);
    s.threads = (int)larger(1, smaller(p->threads, values / FBN_WORK_PER_THREAD));
    s.around = is_around(values * s.elem, arrays, p->machine, &s);
    s.whole_images = has_whole_images(&s);
    s.block = block_of(&s, p->machine, arrays, kind);
    s.by_channels = by_channels(&s, p->machine, arrays);
    s.panel = s.columns && !s.rows ? panel_of(&s) : panel_of_planes(&s);
    s.map_repeat = map_repeat_of(&s);
    s.whole_rows = are_whole(&s, p);
    s.map_panel = fbn_map_panel(&s, 4);
    s.shares_channels = p->channels >= CHANNELS_TO_SHARE;
    s.walk = walk_of(&p->machine->habits, &s, is_beyond_cache(&s, p, arrays));
    return s;
}

int fbn_is_costly(const fbn_problem *p) { return p->activation == FBN_SILU || p->activation == FBN_SIGMOID; }

int64_t fbn_columns(const fbn_split *s, int64_t channels) { return channels * (s->rows ? s->repeat : s->inner); }

int64_t fbn_block_bytes(const fbn_split *s, int64_t channels) { return channels * channel_bytes(s, 1); }

int64_t fbn_lane_doubles(const fbn_split *s) {
    if (s->maps) return fbn_room_doubles(s);
    const int64_t columns = s->columns ? 3 * fbn_padded(fbn_columns(s, s->panel)) : 0;
    const int64_t planes = smaller(s->channels, BLOCK_CHANNELS); /* no panel has more, whatever a call does */
    const int64_t channels = s->stacks ? FBN_STACKS : s->columns ? 0 : planes;
    return larger(columns, channels * 2 * FBN_LANES) + fbn_room_doubles(s);
}

int64_t fbn_room_doubles(const fbn_split *s) {
    const int64_t bytes = FBN_CONSTANTS * fbn_padded(fbn_columns(s, s->panel)) * s->real;
    return s->whole_images && !s->planned ? bytes / (int64_t)sizeof(double) : 0;
}

int64_t fbn_start(const fbn_split *s, int64_t unit, int64_t c) {
    const int64_t plane = unit / s->cuts, cut = unit % s->cuts;
    if (s->stretches) return unit * s->cut;
    return (plane * s->channels + c) * s->inner + cut * s->cut;
}

int64_t fbn_chunk(const fbn_split *s, int64_t n) {
    if (s->rows) return round_up(divide_up(s->large ? LARGE_CHUNK : CHUNK, n * s->elem), s->repeat);
    return s->columns ? larger(SMALL_PLANES, CHUNK / (n * s->inner * s->elem)) : FBN_IMAGES;
}

/* The elements in a unit, of one channel. */
static int64_t length_of(const fbn_split *s, int64_t unit) {
    return smaller(s->cut, s->inner - unit % s->cuts * s->cut);
}

int64_t fbn_width(const fbn_split *s) { return (s->rows ? s->channels : 1) * s->elem; }

int64_t fbn_position(const fbn_split *s, int64_t unit, int64_t from) {
    return s->rows ? unit : unit / s->cuts * s->inner + unit % s->cuts * s->cut + from;
}

/* How many of n positions, the first and those that follow it at steps of `apart`, have the same mask. */
static int64_t run_of(const unsigned char *mask, int64_t n, int64_t apart) {
    int64_t i = 1;
    while (i < n && !mask[i * apart] == !mask[0]) i++;
    return i;
}

int fbn_masks_images(const fbn_problem *p, const unsigned char *mask) {
    if (p->inner == 1 || p->inner >= MASKED_PLANE || p->channels == 1) return 0;
    for (int64_t i = 0; i < p->outer; i++)
        if (run_of(mask + i * p->inner, p->inner, 1) < p->inner) return 0;
    return 1;
}

/* How often the mask changes between the first of n positions and the last. */
static int64_t changes_of(const unsigned char *mask, int64_t n) {
    int changes = 0;
    for (int i = 1; i < (int)n; i++) changes += !mask[i] != !mask[i - 1];
    return changes;
}

/* The positions of the tile that begins at position `from` of n: a run, or all up to a multiple of what a mixed tile
 * has if runs are short there. A position has `width` bytes. Wide ones are not mixed: to copy them would take longer
 * than to call a loop for each run. */
static int64_t masked_length(const fbn_split *s, const unsigned char *mask, int64_t from, int64_t n, int *mixed) {
    enum { SHORT_RUN = 64, SHORT_ROWS = 16, WIDE = 128 };
    const int64_t width = fbn_width(s);
    const int64_t most = smaller(FBN_MIXED, FBN_MIXED_BYTES / smaller(width, WIDE));
    const int64_t some = smaller(n, (from / most + 1) * most) - from;
    *mixed = width <= WIDE && changes_of(mask + from, some) * (s->rows ? SHORT_ROWS : SHORT_RUN) > some;
    return *mixed ? some : run_of(mask + from, n - from, 1);
}

static fbn_tile rows_at(const fbn_split *s, int64_t unit, int64_t last, const unsigned char *mask) {
    int mixed = 0;
    int64_t n = last - unit;
    const int64_t position = fbn_position(s, unit, 0);
    if (mask) n = s->rows ? masked_length(s, mask, unit, last, &mixed) : run_of(mask + position, n, s->inner);
    return (fbn_tile){
        .unit = unit, .rows = n, .counts = !mask || mask[position], .mixed = mixed, .next_unit = unit + n};
}

/* Positions of one plane that follow each other, or whole planes whose positions are all treated alike. */
static fbn_tile positions_at(const fbn_split *s, int64_t unit, int64_t from, int64_t last, const unsigned char *mask) {
    const unsigned char *of_unit = mask + fbn_position(s, unit, 0);
    const int64_t length = length_of(s, unit), most = s->cuts == 1 ? smaller(FBN_IMAGES, last - unit) : 1;
    int mixed;
    const int64_t n = masked_length(s, of_unit, from, length, &mixed);
    const int ends = from + n == length, whole = n == length && !mixed;
    const int64_t images = whole ? run_of(of_unit, most * length, 1) / length : 1;
    return (fbn_tile){.unit = unit,
                      .from = from,
                      .planes = {images, s->channels * s->inner, 0, s->inner, n},
                      .counts = of_unit[from] != 0,
                      .mixed = mixed,
                      .next_unit = unit + (ends ? images : 0),
                      .next_from = ends ? 0 : from + n};
}

static fbn_tile planes_at(const fbn_split *s, int64_t unit, int64_t last) {
    const int64_t start = fbn_start(s, unit, 0), length = length_of(s, unit);
    const int64_t apart = unit + 1 < last ? fbn_start(s, unit + 1, 0) - start : 0;
    int64_t n = 1;
    while (n < FBN_IMAGES && unit + n < last && length_of(s, unit + n) == length &&
           fbn_start(s, unit + n, 0) == start + n * apart)
        n++;
    return (fbn_tile){.unit = unit, .planes = {n, apart, 0, s->inner, length}, .counts = 1, .next_unit = unit + n};
}

fbn_tile fbn_tile_at(const fbn_split *s, int64_t unit, int64_t from, int64_t last, const unsigned char *mask) {
    if (s->columns || s->stretches) return rows_at(s, unit, last, mask);
    return mask ? positions_at(s, unit, from, last, mask) : planes_at(s, unit, last);
}
