/* grad_affine.h: dx from dy and x, the backward map, and the residual's gradient beside it. */

/* A channel's (cf) or a vector of channels' (cl) constants. */
typedef struct {
    NAME(line) line;
    vec on_dy, on_x, constant, postscale;
} NAME(slopes);

FBN_INLINE NAME(slopes) NAME(slopes_at)(const fbn_grad_affine *g, int64_t c, int64_t period) {
    return (NAME(slopes)){NAME(line_at)(&g->line, c, period), NAME(constant_at)(g->slopes.on_dy, c, period),
                          NAME(constant_at)(g->slopes.on_x, c, period),
                          NAME(constant_at)(g->slopes.constant, c, period),
                          NAME(constant_at)(g->slopes.postscale, c, period)};
}

FBN_INLINE NAME(slopes) NAME(slopes_over)(const fbn_grad_affine *g, int64_t c, int64_t left, NAME(runs) r) {
    return (NAME(slopes)){NAME(line_over)(&g->line, c, left, r), NAME(constant_over)(g->slopes.on_dy, c, left, r),
                          NAME(constant_over)(g->slopes.on_x, c, left, r),
                          NAME(constant_over)(g->slopes.constant, c, left, r),
                          NAME(constant_over)(g->slopes.postscale, c, left, r)};
}

/* Which of the kernel's parts a call has; every field is a constant where the loops are instantiated for identity
 * and relu. */
typedef struct {
    int activation, has_residual, frozen;
} NAME(grad_parts);

FBN_INLINE void NAME(grad_affine_at)(const fbn_grad_affine *g, int64_t i, int64_t n, const NAME(slopes) * s,
                                     NAME(grad_parts) parts) {
    const elem *x = (const elem *)g->x + i;
    if (n == WIDTH) {
        prefetch((const char *)x + FBN_AHEAD);
        prefetch((const char *)((const elem *)g->dy + i) + FBN_AHEAD);
    }
    const elem *residual = parts.has_residual ? (const elem *)g->residual + i : x;
    vec dz = NAME(dz_at)((const elem *)g->dy + i, x, residual, n, &s->line, parts.activation, parts.has_residual);
    vec d;
    if (parts.frozen) d = vmul(s->on_dy, dz);
    else {
        const vec v = NAME(x_at)(x, residual, n, &s->line, parts.activation, parts.has_residual);
        d = vfma(s->on_x, NAME(centre)(v, &s->line), vfma(s->on_dy, dz, s->constant));
    }
    d = vmul(d, s->postscale);
    if (parts.activation & FBN_OUTSIDE) {
        const vec size = NAME(size_at)((const elem *)g->dy + i, n);
        dz = vkeep_if_positive(size, dz);
        d = vkeep_if_positive(size, d);
    }
    /* dx may be dy, which nobody reads from here on. */
    NAME(affine_put)((elem *)g->dx + i, d, n, g->stream);
    if (!parts.has_residual || !(parts.activation & FBN_WHICH)) return;
    NAME(affine_put)((elem *)g->dresidual + i, dz, n, 0);
}

/* Elements [i, end), as affine_run has them. */
FBN_INLINE void NAME(grad_affine_run)(const fbn_grad_affine *g, int64_t i, int64_t end, int64_t c, int64_t period,
                                      NAME(grad_parts) parts) {
    NAME(slopes) s = NAME(slopes_at)(g, c, period);
    const int64_t head = NAME(least)(NAME(misaligned)((elem *)g->dx + i), end - i);
    if (head) {
        NAME(grad_affine_at)(g, i, head, &s, parts);
        i += head;
        c = NAME(onward)(c, head, period);
    }
    for (int64_t n; i + WIDTH <= end; i += n, c = NAME(onward)(c, n, period)) {
        n = NAME(vectors)(end - i, c, period);
        for (int64_t k = 0; k < n; k += WIDTH) {
            if (period) s = NAME(slopes_at)(g, c + k, period);
            NAME(grad_affine_at)(g, i + k, WIDTH, &s, parts);
        }
    }
    if (i == end) return;
    if (period) s = NAME(slopes_at)(g, c, period);
    NAME(grad_affine_at)(g, i, end - i, &s, parts);
}

