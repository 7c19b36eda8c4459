"""Which three integers is this array? Any array and a channel axis <-> (outer, channels, inner)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """How an array lies in memory, seen from its channel axis."""

    order: tuple[int, ...]
    """The axes, from the slowest in memory to the fastest."""
    shape: tuple[int, int, int]
    """(outer, channels, inner), the last index fastest."""

    @property
    def values(self) -> int:
        """M, the values per channel."""
        return self.shape[0] * self.shape[2]

    def gather(self, array: Array) -> Array:
        """`array` in three dimensions; a copy only where its memory order is another."""
        return np.ascontiguousarray(array.transpose(self.order)).reshape(self.shape)

    def view(self, array: Array) -> Array | None:
        """`array` in three dimensions without a copy, or None where its memory order is another."""
        turned = array.transpose(self.order)
        return turned.reshape(self.shape) if turned.flags.c_contiguous else None


def _memory_order(array: Array) -> tuple[int, ...]:
    axes = range(array.ndim)
    if array.flags.c_contiguous:
        return tuple(axes)
    return tuple(sorted(axes, key=lambda axis: -abs(array.strides[axis])))


def is_dense(array: Array) -> bool:
    """Whether the array fills one block of memory, in some order of its axes, in native and aligned elements."""
    if not (array.flags.aligned and array.dtype.isnative):
        return False
    return array.transpose(_memory_order(array)).flags.c_contiguous


def dense(array: Array) -> Array:
    """The array itself where it is dense, else a copy in the same memory order."""
    if is_dense(array):
        return array
    return array.astype(array.dtype.newbyteorder("="), order="K", copy=True)


def layout_of(array: Array, axis: int) -> Layout:
    """The layout of a dense array with channels on `axis` (not negative)."""
    order = _memory_order(array)
    channels = array.shape[axis]
    if channels == 1:  # one channel is one contiguous plane, however its axes are ordered
        return Layout(order, (1, 1, array.size))
    at = order.index(axis)
    outer = math.prod(array.shape[i] for i in order[:at])
    inner = math.prod(array.shape[i] for i in order[at + 1 :])
    return Layout(order, (outer, channels, inner))
