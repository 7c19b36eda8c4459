"""How is one batch normalized, and how is its gradient computed? Takes checked arguments, fills the results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .._backends import SAVED_ROWS, Backend
from .._moments import Moments, Sums, blend, save
from . import checks
from .activations import Activation
from .blocks import Blocks
from .dtypes import native
from .record import BackwardCall, Call
from .results import Parts
from .shape import positions_of

Array = np.ndarray[Any, Any]


def moments(call: Call, backend: Backend) -> Moments:
    """The moments of x. The call's x, axis and mask are as the caller gave them, and are checked here."""
    x = checks.data("x", call.x)
    axis = checks.axis(call.axis, x)
    mask = checks.mask(call.mask, x, axis)
    positions, channels = positions_of(x.shape, axis), x.shape[axis]
    count = math.prod(positions) if mask is None else int(np.count_nonzero(mask))
    call = call._replace(x=x, axis=axis, mask=mask, moments=np.zeros((3, channels)))
    if count and channels:
        Blocks(call, backend).moments(call)
    return Moments._of(count, call.moments, call.statistics)


def train(call: Call, given: Moments | None, backend: Backend) -> Parts:
    """Normalizes with the batch's own statistics, or with given moments; updates the running statistics."""
    saved = _new_saved(call)
    if given is None:
        mask, count = counted(call)
        call = call._replace(saved=saved, mask=mask)
        Blocks(call, backend).forward(call, count)
        return parts_of(call, count=None if mask is None else count)
    checks.correctable(call.correction, given.count, " in the moments")
    save(given._rows, given.count, saved)
    blend(call, given._rows, given.count)
    call = call._replace(saved=saved)
    Blocks(call, backend).apply(call)
    return parts_of(call, count=given.count)


def counted(call: Call, where: str = "") -> tuple[Array | None, int]:
    """The mask, or None if it leaves all values, and how many values per channel it leaves: >= 2 and > correction."""
    count = checks.enough(call.x, call.axis, call.mask, where)
    checks.correctable(call.correction, count, where)
    everything = call.mask is None or count == call.mask.size
    return None if everything else call.mask, count


def freeze(call: Call, backend: Backend) -> Parts:
    """Normalizes with the running statistics, which do not change."""
    call = call._replace(saved=_new_saved(call))
    infer(call, backend)
    return parts_of(call, frozen=True)


def infer(call: Call, backend: Backend) -> None:
    """Normalizes with the running statistics; fills `saved` only if the call has it."""
    if call.running_mean is None:
        checks.statistics_missing()
    Blocks(call, backend).infer(call)


def _new_saved(call: Call) -> Array:
    return np.empty((len(SAVED_ROWS), call.x.shape[call.axis]))


def parts_of(call: Call, *, frozen: bool = False, count: int | None = None) -> Parts:
    """The parts of the call that a cache keeps."""
    x, residual = views(call.y if call.in_place else call.x, call.residual)
    has_gamma, has_beta = call.gamma is not None, call.beta is not None
    return Parts(x, residual, call.saved, call.axis, frozen, call.options.given(), has_gamma, has_beta,
                 call.mask, count, call.in_place)  # fmt: skip


def views(x: Array, residual: Array | None) -> tuple[Array, Array | None]:
    """Views of the arrays, since a caller may change the shape of the arrays themselves."""
    return x.view(), None if residual is None else residual.view()


def _call_of(dy: Array, parts: Parts, threads: int) -> BackwardCall:
    """The record of a gradient, from the parts of a cache, without arrays to fill."""
    options = parts.options.checked()
    return BackwardCall(dy, parts.x, parts.saved, parts.residual, parts.mask, parts.channel_axis, options,
                        float(parts.total), parts.frozen, parts.from_y, threads=threads)  # fmt: skip


def check_backward(dy: object, parts: Parts, out: object, threads: int) -> BackwardCall:
    """Checks dy and out, which may be dy itself, and allocates dx and dresidual where that is needed."""
    x, dtype = parts.x, native(parts.x.dtype)
    gradient = checks.like("dy", dy, x)
    inputs = {"dy": gradient, "x": x, "residual": parts.residual, "mask": parts.mask}
    target = checks.out(out, x, inputs, may_be="dy")
    call = _call_of(gradient, parts, threads)
    dresidual = returned = None
    if parts.residual is not None and call.options.activation != Activation.IDENTITY:
        dresidual = returned = np.empty_like(x, dtype, subok=False)
    elif parts.residual is not None:
        overwritten = target is not None and checks.same_memory(target, gradient)
        returned = gradient.astype(dtype, copy=overwritten)
    if target is None:
        target = np.empty_like(x, dtype, subok=False)
    return call._replace(dx=target, dresidual=dresidual, out=target if out is None else out, residual_gradient=returned)


def backward_sums(dy: object, parts: Parts, backend: Backend, threads: int) -> Sums:
    """The sums that gradients need, over the positions of parts.x."""
    gradient = checks.like("dy", dy, parts.x)
    rows = np.zeros((2, parts.saved.shape[1]))
    if gradient.size:
        call = _call_of(gradient, parts, threads)._replace(sums=rows)
        Blocks(call, backend).backward_sums(call)
    count = parts.values if parts.mask is None or parts.frozen else int(np.count_nonzero(parts.mask))
    return Sums._of(count, rows, parts.statistics)


def backward(
    call: BackwardCall, parts: Parts, backend: Backend, sums: Sums | None = None
) -> tuple[Array | None, Array | None]:
    """Fills dx and dresidual; returns dgamma and dbeta."""
    channels = parts.saved.shape[1]
    dgamma = np.empty(channels, parts.statistics) if parts.has_gamma else None
    dbeta = np.empty(channels, parts.statistics) if parts.has_beta else None
    call = call._replace(dgamma=dgamma, dbeta=dbeta, sums=None if sums is None else sums._rows)
    Blocks(call, backend).backward(call)
    return dgamma, dbeta
