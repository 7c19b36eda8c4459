/* activations.h: the activations and their derivatives. Definitions, and derivatives at kinks, are PyTorch's.
 *
 * sigmoid(z) = 1 / (1 + e) for z >= 0 and e / (1 + e) for z < 0, with e = exp(-|z|), which cannot overflow. The two
 * factors of e are multiplied at the end, so that subnormal results are rounded once. sigmoid is within 2.5 ulp, and
 * silu(z) = z sigmoid(z) within 3 ulp. Derivatives are within 4.5 ulp of the terms of which they are the sum.
 */

/* 1 + e = 1 + 2^k (1 + excess) */
FBN_INLINE vec NAME(one_more)(NAME(scaled) e) { return vadd(vset(1), NAME(times)(vldexp(vset(1), e.exponent), e)); }

/* z, but no less than -FAR, and NaN if it is infinite: at -inf, z * sigmoid(z) and its derivative have no value. */
FBN_INLINE vec NAME(near_z)(vec z) { return vmuladd(z, vset(0), vmax(vset(-NAME(FAR)), z)); }

/* z * sigmoid(z) if times_z, else sigmoid(z). */
FBN_INLINE vec NAME(sigmoid)(vec z, int times_z) {
    const vec zero = vset(0), one = vset(1);
    const NAME(scaled) e = NAME(exp_of_minus)(z);
    const vec left = NAME(times)(times_z ? NAME(near_z)(z) : one, e), right = times_z ? z : one;
    const vec ratio = vdiv(vwhere_less(z, zero, left, right), NAME(one_more)(e));
    return vwhere_less(z, zero, vldexp(ratio, e.exponent), ratio);
}

/* Its derivative: s + z s (1 - s) if times_z, else s (1 - s), where s = sigmoid(z) and 1 - s = sigmoid(-z). */
FBN_INLINE vec NAME(sigmoid_derivative)(vec z, int times_z) {
    const vec zero = vset(0), one = vset(1);
    const NAME(scaled) e = NAME(exp_of_minus)(z);
    const vec high = vdiv(one, NAME(one_more)(e)), low = NAME(times)(high, e);
    if (!times_z) return vldexp(vmul(low, high), e.exponent);
    const vec near = NAME(near_z)(z); /* NaN also at +inf */
    const vec below = vldexp(vmul(low, vmuladd(near, high, one)), e.exponent);
    const vec above = vmuladd(vmul(near, high), vldexp(low, e.exponent), high);
    return vwhere_less(z, zero, below, above);
}

/* Each activation: its value at z or, if `derives`, dy times its derivative. */
FBN_INLINE vec NAME(pointwise)(vec z, vec dy, real slope, int activation, int derives) {
    const vec zero = vset(0), given = derives ? dy : z;
    switch (activation) {
    case FBN_RELU:
        return derives ? vkeep_if_positive(z, dy) : vrelu(z);
    case FBN_RELU6:
        if (derives) return vkeep_if_positive(z, vkeep_if_positive(vsub(vset(6), z), dy)); /* dy where z is NaN */
        return vmin(vset(6), vrelu(z));
    case FBN_LEAKY_RELU:
        return vwhere_less(zero, z, given, vmul(given, vset(slope)));
    case FBN_SILU:
        return derives ? vmul(dy, NAME(sigmoid_derivative)(z, 1)) : NAME(sigmoid)(z, 1);
    case FBN_SIGMOID:
        return derives ? vmul(dy, NAME(sigmoid_derivative)(z, 0)) : NAME(sigmoid)(z, 0);
    case FBN_HARDSWISH:
        if (!derives) return vmul(z, vdiv(vmin(vset(6), vrelu(vadd(z, vset(3)))), vset(6)));
        const vec between = vmul(dy, vmuladd(z, vset((real)(1.0 / 3)), vset((real)0.5)));
        const vec below = vwhere_less(vset(-3), z, between, zero);
        return vwhere_less(z, vset(3), below, vmul(dy, vmin(vset(1), z))); /* NaN where z is NaN */
    default:
        return given;
    }
}

/* Whether an activation's code is so short that a call would take longer than the work. A loop for any activation asks
 * for each vector which one it is, and need not be compiled for each of them. */
FBN_INLINE int NAME(is_quick)(int which) {
    return which == FBN_RELU || which == FBN_RELU6 || which == FBN_LEAKY_RELU || which == FBN_HARDSWISH;
}

/* Not inlined: a call costs little compared with the work of the others. */
FBN_APART vec NAME(other)(vec z, real slope, int activation) { return NAME(pointwise)(z, z, slope, activation, 0); }
FBN_APART vec NAME(other_gradient)(vec dy, vec z, real slope, int activation) {
    return NAME(pointwise)(z, dy, slope, activation, 1);
}

FBN_INLINE vec NAME(quick)(vec z, vec dy, real slope, int which, int derives) {
    if (which == FBN_RELU) return NAME(pointwise)(z, dy, 0, FBN_RELU, derives);
    if (which == FBN_RELU6) return NAME(pointwise)(z, dy, 0, FBN_RELU6, derives);
    if (which == FBN_LEAKY_RELU) return NAME(pointwise)(z, dy, slope, FBN_LEAKY_RELU, derives);
    return NAME(pointwise)(z, dy, 0, FBN_HARDSWISH, derives);
}

FBN_INLINE vec NAME(activate)(vec z, real slope, int activation) {
    const int which = activation & FBN_WHICH;
    if (which == FBN_IDENTITY) return z;
    if (NAME(is_quick)(which)) return NAME(quick)(z, z, slope, which, 0);
    if (activation == FBN_SILU || activation == FBN_SIGMOID) return NAME(pointwise)(z, z, 0, activation, 0);
    return NAME(other)(z, slope, which);
}

/* dy times the activation's derivative at z. */
FBN_INLINE vec NAME(activation_gradient)(vec dy, vec z, real slope, int activation) {
    const int which = activation & FBN_WHICH;
    if (which == FBN_IDENTITY) return dy;
    if (NAME(is_quick)(which)) return NAME(quick)(z, dy, slope, which, 1);
    if (activation == FBN_SILU || activation == FBN_SIGMOID) return NAME(pointwise)(z, dy, 0, activation, 1);
    return NAME(other_gradient)(dy, z, slope, which);
}

/* z from y = activation(z), for the activations that have an inverse (identity, leaky_relu). */
FBN_INLINE vec NAME(inverse)(vec y, real slope, int activation) {
    if ((activation & FBN_WHICH) != FBN_LEAKY_RELU) return y;
    return vwhere_less(vset(0), y, y, vdiv(y, vset(slope)));
}

/* Whether an activation's code is short, or a call, so that loops may also compute parts of vectors. */
FBN_INLINE int NAME(is_short)(int activation) {
    return activation == FBN_IDENTITY || activation == FBN_RELU || activation & NAME(ANY);
}
