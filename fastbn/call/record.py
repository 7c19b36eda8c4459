"""What is asked of a backend? A call, and a gradient, each as one record; and the check of a call.

One record crosses each boundary: the front desk fills it, `check` completes it, virtual batches and blocks take rows,
channels and pieces of it, and a backend reads it. READ to ROWS say which of its arrays are cut in which way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import checks
from .activations import Activation
from .dtypes import FLOAT64, DType, kind_of, native, rounded
from .shape import positions_of

Array = np.ndarray[Any, Any]

READ = ("x", "residual", "dy")
WRITTEN = ("y", "dx", "dresidual")
CHANNELS = ("gamma", "beta", "running_mean", "running_var", "dgamma", "dbeta")
ROWS = ("saved", "moments", "sums")
"""The arrays of a call by their shape: x's, which the call reads or writes; (channels,); and, of float64, (rows,
channels). The mask alone has x's shape without the channel axis."""

_UNSET: Any = None


class Call(NamedTuple):
    """What forward and infer are to do: first as it was given, then, from `check`, valid and complete.

    Arrays of data and the mask have any strides, but in a backend's calls: see `fastbn._backends.Backend`. Arrays of
    (channels,) are, once they are checked, as backends take them.
    """

    x: Array
    gamma: Array | None = None
    beta: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    """Updated by forward; what infer normalizes with."""
    momentum: float = 0.0
    correction: int = 0
    eps: float = 0.0
    axis: int = 1
    mask: Array | None = None
    activation: Any = None
    """As it was given."""
    residual: Array | None = None
    out: Any = None
    """What the caller gets."""
    threads: int = 1
    y: Array = _UNSET
    """The memory of `out`, as a plain array."""
    in_place: bool = False
    """Whether y is x."""
    given: tuple[Array | None, Array | None] = (None, None)
    """The running statistics as the caller has them."""
    code: Activation = Activation.IDENTITY
    slope: float = 0.0
    """leaky_relu's."""
    saved: Any = None
    """What a gradient will need: the rows of `fastbn._backends.SAVED_ROWS`; None for infer where nothing will."""
    moments: Array = _UNSET
    """The rows mean, mean_low and the sum of squares around their sum, which the verb `moments` fills."""

    @property
    def statistics(self) -> DType:
        """The statistics dtype."""
        return kind_of(self.x.dtype).statistics

    def put_running_back(self) -> None:
        """Into the caller's running statistics, where backends could not take these and a copy was updated."""
        for given, updated in zip(self.given, (self.running_mean, self.running_var), strict=True):
            if given is not None and updated is not None and given is not updated:
                with np.errstate(all="ignore"):
                    given[...] = rounded(updated, native(given.dtype))


class BackwardCall(NamedTuple):
    """What backward and backward_sums are to do, valid and complete; the arrays are as in a `Call`."""

    dy: Array
    x: Array
    saved: Array
    """As the forward call left it."""
    residual: Array | None = None
    mask: Array | None = None
    axis: int = 1
    code: Activation = Activation.IDENTITY
    slope: float = 0.0
    counted: float = 0.0
    """Values per channel that made the statistics."""
    frozen: bool = False
    """Whether the statistics were given, as infer's are."""
    from_y: bool = False
    """Whether x holds y, of no activation or of leaky_relu with slope > 0."""
    sums: Any = None
    """The sums of dz and of dz * xhat: of a larger batch, or None for those of the call's own positions. Filled by the
    verb `backward_sums`."""
    dx: Array = _UNSET
    dresidual: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    threads: int = 1
    out: Any = None
    """The memory of dx: what the caller gets."""
    residual_gradient: Any = None
    """What the caller gets of the residual's gradient, which without an activation is dy."""


AnyCall = TypeVar("AnyCall", Call, BackwardCall)


def arrays_of(call: Call | BackwardCall, names: Sequence[str]) -> dict[str, Array]:
    """Those of the arrays of these names that the call has."""
    return {name: array for name in names if (array := getattr(call, name, None)) is not None}


def replaced(call: AnyCall, arrays: dict[str, Any]) -> AnyCall:
    """The call with other arrays."""
    return call._replace(**arrays)


def rows_of(call: AnyCall, some: slice) -> AnyCall:
    """The call for some of the elements of axis 0, which is not the channel axis."""
    return replaced(call, {name: array[some] for name, array in arrays_of(call, (*READ, *WRITTEN, "mask")).items()})


class Average(float):
    """The momentum with which running statistics are the average over so many batches and one more.

    Virtual batches weigh alike, too: those of this call and of those before it.
    """

    batches: int

    def __new__(cls, batches: int) -> Average:
        self = super().__new__(cls, 1 / (batches + 1))
        self.batches = batches
        return self


def check(call: Call, *, updates: bool, keeps: bool) -> Call:
    """The call completed. `updates`: running statistics will be written; `keeps`: a backward pass will want x back."""
    momentum = call.momentum if isinstance(call.momentum, Average) else checks.momentum(call.momentum)
    correction = checks.correction(call.correction)
    x = checks.data("x", call.x)
    axis = checks.axis(call.axis, x)
    channels = x.shape[axis]
    code, slope = checks.activation(call.activation)
    eps = checks.eps(call.eps)
    gamma, beta = checks.parameter("gamma", call.gamma, channels), checks.parameter("beta", call.beta, channels)
    given = checks.running(call.running_mean, call.running_var, channels, written=updates)
    residual = None if call.residual is None else checks.like("residual", call.residual, x)
    mask = checks.mask(call.mask, x, axis)
    inputs = {"x": x, "residual": residual, "gamma": gamma, "beta": beta, "mask": mask}
    inputs |= {"running_mean": given[0], "running_var": given[1]}
    out = checks.out(call.out, x, inputs, may_be="x")
    in_place = out is not None and checks.same_memory(out, x)
    gamma, beta = parameters(gamma, beta, kind_of(x.dtype).statistics)
    if in_place and keeps:
        checks.invertible(code, slope, gamma=gamma, beta=beta, residual=residual, channels=channels, dtype=x.dtype)
    if updates:
        checks.running_apart(inputs)
    if mask is not None:
        mask = np.broadcast_to(mask, positions_of(x.shape, axis))
    if out is None:
        out = np.empty_like(x, native(x.dtype), subok=False)
    mean, var = _statistics(given[0], given[1])
    return call._replace(
        x=x,
        gamma=gamma,
        beta=beta,
        running_mean=mean,
        running_var=var,
        momentum=momentum,
        correction=correction,
        eps=eps,
        axis=axis,
        mask=mask,
        residual=residual,
        out=out,
        y=np.asarray(out),
        in_place=in_place,
        given=given,
        code=code,
        slope=slope,
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
