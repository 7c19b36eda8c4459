"""The front desk: forward, infer and backward. Checks, finds the three integers, allocates, delegates."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np

from . import _check, _config
from ._activations import Activation
from ._dtypes import STATISTICS
from ._shape import Layout, dense, layout_of
from .backends import SAVED_ROWS, Backend, select

Array = np.ndarray[Any, Any]


class _Parts(NamedTuple):
    """What a cache holds: a forward call's dense x, its residual, what the backend saved, and how it was called."""

    x: Array
    residual: Array | None
    saved: Array
    axis: int
    frozen: bool
    activation: str | None
    has_gamma: bool
    has_beta: bool


def _own(x: Array, residual: Array | None) -> tuple[Array, Array | None]:
    """Views, since a caller may change the shape of the arrays themselves."""
    return x.view(), None if residual is None else residual.view()


class Cache:
    """What `backward` needs of a `forward` call. It refers to x and residual: leave them as they are until then.

    Attributes
    ----------
    mean, var, inv_std : arrays of shape (C,), in the statistics dtype
        What the call normalized with: the batch's mean and biased variance, or the running statistics; and
        1/sqrt(var + eps), which is 0 where var + eps is 0.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [3.0]]))
    >>> cache.mean, cache.var
    (array([2.]), array([1.]))
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts

    def _row(self, name: str) -> Array:
        row: Array = self._parts.saved[SAVED_ROWS.index(name)].astype(STATISTICS[self._parts.x.dtype])
        return row

    @property
    def mean(self) -> Array:
        return self._row("mean")

    @property
    def var(self) -> Array:
        return self._row("var")

    @property
    def inv_std(self) -> Array:
        return self._row("inv_std")


class Forward(NamedTuple):
    """What `forward` returns.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [3.0]]), eps=0.0)
    >>> y.tolist()
    [[-1.0], [1.0]]
    """

    y: Array
    cache: Cache


class _Gradients(NamedTuple):
    dx: Array
    dgamma: Array | None
    dbeta: Array | None


class Gradients(_Gradients):
    """What `backward` returns: (dx, dgamma, dbeta), and `dresidual` beside them (None without a residual).

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> gradients = fastbn.backward(np.ones((2, 1)), fastbn.forward(x, None, np.zeros(1), residual=x).cache)
    >>> dx, dgamma, dbeta = gradients
    >>> dbeta.tolist(), gradients.dresidual.tolist()
    ([2.0], [[1.0], [1.0]])
    """

    dresidual: Array | None

    def __new__(cls, dx: Array, dgamma: Array | None, dbeta: Array | None, dresidual: Array | None) -> Gradients:
        self = super().__new__(cls, dx, dgamma, dbeta)
        self.dresidual = dresidual
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.dresidual)


class _Target:
    """Where a result goes: `array` for the caller, `view` for the backend, which differ if out's strides ask so."""

    def __init__(self, out: Array | None, like: Array, layout: Layout) -> None:
        self.array = np.empty_like(like, subok=False) if out is None else out
        in_place = layout.view(np.asarray(self.array)) if self.array.flags.aligned else None
        self.scattered = in_place is None
        self.view = np.empty(layout.shape, like.dtype) if in_place is None else in_place

    def finish(self, layout: Layout) -> Array:
        """The caller's array, filled."""
        if self.scattered:
            turned = self.array.transpose(layout.order)
            turned[...] = self.view.reshape(turned.shape)
        return self.array


