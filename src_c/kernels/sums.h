/* sums.h: the sums of a channel: of x - origin and its square (moments), or of dz and dz * (x - mean) (the gradient),
 * where dz is the gradient of z.
 *
 * The origin of the moments is one of the channel's values, so that a large common offset cancels before the values are
 * squared. The sums are float64. Those about the same origin can be added up, whatever parts of x they are of.
 */

FBN_INLINE vec NAME(kept_dz)(const fbn_operands *o, int64_t i, int64_t n, vec dz) {
    if (o->dz) NAME(put)((elem *)o->dz + i, dz, n, 0);
    return dz;
}

/* Adds n <= WIDTH elements from element i on to sum and other. `fill` follows them in the vector. */
FBN_INLINE void NAME(moments_n)(const fbn_operands *o, int64_t i, int64_t n, wide origin, vec fill, wide *sum,
                                wide *other) {
    const elem *x = (const elem *)o->x + i;
    const wide d = wsub(n == WIDTH ? wload(x) : widen(vload_n(x, n, fill)), origin);
    *sum = wadd(*sum, d);
    *other = wfma(d, d, *other);
}

FBN_INLINE void NAME(grad_moments_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k,
                                     wide origin, NAME(parts) p, wide *sum, wide *other) {
    const elem *dy = (const elem *)o->dy + i, *x = (const elem *)o->x + i;
    const elem *residual = p.has_residual ? (const elem *)o->residual + i : x;
    const int plain = n == WIDTH && !(p.activation & FBN_FROM_Y), given_dz = plain && p.activation == FBN_IDENTITY;
    wide g = given_dz ? wload(dy) : widen(NAME(kept_dz)(o, i, n, NAME(dz_at)(dy, x, residual, n, k, p)));
    wide d = wsub(plain ? wload(x) : widen(NAME(x_at)(x, residual, n, k, p)), origin);
    if (n < WIDTH) { /* where x is filled up with 0, the derivative may have no value, and the mean may be infinite */
        const wide given = widen(vjoin(vset(1), vset(0), n));
        g = wkeep_if_positive(given, g);
        d = wkeep_if_positive(given, d);
    }
    if (p.activation & FBN_OUTSIDE) {
        const wide size = widen(NAME(size_at)(dy, n));
        g = wkeep_if_positive(size, g);
        d = wkeep_if_positive(size, d);
    }
    *sum = wadd(*sum, g);
    *other = wfma(g, d, *other);
}

FBN_INLINE void NAME(sum_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, wide origin,
                            vec fill, NAME(parts) p, int backward, wide *sum, wide *other) {
    if (backward) NAME(grad_moments_n)(o, i, n, k, origin, p, sum, other);
    else NAME(moments_n)(o, i, n, origin, fill, sum, other);
}

/* Adds parts of planes of channel c, each to lanes of its own, of which the first is that of the part's first element.
 * The lanes of whole planes are then added up. */
FBN_INLINE void NAME(sum_plane)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p, int backward) {
    enum { STEP = FBN_LANES / WIDTH, OF_LINE = FBN_LINE / sizeof(elem) };
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    const NAME(constants) k = NAME(constants_at)(&own, s->c, 0, p);
    const wide origin = wset(own.origin[s->c]);
    const vec fill = vset((real)own.origin[s->c]);
    const int whole = s->whole;
    /* Whole planes fetch from the next plane, which begins `further` elements behind them, but none beyond it. */
    const int64_t most = own.walk.ahead / (int64_t)sizeof(elem), further = s->apart - s->n;
    const int64_t ahead = whole ? NAME(least)(most, s->n) : most;
    for (int64_t row = 0; row < s->rows; row++) {
        double *sums = s->sums + (whole ? 0 : row * 2 * FBN_LANES), *others = sums + (s->others - s->sums);
        const int64_t end = s->at + row * s->apart + s->n;
        wide sum[STEP], other[STEP];
        for (int j = 0; j < STEP; j++) {
            sum[j] = whole ? wset(0) : wget(sums + j * WIDTH);
            other[j] = whole ? wset(0) : wget(others + j * WIDTH);
        }
        int64_t i = end - s->n;
        for (; i + FBN_LANES <= end; i += FBN_LANES) {
            const int64_t next = i + ahead + (whole && i + ahead >= end ? further : 0);
            for (int64_t line = 0; line < FBN_LANES; line += OF_LINE) {
                prefetch((const elem *)own.x + next + line);
                if (backward) prefetch((const elem *)own.dy + next + line);
            }
            for (int j = 0; j < STEP; j++)
                NAME(sum_n)(&own, i + j * WIDTH, WIDTH, &k, origin, fill, p, backward, &sum[j], &other[j]);
        }
        for (int j = 0; j < STEP && i + j * WIDTH < end; j++) {
            const int64_t n = NAME(least)(end - i - j * WIDTH, WIDTH);
            NAME(sum_n)(&own, i + j * WIDTH, n, &k, origin, fill, p, backward, &sum[j], &other[j]);
        }
        for (int j = 0; j < STEP; j++) {
            wput(sums + j * WIDTH, whole ? wadd(wget(sums + j * WIDTH), sum[j]) : sum[j]);
            wput(others + j * WIDTH, whole ? wadd(wget(others + j * WIDTH), other[j]) : other[j]);
        }
    }
}

