"""Which three integers does the front desk see in an array, and which arrays does it copy?"""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest

from fastbn import _shape

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


@pytest.mark.parametrize("name", DENSE)
def test_dense_arrays_are_seen_without_a_copy(name: str) -> None:
    shape, order, axis, wanted = DENSE[name]
    in_memory = np.arange(math.prod(shape)).reshape([shape[i] for i in order])
    array = in_memory.transpose(np.argsort(order))
    assert array.shape == shape
    assert _shape.is_dense(array)
    assert _shape.dense(array) is array
    layout = _shape.layout_of(array, axis)
    seen = layout.gather(array)
    assert seen.shape == layout.shape
    assert layout.values == layout.shape[0] * layout.shape[2]
    assert seen.flags.c_contiguous
    view = layout.view(array)
    assert view is not None
    if array.size:
        assert layout.shape == wanted
        assert np.shares_memory(seen, array)
        assert np.shares_memory(view, array)
        for channel in range(shape[axis]):
            assert set(seen[:, channel].flat) == set(array.take(channel, axis).flat)


@pytest.mark.parametrize(
    "placement", ["every second element", "negative strides", "cropped", "unaligned", "byteswapped"]
)
def test_other_arrays_are_copied_in_their_order(placement: str) -> None:
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        inner = np.arange(24.0).reshape(2, 3, 4)
        array = cases.PLACEMENTS[placement](inner).transpose(np.argsort(order))
        assert not _shape.is_dense(array)
        copy = _shape.dense(array)
        assert _shape.is_dense(copy)
        assert np.array_equal(copy, array)
        assert copy.strides == np.empty_like(array).strides


def test_broadcast_arrays_are_copied() -> None:
    array = np.broadcast_to(np.arange(4.0), (3, 4))
    assert not _shape.is_dense(array)
    assert _shape.is_dense(_shape.dense(array))


def test_another_order_is_gathered() -> None:
    """For dy or a residual that lies in another order than x."""
    x, dy = np.zeros((2, 3, 4)), np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    layout = _shape.layout_of(x, 1)
    assert layout.view(dy) is None
    assert np.array_equal(layout.gather(dy), dy)
