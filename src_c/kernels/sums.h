/* sums.h: the sums of a channel: of x - origin and its square (moments), or of dz and dz * (x - mean) (the gradient),
 * where dz is the gradient of z.
 *
 * The origin of the moments is one of the channel's values, so that a large common offset cancels before the values are
 * squared. The sums are float64. Sums about the same origin can be added up, however the work was split.
 */

/* x, or gamma * xhat + beta, which takes its place if only y is known. */
FBN_INLINE vec NAME(x_at)(const elem *x, const elem *residual, int64_t n, const NAME(constants) * k, NAME(parts) p) {
    const vec v = NAME(load)(x, n);
    if (!(p.activation & FBN_FROM_Y)) return v;
    const vec z = NAME(inverse)(v, k->slope, p.activation);
    return p.has_residual ? vsub(z, NAME(load)(residual, n)) : z;
}

/* |dy|: positions that do not count are left out where it is 0. */
FBN_INLINE vec NAME(size_at)(const elem *dy, int64_t n) { return vsub(vset(0), vminus_abs(NAME(load)(dy, n))); }

FBN_INLINE vec NAME(dz_of)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(constants) * k,
                           NAME(parts) p) {
    const vec g = NAME(load)(dy, n);
    if ((p.activation & FBN_WHICH) == FBN_IDENTITY) return g;
    const vec v = NAME(load)(x, n);
    /* y has the sign of z. */
    if (p.activation & FBN_FROM_Y) return NAME(activation_gradient)(g, v, k->slope, p.activation & ~FBN_FROM_Y);
    const vec r = p.has_residual ? NAME(load)(residual, n) : vset(0);
    return NAME(activation_gradient)(g, NAME(preactivation)(v, r, k, p), k->slope, p.activation);
}

FBN_APART vec NAME(dz_part)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(constants) * k,
                            NAME(parts) p) {
    p.activation |= NAME(ANY);
    return NAME(dz_of)(dy, x, residual, n, k, p);
}

