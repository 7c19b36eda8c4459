#define FBN_ISA neon
#include "../simd/neon.h"
#include "instantiate.h"
