/* map.h: the maps: y from x, and dx (and the residual's gradient) from dy and x. */

FBN_INLINE void NAME(put)(elem *to, vec v, int64_t n, int stream) {
    if (n < WIDTH) vstore_n(to, v, n);
    else if (stream) vstream(to, v);
    else vstore(to, v);
}

/* Maps n <= WIDTH elements from element i on. */
FBN_INLINE void NAME(affine_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p) {
    const vec r = p.has_residual ? NAME(load)((const elem *)o->residual + i, n) : vset(0);
    const vec z = NAME(preactivation)(NAME(load)((const elem *)o->x + i, n), r, k, p);
    NAME(put)((elem *)o->out + i, NAME(activate)(z, k->slope, p.activation), n, o->stream);
}

FBN_INLINE void NAME(grad_affine_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k,
                                    NAME(parts) p) {
    const elem *x = (const elem *)o->x + i, *residual = p.has_residual ? (const elem *)o->residual + i : x;
    vec dz = NAME(dz_at)((const elem *)o->dy + i, x, residual, n, k, p), d;
    if (p.frozen) d = vmul(k->on_dy, dz);
    else {
        const vec centred = NAME(centre)(NAME(x_at)(x, residual, n, k, p), k, p);
        d = vfma(k->on_x, centred, vfma(k->on_dy, dz, k->constant));
    }
    if (!p.usual) d = vmul(d, k->postscale);
    if (p.activation & FBN_OUTSIDE) {
        const vec size = NAME(size_at)((const elem *)o->dy + i, n);
        dz = vkeep_if_positive(size, dz);
        d = vkeep_if_positive(size, d);
    }
    /* dx may be dy, which is not read after this. */
    NAME(put)((elem *)o->out + i, d, n, o->stream);
    if (p.has_residual && p.activation & FBN_WHICH) NAME(put)((elem *)o->dresidual + i, dz, n, 0);
}

FBN_INLINE void NAME(map_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p,
                            int backward) {
    if (backward) NAME(grad_affine_n)(o, i, n, k, p);
    else NAME(affine_n)(o, i, n, k, p);
}

/* Maps a part of a vector, from column c on or of channel c. */
FBN_APART void NAME(affine_part)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int each) {
    const NAME(constants) k = NAME(constants_at)(o, c, each, NAME(any_parts)(o));
    NAME(affine_n)(o, i, n, &k, NAME(any_parts)(o));
}
FBN_APART void NAME(grad_affine_part)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int each) {
    const NAME(constants) k = NAME(constants_at)(o, c, each, NAME(any_parts)(o));
    NAME(grad_affine_n)(o, i, n, &k, NAME(any_parts)(o));
}
FBN_INLINE void NAME(map_part)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int each, int backward) {
    if (n == 0) return;
    if (backward) NAME(grad_affine_part)(o, i, n, c, each);
    else NAME(affine_part)(o, i, n, c, each);
}

/* The number of elements from element i of the result to the first that is a multiple of `multiple` from address 0. */
FBN_INLINE int64_t NAME(up_to)(const fbn_operands *o, int64_t i, uint64_t multiple) {
    return (int64_t)(-((uintptr_t)((elem *)o->out + i) / sizeof(elem)) % multiple);
}

/* The number of elements in a cache line. Streams should write whole lines: writing a part of one is much slower. */
enum { NAME(LINE) = 64 / sizeof(elem) };

/* ---- columns ---- */

/* The column of the element that comes n elements after one of column c. */
FBN_INLINE int64_t NAME(onward)(int64_t c, int64_t n, int64_t period) {
    const int64_t on = c + n;
    return on < period ? on : on < 2 * period ? on - period : on % period;
}

