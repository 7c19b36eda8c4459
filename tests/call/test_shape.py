"""Which three integers are seen in an array, and how is one cut that no backend takes as it is?"""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest

from fastbn._backends import numpy_backend
from fastbn.call import blocks, record, shape

Order = tuple[int, ...]

# The shape, the axes from the slowest in memory to the fastest, the channel axis -> (outer, channels, inner).
DENSE: dict[str, tuple[tuple[int, ...], Order, int, tuple[int, int, int]]] = {
    "(N, C)": ((4, 3), (0, 1), 1, (4, 3, 1)),
    "(N, C), Fortran order": ((4, 3), (1, 0), 1, (1, 3, 4)),
    "(N, C, L)": ((4, 3, 5), (0, 1, 2), 1, (4, 3, 5)),
    "NCHW": ((4, 3, 5, 2), (0, 1, 2, 3), 1, (4, 3, 10)),
    "NHWC": ((4, 5, 2, 3), (0, 1, 2, 3), 3, (40, 3, 1)),
    "NHWC seen as NCHW": ((4, 3, 5, 2), (0, 2, 3, 1), 1, (40, 3, 1)),
    "NCHW seen as NHWC": ((4, 5, 2, 3), (0, 3, 1, 2), 3, (4, 3, 10)),
    "channels first of all": ((3, 4, 5), (0, 1, 2), 0, (1, 3, 20)),
    "batch innermost": ((4, 3, 5, 2), (1, 2, 3, 0), 1, (1, 3, 40)),
    "NCDHW": ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4), 1, (2, 3, 120)),
    "one channel": ((4, 1, 5), (0, 1, 2), 1, (1, 1, 20)),
    "one channel, last": ((4, 5, 1), (0, 1, 2), 2, (1, 1, 20)),
    "one value": ((1, 3, 1, 1), (0, 1, 2, 3), 1, (1, 3, 1)),
    "no value": ((0, 3, 5), (0, 1, 2), 1, (0, 3, 5)),
    "no channel": ((4, 0, 5), (0, 1, 2), 1, (4, 0, 5)),
}


def blocks_of(array: np.ndarray, axis: int, residual: np.ndarray | None = None) -> blocks.Blocks:
    return blocks.Blocks(record.Call(array, axis=axis, residual=residual), numpy_backend)


@pytest.mark.parametrize("name", DENSE)
def test_dense_arrays_are_seen_without_a_copy(name: str) -> None:
    shape, order, axis, wanted = DENSE[name]
    in_memory = np.arange(math.prod(shape), dtype=np.float64).reshape([shape[i] for i in order])
    array = in_memory.transpose(np.argsort(order))
    assert array.shape == shape
    blocks = blocks_of(array, axis)
    if not shape[axis]:
        assert blocks.blocks == []
        return
    [(_, [piece])] = blocks.blocks
    seen = blocks._read(array, piece)
    assert seen.flags.c_contiguous
    if array.size:
        assert seen.shape == wanted
        assert np.shares_memory(seen, array)
        for channel in range(shape[axis]):
            assert set(seen[:, channel].flat) == set(array.take(channel, axis).flat)


@pytest.mark.parametrize("placement", cases.PLACEMENTS)
def test_the_order_is_that_of_a_new_array(placement: str) -> None:
    """In which x and y are then one block alike."""
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        array = cases.PLACEMENTS[placement](np.arange(24.0).reshape(2, 3, 4)).transpose(np.argsort(order))
        assert np.empty_like(array).transpose(shape.memory_order(array)).flags.c_contiguous


@pytest.mark.parametrize("run", [1, 4])
@pytest.mark.parametrize("piece", [1, 7, 30, 1 << 19])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5, 2), 1), ((4, 5, 3), 2), ((3, 40), 0), ((6, 1, 7), 1)], ids=str)
def test_pieces_cover_every_element_once(
    shape: tuple[int, ...], axis: int, piece: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with all of the channels of its block, and with no more elements than are allowed."""
    monkeypatch.setattr(blocks, "PIECE", piece)
    monkeypatch.setattr(blocks, "RUN", run)
    array = cases.PLACEMENTS["every second element"](np.zeros(shape))
    cut = blocks_of(array, axis)
    turned = array.transpose(cut.order)
    for channels, pieces in cut.blocks:
        assert all(index[cut.at] == channels for index in pieces)
        for index in pieces:
            assert turned[index].size <= max(piece, run)
            turned[index] += 1
    assert (array == 1).all()


@pytest.mark.parametrize(
    ("shape", "run", "channels", "pieces"),
    [
        ((1000, 600), 1, [300] * 2, 1),  # rows: a block is one piece of many channels, ...
        ((4096, 300), 1, [100] * 3, 1),
        ((6272, 1024), 1, [1024], 13),  # ... or where that would be few, many pieces have all channels
        ((100_000, 100), 1, [100], 20),
        ((5000, 4097), 1, [2049, 2048], 20),
        ((32, 2048, 49), 49, [293] * 6 + [290], 1),  # small planes: likewise
        ((4096, 64, 49), 49, [64], 25),
        ((32, 256, 3136), 3136, [5] * 51 + [1], 1),  # planes: as many as fit into a piece, or one
        ((1, 2, 300_001), 300_001, [1, 1], 1),
        ((1, 2, 600_000), 600_000, [1, 1], 2),
    ],
    ids=str,
)
def test_blocks_are_copied_in_long_runs(shape: tuple[int, ...], run: int, channels: list[int], pieces: int) -> None:
    found = blocks._cut(shape, 1, run)
    assert [block.channels.stop - block.channels.start for block in found] == channels
    assert [len(block.pieces) for block in found] == [pieces] * len(channels)


def test_another_order_is_gathered() -> None:
    """For dy or a residual that lies in another order than x."""
    x, dy = np.zeros((2, 3, 4)), np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    blocks = blocks_of(x, 1, dy)
    [(_, [piece])] = blocks.blocks
    assert np.array_equal(blocks._read(dy, piece), dy)
    assert np.shares_memory(blocks._read(x, piece), x)
