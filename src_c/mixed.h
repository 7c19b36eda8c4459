/* mixed.h: where a mask mixes positions that count with those that do not, how do they pass through a loop?
 *
 * A kernel takes positions of one kind, and a call for each of many short runs would take longer than their values. So
 * the values of one kind are gathered side by side, pass through a loop together, and results are put back.
 */
#ifndef FBN_MIXED_H
#define FBN_MIXED_H

#include "job.h"

/* The places of a mixed tile that do not count, and of those that do, from its first. */
typedef struct {
    int64_t count[2];
    uint16_t at[2][FBN_MIXED];
} fbn_places;

void fbn_find_places(const unsigned char *mask, int64_t n, fbn_places *places);

/* Room for what is gathered of each array, and for results. */
typedef struct {
    _Alignas(64) char x[FBN_MIXED_BYTES], dy[FBN_MIXED_BYTES], residual[FBN_MIXED_BYTES];
} fbn_gathered;

/* The operands of a loop on what has been gathered. Its results take the place of dy and of the residual. */
fbn_operands fbn_gathered_operands(const fbn_operands *operands, fbn_gathered *room);

/* Gathers what a loop reads of the n places `at`, each of `width` bytes, from element `from` on. */
void fbn_gather(const fbn_operands *operands, int64_t from, int64_t elem, int64_t width, const uint16_t *at, int64_t n,
                fbn_gathered *room);

/* Puts the values of n places where they belong. */
void fbn_scatter(const char *from, int64_t width, const uint16_t *at, int64_t n, char *to);

#endif
