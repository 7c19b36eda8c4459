"""What is left of batch norm after training? Constants computed once (InferencePlan), or nothing (fold)."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _check_layer
from ._backends import get_num_threads, select
from .call import checks
from .call.dtypes import FLOAT32, FLOAT64, DType, kind_of, native, rounded
from .call.pickles import packed, unpacked
from .call.record import Options, contiguous, parameters
from .config import environment
from .ops import Activation, infer

Array = np.ndarray
_Run = Callable[[Any, Any, Any], Array | None]


class InferencePlan:
    """`infer` for given parameters and statistics, with its constants computed once.

    y = activation((x - running_mean) / sqrt(running_var + eps) * gamma + beta + residual): Ioffe & Szegedy 2015,
    algorithm 2. y has the bits that `infer` gives, and the errors are the same, except for an x that does not fit the
    plan. The arrays are copied. A plan never changes, may be called from several threads at once, and can be pickled.

    With the C backend, a call with `out` allocates nothing if x, out and residual are dense (channels-first,
    channels-last, transposed) and have the same dtype and memory order. Any other call costs what `infer` costs.

    Parameters
    ----------
    gamma, beta : arrays of shape (C,), any float dtype, or None
        Scale and shift; None means ones and zeros.
    running_mean, running_var : arrays of shape (C,), float64 for float64 data and float32 for all others
        For those of other dtypes, `BatchNorm.plan()` is a way, or `infer`.
    eps : float, finite and >= 0
        Added to the variance.
    axis : int
        The channel axis; negative numbers count from the end.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> mean, var = np.array([2.0, 20.0]), np.array([1.0, 100.0])
    >>> plan = fastbn.InferencePlan(None, None, mean, var, eps=0.0)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y = np.empty_like(x)
    >>> plan(x, out=y) is y
    True
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    _prepared: tuple[str | None, _Run | None] = ("", None)
    """The backend that was requested (None if none was), and `run` of its plan, if it has plans. Both are in one
    attribute, so that another thread never sees one without the other."""

    def __init__(
        self,
        gamma: Array | None,
        beta: Array | None,
        running_mean: Array,
        running_var: Array,
        *,
        eps: float = 1e-5,
        axis: int = 1,
        activation: Activation = None,
    ) -> None:
        g, b, mean, var = _arrays(gamma, beta, running_mean, running_var)
        self._gamma, self._beta = (None if p is None else _copied(p, p.dtype) for p in (g, b))
        self._mean, self._var = _copied(mean, mean.dtype), _copied(var, var.dtype)
        self._eps, self._axis = checks.eps(eps), checks.integer("axis", axis)
        checks.activation(activation)
        self._activation = activation

    def __call__(self, x: Array, out: Array | None = None, residual: Array | None = None) -> Array:
        """Returns y, of the shape, dtype and memory order of x; it is `out` if that is given.

        x, of at least 2 dimensions, has the plan's channels on its axis, and `dtype` as its statistics dtype. out (x
        itself, or memory of its own) and residual have x's shape and dtype. Raises the errors of `infer`, TypeError for
        an x of another statistics dtype, and ValueError for another number of channels.
        """
        backend = environment.backend_name()
        prepared_for, run = self._prepared
        if backend != prepared_for:
            run = self._prepare(backend)
        if run is not None:
            y = run(x, out, residual)
            if y is not None:
                return y
        x = _check_layer.plan_input(x, checks.given_statistics(self._mean, self._var)[0], self._axis)
        return infer(
            x,
            self._gamma,
            self._beta,
            self._mean,
            self._var,
            eps=self._eps,
            axis=self._axis,
            activation=self._activation,
            residual=residual,
            out=out,
        )

    def _prepare(self, backend: str | None) -> _Run | None:
        plan = getattr(select(backend), "Plan", None)
        run: _Run | None = None
        axis = checks.integer("axis", self._axis)
        if plan is not None and abs(axis) < _MOST_AXES:
            gamma, beta, mean, var = _arrays(self._gamma, self._beta, self._mean, self._var)
            eps, options = checks.eps(self._eps), Options(self._activation).checked()
            run = plan(gamma, beta, mean, var, eps, axis, options, get_num_threads).run
        self._prepared = backend, run
        return run

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return int(self._mean.size)

    @property
    def axis(self) -> int:
        """The channel axis."""
        return self._axis

    @property
    def eps(self) -> float:
        """The number that is added to the variance."""
        return self._eps

    @property
    def activation(self) -> Activation:
        """The activation, as it was given."""
        return self._activation

    @property
    def dtype(self) -> DType:
        """The statistics dtype of the data that the plan takes."""
        return self._mean.dtype

    def __getstate__(self) -> object:
        """The arguments of the plan, without what a backend prepared."""
        return packed(
            (self._gamma, self._beta, self._mean, self._var, self._eps, self._axis, self._activation),
        )

    def __setstate__(self, state: object) -> None:
        with unpacked("InferencePlan", state) as contents:
            *arrays, eps, axis, activation = contents
            self._gamma, self._beta, self._mean, self._var = _arrays(*arrays)
            self._eps, self._axis = checks.eps(eps), checks.integer("axis", axis)
            checks.activation(activation)
            self._activation = activation

    def __repr__(self) -> str:
        return (
            f"InferencePlan({self._mean.size} channels of {self._mean.dtype}, eps={self._eps}, axis={self._axis}, "
            f"activation={self._activation!r})"
        )


