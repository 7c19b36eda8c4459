/* split.h: how is a call cut into parts? Integers in, integers out: no array but the mask is read here.
 *
 * A unit is a row (channels-last), a small plane, or a plane or a piece of one (channels-first). A segment is a number
 * of units that follow each other. It has sums of its own, which are added up in order; since its bounds follow from
 * the shape and the mask alone, the bits of the result do not depend on anything else. A block is a number of channels,
 * of all units, that is small enough to stay in a core's cache from the reduction to the map. A panel is the number of
 * channels that a kernel gets at once. A tile is the part of a panel that one call of a kernel gets: units of equal
 * length at equal distances, of which all count towards the statistics, or none does, or which a mask mixes.
 *
 * Kernels get rows and small planes as columns (see kernels.h). Each channel of small planes has `inner` columns.
 * Where rows are short, `repeat` of them are joined, so that the kernels' loops are long enough. A call that reduces
 * nothing may map stretches of memory from end to end, each with parts of several planes: then these are its units.
 */
#ifndef FBN_SPLIT_H
#define FBN_SPLIT_H

#include "walk.h"

typedef struct {
    int64_t outer, channels, inner;
    int maps;                 /* the call reduces nothing */
    int rows;                 /* channels-last */
    int columns;              /* kernels get columns: rows, or small planes */
    int stacks;               /* small planes of a few images, which are summed channel by channel */
    int stretches;            /* units are stretches of memory */
    int joins;                /* adjacent planes are mapped as one run */
    int64_t repeat;           /* rows that sums join; their constants are repeated as often */
    int64_t map_repeat;       /* rows, or images of small planes, that maps join */
    int64_t elem, real;       /* bytes of an element, and of a channel's constant */
    int64_t cut, cuts;        /* elements in a piece of a plane; pieces in a plane */
    int64_t units, segment;   /* units in all; units in a segment */
    int64_t segments, padded; /* segments in all; channels with padding */
    int64_t joined;           /* the columns of joined rows, with padding */
    int64_t block, panel;     /* channels in a block, and in a panel */
    int64_t map_panel;        /* channels in a panel that is mapped, if a map reads four constants of each */
    int whole_rows;           /* rows are mapped whole, even if their constants do not stay in the nearest cache */
    int whole_images;         /* small planes: a panel has all channels, even so */
    int planned;              /* the call has a plan instead of a workspace */
    int threads;              /* how many threads have enough work */
    int by_channels;          /* a thread does all steps on one block before it turns to the next */
    int shares_channels;      /* there are so many channels that threads share the work done once per channel */
    int large;                /* the result is so large that memory is read, not a cache */
    int around;               /* it is written around the cache, unless its lines have been read (tile.c) */
    fbn_walk walk;
} fbn_split;

/* What a call does: it only maps, or it reduces and then maps, or it does both with a mask, unless this just leaves out
 * whole images of small planes. These have a workspace. The last one maps by a plan instead. */
typedef enum { FBN_MAPS, FBN_REDUCES, FBN_MASKED, FBN_PLANNED } fbn_kind;

/* The split of a valid problem, for a call that reads this number of large arrays. */
fbn_split fbn_split_of(const fbn_problem *problem, int arrays, fbn_kind kind);

/* Whether planes are small, and a mask treats the positions of each image alike. */
int fbn_masks_images(const fbn_problem *problem, const unsigned char *mask);

/* Whether the activation is a SiLU or a sigmoid, which take long to compute. */
int fbn_is_costly(const fbn_problem *problem);

/* Rows are joined in calls on at least so many values. */
enum { FBN_WORTH_JOINING = 4096 };

/* The length of arrays with a value per channel: the number of channels, rounded up and padded. */
int64_t fbn_padded(int64_t channels);

/* The length of arrays with a value per column, where rows of so many channels may be joined. */
int64_t fbn_joined(int64_t channels);

/* The columns of a panel of so many channels. */
int64_t fbn_columns(const fbn_split *split, int64_t channels);

/* The channels in a panel that is mapped by so many constants of each. Those of rows stay in the nearest cache. Since
 * whole rows are one run, which is faster than panels, rows with a few more constants are not cut, nor are longer ones
 * that are `whole_rows`. */
int64_t fbn_map_panel(const fbn_split *split, int constants);

/* The bytes of a block of channels, of all units. */
int64_t fbn_block_bytes(const fbn_split *split, int64_t channels);

/* The channels of stacks that kernels get at once. */
enum { FBN_STACKS = 32 };

/* How many float64 numbers of workspace a thread needs: to reduce, for lanes, or the columns' sums and origins; behind
 * these for the constants of whole images, which would not fit on the stack. Stacks have room for lanes and for
 * columns, since some gradients sum them as columns. */
int64_t fbn_lane_doubles(const fbn_split *split);
int64_t fbn_room_doubles(const fbn_split *split);

/* The columns in a panel of small planes have at most so many bytes of each constant, but for whole images. Those of a
 * plan, which has the constants of y alone, fit into the same room. */
enum { FBN_COLUMN_BYTES = 4096, FBN_PLANNED_BYTES = FBN_COLUMN_BYTES * FBN_CONSTANTS / (FBN_CONSTANTS_OF_Y + 1) };

/* A mixed tile has at most so many positions, and so many bytes of them. */
enum { FBN_MIXED = 512, FBN_MIXED_BYTES = FBN_MIXED * 8 };

typedef struct {
    int64_t unit, from; /* where it starts: a unit, and an element in it */
    int64_t rows;       /* of columns */
    fbn_planes planes;  /* otherwise */
    int counts;         /* whether its positions count towards the statistics */
    int mixed;          /* some do and some do not: it is of rows of all channels, or of one plane of each channel */
    int64_t next_unit, next_from;
} fbn_tile;

/* The tile that starts at a unit and an element in it, and ends before the unit `last`. mask is NULL where all
 * positions are treated alike. Where the mask changes often, tiles are mixed. */
fbn_tile fbn_tile_at(const fbn_split *split, int64_t unit, int64_t from, int64_t last, const unsigned char *mask);

/* The bytes of a position of the mask: a row of all channels, or an element of one. */
int64_t fbn_width(const fbn_split *split);

/* The index of a tile's first position in the mask. */
int64_t fbn_position(const fbn_split *split, int64_t unit, int64_t from);

/* The index of a unit's first element of channel c. */
int64_t fbn_start(const fbn_split *split, int64_t unit, int64_t c);

/* How many units of n channels are mapped at a time, on the way from the end backwards. */
int64_t fbn_chunk(const fbn_split *split, int64_t n);

#endif
