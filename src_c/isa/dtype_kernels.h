/* dtype_kernels.h: all kernels for the dtype whose names are bound, and their table. The order matters: each header
 * uses those before it. */
#include "../kernels/line.h"

#include "../kernels/exp.h"

#include "../kernels/activations.h"

#include "../kernels/origins.h"

#include "../kernels/gradients.h"

#include "../kernels/sums.h"

#if !WIDENS
#include "../kernels/dz.h"
#endif

#include SUMS

#if WIDENS
#include "../kernels/widened_maps.h"
#endif

#include "../kernels/map.h"

static const fbn_dtype_kernels NAME(kernels) = {
    .first_constant = SPLITS_SCALE ? FBN_SCALE_LOW : FBN_SCALE_LOW + 1,
    .adds_groups = ADDS_GROUPS,
    .fast_parts = FAST_PARTS,
    .set_origin = NAME(set_origin),
    .get = NAME_OF_REAL(get),
    .blend = NAME_OF_REAL(blend),
    .set_moments = OF_ISA(set_moments),
    .invert = OF_ISA(invert),
    .set_line = NAME_OF_REAL(set_line),
    .set_gradient = NAME_OF_REAL(set_gradient),
    .spread = NAME_OF_REAL(spread),
    .fold = OF_ISA(fold),
    .moments_plane = NAME(moments_plane),
    .moments_stack = NAME(moments_stack),
    .moments_columns = NAME(moments_columns),
    .grad_moments_plane = NAME(grad_moments_plane),
    .grad_moments_stack = NAME(grad_moments_stack),
    .grad_moments_columns = NAME(grad_moments_columns),
    .affine_planes = NAME(affine_planes),
    .affine_columns = NAME(affine_columns),
    .grad_affine_planes = NAME(grad_affine_planes),
    .grad_affine_columns = NAME(grad_affine_columns),
    .fence = NAME(fence),
};
