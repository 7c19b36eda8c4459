"""How do arrays of any strides reach a backend? The protocol's verbs, over pieces that lie in memory as it takes them.

Channels are independent, so a call may be cut into blocks of channels. Arrays that all lie densely in x's memory order
are one block, and are handed on as they are. Others are gathered and scattered block by block, and a block whose
channels are long is cut along its positions too; its moments and sums are then added up piece by piece. No copy is
larger than a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from .._backends import Backend
from .._moments import blend, merged, save
from .dtypes import FLOAT32, kind_of, native
from .record import CHANNELS, READ, ROWS, WRITTEN, AnyCall, BackwardCall, Call, arrays_of, replaced
from .shape import memory_order, three_of

Array = np.ndarray[Any, Any]
Index = tuple[slice, ...]

PIECE = 1 << 19
"""Elements that are gathered at a time, at most: a few megabytes."""

RUN = 64
"""Elements that lie together in every array of a block at least, so that little of a cache line is in vain."""


class Block(NamedTuple):
    """Some channels, and the pieces that they come in: indices of an array whose axes are in memory order."""

    channels: slice
    pieces: list[Index]


EVERYTHING, WHOLE = slice(None), ()
DIRECT = [Block(EVERYTHING, [WHOLE])]
"""For arrays that are handed on as they are."""


class Blocks:
    """A backend, and how the arrays of one call reach it."""

    def __init__(self, call: Call | BackwardCall, backend: Backend) -> None:
        x, axis = call.x, call.axis
        self.backend = backend
        given = native(x.dtype)
        self.dtype = given if kind_of(given).name in backend.DTYPES else FLOAT32
        self.order = memory_order(x)
        self.at = self.order.index(axis)
        self.positions = tuple(i - (i > axis) for i in self.order if i != axis)
        arrays = arrays_of(call, (*READ, *WRITTEN)).values()
        shape = tuple(x.shape[i] for i in self.order)
        self.shape = three_of(shape, self.at)
        direct = all(self._is_ready(array.transpose(self.order)) for array in arrays)
        if not x.shape[axis]:
            self.blocks = []
        else:
            self.blocks = DIRECT if direct else _cut(shape, self.at, min(_run(array, axis) for array in arrays))
        self._buffers: dict[int, Array] = {}

    # The verbs -------------------------------------------------------------------------------------------------------

    def forward(self, call: Call, count: int) -> None:
        """Normalizes with the statistics of x, of which the mask leaves `count` values per channel."""
        for channels, pieces in self.blocks:
            some = _some(call, channels)
            if len(pieces) == 1:
                self._do(self.backend.forward, some, pieces)
            else:
                rows = self._moments(some, pieces)
                save(rows, count, some.saved)
                blend(some, rows, count)
                self._do(self.backend.apply, some._replace(mask=None), pieces)
            _put_columns(call.saved, channels, some.saved)

    def infer(self, call: Call) -> None:
        """Normalizes with the running statistics."""
        self._map(self.backend.infer, call)

    def apply(self, call: Call) -> None:
        """Normalizes with the first rows of saved."""
        self._map(self.backend.apply, call)

    def _map(self, verb: Callable[[Call], None], call: Call) -> None:
        call = call if call.mask is None else call._replace(mask=None)  # which only statistics depend on
        for channels, pieces in self.blocks:
            some = _some(call, channels)
            self._do(verb, some, pieces)
            _put_columns(call.saved, channels, some.saved)

    def moments(self, call: Call) -> None:
        """The rows mean, mean_low, m2."""
        for channels, pieces in self.blocks:
            call.moments[:, channels] = self._moments(_some(call, channels), pieces)

    def backward_sums(self, call: BackwardCall) -> None:
        """The rows sum dz, sum dz * xhat."""
        for channels, pieces in self.blocks:
            call.sums[:, channels] = self._sums(_some(call, channels), pieces)

    def backward(self, call: BackwardCall) -> None:
        """The gradients; with sums given, those of a larger batch."""
        for channels, pieces in self.blocks:
            some = _some(call, channels)
            if some.sums is None and len(pieces) > 1:
                some = some._replace(sums=self._sums(some, pieces))
            self._do(self.backend.backward, some, pieces)

    # Their parts -----------------------------------------------------------------------------------------------------

    def _do(self, verb: Callable[[AnyCall], None], call: AnyCall, pieces: list[Index]) -> None:
        """One piece after the other, and what they fill where it belongs."""
        for piece in pieces:
            some = self._take(call, piece)
            verb(some)
            if piece:
                for name, array in arrays_of(call, WRITTEN).items():
                    self._put(array, piece, getattr(some, name))

    def _moments(self, call: Call, pieces: list[Index]) -> Array:
        total, count = np.empty(0), 0
        for piece in pieces:
            some = self._take(call, piece)
            outer, channels, inner = some.x.shape
            values = outer * inner if some.mask is None else int(np.count_nonzero(some.mask))
            if values:
                rows = np.empty((3, channels))
                self.backend.moments(some._replace(moments=rows))
                total = merged(total, count, rows, values) if count else rows
                count += values
        return total

    def _sums(self, call: BackwardCall, pieces: list[Index]) -> Array:
        total, rows = np.zeros((2, call.saved.shape[1])), np.empty((2, call.saved.shape[1]))
        for piece in pieces:
            self.backend.backward_sums(self._take(call, piece)._replace(sums=rows))
            with np.errstate(all="ignore"):
                total += rows
        return total

    # Pieces ----------------------------------------------------------------------------------------------------------

    def _take(self, call: AnyCall, piece: Index) -> AnyCall:
        """The call on a piece of its data, as backends take it."""
        taken = {name: self._read(array, piece) for name, array in arrays_of(call, READ).items()}
        taken |= {name: self._target(array, piece) for name, array in arrays_of(call, WRITTEN).items()}
        if call.mask is not None:
            taken["mask"] = self._positions(call.mask, piece, taken["x"])
        return replaced(call, taken)

    def _is_ready(self, turned: Array) -> bool:
        return turned.flags.c_contiguous and turned.flags.aligned and turned.dtype == self.dtype

    def _scratch(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Memory for a piece of this array: the same for all of them, of which the first is the largest."""
        size = math.prod(shape)
        if id(array) not in self._buffers:
            self._buffers[id(array)] = np.empty(size, self.dtype)
        return self._buffers[id(array)][:size].reshape(shape)

    def _read(self, array: Array, piece: Index) -> Array:
        """A piece in three dimensions: a view where it lies in memory as the backend takes it, else a copy."""
        taken = self._target(array, piece)
        if piece:
            given = array.transpose(self.order)[piece]
            if not self._is_ready(given):
                np.copyto(taken.reshape(given.shape), given)
        return taken

    def _positions(self, mask: Array, piece: Index, x: Array) -> Array:
        """The mask of a piece x, as (outer, inner)."""
        turned = mask.transpose(self.positions)[piece[: self.at] + piece[self.at + 1 :]]
        return np.ascontiguousarray(turned).reshape(x.shape[0], x.shape[2])

    def _target(self, array: Array, piece: Index) -> Array:
        """What the backend fills for a piece, in three dimensions: a view, or memory to be `_put` there."""
        turned = array.transpose(self.order)
        if not piece:
            return turned.reshape(self.shape)
        turned = turned[piece]
        if not self._is_ready(turned):
            turned = self._scratch(array, turned.shape)
        return turned.reshape(three_of(turned.shape, self.at))

    def _put(self, array: Array, piece: Index, filled: Array) -> None:
        turned = array.transpose(self.order)[piece]
        if not self._is_ready(turned):
            with np.errstate(all="ignore"):
                turned[...] = filled.reshape(turned.shape)


