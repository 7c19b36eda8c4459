"""How is one batch normalized, and how is it differentiated? Checked arguments in, results and their parts out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._activations import Activation
from ._blocks import Blocks
from ._call import Call
from ._dtypes import kind_of, native
from ._moments import Moments, Sums, blend, save
from ._results import Parts
from ._shape import positions_of
from .backends import SAVED_ROWS, Backend

Array = np.ndarray[Any, Any]


def moments(x: object, axis: object, mask: object, backend: Backend, threads: int) -> Moments:
    """Those of x."""
    data = _check.data("x", x)
    channel_axis = _check.axis(axis, data)
    given = _check.mask(mask, data, channel_axis)
    positions, channels = positions_of(data.shape, channel_axis), data.shape[channel_axis]
    some = None if given is None else np.broadcast_to(given, positions)
    count = math.prod(positions) if some is None else int(np.count_nonzero(some))
    rows = np.zeros((3, channels))
    if count and channels:
        rows = Blocks(backend, threads, channel_axis, data).moments(data, some, channels)
    return Moments._of(count, rows, kind_of(data.dtype).statistics)


def train(call: Call, momentum: float, correction: int, given: Moments | None, backend: Backend, threads: int) -> Parts:
    """Normalizes with the batch's own statistics, or with given moments; updates the running statistics."""
    saved, blocks = _saved(call), _blocks(call, backend, threads)
    if given is None:
        mask, count = counted(call, correction)
        blocks.forward(call, mask, count, momentum, correction, saved)
        return parts_of(call, saved, mask=mask, count=None if mask is None else count)
    _check.correctable(correction, given.count, " in the moments")
    save(given._rows, given.count, saved)
    blend(given._rows, given.count, call.mean, call.var, momentum, correction)
    blocks.infer(call, None, None, saved)
    return parts_of(call, saved, mask=call.mask, count=given.count)


def counted(call: Call, correction: int, where: str = "") -> tuple[Array | None, int]:
    """The mask, None where it leaves all values, and how many it leaves: 2 per channel or more, and > correction."""
    count = _check.enough(call.x, call.axis, call.mask, where)
    _check.correctable(correction, count, where)
    everything = call.mask is None or count == call.mask.size
    return None if everything else call.mask, count


def freeze(call: Call, backend: Backend, threads: int) -> Parts:
    """Normalizes with the running statistics, which stay as they are."""
    saved = _saved(call)
    infer(call, backend, threads, saved)
    return parts_of(call, saved, frozen=True, mask=call.mask)


def infer(call: Call, backend: Backend, threads: int, saved: Array | None = None) -> None:
    """The same, for nothing but y."""
    if call.mean is None or call.var is None:
        _check.statistics_missing()
    _blocks(call, backend, threads).infer(call, call.mean, call.var, saved)


def _blocks(call: Call, backend: Backend, threads: int) -> Blocks:
    return Blocks(backend, threads, call.axis, call.x, call.residual, call.y)


def _saved(call: Call) -> Array:
    return np.empty((len(SAVED_ROWS), call.x.shape[call.axis]))


def parts_of(
    call: Call, saved: Array, *, frozen: bool = False, mask: Array | None = None, count: int | None = None
) -> Parts:
    """What a cache keeps of the call."""
    x, residual = own(call.y if call.in_place else call.x, call.residual)
    given = call.gamma is not None, call.beta is not None
    return Parts(x, residual, saved, call.axis, frozen, call.activation, *given, mask, count, call.in_place)


def own(x: Array, residual: Array | None) -> tuple[Array, Array | None]:
    """Views, since a caller may change the shape of the arrays themselves."""
    return x.view(), None if residual is None else residual.view()


class Wanted(NamedTuple):
    """dy, and the arrays that its gradients go to."""

    dy: Array
    out: Array
    """What the caller gets."""
    dx: Array
    """The same memory, as a plain array."""
    dresidual: Array | None
    """None without a residual, and where its gradient is dy."""
    residual_gradient: Array | None
    """What the caller gets of it."""

    def rows(self, some: slice) -> Wanted:
        """For some of the elements of axis 0."""
        dresidual = None if self.dresidual is None else self.dresidual[some]
        return Wanted(self.dy[some], self.dx[some], self.dx[some], dresidual, None)


def wanted(dy: object, parts: Parts, out: object) -> Wanted:
    """Checks dy and out, which may be dy itself."""
    x, dtype = parts.x, native(parts.x.dtype)
    gradient = _check.like("dy", dy, x)
    inputs = {"dy": gradient, "x": x, "residual": parts.residual, "mask": parts.mask}
    target = _check.out(out, x, inputs, may_be="dy")
    dresidual = returned = None
    if parts.residual is not None and _check.activation(parts.activation)[0] is not Activation.IDENTITY:
        dresidual = returned = np.empty_like(x, dtype, subok=False)
    elif parts.residual is not None:
        overwritten = target is not None and _check.same_memory(target, gradient)
        returned = gradient.astype(dtype, copy=overwritten)
    if target is None:
        target = np.empty_like(x, dtype, subok=False)
    return Wanted(gradient, target, np.asarray(target), dresidual, returned)


def backward_sums(dy: object, parts: Parts, backend: Backend, threads: int) -> Sums:
    """What the positions of parts.x contribute to the gradients' sums."""
    gradient = _check.like("dy", dy, parts.x)
    rows = np.zeros((2, parts.saved.shape[1]))
    if gradient.size:
        blocks = Blocks(backend, threads, parts.channel_axis, parts.x, gradient, parts.residual)
        rows = blocks.backward_sums(gradient, parts, *_check.activation(parts.activation))
    count = parts.values if parts.mask is None or parts.frozen else int(np.count_nonzero(parts.mask))
    return Sums._of(count, rows, parts.statistics)


def backward(
    asked: Wanted, parts: Parts, sums: Sums | None, backend: Backend, threads: int
) -> tuple[Array | None, Array | None]:
    """Fills dx and dresidual; gives dgamma and dbeta."""
    channels = parts.saved.shape[1]
    dgamma = np.empty(channels, parts.statistics) if parts.has_gamma else None
    dbeta = np.empty(channels, parts.statistics) if parts.has_beta else None
    blocks = Blocks(backend, threads, parts.channel_axis, parts.x, asked.dy, parts.residual, asked.dx, asked.dresidual)
    rows = None if sums is None else sums._rows
    activation = _check.activation(parts.activation)
    blocks.backward(asked.dy, parts, rows, *activation, asked.dx, asked.dresidual, dgamma, dbeta)
    return dgamma, dbeta
