/* map.h: the maps: y from x, and dx (and the residual's gradient) from dy and x. */

/* y of n <= WIDTH elements from element i on. */
FBN_INLINE vec NAME(affine_of)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p) {
    const vec r = p.has_residual ? NAME(load)((const elem *)o->residual + i, n) : vset(0);
    const vec z = NAME(preactivation)(NAME(load)((const elem *)o->x + i, n), r, k, p);
    return NAME(activate)(z, k->slope, p.activation);
}

/* Maps n <= WIDTH elements from element i on. */
FBN_INLINE void NAME(affine_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p,
                               int stream) {
    NAME(put)((elem *)o->out + i, NAME(affine_of)(o, i, n, k, p), n, stream);
}

/* The factor of on_x. Where that is 0, a finite x may not make an infinite one, since the product would be NaN. */
FBN_INLINE vec NAME(off_mean)(vec x, const NAME(constants) * k, NAME(parts) p) {
    const real most = sizeof(real) == 8 ? (real)DBL_MAX : FLT_MAX;
    const vec d = NAME(centre)(x, k, p);
    if (p.usual) return d;
    const vec limited = vmax(vset(-most), vmin(vset(most), d));
    return vwhere_less(vminus_abs(k->on_x), vset(0), d, vwhere_less(vset(-(real)INFINITY), vminus_abs(x), limited, d));
}

/* dx. Where products are rounded, too, each term passes four roundings at most: 2 epsilon of the sum of the terms. */
FBN_INLINE vec NAME(dx_of)(vec dz, vec x, const NAME(constants) * k, NAME(parts) p) {
    const vec of_dy = p.frozen ? vmul(k->on_dy, dz) : vmuladd(k->on_dy, dz, k->constant);
    const vec d = p.frozen ? of_dy : vmuladd(k->on_x, NAME(off_mean)(x, k, p), of_dy);
    return p.usual ? d : vmul(vmul(d, k->postscale), k->postscale);
}

/* dx of n <= WIDTH elements from element i on, and *dz. */
FBN_INLINE vec NAME(grad_affine_of)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k,
                                    NAME(parts) p, vec *dz) {
    const elem *x = (const elem *)o->x + i, *residual = p.has_residual ? (const elem *)o->residual + i : x;
    *dz = NAME(dz_at)((const elem *)o->dy + i, x, residual, n, k, p);
    vec d = NAME(dx_of)(*dz, p.frozen ? vset(0) : NAME(x_at)(x, residual, n, k, p), k, p);
    if (p.activation & FBN_OUTSIDE) {
        const vec size = NAME(size_at)((const elem *)o->dy + i, n);
        *dz = vkeep_if_positive(size, *dz);
        d = vkeep_if_positive(size, d);
    }
    return d;
}

FBN_INLINE void NAME(grad_affine_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k,
                                    NAME(parts) p, int stream) {
    vec dz;
    const vec d = NAME(grad_affine_of)(o, i, n, k, p, &dz);
    /* dx may be dy, which is not read after this. */
    NAME(put)((elem *)o->out + i, d, n, stream);
    if (p.has_residual && p.activation & FBN_WHICH) NAME(put)((elem *)o->dresidual + i, dz, n, 0);
}

FBN_INLINE void NAME(map_n)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p,
                            int backward) {
    if (backward) NAME(grad_affine_n)(o, i, n, k, p, o->stream);
    else NAME(affine_n)(o, i, n, k, p, o->stream);
}

/* Whether a loop computes so little that tests and jumps are a good part of its time where its arrays are in a cache.
 * Such loops are compiled for either kind of store and take two vectors at a time. Vectors of a whole cache line gain
 * nothing by it (Zen 4), nor does the baseline, which is where float32's scale is split. Of 16-bit values there are
 * such loops only for AVX2, since the library would be larger. */
FBN_INLINE int NAME(is_light)(NAME(parts) p) {
    const int is_half = sizeof(elem) < sizeof(float), is_line = WIDTH * (int)sizeof(elem) == FBN_LINE;
    const int has_loops = is_half ? LIGHT_HALVES : !is_line && !F32_SPLITS_B;
    return has_loops && p.usual && !p.has_residual && (p.activation == FBN_IDENTITY || p.activation == FBN_RELU);
}