_MOST_AXES = 64
"""The most axes of a NumPy array. A plan whose axis lies beyond them refuses every x, in `infer`."""


class _Arrays(NamedTuple):
    """Parameters and statistics in the form that backends take."""

    gamma: Array | None
    beta: Array | None
    mean: Array
    var: Array


def _arrays(gamma: object, beta: object, mean: object, var: object) -> _Arrays:
    """Checks and converts the arrays, which may also come from an assignment or a pickle."""
    m, v = checks.given_statistics(mean, var)
    g, b = (checks.parameter(name, p, m.size) for name, p in (("gamma", gamma), ("beta", beta)))
    statistics = kind_of(m.dtype).statistics
    return _Arrays(*parameters(g, b, statistics), contiguous(m, statistics), contiguous(v, statistics))


def _copied(array: Array, dtype: DType) -> Array:
    return array.astype(dtype, order="C", copy=True, subok=False)


# Folding -------------------------------------------------------------------------------------------------------------


class FoldWarning(RuntimeWarning):
    """Names the channels whose accuracy `fold` could not keep, and why.

    >>> import numpy as np, fastbn, warnings
    >>> weight, mean, var = np.ones((2, 3)), np.zeros(2), np.array([1.0, 1e-12])
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     w, b = fastbn.fold(weight, None, None, None, mean, var)
    >>> caught[0].category is fastbn.FoldWarning
    True
    >>> print(caught[0].message)
    fold: accuracy is lost in channel 1 (variance 1e-12 is below 1% of eps 1e-05)
    """


TINY = 0.01
"""A variance below this part of eps is tiny: the channel is almost constant, and eps determines its scale."""

HUGE = 2.0**10
"""A scale above this is huge, since it multiplies the errors of the layer as well as its weights. A mean of more than
this many standard deviations costs the folded bias 10 bits."""


