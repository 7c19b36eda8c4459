/* machine.h: what the answers about a cache mean. Pure functions, apart from those that ask, so that tests can make
 * answers up.
 */
#ifndef FBN_MACHINE_H
#define FBN_MACHINE_H

#include "fastbn.h"

/* The bytes of data cache that one answer of a cache leaf (eax, ebx, ecx, edx) describes, where that is a cache of this
 * level that holds data; else 0. Leaf 4 of Intel and leaf 0x8000001D of AMD have one layout. */
int64_t fbn_cache_of_leaf(const uint32_t answer[4], int level);

/* The bytes that /sys has for a level, below a folder such as /sys/devices/system/cpu/cpu0/cache; or 0. */
int64_t fbn_cache_of_folder(const char *folder, int level);

/* The smallest of n answers that a cache of this level can have; 0 without any. */
int64_t fbn_believed_cache(int level, const int64_t *answers, int n);

#endif