/* What a map works on, in a copy that no store can change, so that loops need not read it again. Where `stream` is a
 * constant, they do not test it. */
FBN_INLINE fbn_operands NAME(with_stream)(const fbn_operands *o, int stream) {
    fbn_operands own = *o;
    own.stream = stream;
    return own;
}

/* The column of the element that comes n elements after one of column c. */
FBN_INLINE int64_t NAME(onward)(int64_t c, int64_t n, int64_t period) {
    const int64_t on = c + n;
    return on < period ? on : on < 2 * period ? on - period : on % period;
}

/* The next part of an edge: at most one vector of the result. */
FBN_INLINE int64_t NAME(part_at)(const fbn_operands *o, int64_t i, int64_t end) {
    const int64_t to_next = NAME(misaligned)(o, i, WIDTH);
    return NAME(least)(to_next ? to_next : WIDTH, end - i);
}

/* Maps n elements, fewer than a step, with usual stores: from column c on, or of channel c where the period is 0. One
 * function for either direction serves every call. */
FBN_INLINE void NAME(map_parts)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int64_t period, int backward) {
    const NAME(parts) p = NAME(any_parts)(o);
    for (int64_t part, end = i + n; i < end; i += part) {
        const NAME(constants) k = NAME(constants_at)(o, c, period > 0, p);
        part = NAME(part_at)(o, i, end);
        if (backward) NAME(grad_affine_n)(o, i, part, &k, p, 0);
        else NAME(affine_n)(o, i, part, &k, p, 0);
        if (period) c = NAME(onward)(c, part, period);
    }
}
FBN_APART void NAME(affine_edge)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int64_t period) {
    NAME(map_parts)(o, i, n, c, period, 0);
}
FBN_APART void NAME(grad_affine_edge)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int64_t period) {
    NAME(map_parts)(o, i, n, c, period, 1);
}
FBN_INLINE void NAME(map_edge)(const fbn_operands *o, int64_t i, int64_t n, int64_t c, int64_t period, int backward) {
    if (n == 0) return;
    if (backward) NAME(grad_affine_edge)(o, i, n, c, period);
    else NAME(affine_edge)(o, i, n, c, period);
}

/* Maps two vectors of one channel in a light loop. */
FBN_INLINE void NAME(map_two)(const fbn_operands *o, int64_t i, const NAME(constants) * k, NAME(parts) p,
                              int backward) {
    vec x[2], dy[2], out[2];
    NAME(load_two)((const elem *)o->x + i, x);
    if (backward) NAME(load_two)((const elem *)o->dy + i, dy);
    for (int j = 0; j < 2; j++) {
        const vec z = NAME(preactivation)(x[j], vset(0), k, p);
        if (!backward) out[j] = NAME(activate)(z, k->slope, p.activation);
        else out[j] = NAME(dx_of)(NAME(activation_gradient)(dy[j], z, k->slope, p.activation), x[j], k, p);
    }
    NAME(put_two)((elem *)o->out + i, out, o->stream);
}

/* y of AT_ONCE vectors of one channel, whose constants are k, or of columns from column c on. */
FBN_INLINE void NAME(map_smooth)(const fbn_operands *o, int64_t i, int64_t c, int columns, const NAME(constants) * k,
                                 NAME(parts) p) {
    vec y[NAME(AT_ONCE)];
    NAME(smooth_of)(o, i, c, columns, k, p, 0, y);
    for (int j = 0; j < NAME(AT_ONCE); j++) NAME(put)((elem *)o->out + i + j * WIDTH, y[j], WIDTH, o->stream);
}

/* Maps one vector of columns, from column c on, and fetches what comes `ahead` bytes later, unless that is 0. */
FBN_INLINE void NAME(map_one_of_columns)(const fbn_operands *o, int64_t i, int64_t c, int64_t ahead, NAME(parts) p,
                                         int backward) {
    const NAME(constants) k = NAME(constants_at)(o, c, 1, p);
    if (ahead) NAME(fetch)(o, i, 1, ahead, p, backward);
    NAME(map_n)(o, i, WIDTH, &k, p, backward);
}

