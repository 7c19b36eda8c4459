/* origins.h: about which value are a channel's moments summed? */

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
