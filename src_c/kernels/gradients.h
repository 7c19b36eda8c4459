/* gradients.h: what sums and maps of a gradient read: dz, the gradient of z, and x. */

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

/* Whether a loop computes AT_ONCE vectors of a SiLU or a sigmoid at once. */
FBN_INLINE int NAME(is_smooth)(NAME(parts) p) {
    return (int)NAME(AT_ONCE) > 1 && p.usual && (p.activation == FBN_SILU || p.activation == FBN_SIGMOID);
}

/* activation(z) or dz of AT_ONCE vectors from element i on: of one channel, whose constants are k, or of columns from
 * column c on. */
FBN_INLINE void NAME(smooth_of)(const fbn_operands *o, int64_t i, int64_t c, int columns, const NAME(constants) * k,
                                NAME(parts) p, int derives, vec *to) {
    vec z[NAME(AT_ONCE)];
    for (int j = 0; j < NAME(AT_ONCE); j++) {
        const int64_t at = i + j * WIDTH;
        const NAME(constants) of_vector = columns ? NAME(constants_at)(o, c + j * WIDTH, 1, p) : *k;
        const vec r = p.has_residual ? vload((const elem *)o->residual + at) : vset(0);
        z[j] = NAME(preactivation)(vload((const elem *)o->x + at), r, &of_vector, p);
    }
    NAME(smooth)(z, NAME(AT_ONCE), p.activation == FBN_SILU, derives, to);
    for (int j = 0; derives && j < NAME(AT_ONCE); j++) to[j] = vmul(vload((const elem *)o->dy + i + j * WIDTH), to[j]);
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
