/* affine.h: y from x, the forward map. */

FBN_INLINE vec NAME(affine_at)(const elem *x, const elem *residual, int64_t n, const NAME(line) *l,
                               fbn_activation activation, int has_residual) {
    const vec zero = vset(0);
    const vec v = n == WIDTH ? vload(x) : vload_n(x, n, zero);
    const vec r = !has_residual ? zero : n == WIDTH ? vload(residual) : vload_n(residual, n, zero);
    return NAME(activate)(NAME(preactivation)(v, r, l, has_residual), activation);
}

/* Planes of `inner` elements. Streaming starts where y is aligned to a vector. */
FBN_INLINE void NAME(affine_planes)(const fbn_affine *a, int64_t channels, int64_t inner, fbn_activation activation,
                                    int has_residual) {
    const elem *x = a->x, *residual = has_residual ? a->residual : a->x;
    elem *y = a->y;
    for (int64_t c = 0; c < channels; c++, x += inner, residual += inner, y += inner) {
        const NAME(line) l = NAME(line_cf)(&a->line, c);
        int64_t i = 0;
        if (a->stream) {
            i = NAME(fill_of)(NAME(misaligned)(y) < inner ? NAME(misaligned)(y) : inner);
            if (i) vstore_n(y, NAME(affine_at)(x, residual, i, &l, activation, has_residual), i);
            for (; i + WIDTH <= inner; i += WIDTH)
                vstream(y + i, NAME(affine_at)(x + i, residual + i, WIDTH, &l, activation, has_residual));
        }
        for (; i + WIDTH <= inner; i += WIDTH)
            vstore(y + i, NAME(affine_at)(x + i, residual + i, WIDTH, &l, activation, has_residual));
        if (i < inner)
            vstore_n(y + i, NAME(affine_at)(x + i, residual + i, inner - i, &l, activation, has_residual), inner - i);
    }
}

static void NAME(affine_cf)(const fbn_affine *a, int64_t channels, int64_t inner) {
    switch (a->activation) {
    case FBN_IDENTITY:
        if (a->residual) NAME(affine_planes)(a, channels, inner, FBN_IDENTITY, 1);
        else NAME(affine_planes)(a, channels, inner, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (a->residual) NAME(affine_planes)(a, channels, inner, FBN_RELU, 1);
        else NAME(affine_planes)(a, channels, inner, FBN_RELU, 0);
        break;
    }
    if (a->stream) stream_fence();
}

/* Rows in blocks of this many: a vector's constants are fetched once a block. */
enum { NAME(AFFINE_ROWS) = 4 };

FBN_INLINE void NAME(affine_rows)(const fbn_affine *a, int64_t rows, int64_t channels, int64_t stride,
                                  fbn_activation activation, int has_residual) {
    enum { BLOCK = NAME(AFFINE_ROWS) };
    const elem *x = a->x, *residual = has_residual ? a->residual : a->x;
    elem *y = a->y;
    const int64_t step = BLOCK * stride;
    for (int64_t r = 0; r < rows; r += BLOCK, x += step, residual += step, y += step) {
        const int64_t block = rows - r < BLOCK ? rows - r : BLOCK;
        int64_t c = 0;
        for (; block == BLOCK && c + WIDTH <= channels; c += WIDTH) {
            const NAME(line) l = NAME(line_cl)(&a->line, c);
            for (int64_t k = c; k < c + step; k += stride) {
                const vec v = NAME(affine_at)(x + k, residual + k, WIDTH, &l, activation, has_residual);
                if (a->stream) vstream(y + k, v);
                else vstore(y + k, v);
            }
        }
        for (; c < channels; c += WIDTH) {
            const NAME(line) l = NAME(line_cl)(&a->line, c);
            const int64_t n = NAME(fill_of)(channels - c);
            for (int64_t k = c; k < c + block * stride; k += stride)
                vstore_n(y + k, NAME(affine_at)(x + k, residual + k, n, &l, activation, has_residual), n);
        }
    }
}

static void NAME(affine_cl)(const fbn_affine *a, int64_t rows, int64_t channels, int64_t stride) {
    switch (a->activation) {
    case FBN_IDENTITY:
        if (a->residual) NAME(affine_rows)(a, rows, channels, stride, FBN_IDENTITY, 1);
        else NAME(affine_rows)(a, rows, channels, stride, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (a->residual) NAME(affine_rows)(a, rows, channels, stride, FBN_RELU, 1);
        else NAME(affine_rows)(a, rows, channels, stride, FBN_RELU, 0);
        break;
    }
    if (a->stream) stream_fence();
}
