/* constants.h: the constants of a channel, computed from what is known about it in float64.
 *
 * Usual channels use the plain formula. Where the spread (std) or the gain (gamma / std) is near an end of the exponent
 * range, powers of two that cancel each other keep intermediate results within the range.
 */

/* No two arrays overlap, which compilers must know to make vectors of a loop. */
static void NAME(get)(const void *from_, int64_t n, double *restrict to) {
    const real *restrict from = from_;
    for (int64_t c = 0; c < n; c++) to[c] = from[c];
}

static void NAME(blend)(void *running_, const double *restrict batch, double momentum, double factor, int64_t n) {
    real *restrict running = running_;
    const double kept = 1 - momentum;
    for (int64_t c = 0; c < n; c++) running[c] = (real)(kept * running[c] + momentum * (batch[c] * factor));
}

/* Exponents within +-USUAL need no powers of two. Those of constants do not exceed +-MOST. Powers of two are applied in
 * two equal steps, their roots, which must not be subnormal numbers. They are computed in float64, which must hold
 * them: their exponents do not exceed +-FURTHEST. x - mean overflows for no finite x if the exponent of the mean is
 * less than LARGE. Sums of three terms have ROOM. */
enum {
    NAME(MOST) = sizeof(real) == 8 ? 1016 : 120,
    NAME(FURTHEST) = sizeof(real) == 8 ? 1016 : 252,
    NAME(USUAL) = sizeof(real) == 8 ? 500 : 60,
    NAME(LARGE) = sizeof(real) == 8 ? 960 : 100,
    NAME(ROOM) = 8
};

static int NAME(exponent_of)(double v) { return v == 0 || !isfinite(v) ? 0 : ilogb(v); }

/* The exponent of the gain, gamma / std, or one less where float64 cannot hold the gain as a normal number. */
static int NAME(gain_exponent)(const fbn_channels *k, int64_t c) {
    const double inv_std = k->inv_std[c], gamma = k->gamma[c], gain = inv_std * gamma;
    return fabs(gain) >= DBL_MIN && isfinite(gain) ? ilogb(gain)
                                                   : NAME(exponent_of)(inv_std) + NAME(exponent_of)(gamma);
}

static int NAME(between)(int e, int low, int high) { return e < low ? low : e > high ? high : e; }

/* The power of two whose square has the exponent e, or e - 1 if e is odd, within +-FURTHEST. */
static double NAME(root)(int e) {
    const int limited = NAME(between)(e, -NAME(FURTHEST), NAME(FURTHEST));
    return ldexp(1, (limited - (limited & 1)) / 2);
}

/* The largest exponent of prescale with which x - mean overflows, for a finite x, only where y does, too: with the
 * statistics of other values, x may be any number of standard deviations from the mean. */
static int NAME(largest_prescale)(double mean, int steep, int is_flat) {
    const int any_x = NAME(exponent_of)(mean) < NAME(LARGE) ? 0 : -1, as_y = steep - 2;
    return is_flat || any_x > as_y ? any_x : as_y;
}

/* The exponent e of prescale squared. For an unusual spread, it scales x - mean to about 1. It also keeps scale =
 * gain / 2^e and the scaled mean within the range. */
static int NAME(prescale_exponent)(const fbn_channels *k, int64_t c) {
    const int most = NAME(MOST), furthest = NAME(FURTHEST), is_flat = k->inv_std[c] == 0 || k->gamma[c] == 0;
    const int spread = NAME(exponent_of)(k->inv_std[c]), steep = NAME(gain_exponent)(k, c);
    const double mean = k->mean[c];
    int e = spread >= -NAME(USUAL) && spread <= NAME(USUAL) ? 0 : spread;
    e = NAME(between)(e, -furthest, NAME(largest_prescale)(mean, steep, is_flat));
    if (!is_flat) e = NAME(between)(e, steep - most, steep + most);
    if (mean != 0) e = NAME(between)(e, -furthest, most - NAME(exponent_of)(mean));
    return e;
}

/* Whether all exponents of a channel are usual, as a number of the size of a double, which keeps the vectors of a loop
 * whole. Comparisons are faster than computing the exponents. */
