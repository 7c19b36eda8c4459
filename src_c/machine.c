/* machine.c: how large are this machine's caches? The processor, the operating system and the C library are asked.
 *
 * None of them can be trusted alone. glibc up to 2.36 gives the last cache of an AMD processor as the sum of its parts,
 * of which one core can use only one. A virtual machine may hide a cache, or report 1 TiB. So the smallest plausible
 * answer is believed, and the C library is asked only where the other two do not answer.
 */
#if defined(__linux__) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* for O_CLOEXEC */
#endif

#include "machine.h"

#include <string.h>

#include "dispatch.h"
#include "processor.h"

#if defined(__linux__)
#include <fcntl.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

enum { LEVELS = 3 };

/* ---- what an answer means ---- */

int64_t fbn_cache_of_leaf(const uint32_t answer[4], int level) {
    enum { DATA = 1, UNIFIED = 3 };
    const uint32_t eax = answer[0], ebx = answer[1], ecx = answer[2], type = eax & 31;
    if ((type != DATA && type != UNIFIED) || (int)(eax >> 5 & 7) != level) return 0;
    const uint64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 1023) + 1, line = (ebx & 4095) + 1;
    return (int64_t)(ways * partitions * line * ((uint64_t)ecx + 1));
}

int64_t fbn_believed_cache(int level, const int64_t *answers, int n) {
    static const int64_t least[LEVELS] = {4 << 10, 64 << 10, 256 << 10};
    static const int64_t most[LEVELS] = {1 << 20, 64 << 20, 1 << 30};
    int64_t believed = 0;
    if (level < 1 || level > LEVELS) return 0;
    for (int i = 0; i < n; i++) {
        const int plausible = answers[i] >= least[level - 1] && answers[i] <= most[level - 1];
        if (plausible && (!believed || answers[i] < believed)) believed = answers[i];
    }
    return believed;
}

/* ---- the processor ---- */

#if defined(FBN_CPUID)
/* AMD and Hygon have a cache leaf of their own. */
static uint32_t cache_leaf(void) {
    uint32_t answer[4], last;
    fbn_cpuid(0, 0, answer);
    last = answer[0];
    const uint32_t leaf = fbn_is_amd() ? 0x8000001Du : 4;
    if (leaf == 4) return last >= leaf ? leaf : 0;
    fbn_cpuid(0x80000000u, 0, answer);
    return answer[0] >= leaf ? leaf : 0;
}

static int64_t cache_of_processor(int level) {
    const uint32_t leaf = cache_leaf();
    for (uint32_t part = 0; leaf && part < 16; part++) {
        uint32_t answer[4];
        fbn_cpuid(leaf, part, answer);
        const int64_t bytes = fbn_cache_of_leaf(answer, level);
        if (bytes) return bytes;
    }
    return 0;
}
#else
static int fbn_is_amd(void) { return 0; }

static int64_t cache_of_processor(int level) {
    (void)level;
    return 0;
}
#endif

/* ---- the system ---- */

#if defined(__linux__)
/* Reads the start of the file folder/indexN/name as a string, which is empty where there is no such file. */
static void read_text(const char *folder, int index, const char *name, char *text, size_t room) {
    const char *parts[] = {folder, "/index", index < 10 ? (char[]){(char)('0' + index), 0} : "?", "/", name};
    char path[256];
    size_t n = 0;
    text[0] = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (const char *letter = parts[i]; *letter; letter++) {
            if (n + 1 == sizeof path) return;
            path[n++] = *letter;
        }
    path[n] = 0;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    const ssize_t length = read(file, text, room - 1);
    text[length > 0 ? length : 0] = 0;
    close(file);
}

/* The number of bytes in a text such as "32768K" or "32M"; 0 for any other text. */
static int64_t bytes_of_text(const char *text) {
    int64_t number = 0;
    for (; *text >= '0' && *text <= '9' && number < INT64_C(1) << 30; text++) number = 10 * number + (*text - '0');
    return number << (*text == 'K' ? 10 : *text == 'M' ? 20 : *text == 'G' ? 30 : 0);
}

