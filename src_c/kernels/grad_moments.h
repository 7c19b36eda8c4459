/* grad_moments.h: the sums of dz and of dz * (x - mean), per channel, where dz is the gradient of z. */

/* x, or gamma * xhat + beta, which takes its place if only y is known. */
FBN_INLINE vec NAME(x_at)(const elem *x, const elem *residual, int64_t n, const NAME(line) * l, int activation,
                          int has_residual) {
    const vec v = NAME(load)(x, n);
    if (!(activation & FBN_FROM_Y)) return v;
    const vec z = NAME(inverse)(v, l, activation);
    if (!has_residual) return z;
    return vsub(z, NAME(load)(residual, n));
}

/* |dy|: positions that do not count are left out where it is 0. */
FBN_INLINE vec NAME(size_at)(const elem *dy, int64_t n) { return vsub(vset(0), vminus_abs(NAME(load)(dy, n))); }

FBN_INLINE vec NAME(dz_of)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(line) * l,
                           int activation, int has_residual) {
    const vec g = NAME(load)(dy, n);
    if ((activation & FBN_WHICH) == FBN_IDENTITY) return g;
    const vec v = NAME(load)(x, n);
    /* y has the sign of z. */
    if (activation & FBN_FROM_Y) return NAME(activation_gradient)(g, v, l, activation & ~FBN_FROM_Y);
    const vec r = has_residual ? NAME(load)(residual, n) : vset(0);
    return NAME(activation_gradient)(g, NAME(preactivation)(v, r, l, has_residual), l, activation);
}

FBN_APART vec NAME(dz_part)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(line) * l,
                            int activation, int has_residual) {
    return NAME(dz_of)(dy, x, residual, n, l, activation | NAME(ANY), has_residual);
}

/* dz. Parts of vectors are left to a function that is not inlined, unless the activation's code is short. */
FBN_INLINE vec NAME(dz_at)(const elem *dy, const elem *x, const elem *residual, int64_t n, const NAME(line) * l,
                           int activation, int has_residual) {
    return n == WIDTH || NAME(is_short)(activation) ? NAME(dz_of)(dy, x, residual, n, l, activation, has_residual)
                                                    : NAME(dz_part)(dy, x, residual, n, l, activation, has_residual);
}

FBN_INLINE void NAME(grad_moments_at)(const elem *dy, const elem *x, const elem *residual, int64_t n,
                                      const NAME(line) * l, wide mean, int activation, int has_residual, wide *sum,
                                      wide *product) {
    if (n == WIDTH) {
        prefetch((const char *)dy + FBN_AHEAD);
        prefetch((const char *)x + FBN_AHEAD);
    }
    const vec dz = NAME(dz_at)(dy, x, residual, n, l, activation, has_residual);
    /* The zeros that fill up x may be far from the mean, where the derivative may have no value. */
    wide g = widen(n == WIDTH ? dz : vjoin(dz, vset(0), n));
    const wide v = n == WIDTH && !(activation & FBN_FROM_Y)
                       ? wload(x)
                       : widen(NAME(x_at)(x, residual, n, l, activation, has_residual));
    wide d = wsub(v, mean);
    if (activation & FBN_OUTSIDE) {
        const wide size = widen(NAME(size_at)(dy, n));
        g = wkeep_if_positive(size, g);
        d = wkeep_if_positive(size, d);
    }
    *sum = wadd(*sum, g);
    *product = wfma(g, d, *product);
}

/* Adds the elements [i, end) of a channel's plane to sum[j] and product[j], which have WIDTH lanes each. */
FBN_INLINE void NAME(grad_moments_run)(const fbn_grad_moments *g, int64_t i, int64_t end, const NAME(line) * l,
                                       wide mean, wide *sum, wide *product, int activation, int has_residual) {
    enum { STEP = FBN_LANES / WIDTH };
    const elem *dy = g->dy, *x = g->x, *residual = has_residual ? g->residual : g->x;
    for (; i + FBN_LANES <= end; i += FBN_LANES)
        for (int j = 0; j < STEP; j++)
            NAME(grad_moments_at)(dy + i + j * WIDTH, x + i + j * WIDTH, residual + i + j * WIDTH, WIDTH, l, mean,
                                  activation, has_residual, &sum[j], &product[j]);
    for (int j = 0; j < STEP && i + j * WIDTH < end; j++)
        NAME(grad_moments_at)(dy + i + j * WIDTH, x + i + j * WIDTH, residual + i + j * WIDTH,
                              NAME(least)(end - i - j * WIDTH, WIDTH), l, mean, activation, has_residual, &sum[j],
                              &product[j]);
}

