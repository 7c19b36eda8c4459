/* affine.h: y from x, the forward map. */

FBN_INLINE vec NAME(affine_at)(const fbn_affine *a, int64_t i, int64_t n, const NAME(line) * l,
                               fbn_activation activation, int has_residual) {
    const elem *x = (const elem *)a->x + i;
    if (n == WIDTH) prefetch((const char *)x + a->ahead);
    const vec zero = vset(0);
    const vec v = n == WIDTH ? vload(x) : vload_n(x, n, zero);
    const elem *residual = has_residual ? (const elem *)a->residual + i : x;
    const vec r = !has_residual ? zero : n == WIDTH ? vload(residual) : vload_n(residual, n, zero);
    return NAME(activate)(NAME(preactivation)(v, r, l, has_residual), l, activation);
}

/* Elements [i, end), contiguous, from channel c on: all of that channel (period 0), or of the next channel each, which
 * recur after `period`. */
FBN_INLINE void NAME(affine_run)(const fbn_affine *a, int64_t i, int64_t end, int64_t c, int64_t period,
                                 fbn_activation activation, int has_residual) {
    elem *y = a->y;
    const int stream = a->stream;
    NAME(line) l = NAME(line_at)(&a->line, c, period);
    const int64_t head = NAME(least)(NAME(misaligned)(y + i), end - i);
    if (head) {
        vstore_n(y + i, NAME(affine_at)(a, i, head, &l, activation, has_residual), head);
        c = NAME(onward)(c, head, period);
        if (period) l = NAME(line_at)(&a->line, c, period);
    }
    for (i += head; i + WIDTH <= end; i += WIDTH) {
        const vec v = NAME(affine_at)(a, i, WIDTH, &l, activation, has_residual);
        if (stream) vstream(y + i, v);
        else vstore(y + i, v);
        c = NAME(onward)(c, WIDTH, period);
        if (period) l = NAME(line_at)(&a->line, c, period);
    }
    if (i < end) vstore_n(y + i, NAME(affine_at)(a, i, end - i, &l, activation, has_residual), end - i);
}

/* Runs of `length` elements, `stride` apart. cf: one channel each. cl: every channel, period after period. */
FBN_INLINE void NAME(affine_runs)(const fbn_affine *a, int64_t runs, int64_t length, int64_t stride, int64_t period,
                                  fbn_activation activation, int has_residual) {
    for (int64_t r = 0; r < runs; r++)
        NAME(affine_run)(a, r * stride, r * stride + length, period ? 0 : r, period, activation, has_residual);
}

FBN_INLINE void NAME(affine_call)(const fbn_affine *a, int64_t runs, int64_t length, int64_t stride, int64_t period) {
    switch (OWN_LOOPS ? (int)a->activation : -1) {
    case FBN_IDENTITY:
        if (a->residual) NAME(affine_runs)(a, runs, length, stride, period, FBN_IDENTITY, 1);
        else NAME(affine_runs)(a, runs, length, stride, period, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (a->residual) NAME(affine_runs)(a, runs, length, stride, period, FBN_RELU, 1);
        else NAME(affine_runs)(a, runs, length, stride, period, FBN_RELU, 0);
        break;
    default:
        NAME(affine_runs)(a, runs, length, stride, period, a->activation, a->residual != NULL);
    }
    if (a->stream) stream_fence();
}

static void NAME(affine_cf)(const fbn_affine *a, int64_t channels, int64_t inner) {
    NAME(affine_call)(a, channels, inner, inner, 0);
}

static void NAME(affine_cl)(const fbn_affine *a, int64_t rows, int64_t channels, int64_t stride) {
    if (stride == channels) NAME(affine_call)(a, 1, rows * channels, 0, channels);
    else NAME(affine_call)(a, rows, channels, stride, channels);
}
