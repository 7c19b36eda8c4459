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

/* Which of the kernel's parts a call has; every field is a constant where the loops are instantiated for identity
 * and relu. */
typedef struct {
    int activation, has_residual, frozen;
} NAME(grad_parts);

FBN_INLINE void NAME(grad_affine_at)(const fbn_grad_affine *g, int64_t i, int64_t n, const NAME(slopes) * s,
                                     NAME(grad_parts) parts, int stream) {
    const elem *x = (const elem *)g->x + i;
    if (n == WIDTH) {
        prefetch((const char *)x + g->ahead);
        prefetch((const char *)((const elem *)g->dy + i) + g->ahead);
    }
    const elem *residual = parts.has_residual ? (const elem *)g->residual + i : x;
    const vec dz = NAME(dz_at)((const elem *)g->dy + i, x, residual, n, &s->line, parts.activation, parts.has_residual);
    elem *dx = (elem *)g->dx + i;
    vec d;
    if (parts.frozen) d = vmul(s->on_dy, dz);
    else {
        const vec v = NAME(x_at)(x, residual, n, &s->line, parts.activation, parts.has_residual);
        d = vfma(s->on_x, NAME(centre)(v, &s->line), vfma(s->on_dy, dz, s->constant));
    }
    d = vmul(d, s->postscale);
    if (stream) vstream(dx, d);
    else if (n == WIDTH) vstore(dx, d);
    else vstore_n(dx, d, n);
    if (!parts.has_residual || (parts.activation | FBN_FROM_Y) == FBN_FROM_Y) return;
    if (n == WIDTH) vstore((elem *)g->dresidual + i, dz);
    else vstore_n((elem *)g->dresidual + i, dz, n);
}

/* Elements [i, end), as affine_run has them. */
FBN_INLINE void NAME(grad_affine_run)(const fbn_grad_affine *g, int64_t i, int64_t end, int64_t c, int64_t period,
                                      NAME(grad_parts) parts) {
    const int stream = g->stream;
    NAME(slopes) s = NAME(slopes_at)(g, c, period);
    const int64_t head = NAME(least)(NAME(misaligned)((elem *)g->dx + i), end - i);
    if (head) {
        NAME(grad_affine_at)(g, i, head, &s, parts, 0);
        c = NAME(onward)(c, head, period);
        if (period) s = NAME(slopes_at)(g, c, period);
    }
    for (i += head; i + WIDTH <= end; i += WIDTH) {
        NAME(grad_affine_at)(g, i, WIDTH, &s, parts, stream);
        c = NAME(onward)(c, WIDTH, period);
        if (period) s = NAME(slopes_at)(g, c, period);
    }
    if (i < end) NAME(grad_affine_at)(g, i, end - i, &s, parts, 0);
}

FBN_INLINE void NAME(grad_affine_runs)(const fbn_grad_affine *g, int64_t runs, int64_t length, int64_t stride,
                                       int64_t period, int activation, int has_residual, int frozen) {
    const NAME(grad_parts) parts = {activation, has_residual, frozen};
    for (int64_t r = 0; r < runs; r++)
        NAME(grad_affine_run)(g, r * stride, r * stride + length, period ? 0 : r, period, parts);
}

FBN_INLINE void NAME(grad_affine_call)(const fbn_grad_affine *g, int64_t runs, int64_t length, int64_t stride,
                                       int64_t period) {
    switch (OWN_LOOPS ? g->activation : -1) {
    case FBN_IDENTITY:
        if (g->frozen) NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_IDENTITY, 0, 1);
        else NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_IDENTITY, 0, 0);
        break;
    case FBN_RELU:
        if (g->frozen && g->residual) NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_RELU, 1, 1);
        else if (g->frozen) NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_RELU, 0, 1);
        else if (g->residual) NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_RELU, 1, 0);
        else NAME(grad_affine_runs)(g, runs, length, stride, period, FBN_RELU, 0, 0);
        break;
    default:
        NAME(grad_affine_runs)(g, runs, length, stride, period, g->activation, g->residual != NULL, g->frozen);
    }
    if (g->stream) stream_fence();
}

static void NAME(grad_affine_cf)(const fbn_grad_affine *g, int64_t channels, int64_t inner) {
    NAME(grad_affine_call)(g, channels, inner, inner, 0);
}

static void NAME(grad_affine_cl)(const fbn_grad_affine *g, int64_t rows, int64_t channels, int64_t stride) {
    if (stride == channels) NAME(grad_affine_call)(g, 1, rows * channels, 0, channels);
    else NAME(grad_affine_call)(g, rows, channels, stride, channels);
}
