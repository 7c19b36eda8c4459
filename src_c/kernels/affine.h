/* affine.h: y from x, the forward map. */

FBN_INLINE void NAME(affine_put)(elem *y, vec v, int64_t n, int stream) {
    if (n < WIDTH) vstore_n(y, v, n);
    else if (stream) vstream(y, v);
    else vstore(y, v);
}

/* Maps n <= WIDTH elements from element i on. */
FBN_INLINE void NAME(affine_n)(const fbn_affine *a, int64_t i, int64_t n, const NAME(line) * l, int activation,
                               int has_residual) {
    const vec r = has_residual ? NAME(load)((const elem *)a->residual + i, n) : vset(0);
    const vec z = NAME(preactivation)(NAME(load)((const elem *)a->x + i, n), r, l, has_residual);
    NAME(affine_put)((elem *)a->y + i, NAME(activate)(z, l, activation), n, a->stream);
}

/* Maps a whole vector from element i on. */
FBN_INLINE void NAME(affine_at)(const fbn_affine *a, int64_t i, const NAME(line) * l, int activation,
                                int has_residual) {
    prefetch((const char *)((const elem *)a->x + i) + FBN_AHEAD);
    NAME(affine_n)(a, i, WIDTH, l, activation, has_residual);
}

/* Maps n elements from element i on, of which the first `left` are of channel c. One function serves every activation,
 * since its code is long and it maps few elements. */
FBN_APART void NAME(affine_part)(const fbn_affine *a, int64_t i, int64_t n, int64_t c, int64_t left,
                                 const NAME(runs) * r) {
    const NAME(line) l = NAME(line_over)(&a->line, c, left, r);
    NAME(affine_n)(a, i, n, &l, (int)a->activation | NAME(ANY), a->residual != NULL);
}

/* Maps the elements [at, end) of rows, from channel c on. */
FBN_INLINE void NAME(affine_rows)(const fbn_affine *a, const NAME(runs) * r, int64_t at, int64_t end, int64_t c,
                                  int activation, int has_residual) {
    const int64_t head = NAME(least)(NAME(misaligned)((elem *)a->y + at), end - at);
    if (head) NAME(affine_part)(a, at, head, c, WIDTH, r);
    at += head;
    c = NAME(onward)(c, head, r->period);
    for (int64_t n; at + WIDTH <= end; at += n, c = NAME(onward)(c, n, r->period)) {
        n = NAME(vectors)(end - at, c, r->period);
        for (int64_t k = 0; k < n; k += WIDTH) {
            const NAME(line) l = NAME(line_at)(&a->line, c + k, 1);
            NAME(affine_at)(a, at + k, &l, activation, has_residual);
        }
    }
    if (at < end) NAME(affine_part)(a, at, end - at, c, WIDTH, r);
}

/* Maps the elements [at, end) of adjacent planes, of which the first `left` are of channel c. */
FBN_INLINE void NAME(affine_planes)(const fbn_affine *a, const NAME(runs) * r, int64_t at, int64_t end, int64_t c,
                                    int64_t left, int activation, int has_residual) {
    const fbn_affine own = *a; /* no store can change it, so the loop need not read it again */
    const int64_t head = NAME(head)((elem *)a->y + at, end - at, a->stream);
    NAME(line) l = NAME(line_at)(&a->line, c, 0);
    for (int64_t n = NAME(least)(head ? head : WIDTH, end - at); at < end; n = NAME(least)(WIDTH, end - at)) {
        if (n == WIDTH && left >= WIDTH) {
            n = NAME(least)(left, end - at) / WIDTH * WIDTH;
            for (int64_t k = 0; k < n; k += WIDTH) NAME(affine_at)(&own, at + k, &l, activation, has_residual);
        } else if (NAME(is_short)(activation) && (left >= n || left + r->length >= WIDTH)) {
            const NAME(line) part = left < n ? NAME(line_of_two)(&a->line, c, left, r) : l;
            NAME(affine_n)(a, at, n, &part, activation, has_residual);
        } else NAME(affine_part)(a, at, n, c, left, r);
        at += n;
        left -= n;
        if (left > 0 || at == end) continue;
        for (; left <= 0; left += r->length) c++;
        l = NAME(line_at)(&a->line, c, 0);
    }
}

/* Maps the streams of one run, which has channel c (for rows: all channels), or of all runs, joined. */
FBN_INLINE void NAME(affine_turns)(const fbn_affine *a, const NAME(runs) * r, int joined, int64_t c, int rows,
                                   int activation, int has_residual) {
    const int64_t start = c * r->step, length = joined ? r->count * r->length : r->length;
    const int64_t turn = NAME(turn)(r, a->stream, activation, length);
    int64_t n = NAME(first_turn)((elem *)a->y + start, turn, length);
    for (int64_t i = 0; i < length; i += n, n = NAME(least)(turn, length - i)) {
        const int64_t past = joined ? i / r->length : 0, left = (past + 1) * r->length - i;
        for (int64_t k = 0, at = start + i; k < r->streams; k++, at += r->apart)
            if (rows) NAME(affine_rows)(a, r, at, at + n, c, activation, has_residual);
            else NAME(affine_planes)(a, r, at, at + n, c + past, left, activation, has_residual);
        if (rows) c = NAME(onward)(c, n, r->period);
    }
}

FBN_INLINE void NAME(affine_runs)(fbn_affine a, NAME(runs) r, int rows, int activation, int has_residual) {
    const int joined = !rows && NAME(joins)(&r, a.stream);
    const int64_t turns = joined ? 1 : r.count;
    if (!joined) r.count = 1; /* vectors do not reach into the next run */
    for (int64_t c = 0; c < turns; c++) NAME(affine_turns)(&a, &r, joined, c, rows, activation, has_residual);
}

FBN_INLINE void NAME(affine_call)(const fbn_affine *a, NAME(runs) r, int rows) {
    switch (OWN_LOOPS ? (int)a->activation : -1) {
    case FBN_IDENTITY:
        if (a->residual) NAME(affine_runs)(*a, r, rows, FBN_IDENTITY, 1);
        else NAME(affine_runs)(*a, r, rows, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (a->residual) NAME(affine_runs)(*a, r, rows, FBN_RELU, 1);
        else NAME(affine_runs)(*a, r, rows, FBN_RELU, 0);
        break;
    case FBN_SILU:
        NAME(affine_runs)(*a, r, rows, FBN_SILU, a->residual != NULL);
        break;
    case FBN_SIGMOID:
        NAME(affine_runs)(*a, r, rows, FBN_SIGMOID, a->residual != NULL);
        break;
    default:
        NAME(affine_runs)(*a, r, rows, (int)a->activation | NAME(ANY), a->residual != NULL);
    }
    if (a->stream) stream_fence();
}

static void NAME(affine_cf)(const fbn_affine *a, fbn_planes planes) {
    NAME(affine_call)(a, NAME(runs_of_planes)(planes), 0);
}

static void NAME(affine_cl)(const fbn_affine *a, int64_t rows, int64_t channels) {
    NAME(affine_call)(a, NAME(runs_of_rows)(rows, channels), 1);
}
