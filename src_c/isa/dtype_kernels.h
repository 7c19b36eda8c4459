/* dtype_kernels.h: every kernel, written in the names that a dtype header has bound, and the dtype's table. */
#include "../kernels/line.h"
/* line.h first: the others are written in its terms */
#include "../kernels/affine.h"
#include "../kernels/grad_moments.h"
#include "../kernels/moments.h"
/* grad_moments.h before it: dz_at */
#include "../kernels/grad_affine.h"

static const fbn_dtype_kernels NAME(kernels) = {
    NAME(moments_cf),      NAME(moments_cl),      NAME(affine_cf),      NAME(affine_cl),
    NAME(grad_moments_cf), NAME(grad_moments_cl), NAME(grad_affine_cf), NAME(grad_affine_cl),
};
