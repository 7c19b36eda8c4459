/* What must a pass pay for memory? The plainest loops that move the bytes of a pass, compiled for this machine.
 *
 * They add integers, so that neither the dtype nor the values matter. n counts words of 8 bytes, a multiple of 32. The
 * compiler may use any instruction of the machine. `around` writes around the cache, where the processor can. */
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LANES = 32 };

static uint64_t total(const uint64_t *lanes) {
    uint64_t sum = 0;
    for (int k = 0; k < LANES; k++) sum += lanes[k];
    return sum;
}

/* Reads x; `ahead` bytes in front of itself it asks for what comes, if not 0. */
uint64_t limit_read(const uint64_t *x, size_t n, size_t ahead) {
    uint64_t lanes[LANES] = {0};
    if (ahead == 0)
        for (size_t i = 0; i < n; i += LANES)
            for (int k = 0; k < LANES; k++) lanes[k] += x[i + k];
    else
        for (size_t i = 0; i < n; i += LANES) {
            for (int line = 0; line < 4; line++) __builtin_prefetch((const char *)(x + i + 8 * line) + ahead);
            for (int k = 0; k < LANES; k++) lanes[k] += x[i + k];
        }
    return total(lanes);
}

/* Reads x and dy. */
uint64_t limit_read2(const uint64_t *x, const uint64_t *dy, size_t n) {
    uint64_t lanes[LANES] = {0};
    for (size_t i = 0; i < n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += x[i + k] + dy[i + k];
    return total(lanes);
}

#if defined(__AVX512F__)
typedef __m512i word;
#define LOAD(p) _mm512_loadu_si512(p)
#define ADD(a, b) _mm512_add_epi64(a, b)
#define STREAM(p, v) _mm512_stream_si512((void *)(p), v)
#define ONE _mm512_set1_epi64(1)
#elif defined(__AVX2__)
typedef __m256i word;
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define ADD(a, b) _mm256_add_epi64(a, b)
#define STREAM(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define ONE _mm256_set1_epi64x(1)
#endif

/* y = x + 1. To write around the cache, y must start with a cache line. */
void limit_map(uint64_t *restrict y, const uint64_t *restrict x, size_t n, int around) {
#ifdef ONE
    if (around) {
        for (size_t i = 0; i < n; i += sizeof(word) / 8) STREAM(y + i, ADD(LOAD(x + i), ONE));
        _mm_sfence();
        return;
    }
#endif
    for (size_t i = 0; i < n; i++) y[i] = x[i] + 1;
}

/* dx = x + dy, in the same way. */
void limit_map2(uint64_t *restrict dx, const uint64_t *restrict x, const uint64_t *restrict dy, size_t n, int around) {
#ifdef ONE
    if (around) {
        for (size_t i = 0; i < n; i += sizeof(word) / 8) STREAM(dx + i, ADD(LOAD(x + i), LOAD(dy + i)));
        _mm_sfence();
        return;
    }
#endif
    for (size_t i = 0; i < n; i++) dx[i] = x[i] + dy[i];
}