/* y or dx of a vector. */
FBN_INLINE vec NAME(mapped)(const fbn_operands *o, int64_t i, const NAME(constants) * k, NAME(parts) p, int backward) {
    vec dz;
    return backward ? NAME(grad_affine_of)(o, i, WIDTH, k, p, &dz) : NAME(affine_of)(o, i, WIDTH, k, p);
}

/* Maps two in a light loop, in which to ask whether `ahead` is 0 would take longer than to fetch. Both are computed
 * before either is written, so that whole lines are written around the cache at once. */
FBN_INLINE void NAME(map_two_of_columns)(const fbn_operands *o, int64_t i, int64_t c, int64_t ahead, NAME(parts) p,
                                         int backward) {
    const NAME(constants) first = NAME(constants_at)(o, c, 1, p), second = NAME(constants_at)(o, c + WIDTH, 1, p);
    NAME(fetch)(o, i, 2, ahead, p, backward);
    const vec one = NAME(mapped)(o, i, &first, p, backward), other = NAME(mapped)(o, i + WIDTH, &second, p, backward);
    NAME(put)((elem *)o->out + i, one, WIDTH, o->stream);
    NAME(put)((elem *)o->out + i + WIDTH, other, WIDTH, o->stream);
}

/* Maps columns, from column c on. */
FBN_INLINE void NAME(map_columns)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p, int backward,
                                  int stream) {
    enum { SMOOTH = NAME(AT_ONCE) * WIDTH };
    const fbn_operands own = NAME(with_stream)(o, stream);
    const int light = NAME(is_light)(p), smooth = !backward && NAME(is_smooth)(p);
    const int64_t period = s->period, ahead = s->ahead, step = NAME(step_of)(stream);
    const int64_t head = NAME(least)(NAME(misaligned)(o, s->at, step), s->n);
    for (int64_t row = 0; row < s->rows; row++) {
        const int64_t at = s->at + row * s->apart, end = at + s->n;
        NAME(map_edge)(o, at, head, s->c, period, backward);
        int64_t i = at + head, c = NAME(onward)(s->c, head, period);
        const int64_t last = i + ((end - i) & -step);
        while (i < last) {
            const int64_t recur = (period - c + WIDTH - 1) / WIDTH * WIDTH, whole = NAME(least)(last - i, recur);
            int64_t k = 0;
            for (; smooth && k + SMOOTH <= whole; k += SMOOTH) {
                NAME(fetch)(&own, i + k, NAME(AT_ONCE), ahead, p, 0);
                NAME(map_smooth)(&own, i + k, c + k, 1, NULL, p);
            }
            for (; light && k + 2 * WIDTH <= whole; k += 2 * WIDTH)
                NAME(map_two_of_columns)(&own, i + k, c + k, ahead, p, backward);
            for (; k < whole; k += WIDTH) NAME(map_one_of_columns)(&own, i + k, c + k, ahead, p, backward);
            i += whole;
            c = NAME(onward)(c, whole, period);
        }
        NAME(map_edge)(o, i, end - i, c, period, backward);
    }
}

/* Maps stretches of columns two at a time, which share the constants that a vector loads, and returns how many. */
FBN_INLINE int64_t NAME(map_pairs)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p) {
    const fbn_operands own = NAME(with_stream)(o, 0);
    const int64_t n = s->n, apart = s->apart;
    const uintptr_t constant = (uintptr_t)((const real *)own.constants.of[FBN_SHIFT] + s->c) / sizeof(real);
    const int64_t head = NAME(least)((int64_t)(-constant % WIDTH), n); /* behind it the constants are aligned */
    const int64_t end = head + (n - head) / WIDTH * WIDTH;
    int64_t row = 0;
    for (; row + 2 <= s->rows; row += 2) {
        const int64_t first = s->at + row * apart, second = first + apart;
        for (int64_t k = head; k < end; k += WIDTH) {
            const NAME(constants) constants = NAME(constants_at)(&own, s->c + k, 1, p);
            NAME(affine_n)(&own, first + k, WIDTH, &constants, p, 0);
            NAME(affine_n)(&own, second + k, WIDTH, &constants, p, 0);
        }
        for (int64_t at = first; at <= second; at += apart) {
            NAME(map_edge)(o, at, head, s->c, s->period, 0);
            if (end == n) continue;
            const NAME(constants) constants = NAME(constants_at)(&own, s->c + end, 1, p);
            NAME(affine_n)(&own, at + end, n - end, &constants, p, 0);
        }
    }
    return row;
}

