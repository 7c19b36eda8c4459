#define FBN_ISA avx2
#include "../simd/avx2.h"
#include "instantiate.h"
