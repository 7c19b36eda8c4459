/* nans.c: does the baseline keep a NaN one when it rounds to 16 bits, whatever its other bits are? Processors differ in
 * the NaN that they compute: SPARC sets all of its bits. Includes the baseline itself, without a library. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../../src_c/kernels.h"

#include "../../src_c/simd/baseline.h"

int main(void) {
    static const uint32_t nans[] = {0x7fffffff, 0xffffffff, 0x7fbfffff, 0xffffff80, 0x7fc00000, 0xffc08000};
    for (int i = 0; i < 6; i++) {
        float lanes[F32_WIDTH];
        uint16_t bf16[F32_WIDTH], f16[F32_WIDTH];
        for (int k = 0; k < F32_WIDTH; k++) memcpy(&lanes[k], &nans[i], sizeof lanes[k]);
        bf16_store(bf16, f32_load(lanes));
        f16_store(f16, f32_load(lanes));
        for (int k = 0; k < F32_WIDTH; k++)
            if ((bf16[k] & 0x7fff) <= 0x7f80 || (f16[k] & 0x7fff) <= 0x7c00) {
                printf("%08x became %04x and %04x\n", nans[i], bf16[k], f16[k]);
                return 1;
            }
    }
    printf("right\n");
    return 0;
}
