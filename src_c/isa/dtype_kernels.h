/* dtype_kernels.h: all kernels for the dtype whose names are bound, and their table. The order matters: the kernels use
 * line.h, exp.h and activations.h, and grad_affine.h uses affine.h and grad_moments.h, too. */
#include "../kernels/line.h"

#include "../kernels/exp.h"

#include "../kernels/activations.h"

#include "../kernels/affine.h"
#include "../kernels/grad_moments.h"
#include "../kernels/moments.h"

#include "../kernels/grad_affine.h"

static const fbn_dtype_kernels NAME(kernels) = {
    NAME(set_origin),     NAME_OF_REAL(set_line), NAME_OF_REAL(set_gradient),
    NAME(moments_cf),     NAME(moments_cl),       NAME(affine_cf),
    NAME(affine_cl),      NAME(grad_moments_cf),  NAME(grad_moments_cl),
    NAME(grad_affine_cf), NAME(grad_affine_cl),
};
