"""How is a call cut? split.c by itself: integers in, integers out."""

from __future__ import annotations

import ctypes as ct
import itertools
from collections.abc import Iterator
from typing import Any

import c_api
import cases
import numpy as np
import pytest

SRC_C = cases.CHECKOUT / "src_c"
pytestmark = pytest.mark.skipif(not SRC_C.is_dir(), reason="src_c is not beside the tests: no checkout")


INTS = (
    "maps",
    "rows",
    "columns",
    "stacks",
    "stretches",
    "joins",
    "threads",
    "by_channels",
    "shares_channels",
    "large",
    "around",
    "whole_rows",
    "whole_images",
    "planned",
)
MAPS, REDUCES, MASKED, PLANNED = range(4)
SMOOTH = (4, 6)  # the activations SiLU and sigmoid
MIXED_BYTES = 4096


class Split(ct.Structure):
    """fbn_split of split.h."""

    _fields_ = tuple(
        (name, ct.c_int if name in INTS else ct.c_int64)
        for name in [
            "outer",
            "channels",
            "inner",
            "maps",
            "rows",
            "columns",
            "stacks",
            "stretches",
            "joins",
            "repeat",
            "map_repeat",
            "elem",
            "real",
            "cut",
            "cuts",
            "units",
            "segment",
            "segments",
            "padded",
            "joined",
            "block",
            "panel",
            "map_panel",
            "whole_rows",
            "whole_images",
            "planned",
            "threads",
            "by_channels",
            "shares_channels",
            "large",
            "around",
            "streams",
            "row_streams",
            "turn",
            "ahead",
            "run_ahead",
        ]
    )


class DtypeKernels(ct.Structure):
    """The first fields of fbn_dtype_kernels, which are all that a split asks for."""

    _fields_ = (("first_constant", ct.c_int), ("adds_groups", ct.c_int), ("fast_parts", ct.c_int))


class Kernels(ct.Structure):
    """The first fields of fbn_kernels."""

    _fields_ = (("name", ct.c_char_p), ("of", ct.POINTER(ct.POINTER(DtypeKernels))))


class Tile(ct.Structure):
    """fbn_tile, with its fbn_planes."""

    _fields_ = tuple(
        (name, ct.c_int if name in ("counts", "mixed") else ct.c_int64)
        for name in [
            "unit",
            "start",
            "rows",
            "images",
            "apart",
            "channels",
            "step",
            "inner",
            "dz_apart",
            "dz_step",
            "by_image",  # an int, and what follows it up to the end of fbn_planes
            "counts",
            "mixed",
            "next_unit",
            "next_from",
        ]
    )


@pytest.fixture(scope="module")
def split_c(tmp_path_factory: pytest.TempPathFactory) -> ct.CDLL:
    library = tmp_path_factory.mktemp("split") / "split.so"
    sources = [SRC_C / "split.c", SRC_C / "values.c"]
    c_api.run([c_api.compiler("cc", "gcc", "clang"), "-shared", "-fPIC", *sources, "-lm", "-o", library])
    loaded = ct.CDLL(str(library))
    loaded.fbn_split_of.restype, loaded.fbn_tile_at.restype = Split, Tile
    for function in (loaded.fbn_start, loaded.fbn_lane_doubles, loaded.fbn_room_doubles):
        function.restype = ct.c_int64
    loaded.fbn_start.argtypes = [ct.POINTER(Split), ct.c_int64, ct.c_int64]
    loaded.fbn_tile_at.argtypes = [ct.POINTER(Split), ct.c_int64, ct.c_int64, ct.c_int64, ct.c_void_p]
    return loaded


def split_of(
    split_c: ct.CDLL,
    shape: tuple[int, int, int],
    threads: int,
    core: int,
    arrays: int = 1,
    kind: int = REDUCES,
    habits: Any = (),
    fast_parts: bool = True,
    dtype: int = 0,
    activation: int = 0,
) -> Any:
    kernels = Kernels(None, (ct.POINTER(DtypeKernels) * 4)(*[ct.pointer(DtypeKernels(0, 0, fast_parts))] * 4))
    machine = c_api.Machine(ct.addressof(kernels), core, 8 << 20, c_api.Habits(*habits))
    problem = c_api.Problem(ct.pointer(machine), dtype, activation, 0.0, *shape, threads)
    return split_c.fbn_split_of(ct.byref(problem), arrays, kind)