/* Whether pairs are faster: in the cache, where loads are what takes time, if little is computed. No column may recur
 * in a stretch. 16-bit values gain nothing by them in the baseline, whose conversions take longer than loads, nor
 * beside light loops. */
FBN_INLINE int NAME(has_pairs)(const fbn_operands *o, const fbn_stretch *s) {
    const int converts = (SPLITS_SCALE || LIGHT_HALVES) && sizeof(elem) < sizeof(float);
    const int computes_little = !o->residual && (o->activation == FBN_IDENTITY || o->activation == FBN_RELU);
    return !converts && s->rows > 1 && !o->stream && o->usual && computes_little && s->n <= s->period - s->c;
}

/* Returns how many stretches have been mapped: all or all but one. */
FBN_INLINE int64_t NAME(affine_pairs)(const fbn_operands *o, const fbn_stretch *s) {
    if (o->activation == FBN_RELU) {
        if (o->exact) return NAME(map_pairs)(o, s, (NAME(parts)){FBN_RELU, 0, 1, 1, 0});
        return NAME(map_pairs)(o, s, (NAME(parts)){FBN_RELU, 0, 1, 0, 0});
    }
    if (o->exact) return NAME(map_pairs)(o, s, (NAME(parts)){FBN_IDENTITY, 0, 1, 1, 0});
    return NAME(map_pairs)(o, s, (NAME(parts)){FBN_IDENTITY, 0, 1, 0, 0});
}

/* Maps n elements of one channel, or a few less, in a light loop, and returns how many. It fetches what lies `ahead`
 * bytes further if `fetches`, which is a constant: a test in so short a loop takes time. */
FBN_INLINE int64_t NAME(map_light)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k,
                                   NAME(parts) p, int backward, int64_t ahead, int fetches) {
    enum { VECTORS = sizeof(elem) < sizeof(float) ? 4 : 2 }; /* for 16-bit elements of AVX2, a cache line */
    int64_t m = 0;
    for (; m + VECTORS * WIDTH <= n; m += VECTORS * WIDTH) {
        if (fetches) NAME(fetch)(o, i + m, VECTORS, ahead, p, backward);
        for (int j = 0; j < VECTORS; j += 2) NAME(map_two)(o, i + m + j * WIDTH, k, p, backward);
    }
    return m;
}

/* Whether a map adds a residual and computes little else, so that to fetch ahead gains something. */
FBN_INLINE int NAME(adds_residual)(NAME(parts) p) {
    return p.has_residual && p.usual && (p.activation == FBN_IDENTITY || p.activation == FBN_RELU);
}

/* Maps n elements of one channel, which are whole vectors, from element i on. Light loops fetch ahead: those of wider
 * elements only for y that is written around the cache, since elsewhere it gains nothing. */
