/* grad_affine.h: dx from dy and x, the backward map, and the residual's gradient. */

/* The constants of one channel (cf), or of a vector of channels (cl). */
typedef struct {
    NAME(line) line;
    vec on_dy, on_x, constant, postscale;
} NAME(grad);

FBN_INLINE NAME(grad) NAME(grad_at)(const fbn_grad_affine *g, int64_t c, int64_t period) {
    return (NAME(grad)){NAME(line_at)(&g->line, c, period), NAME(constant_at)(g->gradient.on_dy, c, period),
                        NAME(constant_at)(g->gradient.on_x, c, period),
                        NAME(constant_at)(g->gradient.constant, c, period),
                        NAME(constant_at)(g->gradient.postscale, c, period)};
}

FBN_INLINE NAME(grad) NAME(grad_over)(const fbn_grad_affine *g, int64_t c, int64_t left, const NAME(runs) * r) {
    return (NAME(grad)){NAME(line_over)(&g->line, c, left, r), NAME(constant_over)(g->gradient.on_dy, c, left, r),
                        NAME(constant_over)(g->gradient.on_x, c, left, r),
                        NAME(constant_over)(g->gradient.constant, c, left, r),
                        NAME(constant_over)(g->gradient.postscale, c, left, r)};
}

FBN_INLINE NAME(grad) NAME(grad_of_two)(const fbn_grad_affine *g, int64_t c, int64_t left, const NAME(runs) * r) {
    return (NAME(grad)){NAME(line_of_two)(&g->line, c, left, r), NAME(constant_of_two)(g->gradient.on_dy, c, left, r),
                        NAME(constant_of_two)(g->gradient.on_x, c, left, r),
                        NAME(constant_of_two)(g->gradient.constant, c, left, r),
                        NAME(constant_of_two)(g->gradient.postscale, c, left, r)};
}

/* Which parts of the kernel a call needs. Every field is a compile-time constant in the loops for identity and relu. */
typedef struct {
    int activation, has_residual, frozen;
} NAME(grad_parts);

FBN_INLINE void NAME(grad_affine_n)(const fbn_grad_affine *g, int64_t i, int64_t n, const NAME(grad) * b,
                                    NAME(grad_parts) parts) {
    const elem *x = (const elem *)g->x + i, *residual = parts.has_residual ? (const elem *)g->residual + i : x;
    vec dz = NAME(dz_at)((const elem *)g->dy + i, x, residual, n, &b->line, parts.activation, parts.has_residual);
    vec d;
    if (parts.frozen) d = vmul(b->on_dy, dz);
    else {
        const vec v = NAME(x_at)(x, residual, n, &b->line, parts.activation, parts.has_residual);
        d = vfma(b->on_x, NAME(centre)(v, &b->line), vfma(b->on_dy, dz, b->constant));
    }
    d = vmul(d, b->postscale);
    if (parts.activation & FBN_OUTSIDE) {
        const vec size = NAME(size_at)((const elem *)g->dy + i, n);
        dz = vkeep_if_positive(size, dz);
        d = vkeep_if_positive(size, d);
    }
    /* dx may be dy, which is not read after this. */
    NAME(affine_put)((elem *)g->dx + i, d, n, g->stream);
    if (!parts.has_residual || !(parts.activation & FBN_WHICH)) return;
    NAME(affine_put)((elem *)g->dresidual + i, dz, n, 0);
}

/* Computes a whole vector from element i on. */
FBN_INLINE void NAME(grad_affine_at)(const fbn_grad_affine *g, int64_t i, const NAME(grad) * b,
                                     NAME(grad_parts) parts) {
    prefetch((const char *)((const elem *)g->x + i) + FBN_AHEAD);
    prefetch((const char *)((const elem *)g->dy + i) + FBN_AHEAD);
    NAME(grad_affine_n)(g, i, WIDTH, b, parts);
}

/* Computes n elements from element i on, as affine_part does. */
FBN_APART void NAME(grad_affine_part)(const fbn_grad_affine *g, int64_t i, int64_t n, int64_t c, int64_t left,
                                      const NAME(runs) * r) {
    const NAME(grad) b = NAME(grad_over)(g, c, left, r);
    NAME(grad_affine_n)(g, i, n, &b, (NAME(grad_parts)){g->activation | NAME(ANY), g->residual != NULL, g->frozen});
}

/* The following functions do for dx what affine_rows, _planes, _turns and _runs do for y. */
FBN_INLINE void NAME(grad_affine_rows)(const fbn_grad_affine *g, const NAME(runs) * r, int64_t at, int64_t end,
                                       int64_t c, NAME(grad_parts) parts) {
    const fbn_grad_affine own = *g; /* see affine_planes */
    const int64_t head = NAME(least)(NAME(misaligned)((elem *)g->dx + at), end - at);
    if (head) NAME(grad_affine_part)(g, at, head, c, WIDTH, r);
    at += head;
    c = NAME(onward)(c, head, r->period);
    for (int64_t n; at + WIDTH <= end; at += n, c = NAME(onward)(c, n, r->period)) {
        n = NAME(vectors)(end - at, c, r->period);
        for (int64_t k = 0; k < n; k += WIDTH) {
            const NAME(grad) b = NAME(grad_at)(&own, c + k, 1);
            NAME(grad_affine_at)(&own, at + k, &b, parts);
        }
    }
    if (at < end) NAME(grad_affine_part)(g, at, end - at, c, WIDTH, r);
}

