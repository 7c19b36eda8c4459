/* statistics.h: what is done in float64 for every dtype: the statistics of channels from their sums, and the folding of
 * sums. No two arrays overlap, which compilers must know to make vectors of a loop. */

static void OF_ISA(set_moments)(const double *restrict origin, const double *restrict sums, double count, int64_t n,
                                double *restrict squares, double *restrict mean, double *restrict mean_low,
                                double *restrict var) {
    for (int64_t c = 0; c < n; c++) {
        const double offset = sums[c] / count, m2 = squares[c] - sums[c] * offset, middle = origin[c] + offset;
        /* What the addition rounded away (Knuth's two-sum), or 0 where the sum was infinite. */
        const double back = middle - origin[c], lost = (origin[c] - (middle - back)) + (offset - back);
        mean[c] = middle;
        mean_low[c] = lost == lost ? lost : 0;
        squares[c] = m2 < 0 ? 0 : m2 <= DBL_MAX ? m2 : NAN; /* with an infinite one all of x would be the mean */
        var[c] = squares[c] / count;
    }
}

static void OF_ISA(invert)(const double *restrict var, double eps, int64_t n, double *restrict inv_std) {
    for (int64_t c = 0; c < n; c++) {
        const double inverse = 1 / sqrt(var[c] + eps);
        inv_std[c] = var[c] + eps == 0 ? 0 : inverse;
    }
}

/* The sums of n float64 numbers in the lanes of a vector: number i is added to lane i % FBN_LANES, and then the upper
 * half of the lanes to the lower, until they are one vector. */
FBN_INLINE f64_vec OF_ISA(lanes_of)(const double *values, int64_t n) {
    enum { STEP = FBN_LANES / F64_WIDTH };
    f64_vec sums[STEP];
    const int64_t whole = n / FBN_LANES * FBN_LANES;
    for (int j = 0; j < STEP; j++) sums[j] = f64_set(0);
    for (int64_t i = 0; i < whole; i += FBN_LANES)
        for (int j = 0; j < STEP; j++) sums[j] = f64_add(sums[j], f64_load(values + i + j * F64_WIDTH));
    for (int j = 0; j < STEP; j++) {
        const int64_t left = n - whole - j * F64_WIDTH, some = left < F64_WIDTH ? left : F64_WIDTH;
        if (some > 0) sums[j] = f64_add(sums[j], f64_load_n(values + whole + j * F64_WIDTH, some, f64_set(0)));
    }
    for (int half = STEP / 2; half; half /= 2)
        for (int j = 0; j < half; j++) sums[j] = f64_add(sums[j], sums[j + half]);
    return sums[0];
}

/* Within a vector the upper half of the lanes is added to the lower, too, for as many sums at once as fill a vector. */
FBN_INLINE void OF_ISA(fold_all)(const double *values, int64_t n, int64_t apart, int64_t count, double *sums) {
    for (int64_t c = 0; c < count; c += F64_WIDTH) {
        const int64_t some = count - c < F64_WIDTH ? count - c : F64_WIDTH;
        f64_vec lanes[F64_WIDTH];
        for (int k = 0; k < F64_WIDTH; k++) lanes[k] = OF_ISA(lanes_of)(values + (c + (k < some ? k : 0)) * apart, n);
        f64_store_n(sums + c, f64_sums(lanes), some);
    }
}
static void OF_ISA(fold)(const double *values, int64_t n, int64_t apart, int64_t count, double *sums) {
    if (n == FBN_LANES) OF_ISA(fold_all)(values, FBN_LANES, apart, count, sums); /* those of planes, in few steps */
    else OF_ISA(fold_all)(values, n, apart, count, sums);
}
