"""How do three integers describe an array? Any array with a channel axis becomes (outer, channels, inner)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def memory_order(array: Array) -> tuple[int, ...]:
    """The axes, from the slowest in memory to the fastest."""
    axes = range(array.ndim)
    if array.flags.c_contiguous:
        return tuple(axes)
    return tuple(sorted(axes, key=lambda axis: -abs(array.strides[axis])))


def three_of(shape: tuple[int, ...], at: int) -> tuple[int, int, int]:
    """(outer, channels, inner) of a C-contiguous array with channels on axis `at`."""
    if 0 in shape:  # no values; the product of the other sizes may overflow
        return 0, shape[at], 1
    if shape[at] == 1:  # one channel is one contiguous plane, wherever its axis is
        return 1, 1, math.prod(shape)
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def positions_of(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of the positions, which is also that of a mask: x's without the channel axis."""
    return shape[:axis] + shape[axis + 1 :]
