/* machine.h: what do the answers about a cache mean? These functions are pure, apart from those that ask, so that tests
 * can make answers up.
 */
#ifndef FBN_MACHINE_H
#define FBN_MACHINE_H

#include "fastbn.h"

/* The size in bytes of the cache that an answer of a CPUID cache leaf (eax, ebx, ecx, edx) describes, if it holds data
 * and has this level; else 0. Intel's leaf 4 and AMD's leaf 0x8000001D have the same layout. */
int64_t fbn_cache_of_leaf(const uint32_t answer[4], int level);

/* The size in bytes of the data cache of this level by /sys, in a folder such as /sys/devices/system/cpu/cpu0/cache; 0
 * where the folder does not tell. */
int64_t fbn_cache_of_folder(const char *folder, int level);

/* The smallest of the n answers that are plausible for this level; 0 if none is. */
int64_t fbn_believed_cache(int level, const int64_t *answers, int n);

#endif
