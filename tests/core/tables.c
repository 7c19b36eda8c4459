/* tables.c: do the tables of AVX-512 and AVX2 give the same sums, and that which a processor prefers? It may take the
 * sums of one and the maps of the other. Linked with the static library. */
#include "../../src_c/dispatch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 40000, CHANNELS = 700 };

static float x[MOST], dy[MOST], y[MOST];
static double saved[6 * CHANNELS];
static float parameters[CHANNELS];

static unsigned long state = 1;
static float number(void) {
    state = state * 6364136223846793005ul + 1442695040888963407ul;
    return (float)((double)(state >> 33) / 1e9 - 1);
}

/* Forward and the gradient's sums of one call. */
static void compute(const fbn_kernels *kernels, int64_t outer, int64_t channels, int64_t inner, int activation,
                    double *sums) {
    const fbn_machine machine = {kernels, 1 << 20, 8 << 20, {0, 0, 0, 0, 0, 0}};
    const fbn_problem p = {.machine = &machine,
                           .dtype = FBN_F32,
                           .activation = (fbn_activation)activation,
                           .slope = 0.1,
                           .outer = outer,
                           .channels = channels,
                           .inner = inner,
                           .threads = 1};
    const size_t bytes = fbn_workspace_bytes(&p);
    void *workspace = malloc(bytes);
    const fbn_forward_args f = {
        .size = sizeof f, .x = x, .y = y, .saved = saved, .eps = 1e-5, .parameters = {parameters, parameters, FBN_F32}};
    const fbn_sums_args s = {.size = sizeof s, .dy = dy, .x = x, .saved = saved, .sums = sums};
    if (fbn_forward(&p, &f, workspace) || fbn_backward_sums(&p, &s, workspace)) exit(2);
    free(workspace);
}

int main(void) {
    static double first[2 * CHANNELS], other[2 * CHANNELS];
    static float first_y[MOST];
    static double first_saved[6 * CHANNELS];
    if (strcmp(fbn_kernels_name(fbn_kernels_at(0)), "avx512") != 0) return puts("no AVX-512"), 0;
    const fbn_kernels *tables[] = {&fbn_kernels_avx512, &fbn_kernels_avx2, fbn_kernels_at(0)};
    const int64_t shapes[][3] = {{7, 3, 600}, {9, 5, 49},   {40, 33, 1}, {33, 700, 1},
                                 {12, 20, 9}, {1, 2, 5000}, {3, 64, 64}};
    for (int i = 0; i < MOST; i++) x[i] = 1000 + number(), dy[i] = number();
    for (int c = 0; c < CHANNELS; c++) parameters[c] = number();
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int activation = 0; activation < FBN_ACTIVATIONS; activation++)
            for (int t = 0; t < 3; t++) {
                const int64_t *n = shapes[s];
                compute(tables[t], n[0], n[1], n[2], activation, other);
                const size_t values = (size_t)(n[0] * n[1] * n[2]);
                if (t &&
                    (memcmp(first, other, (size_t)n[1] * 2 * sizeof *first) || memcmp(first_y, y, values * sizeof *y) ||
                     memcmp(first_saved, saved, (size_t)n[1] * 6 * sizeof *saved)))
                    return printf("shape %d, activation %d, table %d\n", (int)s, activation, t), 1;
                memcpy(first, other, sizeof other);
                memcpy(first_y, y, sizeof y);
                memcpy(first_saved, saved, sizeof saved);
            }
    return puts("the same"), 0;
}
