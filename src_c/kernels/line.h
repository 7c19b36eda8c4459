/* line.h: one vector of a channel's straight line, the part that forward and backward share. */

/* A channel's (cf) or a vector of channels' (cl) constants. */
typedef struct {
    vec prescale, neg_mean, scale, shift, shift_low;
    real slope;
} NAME(line);

/* Constants from channel c on: of that channel in every lane (period 0), or of the next channel in each. */
FBN_INLINE vec NAME(constant_at)(const void *constants, int64_t c, int64_t period) {
    const real *at = (const real *)constants + c;
    return period ? vget(at) : vset(*at);
}

FBN_INLINE NAME(line) NAME(line_at)(const fbn_line *l, int64_t c, int64_t period) {
    return (NAME(line)){NAME(constant_at)(l->prescale, c, period),  NAME(constant_at)(l->neg_mean, c, period),
                        NAME(constant_at)(l->scale, c, period),     NAME(constant_at)(l->shift, c, period),
                        NAME(constant_at)(l->shift_low, c, period), (real)l->slope};
}

/* The channel that is n elements on. */
FBN_INLINE int64_t NAME(onward)(int64_t c, int64_t n, int64_t period) {
    return !period ? c : c + n < period ? c + n : (c + n) % period;
}

/* x - mean_hi: exact where x is near the mean, whatever the offset. */
FBN_INLINE vec NAME(centre)(vec x, const NAME(line) * l) { return vfma(x, l->prescale, l->neg_mean); }

/* What the activation gets. shift_low is added last: y is near the shift where that matters. A residual may cancel the
 * shift, so their sum keeps what its rounding loses (Knuth's two-sum); where the sum is infinite there is nothing to
 * keep. */
FBN_INLINE vec NAME(preactivation)(vec x, vec residual, const NAME(line) * l, int has_residual) {
    const vec d = NAME(centre)(x, l);
    if (!has_residual) return vadd(vfma(d, l->scale, l->shift), l->shift_low);
    const vec sum = vadd(l->shift, residual), back = vsub(sum, l->shift);
    const vec lost = vadd(vsub(l->shift, vsub(sum, back)), vsub(residual, back));
    return vadd(vfma(d, l->scale, sum), vzero_nan(vadd(lost, l->shift_low)));
}

FBN_INLINE int64_t NAME(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* Elements from p to the first address that is aligned to a vector. */
FBN_INLINE int64_t NAME(misaligned)(const elem *p) { return (int64_t)(-((uintptr_t)p / sizeof(elem)) % WIDTH); }