/* Elements [at, end) of planes that touch, one channel each; the first is element i of their run. */
FBN_INLINE void NAME(grad_affine_joined)(const fbn_grad_affine *g, NAME(runs) r, int64_t at, int64_t end, int64_t i,
                                         NAME(grad_parts) parts) {
    int64_t c = i / r.length, left = (c + 1) * r.length - i, n = NAME(first)((elem *)g->dx + at, end - at);
    while (at < end) {
        const NAME(slopes) s = NAME(slopes_over)(g, c, left, r);
        do {
            NAME(grad_affine_at)(g, at, n, &s, parts);
            at += n;
            left -= n;
            n = NAME(least)(WIDTH, end - at);
        } while (left >= WIDTH && n == WIDTH);
        for (; left <= 0; left += r.length) c++;
    }
}

/* The streams of one run, from channel c on; or of all runs, joined. */
FBN_INLINE void NAME(grad_affine_turns)(const fbn_grad_affine *g, NAME(runs) r, int joined, int64_t c, int64_t period,
                                        NAME(grad_parts) parts) {
    const int64_t start = period || joined ? 0 : c * r.step, length = joined ? r.count * r.length : r.length;
    const int64_t turn = NAME(turn)(r, g->stream, parts.activation, length);
    int64_t n = NAME(first_turn)((elem *)g->dx + start, turn, length);
    for (int64_t i = 0; i < length; i += n, n = NAME(least)(turn, length - i)) {
        for (int64_t k = 0, at = start + i; k < r.streams; k++, at += r.apart)
            if (joined) NAME(grad_affine_joined)(g, r, at, at + n, i, parts);
            else NAME(grad_affine_run)(g, at, at + n, c, period, parts);
        c = NAME(onward)(c, n, period);
    }
}

FBN_INLINE void NAME(grad_affine_runs)(fbn_grad_affine g, NAME(runs) r, int64_t period, int activation,
                                       int has_residual, int frozen) {
    const NAME(grad_parts) parts = {activation, has_residual, frozen};
    if (!period && NAME(joins)(r, g.stream)) NAME(grad_affine_turns)(&g, r, 1, 0, 0, parts);
    else
        for (int64_t c = 0; c < r.count; c++) NAME(grad_affine_turns)(&g, r, 0, c, period, parts);
}

FBN_INLINE void NAME(grad_affine_call)(const fbn_grad_affine *g, NAME(runs) r, int64_t period) {
    switch (OWN_LOOPS ? g->activation : -1) {
    case FBN_IDENTITY:
        if (g->frozen) NAME(grad_affine_runs)(*g, r, period, FBN_IDENTITY, 0, 1);
        else NAME(grad_affine_runs)(*g, r, period, FBN_IDENTITY, 0, 0);
        break;
    case FBN_RELU:
        if (g->frozen && g->residual) NAME(grad_affine_runs)(*g, r, period, FBN_RELU, 1, 1);
        else if (g->frozen) NAME(grad_affine_runs)(*g, r, period, FBN_RELU, 0, 1);
        else if (g->residual) NAME(grad_affine_runs)(*g, r, period, FBN_RELU, 1, 0);
        else NAME(grad_affine_runs)(*g, r, period, FBN_RELU, 0, 0);
        break;
    case FBN_SILU:
        NAME(grad_affine_runs)(*g, r, period, FBN_SILU, g->residual != NULL, g->frozen);
        break;
    case FBN_SIGMOID:
        NAME(grad_affine_runs)(*g, r, period, FBN_SIGMOID, g->residual != NULL, g->frozen);
        break;
    default:
        NAME(grad_affine_runs)(*g, r, period, g->activation | NAME(ANY), g->residual != NULL, g->frozen);
    }
    if (g->stream) stream_fence();
}

static void NAME(grad_affine_cf)(const fbn_grad_affine *g, fbn_planes planes) {
    NAME(grad_affine_call)(g, NAME(runs_of_planes)(planes), 0);
}

static void NAME(grad_affine_cl)(const fbn_grad_affine *g, int64_t rows, int64_t channels) {
    NAME(grad_affine_call)(g, NAME(runs_of_rows)(rows, channels), channels);
}
