/* split.h: how is a call cut into parts? Integers in, integers out: nothing here reads an array but a mask.
 *
 * A unit is a row (channels-last), or a plane or a cut of one (channels-first). Units are gathered in segments, whose
 * bounds follow from the shape alone: each segment has sums of its own, which are added in order. A block is some
 * channels of all units, so few that they stay in a core's cache between the reduction and the map. A tile is what a
 * kernel gets at once: units of one length and evenly apart, all of which count or none.
 */
#ifndef FBN_SPLIT_H
#define FBN_SPLIT_H

#include "kernels.h"

typedef struct {
    int64_t outer, channels, inner;
    int rows;                 /* channels-last */
    int64_t elem, real;       /* bytes of an element, and of a channel's constant */
    int64_t cut, cuts;        /* elements in a cut of a plane; cuts in a plane */
    int64_t units, segment;   /* units in all; in a segment */
    int64_t segments, padded; /* segments in all; channels with padding */
    int64_t block;            /* channels in a block */
    int threads;              /* that are worth it */
    int by_channels;          /* a thread does all steps on a block before it turns to the next */
    int shares_channels;      /* there are so many channels that threads share what is done once for each */
} fbn_split;

/* The split of a valid problem of which a call reads so many arrays. */
fbn_split fbn_split_of(const fbn_problem *problem, int arrays);

/* Channels with room for padding: what per-channel arrays have. */
int64_t fbn_padded(int64_t channels);

/* The float64 lanes that a thread needs to reduce a block of planes. */
int64_t fbn_lane_doubles(const fbn_split *split);

typedef struct {
    int64_t unit, from; /* where it starts: a unit, and an element in it */
    int64_t rows;       /* of channels-last, */
    fbn_planes planes;  /* or of channels-first */
    int counts;         /* towards the statistics */
    int64_t next_unit, next_from;
} fbn_tile;

/* The tile that starts at a unit and an element in it, and ends before the unit `last`. mask is NULL where all
 * positions are treated alike. */
fbn_tile fbn_tile_at(const fbn_split *split, int64_t unit, int64_t from, int64_t last, const unsigned char *mask);

/* The index of a unit's first element of channel c. */
int64_t fbn_start(const fbn_split *split, int64_t unit, int64_t c);

/* Units that are mapped at a time, from the end backwards, of n channels. */
int64_t fbn_chunk(const fbn_split *split, int64_t n);

#endif