/* Adds the columns of one or two vectors from column c on, of so many groups of rows. The last vector may be a part of
 * one, with n columns. Two have twice as many sums that do not wait for each other. Most loops have one group, and know
 * it: to count them would take longer. */
FBN_INLINE void NAME(sum_vectors)(const fbn_operands *o, const fbn_stretch *s, int64_t c, int vectors, int64_t n,
                                  vec fill, int64_t groups, NAME(parts) p, int backward) {
    wide origin[2], sum[2], other[2];
    NAME(constants) k[2];
    for (int j = 0; j < vectors; j++) {
        k[j] = NAME(constants_at)(o, c + j * WIDTH, 1, p);
        origin[j] = wget(o->origin + c + j * WIDTH);
        sum[j] = wget(s->sums + c + j * WIDTH);
        other[j] = wget(s->others + c + j * WIDTH);
    }
    int64_t ahead = o->walk.ahead;
    if (c + ahead / (int64_t)sizeof(elem) >= s->n) ahead += s->further * (int64_t)sizeof(elem);
    for (int64_t group = 0, first = s->at + c; group < groups; group++, first += s->step)
        for (int64_t r = 0, i = first; r < s->rows; r++, i += s->apart) {
            NAME(fetch)(o, i, vectors, ahead, p, backward);
            for (int j = 0; j < vectors; j++)
                NAME(sum_n)(o, i + j * WIDTH, j == vectors - 1 ? n : WIDTH, &k[j], origin[j], fill, p, backward,
                            &sum[j], &other[j]);
        }
    for (int j = 0; j < vectors; j++) {
        wput(s->sums + c + j * WIDTH, sum[j]);
        wput(s->others + c + j * WIDTH, other[j]);
    }
}

/* Adds the columns from column c on. One function serves every call. Parts of vectors are filled up with the origins,
 * which add nothing to the columns behind them. */
FBN_APART void NAME(moments_rest)(const fbn_operands *o, const fbn_stretch *s, int64_t c) {
    for (; c < s->n; c += WIDTH) {
        real origins[WIDTH];
        for (int k = 0; k < WIDTH; k++) origins[k] = (real)o->origin[c + k];
        NAME(sum_vectors)(o, s, c, 1, NAME(least)(s->n - c, WIDTH), vget(origins), 1, NAME(any_parts)(o), 0);
    }
}
FBN_APART void NAME(grad_moments_rest)(const fbn_operands *o, const fbn_stretch *s, int64_t c) {
    for (; c < s->n; c += WIDTH)
        NAME(sum_vectors)(o, s, c, 1, NAME(least)(s->n - c, WIDTH), vset(0), 1, NAME(any_parts)(o), 1);
}

/* Adds the columns of some rows. */
FBN_INLINE void NAME(sum_columns)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p, int backward) {
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    const fbn_stretch stretch = *s;
    int64_t c = 0;
    const int both = (int)WIDTH < FBN_LANES && p.activation == FBN_IDENTITY; /* others need too many registers */
    for (; both && c + 2 * WIDTH <= stretch.n; c += 2 * WIDTH)
        NAME(sum_vectors)(&own, &stretch, c, 2, WIDTH, vset(0), 1, p, backward);
    for (; c + WIDTH <= stretch.n; c += WIDTH) NAME(sum_vectors)(&own, &stretch, c, 1, WIDTH, vset(0), 1, p, backward);
    if (c == stretch.n) return;
    if (backward) NAME(grad_moments_rest)(o, s, c);
    else NAME(moments_rest)(o, s, c);
}

/* Adds columns of a stack to some vectors of sums, in the order in which sum_columns and fbn_sum_runs add rows. A
 * single vector may be a part of one, with n columns. */
FBN_INLINE void NAME(sum_stacked)(const fbn_operands *o, const fbn_stretch *s, int64_t i, int vectors, int64_t n,
                                  int64_t rows, const NAME(constants) * k, wide origin, vec fill, NAME(parts) p,
                                  int backward, wide *sum, wide *other) {
    enum { MOST = FBN_LANES / WIDTH };
    const int64_t together = backward ? FBN_GRAD_ROWS : FBN_ROWS, times = rows / together, apart = s->apart;
    wide of_columns[MOST], others[MOST];
    for (int j = 0; j < vectors; j++) of_columns[j] = others[j] = wset(0);
    for (int64_t first = 0; first < times; first++)
        for (int64_t row = first; row < times * together; row += times)
            for (int j = 0; j < vectors; j++)
                NAME(sum_n)(o, i + row * apart + j * WIDTH, n, k, origin, fill, p, backward, &of_columns[j],
                            &others[j]);
    for (int64_t row = times * together; row < rows; row++)
        for (int j = 0; j < vectors; j++)
            NAME(sum_n)(o, i + row * apart + j * WIDTH, n, k, origin, fill, p, backward, &of_columns[j], &others[j]);
    for (int j = 0; j < vectors; j++) {
        sum[j] = wadd(sum[j], of_columns[j]);
        other[j] = wadd(other[j], others[j]);
    }
}

