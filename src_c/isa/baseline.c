#define FBN_ISA baseline
#include "../simd/baseline.h"
#include "instantiate.h"
