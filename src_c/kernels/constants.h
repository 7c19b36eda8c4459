/* constants.h: a channel's constants, from what the foreman knows of it in float64. */

/* x - mean and its products stay inside the exponent range if both are scaled by 2^e. That is 0 for any usual
 * channel; where the spread is below 2^-60 or above 2^60 (of float32), it brings x - mean near 1. */
enum { NAME(EXPONENT) = sizeof(real) == 8 ? 1020 : 124, NAME(USUAL) = sizeof(real) == 8 ? 500 : 60 };

static int NAME(prescale_exponent)(double mean, double inv_std) {
    const int most = NAME(EXPONENT);
    if (!(inv_std > 0) || !isfinite(inv_std) || !isfinite(mean)) return 0;
    int e = ilogb(inv_std);
    if (e >= -NAME(USUAL) && e <= NAME(USUAL)) e = 0;
    if (mean != 0 && e > most - 2 - ilogb(mean)) e = most - 2 - ilogb(mean);
    return e < -most ? -most : e > most ? most : e;
}

/* Whether the exponent is 0, without asking for it. */
FBN_INLINE int NAME(is_usual)(double mean, double inv_std) {
    const double spread = sizeof(real) == 8 ? 0x1p500 : 0x1p60, most = sizeof(real) == 8 ? 0x1p1000 : 0x1p120;
    return inv_std < spread && inv_std > 1 / spread && mean < most && mean > -most;
}

/* y = ((x - mean_hi) - mean_lo) * inv_std * gamma + beta, where mean_lo * inv_std * gamma moves into the shift. */
FBN_INLINE void NAME(set_one_line)(const fbn_channels *k, int64_t c, double prescale, const fbn_line *l) {
    const real mean_hi = (real)k->mean[c];
    const double mean_lo = (k->mean[c] - mean_hi) + k->mean_low[c], slope = k->inv_std[c] * k->gamma[c];
    const double moved = mean_lo * slope, shift = k->beta[c] - moved;
    const real shift_hi = (real)shift;
    ((real *)l->prescale)[c] = (real)prescale;
    ((real *)l->neg_mean)[c] = (real)(-mean_hi * prescale);
    ((real *)l->scale)[c] = (real)(slope / prescale);
    ((real *)l->shift)[c] = shift_hi;
    ((real *)l->shift_low)[c] = (real)((k->beta[c] - shift_hi) - moved);
}

static void NAME(set_line)(const fbn_channels *known, int64_t n, const fbn_line *line) {
    int64_t usual = 0;
    for (int64_t c = 0; c < n; c++) usual += NAME(is_usual)(known->mean[c], known->inv_std[c]);
    if (usual == n)
        for (int64_t c = 0; c < n; c++) NAME(set_one_line)(known, c, 1, line);
    else
        for (int64_t c = 0; c < n; c++)
            NAME(set_one_line)(known, c, ldexp(1, NAME(prescale_exponent)(known->mean[c], known->inv_std[c])), line);
}

/* dx = A dz + B (x - mean) + D, with A = gamma/std, B = -A sum(dz (x - mean)) / (M var), D = -A sum(dz) / M
 * (Ioffe & Szegedy 2015, section 3, gathered by input). The kernel has x - mean_hi, prescaled. */
static void NAME(set_slopes)(const fbn_channels *k, const double *sums, const double *products, double count, int64_t n,
                             const fbn_line *line, const fbn_slopes *slopes) {
    real *on_dy = slopes->on_dy, *on_x = slopes->on_x, *constant = slopes->constant;
    for (int64_t c = 0; c < n; c++) {
        const double a = k->inv_std[c] * k->gamma[c], b = -a * k->inv_std[c] * k->inv_std[c] * products[c] / count;
        const double mean_lo = (k->mean[c] - (real)k->mean[c]) + k->mean_low[c];
        on_dy[c] = (real)a;
        on_x[c] = (real)(b / ((const real *)line->prescale)[c]);
        constant[c] = (real)(-a * sums[c] / count - b * mean_lo);
    }
}
