/* moments.h: the sums of x - origin and of its square, per channel.
 *
 * The origin is one of the channel's values, so that a large common offset cancels before the values are squared. The
 * sums are float64. Sums about the same origin can be added up, however the work was split.
 */

/* Adds the elements [i, end) of a channel's plane to sum[j] and square[j], which have WIDTH lanes each. */
FBN_INLINE void NAME(moments_run)(const elem *x, int64_t i, int64_t end, wide origin, vec fill, wide *sum,
                                  wide *square) {
    enum { STEP = FBN_LANES / WIDTH };
    for (; i + FBN_LANES <= end; i += FBN_LANES) {
        prefetch((const char *)(x + i) + FBN_AHEAD);
        for (int j = 0; j < STEP; j++) {
            const wide d = wsub(wload(x + i + j * WIDTH), origin);
            sum[j] = wadd(sum[j], d);
            square[j] = wfma(d, d, square[j]);
        }
    }
    for (int j = 0; j < STEP && i + j * WIDTH < end; j++) {
        const int64_t n = NAME(least)(end - i - j * WIDTH, WIDTH);
        const wide d = wsub(widen(vload_n(x + i + j * WIDTH, n, fill)), origin);
        sum[j] = wadd(sum[j], d);
        square[j] = wfma(d, d, square[j]);
    }
}

static void NAME(moments_cf)(const void *x_, fbn_planes p, const double *origin, double *lanes) {
    enum { STEP = FBN_LANES / WIDTH, TURN = FBN_TURN / sizeof(elem) };
    const elem *x = x_;
    for (int64_t c = 0; c < p.channels; c++, x += p.step, lanes += 2 * FBN_LANES) {
        const wide o = wset(origin[c]);
        const vec fill = vset((real)origin[c]);
        wide sum[STEP], square[STEP];
        for (int j = 0; j < STEP; j++) {
            sum[j] = wget(lanes + j * WIDTH);
            square[j] = wget(lanes + FBN_LANES + j * WIDTH);
        }
        for (int64_t i = 0; i < p.inner; i += TURN)
            for (int64_t k = 0; k < p.images; k++)
                NAME(moments_run)(x + k * p.apart, i, NAME(least)(i + TURN, p.inner), o, fill, sum, square);
        for (int j = 0; j < STEP; j++) {
            wput(lanes + j * WIDTH, sum[j]);
            wput(lanes + FBN_LANES + j * WIDTH, square[j]);
        }
    }
}

/* The number of rows that are summed at a time, so that the accumulators are loaded and stored once for all of them.
 * The rows are far apart, since memory serves several streams faster than one. */
enum { NAME(MOMENTS_ROWS) = 8 };

FBN_INLINE void NAME(moments_rows)(const elem *x, int rows, int64_t n, int64_t apart, wide o, double *sums,
                                   double *squares) {
    wide sum = wget(sums), square = wget(squares);
    for (int r = 0; r < rows; r++, x += apart) {
        prefetch((const char *)x + FBN_AHEAD);
        const wide d = wsub(n == WIDTH ? wload(x) : widen(vload_n(x, n, vset(0))), o);
        sum = wadd(sum, d);
        square = wfma(d, d, square);
    }
    wput(sums, sum);
    wput(squares, square);
}

static void NAME(moments_cl)(const void *x_, int64_t rows, int64_t channels, const double *origin, double *sums,
                             double *squares) {
    enum { ROWS = NAME(MOMENTS_ROWS) };
    const int64_t times = rows / ROWS, apart = times * channels;
    const elem *x = x_;
    for (int64_t r = 0; r < times; r++, x += channels) {
        int64_t c = 0;
        for (; c + WIDTH <= channels; c += WIDTH)
            NAME(moments_rows)(x + c, ROWS, WIDTH, apart, wget(origin + c), sums + c, squares + c);
        if (c < channels) NAME(moments_rows)(x + c, ROWS, channels - c, apart, wget(origin + c), sums + c, squares + c);
    }
    x = (const elem *)x_ + ROWS * apart;
    for (int64_t r = ROWS * times; r < rows; r++, x += channels)
        for (int64_t c = 0; c < channels; c += WIDTH)
            NAME(moments_rows)(x + c, 1, NAME(least)(channels - c, WIDTH), 0, wget(origin + c), sums + c, squares + c);
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