/* Adds the planes of a channel of a few images: the elements of each column first, and then the columns to lanes, so
 * many vectors of them at a time. The bits are those of sum_columns and a fold, but the sums of columns are not stored.
 */
FBN_INLINE void NAME(sum_stack)(const fbn_operands *o, const fbn_stretch *s, int64_t channel, int64_t rows, int vectors,
                                NAME(parts) p, int backward) {
    enum { STEP = FBN_LANES / WIDTH };
    const NAME(constants) k = NAME(constants_at)(o, channel, 0, p);
    const wide origin = wset(o->origin[channel]);
    const vec fill = vset((real)o->origin[channel]);
    const int64_t start = s->at + channel * s->n, end = start + s->n;
    for (int lane = 0; lane < FBN_LANES; lane += vectors * WIDTH) {
        double *sums = s->sums + channel * 2 * FBN_LANES + lane, *others = sums + (s->others - s->sums);
        wide sum[STEP], other[STEP];
        for (int j = 0; j < vectors; j++) {
            sum[j] = wget(sums + j * WIDTH);
            other[j] = wget(others + j * WIDTH);
        }
        int64_t i = start + lane;
        for (; i + vectors * WIDTH <= end; i += FBN_LANES)
            NAME(sum_stacked)(o, s, i, vectors, WIDTH, rows, &k, origin, fill, p, backward, sum, other);
        for (int j = 0; j < vectors && i + j * WIDTH < end; j++) {
            const int64_t at = i + j * WIDTH, n = NAME(least)(end - at, WIDTH);
            NAME(sum_stacked)(o, s, at, 1, n, rows, &k, origin, fill, p, backward, &sum[j], &other[j]);
        }
        for (int j = 0; j < vectors; j++) {
            wput(sums + j * WIDTH, sum[j]);
            wput(others + j * WIDTH, other[j]);
        }
    }
}

/* float64 takes all lanes at once, which are more sums that do not wait for each other. Gradients, and dtypes that are
 * computed in float32, whose sums take twice as many registers, take one vector of them. Only for FBN_ROWS images,
 * where lanes stay in registers for longest, are all of them faster. A single image needs no loop over rows. */
FBN_INLINE void NAME(sum_stacks)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p, int backward) {
    enum { STEP = FBN_LANES / WIDTH, IS_DOUBLE = sizeof(real) == sizeof(double) };
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    const fbn_stretch stretch = *s;
    const int64_t channels = stretch.channels, rows = stretch.rows;
    const int vectors = IS_DOUBLE && !backward ? STEP : 1;
    if (!(p.activation & NAME(ANY)) && rows == 1)
        for (int64_t c = 0; c < channels; c++) NAME(sum_stack)(&own, &stretch, c, 1, vectors, p, backward);
    else if (vectors < STEP && !backward && rows == FBN_ROWS)
        for (int64_t c = 0; c < channels; c++) NAME(sum_stack)(&own, &stretch, c, rows, STEP, p, backward);
    else
        for (int64_t c = 0; c < channels; c++) NAME(sum_stack)(&own, &stretch, c, rows, vectors, p, backward);
}

FBN_INLINE void NAME(sum_as)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward, NAME(parts) p) {
    if (columns) NAME(sum_columns)(o, s, p, backward);
    else NAME(sum_plane)(o, s, p, backward);
}

/* Adds parts of planes, or whole ones, by a loop that takes pieces of so many elements. Where a whole plane has several
 * pieces, its lanes are here. */
FBN_INLINE void NAME(sum_plane_pieces)(const fbn_operands *o, const fbn_stretch *s, int64_t piece, fbn_loop *sum) {
    if (!s->whole) {
        sum(o, s);
        return;
    }
    for (int64_t row = 0; row < s->rows; row++) {
        double lanes[2 * FBN_LANES] = {0};
        fbn_stretch plane = *s;
        plane.at += row * s->apart;
        plane.rows = 1;
        if (s->n > piece) {
            plane.sums = lanes;
            plane.others = lanes + FBN_LANES;
            plane.whole = 0;
        }
        sum(o, &plane);
        for (int k = 0; !plane.whole && k < FBN_LANES; k++) {
            s->sums[k] += plane.sums[k];
            s->others[k] += plane.others[k];
        }
    }
}