/* dz. Parts of vectors are left to a function that is not inlined, unless the activation's code is short. */
FBN_INLINE vec NAME(dz_at)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(constants) * k,
                           NAME(parts) p) {
    return n == WIDTH || NAME(is_short)(p.activation) ? NAME(dz_of)(dy, x, residual, n, k, p)
                                                      : NAME(dz_part)(dy, x, residual, n, k, p);
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
    const vec dz = NAME(dz_at)(dy, x, residual, n, k, p);
    /* The zeros that fill up x may be far from the mean, where the derivative may have no value. */
    wide g = widen(n == WIDTH ? dz : vjoin(dz, vset(0), n));
    const int plain = n == WIDTH && !(p.activation & FBN_FROM_Y);
    wide d = wsub(plain ? wload(x) : widen(NAME(x_at)(x, residual, n, k, p)), origin);
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

/* ---- planes ---- */

/* Adds the elements [i, end) to a plane's lanes, of which the first is that of element i. */
FBN_INLINE void NAME(sum_plane)(const fbn_operands *o, int64_t i, int64_t end, const NAME(constants) * k, wide origin,
                                vec fill, NAME(parts) p, int backward, double *lanes) {
    enum { STEP = FBN_LANES / WIDTH };
    wide sum[STEP], other[STEP];
    for (int j = 0; j < STEP; j++) {
        sum[j] = wget(lanes + j * WIDTH);
        other[j] = wget(lanes + FBN_LANES + j * WIDTH);
    }
    for (; i + FBN_LANES <= end; i += FBN_LANES)
        for (int j = 0; j < STEP; j++)
            NAME(sum_n)(o, i + j * WIDTH, WIDTH, k, origin, fill, p, backward, &sum[j], &other[j]);
    for (int j = 0; j < STEP && i + j * WIDTH < end; j++) {
        const int64_t n = NAME(least)(end - i - j * WIDTH, WIDTH);
        NAME(sum_n)(o, i + j * WIDTH, n, k, origin, fill, p, backward, &sum[j], &other[j]);
    }
    for (int j = 0; j < STEP; j++) {
        wput(lanes + j * WIDTH, sum[j]);
        wput(lanes + FBN_LANES + j * WIDTH, other[j]);
    }
}

/* A turn is a multiple of FBN_LANES elements, so that every turn begins with the first lane. */
FBN_INLINE void NAME(sum_all_planes)(const fbn_operands *o, fbn_planes r, double *lanes, NAME(parts) p, int backward) {
    const int64_t streams = NAME(streams)(o, r.images), turn = NAME(turn)(o, streams, r.inner);
    const int64_t ahead = o->walk.ahead / (int64_t)sizeof(elem);
    for (int64_t c = 0; c < r.channels; c++, lanes += 2 * FBN_LANES) {
        const NAME(constants) k = NAME(constants_at)(o, c, 0, p);
        const wide origin = wset(o->origin[c]);
        const vec fill = vset((real)o->origin[c]);
        double own[FBN_IMAGES][2 * FBN_LANES];
        for (int64_t s = 0; s < r.images; s++)
            for (int j = 0; j < 2 * FBN_LANES; j++) own[s][j] = 0;
        for (int64_t image = 0; image < r.images; image += streams)
            for (int64_t i = 0; i < r.inner; i += turn)
                for (int64_t s = image; s < NAME(least)(image + streams, r.images); s++) {
                    const int64_t at = c * r.step + s * r.apart + i, n = NAME(least)(turn, r.inner - i);
                    if (ahead) NAME(fetch)(o, at + ahead, n);
                    NAME(sum_plane)(o, at, at + n, &k, origin, fill, p, backward, own[s]);
                }
        for (int64_t s = 0; s < r.images; s++)
            for (int j = 0; j < 2 * FBN_LANES; j++) lanes[j] += own[s][j];
    }
}

/* ---- columns ---- */

/* Rows that are summed at a time, so that the accumulators are loaded and stored once for all of them. The rows are far
 * apart, since most processors read several streams faster than one. */
enum { NAME(MOMENTS_ROWS) = 8, NAME(GRAD_MOMENTS_ROWS) = 4 };

/* Adds n <= WIDTH columns of some rows, from element i on, which is in column c. */
FBN_INLINE void NAME(sum_rows)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int rows, int64_t apart,
                               double *sums, double *others, NAME(parts) p, int backward) {
    const NAME(constants) k = NAME(constants_at)(o, c, 1, p);
    const wide origin = wget(o->origin + c);
    wide sum = wget(sums + c), other = wget(others + c);
    for (int r = 0; r < rows; r++, i += apart) {
        prefetch((const char *)((const elem *)o->x + i) + FBN_AHEAD);
        if (backward) prefetch((const char *)((const elem *)o->dy + i) + FBN_AHEAD);
        NAME(sum_n)(o, i, n, &k, origin, vset(0), p, backward, &sum, &other);
    }
    wput(sums + c, sum);
    wput(others + c, other);
}

/* Adds the columns [c, end). */
FBN_APART void NAME(moments_rest)(const fbn_operands *o, int64_t at, int64_t c, int64_t end, int rows, int64_t apart,
                                  double *sums, double *others) {
    for (; c < end; c += WIDTH)
        NAME(sum_rows)(o, at + c, NAME(least)(end - c, WIDTH), c, rows, apart, sums, others, NAME(any_parts)(o), 0);
}
FBN_APART void NAME(grad_moments_rest)(const fbn_operands *o, int64_t at, int64_t c, int64_t end, int rows,
                                       int64_t apart, double *sums, double *others) {
    for (; c < end; c += WIDTH)
        NAME(sum_rows)(o, at + c, NAME(least)(end - c, WIDTH), c, rows, apart, sums, others, NAME(any_parts)(o), 1);
}
FBN_INLINE void NAME(sum_rest)(const fbn_operands *o, int64_t at, int64_t c, int64_t end, int rows, int64_t apart,
                               double *sums, double *others, int backward) {
    if (c == end) return;
    if (backward) NAME(grad_moments_rest)(o, at, c, end, rows, apart, sums, others);
    else NAME(moments_rest)(o, at, c, end, rows, apart, sums, others);
}

