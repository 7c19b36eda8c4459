"""Which three integers is this array? Any array and a channel axis <-> (outer, channels, inner)."""

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
    if 0 in shape:  # no values: the other sizes may be beyond what can be multiplied
        return 0, shape[at], 1
    if shape[at] == 1:  # one channel is one contiguous plane, wherever its axis stands
        return 1, 1, math.prod(shape)
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def positions_of(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape without its channel axis: that of the positions, as a mask has it."""
    return shape[:axis] + shape[axis + 1 :]
