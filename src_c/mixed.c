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

/* An element is copied as an integer of its size, a row as bytes. */
static void gather(const char *from, int64_t width, const uint16_t *at, int64_t n, char *to) {
    if (width == 2)
        for (int64_t k = 0; k < n; k++) ((uint16_t *)to)[k] = ((const uint16_t *)from)[at[k]];
    else if (width == 4)
        for (int64_t k = 0; k < n; k++) ((uint32_t *)to)[k] = ((const uint32_t *)from)[at[k]];
    else if (width == 8)
        for (int64_t k = 0; k < n; k++) ((uint64_t *)to)[k] = ((const uint64_t *)from)[at[k]];
    else
        for (int64_t k = 0; k < n; k++) memcpy(to + k * width, from + at[k] * width, (size_t)width);
}

void fbn_scatter(const char *from, int64_t width, const uint16_t *at, int64_t n, char *to) {
    if (width == 2)
        for (int64_t k = 0; k < n; k++) ((uint16_t *)to)[at[k]] = ((const uint16_t *)from)[k];
    else if (width == 4)
        for (int64_t k = 0; k < n; k++) ((uint32_t *)to)[at[k]] = ((const uint32_t *)from)[k];
    else if (width == 8)
        for (int64_t k = 0; k < n; k++) ((uint64_t *)to)[at[k]] = ((const uint64_t *)from)[k];
    else
        for (int64_t k = 0; k < n; k++) memcpy(to + at[k] * width, from + k * width, (size_t)width);
}

fbn_operands fbn_gather(const fbn_operands *operands, int64_t width, const uint16_t *at, int64_t n, fbn_gathered *to) {
    fbn_operands own = *operands;
    gather(own.x, width, at, n, to->x);
    if (own.dy) gather(own.dy, width, at, n, to->dy);
    if (own.residual) gather(own.residual, width, at, n, to->residual);
    own.x = to->x;
    own.dy = own.dy ? to->dy : NULL;
    own.residual = own.residual ? to->residual : NULL;
    own.out = to->dy;
    own.dresidual = to->residual;
    own.stream = 0;
    own.walk.ahead = own.walk.run_ahead = 0;
    return own;
}