/* Maps the elements [at, end), from column c on. */
FBN_INLINE void NAME(map_run)(const fbn_operands *o, int64_t at, int64_t end, int64_t c, int64_t period, NAME(parts) p,
                              int backward) {
    const int64_t head = NAME(least)(NAME(up_to)(o, at, WIDTH), end - at);
    NAME(map_part)(o, at, head, c, 1, backward);
    at += head;
    c = NAME(onward)(c, head, period);
    while (at + WIDTH <= end) {
        const int64_t recur = (period - c + WIDTH - 1) / WIDTH * WIDTH;
        const int64_t n = NAME(least)((end - at) / WIDTH * WIDTH, recur);
        for (int64_t i = 0; i < n; i += WIDTH) {
            const NAME(constants) k = NAME(constants_at)(o, c + i, 1, p);
            NAME(map_n)(o, at + i, WIDTH, &k, p, backward);
        }
        at += n;
        c = NAME(onward)(c, n, period);
    }
    NAME(map_part)(o, at, end - at, c, 1, backward);
}

/* Maps `streams` runs in turns. The first turn ends where a cache line does. */
FBN_INLINE void NAME(map_streams)(const fbn_operands *o, int64_t start, int64_t streams, int64_t apart, int64_t length,
                                  int64_t period, NAME(parts) p, int backward) {
    const int64_t turn = NAME(turn)(o, streams, length), ahead = o->walk.ahead / (int64_t)sizeof(elem);
    int64_t n = NAME(least)(NAME(up_to)(o, start, NAME(LINE)) + turn, length);
    for (int64_t i = 0; i < length; i += n, n = NAME(least)(turn, length - i))
        for (int64_t s = 0; s < streams; s++) {
            const int64_t at = start + s * apart + i;
            if (ahead) NAME(fetch)(o, at + ahead, n);
            NAME(map_run)(o, at, at + n, i % period, period, p, backward);
        }
}

/* A long run is mapped in parts of whole periods, as streams, and then what is left of it. */
FBN_INLINE void NAME(map_all_runs)(const fbn_operands *o, fbn_runs r, NAME(parts) p, int backward) {
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    const int64_t periods = r.length / r.period, most = r.count > 1 ? r.count : periods >= 64 ? FBN_ROW_STREAMS : 1;
    int64_t streams = NAME(streams)(o, most), part = r.count > 1 ? r.apart : periods / streams * r.period;
    if (part % NAME(LINE)) streams = 1, part = r.length;
    if (r.count == 1) {
        NAME(map_streams)(&own, 0, streams, part, part, r.period, p, backward);
        if (streams * part < r.length) NAME(map_run)(&own, streams * part, r.length, 0, r.period, p, backward);
    } else
        for (int64_t i = 0; i < r.count; i += streams)
            NAME(map_streams)(&own, i * r.apart, NAME(least)(streams, r.count - i), r.apart, r.length, r.period, p,
                              backward);
}

/* ---- planes ---- */

/* Maps the elements [at, end) of channel c, whose constants are k. */
FBN_INLINE void NAME(map_plane)(const fbn_operands *o, int64_t at, int64_t end, int64_t c, const NAME(constants) * k,
                                NAME(parts) p, int backward) {
    const int aligns = o->stream || end - at >= 4 * WIDTH;
    const int64_t head = aligns ? NAME(least)(NAME(up_to)(o, at, WIDTH), end - at) : 0;
    NAME(map_part)(o, at, head, c, 0, backward);
    for (at += head; at + WIDTH <= end; at += WIDTH) NAME(map_n)(o, at, WIDTH, k, p, backward);
    NAME(map_part)(o, at, end - at, c, 0, backward);
}

FBN_INLINE void NAME(map_all_planes)(const fbn_operands *o, fbn_planes r, NAME(parts) p, int backward) {
    const fbn_operands own = *o; /* see map_all_runs */
    const int64_t most = r.apart % NAME(LINE) ? 1 : r.images, streams = NAME(streams)(o, most);
    const int64_t turn = NAME(turn)(o, streams, r.inner), ahead = o->walk.ahead / (int64_t)sizeof(elem);
    for (int64_t c = 0; c < r.channels; c++) {
        const NAME(constants) k = NAME(constants_at)(o, c, 0, p);
        const int64_t start = c * r.step, first = NAME(up_to)(o, start, NAME(LINE)) + turn;
        for (int64_t image = 0; image < r.images; image += streams)
            for (int64_t i = 0, n = NAME(least)(first, r.inner); i < r.inner; i += n, n = NAME(least)(turn, r.inner - i))
                for (int64_t s = image; s < NAME(least)(image + streams, r.images); s++) {
                    const int64_t at = start + s * r.apart + i;
                    if (ahead) NAME(fetch)(o, at + ahead, n);
                    NAME(map_plane)(&own, at, at + n, c, &k, p, backward);
                }
    }
}

