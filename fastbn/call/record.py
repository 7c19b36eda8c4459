"""What does a backend get? A call or a gradient, as one record. `check` makes sure that a call is valid.

One record crosses each boundary: ops.py fills it, `check` completes it, virtual batches and blocks take rows, channels
and pieces of it, and a backend reads it. READ, WRITTEN, CHANNELS and ROWS tell how each of its arrays is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import checks
from .activations import BY_NAME, Activation, as_given, name_and_slope
from .dtypes import FLOAT64, DType, kind_of, native, rounded

Array = np.ndarray[Any, Any]

READ = ("x", "residual", "dy")
WRITTEN = ("y", "dx", "dresidual")
RUNNING = ("running_mean", "running_var")
CHANNELS = ("gamma", "beta", *RUNNING, "dgamma", "dbeta")
ROWS = ("saved", "moments", "sums")
"""The arrays of a call by shape. Those READ and WRITTEN have x's shape, CHANNELS have (channels,), and ROWS, which are
float64, have (rows, channels). Only the mask is not listed: it has x's shape without the channel axis."""

_UNSET: Any = None


class Options(NamedTuple):
    """What a call and its gradient compute beside arrays: first as the caller gave it, then `checked`.

    A cache keeps the options, and every backend gets them with each call, so that an option has its one place here.
    """

    activation: Any = None
    """As the caller gave it; once checked, its code in `Activation`."""
    slope: float = 0.0
    """The activation's slope, which `checked` finds."""

    def checked(self) -> Options:
        """Valid options, in the form that backends take."""
        code, slope = checks.activation(self.activation)
        return self._replace(activation=int(code), slope=slope)

    def given(self) -> Options:
        """Checked options as a caller gives them, which is how a cache keeps them."""
        return options_of((Activation(self.activation).public, self.slope))


USUAL: dict[object, Options] = {name: Options(name) for name in BY_NAME}
"""The options in which nothing but the activation's name is given."""


def options_of(activation: Any) -> Options:
    """The options of a valid call in which nothing but the activation is given: the usual ones if they are these."""
    usual = USUAL.get(activation)
    if usual is not None:
        return usual
    activation = as_given(*name_and_slope(activation))
    return USUAL.get(activation, Options(activation))


IDENTITY = USUAL[None].checked()


class Call(NamedTuple):
    """The arguments of forward or infer: first as the caller gave them, then, from `check`, valid and complete.

    Arrays of data and the mask may have any strides, except when a backend gets them: see `fastbn._backends.Backend`.
    Arrays of shape (channels,) have, once they are checked, the layout and dtype that backends require.
    """

    x: Array
    gamma: Array | None = None
    beta: Array | None = None
    running_mean: Array | None = None
    running_var: Array | None = None
    """forward updates the running statistics; infer normalizes with them."""
    momentum: float = 0.0
    correction: int = 0
    eps: float = 0.0
    axis: int = 1
    mask: Array | None = None
    options: Options = IDENTITY
    residual: Array | None = None
    out: Any = None
    """The array that the caller gets."""
    threads: int = 1
    y: Array = _UNSET
    """The memory of `out`, as a plain array."""
    in_place: bool = False
    """Whether y is x."""
    given: tuple[Array | None, Array | None] = (None, None)
    """The running statistics as the caller gave them."""
    saved: Any = None
    """The rows of `fastbn._backends.SAVED_ROWS`, which a gradient needs; None in infer if there will be no gradient."""
    moments: Array = _UNSET
    """The rows mean, mean_low and the sum of squares about their sum, which the verb `moments` fills."""

    @property
    def statistics(self) -> DType:
        """The statistics dtype."""
        return kind_of(self.x.dtype).statistics

    def put_running_back(self) -> None:
        """Copies updated running statistics to the caller's arrays, if these were not in a form that backends take."""
        for given, updated in zip(self.given, (self.running_mean, self.running_var), strict=True):
            if given is not None and updated is not None and given is not updated:
                with np.errstate(all="ignore"):
                    given[...] = rounded(updated, native(given.dtype))


class BackwardCall(NamedTuple):
    """The arguments of backward or backward_sums, valid and complete; the arrays are as in a `Call`."""

    dy: Array
    x: Array
    saved: Array
    """As the forward call left it."""
    residual: Array | None = None
    mask: Array | None = None
    axis: int = 1
    options: Options = IDENTITY
    counted: float = 0.0
    """The number of values per channel that the statistics come from."""
    frozen: bool = False
    """Whether the statistics were given, as in infer."""
    from_y: bool = False
    """Whether x holds y. The activation is then none, or leaky_relu with a slope > 0."""
    sums: Any = None
    """The sums of dz and of dz * xhat, which `backward_sums` fills. In `backward`, those of a larger batch, or None for
    those of the call's own positions."""
    dx: Array = _UNSET
    dresidual: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    threads: int = 1
    out: Any = None
    """The array that the caller gets, in the memory of dx."""
    residual_gradient: Any = None
    """The residual's gradient that the caller gets; without an activation it is dy."""


