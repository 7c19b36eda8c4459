"""How do arrays of any strides reach a backend? In pieces that have the memory layout that backends require.

Channels are independent, so a call may be cut into blocks of channels. Arrays that are all dense in x's memory order
make one block, which is not copied. Others are copied in and out block by block. A block is one piece if possible. If
that would have too few channels, it is cut along its positions, and its moments and sums are added up piece by piece.
A small result for an `out` that is not dense is better made elsewhere and copied: `can_copy` says where that may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from .._backends import Backend
from .._moments import blend, merged, save
from . import checks
from .dtypes import FLOAT32, kind_of, native
from .record import CHANNELS, READ, ROWS, WRITTEN, AnyCall, BackwardCall, Call, arrays_of, replaced
from .shape import memory_order, three_of

Array = np.ndarray[Any, Any]
Index = tuple[slice, ...]

PIECE = 1 << 19
"""The most elements that are copied at a time: a few megabytes."""

SMALL = 1 << 16
"""The most elements of a result that is made in memory of its own and then copied to `out`. With more, that memory
costs more than it saves."""

RUN = 128
"""The fewest adjacent elements that a block takes from an array, if there are as many. NumPy copies shorter runs
slowly: longer ones take less time even where they are copied twice, for the statistics and for the result."""


class Block(NamedTuple):
    """A range of channels, and its pieces: indices of an array whose axes are in memory order."""

    channels: slice
    pieces: list[Index]


EVERYTHING, WHOLE = slice(None), ()
DIRECT = [Block(EVERYTHING, [WHOLE])]
"""The blocks of arrays that are not copied."""


class Blocks:
    """Runs the verbs of a backend on the arrays of one call."""

    def __init__(self, call: Call | BackwardCall, backend: Backend) -> None:
        x, axis = call.x, call.axis
        self.backend = backend
        given = native(x.dtype)
        self.dtype = given if kind_of(given).name in backend.DTYPES else FLOAT32
        self.order = memory_order(x)
        self.turns = not x.flags.c_contiguous
        self.at = self.order.index(axis)
        self.positions = tuple(i - (i > axis) for i in self.order if i != axis)
        arrays = arrays_of(call, (*READ, *WRITTEN)).values()
        shape = tuple(x.shape[i] for i in self.order)
        self.shape = three_of(shape, self.at)
        direct = all(self._is_ready(self._turned(array)) for array in arrays)
        if not x.shape[axis]:
            self.blocks = []
        elif direct:
            self.blocks = DIRECT
        elif x.size <= PIECE:
            self.blocks = [Block(EVERYTHING, [(EVERYTHING,) * x.ndim])]
        else:
            self.blocks = _cut(shape, self.at, min(_run(array, axis) for array in arrays))
        self._buffers: dict[int, Array] = {}

    # The verbs -------------------------------------------------------------------------------------------------------

    def forward(self, call: Call, count: int) -> None:
        """Normalizes with the statistics of x, of which the mask leaves `count` values per channel."""
        for channels, pieces in self.blocks:
            part = _of_channels(call, channels)
            if len(pieces) == 1:
                self._run_pieces(self.backend.forward, part, pieces)
            else:
                rows = self._moments(part, pieces)
                save(rows, count, part.saved)
                blend(part, rows, count)
                self._run_pieces(self.backend.apply, part._replace(mask=None), pieces)
            _put_columns(call.saved, channels, part.saved)

    def infer(self, call: Call) -> None:
        """Normalizes with the running statistics."""
        self._map(self.backend.infer, call)

    def apply(self, call: Call) -> None:
        """Normalizes with the statistics in the first three rows of saved."""
        self._map(self.backend.apply, call)

    def _map(self, verb: Callable[[Call], None], call: Call) -> None:
        call = call if call.mask is None else call._replace(mask=None)  # only statistics depend on it
        for channels, pieces in self.blocks:
            part = _of_channels(call, channels)
            self._run_pieces(verb, part, pieces)
            _put_columns(call.saved, channels, part.saved)

    def moments(self, call: Call) -> None:
        """Fills the rows mean, mean_low and m2."""
        for channels, pieces in self.blocks:
            call.moments[:, channels] = self._moments(_of_channels(call, channels), pieces)

    def backward_sums(self, call: BackwardCall) -> None:
        """Fills the rows sum(dz) and sum(dz * xhat)."""
        for channels, pieces in self.blocks:
            call.sums[:, channels] = self._sums(_of_channels(call, channels), pieces)

    def backward(self, call: BackwardCall) -> None:
        """Fills the gradients; they are those of a larger batch if the call has its sums."""
        for channels, pieces in self.blocks:
            part = _of_channels(call, channels)
            if part.sums is None and len(pieces) > 1:
                part = part._replace(sums=self._sums(part, pieces))
            self._run_pieces(self.backend.backward, part, pieces)

    # The steps of the verbs ------------------------------------------------------------------------------------------

    def _run_pieces(self, verb: Callable[[AnyCall], None], call: AnyCall, pieces: list[Index]) -> None:
        """Runs a verb on one piece after the other, and copies its results to where they belong."""
        for piece in pieces:
            part = self._take(call, piece)
            verb(part)
            if piece:
                for name, array in arrays_of(call, WRITTEN).items():
                    self._put(array, piece, getattr(part, name))

    def _moments(self, call: Call, pieces: list[Index]) -> Array:
        total, count = np.empty(0), 0
        for piece in pieces:
            part = self._take(call, piece)
            outer, channels, inner = part.x.shape
            values = outer * inner if part.mask is None else int(np.count_nonzero(part.mask))
            if values:
                rows = np.empty((3, channels))
                self.backend.moments(part._replace(moments=rows))
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
        """The call for a piece of its data, in the layout that backends require."""
        taken = {name: self._read(array, piece) for name, array in arrays_of(call, READ).items()}
        taken |= {name: self._target(array, piece) for name, array in arrays_of(call, WRITTEN).items()}
        if call.mask is not None:
            taken["mask"] = self._positions(call.mask, piece, taken["x"])
        return replaced(call, taken)

    def _turned(self, array: Array) -> Array:
        """The array with its axes in the order of x's memory."""
        return array.transpose(self.order) if self.turns else array

    def _is_ready(self, turned: Array) -> bool:
        flags = turned.flags
        return turned.dtype == self.dtype and flags.c_contiguous and flags.aligned

    def _scratch(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Memory for a piece of this array, which all its pieces share, since the first is the largest."""
        size = math.prod(shape)
        if id(array) not in self._buffers:
            self._buffers[id(array)] = np.empty(size, self.dtype)
        return self._buffers[id(array)][:size].reshape(shape)

    def _read(self, array: Array, piece: Index) -> Array:
        """A piece in three dimensions: a view if it has the layout that backends require, else a copy."""
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
        """The array that a backend fills for a piece, in three dimensions: a view, or memory that `_put` copies."""
        turned = self._turned(array)
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


def _of_channels(call: AnyCall, channels: slice) -> AnyCall:
    """The call for a range of channels: views of arrays with one value per channel, contiguous copies of rows."""
    if channels is EVERYTHING:
        return call
    part = {name: array[channels] for name, array in arrays_of(call, CHANNELS).items()}
    part |= {name: np.ascontiguousarray(rows[:, channels]) for name, rows in arrays_of(call, ROWS).items()}
    return replaced(call, part)


def _put_columns(rows: Array | None, channels: slice, filled: Array | None) -> None:
    """Copies the filled rows back, if they are a copy."""
    if rows is not None and filled is not rows:
        rows[:, channels] = filled


def _run(array: Array, axis: int) -> int:
    """How many elements of one channel are adjacent, if the array is dense."""
    order = memory_order(array)
    return math.prod(array.shape[i] for i in order[order.index(axis) + 1 :])


def _cut(shape: tuple[int, ...], at: int, run: int) -> list[Block]:
    """The blocks of an array of this shape, whose axes are in memory order, with channels on axis `at`.

    In every array of the call, at least `run` elements of a channel are adjacent.
    """
    channels, size = shape[at], math.prod(shape)
    least, fit = -(-RUN // run), PIECE // (size // channels)
    if fit < least > 1:  # a single piece would have short runs: a piece has fewer positions, and thus more channels
        fit = PIECE // RUN
    blocks = -(-channels // max(least, fit))
    together = -(-channels // blocks)
    steps = dict.fromkeys(range(len(shape)), 1)
    left = PIECE // together
    for axis in reversed(range(len(shape))):  # whole inner axes, as many as fit, then a part of one
        if axis != at and left:
            steps[axis] = min(left, shape[axis])
            left //= shape[axis]
    steps[at] = together
    along = [_steps(size, steps[axis]) for axis, size in enumerate(shape)]
    before, after = along[:at], along[at + 1 :]
    return [Block(these, list(product(*before, [these], *after))) for these in along[at]]


def _steps(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def can_copy(out: object, x: object, others: Sequence[object], may_be: object = None) -> bool:
    """Whether a call may be made without `out`, and its result then copied there: small ones are faster than blocks.

    `out` must be a plain array that shares no memory with the others, and none with `may_be` unless it is that array.
    Any other is left to the checks.
    """
    if type(out) is not np.ndarray or type(x) is not np.ndarray or x.size > SMALL:
        return False
    if out.shape != x.shape or out.dtype != x.dtype or not out.flags.writeable or checks.overlaps_itself(out):
        return False
    if any(type(array) is np.ndarray and np.may_share_memory(out, array) for array in others):
        return False
    if type(may_be) is not np.ndarray or not np.may_share_memory(out, may_be):
        return True
    return may_be.shape == out.shape and checks.same_memory(out, may_be)
