/* line.h: one vector of a channel's straight line, the part that forward and backward share. */

/* A channel's (cf) or a vector of channels' (cl) constants. */
typedef struct {
    vec prescale, neg_mean, scale, shift, shift_low;
    real slope;
} NAME(line);

/* Constants from channel c on: of that channel in every lane (period 0), or of the next channel in each. */
FBN_INLINE vec NAME(constant_at)(const void *constants, int64_t c, int64_t period) {
    const real *at = (const real *)constants + c;
    return period ? vget(at) : vset(*at);
}

FBN_INLINE NAME(line) NAME(line_at)(const fbn_line *l, int64_t c, int64_t period) {
    return (NAME(line)){NAME(constant_at)(l->prescale, c, period),  NAME(constant_at)(l->neg_mean, c, period),
                        NAME(constant_at)(l->scale, c, period),     NAME(constant_at)(l->shift, c, period),
                        NAME(constant_at)(l->shift_low, c, period), (real)l->slope};
}

/* The channel that is n elements on. */
FBN_INLINE int64_t NAME(onward)(int64_t c, int64_t n, int64_t period) {
    const int64_t on = c + n;
    return !period ? c : on < period ? on : on < 2 * period ? on - period : on % period;
}

/* x - mean_hi: exact where x is near the mean, whatever the offset. */
FBN_INLINE vec NAME(centre)(vec x, const NAME(line) * l) { return vfma(x, l->prescale, l->neg_mean); }

/* What the activation gets. shift_low is added last: y is near the shift where that matters. A residual may cancel the
 * shift, so their sum keeps what its rounding loses (Knuth's two-sum); where the sum is infinite there is nothing to
 * keep. */
FBN_INLINE vec NAME(preactivation)(vec x, vec residual, const NAME(line) * l, int has_residual) {
    const vec d = NAME(centre)(x, l);
    if (!has_residual) return vadd(vfma(d, l->scale, l->shift), l->shift_low);
    const vec sum = vadd(l->shift, residual), back = vsub(sum, l->shift);
    const vec lost = vadd(vsub(l->shift, vsub(sum, back)), vsub(residual, back));
    return vadd(vfma(d, l->scale, sum), vzero_nan(vadd(lost, l->shift_low)));
}

/* The first n elements, and 0: n is WIDTH itself, which the compiler knows, in all loops. */
FBN_INLINE vec NAME(load)(const elem *p, int64_t n) { return n == WIDTH ? vload(p) : vload_n(p, n, vset(0)); }

FBN_INLINE int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements from p to the first address that is a multiple of so many elements. */
FBN_INLINE int64_t NAME(up_to)(const elem *p, uint64_t multiple) {
    return (int64_t)(-((uintptr_t)p / sizeof(elem)) % multiple);
}
FBN_INLINE int64_t NAME(misaligned)(const elem *p) { return NAME(up_to)(p, WIDTH); }

/* Elements before the first vector of a plane: none where it is not worth it. */
FBN_INLINE int64_t NAME(head)(const elem *p, int64_t length, int stream) {
    return stream || length >= 4 * WIDTH ? NAME(misaligned)(p) : 0;
}

/* What a map goes through: `count` runs of `length` contiguous elements, `step` from one to the next, and that
 * `streams` times, `apart` from one to the next, in turns. A run is a channel (period 0), or rows in which the channels
 * recur after `period`. */
typedef struct {
    int64_t count, step, length, streams, apart, period;
} NAME(runs);

FBN_INLINE NAME(runs) NAME(runs_of_planes)(fbn_planes p) {
    return (NAME(runs)){p.channels, p.step, p.inner, p.images, p.apart, 0};
}

/* Rows are one run, or FBN_STREAMS of a length. */
FBN_INLINE NAME(runs) NAME(runs_of_rows)(int64_t rows, int64_t channels) {
    const int64_t streams = rows % FBN_STREAMS ? 1 : FBN_STREAMS, length = rows / streams * channels;
    return (NAME(runs)){1, length, length, streams, length, channels};
}