int64_t fbn_cache_of_folder(const char *folder, int level) {
    for (int index = 0; index < 10; index++) {
        char text[32];
        read_text(folder, index, "level", text, sizeof text);
        if (text[0] != '0' + level || (text[1] && text[1] != '\n')) continue;
        read_text(folder, index, "type", text, sizeof text);
        if (text[0] != 'D' && text[0] != 'U') continue; /* Data, Unified */
        read_text(folder, index, "size", text, sizeof text);
        return bytes_of_text(text);
    }
    return 0;
}

static int64_t cache_of_system(int level) { return fbn_cache_of_folder("/sys/devices/system/cpu/cpu0/cache", level); }

/* musl does not define these names. */
static int64_t cache_of_library(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    const int names[LEVELS] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
    return sysconf(names[level - 1]);
#else
    (void)level;
    return 0;
#endif
}
#else
int64_t fbn_cache_of_folder(const char *folder, int level) {
    (void)folder;
    (void)level;
    return 0;
}

#if defined(__APPLE__)
static int64_t of_name(const char *name) {
    int64_t bytes = 0;
    size_t size = sizeof bytes;
    return sysctlbyname(name, &bytes, &size, NULL, 0) ? 0 : bytes;
}

/* Apple's own processors name the caches of their fast cores separately, and have no third level. */
static int64_t cache_of_system(int level) {
    static const char *const fast[LEVELS] = {"hw.perflevel0.l1dcachesize", "hw.perflevel0.l2cachesize",
                                             "hw.perflevel0.l3cachesize"};
    static const char *const any[LEVELS] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
    const int64_t bytes = of_name(fast[level - 1]);
    return bytes ? bytes : of_name(any[level - 1]);
}
#elif defined(_WIN32)
static int64_t cache_of_system(int level) {
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION found[256];
    DWORD bytes = sizeof found;
    if (!GetLogicalProcessorInformation(found, &bytes)) return 0;
    for (DWORD i = 0; i < bytes / sizeof *found; i++)
        if (found[i].Relationship == RelationCache && found[i].Cache.Level == level &&
            found[i].Cache.Type != CacheInstruction)
            return found[i].Cache.Size;
    return 0;
}
#else
static int64_t cache_of_system(int level) {
    (void)level;
    return 0;
}
#endif

static int64_t cache_of_library(int level) {
    (void)level;
    return 0;
}
#endif

/* ---- what is believed ---- */

int64_t fbn_cache_bytes(int level) {
    if (level < 1 || level > LEVELS) return 0;
    const int64_t answers[] = {cache_of_processor(level), cache_of_system(level)};
    const int64_t believed = fbn_believed_cache(level, answers, 2), last = believed ? 0 : cache_of_library(level);
    return believed ? believed : fbn_believed_cache(level, &last, 1);
}

/* By measurement on AMD's Zen 4 and Zen 3. The latter reads several streams no faster than one, and gains earlier by
 * writing around the cache; so may older ones, which have no AVX-512 either. Others get the defaults, which were chosen
 * on Intel's Ice Lake. */
static fbn_habits habits_of_processor(const fbn_kernels *best) {
    fbn_habits amd = {.streams = 8, .row_streams = 3, .turn = 512, .ahead = 3072, .stream_from = 6 << 20};
    if (!fbn_is_amd()) return (fbn_habits){0, 0, 0, 0, 0, 0};
    if (strcmp(fbn_kernels_name(best), "avx512") != 0) {
        amd.streams = amd.row_streams = 1;
        amd.stream_from = 4000000;
    }
    return amd;
}

fbn_machine fbn_this_machine(void) {
    const int64_t core = fbn_cache_bytes(2), shared = fbn_cache_bytes(3);
    const fbn_kernels *best = fbn_kernels_at(0);
    return (fbn_machine){best, core ? core : 1 << 20, shared ? shared : 8 << 20, habits_of_processor(best)};
}