AnyCall = TypeVar("AnyCall", Call, BackwardCall)


def arrays_of(call: Call | BackwardCall, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of the call that have these names and are not None."""
    return {name: array for name in names if (array := getattr(call, name, None)) is not None}


def replaced(call: AnyCall, arrays: dict[str, Any]) -> AnyCall:
    """The call with other arrays."""
    return call._replace(**arrays)


def rows_of(call: AnyCall, rows: slice) -> AnyCall:
    """The call for a slice of axis 0, which is not the channel axis."""
    return replaced(call, {name: array[rows] for name, array in arrays_of(call, (*READ, *WRITTEN, "mask")).items()})


class Average(float):
    """The momentum that makes the running statistics the average over `batches` earlier batches and this one.

    All virtual batches, those of this call and of the calls before it, weigh the same, too.
    """

    batches: int

    def __new__(cls, batches: int) -> Average:
        self = super().__new__(cls, 1 / (batches + 1))
        self.batches = batches
        return self


def check(call: Call, *, updates: bool, keeps: bool) -> Call:
    """Checks and completes a call. `updates`: running statistics will be written; `keeps`: backward will need x."""
    x = checks.data("x", call.x)
    axis = checks.axis(call.axis, x)
    channels = x.shape[axis]
    momentum = call.momentum if isinstance(call.momentum, Average) else checks.momentum(call.momentum)
    correction, eps, options = checks.correction(call.correction), checks.eps(call.eps), call.options.checked()
    gamma = checks.parameter("gamma", call.gamma, channels)
    beta = checks.parameter("beta", call.beta, channels)
    given = checks.running(call.running_mean, call.running_var, channels, written=updates)
    residual = None if call.residual is None else checks.like("residual", call.residual, x)
    mask = checks.mask(call.mask, x, axis)
    inputs = {"x": x, "residual": residual, "gamma": gamma, "beta": beta, "mask": mask}
    inputs |= {"running_mean": given[0], "running_var": given[1]}
    out = checks.out(call.out, x, inputs, may_be="x")
    in_place = out is not None and checks.same_memory(out, x)
    gamma, beta = parameters(gamma, beta, kind_of(x.dtype).statistics)
    if in_place and keeps:
        checks.invertible(Activation(options.activation), options.slope, gamma, beta, residual, channels, x.dtype)
    if updates:
        checks.running_apart(inputs)
    if out is None:
        out = np.empty_like(x, native(x.dtype), subok=False)
    mean, var = _statistics(given)
    return call._replace(
        x=x, gamma=gamma, beta=beta, running_mean=mean, running_var=var, momentum=momentum, correction=correction,
        eps=eps, axis=axis, mask=mask, options=options, residual=residual, out=out if call.out is None else call.out,
        y=out, in_place=in_place, given=given,
    )  # fmt: skip


def contiguous(array: Array, dtype: DType) -> Array:
    """The array itself if backends can take it, else a copy that they can take."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array
    return array.astype(dtype, order="C")


def _statistics(given: tuple[Array | None, Array | None]) -> tuple[Array | None, Array | None]:
    """Running statistics in one dtype: the one they share, or else float64, which can hold the values of both."""
    mean, var = given
    if mean is None or var is None:
        return None, None
    dtype = native(mean.dtype) if native(mean.dtype) == native(var.dtype) else FLOAT64
    return contiguous(mean, dtype), contiguous(var, dtype)


def parameters(gamma: Array | None, beta: Array | None, statistics: DType) -> tuple[Array | None, Array | None]:
    """Gamma and beta in one dtype: the statistics dtype, or float64 if the former would round one of them."""
    dtype = statistics if _is_exact(gamma, statistics) and _is_exact(beta, statistics) else FLOAT64
    return (
        None if gamma is None else contiguous(gamma, dtype),
        None if beta is None else contiguous(beta, dtype),
    )


def _is_exact(array: Array | None, dtype: DType) -> bool:
    """Whether the dtype can hold the array's values without rounding."""
    if array is None or array.dtype == dtype:
        return True
    return np.can_cast(array.dtype, dtype) or array.dtype.name == "bfloat16"
