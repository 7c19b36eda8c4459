/* sizes.c: are sizes that do not fit a size_t refused? Compiled for 32 bits, with the core and without kernels. */
#include "../../src_c/dispatch.h"

#include <stdio.h>
#include <string.h>

/* Nothing of these is called: all that is asked here is refused before. */
static const fbn_dtype_kernels none;
static const fbn_dtype_kernels *const dtypes[] = {&none, &none, &none, &none};
static const fbn_kernels tables = {"none", dtypes, dtypes};

const fbn_kernels *fbn_kernels_at(int index) { return index ? NULL : &tables; }
const char *fbn_kernels_name(const fbn_kernels *kernels) { return kernels->name; }

static int wrong(const char *what) {
    printf("%s\n", what);
    return 1;
}

int main(void) {
    const fbn_machine machine = fbn_this_machine();
    fbn_problem p = {.machine = &machine, .outer = 1, .channels = 1 << 27, .inner = 1, .threads = 1};
    double memory[8] = {0};
    if (sizeof(size_t) != 4) return wrong("not compiled for 32 bits");
    /* Each alone would wrap around 2**32 bytes. */
    if (fbn_plan_bytes(1 << 27)) return wrong("a plan that is too large");
    if (!fbn_plan_bytes(1 << 20)) return wrong("a plan that fits");
    if (fbn_workspace_bytes(&p)) return wrong("a workspace that is too large");
    const fbn_moments_args a = {.size = sizeof a, .x = memory, .moments = memory};
    if (fbn_moments(&p, &a, memory) != FBN_BAD_SHAPE) return wrong("moments without a workspace");
    const fbn_plan_args b = {.size = sizeof b, .statistics = {memory, memory, FBN_F32}};
    if (fbn_plan_set(&p, &b, memory) != FBN_BAD_SHAPE) return wrong("a plan without memory");
    p.channels = 64;
    p.outer = 1 << 26; /* 2**32 values: the array alone is beyond a size_t */
    if (fbn_workspace_bytes(&p)) return wrong("an array that is too large");
    if (fbn_moments(&p, &a, memory) != FBN_BAD_SHAPE) return wrong("moments of an array that is too large");
    p.outer = 1 << 10;
    if (!fbn_workspace_bytes(&p)) return wrong("a workspace that fits");
    /* SiLU's dz takes a channel of each of 7 threads: 7 / 5 of the array, which alone has almost 2**32 bytes. */
    fbn_machine roomy = machine;
    roomy.shared_cache = INT64_MAX;
    roomy.habits.stream_from = 1;
    fbn_problem silu = {.machine = &roomy, .activation = FBN_SILU, .channels = 5, .inner = 1 << 14, .threads = 7};
    silu.outer = 13000;
    if (fbn_workspace_bytes(&silu)) return wrong("blocks of dz that are too large");
    silu.outer = 1000;
    if (fbn_workspace_bytes(&silu) < 7000u << 16) return wrong("blocks of dz that fit");
    printf("right\n");
    return 0;
}
