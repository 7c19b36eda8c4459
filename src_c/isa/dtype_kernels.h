/* dtype_kernels.h: every kernel, written in the names that a dtype header has bound, and the dtype's table. line.h
 * comes first, then exp.h and activations.h, and grad_affine.h last, since the others lean on those and it leans on
 * grad_moments.h. */
#include "../kernels/line.h"

#include "../kernels/exp.h"

#include "../kernels/activations.h"

#include "../kernels/affine.h"
#include "../kernels/grad_moments.h"
#include "../kernels/moments.h"

#include "../kernels/grad_affine.h"

static const fbn_dtype_kernels NAME(kernels) = {
    NAME(set_origin),      NAME_OF_REAL(set_line), NAME_OF_REAL(set_slopes), NAME(moments_cf),
    NAME(moments_cl),      NAME(affine_cf),        NAME(affine_cl),          NAME(grad_moments_cf),
    NAME(grad_moments_cl), NAME(grad_affine_cf),   NAME(grad_affine_cl),
};
