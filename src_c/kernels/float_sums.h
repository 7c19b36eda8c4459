/* float_sums.h: which loop of sums.h serves a call. */

FBN_INLINE void NAME(grad_moments)(const fbn_operands *o, const fbn_stretch *s, int columns) {
    const NAME(parts) any = NAME(any_parts)(o);
    switch (o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
        break;
    case FBN_RELU:
        if (o->residual) NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_RELU, 1, 1, 0, 0});
        else NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_RELU, 0, 1, 0, 0});
        break;
    case FBN_RELU6:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_RELU6, any.has_residual, 1, 0, 0});
        break;
    case FBN_LEAKY_RELU:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_LEAKY_RELU, any.has_residual, 1, 0, 0});
        break;
    case FBN_HARDSWISH:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_HARDSWISH, any.has_residual, 1, 0, 0});
        break;
    case FBN_SILU:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_SILU, any.has_residual, 1, 0, 0});
        break;
    case FBN_SIGMOID:
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_SIGMOID, any.has_residual, 1, 0, 0});
        break;
    default:
        NAME(sum_as)(o, s, columns, 1, any);
    }
}

FBN_APART void NAME(moments_stack)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_stacks)(o, s, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0}, 0);
}

/* dz is dy, or that of a relu without a residual. */
static void NAME(grad_moments_stack)(const fbn_operands *o, const fbn_stretch *s) {
    if (!o->usual) NAME(sum_stacks)(o, s, NAME(any_parts)(o), 1);
    else if (o->activation == FBN_RELU) NAME(sum_stacks)(o, s, (NAME(parts)){FBN_RELU, 0, 1, 0, 0}, 1);
    else NAME(sum_stacks)(o, s, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0}, 1);
}

FBN_APART void NAME(moments_plane)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_as)(o, s, 0, 0, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}
static void NAME(moments_columns)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_as)(o, s, 1, 0, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}
static void NAME(grad_moments_plane)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 0); }
static void NAME(grad_moments_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 1); }