def tiles(split_c: ct.CDLL, split: Any, mask: np.ndarray[Any, Any] | None = None) -> Iterator[Any]:
    unit = start = 0
    address = None if mask is None else mask.ctypes.data
    while unit < split.units:
        tile = split_c.fbn_tile_at(ct.byref(split), unit, start, split.units, address)
        assert (tile.next_unit, tile.next_from) > (unit, start), "a tile that is empty"
        yield tile
        unit, start = tile.next_unit, tile.next_from


SHAPES = [
    (1, 1, 2),
    (8, 64, 3136),
    (32, 2048, 49),
    (3, 5, 200_000),
    (100_000, 64, 1),
    (7, 3, 1),
    (2, 1, 65_537),
    (9, 30, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_cut_by_the_shape_alone(split_c: ct.CDLL, shape: tuple[int, int, int]) -> None:
    """Their order must not depend on threads, caches and habits."""
    cuts = {
        (s.cut, s.cuts, s.units, s.segment, s.segments, s.columns, s.repeat)
        for threads in (1, 2, 7, 1024)
        for core in (-1, 0, 1 << 16, 1 << 20, 1 << 40)
        for arrays in (1, 2, 3)
        for habits in ((), (1, 1, 1, 1, 1, 1), (-5,) * 6, (8, 8, 1 << 40, -1, -1, 1 << 40))
        for s in [split_of(split_c, shape, threads, core, arrays, habits=habits)]
    }
    assert len(cuts) == 1


@pytest.mark.parametrize(
    ("ahead", "shared"), [(0, 256), (-1, 0), (100, 100), (512, 256), (2048, 256), (3072, 384), (1 << 40, 1 << 17)]
)
def test_rows_of_one_stream_share_what_is_fetched_ahead(split_c: ct.CDLL, ahead: int, shared: int) -> None:
    """Planes do not, nor do rows in several streams. What is only mapped fetches a third of it."""
    third = {0: 341, -1: 0, 100: 100, 512: 256, 2048: 682, 3072: 1024, 1 << 40: (1 << 20) // 3}[ahead]
    alone = min(max(ahead or 1024, 0), 1 << 20)
    for shape, row_streams, wanted, mapped, after_sums in (
        ((100_000, 64, 1), 1, shared, third, shared),
        ((32, 2048, 49), 1, shared, third, 0),
        ((8, 64, 3136), 1, alone, third, 0),
        ((8, 64, 3136), 3, alone, 0, 0),
        ((100_000, 64, 1), 3, alone, 0, 0),
        ((100_000, 64, 1), 0, alone, 0, 0),
        ((100, 64, 1), 1, shared, 0, 0),
    ):
        habits = (1, row_streams, 512, ahead)
        sums, maps = (split_of(split_c, shape, 1, 1 << 20, 1, kind, habits) for kind in (REDUCES, MAPS))
        if shape[2] == 1:
            assert (sums.row_streams > 1) == (row_streams != 1 and shape[0] > 1000)
        assert sums.ahead == wanted
        assert maps.run_ahead == mapped
        assert sums.run_ahead == after_sums


@pytest.mark.parametrize(
    ("arrays", "stream_from", "fits"), [(1, 0, 7.0), (2, 0, 3.5), (3, 0, 7 / 3), (1, -1, 3.5), (2, -1, 7 / 3)]
)
def test_rows_that_stay_in_the_shared_cache_are_one_stream(
    split_c: ct.CDLL, arrays: int, stream_from: int, fits: float
) -> None:
    """All that is read counts, and a result that is not written around the cache: at most 7 of 8 MiB."""
    for mib, streams in ((fits - 0.1, 1), (fits + 0.1, 3)):
        shape = (int(mib * 4096), 64, 1)  # rows of 256 bytes
        assert split_of(split_c, shape, 1, 1 << 20, arrays, habits=(8, 3, 512, 0, stream_from)).row_streams == streams


def test_planes_that_are_only_mapped_are_streams_from_half_of_the_cache_on(split_c: ct.CDLL) -> None:
    for images, streams in ((80, 1), (90, 3)):  # of 50,176 bytes: 3.8 and 4.3 of 8 MiB
        assert split_of(split_c, (images, 64, 196), 1, 1 << 20, 1, MAPS, (8, 3, 512)).row_streams == streams


def test_planes_of_a_few_images_are_summed_channel_by_channel(split_c: ct.CDLL) -> None:
    """Those of 8 images from a size on, which is larger for gradients. The workspace is that of sums of x."""

    def stacks(images: int, inner: int, arrays: int) -> bool:
        return bool(split_of(split_c, (images, 300, inner), 1, 1 << 20, arrays).stacks)

    for arrays in (1, 2, 3):
        assert stacks(1, 400, arrays)
        assert stacks(7, 16, arrays)
        assert not stacks(7, 15, arrays)
        assert not stacks(9, 400, arrays)
        assert stacks(8, 256, arrays)
    assert [stacks(8, inner, 1) for inner in (39, 40, 255)] == [False, True, True]
    assert not stacks(8, 255, 2)


@pytest.mark.parametrize("dtype", [0, 2])
@pytest.mark.parametrize(("stream_from", "least"), [(0, (1 << 20) + 1), (3_000_000, 3_000_000), (-1, 1 << 60), (1, 1)])
def test_what_is_written_around_the_cache(split_c: ct.CDLL, dtype: int, stream_from: int, least: int) -> None:
    """Calls of several threads count what they read, too. The default is an eighth of the shared cache, 8 MiB."""
    for values in (1 << 17, 1 << 19, 1 << 20, 1_200_000, 1_600_000, 1 << 21, 1 << 22):
        shape, size = (values, 1, 1), values * (4 if dtype == 0 else 2)
        for threads, arrays, kind in itertools.product((1, 2, 64), (1, 2, 3), (MAPS, REDUCES, MASKED, PLANNED)):
            habits = (0, 0, 0, 0, stream_from, 0)
            split = split_of(split_c, shape, threads, 1 << 20, arrays, kind, habits, dtype=dtype)
            large = (size // 3 * 2 if kind in (MAPS, PLANNED) else size) >= least
            assert split.large == large
            assert split.around == (large and (threads == 1 or size // 5 * (arrays + 1) >= least))


def test_small_planes_in_the_cache_are_passed_through_from_end_to_end(split_c: ct.CDLL) -> None:
    """By a single thread. Several share the blocks, and larger planes and results are taken block by block."""

    def blocks(shape: tuple[int, int, int], threads: int = 1) -> bool:
        return bool(split_of(split_c, shape, threads, 1 << 20).by_channels)

    assert not blocks((32, 128, 49))
    assert blocks((32, 128, 49), threads=2)
    assert blocks((32, 1024, 49))
    assert blocks((4, 64, 512))


def test_blocks_that_take_much_of_the_shared_cache_are_passed_through(split_c: ct.CDLL) -> None:
    """That is 8 MiB here, and a core's cache too small for any of these blocks. Joined planes alone are."""

    def blocks(shape: tuple[int, int, int], core: int = 1 << 18, streams: int = 1) -> bool:
        return bool(split_of(split_c, shape, 1, core, habits=(streams,)).by_channels)

    assert blocks((250, 128, 64)), "a block of 16 channels takes a little less than an eighth"
    assert not blocks((260, 128, 64))
    assert blocks((120, 200, 63)), "images that are not whole cache lines: a sixteenth"
    assert not blocks((140, 200, 63))
    assert not blocks((150, 100, 64)), "x takes less than half of the shared cache, and no block fits into a core's"
    assert blocks((150, 100, 64), core=1 << 20)
    assert blocks((400, 128, 36)), "planes that are not joined, up to a third"
    assert not blocks((1000, 128, 36))
    assert blocks((1300, 4, 1600)), "planes of more than 4 KiB, up to all of it"
    assert not blocks((1320, 4, 1600))
    assert blocks((1320, 4, 1600), streams=2), "which are read in streams"


def test_short_planes_of_very_many_images_are_read_in_the_order_of_memory(split_c: ct.CDLL) -> None:
    """By a single thread, up to 64 channels at a time; the workspace has room for their lanes."""

    def split(images: int, inner: int, threads: int = 1, channels: int = 80, arrays: int = 1) -> Any:
        found = split_of(split_c, (images, channels, inner), threads, 1 << 18, arrays, habits=(1,))
        assert split_c.fbn_lane_doubles(ct.byref(found)) >= 2 * 16 * found.panel
        return found

    assert [split(images, 900).by_channels for images in (280, 300)] == [1, 0], "a block of 1 MiB"
    assert [split(150, inner).by_channels for inner in (1024, 1025)] == [1, 1]
    assert [split(270, inner).by_channels for inner in (1024, 1025)] == [0, 1]
    assert split(300, 900, threads=2).by_channels
    assert [split(300, 900, channels=channels).panel for channels in (3, 64, 80)] == [3, 64, 64]
    assert split(280, 900).panel == 1
    wanted = {split_c.fbn_lane_doubles(ct.byref(split(300, 900, arrays=arrays))) for arrays in (1, 2, 3)}
    assert len(wanted) == 1, "the workspace is the same for each call"


def test_planes_of_large_ragged_images_are_mapped_from_end_to_end(split_c: ct.CDLL) -> None:
    """Those with too many columns for whole images; not with a SiLU, and not after a reduction."""

    def stretches(shape: tuple[int, int, int], kind: int = MAPS, activation: int = 0) -> bool:
        return bool(split_of(split_c, shape, 1, 1 << 20, kind=kind, activation=activation).stretches)

    assert stretches((140, 969, 37))
    assert stretches((140, 1001, 24))
    assert not stretches((140, 1001, 23))
    assert not stretches((140, 968, 36)), "images of whole cache lines"
    assert not stretches((140, 401, 37)), "whole images"
    assert stretches((140, 401, 37), PLANNED), "a plan has no room for whole images"
    assert not stretches((8, 969, 37)), "in the cache"
    assert not stretches((140, 969, 37), REDUCES)
    assert [stretches((140, 969, 37), activation=a) for a in range(7)] == [a not in SMOOTH for a in range(7)]
    assert all(stretches((140, 969, 40), activation=a) for a in range(7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 1024])
def test_blocks(split_c: ct.CDLL, shape: tuple[int, int, int], threads: int) -> None:
    """At least one channel, and no more than a core's cache holds; threads are worth their work."""
    split, values = split_of(split_c, shape, threads, 1 << 20), int(np.prod(shape))
    assert 1 <= split.threads <= max(1, min(threads, values // 32768))
    assert 1 <= split.block <= shape[1]
    passed_through = not (split.rows or split.columns or split.by_channels)
    assert 1 <= split.panel <= (64 if passed_through else max(split.block, 4096 // 4 // shape[2]))
    for kind in (MAPS, PLANNED):
        maps = split_of(split_c, shape, threads, 1 << 20, kind=kind)
        assert split_c.fbn_lane_doubles(ct.byref(maps)) == 0, "what is only mapped needs no lanes"
    if not split.rows and split.block > split.panel:
        assert split.block * values // shape[1] * 4 <= 1 << 20
    assert split.segment * split.segments >= split.units
    assert split.padded >= shape[1] + 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "masked"), [(MAPS, False), (REDUCES, False), (MASKED, True)])
def test_tiles_cover_each_value_once(split_c: ct.CDLL, shape: tuple[int, int, int], kind: int, masked: bool) -> None:
    split = split_of(split_c, shape, 1, 1 << 20, kind=kind)
    outer, channels, inner = shape
    if outer * channels * inner > 700_000:
        pytest.skip("counted on smaller shapes")
    mask = np.random.default_rng(5).choice(np.array([0, 0, 1, 255], np.uint8), (outer, inner)) if masked else None
    seen = np.zeros(outer * channels * inner, np.int8)
    for tile in tiles(split_c, split, mask):
        for c in (0, channels - 1) if channels > 1 else (0,):
            start = split_c.fbn_start(ct.byref(split), tile.unit, c) + tile.start
            if split.stretches:
                where = start + np.arange(min(tile.rows * split.cut, seen.size - start)) if c == 0 else np.empty(0, int)
            elif split.columns:
                where = (start + np.arange(tile.rows)[:, None] * channels * inner + np.arange(inner)).ravel()
            else:
                where = (start + np.arange(tile.images)[:, None] * tile.apart + np.arange(tile.inner)).ravel()
            seen[where] += 1
            if mask is not None:
                counts = mask.ravel()[_position(where, shape)] != 0
                assert tile.mixed or (counts == bool(tile.counts)).all()
                assert not tile.mixed or counts.size <= MIXED_BYTES / (4 if inner > 1 else 4 * channels)
    image = seen.reshape(shape)
    assert (image[:, 0] == 1).all()
    assert (image[:, -1] == 1).all()


def test_images_that_a_mask_treats_alike_are_one_tile(split_c: ct.CDLL) -> None:
    """Up to eight of them; planes that are cut, and those that the mask mixes, are not joined."""
    counted = np.array([1] * 3 + [0] * 10 + [1] + [0] * 2 + [255, 1, 7, 1], np.uint8)
    mask = np.repeat(counted, 49)
    mask[-1] = 0
    found = tiles(split_c, split_of(split_c, (20, 3, 49), 1, 1 << 20, kind=MASKED), mask)
    assert [(tile.unit, tile.images, tile.counts, tile.mixed) for tile in found] == [
        (0, 3, 1, 0), (3, 8, 0, 0), (11, 2, 0, 0), (13, 1, 1, 0), (14, 2, 0, 0), (16, 3, 1, 0),
        (19, 1, 1, 1),
    ]  # fmt: skip
    cut = split_of(split_c, (2, 1, 65_537), 1, 1 << 20, kind=MASKED)
    assert {tile.images for tile in tiles(split_c, cut, np.ones(2 * 65_537, np.uint8))} == {1}


def _position(where: np.ndarray[Any, Any], shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """The position, in (outer, inner), of elements."""
    _, channels, inner = shape
    return where // (channels * inner) * inner + where % inner


@pytest.mark.parametrize(
    ("shape", "kind", "most"),
    [
        ((100, 1024, 1), REDUCES, 1024),
        ((100, 1152, 1), REDUCES, 1152),  # an eighth more is still one run
        ((100, 1168, 1), REDUCES, 592),
        ((100, 1365, 1), MAPS, 1365),  # and a third more, if nothing is reduced
        ((100, 1366, 1), MAPS, 688),
        ((100, 4096, 1), MAPS, 1024),
        ((5000, 3071, 1), REDUCES, 3071),  # written around the cache, and no row is whole cache lines
        ((5000, 3072, 1), REDUCES, 1024),
        ((5000, 8191, 1), MAPS, 8191),
        ((5000, 8193, 1), MAPS, 912),
    ],
)
def test_rows_are_mapped_whole_or_in_panels(
    split_c: ct.CDLL, shape: tuple[int, int, int], kind: int, most: int
) -> None:
    assert split_of(split_c, shape, 1, 1 << 20, kind=kind).map_panel == most


def test_panels_of_16_bit_rows_are_whole_cache_lines(split_c: ct.CDLL) -> None:
    """47 lines of float16 are not two panels of 23 and a half."""
    assert split_of(split_c, (100, 1504, 1), 1, 1 << 20, dtype=2).map_panel == 768


def test_ragged_rows_are_mapped_whole_where_parts_of_vectors_are_slow(split_c: ct.CDLL) -> None:
    """In the cache, too. Rows of whole cache lines, of 16 float32 values, have no such parts."""
    for fast_parts, wanted in ((True, [592, 1024, 1024, 912]), (False, [1169, 4095, 1024, 912])):
        found = [
            split_of(split_c, (20, channels, 1), 1, 1 << 20, fast_parts=fast_parts).map_panel
            for channels in (1169, 4095, 4096, 8193)
        ]
        assert found == wanted


@pytest.mark.parametrize(
    ("shape", "kind", "threads", "most"),
    [
        ((100, 69, 13), REDUCES, 1, 69),  # few enough columns, though 64 channels would be whole cache lines
        ((100, 128, 9), REDUCES, 1, 64),
        ((33, 128, 81), REDUCES, 1, 12),  # fewer than are whole lines
        ((100, 138, 13), REDUCES, 1, 48),  # equal panels
        ((100, 140, 9), REDUCES, 1, 140),  # no whole lines: a quarter more columns are still one run
        ((100, 143, 9), REDUCES, 1, 80),
        ((5000, 151, 28), REDUCES, 1, 151),  # and many more where they are written around the cache
        ((5000, 151, 28), MAPS, 1, 151),
        ((5000, 151, 20), PLANNED, 1, 40),  # a plan has no workspace for their constants
        ((5000, 51, 28), PLANNED, 1, 51),
        ((5000, 152, 28), REDUCES, 1, 32),  # whole lines
        ((700, 600, 28), REDUCES, 1, 36),  # too many
        ((500, 501, 15), REDUCES, 1, 501),
        ((500, 501, 15), REDUCES, 2, 64),  # a single segment, which threads could not share
        ((500, 501, 15), MAPS, 2, 501),
    ],
)
def test_small_planes_are_mapped_as_whole_images_or_in_equal_panels(
    split_c: ct.CDLL, shape: tuple[int, int, int], kind: int, threads: int, most: int
) -> None:
    split = split_of(split_c, shape, threads, 1 << 20, kind=kind)
    assert (split.panel, split.map_panel) == (most, most)
    room = split_c.fbn_room_doubles(ct.byref(split))
    columns = most * shape[2] * 4
    assert (room > 0) == (columns > 4096 and kind != PLANNED), "the stack has no room for larger panels"
    assert room == 0 or room * 8 >= 10 * (columns + 16 * 4)


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((45_220, 17, 4), 4),
        ((1000, 3, 4), 24),  # 288 columns are whole vectors
        ((20, 2, 2), 20),  # no more than there are
        ((2, 3, 4), 2),
        ((100, 300, 4), 1),  # columns enough
        ((100, 2, 49), 1),  # joined as planes
        ((100, 1024, 9), 1),  # several panels
    ],
)
def test_images_of_few_columns_are_mapped_together(split_c: ct.CDLL, shape: tuple[int, int, int], images: int) -> None:
    assert split_of(split_c, shape, 1, 1 << 20).map_repeat == images