FBN_INLINE int64_t NAME(is_usual)(const fbn_channels *k, int64_t c) {
    const double high = sizeof(real) == 8 ? 0x1p500 : 0x1p60, low = 1 / high;
    const double inv_std = k->inv_std[c], gamma = k->gamma[c], gain = inv_std * gamma;
    const int64_t usual_spread = (fabs(inv_std) < high) & (fabs(inv_std) > low);
    const int64_t usual_gain = (fabs(gain) < high) & ((fabs(gain) > low) | (gamma == 0));
    return usual_spread & usual_gain & (fabs(k->mean[c]) < high);
}

/* v rounded. A NaN becomes the plain one, as bfloat16 needs (see H_store in simd/baseline.h). */
FBN_INLINE real NAME(rounded)(double v) {
    const real r = (real)v;
    return r == r ? r : (real)NAN;
}

/* Limits a finite v to the compute type's range. If the exponents cannot all be in range, either x is the mean or the
 * result overflows, and an infinite scale would turn the former, 0 * inf, into NaN. */
FBN_INLINE double NAME(finite)(double v) {
    const double most = sizeof(real) == 8 ? DBL_MAX : FLT_MAX;
    const double most_signed = v < 0 ? -most : most;
    return fabs(v) > most && fabs(v) <= DBL_MAX ? most_signed : v;
}

/* a * b, or the largest number of its sign where two finite numbers have a product that is not. */
FBN_INLINE double NAME(times)(double a, double b) {
    const double product = a * b, most = product < 0 ? -DBL_MAX : DBL_MAX;
    return fabs(product) > DBL_MAX && fabs(a) <= DBL_MAX && fabs(b) <= DBL_MAX ? most : product;
}

/* The mean that the map subtracts: it is rounded or, where that is infinite, multiplied by the power of two before. */
FBN_INLINE double NAME(mean_hi)(double mean, double square, int plain) {
    const int is_beyond = sizeof(real) < 8 && fabs(mean) > FLT_MAX && fabs(mean) <= DBL_MAX;
    return !plain && is_beyond ? (real)(mean * square) / square : (real)mean;
}

/* Where T_line has a factor of two parts, scale is rounded towards zero, so that the rest has its sign: a rounded scale
 * that is too large becomes the number before it. The rest must not be 0, since an infinite x times 0 is NaN. */
FBN_INLINE void NAME(set_scale)(double scale, int64_t c, const fbn_constants *to) {
    const real nearest = NAME(rounded)(scale);
    const real hi = fabs(nearest) > fabs(scale) ? (real)(scale * (1 - 0x1p-24)) : nearest;
    const double rest = scale - hi;
    ((real *)to->of[FBN_SCALE])[c] = SPLITS_SCALE ? hi : nearest;
    if (SPLITS_SCALE) ((real *)to->of[FBN_SCALE_LOW])[c] = NAME(rounded)(fabs(rest) > 0 ? rest : scale * 0x1p-60);
}

/* y = ((x - mean_hi) - mean_lo) * gain + beta, where mean_lo * gain is moved into the shift. Where `plain` is 1 the
 * channel is taken for a usual one, in which nothing overflows: what is done about that would cost the loop's vectors.
 */
FBN_INLINE void NAME(set_one_line)(const fbn_channels *k, int64_t c, double prescale, int plain,
                                   const fbn_constants *to) {
    const double square = prescale * prescale, mean_hi = NAME(mean_hi)(k->mean[c], square, plain);
    const double mean_lo = (k->mean[c] - mean_hi) + k->mean_low[c], factor = k->inv_std[c] / square;
    const double scale = plain ? factor * k->gamma[c] : NAME(times)(factor, k->gamma[c]);
    const double moved = prescale == 1 ? mean_lo * scale : NAME(finite)(mean_lo * square * scale);
    const double shift = k->beta[c] - moved;
    const real shift_hi = NAME(rounded)(shift), shift_low = (real)((k->beta[c] - shift_hi) - moved);
    ((real *)to->of[FBN_PRESCALE])[c] = (real)prescale;
    ((real *)to->of[FBN_NEG_MEAN])[c] = NAME(rounded)(-mean_hi * square);
    NAME(set_scale)(NAME(finite)(scale), c, to);
    ((real *)to->of[FBN_SHIFT])[c] = shift_hi;
    /* NaN or infinite where the shift is infinite; and +0 rather than -0, since a loop that does not read it adds +0.
     */
    const int counts = fabs(shift_low) > 0 && (plain || shift_low - shift_low == 0);
    ((real *)to->of[FBN_SHIFT_LOW])[c] = counts ? shift_low : 0;
}

