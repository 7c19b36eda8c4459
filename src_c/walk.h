/* walk.h: in which order do the elements of a tile pass through a loop?
 *
 * Memory is read and written faster in several streams, in turns, on some processors, and in one on others. What a walk
 * must not change is a bit of a sum: a plane is added to lanes of its own first, and these are added up in the order of
 * the images; columns are always added in the same groups of rows.
 */
#ifndef FBN_WALK_H
#define FBN_WALK_H

#include "kernels.h"

/* The most planes of a channel in a tile, and the most streams. */
enum { FBN_IMAGES = 8 };

/* `images` times `channels` runs of `inner` contiguous elements. The runs of an image start `step` elements apart, and
 * images, of which there are at most FBN_IMAGES, start `apart` elements apart. dz may lie elsewhere: the images of a
 * channel next to each other, dz_apart elements apart, and channels dz_step elements apart. A dz_step of 0 means that
 * it lies as x does. Sums take one channel after another or, if by_image, one image after another. */
typedef struct {
    int64_t images, apart, channels, step, inner, dz_apart, dz_step;
    int by_image;
} fbn_planes;

/* `count` runs of `length` contiguous elements, `apart` elements apart. Each starts with column `first`. The columns
 * recur after `period` elements. */
typedef struct {
    int64_t count, apart, length, period, first;
} fbn_runs;

/* `elem` is the bytes of an element. Sums of runs add `rows` of them at a time, and give a loop at most so many groups
 * of them at once. Sums are added to `lanes`, [channels][2][FBN_LANES], or to `sums` and `others`. A map of planes
 * reads dz in the place of dy if dz_step is not 0. */
void fbn_sum_planes(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_planes planes, double *lanes);
void fbn_sum_runs(fbn_loop *loop, const fbn_operands *o, int64_t rows, int64_t groups, fbn_runs runs, double *sums,
                  double *others);
void fbn_map_planes(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_planes planes);
void fbn_map_runs(fbn_loop *loop, const fbn_operands *o, int64_t elem, fbn_runs runs);

#endif
