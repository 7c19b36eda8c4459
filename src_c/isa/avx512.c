#define FBN_ISA avx512
#include "../simd/avx512.h"
#include "instantiate.h"