FBN_INLINE void NAME(map_whole)(const fbn_operands *o, int64_t i, int64_t n, const NAME(constants) * k, NAME(parts) p,
                                int backward) {
    const int is_half = sizeof(elem) < sizeof(float);
    const int64_t ahead = is_half ? o->walk.ahead : o->walk.run_ahead;
    const int fetches = is_half || (!backward && o->stream && ahead);
    int64_t m = 0;
    for (; NAME(is_smooth)(p) && !backward && m + NAME(AT_ONCE) * WIDTH <= n; m += NAME(AT_ONCE) * WIDTH)
        NAME(map_smooth)(o, i + m, 0, 0, k, p);
    if (NAME(is_light)(p)) {
        if (fetches) m = NAME(map_light)(o, i, n, k, p, backward, ahead, 1);
        else m = NAME(map_light)(o, i, n, k, p, backward, 0, 0);
    }
    for (; NAME(adds_residual)(p) && !backward && ahead && m + 2 * WIDTH <= n; m += 2 * WIDTH) {
        NAME(fetch)(o, i + m, 2, ahead, p, 0);
        for (int j = 0; j < 2; j++) NAME(affine_n)(o, i + m + j * WIDTH, WIDTH, k, p, o->stream);
    }
    for (; m < n; m += WIDTH) NAME(map_n)(o, i + m, WIDTH, k, p, backward);
}

/* Where in adjacent planes: element i, which is of `channel`, as are the next left - 1. Planes have `inner` elements,
 * and channels recur. */
typedef struct {
    int64_t i, channel, left, inner, channels;
} NAME(place);

/* Goes n elements further, at most into the next plane. */
FBN_INLINE void NAME(go_on)(NAME(place) * at, int64_t n) {
    at->i += n;
    at->left -= n;
    if (at->left > 0) return;
    at->left += at->inner;
    at->channel = at->channel + 1 < at->channels ? at->channel + 1 : 0;
}

/* Maps adjacent planes up to element `end`, by parts of vectors, and returns where that is. */
FBN_INLINE NAME(place) NAME(map_joined_edge)(const fbn_operands *o, NAME(place) at, int64_t end, int backward) {
    while (at.i < end) {
        const int64_t n = NAME(least)(at.left, end - at.i);
        NAME(map_edge)(o, at.i, n, at.channel, 0, backward);
        NAME(go_on)(&at, n);
    }
    return at;
}

/* The constants of a vector whose first n elements have those of `a`, and the others those of `b`. */
FBN_INLINE NAME(constants) NAME(joined_constants)(const NAME(constants) * a, const NAME(constants) * b, int64_t n) {
    return (NAME(constants)){.prescale = vjoin(a->prescale, b->prescale, n),
                             .neg_mean = vjoin(a->neg_mean, b->neg_mean, n),
                             .scale = vjoin(a->scale, b->scale, n),
                             .scale_low = vjoin(a->scale_low, b->scale_low, n),
                             .shift = vjoin(a->shift, b->shift, n),
                             .shift_low = vjoin(a->shift_low, b->shift_low, n),
                             .on_dy = vjoin(a->on_dy, b->on_dy, n),
                             .on_x = vjoin(a->on_x, b->on_x, n),
                             .constant = vjoin(a->constant, b->constant, n),
                             .postscale = vjoin(a->postscale, b->postscale, n),
                             .slope = a->slope};
}

/* Maps a vector across the border of two planes: its first n elements have the constants `a`, the others `b`. */
FBN_INLINE void NAME(map_across)(const fbn_operands *o, int64_t i, const NAME(constants) * a, const NAME(constants) * b,
                                 int64_t n, NAME(parts) p, int backward) {
    const NAME(constants) both = NAME(joined_constants)(a, b, n);
    NAME(map_n)(o, i, WIDTH, &both, p, backward);
}

/* Maps n elements of adjacent planes, which have at least WIDTH each, or of a single one, whose channel does not
 * change. Whole vectors are written, also where one reaches into the next plane. `own` is a copy of the operands for
 * the loops, where `stream` is a constant. */