/* Constants of the vector from channel c on, of which it holds `left` elements: it may run into the next channels of
 * the same runs. Those of other runs are not looked at: another thread may be writing their constants. */
FBN_INLINE vec NAME(constant_over)(const void *constants, int64_t c, int64_t left, const NAME(runs) * r) {
    vec v = NAME(constant_at)(constants, c, r->period);
    if (r->period) return v;
    for (; left < WIDTH && c + 1 < r->count; left += r->length)
        v = vjoin(v, NAME(constant_at)(constants, ++c, 0), left);
    return v;
}

FBN_INLINE NAME(line) NAME(line_over)(const fbn_line *l, int64_t c, int64_t left, const NAME(runs) * r) {
    return (NAME(line)){NAME(constant_over)(l->prescale, c, left, r),  NAME(constant_over)(l->neg_mean, c, left, r),
                        NAME(constant_over)(l->scale, c, left, r),     NAME(constant_over)(l->shift, c, left, r),
                        NAME(constant_over)(l->shift_low, c, left, r), (real)l->slope};
}

/* The same where the vector holds two channels at most, and without a branch. */
FBN_INLINE vec NAME(constant_of_two)(const void *constants, int64_t c, int64_t left, const NAME(runs) * r) {
    const int64_t next = c + 1 < r->count ? c + 1 : c;
    return vjoin(NAME(constant_at)(constants, c, 0), NAME(constant_at)(constants, next, 0), left);
}

FBN_INLINE NAME(line) NAME(line_of_two)(const fbn_line *l, int64_t c, int64_t left, const NAME(runs) * r) {
    return (NAME(line)){NAME(constant_of_two)(l->prescale, c, left, r),  NAME(constant_of_two)(l->neg_mean, c, left, r),
                        NAME(constant_of_two)(l->scale, c, left, r),     NAME(constant_of_two)(l->shift, c, left, r),
                        NAME(constant_of_two)(l->shift_low, c, left, r), (real)l->slope};
}

/* Elements of a cache line. What is streamed should be whole ones: memory takes a part of one much more slowly. */
enum { NAME(LINE) = 64 / sizeof(elem) };

/* Whether planes are so small, and their ends so ragged, that vectors should run on from one into the next. */
FBN_INLINE int NAME(joins)(const NAME(runs) * r, int stream) {
    return r->count > 1 && r->step == r->length && (stream || r->length > 2 * WIDTH) && r->length < FBN_SMALL_PLANE &&
           r->length % (stream ? (int64_t)NAME(LINE) : WIDTH);
}

/* Elements of a turn: all that there are, where the data is in the cache, the streams do not share their alignment, or
 * so much is computed that one stream keeps up. */
FBN_INLINE int64_t NAME(turn)(const NAME(runs) * r, int stream, int activation, int64_t length) {
    const int computes = activation == FBN_SILU || activation == FBN_SIGMOID;
    const int in_turns = stream && r->streams > 1 && r->apart % NAME(LINE) == 0 && !computes;
    return in_turns ? (int64_t)(FBN_TURN / sizeof(elem)) : length;
}

/* Elements of the first turn, from p on: the others start with a cache line. */
FBN_INLINE int64_t NAME(first_turn)(const elem *p, int64_t turn, int64_t length) {
    return NAME(least)(NAME(up_to)(p, NAME(LINE)) + turn, length);
}

/* Elements in the whole vectors of `length` elements from channel c on, until the channels recur. */
FBN_INLINE int64_t NAME(vectors)(int64_t length, int64_t c, int64_t period) {
    const int64_t whole = length / WIDTH * WIDTH;
    return period ? NAME(least)(whole, (period - c + WIDTH - 1) / WIDTH * WIDTH) : whole;
}
