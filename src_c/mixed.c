/* mixed.c: values of some places, gathered and put back. */
#include "mixed.h"

#include <string.h>

void fbn_find_places(const unsigned char *mask, int64_t n, fbn_places *places) {
    int64_t counted = 0;
    for (int64_t i = 0; i < n; i++) { /* what is written for a position of the other kind is written over */
        places->at[0][i - counted] = places->at[1][counted] = (uint16_t)i;
        counted += mask[i] != 0;
    }
    places->count[0] = n - counted;
    places->count[1] = counted;
}

/* Where `width` is a constant, a value is copied by an instruction. */
FBN_INLINE void gather_by(size_t width, const char *from, const uint16_t *at, int64_t n, char *to) {
    for (int64_t k = 0; k < n; k++, to += width) memcpy(to, from + at[k] * width, width);
}
FBN_INLINE void scatter_by(size_t width, const char *from, const uint16_t *at, int64_t n, char *to) {
    for (int64_t k = 0; k < n; k++, from += width) memcpy(to + at[k] * width, from, width);
}

FBN_APART void gather(const char *from, int64_t width, const uint16_t *at, int64_t n, char *to) {
    if (width == 2) gather_by(2, from, at, n, to);
    else if (width == 4) gather_by(4, from, at, n, to);
    else if (width == 8) gather_by(8, from, at, n, to);
    else gather_by((size_t)width, from, at, n, to);
}

void fbn_scatter(const char *from, int64_t width, const uint16_t *at, int64_t n, char *to) {
    if (width == 2) scatter_by(2, from, at, n, to);
    else if (width == 4) scatter_by(4, from, at, n, to);
    else if (width == 8) scatter_by(8, from, at, n, to);
    else scatter_by((size_t)width, from, at, n, to);
}

fbn_operands fbn_gathered_operands(const fbn_operands *operands, fbn_gathered *room) {
    fbn_operands own = *operands;
    own.x = room->x;
    own.dy = own.dy ? room->dy : NULL;
    own.residual = own.residual ? room->residual : NULL;
    own.out = room->dy;
    own.dresidual = room->residual;
    own.stream = 0;
    own.walk.ahead = own.walk.run_ahead = 0;
    return own;
}

void fbn_gather(const fbn_operands *o, int64_t from, int64_t elem, int64_t width, const uint16_t *at, int64_t n,
                fbn_gathered *room) {
    const int64_t skip = from * elem;
    gather((const char *)o->x + skip, width, at, n, room->x);
    if (o->dy) gather((const char *)o->dy + skip, width, at, n, room->dy);
    if (o->residual) gather((const char *)o->residual + skip, width, at, n, room->residual);
}
