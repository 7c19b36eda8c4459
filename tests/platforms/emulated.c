/* emulated.c: what takes dispatch.c's place where avx512.h emulates AVX-512: all tables, whatever the processor has. */
#include "../../src_c/dispatch.h"

#include <stddef.h>

const fbn_kernels *fbn_kernels_at(int index) {
    const fbn_kernels *all[] = {&fbn_kernels_avx512, &fbn_kernels_avx2, &fbn_kernels_baseline};
    return index >= 0 && index < 3 ? all[index] : NULL;
}

const char *fbn_kernels_name(const fbn_kernels *kernels) { return kernels ? kernels->name : NULL; }
