/* split.c: segments, blocks and tiles, from the shape, the caches and the number of threads. */
#include "split.h"

#include "values.h"

enum {
    SEGMENT = 32768,      /* the least values of a channel in a channels-first segment; those in a cut plane's piece */
    SEGMENT_ROWS = 128,   /* the least rows in a channels-last segment */
    SEGMENTS_MOST = 64,   /* the most channels-last segments */
    BLOCK_CHANNELS = 64,  /* the most channels in a channels-first block */
    IMAGES = 8,           /* planes of a channel that a kernel gets at once */
    CHUNK_BYTES = 262144, /* bytes of rows that are mapped at a time */
    CHANNELS_TO_SHARE = 16384, /* from so many channels on, threads share what is done once per channel */
    PART_OF_CACHE = 8          /* a result larger than this part of the shared cache is written around it */
};

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

/* Channels in a block: as many as fill a third of a core's cache, which leaves room for what is fetched ahead and for
 * the results. */
static int64_t block_of(const fbn_split *s, int64_t core_cache, int arrays) {
    const int64_t channel = s->outer * s->inner * s->elem * arrays, fit = core_cache / 3 / larger(channel, 1);
    if (s->rows) return s->channels;
    if (s->cuts > 1) return 1;
    const int64_t most = smaller(smaller(divide_up(s->channels, s->threads), fit), BLOCK_CHANNELS);
    return most >= FBN_CHANNEL_PAD ? most / FBN_CHANNEL_PAD * FBN_CHANNEL_PAD : larger(1, most);
}

/* Going block by block saves memory traffic, but the blocks must divide well among the threads: at most two
 * sevenths of the threads' time may be lost. */
static int by_channels(const fbn_split *s) {
    if (s->rows) return 0; /* one block has all the channels, and perhaps there are none */
    const int64_t blocks = divide_up(s->channels, s->block);
    return 5 * divide_up(blocks, s->threads) * s->threads <= 7 * blocks;
}

/* There is room on the left as well, since the constants of rows start at any place in a cache line (see job_of). */
int64_t fbn_padded(int64_t channels) { return round_up(channels, FBN_CHANNEL_PAD) + 2 * FBN_CHANNEL_PAD; }

fbn_split fbn_split_of(const fbn_problem *p, int arrays) {
    fbn_split s = {.outer = p->outer, .channels = p->channels, .inner = p->inner};
    const int64_t values = p->outer * p->channels * p->inner;
    s.rows = p->inner == 1;
    s.real = p->dtype == FBN_F64 ? 8 : 4;
    s.elem = (int64_t)fbn_element(p->dtype);
    s.cut = p->inner <= 2 * SEGMENT ? p->inner : SEGMENT;
    s.cuts = s.rows ? 1 : divide_up(p->inner, larger(s.cut, 1));
    s.units = p->outer * s.cuts;
    s.segment =
        s.rows ? larger(SEGMENT_ROWS, divide_up(s.units, SEGMENTS_MOST)) : larger(IMAGES, SEGMENT / larger(s.cut, 1));
    s.segments = larger(1, divide_up(s.units, s.segment));
    s.padded = fbn_padded(p->channels);
    s.threads = (int)larger(1, smaller(p->threads, values / FBN_WORK_PER_THREAD));
    s.block = block_of(&s, p->machine->core_cache, arrays);
    s.by_channels = by_channels(&s);
    s.shares_channels = p->channels >= CHANNELS_TO_SHARE;
    s.large = values * s.elem > p->machine->shared_cache / PART_OF_CACHE;
    return s;
}

int64_t fbn_lane_doubles(const fbn_split *s) { return s->rows ? 0 : s->block * 2 * FBN_LANES; }

int64_t fbn_start(const fbn_split *s, int64_t unit, int64_t c) {
    const int64_t plane = unit / s->cuts, cut = unit % s->cuts;
    return (plane * s->channels + c) * s->inner + cut * s->cut;
}

int64_t fbn_chunk(const fbn_split *s, int64_t n) {
    return s->rows ? round_up(divide_up(CHUNK_BYTES, n * s->elem), FBN_STREAMS) : IMAGES;
}

/* The elements in a unit, of one channel. */
static int64_t length_of(const fbn_split *s, int64_t unit) {
    return smaller(s->cut, s->inner - unit % s->cuts * s->cut);
}

static fbn_tile rows_at(int64_t unit, int64_t last, const unsigned char *mask) {
    int64_t next = last;
    if (mask)
        for (next = unit + 1; next < last && !mask[next] == !mask[unit];) next++;
    return (fbn_tile){.unit = unit, .rows = next - unit, .counts = !mask || mask[unit], .next_unit = next};
}

/* Positions of one plane that follow each other and all have the same mask. */
static fbn_tile positions_at(const fbn_split *s, int64_t unit, int64_t from, const unsigned char *mask) {
    const int64_t length = length_of(s, unit);
    const unsigned char *of_unit = mask + unit / s->cuts * s->inner + unit % s->cuts * s->cut;
    int64_t to = from + 1;
    while (to < length && !of_unit[to] == !of_unit[from]) to++;
    const int ends = to == length;
    return (fbn_tile){.unit = unit,
                      .from = from,
                      .planes = {1, 0, 0, s->inner, to - from},
                      .counts = of_unit[from] != 0,
                      .next_unit = unit + ends,
                      .next_from = ends ? 0 : to};
}

static fbn_tile planes_at(const fbn_split *s, int64_t unit, int64_t last) {
    const int64_t start = fbn_start(s, unit, 0), length = length_of(s, unit);
    const int64_t apart = unit + 1 < last ? fbn_start(s, unit + 1, 0) - start : 0;
    int64_t n = 1;
    while (n < IMAGES && unit + n < last && length_of(s, unit + n) == length &&
           fbn_start(s, unit + n, 0) == start + n * apart)
        n++;
    return (fbn_tile){.unit = unit, .planes = {n, apart, 0, s->inner, length}, .counts = 1, .next_unit = unit + n};
}

fbn_tile fbn_tile_at(const fbn_split *s, int64_t unit, int64_t from, int64_t last, const unsigned char *mask) {
    if (s->rows) return rows_at(unit, last, mask);
    return mask ? positions_at(s, unit, from, mask) : planes_at(s, unit, last);
}