FBN_INLINE void NAME(sum_all_runs)(const fbn_operands *o, fbn_runs r, double *sums, double *others, NAME(parts) p,
                                   int backward) {
    const int rows = backward ? NAME(GRAD_MOMENTS_ROWS) : NAME(MOMENTS_ROWS);
    const int64_t times = r.count / rows, apart = times * r.apart;
    for (int64_t row = 0; row < times; row++) {
        const int64_t at = row * r.apart;
        int64_t c = 0;
        for (; c + WIDTH <= r.length; c += WIDTH)
            NAME(sum_rows)(o, at + c, WIDTH, c, rows, apart, sums, others, p, backward);
        NAME(sum_rest)(o, at, c, r.length, rows, apart, sums, others, backward);
    }
    for (int64_t row = rows * times; row < r.count; row++)
        NAME(sum_rest)(o, row * r.apart, 0, r.length, 1, 0, sums, others, backward);
}

/* ---- which loop serves a call ---- */

FBN_INLINE void NAME(sum_as)(const fbn_operands *o, const NAME(where) * w, double *sums, double *others, int activation,
                             int has_residual, int backward) {
    const NAME(parts) p = {activation, has_residual, activation & NAME(ANY) ? o->usual : 1, 0, 0};
    if (w->columns) NAME(sum_all_runs)(o, w->runs, sums, others, p, backward);
    else NAME(sum_all_planes)(o, w->planes, sums, p, backward);
}

FBN_INLINE void NAME(grad_moments)(const fbn_operands *o, const NAME(where) * w, double *sums, double *others) {
    switch (OWN_LOOPS && o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        NAME(sum_as)(o, w, sums, others, FBN_IDENTITY, 0, 1);
        break;
    case FBN_RELU:
        if (o->residual) NAME(sum_as)(o, w, sums, others, FBN_RELU, 1, 1);
        else NAME(sum_as)(o, w, sums, others, FBN_RELU, 0, 1);
        break;
    case FBN_SILU:
        NAME(sum_as)(o, w, sums, others, FBN_SILU, o->residual != NULL, 1);
        break;
    case FBN_SIGMOID:
        NAME(sum_as)(o, w, sums, others, FBN_SIGMOID, o->residual != NULL, 1);
        break;
    default:
        NAME(sum_as)(o, w, sums, others, o->activation | NAME(ANY), o->residual != NULL, 1);
    }
}

static void NAME(moments_planes)(const fbn_operands *o, fbn_planes planes, double *lanes) {
    NAME(sum_as)(o, &(NAME(where)){.planes = planes}, lanes, NULL, FBN_IDENTITY, 0, 0);
}
static void NAME(moments_columns)(const fbn_operands *o, fbn_runs runs, double *sums, double *others) {
    NAME(sum_as)(o, &(NAME(where)){.columns = 1, .runs = runs}, sums, others, FBN_IDENTITY, 0, 0);
}
static void NAME(grad_moments_planes)(const fbn_operands *o, fbn_planes planes, double *lanes) {
    NAME(grad_moments)(o, &(NAME(where)){.planes = planes}, lanes, NULL);
}
static void NAME(grad_moments_columns)(const fbn_operands *o, fbn_runs runs, double *sums, double *others) {
    NAME(grad_moments)(o, &(NAME(where)){.columns = 1, .runs = runs}, sums, others);
}

/* The median of three values of each channel, so that one outlier has no effect. */
static void NAME(set_origin)(const void *first_, const void *middle_, const void *last_, int64_t n, int64_t apart,
                             double *origin) {
    const elem *first = first_, *middle = middle_, *last = last_;
    for (int64_t c = 0; c < n; c++) {
        const double a = value_of(first + c * apart), b = value_of(middle + c * apart), d = value_of(last + c * apart);
        const double low = a < b ? a : b, high = a < b ? b : a, median = d < low ? low : d > high ? high : d;
        origin[c] = isfinite(median) ? median : 0;
    }
}
