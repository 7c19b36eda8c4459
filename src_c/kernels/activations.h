/* activations.h: the activations and their derivatives. Definitions, and derivatives at kinks, are PyTorch's.
 *
 * sigmoid(z) = 1 / (1 + e) with e = exp(-z), within 2.5 ulp, and silu(z) = z / (1 + e), within 3 ulp. Derivatives are
 * within 4.5 ulp of the terms of which they are the sum.
 *
 * Far from 0, where e or its square might overflow, 1 + e is rounded to e or to 1. Such z are rare, and left to
 * functions that are not inlined, which keep the values of near ones.
 */

/* Whether the sum of squares says that every z is near: to compare it takes less time than to compare each z. The sum
 * may be too large though every z is near. Then the functions below look at each, and keep the values of near ones. */
FBN_INLINE int NAME(all_near)(const vec *z, int count) {
    vec squares = vmul(z[0], z[0]);
    for (int j = 1; j < count; j++) squares = vmuladd(z[j], z[j], squares);
    return vall_less(squares, vset((real)NAME(NEAR) * NAME(NEAR)));
}

/* The lanes of `near` where z is near, else those of `far`. */
FBN_INLINE vec NAME(by_distance)(vec z, vec near, vec far) {
    return vwhere_less(vset(-NAME(NEAR)), vminus_abs(z), near, far);
}

/* z, but no less than -FAR, and NaN if it is infinite: at -inf, z * sigmoid(z) and its derivative have no value. */
FBN_INLINE vec NAME(finite_z)(vec z) { return vmuladd(z, vset(0), vmax(vset(-NAME(FAR)), z)); }

/* z * sigmoid(z) if times_z, else sigmoid(z). */
FBN_APART vec NAME(far_sigmoid)(vec z, vec near, int times_z) {
    const vec zero = vset(0), one = vset(1);
    const vec small = NAME(times_far_exp)(times_z ? NAME(finite_z)(z) : one, z);
    const vec large = times_z ? z : vadd(one, NAME(times_far_exp)(one, z)); /* 1, or NaN */
    return NAME(by_distance)(z, near, vwhere_less(z, zero, small, large));
}
FBN_INLINE void NAME(sigmoids)(const vec *z, int count, int times_z, vec *to) {
    const vec one = vset(1);
    NAME(near_exps)(z, count, to);
    for (int j = 0; j < count; j++) to[j] = vdiv(times_z ? z[j] : one, vadd(one, to[j]));
    if (NAME(all_near)(z, count)) return;
    for (int j = 0; j < count; j++) to[j] = NAME(far_sigmoid)(z[j], to[j], times_z);
}

/* Its derivative: (1 + (1 + z) e) / (1 + e)^2 if times_z, else e / (1 + e)^2. */
FBN_APART vec NAME(far_derivative)(vec z, vec near, int times_z) {
    const vec zero = vset(0), one = vset(1), finite = NAME(finite_z)(z); /* NaN also at +inf */
    const vec small = NAME(times_far_exp)(times_z ? vadd(one, finite) : one, z);
    const vec large = times_z ? vmuladd(finite, vset(0), one) : small;
    return NAME(by_distance)(z, near, vwhere_less(z, zero, small, large));
}
FBN_INLINE void NAME(sigmoid_derivatives)(const vec *z, int count, int times_z, vec *to) {
    const vec one = vset(1);
    vec e[NAME(AT_ONCE)], more[NAME(AT_ONCE)];
    NAME(near_exps)(z, count, e);
    for (int j = 0; j < count; j++) more[j] = vadd(one, e[j]);
    for (int j = 0; j < count; j++)
        to[j] = vdiv(times_z ? vmuladd(vadd(one, z[j]), e[j], one) : e[j], vmul(more[j], more[j]));
    if (NAME(all_near)(z, count)) return;
    for (int j = 0; j < count; j++) to[j] = NAME(far_derivative)(z[j], to[j], times_z);
}

/* The sigmoid, or the SiLU if times_z: values or, if `derives`, derivatives. */
FBN_INLINE void NAME(smooth)(const vec *z, int count, int times_z, int derives, vec *to) {
    if (derives) NAME(sigmoid_derivatives)(z, count, times_z, to);
    else NAME(sigmoids)(z, count, times_z, to);
}

/* Each activation: its value at z or, if `derives`, dy times its derivative. */
FBN_INLINE vec NAME(pointwise)(vec z, vec dy, real slope, int activation, int derives) {
    const vec zero = vset(0), given = derives ? dy : z;
    vec result;
    switch (activation) {
    case FBN_RELU:
        return derives ? vkeep_if_positive(z, dy) : vrelu(z);
    case FBN_RELU6:
        if (derives) return vkeep_if_positive(z, vkeep_if_positive(vsub(vset(6), z), dy)); /* dy where z is NaN */
        return vmin(vset(6), vrelu(z));
    case FBN_LEAKY_RELU:
        return vwhere_less(zero, z, given, vmul(given, vset(slope)));
    case FBN_SILU:
    case FBN_SIGMOID:
        NAME(smooth)(&z, 1, activation == FBN_SILU, derives, &result);
        return derives ? vmul(dy, result) : result;
    case FBN_HARDSWISH:
        if (!derives) return vmul(z, vdiv(vmin(vset(6), vrelu(vadd(z, vset(3)))), vset(6)));
        const vec between = vmul(dy, vmuladd(z, vset((real)(1.0 / 3)), vset((real)0.5)));
        const vec below = vwhere_less(vset(-3), z, between, zero);
        return vwhere_less(z, vset(3), below, vmul(dy, vmin(vset(1), z))); /* NaN where z is NaN */
    default:
        return given;
    }
}

/* Loops that serve every call do not inline the activations, which would be compiled once for each of those loops. */
FBN_APART vec NAME(other)(vec z, real slope, int activation) { return NAME(pointwise)(z, z, slope, activation, 0); }
FBN_APART vec NAME(other_gradient)(vec dy, vec z, real slope, int activation) {
    return NAME(pointwise)(z, dy, slope, activation, 1);
}

FBN_INLINE vec NAME(activate)(vec z, real slope, int activation) {
    if (!(activation & NAME(ANY))) return NAME(pointwise)(z, z, slope, activation, 0);
    return activation & FBN_WHICH ? NAME(other)(z, slope, activation & FBN_WHICH) : z;
}

/* dy times the activation's derivative at z. */
FBN_INLINE vec NAME(activation_gradient)(vec dy, vec z, real slope, int activation) {
    if (!(activation & NAME(ANY))) return NAME(pointwise)(z, dy, slope, activation, 1);
    return activation & FBN_WHICH ? NAME(other_gradient)(dy, z, slope, activation & FBN_WHICH) : dy;
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
