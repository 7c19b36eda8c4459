/* grad_affine.h: dx from dy and x, the backward map, and the residual's gradient beside it. */

/* dx = on_dy * dz + on_x * (x - mean_hi) + constant. */
typedef struct {
    vec on_dy, on_x, constant;
} NAME(slopes);

/* Which of the kernel's parts a call has; every field is a constant where the loops are instantiated. */
typedef struct {
    fbn_activation activation;
    int has_residual, frozen;
} NAME(grad_parts);

FBN_INLINE void NAME(grad_affine_at)(const fbn_grad_affine *g, int64_t i, int64_t n, const NAME(line) *l,
                                     const NAME(slopes) *s, NAME(grad_parts) parts, int stream) {
    const elem *x = (const elem *)g->x + i;
    const vec zero = vset(0);
    const vec dz = NAME(dz_at)((const elem *)g->dy + i, x, parts.has_residual ? (const elem *)g->residual + i : x, n, l,
                               parts.activation, parts.has_residual);
    elem *dx = (elem *)g->dx + i;
    vec d;
    if (parts.frozen) d = vmul(s->on_dy, dz);
    else {
        const vec v = n == WIDTH ? vload(x) : vload_n(x, n, zero);
        d = vfma(s->on_x, NAME(centre)(v, l), vfma(s->on_dy, dz, s->constant));
    }
    if (stream) vstream(dx, d);
    else if (n == WIDTH) vstore(dx, d);
    else vstore_n(dx, d, n);
    if (!g->dresidual) return;
    if (n == WIDTH) vstore((elem *)g->dresidual + i, dz);
    else vstore_n((elem *)g->dresidual + i, dz, n);
}

FBN_INLINE void NAME(grad_affine_planes)(const fbn_grad_affine *g, int64_t channels, int64_t inner,
                                         NAME(grad_parts) parts) {
    for (int64_t c = 0, i = 0; c < channels; c++) {
        const NAME(line) l = NAME(line_cf)(&g->line, c);
        const NAME(slopes) s = {vset(((const real *)g->on_dy)[c]), vset(((const real *)g->on_x)[c]),
                                vset(((const real *)g->constant)[c])};
        const int64_t end = i + inner;
        if (g->stream) {
            const int64_t head = NAME(misaligned)((const elem *)g->dx + i);
            const int64_t n = head < inner ? head : inner;
            if (n) NAME(grad_affine_at)(g, i, n, &l, &s, parts, 0);
            for (i += n; i + WIDTH <= end; i += WIDTH) NAME(grad_affine_at)(g, i, WIDTH, &l, &s, parts, 1);
        }
        for (; i + WIDTH <= end; i += WIDTH) NAME(grad_affine_at)(g, i, WIDTH, &l, &s, parts, 0);
        if (i < end) NAME(grad_affine_at)(g, i, end - i, &l, &s, parts, 0);
        i = end;
    }
}

static void NAME(grad_affine_cf)(const fbn_grad_affine *g, int64_t channels, int64_t inner) {
    switch (g->activation) {
    case FBN_IDENTITY:
        if (g->frozen) NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_IDENTITY, 0, 1});
        else NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_IDENTITY, 0, 0});
        break;
    case FBN_RELU:
        if (g->frozen && g->residual)
            NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_RELU, 1, 1});
        else if (g->frozen) NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_RELU, 0, 1});
        else if (g->residual) NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_RELU, 1, 0});
        else NAME(grad_affine_planes)(g, channels, inner, (NAME(grad_parts)){FBN_RELU, 0, 0});
        break;
    }
    if (g->stream) stream_fence();
}

/* Rows in blocks of this many: a vector's constants are fetched once a block. */
enum { NAME(GRAD_AFFINE_ROWS) = 4 };

FBN_INLINE void NAME(grad_affine_rows)(const fbn_grad_affine *g, int64_t rows, int64_t channels, int64_t stride,
                                       NAME(grad_parts) parts) {
    enum { BLOCK = NAME(GRAD_AFFINE_ROWS) };
    for (int64_t r = 0; r < rows; r += BLOCK) {
        const int64_t block = rows - r < BLOCK ? rows - r : BLOCK, start = r * stride;
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const NAME(line) l = NAME(line_cl)(&g->line, c);
            const NAME(slopes) s = {vget((const real *)g->on_dy + c), vget((const real *)g->on_x + c),
                                    vget((const real *)g->constant + c)};
            const int64_t first = start + c;
            if (block == BLOCK && c + WIDTH <= channels && g->stream)
                for (int64_t i = first; i < first + BLOCK * stride; i += stride)
                    NAME(grad_affine_at)(g, i, WIDTH, &l, &s, parts, 1);
            else if (block == BLOCK && c + WIDTH <= channels)
                for (int64_t i = first; i < first + BLOCK * stride; i += stride)
                    NAME(grad_affine_at)(g, i, WIDTH, &l, &s, parts, 0);
            else
                for (int64_t i = first; i < first + block * stride; i += stride)
                    NAME(grad_affine_at)(g, i, NAME(fill_of)(channels - c), &l, &s, parts, 0);
        }
    }
}

static void NAME(grad_affine_cl)(const fbn_grad_affine *g, int64_t rows, int64_t channels, int64_t stride) {
    switch (g->activation) {
    case FBN_IDENTITY:
        if (g->frozen) NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_IDENTITY, 0, 1});
        else NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_IDENTITY, 0, 0});
        break;
    case FBN_RELU:
        if (g->frozen && g->residual)
            NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_RELU, 1, 1});
        else if (g->frozen) NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_RELU, 0, 1});
        else if (g->residual) NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_RELU, 1, 0});
        else NAME(grad_affine_rows)(g, rows, channels, stride, (NAME(grad_parts)){FBN_RELU, 0, 0});
        break;
    }
    if (g->stream) stream_fence();
}