/* Whether the line of channel c is plain, and needs no prescale. A large shift may be beyond the range. If the scale is
 * split, the product with it may overflow before a large shift is added, though y does not. */
FBN_INLINE int NAME(has_usual_line)(const fbn_channels *k, int64_t c) {
    const int usual = NAME(is_usual)(k, c);
    return sizeof(real) == 8 ? usual : usual & (fabs(k->beta[c]) < 0x1p100);
}

/* Where the scale is split, loops take a prescale of 1 to mean that the line is usual. Any other channel that needs
 * none gets -1, whose square is 1. */
static double NAME(unusual_root)(int e) { return SPLITS_SCALE && NAME(root)(e) == 1 ? -1 : NAME(root)(e); }

static double NAME(prescale_of)(const fbn_channels *k, int64_t c) {
    const int e = NAME(prescale_exponent)(k, c);
    return NAME(has_usual_line)(k, c) ? NAME(root)(e) : NAME(unusual_root)(e);
}

/* Only plain lines are worth being copied into loops. */
FBN_APART void NAME(set_scaled_line)(const fbn_channels *k, int64_t c, double prescale, const fbn_constants *to) {
    NAME(set_one_line)(k, c, prescale, 0, to);
}

static void NAME(set_line)(const fbn_channels *k, int64_t n, const fbn_constants *to) {
    const fbn_channels known = *k; /* no store can change these, so the loops need not read them again */
    const fbn_constants own = *to;
    int64_t usual = 0;
    for (int64_t c = 0; c < n; c++) {
        NAME(set_one_line)(&known, c, 1, 1, &own);
        usual += NAME(has_usual_line)(&known, c);
    }
    if (usual == n) return;
    for (int64_t c = 0; c < n; c++) NAME(set_scaled_line)(&known, c, NAME(prescale_of)(&known, c), &own);
}

/* dx = gain (dz + B (x - mean) + D), with gain = gamma / std, B = -sum(dz (x - mean)) / (M var), D = -sum(dz) / M
 * (Ioffe & Szegedy 2015, section 3, solved for dx). The kernel computes x - mean_hi, prescaled. */
FBN_INLINE void NAME(set_one_gradient)(const fbn_channels *k, int64_t c, double sum, double product, double count,
                                       double postscale, int plain, const fbn_constants *to) {
    const double factor = k->inv_std[c] / (postscale * postscale);
    const double a = plain ? factor * k->gamma[c] : NAME(times)(factor, k->gamma[c]);
    const double b = -(product * k->inv_std[c]) / count * a, prescale = ((const real *)to->of[FBN_PRESCALE])[c];
    const double square = prescale * prescale, mean_hi = NAME(mean_hi)(k->mean[c], square, plain);
    const double mean_lo = (k->mean[c] - mean_hi) + k->mean_low[c];
    const double moved = b * k->inv_std[c] * mean_lo, constant = -a * sum / count - moved;
    const double limited = fabs(constant) <= DBL_MAX ? constant : NAME(times)(-a, sum / count) - moved;
    ((real *)to->of[FBN_ON_DY])[c] = NAME(rounded)(plain ? a : NAME(finite)(a));
    ((real *)to->of[FBN_ON_X])[c] = NAME(rounded)(b * (k->inv_std[c] / square));
    ((real *)to->of[FBN_CONSTANT])[c] = NAME(rounded)(plain ? constant : NAME(finite)(limited));
    ((real *)to->of[FBN_POSTSCALE])[c] = (real)postscale;
}

/* Whether channel c, whose constants have been set without a postscale, needs none: it is usual, on_x, a product of the
 * gain, 1 / std and the sums, is far from the ends of the range, and so is the constant from its upper one. All numbers
 * are of one size, as in is_usual. */
FBN_INLINE int64_t NAME(fits)(const fbn_channels *k, int64_t c, double product, const fbn_constants *to) {
    const double high = sizeof(real) == 8 ? 0x1p900 : 0x1p100, low = 1 / high;
    const double on_x = fabs((double)((const real *)to->of[FBN_ON_X])[c]);
    const double constant = fabs((double)((const real *)to->of[FBN_CONSTANT])[c]);
    const int64_t is_small = (on_x < low) & (product != 0), is_large = (on_x > high) | (constant > high);
    return NAME(is_usual)(k, c) & ~is_small & ~is_large;
}