def fold(
    weight: Array,
    bias: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    eps: float = 1e-5,
    output_axis: int = 0,
) -> tuple[Array, Array]:
    """The weight and bias of a convolution or linear layer that includes the batch norm after it.

    w = weight * gamma / sqrt(running_var + eps) and b = (bias - running_mean) * gamma / sqrt(running_var + eps) + beta,
    per output channel: Jacob et al. 2018, section 3.2. They are computed in float64 and rounded once.

    Parameters
    ----------
    weight : array of float16, bfloat16, float32 or float64, any number of axes
    bias : array of shape (C,), any float dtype, or None for zeros
    gamma, beta : arrays of shape (C,), any float dtype, or None for ones and zeros
    running_mean, running_var : arrays of shape (C,), any float dtype
    eps : float, finite and >= 0
        Where running_var + eps is 0, w is 0 and b is beta, so that y is beta as in `infer`.
    output_axis : int
        The axis of weight with the output channels: 0 in torch's linear layers and convolutions, grouped and depthwise
        ones too; 1 in its transposed convolutions, (in, out / groups, ...); -1 in Keras's layers, and -2 in its
        transposed convolutions. If output_axis is 1 and weight has at least 3 axes, C may be a multiple of
        weight.shape[1]: then weight is taken to be that of a transposed convolution with C / weight.shape[1] groups,
        which must divide weight.shape[0]. Any other C is refused. Where the output channels take up two axes, as in
        Keras's depthwise convolutions, (..., in, multiplier), reshape weight to (..., in * multiplier).

    Returns
    -------
    (w, b)
        New arrays of weight's dtype; w has weight's shape, and b has shape (C,).

    Warns
    -----
    FoldWarning
        The message names the channels that lose accuracy, and why: the variance is below 1% of eps; the magnitude of
        gamma / sqrt(running_var + eps) exceeds 2**10; the mean is more than 2**10 standard deviations from the bias,
        so that the layer's sum cancels most of b; w or b is not finite in weight's dtype; or the largest weight is no
        longer a normal number.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> weight, x = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 6.0]])
    >>> norm = np.array([[2.0, 1.0], [0.0, 1.0], [7.0, 8.0], [4.0, 1.0]])  # gamma, beta, mean, variance
    >>> w, b = fastbn.fold(weight, None, *norm)
    >>> bool(np.allclose(x @ w.T + b, fastbn.infer(x @ weight.T, *norm)))
    True
    """
    given = checks.data("weight", weight)
    at, groups, channels = checks.outputs(given, output_axis, running_mean)
    named = {"bias": bias, "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    found = {name: checks.parameter(name, value, channels, "output channel of weight") for name, value in named.items()}
    checks.both_statistics(found["running_mean"], found["running_var"])
    eps = checks.eps(eps)
    absent = {"gamma": 1.0, "running_var": 1.0}
    before, g, after, mean, var = (
        np.full(channels, absent.get(name, 0.0)) if array is None else array.astype(FLOAT64)
        for name, array in found.items()
    )
    with np.errstate(all="ignore"):
        std = np.sqrt(var + eps)
        scale = np.divide(g, std, out=np.zeros_like(std), where=std != 0)
        wide = given.astype(FLOAT64)
        largest = _largest(wide, at, groups)
        wide *= _spread(scale, wide.shape, at, groups)
        w = rounded(wide, native(given.dtype))
        b = rounded((before - mean) * scale + after, native(given.dtype))
        distance = abs(mean - before) / std
        reasons = _losses(_largest(w.astype(FLOAT64), at, groups), b, largest, scale, var, eps, distance)
    if reasons:
        warnings.warn(f"fold: accuracy is lost in {_listed(reasons)}", FoldWarning, stacklevel=2)
    return w, b


def _spread(values: Array, shape: tuple[int, ...], at: int, groups: int) -> Array:
    """Reshapes one value per output channel so that it broadcasts over the weight."""
    if groups == 1:
        return values.reshape([-1 if axis == at else 1 for axis in range(len(shape))])
    by_input = np.repeat(values.reshape(groups, -1), shape[0] // groups, axis=0)
    return by_input.reshape(*by_input.shape, *(1 for _ in shape[2:]))


def _largest(weight: Array, at: int, groups: int) -> Array:
    """The largest absolute weight of each output channel, or NaN if one is NaN."""
    size: Array = np.abs(weight)
    if groups == 1:
        rows = np.moveaxis(size, at, 0)
    else:
        rows = size.reshape(groups, size.shape[0] // groups, *size.shape[1:]).swapaxes(1, 2)
        rows = rows.reshape(groups * size.shape[1], -1)
    largest: Array = rows.max(axis=tuple(range(1, rows.ndim)), initial=0)
    return largest


def _losses(
    largest: Array, b: Array, largest_given: Array, scale: Array, var: Array, eps: float, distance: Array
) -> dict[int, str]:
    """Why accuracy is lost, by channel. `distance` is from the mean to the bias, in standard deviations."""
    normal = float(np.finfo(b.dtype if b.dtype.kind == "f" else FLOAT32).tiny)
    alive = scale != 0
    tests = (
        (~(np.isfinite(largest) & np.isfinite(b.astype(FLOAT64))), "w or b is not finite in {dtype}"),
        (alive & (var < TINY * eps), "variance {var:.3g} is below {TINY:.0%} of eps {eps:.3g}"),
        (abs(scale) > HUGE, "gamma / sqrt(variance + eps) is {scale:.3g}"),
        (alive & (distance > HUGE), "the mean is {distance:.3g} standard deviations away"),
        (
            alive & (largest < normal) & (largest_given >= normal),
            "the largest weight, {largest:.3g}, is not a normal number of {dtype}",
        ),
    )
    found: dict[int, str] = {}
    for lost, reason in tests:
        for c in map(int, np.flatnonzero(lost)):
            values = {"var": var[c], "scale": scale[c], "distance": distance[c], "largest": largest[c]}
            found.setdefault(c, reason.format(dtype=b.dtype, TINY=TINY, eps=eps, **values))
    return dict(sorted(found.items()))


def _listed(reasons: dict[int, str], most: int = 8) -> str:
    shown = [f"channel {channel} ({reason})" for channel, reason in list(reasons.items())[:most]]
    rest = list(reasons)[most:]
    return ", ".join(shown) + (f", and in channels {', '.join(map(str, rest))}" if rest else "")