def _some(call: AnyCall, channels: slice) -> AnyCall:
    """The call for some channels: views of what has one value per channel, contiguous copies of rows."""
    if channels is EVERYTHING:
        return call
    some = {name: array[channels] for name, array in arrays_of(call, CHANNELS).items()}
    some |= {name: np.ascontiguousarray(rows[:, channels]) for name, rows in arrays_of(call, ROWS).items()}
    return replaced(call, some)


def _put_columns(rows: Array | None, channels: slice, filled: Array | None) -> None:
    """Takes the copy back."""
    if rows is not None and filled is not rows:
        rows[:, channels] = filled


def _run(array: Array, axis: int) -> int:
    """How many elements of one channel lie together, if the array is dense."""
    order = memory_order(array)
    return math.prod(array.shape[i] for i in order[order.index(axis) + 1 :])


def _cut(shape: tuple[int, ...], at: int, run: int) -> list[Block]:
    """Blocks of an array of this shape, its axes in memory order, with channels on axis `at`.

    In one of the arrays only `run` elements of a channel lie together.
    """
    channels, size = shape[at], math.prod(shape)
    if not size:
        return [Block(EVERYTHING, [(EVERYTHING,) * len(shape)])]
    positions = size // channels
    together = min(channels, max(-(-RUN // run), PIECE // positions))
    steps = dict.fromkeys(range(len(shape)), 1)
    left = PIECE // together
    for axis in reversed(range(len(shape))):  # whole inner axes, as many as fit, then a part of one
        if axis != at and left:
            steps[axis] = min(left, shape[axis])
            left //= shape[axis]
    steps[at] = together
    along = [_steps(size, steps[axis]) for axis, size in enumerate(shape)]
    before, after = along[:at], along[at + 1 :]
    return [Block(some, list(product(*before, [some], *after))) for some in along[at]]


def _steps(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
