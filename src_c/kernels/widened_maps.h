/* widened_maps.h: maps of 16-bit values by the loops of float32, a piece at a time: for those that are not compiled for
 * 16 bits (map.h says which). The bits are those of such loops, since widening is exact and float32 is what they
 * compute in.
 */

/* Rounds and writes n values, whole vectors around the cache if `stream`. */
FBN_INLINE void NAME(narrow_part)(const float *from, int64_t n, elem *to, int stream) {
    int64_t i = 0;
#ifdef vstore_pair
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        const vec pair[] = {vget(from + i), vget(from + i + WIDTH)};
        vstore_pair(to + i, pair);
    }
#endif
    for (; i < n; i += WIDTH) NAME(put)(to + i, vget(from + i), NAME(least)(n - i, WIDTH), stream);
}

/* Rounds and writes n elements of the result from element i on, whole cache lines as a stream if it is one. */
FBN_INLINE void NAME(narrow)(const float *from, const fbn_operands *o, int64_t i, int64_t n) {
    const int64_t step = NAME(step_of)(o->stream), head = NAME(least)(NAME(misaligned)(o, i, step), n);
    const int64_t end = head + ((n - head) & -step);
    elem *to = (elem *)o->out + i;
    NAME(narrow_part)(from, head, to, 0);
    NAME(narrow_part)(from + head, end - head, to + head, o->stream);
    NAME(narrow_part)(from + end, n - end, to + end, 0);
}

/* Maps stretches in pieces that stay in the nearest cache, where they are widened, mapped and rounded. All pieces but
 * the first of a stretch begin where a cache line of the result does. */
FBN_APART void NAME(map_pieces)(const fbn_operands *o, const fbn_stretch *s, fbn_loop *loop) {
    enum { OF_LINE = FBN_LINE / sizeof(elem), ROOM = NAME(PIECE) + FBN_LANES };
    _Alignas(64) float x[ROOM], dy[ROOM], residual[ROOM];
    const int64_t ahead = o->walk.ahead;
    const int writes_dz = o->dy && o->residual && o->activation & FBN_WHICH;
    fbn_operands own = *o;
    own.x = x;
    own.dy = dy;
    own.out = o->dy ? dy : x;
    own.residual = o->residual ? residual : NULL;
    own.dresidual = residual; /* elements of either are read before they are written */
    own.stream = 0;
    own.walk.ahead = 0;
    for (int64_t row = 0; row < s->rows; row++) {
        const int64_t at = s->at + row * s->apart, end = at + s->n;
        for (int64_t i = at, n; i < end; i += n) {
            n = NAME(least)(NAME(PIECE) - OF_LINE + NAME(misaligned)(o, i, OF_LINE), end - i);
            NAME(widen)((const elem *)o->x + i, n, ahead, x);
            if (o->dy) NAME(widen)((const elem *)o->dy + i, n, ahead, dy);
            if (o->residual) NAME(widen)((const elem *)o->residual + i, n, ahead, residual);
            const int64_t c = s->period ? (s->c + i - at) % s->period : s->c;
            loop(&own, &(fbn_stretch){.n = n, .c = c, .period = s->period, .rows = 1});
            NAME(narrow)(own.out, o, i, n);
            if (writes_dz) NAME(narrow_part)(residual, n, (elem *)o->dresidual + i, 0);
        }
    }
}