/* ---- which loop serves a call ---- */

FBN_INLINE void NAME(map_as)(const fbn_operands *o, const NAME(where) * w, int activation, int has_residual, int exact,
                             int frozen, int backward) {
    const int any = activation & NAME(ANY);
    const NAME(parts) p = {activation, has_residual, any ? o->usual : 1, any ? o->exact : exact, frozen};
    if (w->columns) NAME(map_all_runs)(o, w->runs, p, backward);
    else NAME(map_all_planes)(o, w->planes, p, backward);
}

FBN_INLINE void NAME(affine)(const fbn_operands *o, const NAME(where) * w) {
    const int exact = w->columns && o->exact; /* among planes the loop is as fast without it */
    switch (OWN_LOOPS && o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        if (o->residual) NAME(map_as)(o, w, FBN_IDENTITY, 1, 0, 0, 0);
        else if (exact) NAME(map_as)(o, w, FBN_IDENTITY, 0, 1, 0, 0);
        else NAME(map_as)(o, w, FBN_IDENTITY, 0, 0, 0, 0);
        break;
    case FBN_RELU:
        if (o->residual) NAME(map_as)(o, w, FBN_RELU, 1, 0, 0, 0);
        else if (exact) NAME(map_as)(o, w, FBN_RELU, 0, 1, 0, 0);
        else NAME(map_as)(o, w, FBN_RELU, 0, 0, 0, 0);
        break;
    case FBN_SILU:
        NAME(map_as)(o, w, FBN_SILU, o->residual != NULL, 0, 0, 0);
        break;
    case FBN_SIGMOID:
        NAME(map_as)(o, w, FBN_SIGMOID, o->residual != NULL, 0, 0, 0);
        break;
    default:
        NAME(map_as)(o, w, o->activation | NAME(ANY), o->residual != NULL, 0, 0, 0);
    }
    if (o->stream) stream_fence();
}

FBN_INLINE void NAME(grad_affine)(const fbn_operands *o, const NAME(where) * w) {
    switch (OWN_LOOPS && o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        if (o->frozen) NAME(map_as)(o, w, FBN_IDENTITY, 0, 0, 1, 1);
        else NAME(map_as)(o, w, FBN_IDENTITY, 0, 0, 0, 1);
        break;
    case FBN_RELU:
        if (o->frozen && o->residual) NAME(map_as)(o, w, FBN_RELU, 1, 0, 1, 1);
        else if (o->frozen) NAME(map_as)(o, w, FBN_RELU, 0, 0, 1, 1);
        else if (o->residual) NAME(map_as)(o, w, FBN_RELU, 1, 0, 0, 1);
        else NAME(map_as)(o, w, FBN_RELU, 0, 0, 0, 1);
        break;
    case FBN_SILU:
        NAME(map_as)(o, w, FBN_SILU, o->residual != NULL, 0, o->frozen, 1);
        break;
    case FBN_SIGMOID:
        NAME(map_as)(o, w, FBN_SIGMOID, o->residual != NULL, 0, o->frozen, 1);
        break;
    default:
        NAME(map_as)(o, w, o->activation | NAME(ANY), o->residual != NULL, 0, o->frozen, 1);
    }
    if (o->stream) stream_fence();
}

static void NAME(affine_planes)(const fbn_operands *o, fbn_planes planes) {
    NAME(affine)(o, &(NAME(where)){.planes = planes});
}
static void NAME(affine_columns)(const fbn_operands *o, fbn_runs runs) {
    NAME(affine)(o, &(NAME(where)){.columns = 1, .runs = runs});
}
static void NAME(grad_affine_planes)(const fbn_operands *o, fbn_planes planes) {
    NAME(grad_affine)(o, &(NAME(where)){.planes = planes});
}
static void NAME(grad_affine_columns)(const fbn_operands *o, fbn_runs runs) {
    NAME(grad_affine)(o, &(NAME(where)){.columns = 1, .runs = runs});
}
