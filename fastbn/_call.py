"""What was asked for? The arguments that forward and infer share, checked, and the array that y goes to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _check
from ._activations import Activation
from ._dtypes import FLOAT64, DType, kind_of, native, rounded
from ._shape import positions_of

Array = np.ndarray[Any, Any]


class Call(NamedTuple):
    """Valid arguments. x, residual, mask and y have any strides; arrays of (channels,) are as backends take them."""

    x: Array
    axis: int
    statistics: DType
    gamma: Array | None
    beta: Array | None
    running: tuple[Array | None, Array | None]
    """As they were given, to be updated."""
    mean: Array | None
    var: Array | None
    eps: float
    activation: Any
    """As it was given."""
    code: Activation
    slope: float
    residual: Array | None
    mask: Array | None
    """Of the positions' shape, or None."""
    out: Array
    """What the caller gets."""
    y: Array
    """The same memory, as a plain array."""
    in_place: bool
    """Whether y is x."""

    def rows(self, some: slice) -> Call:
        """The same call for some of the elements of axis 0, which is not the channel axis."""
        residual, mask = (None if array is None else array[some] for array in (self.residual, self.mask))
        return self._replace(x=self.x[some], residual=residual, mask=mask, out=self.y[some], y=self.y[some])

    def put_running_back(self) -> None:
        """Into the caller's running statistics, where backends could not take these and a copy was updated."""
        for given, updated in zip(self.running, (self.mean, self.var), strict=True):
            if given is not None and updated is not None and given is not updated:
                with np.errstate(all="ignore"):
                    given[...] = rounded(updated, native(given.dtype))


def check(
    x: object,
    gamma: object,
    beta: object,
    running_mean: object,
    running_var: object,
    eps: object,
    axis: object,
    mask: object,
    activation: Any,
    residual: object,
    out: object,
    *,
    updates: bool,
    keeps: bool,
) -> Call:
    """A Call. `updates`: running statistics will be written; `keeps`: a backward pass will want x back."""
    data = _check.data("x", x)
    axis = _check.axis(axis, data)
    channels, statistics = data.shape[axis], kind_of(data.dtype).statistics
    code, slope = _check.activation(activation)
    eps = _check.eps(eps)
    g, b = _check.parameter("gamma", gamma, channels), _check.parameter("beta", beta, channels)
    running = _check.running(running_mean, running_var, channels, written=updates)
    added = None if residual is None else _check.like("residual", residual, data)
    counted = _check.mask(mask, data, axis)
    inputs = {"x": data, "residual": added, "gamma": g, "beta": b, "mask": counted}
    inputs |= {"running_mean": running[0], "running_var": running[1]}
    target = _check.out(out, data, inputs, may_be="x")
    in_place = target is not None and _check.same_memory(target, data)
    g, b = parameters(g, b, statistics)
    if in_place and keeps:
        _check.invertible(code, slope, g, b, added, channels, data.dtype)
    if updates:
        _check.running_apart(inputs)
    if counted is not None:
        counted = np.broadcast_to(counted, positions_of(data.shape, axis))
    if target is None:
        target = np.empty_like(data, native(data.dtype), subok=False)
    mean, var = _statistics(*running)
    return Call(
        x=data,
        axis=axis,
        statistics=statistics,
        gamma=g,
        beta=b,
        running=running,
        mean=mean,
        var=var,
        eps=eps,
        activation=activation,
        code=code,
        slope=slope,
        residual=added,
        mask=counted,
        out=target,
        y=np.asarray(target),
        in_place=in_place,
    )


def contiguous(array: Array, dtype: DType) -> Array:
    """The array itself where backends can take it, else a copy that they can."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array
    return array.astype(dtype, order="C")


def _statistics(mean: Array | None, var: Array | None) -> tuple[Array | None, Array | None]:
    """Running statistics in one dtype: their own or, where each has another, float64, which has all their numbers."""
    if mean is None or var is None:
        return None, None
    dtype = native(mean.dtype) if native(mean.dtype) == native(var.dtype) else FLOAT64
    return contiguous(mean, dtype), contiguous(var, dtype)


def parameters(gamma: Array | None, beta: Array | None, statistics: DType) -> tuple[Array | None, Array | None]:
    """Both in one dtype: the statistics dtype or, where that would round one of them, float64."""
    dtype = statistics if _is_exact(gamma, statistics) and _is_exact(beta, statistics) else FLOAT64
    return (
        None if gamma is None else contiguous(gamma, dtype),
        None if beta is None else contiguous(beta, dtype),
    )


def _is_exact(array: Array | None, dtype: DType) -> bool:
    """Whether the array's numbers are numbers of the dtype."""
    if array is None or array.dtype == dtype:
        return True
    return np.can_cast(array.dtype, dtype) or array.dtype.name == "bfloat16"