FBN_INLINE void NAME(map_planes_row)(const fbn_operands *o, const fbn_operands *own, NAME(place) at, int64_t n,
                                     NAME(parts) p, int backward) {
    const int64_t end = at.i + n, step = NAME(step_of)(own->stream);
    const int64_t head = NAME(least)(NAME(misaligned)(own, at.i, step), n);
    if (head) at = NAME(map_joined_edge)(o, at, at.i + head, backward);
    const int64_t last = at.i + ((end - at.i) & -step);
    NAME(constants) k = NAME(constants_at)(own, at.channel, 0, p);
    while (at.i < last) {
        const int64_t whole = NAME(least)(at.left, last - at.i) / WIDTH * WIDTH;
        NAME(map_whole)(own, at.i, whole, &k, p, backward);
        NAME(go_on)(&at, whole);
        if (at.i == last) break;
        const int64_t i = at.i, left = at.left;
        if (left >= WIDTH) { /* a plane ended where a vector did */
            k = NAME(constants_at)(own, at.channel, 0, p);
            continue;
        }
        NAME(go_on)(&at, WIDTH);
        const NAME(constants) next = NAME(constants_at)(own, at.channel, 0, p);
        NAME(map_across)(own, i, &k, &next, left, p, backward);
        k = next;
    }
    if (at.i < end) NAME(map_joined_edge)(o, at, end, backward);
}

/* Maps parts of adjacent planes, whose columns recur, or of planes of channel c. */
FBN_INLINE void NAME(map_planes)(const fbn_operands *o, const fbn_stretch *s, NAME(parts) p, int backward, int stream) {
    const fbn_operands own = NAME(with_stream)(o, stream);
    const int64_t n = s->n, rows = s->rows, apart = s->apart, inner = own.inner;
    NAME(place) at = {.i = s->at, .channel = s->c, .left = n, .inner = n, .channels = 1};
    if (s->period)
        at = (NAME(place)){.i = s->at,
                           .channel = s->c / inner,
                           .left = inner - s->c % inner,
                           .inner = inner,
                           .channels = s->period / inner};
    for (int64_t row = 0; row < rows; row++, at.i += apart) NAME(map_planes_row)(o, &own, at, n, p, backward);
}

/* ---- which loop serves a call ---- */

FBN_INLINE void NAME(map_to)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward, NAME(parts) p,
                             int stream) {
    if (columns) NAME(map_columns)(o, s, p, backward, stream);
    else NAME(map_planes)(o, s, p, backward, stream);
}
FBN_INLINE void NAME(map_as)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward, NAME(parts) p) {
    if (!NAME(is_light)(p)) NAME(map_to)(o, s, columns, backward, p, o->stream);
    else if (o->stream) NAME(map_to)(o, s, columns, backward, p, 1);
    else NAME(map_to)(o, s, columns, backward, p, 0);
}

/* The identity and the ReLU, which have a loop for each set of parts. Only loops over
 * columns have a version that does not load shift_low, since those over planes load it once. */
FBN_INLINE void NAME(map_simple)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward,
                                 int activation) {
    const int residual = o->residual && !(backward && activation == FBN_IDENTITY), frozen = backward && o->frozen;
    if (residual) NAME(map_as)(o, s, columns, backward, (NAME(parts)){activation, 1, 1, 0, frozen});
    else if (frozen) NAME(map_as)(o, s, columns, 1, (NAME(parts)){activation, 0, 1, 0, 1});
    else if (columns && !backward && o->exact) NAME(map_as)(o, s, 1, 0, (NAME(parts)){activation, 0, 1, 1, 0});
    else NAME(map_as)(o, s, columns, backward, (NAME(parts)){activation, 0, 1, 0, 0});
}

/* Heavy maps are those of the SiLU and the sigmoid, whose loops are long. Their gradients compute a piece of dz first,
 * and then map it as if it were dy. 16-bit values use the loops of float32, as do all maps where conversions are long.
 */
enum { NAME(ALL_HEAVY) = LONG_CONVERSIONS };

#if WIDENS
FBN_INLINE void NAME(map_heavy)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward, NAME(parts) p) {
    (void)p;
    if (backward)
        NAME(map_pieces)(o, s, columns ? NAME_OF_REAL(grad_affine_columns) : NAME_OF_REAL(grad_affine_planes));
    else NAME(map_pieces)(o, s, columns ? NAME_OF_REAL(affine_columns) : NAME_OF_REAL(affine_planes));
}
#else
static fbn_loop NAME(grad_affine_planes), NAME(grad_affine_columns);

