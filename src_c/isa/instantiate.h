/* instantiate.h: the kernels for each dtype, on the instruction set whose vocabulary was included before. The constants
 * of channels are in the compute type, so 16-bit dtypes use the functions of float32 for them. */
#include <float.h>
#include <math.h>
#include <string.h>

#define PASTE_(what, dtype, isa) what##_##dtype##_##isa
#define PASTE(what, dtype, isa) PASTE_(what, dtype, isa)
#define NAME(what) PASTE(what, DTYPE, FBN_ISA)
#define NAME_OF_REAL(what) PASTE(what, OF_REAL, FBN_ISA)
#define OF_ISA(what) PASTE(what, all, FBN_ISA)
#define STRING_(s) #s
#define STRING(s) STRING_(s)

#include "../kernels/statistics.h"

#include "../dtypes/f32.h"
#include "../kernels/constants.h"
#include "dtype_kernels.h"
#include "../dtypes/unbind.h"

#include "../dtypes/f64.h"
#include "../kernels/constants.h"
#include "dtype_kernels.h"
#include "../dtypes/unbind.h"

#include "../dtypes/f16.h"
#include "dtype_kernels.h"
#include "../dtypes/unbind.h"

#include "../dtypes/bf16.h"
#include "dtype_kernels.h"
#include "../dtypes/unbind.h"

/* All that an instruction set exports: fbn_kernels_avx2 and so on, and the tables of its dtypes. */
extern const fbn_kernels PASTE(fbn, kernels, FBN_ISA);
extern const fbn_dtype_kernels *const PASTE(fbn, dtypes, FBN_ISA)[];
const fbn_dtype_kernels *const PASTE(fbn, dtypes,
                                     FBN_ISA)[] = {&PASTE(kernels, f32, FBN_ISA), &PASTE(kernels, f64, FBN_ISA),
                                                   &PASTE(kernels, f16, FBN_ISA), &PASTE(kernels, bf16, FBN_ISA)};
const fbn_kernels PASTE(fbn, kernels, FBN_ISA) = {STRING(FBN_ISA), PASTE(fbn, dtypes, FBN_ISA),
                                                  PASTE(fbn, dtypes, FBN_ISA)};