/* The exponent of postscale squared, for a gain with the exponent `steep` and sums of which the larger, over M, has the
 * exponent `size`. The terms of dx are divided by the power of two.
 *
 * It is that of the gain, which leaves dz as it is, and ROOM for the sum of the terms where dz is large. If the sums
 * are tiny, so may be dz, which would be rounded as a subnormal number: then the power is less, but at least 1, and
 * makes the terms about 2^-SMALL. It also keeps the gain within the range. A large dz, whose sums happen to be tiny,
 * overflows only where dx does.
 */
static int NAME(postscale_exponent)(int steep, int size) {
    enum { SMALL = 40 };
    if (size >= -SMALL || steep < 0) return size > 60 ? steep + NAME(ROOM) : steep;
    const int least = steep > NAME(MOST) ? steep - NAME(MOST) : 0;
    return steep + size + SMALL > least ? steep + size + SMALL : least;
}

/* Chooses the powers of two of a channel that does not fit. on_x must be neither too large, which takes a larger
 * postscale, nor a subnormal number, which takes the prescale of the spread. Where the map computes z, the scale of y
 * must not leave the range: it may be beyond it with that prescale if gamma is, and then the postscale is smaller.
 * Exponents of products are found from those of their factors, since the products may be infinite or 0. */
static void NAME(set_scaled_gradient)(const fbn_channels *k, int64_t c, double sum, double product, double count,
                                      int computes_z, const fbn_constants *to) {
    const int steep = NAME(gain_exponent)(k, c), spread = NAME(exponent_of)(k->inv_std[c]);
    const int of_sum = NAME(exponent_of)(sum) - NAME(exponent_of)(count);
    const int of_product = NAME(exponent_of)(product) + spread - NAME(exponent_of)(count);
    const int size = product == 0 || (sum != 0 && of_sum > of_product) ? of_sum : of_product;
    const int scaled = 2 * NAME(exponent_of)(((const real *)to->of[FBN_PRESCALE])[c]);
    int e = steep - NAME(between)(steep, -NAME(ROOM), NAME(MOST)), of_x = of_product + spread - scaled + steep;
    if (sum != 0 || product != 0) e = NAME(postscale_exponent)(steep, size);
    const int least = computes_z ? steep - NAME(MOST) + 1 : spread, best = spread > least ? spread : least;
    if (product != 0 && best < scaled && of_x - e < -NAME(MOST)) {
        NAME(set_scaled_line)(k, c, NAME(unusual_root)(best), to);
        of_x += scaled - 2 * NAME(exponent_of)(NAME(root)(best));
    }
    if (product != 0 && best > spread && of_x - e < -NAME(MOST))
        e = NAME(between)(of_x + NAME(MOST), steep > NAME(MOST) ? steep - NAME(MOST) : 0, e);
    if (product != 0 && of_x - e > NAME(MOST)) e = of_x - NAME(MOST);
    NAME(set_one_gradient)(k, c, sum, product, count, NAME(root)(e), 0, to);
}

/* Whether a channel gets a postscale must depend on that channel alone: it may change how a subnormal dx is rounded. */
static void NAME(set_gradient)(const fbn_channels *k, const double *sums, const double *products, double count,
                               int computes_z, int64_t n, const fbn_constants *to) {
    const fbn_channels known = *k; /* no store can change these, so the loops need not read them again */
    const fbn_constants own = *to;
    int64_t fit = 0;
    for (int64_t c = 0; c < n; c++) NAME(set_one_gradient)(&known, c, sums[c], products[c], count, 1, 1, &own);
    for (int64_t c = 0; c < n; c++) fit += NAME(fits)(&known, c, products[c], &own);
    for (int64_t c = 0; fit < n && c < n; c++)
        if (!NAME(fits)(k, c, products[c], to))
            NAME(set_scaled_gradient)(k, c, sums[c], products[c], count, computes_z, to);
}

/* For the columns of small planes. Whole vectors are written, whose ends the next channel overwrites. */
static void NAME(spread)(const void *from_, int64_t n, int64_t times, void *to_) {
    const real *from = from_;
    real *to = to_;
    for (int64_t c = 0; c < n; c++, to += times)
        for (int64_t i = 0; i < times; i += WIDTH) vstore(to + i, vset(from[c]));
}