class _Call:
    """The arguments that forward and infer share, checked and in the shape that backends take."""

    def __init__(
        self,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        running_mean: Array | None,
        running_var: Array | None,
        eps: float,
        axis: int,
        activation: str | None,
        residual: Array | None,
        out: Array | None,
        *,
        updates: bool,
        in_place: bool = False,
    ) -> None:
        x = _check.data("x", x)
        self.axis = axis = _check.axis(axis, x)
        channels, statistics = x.shape[axis], STATISTICS[x.dtype.newbyteorder("=")]
        self.eps = _check.eps(eps)
        self.activation = _check.activation(activation)
        self.gamma, self.beta = _check.parameters(gamma, beta, channels, statistics)
        self.running = _check.running(running_mean, running_var, channels, statistics, written=updates)
        if residual is not None:
            residual = _check.like("residual", residual, x).astype(x.dtype.newbyteorder("="), copy=False)
        inputs = {"x": x, "residual": residual, "gamma": gamma, "beta": beta}
        inputs |= {"running_mean": self.running[0], "running_var": self.running[1]}
        out = _check.out(out, x, inputs, may_be="x" if in_place else None)
        if updates:
            _check.running_apart(inputs)
        self.x = dense(x)
        self.layout = layout_of(self.x, axis)
        self.given_residual = residual
        self.residual = None if residual is None else self.layout.gather(residual)
        self.mean, self.var = (None if a is None else np.ascontiguousarray(a) for a in self.running)
        self.target = _Target(out, self.x, self.layout)

    def gather(self) -> Array:
        """What the backend takes as x."""
        return self.layout.gather(self.x)

    def put_running_back(self) -> None:
        """Into the caller's running statistics, where those are not contiguous and a copy was updated."""
        for given, updated in zip(self.running, (self.mean, self.var), strict=True):
            if given is not None and updated is not None and given is not updated:
                given[...] = updated


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    mask: None = None,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Forward:
    """Batch normalization, ready for `backward`.

    y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), per channel: Ioffe & Szegedy 2015,
    algorithm 1. The mean and the biased variance are those of the batch or, with training=False, the running ones.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-D
        Any strides. Dense arrays (channels-first, channels-last, transposed) are not copied.
    gamma, beta : arrays of shape (C,), any float dtype, or None
        Scale and shift; None means ones and zeros.
    running_mean, running_var : arrays of shape (C,) in x's statistics dtype (its own), both or neither
        In training, updated in place: (1 - momentum) * old + momentum * batch, with the unbiased batch variance.
    training : bool
        False normalizes with the running statistics, which are then required and left alone.
    momentum : float, 0 to 1
    eps : float, finite and >= 0
        With eps == 0 a constant channel still gives beta exactly.
    axis : int
        The channel axis.
    mask : None
        Not in this version.
    activation : None or "relu"
    residual : array like x, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where y goes. It may not share memory with an input.
    backend : "c", "numba", "numpy" or None

    Returns
    -------
    Forward
        Unpacks as (y, cache). y has the dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is allowed; nothing has been changed. Among them: fewer than 2
        values per channel in training.

    Notes
    -----
    For finite float32 input y is within 2 ulp of max(1, |xhat|) times |gamma| plus 1 ulp of |y|, at any offset, with
    every backend and layout. A NaN or infinity makes its own channel NaN and no other.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, cache = fastbn.forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    return forward_corrected(
        1,
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        axis,
        mask,
        activation,
        residual,
        out,
        backend,
    )


def forward_corrected(
    correction: int,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    axis: int,
    mask: None,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
    backend: str | None,
) -> Forward:
    """`forward` whose running variance is the sum of squares over M - correction (0 is Keras's convention)."""
    chosen, threads = select(backend), _config.get_num_threads()
    express = getattr(chosen, "express_forward", None)
    if express is not None and type(training) is bool and mask is None:
        done = express(
            *(x, gamma, beta, running_mean, running_var, momentum, correction),
            *(eps, axis, activation, residual, out, training, threads),
        )
        if done is not None:
            y, saved = done
            has_gamma, has_beta = gamma is not None, beta is not None
            return Forward(
                y, Cache(_Parts(*_own(x, residual), saved, axis, not training, activation, has_gamma, has_beta))
            )
    training = _check.flag("training", training)
    momentum = _check.momentum(momentum)
    _check.no_mask(mask)
    call = _Call(x, gamma, beta, running_mean, running_var, eps, axis, activation, residual, out, updates=training)
    if training:
        _check.enough(call.x, call.layout)
    saved = np.empty((len(SAVED_ROWS), call.layout.shape[1]))
    if training:
        chosen.forward(
            call.gather(),
            call.residual,
            call.gamma,
            call.beta,
            call.mean,
            call.var,
            momentum,
            correction,
            call.eps,
            call.activation,
            call.target.view,
            saved,
            threads,
        )
        call.put_running_back()
    elif call.mean is None or call.var is None:
        _check.statistics_missing()
    else:
        chosen.infer(
            call.gather(),
            call.residual,
            call.gamma,
            call.beta,
            call.mean,
            call.var,
            call.eps,
            call.activation,
            call.target.view,
            saved,
            threads,
        )
    parts = _Parts(
        *_own(call.x, call.given_residual),
        saved,
        call.axis,
        not training,
        activation,
        gamma is not None,
        beta is not None,
    )
    return Forward(call.target.finish(call.layout), Cache(parts))


def infer(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Batch normalization with given statistics, nothing kept for a backward pass.

    y = activation((x - running_mean) / sqrt(running_var + eps) * gamma + beta + residual): Ioffe & Szegedy 2015,
    algorithm 2. Arguments, accuracy and errors are those of `forward`, but `out` may be x itself, and an x without
    values per channel gives an empty y.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> fastbn.infer(x, None, None, np.array([2.0, 20.0]), np.array([1.0, 100.0]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    chosen, threads = select(backend), _config.get_num_threads()
    express = getattr(chosen, "express_infer", None)
    if express is not None:
        y = express(x, gamma, beta, running_mean, running_var, eps, axis, activation, residual, out, threads)
        if y is not None:
            return cast(Array, y)
    call = _Call(
        x, gamma, beta, running_mean, running_var, eps, axis, activation, residual, out, updates=False, in_place=True
    )
    if call.mean is None or call.var is None:
        _check.statistics_missing()
    chosen.infer(
        call.gather(),
        call.residual,
        call.gamma,
        call.beta,
        call.mean,
        call.var,
        call.eps,
        call.activation,
        call.target.view,
        None,
        threads,
    )
    return call.target.finish(call.layout)


def backward(dy: Array, cache: Cache, *, out: Array | None = None, backend: str | None = None) -> Gradients:
    """The exact gradient of the `forward` call that made `cache`.

    With dz the gradient before the activation (dy without one), in training, after Ioffe & Szegedy 2015, section 3:

        dbeta = sum(dz),  dgamma = sum(dz * xhat)
        dx = gamma / sqrt(var + eps) * (dz - dbeta / M - xhat * dgamma / M)

    and dx = gamma / sqrt(var + eps) * dz with frozen statistics (training=False). Where the activation has a kink
    the slope is that of its left side: relu'(0) = 0.

    Parameters
    ----------
    dy : array of x's shape and dtype, any strides
    cache : Cache
        It may be used more than once.
    out : array of x's shape and dtype, or None
        Where dx goes. It may not share memory with dy, x or the residual.
    backend : "c", "numba", "numpy" or None

    Returns
    -------
    Gradients
        Unpacks as (dx, dgamma, dbeta); dgamma and dbeta are in the statistics dtype, and None where gamma and beta
        were. `.dresidual` is the residual's gradient, or None; without an activation it is dy itself.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is allowed; nothing has been changed.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [2.0], [6.0]]), np.array([2.0]))
    >>> dx, dgamma, dbeta = fastbn.backward(np.array([[1.0], [0.0], [0.0]]), cache)
    >>> bool(abs(dx.sum()) < 1e-12), dbeta is None
    (True, True)
    """
    chosen, threads = select(backend), _config.get_num_threads()
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: got {type(cache).__name__}; allowed: the cache that fastbn.forward returned")
    express = getattr(chosen, "express_backward", None)
    if express is not None:
        gradients = express(dy, *cache._parts, out, threads)
        if gradients is not None:
            return Gradients(*gradients)
    return _backward(dy, cache._parts, out, chosen, threads)


def _backward(dy: Array, parts: _Parts, out: Array | None, chosen: Backend, threads: int) -> Gradients:
    x, activation = parts.x, _check.activation(parts.activation)
    layout = layout_of(x, parts.axis % x.ndim)
    dy = _check.like("dy", dy, x)
    out = _check.out(out, x, {"dy": dy, "x": x, "residual": parts.residual})
    channels, statistics = layout.shape[1], STATISTICS[x.dtype]
    target = _Target(out, x, layout)
    dgamma = np.empty(channels, statistics) if parts.has_gamma else None
    dbeta = np.empty(channels, statistics) if parts.has_beta else None
    residual = None if parts.residual is None else layout.gather(parts.residual)
    dresidual = None if residual is None or activation is Activation.IDENTITY else _Target(None, x, layout)
    written = None if dresidual is None else dresidual.view
    chosen.backward(
        layout.gather(dy.astype(x.dtype, copy=False)),
        layout.gather(x),
        residual,
        parts.saved,
        parts.frozen,
        activation,
        target.view,
        written,
        dgamma,
        dbeta,
        threads,
    )
    dx = target.finish(layout)
    if dresidual is not None:
        return Gradients(dx, dgamma, dbeta, dresidual.finish(layout))
    return Gradients(dx, dgamma, dbeta, None if residual is None else dy)
