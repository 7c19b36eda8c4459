/* widened_sums.h: 16-bit values by the loops of float32, which need not be compiled for each dtype: a piece at a time
 * is widened, and then added. Plain sums, which would take longer that way with AVX2, have loops of their own there.
 *
 * A piece stays in the nearest cache. The bits are those of sums of the values themselves, since widening is exact and
 * a piece is whole turns of the lanes. widened_maps.h maps pieces likewise.
 */

/* The values of an array that are widened at a time. */
enum { NAME(PIECE) = 2048 };

FBN_INLINE void NAME(widen)(const elem *from, int64_t n, int64_t ahead, float *to) {
    int64_t i = 0;
#ifdef vload_pair
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        vec pair[2];
        vload_pair(from + i, pair);
        for (int j = 0; j < 2; j++) f32_store(to + i + j * WIDTH, pair[j]);
    }
#endif
    for (; i + WIDTH <= n; i += WIDTH) {
        prefetch((const char *)(from + i) + ahead);
        f32_store(to + i, vload(from + i));
    }
    if (i < n) f32_store(to + i, vload_n(from + i, n - i, vset(0)));
}

/* Widens n elements from element i of each row on. */
FBN_INLINE void NAME(widen_rows)(const void *from_, const fbn_stretch *s, int64_t i, int64_t n, int64_t ahead,
                                 int64_t apart, float *to) {
    const elem *from = (const elem *)from_ + s->at + i;
    for (int64_t row = 0; row < s->rows; row++) NAME(widen)(from + row * s->apart, n, ahead, to + row * apart);
}

/* Adds the pieces of a stretch by a loop of float32. */
FBN_INLINE void NAME(sum_pieces)(const fbn_operands *o, const fbn_stretch *s, fbn_loop *loop, int columns,
                                 int backward) {
    _Alignas(64) float x[NAME(PIECE)], dy[NAME(PIECE)], residual[NAME(PIECE)];
    const int64_t most = NAME(PIECE) / s->rows / FBN_LANES * FBN_LANES;
    const int has_residual = backward && o->residual && o->activation != FBN_IDENTITY;
    fbn_operands own = *o;
    fbn_stretch piece = *s;
    own.x = x;
    own.dy = backward ? dy : NULL;
    own.residual = has_residual ? residual : NULL;
    own.walk.ahead = 0;
    piece.at = 0;
    piece.apart = most;
    for (int64_t i = 0; i < s->n; i += most) {
        piece.n = NAME(least)(most, s->n - i);
        NAME(widen_rows)(o->x, s, i, piece.n, o->walk.ahead, most, x);
        if (backward) NAME(widen_rows)(o->dy, s, i, piece.n, o->walk.ahead, most, dy);
        if (has_residual) NAME(widen_rows)(o->residual, s, i, piece.n, o->walk.ahead, most, residual);
        if (columns) {
            piece.sums = s->sums + i;
            piece.others = s->others + i;
            own.origin = o->origin + i;
            for (int k = 0; k < FBN_CONSTANTS; k++) own.constants.of[k] = (float *)o->constants.of[k] + i;
        }
        loop(&own, &piece);
    }
}

static void NAME(sum_moments_pieces)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_pieces)(o, s, NAME_OF_REAL(moments_plane), 0, 0);
}
static void NAME(sum_grad_moments_pieces)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_pieces)(o, s, NAME_OF_REAL(grad_moments_plane), 0, 1);
}

FBN_INLINE void NAME(sum_stack_pieces)(const fbn_operands *o, const fbn_stretch *s, fbn_loop *loop, int backward) {
    fbn_operands own = *o;
    fbn_stretch stack = *s;
    stack.channels = 1;
    for (int64_t c = 0; c < s->channels; c++) {
        stack.at = s->at + c * s->n;
        stack.sums = s->sums + c * 2 * FBN_LANES;
        stack.others = s->others + c * 2 * FBN_LANES;
        own.origin = o->origin + c;
        for (int k = 0; k < FBN_CONSTANTS; k++) own.constants.of[k] = (float *)o->constants.of[k] + c;
        NAME(sum_pieces)(&own, &stack, loop, 0, backward);
    }
}

/* The loops for plain sums and a relu's are compiled for 16-bit values, too, where these are read as fast (AVX2). */
FBN_INLINE void NAME(moments)(const fbn_operands *o, const fbn_stretch *s, int columns) {
    if (LIGHT_HALVES) NAME(sum_as)(o, s, columns, 0, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
    else if (columns) NAME(sum_pieces)(o, s, NAME_OF_REAL(moments_columns), 1, 0);
    else NAME(sum_plane_pieces)(o, s, NAME(PIECE), NAME(sum_moments_pieces));
}
FBN_INLINE void NAME(grad_moments)(const fbn_operands *o, const fbn_stretch *s, int columns) {
    const int is_relu = o->activation == FBN_RELU && !o->residual;
    if (LIGHT_HALVES && o->usual && o->activation == FBN_IDENTITY)
        NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
    else if (LIGHT_HALVES && o->usual && is_relu) NAME(sum_as)(o, s, columns, 1, (NAME(parts)){FBN_RELU, 0, 1, 0, 0});
    else if (columns) NAME(sum_pieces)(o, s, NAME_OF_REAL(grad_moments_columns), 1, 1);
    else NAME(sum_plane_pieces)(o, s, NAME(PIECE), NAME(sum_grad_moments_pieces));
}

static void NAME(moments_plane)(const fbn_operands *o, const fbn_stretch *s) { NAME(moments)(o, s, 0); }
static void NAME(moments_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(moments)(o, s, 1); }
static void NAME(grad_moments_plane)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 0); }
static void NAME(grad_moments_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(grad_moments)(o, s, 1); }
static void NAME(moments_stack)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_stack_pieces)(o, s, NAME_OF_REAL(moments_stack), 0);
}
static void NAME(grad_moments_stack)(const fbn_operands *o, const fbn_stretch *s) {
    NAME(sum_stack_pieces)(o, s, NAME_OF_REAL(grad_moments_stack), 1);
}
