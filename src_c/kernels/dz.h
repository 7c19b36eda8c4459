/* dz.h: the gradient of z of a SiLU or a sigmoid, a piece at a time, which plain loops then add (float_sums.h) or map
 * to dx. A loop that did both would need too many registers.
 */

/* The values of dz that are computed at a time. */
enum { NAME(PIECE) = 8192 / sizeof(elem) };

/* dz of n elements from element i on, of channel c or of columns from column c on. What lies `ahead` bytes further is
 * fetched. `to` may be where dy is. */
FBN_INLINE void NAME(dz_run)(const fbn_operands *o, int64_t i, int64_t c, int columns, int64_t n, int64_t ahead,
                             NAME(parts) p, elem *to) {
    enum { SMOOTH = NAME(AT_ONCE) * WIDTH };
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    NAME(constants) k = NAME(constants_at)(&own, c, columns, p);
    int64_t m = 0;
    for (; m + SMOOTH <= n; m += SMOOTH) {
        vec dz[NAME(AT_ONCE)];
        NAME(fetch)(&own, i + m, NAME(AT_ONCE), ahead, p, 1);
        NAME(smooth_of)(&own, i + m, c + m, columns, &k, p, 1, dz);
        for (int j = 0; j < NAME(AT_ONCE); j++) vstore(to + m + j * WIDTH, dz[j]);
    }
    for (; m < n; m += WIDTH) {
        const elem *x = (const elem *)own.x + i + m,
                   *residual = p.has_residual ? (const elem *)own.residual + i + m : x;
        const int64_t some = NAME(least)(n - m, WIDTH);
        if (columns) k = NAME(constants_at)(&own, c + m, 1, p);
        NAME(put)(to + m, NAME(dz_part)((const elem *)own.dy + i + m, x, residual, some, &k, p), some, 0);
    }
}
FBN_INLINE void NAME(dz_by_activation)(const fbn_operands *o, int64_t i, int64_t c, int columns, int64_t n,
                                       int64_t ahead, elem *to) {
    const int residual = o->residual != NULL;
    if (o->activation == FBN_SILU)
        NAME(dz_run)(o, i, c, columns, n, ahead, (NAME(parts)){FBN_SILU, residual, 1, 0, 0}, to);
    else NAME(dz_run)(o, i, c, columns, n, ahead, (NAME(parts)){FBN_SIGMOID, residual, 1, 0, 0}, to);
}
FBN_APART void NAME(dz_of_plane)(const fbn_operands *o, int64_t i, int64_t c, int64_t n, int64_t ahead, elem *to) {
    NAME(dz_by_activation)(o, i, c, 0, n, ahead, to);
}
FBN_APART void NAME(dz_of_columns)(const fbn_operands *o, int64_t i, int64_t c, int64_t n, int64_t ahead, elem *to) {
    NAME(dz_by_activation)(o, i, c, 1, n, ahead, to);
}

/* dz of n elements from element i on, of columns from column c on, which recur after `period`. */
FBN_INLINE void NAME(dz_of_recurring)(const fbn_operands *o, int64_t i, int64_t c, int64_t period, int64_t n,
                                      elem *to) {
    for (int64_t k = 0, some; k < n; k += some, c = 0) {
        some = NAME(least)(n - k, period - c);
        NAME(dz_of_columns)(o, i + k, c, some, o->walk.ahead, to + k);
    }
}

/* Maps pieces of dz as if they were dy, by the loop for no activation. All pieces but the first of a stretch begin
 * where a cache line of the result does. */
FBN_APART void NAME(map_dz)(const fbn_operands *o, const fbn_stretch *s, int columns, fbn_loop *loop) {
    enum { OF_LINE = FBN_LINE / sizeof(elem) };
    _Alignas(64) elem dz[NAME(PIECE)];
    fbn_operands own = *o;
    own.activation = FBN_IDENTITY;
    own.residual = own.dresidual = NULL;
    for (int64_t row = 0; row < s->rows; row++) {
        const int64_t at = s->at + row * s->apart, end = at + s->n;
        for (int64_t i = at, n; i < end; i += n) {
            const int64_t c = columns ? (s->c + i - at) % s->period : s->c;
            elem *to = o->residual ? (elem *)o->dresidual + i : dz;
            n = NAME(least)(NAME(PIECE) - OF_LINE + NAME(misaligned)(o, i, OF_LINE), end - i);
            if (columns) NAME(dz_of_recurring)(o, i, c, s->period, n, to);
            else NAME(dz_of_plane)(o, i, c, n, o->walk.ahead, to);
            own.x = (const elem *)o->x + i;
            own.dy = to;
            own.out = (elem *)o->out + i;
            loop(&own, &(fbn_stretch){.n = n, .c = c, .period = s->period, .rows = 1});
        }
    }
}
