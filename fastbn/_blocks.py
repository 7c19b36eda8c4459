"""How do arrays of any strides reach a backend? The protocol's verbs, over pieces that lie in memory as it takes them.

Channels are independent, so a call may be cut into blocks of channels. Arrays that all lie densely in x's memory order
are one block, and are handed on as they are. Others are gathered and scattered block by block, and a block whose
channels are long is cut along its positions too; its moments and sums are then added up piece by piece. No copy is
larger than a piece.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ._activations import Activation
from ._call import Call
from ._dtypes import FLOAT32, kind_of, native
from ._moments import blend, merged, save
from ._results import Parts
from ._shape import memory_order, three_of
from .backends import Backend

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

    def __init__(self, backend: Backend, threads: int, axis: int, x: Array, *others: Array | None) -> None:
        self.backend, self.threads = backend, threads
        given = native(x.dtype)
        self.dtype = given if kind_of(given).name in backend.DTYPES else FLOAT32
        self.order = memory_order(x)
        self.at = self.order.index(axis)
        self.positions = tuple(i - (i > axis) for i in self.order if i != axis)
        arrays = [x, *(array for array in others if array is not None)]
        shape = tuple(x.shape[i] for i in self.order)
        self.shape = three_of(shape, self.at)
        direct = all(self._is_ready(array.transpose(self.order)) for array in arrays)
        if not x.shape[axis]:
            self.blocks = []
        else:
            self.blocks = DIRECT if direct else _cut(shape, self.at, min(_run(array, axis) for array in arrays))
        self._buffers: dict[int, Array] = {}

    # The verbs -------------------------------------------------------------------------------------------------------

    def forward(
        self, call: Call, mask: Array | None, count: int, momentum: float, correction: int, saved: Array
    ) -> None:
        """Normalizes with the statistics of x, of which the mask leaves `count` values per channel."""
        for channels, pieces in self.blocks:
            gamma, beta, mean, var = _some(channels, call.gamma, call.beta, call.mean, call.var)
            kept = _columns(saved, channels)
            if len(pieces) == 1:
                x, y = self._read(call.x, pieces[0]), self._target(call.y, pieces[0])
                residual, counted = self._take(call.residual, pieces[0]), self._positions(mask, pieces[0], x)
                self.backend.forward(
                    *(x, residual, counted, gamma, beta, mean, var, momentum, correction),
                    *(call.eps, call.code, call.slope, y, kept, self.threads),
                )
                self._put(call.y, pieces[0], y)
            else:
                rows = self._moments(call.x, mask, pieces)
                save(rows, count, kept)
                blend(rows, count, mean, var, momentum, correction)
                self._infer(call, pieces, gamma, beta, None, None, kept)
            _put_columns(saved, channels, kept)

    def infer(self, call: Call, mean: Array | None, var: Array | None, saved: Array | None) -> None:
        """Normalizes with mean and var or, where those are None, with the first rows of saved."""
        for channels, pieces in self.blocks:
            kept = None if saved is None else _columns(saved, channels)
            gamma, beta, some_mean, some_var = _some(channels, call.gamma, call.beta, mean, var)
            self._infer(call, pieces, gamma, beta, some_mean, some_var, kept)
            if saved is not None and kept is not None:
                _put_columns(saved, channels, kept)

    def moments(self, x: Array, mask: Array | None, channels: int) -> Array:
        """The rows mean, mean_low, m2."""
        rows = np.empty((3, channels))
        for some, pieces in self.blocks:
            rows[:, some] = self._moments(x, mask, pieces)
        return rows

    def backward_sums(self, dy: Array, parts: Parts, activation: Activation, slope: float) -> Array:
        """The rows sum dz, sum dz * xhat."""
        rows = np.empty((2, parts.saved.shape[1]))
        for some, pieces in self.blocks:
            saved = _columns(parts.saved, some)
            rows[:, some] = self._sums(dy, parts, pieces, saved, activation, slope)
        return rows

    def backward(
        self,
        dy: Array,
        parts: Parts,
        sums: Array | None,
        activation: Activation,
        slope: float,
        dx: Array,
        dresidual: Array | None,
        dgamma: Array | None,
        dbeta: Array | None,
    ) -> None:
        """The gradients; with sums given, those of a larger batch."""
        for channels, pieces in self.blocks:
            saved = _columns(parts.saved, channels)
            total = None if sums is None else _columns(sums, channels)
            if total is None and len(pieces) > 1:
                total = self._sums(dy, parts, pieces, saved, activation, slope)
            dg, db = _some(channels, dgamma, dbeta)
            for piece in pieces:
                x = self._read(parts.x, piece)
                residual, mask = self._take(parts.residual, piece), self._positions(parts.mask, piece, x)
                dx_ = self._target(dx, piece)
                dr = None if dresidual is None else self._target(dresidual, piece)
                self.backend.backward(
                    *(self._read(dy, piece), x, residual, mask, saved, float(parts.total), parts.frozen, total),
                    *(activation, slope, parts.from_y, dx_, dr, dg, db, self.threads),
                )
                self._put(dx, piece, dx_)
                self._put(dresidual, piece, dr)

    # Their parts -----------------------------------------------------------------------------------------------------

    def _infer(
        self,
        call: Call,
        pieces: list[Index],
        gamma: Array | None,
        beta: Array | None,
        mean: Array | None,
        var: Array | None,
        saved: Array | None,
    ) -> None:
        for piece in pieces:
            y = self._target(call.y, piece)
            self.backend.infer(
                *(self._read(call.x, piece), self._take(call.residual, piece), gamma, beta, mean, var),
                *(call.eps, call.code, call.slope, y, saved, self.threads),
            )
            self._put(call.y, piece, y)

    def _moments(self, x: Array, mask: Array | None, pieces: list[Index]) -> Array:
        total, count = np.empty(0), 0
        for piece in pieces:
            some = self._read(x, piece)
            counted = self._positions(mask, piece, some)
            values = some.shape[0] * some.shape[2] if counted is None else int(np.count_nonzero(counted))
            if values:
                rows = np.empty((3, some.shape[1]))
                self.backend.moments(some, counted, rows, self.threads)
                total = merged(total, count, rows, values) if count else rows
                count += values
        return total

    def _sums(
        self, dy: Array, parts: Parts, pieces: list[Index], saved: Array, activation: Activation, slope: float
    ) -> Array:
        total, rows = np.zeros((2, saved.shape[1])), np.empty((2, saved.shape[1]))
        for piece in pieces:
            x = self._read(parts.x, piece)
            residual, mask = self._take(parts.residual, piece), self._positions(parts.mask, piece, x)
            self.backend.backward_sums(
                *(self._read(dy, piece), x, residual, mask, saved),
                *(activation, slope, parts.from_y, rows, self.threads),
            )
            with np.errstate(all="ignore"):
                total += rows
        return total

    # Pieces ----------------------------------------------------------------------------------------------------------

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
        turned = array.transpose(self.order)
        if not piece:
            return turned.reshape(self.shape)
        turned = turned[piece]
        if not self._is_ready(turned):
            given, turned = turned, self._scratch(array, turned.shape)
            np.copyto(turned, given)
        return turned.reshape(three_of(turned.shape, self.at))

    def _take(self, array: Array | None, piece: Index) -> Array | None:
        return None if array is None else self._read(array, piece)

    def _positions(self, mask: Array | None, piece: Index, x: Array) -> Array | None:
        """The mask of a piece x, as (outer, inner)."""
        if mask is None:
            return None
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

    def _put(self, array: Array | None, piece: Index, filled: Array | None) -> None:
        if not piece or array is None or filled is None:
            return
        turned = array.transpose(self.order)[piece]
        if not self._is_ready(turned):
            with np.errstate(all="ignore"):
                turned[...] = filled.reshape(turned.shape)


def _columns(rows: Array, channels: slice) -> Array:
    """Those of some channels, contiguous; `_put_columns` takes them back."""
    return rows if channels is EVERYTHING else np.ascontiguousarray(rows[:, channels])


def _put_columns(rows: Array, channels: slice, filled: Array) -> None:
    if filled is not rows:
        rows[:, channels] = filled


def _some(channels: slice, *arrays: Array | None) -> tuple[Array | None, ...]:
    return arrays if channels is EVERYTHING else tuple(None if array is None else array[channels] for array in arrays)


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
