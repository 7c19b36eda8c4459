/* line.h: what forward and backward share: the line of a channel, and the way of a map through memory. */

/* The constants of one channel (cf), or of a vector of channels (cl). */
typedef struct {
    vec prescale, neg_mean, scale, shift, shift_low;
    real slope;
} NAME(line);

/* The constants from channel c on: channel c's in every lane (period 0), or those of one channel after another. */
FBN_INLINE vec NAME(constant_at)(const void *constants, int64_t c, int64_t period) {
    const real *at = (const real *)constants + c;
    return period ? vget(at) : vset(*at);
}

FBN_INLINE NAME(line) NAME(line_at)(const fbn_line *l, int64_t c, int64_t period) {
    return (NAME(line)){NAME(constant_at)(l->prescale, c, period),  NAME(constant_at)(l->neg_mean, c, period),
                        NAME(constant_at)(l->scale, c, period),     NAME(constant_at)(l->shift, c, period),
                        NAME(constant_at)(l->shift_low, c, period), (real)l->slope};
}

/* The channel of the element that comes n elements after one of channel c. */
FBN_INLINE int64_t NAME(onward)(int64_t c, int64_t n, int64_t period) {
    const int64_t on = c + n;
    return !period ? c : on < period ? on : on < 2 * period ? on - period : on % period;
}

/* x - mean_hi, which is exact where x is near the mean, however large the mean is. */
FBN_INLINE vec NAME(centre)(vec x, const NAME(line) * l) { return vfma(x, l->prescale, l->neg_mean); }

/* z, the argument of the activation. shift_low is added last, since it matters where y is near the shift. A residual
 * may cancel the shift, so the rounding error of their sum is kept (Knuth's two-sum), unless the sum is infinite. */
FBN_INLINE vec NAME(preactivation)(vec x, vec residual, const NAME(line) * l, int has_residual) {
    const vec d = NAME(centre)(x, l);
    if (!has_residual) return vadd(vfma(d, l->scale, l->shift), l->shift_low);
    const vec sum = vadd(l->shift, residual), back = vsub(sum, l->shift);
    const vec lost = vadd(vsub(l->shift, vsub(sum, back)), vsub(residual, back));
    return vadd(vfma(d, l->scale, sum), vzero_nan(vadd(lost, l->shift_low)));
}

/* n <= WIDTH elements, followed by zeros. In loops, n is the constant WIDTH. */
FBN_INLINE vec NAME(load)(const elem *p, int64_t n) { return n == WIDTH ? vload(p) : vload_n(p, n, vset(0)); }

FBN_INLINE int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* The number of elements from p to the first address that is a multiple of `multiple` elements. */
FBN_INLINE int64_t NAME(up_to)(const elem *p, uint64_t multiple) {
    return (int64_t)(-((uintptr_t)p / sizeof(elem)) % multiple);
}
FBN_INLINE int64_t NAME(misaligned)(const elem *p) { return NAME(up_to)(p, WIDTH); }

/* The number of elements before a plane's first aligned vector; 0 if aligning does not pay. */
FBN_INLINE int64_t NAME(head)(const elem *p, int64_t length, int stream) {
    return stream || length >= 4 * WIDTH ? NAME(misaligned)(p) : 0;
}

/* The memory of a map: `streams` times `count` runs of `length` contiguous elements. The runs of a stream start `step`
 * elements apart. Streams start `apart` elements apart, and take turns. A run is a plane (period 0), or rows, in which
 * the channels recur after `period` elements. */
typedef struct {
    int64_t count, step, length, streams, apart, period;
} NAME(runs);

FBN_INLINE NAME(runs) NAME(runs_of_planes)(fbn_planes p) {
    return (NAME(runs)){p.channels, p.step, p.inner, p.images, p.apart, 0};
}

/* Rows are one run, in one stream or in FBN_STREAMS streams of the same length. */
FBN_INLINE NAME(runs) NAME(runs_of_rows)(int64_t rows, int64_t channels) {
    const int64_t streams = rows % FBN_STREAMS ? 1 : FBN_STREAMS, length = rows / streams * channels;
    return (NAME(runs)){1, length, length, streams, length, channels};
}

/* The constants of a vector whose first `left` elements are of channel c. It may reach into the next channels of the
 * same runs. The constants of other channels are not read, since another thread may be writing them. */
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

/* The same without a branch, for a vector of at most two channels. */
FBN_INLINE vec NAME(constant_of_two)(const void *constants, int64_t c, int64_t left, const NAME(runs) * r) {
    const int64_t next = c + 1 < r->count ? c + 1 : c;
    return vjoin(NAME(constant_at)(constants, c, 0), NAME(constant_at)(constants, next, 0), left);
}

FBN_INLINE NAME(line) NAME(line_of_two)(const fbn_line *l, int64_t c, int64_t left, const NAME(runs) * r) {
    return (NAME(line)){NAME(constant_of_two)(l->prescale, c, left, r),  NAME(constant_of_two)(l->neg_mean, c, left, r),
                        NAME(constant_of_two)(l->scale, c, left, r),     NAME(constant_of_two)(l->shift, c, left, r),
                        NAME(constant_of_two)(l->shift_low, c, left, r), (real)l->slope};
}

/* The number of elements in a cache line. Streams should write whole lines: writing a part of one is much slower. */
enum { NAME(LINE) = 64 / sizeof(elem) };

/* Whether planes are so small, and so far from whole vectors, that vectors should reach from one into the next. */
FBN_INLINE int NAME(joins)(const NAME(runs) * r, int stream) {
    return r->count > 1 && r->step == r->length && (stream || r->length > 2 * WIDTH) && r->length < FBN_SMALL_PLANE &&
           r->length % (stream ? (int64_t)NAME(LINE) : WIDTH);
}

/* The number of elements in a turn. There is one turn if the data is in the cache, if streams differ in alignment, or
 * if so much is computed that one stream is fast enough. */
FBN_INLINE int64_t NAME(turn)(const NAME(runs) * r, int stream, int activation, int64_t length) {
    const int computes = activation == FBN_SILU || activation == FBN_SIGMOID;
    const int in_turns = stream && r->streams > 1 && r->apart % NAME(LINE) == 0 && !computes;
    return in_turns ? (int64_t)(FBN_TURN / sizeof(elem)) : length;
}

/* The number of elements in the first turn, from p on. The other turns begin with a cache line. */
FBN_INLINE int64_t NAME(first_turn)(const elem *p, int64_t turn, int64_t length) {
    return NAME(least)(NAME(up_to)(p, NAME(LINE)) + turn, length);
}

/* The number of elements in whole vectors, of `length` elements from channel c on, until the channels recur. */
FBN_INLINE int64_t NAME(vectors)(int64_t length, int64_t c, int64_t period) {
    const int64_t whole = length / WIDTH * WIDTH;
    return period ? NAME(least)(whole, (period - c + WIDTH - 1) / WIDTH * WIDTH) : whole;
}