FBN_INLINE void NAME(map_heavy)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward, NAME(parts) p) {
    if (backward) NAME(map_dz)(o, s, columns, columns ? NAME(grad_affine_columns) : NAME(grad_affine_planes));
    else NAME(map_as)(o, s, columns, 0, p);
}
#endif

/* The SiLU and the sigmoid. Planes alone gain something where it is known whether there is a residual. */
FBN_INLINE void NAME(map_sigmoids)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward,
                                   int activation) {
    const int exact = columns && !backward && o->exact;
    const NAME(parts) p = {activation, o->residual != NULL, 1, exact, 0};
    if (columns || backward) NAME(map_heavy)(o, s, columns, backward, p);
    else if (o->residual) NAME(map_heavy)(o, s, 0, 0, (NAME(parts)){activation, 1, 1, 0, 0});
    else NAME(map_heavy)(o, s, 0, 0, (NAME(parts)){activation, 0, 1, 0, 0});
}

FBN_INLINE void NAME(map_by_parts)(const fbn_operands *o, const fbn_stretch *s, int columns, int backward) {
    const NAME(parts) any = NAME(any_parts)(o);
    const int residual = any.has_residual, exact = columns && !backward && any.exact, frozen = backward && any.frozen;
    if (NAME(ALL_HEAVY)) {
        NAME(map_heavy)(o, s, columns, backward, any);
        return;
    }
    switch (o->usual ? o->activation : -1) {
    case FBN_IDENTITY:
        NAME(map_simple)(o, s, columns, backward, FBN_IDENTITY);
        break;
    case FBN_RELU:
        NAME(map_simple)(o, s, columns, backward, FBN_RELU);
        break;
    case FBN_RELU6:
        NAME(map_as)(o, s, columns, backward, (NAME(parts)){FBN_RELU6, residual, 1, exact, frozen});
        break;
    case FBN_LEAKY_RELU:
        NAME(map_as)(o, s, columns, backward, (NAME(parts)){FBN_LEAKY_RELU, residual, 1, exact, frozen});
        break;
    case FBN_HARDSWISH:
        NAME(map_as)(o, s, columns, backward, (NAME(parts)){FBN_HARDSWISH, residual, 1, exact, frozen});
        break;
    case FBN_SILU:
        NAME(map_sigmoids)(o, s, columns, backward, FBN_SILU);
        break;
    case FBN_SIGMOID:
        NAME(map_sigmoids)(o, s, columns, backward, FBN_SIGMOID);
        break;
    default:
        NAME(map_as)(o, s, columns, backward, any);
    }
}

/* Planes of a channel, or adjacent ones of all channels. Gradients of a SiLU or a sigmoid are never of the latter,
 * since map_dz takes one channel at a time (see set_map_panel in verbs.c). */
static void NAME(affine_planes)(const fbn_operands *o, const fbn_stretch *s) { NAME(map_by_parts)(o, s, 0, 0); }
static void NAME(grad_affine_planes)(const fbn_operands *o, const fbn_stretch *s) { NAME(map_by_parts)(o, s, 0, 1); }
static void NAME(grad_affine_columns)(const fbn_operands *o, const fbn_stretch *s) { NAME(map_by_parts)(o, s, 1, 1); }

FBN_APART void NAME(affine_singly)(const fbn_operands *o, const fbn_stretch *s) { NAME(map_by_parts)(o, s, 1, 0); }

/* Apart, since a call seldom has pairs: what it keeps on the stack would slow down the others. */
FBN_APART void NAME(affine_in_pairs)(const fbn_operands *o, const fbn_stretch *s) {
    const int64_t paired = NAME(affine_pairs)(o, s);
    fbn_stretch rest = *s;
    rest.at += paired * s->apart;
    rest.rows -= paired;
    if (rest.rows) NAME(affine_singly)(o, &rest);
}
static void NAME(affine_columns)(const fbn_operands *o, const fbn_stretch *s) {
    if (NAME(has_pairs)(o, s)) NAME(affine_in_pairs)(o, s);
    else NAME(affine_singly)(o, s);
}

/* Orders streamed stores before later ones. */
static void NAME(fence)(void) { stream_fence(); }
