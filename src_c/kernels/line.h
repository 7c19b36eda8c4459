/* line.h: one vector of a channel's straight line, the part that forward and backward share. */

/* A channel's (cf) or a vector of channels' (cl) constants. */
typedef struct {
    vec prescale, neg_mean, scale, shift, shift_low;
} NAME(line);

FBN_INLINE NAME(line) NAME(line_cf)(const fbn_line *l, int64_t c) {
    return (NAME(line)){vset(((const real *)l->prescale)[c]), vset(((const real *)l->neg_mean)[c]),
                        vset(((const real *)l->scale)[c]), vset(((const real *)l->shift)[c]),
                        vset(((const real *)l->shift_low)[c])};
}

FBN_INLINE NAME(line) NAME(line_cl)(const fbn_line *l, int64_t c) {
    return (NAME(line)){vget((const real *)l->prescale + c), vget((const real *)l->neg_mean + c),
                        vget((const real *)l->scale + c), vget((const real *)l->shift + c),
                        vget((const real *)l->shift_low + c)};
}

/* x - mean_hi: exact where x is near the mean, whatever the offset. */
FBN_INLINE vec NAME(centre)(vec x, const NAME(line) *l) { return vfma(x, l->prescale, l->neg_mean); }

/* What the activation gets. A residual may cancel the shift, so their sum keeps what its rounding loses (Knuth's
 * two-sum); where the sum is infinite there is nothing to keep. */
FBN_INLINE vec NAME(preactivation)(vec x, vec residual, const NAME(line) *l, int has_residual) {
    const vec d = NAME(centre)(x, l);
    if (!has_residual) return vfma(d, l->scale, l->shift);
    const vec sum = vadd(l->shift, residual), back = vsub(sum, l->shift);
    const vec lost = vadd(vsub(l->shift, vsub(sum, back)), vsub(residual, back));
    return vadd(vfma(d, l->scale, sum), vzero_nan(vadd(lost, l->shift_low)));
}

FBN_INLINE vec NAME(activate)(vec z, fbn_activation activation) {
    return activation == FBN_RELU ? vrelu(z) : z;
}

/* dy times the activation's slope at z. */
FBN_INLINE vec NAME(activation_gradient)(vec dy, vec z, fbn_activation activation) {
    return activation == FBN_RELU ? vkeep_if_positive(z, dy) : dy;
}

/* How many of the `left` elements this vector holds. */
FBN_INLINE int64_t NAME(fill_of)(int64_t left) { return left < 0 ? 0 : left < WIDTH ? left : WIDTH; }

/* Elements from p to the first address that is aligned to a vector. */
FBN_INLINE int64_t NAME(misaligned)(const elem *p) {
    return (int64_t)(-((uintptr_t)p / sizeof(elem)) % WIDTH);
}
