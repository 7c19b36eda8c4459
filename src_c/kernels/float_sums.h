/* float_sums.h: which loop of sums.h serves a call, and sums of dz that is computed first. */

/* ---- several groups of short rows, without an activation (ADDS_GROUPS) ---- */

/* One or two vectors of columns, whose sums stay in registers from group to group. */
FBN_INLINE void NAME(sum_some)(const fbn_operands *o, const fbn_stretch *s, int64_t c, int vectors, int64_t n, vec fill,
                               int backward) {
    const NAME(parts) plain = {FBN_IDENTITY, 0, 1, 0, 0};
    NAME(sum_vectors)(o, s, c, vectors, n, fill, s->groups, plain, backward);
}

/* The last columns: at most two vectors, and not two whole ones. */
FBN_INLINE void NAME(sum_rest)(const fbn_operands *o, const fbn_stretch *s, int64_t c, int backward) {
    const int64_t n = s->n - c, last = n > WIDTH ? WIDTH : 0;
    real origins[WIDTH];
    for (int k = 0; k < WIDTH; k++) origins[k] = (real)o->origin[c + last + k];
    if (last) NAME(sum_some)(o, s, c, 2, n - WIDTH, vget(origins), backward);
    else NAME(sum_some)(o, s, c, 1, n, vget(origins), backward);
}
FBN_APART void NAME(moments_groups_rest)(const fbn_operands *o, const fbn_stretch *s, int64_t c) {
    NAME(sum_rest)(o, s, c, 0);
}
FBN_APART void NAME(plain_groups_rest)(const fbn_operands *o, const fbn_stretch *s, int64_t c) {
    NAME(sum_rest)(o, s, c, 1);
}
FBN_APART void NAME(moments_groups)(const fbn_operands *o, const fbn_stretch *s) {
    const fbn_operands own = *o; /* no store can change it, so loops need not read it again */
    int64_t c = 0;
    for (; c + 2 * WIDTH <= s->n; c += 2 * WIDTH) NAME(sum_some)(&own, s, c, 2, WIDTH, vset(0), 0);
    if (c < s->n) NAME(moments_groups_rest)(o, s, c);
}
FBN_APART void NAME(plain_groups)(const fbn_operands *o, const fbn_stretch *s) {
    const fbn_operands own = *o;
    int64_t c = 0;
    for (; c + 2 * WIDTH <= s->n; c += 2 * WIDTH) NAME(sum_some)(&own, s, c, 2, WIDTH, vset(0), 1);
    if (c < s->n) NAME(plain_groups_rest)(o, s, c);
}

/* ---- which loop serves a call ---- */

FBN_APART void NAME(plain_plane)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_as)(o, s, 0, 1, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}
FBN_APART void NAME(plain_columns)(const fbn_operands *o, const fbn_stretch *s) {
    if (ADDS_GROUPS && s->groups > 1) NAME(plain_groups)(o, s);
    else NAME(sum_as)(o, s, 1, 1, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}

/* How many bytes ahead a piece fetches. The last of a plane fetches from the plane that comes after it. Where one
 * stream of rows is best, `ahead` was divided among rows that are read in turns; here they are read one after another.
 */
FBN_INLINE int64_t NAME(piece_ahead)(const fbn_operands *o, const fbn_stretch *s, int64_t i, int64_t most,
                                     int columns) {
    if (columns) return o->walk.row_streams == 1 ? FBN_GRAD_ROWS * o->walk.ahead : o->walk.ahead;
    return i + most < s->n || s->apart < s->n ? o->walk.ahead : (s->apart - i) * (int64_t)sizeof(elem);
}

/* Computes dz of a piece, and then adds it as if it were dy. Pieces stay where dz is kept, or are here. Those of
 * several rows need what belongs to them of x beside them, so that both lie alike. */
FBN_INLINE void NAME(sum_dz)(const fbn_operands *o, const fbn_stretch *s, int columns) {
    _Alignas(64) elem x[NAME(PIECE)], dz[NAME(PIECE)];
    const int64_t most = NAME(PIECE) / s->rows / FBN_LANES * FBN_LANES;
    const int copies = !o->dz && s->rows > 1;
    fbn_operands own = *o;
    fbn_stretch piece = *s;
    own.activation = FBN_IDENTITY;
    own.residual = own.dz = NULL;
    own.walk.ahead = 0;
    piece.at = 0;
    if (!o->dz) piece.apart = most;
    for (int64_t i = 0; i < s->n; i += most) {
        const int64_t start = s->at + i, ahead = NAME(piece_ahead)(o, s, i, most, columns);
        own.x = copies ? x : (const elem *)o->x + start;
        own.dy = o->dz ? (elem *)o->dz + start : dz;
        piece.n = NAME(least)(most, s->n - i);
        for (int64_t row = 0; row < s->rows; row++) {
            const int64_t at = start + row * s->apart;
            elem *to = o->dz ? (elem *)o->dz + at : dz + row * most;
            if (copies) memcpy(x + row * most, (const elem *)o->x + at, (size_t)piece.n * sizeof(elem));
            if (columns) NAME(dz_of_columns)(o, at, i, piece.n, ahead, to);
            else NAME(dz_of_plane)(o, at, s->c, piece.n, ahead, to);
        }
        if (columns) {
            piece.sums = s->sums + i;
            piece.others = s->others + i;
            own.origin = o->origin + i;
            NAME(plain_columns)(&own, &piece);
        } else NAME(plain_plane)(&own, &piece);
    }
}
/* Apart, since what they keep on the stack would slow down other sums. */
FBN_APART void NAME(sum_dz_of_plane)(const fbn_operands *o, const fbn_stretch *s) { NAME(sum_dz)(o, s, 0); }
FBN_APART void NAME(sum_dz_of_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(sum_dz)(o, s, 1); }

FBN_INLINE void NAME(grad_moments)(const fbn_operands *o, const fbn_stretch *s, int columns) {
    const NAME(parts) any = NAME(any_parts)(o);
    switch (o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        if (columns) NAME(plain_columns)(o, s);
        else NAME(plain_plane)(o, s);
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
    case FBN_SIGMOID:
        if (columns) NAME(sum_dz_of_columns)(o, s);
        else NAME(sum_plane_pieces)(o, s, NAME(PIECE), NAME(sum_dz_of_plane));
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
    if (ADDS_GROUPS && s->groups > 1) NAME(moments_groups)(o, s);
    else NAME(sum_as)(o, s, 1, 0, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}
static void NAME(grad_moments_plane)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 0); }
static void NAME(grad_moments_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 1); }
