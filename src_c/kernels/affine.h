/* affine.h: y from x, the forward map. */

FBN_INLINE vec NAME(affine_at)(const fbn_affine *a, int64_t i, int64_t n, const NAME(line) * l, int activation,
                               int has_residual) {
    const elem *x = (const elem *)a->x + i;
    if (n == WIDTH) prefetch((const char *)x + FBN_AHEAD);
    const vec zero = vset(0);
    const vec v = n == WIDTH ? vload(x) : vload_n(x, n, zero);
    const elem *residual = has_residual ? (const elem *)a->residual + i : x;
    const vec r = !has_residual ? zero : n == WIDTH ? vload(residual) : vload_n(residual, n, zero);
    return NAME(activate)(NAME(preactivation)(v, r, l, has_residual), l, activation);
}

FBN_INLINE void NAME(affine_put)(elem *y, vec v, int64_t n, int stream) {
    if (n < WIDTH) vstore_n(y, v, n);
    else if (stream) vstream(y, v);
    else vstore(y, v);
}

/* Elements [i, end), contiguous, from channel c on: all of that channel (period 0), or of the next channel each, which
 * recur after `period`. */
FBN_INLINE void NAME(affine_run)(const fbn_affine *a, int64_t i, int64_t end, int64_t c, int64_t period, int activation,
                                 int has_residual) {
    elem *y = a->y;
    NAME(line) l = NAME(line_at)(&a->line, c, period);
    const int64_t head = NAME(least)(NAME(misaligned)(y + i), end - i);
    if (head) {
        vstore_n(y + i, NAME(affine_at)(a, i, head, &l, activation, has_residual), head);
        i += head;
        c = NAME(onward)(c, head, period);
    }
    for (int64_t n; i + WIDTH <= end; i += n, c = NAME(onward)(c, n, period)) {
        n = NAME(vectors)(end - i, c, period);
        for (int64_t k = 0; k < n; k += WIDTH) {
            if (period) l = NAME(line_at)(&a->line, c + k, period);
            NAME(affine_put)(y + i + k, NAME(affine_at)(a, i + k, WIDTH, &l, activation, has_residual), WIDTH,
                             a->stream);
        }
    }
    if (i == end) return;
    if (period) l = NAME(line_at)(&a->line, c, period);
    vstore_n(y + i, NAME(affine_at)(a, i, end - i, &l, activation, has_residual), end - i);
}

/* Elements [at, end) of planes that touch, one channel each; the first is element i of their run. */
FBN_INLINE void NAME(affine_joined)(const fbn_affine *a, NAME(runs) r, int64_t at, int64_t end, int64_t i,
                                    int activation, int has_residual) {
    int64_t c = i / r.length, left = (c + 1) * r.length - i, n = NAME(first)((elem *)a->y + at, end - at);
    while (at < end) {
        const NAME(line) l = NAME(line_over)(&a->line, c, left, r);
        do {
            NAME(affine_put)((elem *)a->y + at, NAME(affine_at)(a, at, n, &l, activation, has_residual), n, a->stream);
            at += n;
            left -= n;
            n = NAME(least)(WIDTH, end - at);
        } while (left >= WIDTH && n == WIDTH);
        for (; left <= 0; left += r.length) c++;
    }
}

/* The streams of one run, from channel c on; or of all runs, joined. */
FBN_INLINE void NAME(affine_turns)(const fbn_affine *a, NAME(runs) r, int joined, int64_t c, int64_t period,
                                   int activation, int has_residual) {
    const int64_t start = period || joined ? 0 : c * r.step, length = joined ? r.count * r.length : r.length;
    const int64_t turn = NAME(turn)(r, a->stream, activation, length);
    int64_t n = NAME(first_turn)((elem *)a->y + start, turn, length);
    for (int64_t i = 0; i < length; i += n, n = NAME(least)(turn, length - i)) {
        for (int64_t k = 0, at = start + i; k < r.streams; k++, at += r.apart)
            if (joined) NAME(affine_joined)(a, r, at, at + n, i, activation, has_residual);
            else NAME(affine_run)(a, at, at + n, c, period, activation, has_residual);
        c = NAME(onward)(c, n, period);
    }
}

FBN_INLINE void NAME(affine_runs)(fbn_affine a, NAME(runs) r, int64_t period, int activation, int has_residual) {
    if (!period && NAME(joins)(r, a.stream)) NAME(affine_turns)(&a, r, 1, 0, 0, activation, has_residual);
    else
        for (int64_t c = 0; c < r.count; c++) NAME(affine_turns)(&a, r, 0, c, period, activation, has_residual);
}

/* cf: a run for each channel (period 0). cl: runs that hold every channel, period after period. */
FBN_INLINE void NAME(affine_call)(const fbn_affine *a, NAME(runs) r, int64_t period) {
    switch (OWN_LOOPS ? (int)a->activation : -1) {
    case FBN_IDENTITY:
        if (a->residual) NAME(affine_runs)(*a, r, period, FBN_IDENTITY, 1);
        else NAME(affine_runs)(*a, r, period, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (a->residual) NAME(affine_runs)(*a, r, period, FBN_RELU, 1);
        else NAME(affine_runs)(*a, r, period, FBN_RELU, 0);
        break;
    case FBN_SILU:
        NAME(affine_runs)(*a, r, period, FBN_SILU, a->residual != NULL);
        break;
    case FBN_SIGMOID:
        NAME(affine_runs)(*a, r, period, FBN_SIGMOID, a->residual != NULL);
        break;
    default:
        NAME(affine_runs)(*a, r, period, (int)a->activation | NAME(ANY), a->residual != NULL);
    }
    if (a->stream) stream_fence();
}

static void NAME(affine_cf)(const fbn_affine *a, fbn_planes planes) {
    NAME(affine_call)(a, NAME(runs_of_planes)(planes), 0);
}

static void NAME(affine_cl)(const fbn_affine *a, int64_t rows, int64_t channels) {
    NAME(affine_call)(a, NAME(runs_of_rows)(rows, channels), channels);
}