FBN_INLINE void NAME(grad_affine_planes)(const fbn_grad_affine *g, const NAME(runs) * r, int64_t at, int64_t end,
                                         int64_t c, int64_t left, NAME(grad_parts) parts) {
    const int64_t head = NAME(head)((elem *)g->dx + at, end - at, g->stream);
    NAME(grad) b = NAME(grad_at)(g, c, 0);
    for (int64_t n = NAME(least)(head ? head : WIDTH, end - at); at < end; n = NAME(least)(WIDTH, end - at)) {
        if (n == WIDTH && left >= WIDTH) {
            n = NAME(least)(left, end - at) / WIDTH * WIDTH;
            for (int64_t k = 0; k < n; k += WIDTH) NAME(grad_affine_at)(g, at + k, &b, parts);
        } else if (NAME(is_short)(parts.activation) && (left >= n || left + r->length >= WIDTH)) {
            const NAME(grad) part = left < n ? NAME(grad_of_two)(g, c, left, r) : b;
            NAME(grad_affine_n)(g, at, n, &part, parts);
        } else NAME(grad_affine_part)(g, at, n, c, left, r);
        at += n;
        left -= n;
        if (left > 0 || at == end) continue;
        for (; left <= 0; left += r->length) c++;
        b = NAME(grad_at)(g, c, 0);
    }
}

FBN_INLINE void NAME(grad_affine_turns)(const fbn_grad_affine *g, const NAME(runs) * r, int joined, int64_t c, int rows,
                                        NAME(grad_parts) parts) {
    const int64_t start = c * r->step, length = joined ? r->count * r->length : r->length;
    const int64_t turn = NAME(turn)(r, g->stream, parts.activation, length);
    int64_t n = NAME(first_turn)((elem *)g->dx + start, turn, length);
    for (int64_t i = 0; i < length; i += n, n = NAME(least)(turn, length - i)) {
        const int64_t past = joined ? i / r->length : 0, left = (past + 1) * r->length - i;
        for (int64_t k = 0, at = start + i; k < r->streams; k++, at += r->apart)
            if (rows) NAME(grad_affine_rows)(g, r, at, at + n, c, parts);
            else NAME(grad_affine_planes)(g, r, at, at + n, c + past, left, parts);
        if (rows) c = NAME(onward)(c, n, r->period);
    }
}

FBN_INLINE void NAME(grad_affine_runs)(fbn_grad_affine g, NAME(runs) r, int rows, int activation, int has_residual,
                                       int frozen) {
    const NAME(grad_parts) parts = {activation, has_residual, frozen};
    const int joined = !rows && NAME(joins)(&r, g.stream);
    const int64_t turns = joined ? 1 : r.count;
    if (!joined) r.count = 1; /* each by itself */
    for (int64_t c = 0; c < turns; c++) NAME(grad_affine_turns)(&g, &r, joined, c, rows, parts);
}

FBN_INLINE void NAME(grad_affine_call)(const fbn_grad_affine *g, NAME(runs) r, int rows) {
    switch (OWN_LOOPS ? g->activation : -1) {
    case FBN_IDENTITY:
        if (g->frozen) NAME(grad_affine_runs)(*g, r, rows, FBN_IDENTITY, 0, 1);
        else NAME(grad_affine_runs)(*g, r, rows, FBN_IDENTITY, 0, 0);
        break;
    case FBN_RELU:
        if (g->frozen && g->residual) NAME(grad_affine_runs)(*g, r, rows, FBN_RELU, 1, 1);
        else if (g->frozen) NAME(grad_affine_runs)(*g, r, rows, FBN_RELU, 0, 1);
        else if (g->residual) NAME(grad_affine_runs)(*g, r, rows, FBN_RELU, 1, 0);
        else NAME(grad_affine_runs)(*g, r, rows, FBN_RELU, 0, 0);
        break;
    case FBN_SILU:
        NAME(grad_affine_runs)(*g, r, rows, FBN_SILU, g->residual != NULL, g->frozen);
        break;
    case FBN_SIGMOID:
        NAME(grad_affine_runs)(*g, r, rows, FBN_SIGMOID, g->residual != NULL, g->frozen);
        break;
    default:
        NAME(grad_affine_runs)(*g, r, rows, g->activation | NAME(ANY), g->residual != NULL, g->frozen);
    }
    if (g->stream) stream_fence();
}

static void NAME(grad_affine_cf)(const fbn_grad_affine *g, fbn_planes planes) {
    NAME(grad_affine_call)(g, NAME(runs_of_planes)(planes), 0);
}

static void NAME(grad_affine_cl)(const fbn_grad_affine *g, int64_t rows, int64_t channels) {
    NAME(grad_affine_call)(g, NAME(runs_of_rows)(rows, channels), 1);
}