FBN_INLINE void NAME(grad_moments_planes)(const fbn_grad_moments *g, fbn_planes p, double *lanes, int activation,
                                          int has_residual) {
    enum { STEP = FBN_LANES / WIDTH, TURN = FBN_TURN / sizeof(elem) };
    for (int64_t c = 0; c < p.channels; c++, lanes += 2 * FBN_LANES) {
        const NAME(line) l = NAME(line_at)(&g->line, c, 0);
        const wide mean = wset(g->mean[c]);
        wide sum[STEP], product[STEP];
        for (int j = 0; j < STEP; j++) {
            sum[j] = wget(lanes + j * WIDTH);
            product[j] = wget(lanes + FBN_LANES + j * WIDTH);
        }
        const int64_t end = c * p.step + p.inner;
        for (int64_t i = c * p.step; i < end; i += TURN)
            for (int64_t k = 0; k < p.images; k++)
                NAME(grad_moments_run)(g, k * p.apart + i, k * p.apart + NAME(least)(i + TURN, end), &l, mean, sum,
                                       product, activation, has_residual);
        for (int j = 0; j < STEP; j++) {
            wput(lanes + j * WIDTH, sum[j]);
            wput(lanes + FBN_LANES + j * WIDTH, product[j]);
        }
    }
}

static void NAME(grad_moments_cf)(const fbn_grad_moments *g, fbn_planes p, double *lanes) {
    switch (OWN_LOOPS ? g->activation : -1) {
    case FBN_IDENTITY:
        NAME(grad_moments_planes)(g, p, lanes, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (g->residual) NAME(grad_moments_planes)(g, p, lanes, FBN_RELU, 1);
        else NAME(grad_moments_planes)(g, p, lanes, FBN_RELU, 0);
        break;
    case FBN_SILU:
        NAME(grad_moments_planes)(g, p, lanes, FBN_SILU, g->residual != NULL);
        break;
    case FBN_SIGMOID:
        NAME(grad_moments_planes)(g, p, lanes, FBN_SIGMOID, g->residual != NULL);
        break;
    default:
        NAME(grad_moments_planes)(g, p, lanes, g->activation | NAME(ANY), g->residual != NULL);
    }
}

/* The number of rows, far apart, that are summed at a time, as in moments.h. */
enum { NAME(GRAD_MOMENTS_ROWS) = 4 };

/* Sums n <= WIDTH columns from channel c on. */
FBN_INLINE void NAME(grad_moments_rows)(const fbn_grad_moments *g, int64_t at, int64_t n, int64_t c, int rows,
                                        int64_t apart, double *sums, double *products, int activation,
                                        int has_residual) {
    const elem *dy = g->dy, *x = g->x, *residual = has_residual ? g->residual : g->x;
    const NAME(line) l = NAME(line_at)(&g->line, c, 1);
    const wide mean = wget(g->mean + c);
    wide sum = wget(sums + c), product = wget(products + c);
    for (int64_t r = 0, i = at + c; r < rows; r++, i += apart)
        NAME(grad_moments_at)(dy + i, x + i, residual + i, n, &l, mean, activation, has_residual, &sum, &product);
    wput(sums + c, sum);
    wput(products + c, product);
}

/* Sums all columns from channel c on, of one row or of several. */
FBN_APART void NAME(grad_moments_rest)(const fbn_grad_moments *g, int64_t at, int64_t c, int64_t channels, int rows,
                                       int64_t apart, double *sums, double *products) {
    for (; c < channels; c += WIDTH)
        NAME(grad_moments_rows)(g, at, NAME(least)(channels - c, WIDTH), c, rows, apart, sums, products,
                                g->activation | NAME(ANY), g->residual != NULL);
}

FBN_INLINE void NAME(grad_moments_all)(const fbn_grad_moments *g, int64_t rows, int64_t channels, double *sums,
                                       double *products, int activation, int has_residual) {
    enum { ROWS = NAME(GRAD_MOMENTS_ROWS) };
    const int64_t times = rows / ROWS, apart = times * channels;
    for (int64_t at = 0; at < apart; at += channels) {
        int64_t c = 0;
        for (; c + WIDTH <= channels; c += WIDTH)
            NAME(grad_moments_rows)(g, at, WIDTH, c, ROWS, apart, sums, products, activation, has_residual);
        if (c < channels) NAME(grad_moments_rest)(g, at, c, channels, ROWS, apart, sums, products);
    }
    for (int64_t at = ROWS * apart; at < rows * channels; at += channels)
        NAME(grad_moments_rest)(g, at, 0, channels, 1, 0, sums, products);
}

static void NAME(grad_moments_cl)(const fbn_grad_moments *g, int64_t rows, int64_t channels, double *sums,
                                  double *products) {
    switch (OWN_LOOPS ? g->activation : -1) {
    case FBN_IDENTITY:
        NAME(grad_moments_all)(g, rows, channels, sums, products, FBN_IDENTITY, 0);
        break;
    case FBN_RELU:
        if (g->residual) NAME(grad_moments_all)(g, rows, channels, sums, products, FBN_RELU, 1);
        else NAME(grad_moments_all)(g, rows, channels, sums, products, FBN_RELU, 0);
        break;
    case FBN_SILU:
        NAME(grad_moments_all)(g, rows, channels, sums, products, FBN_SILU, g->residual != NULL);
        break;
    case FBN_SIGMOID:
        NAME(grad_moments_all)(g, rows, channels, sums, products, FBN_SIGMOID, g->residual != NULL);
        break;
    default:
        NAME(grad_moments_all)(g, rows, channels, sums, products, g->activation | NAME(ANY), g->residual != NULL);
    }
}
