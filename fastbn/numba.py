"""How does jitted code normalize? Functions to call inside @numba.njit, which run the C kernels by their addresses.

`infer`, `forward` and `backward` may be called in nopython mode, in loops and by several threads (nogil=True, prange),
and also from plain Python. They take C-contiguous arrays of float32 and float64 (Numba has no 16-bit floats on CPUs).
Results are those of fastbn's own functions, bit for bit, with these differences:

- Parameters and statistics have the statistics dtype: float64 for float64, and float32 for float32.
- `threads=` is how many threads one call may use, by default 1. `fastbn.set_num_threads` has no effect on it.
- `forward` returns (y, cache), where cache is a named tuple of arrays and numbers. It takes no mask, moments,
  virtual_batch_size or correction, which is 1, and no out=x.
- `backward` returns (dx, dgamma, dbeta, dresidual), always with dgamma and dbeta; dresidual is None without a residual.

A wrong dtype or memory layout raises TypingError when the function is compiled. A wrong shape or value raises
ValueError when it runs, before anything is changed. A function that calls these may be kept on disk (cache=True) if its
module imports fastbn.numba; clear that cache after an update of fastbn, which Numba does not notice.

>>> import numba, numpy as np, fastbn.numba as fbn
>>> @numba.njit(nogil=True)
... def step(x, gamma, beta, mean, var):
...     y, cache = fbn.forward(x, gamma, beta, mean, var, activation="relu")
...     return fbn.backward(np.ones_like(y), cache).dgamma
>>> step(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1), np.zeros(1), np.ones(1)).round(3)
array([1.])
"""

from typing import Any, NamedTuple

import numpy as np

try:
    from numba import types
except ImportError as error:
    raise ImportError('fastbn.numba needs Numba: pip install "fastbn[numba]"') from error

from ._backends import SAVED_ROWS
from ._backends.jit import jit
from ._backends.jit_calls import (
    ACTIVATION_NAMES,
    address_of,
    beta_at,
    by_type,
    c_backward,
    c_forward,
    c_infer,
    cached_residual_at,
    code_and_slope_of,
    dtype_code,
    dy_at,
    expect_apart,
    expect_array,
    expect_batch,
    expect_ok,
    expect_threads,
    extent,
    gamma_at,
    gradient_of_residual,
    is_writable,
    mean_at,
    or_none,
    refuse,
    residual_at,
    result_for,
    statistics_like,
    three_of,
    too_few,
    var_at,
)

Array = np.ndarray

__all__ = ["Cache", "Forward", "Gradients", "backward", "forward", "infer"]


def __dir__() -> list[str]:
    return sorted(__all__)


class Cache(NamedTuple):
    """What `backward` needs of a `forward` call. It refers to x and the residual, which must not change until then.

    `backward` raises if a field was replaced by a value that does not fit. It cannot detect arrays in the other byte
    order: Numba treats them as native if they are in a tuple that comes from Python.

    Attributes
    ----------
    x, residual : the arrays of the call; residual is None without one
    saved : array of float64, shape (6, C)
        The rows are mean, mean_low, var, 1/sqrt(var + eps), gamma and beta.
    axis : int
        The channel axis, as it was given.
    activation, slope : int and float
        The activation's number in fastbn.h, and its slope.
    frozen : bool
        Whether the statistics were the running ones (training=False).
    """

    x: Array
    residual: Array | None
    saved: Array
    axis: int
    activation: int
    slope: float
    frozen: bool


class Forward(NamedTuple):
    """The result of `forward`, which unpacks as (y, cache).

    Attributes
    ----------
    y : array of x's shape and dtype
        `out` itself if that was given.
    cache : Cache
        What `backward` needs.
    """

    y: Array
    cache: Cache


class Gradients(NamedTuple):
    """The result of `backward`, which unpacks as (dx, dgamma, dbeta, dresidual).

    Attributes
    ----------
    dx : array of x's shape and dtype
        `out` itself if that was given.
    dgamma, dbeta : arrays of shape (C,) in the statistics dtype
        Those of ones and zeros where gamma and beta were None.
    dresidual : array of x's shape and dtype, or None
        None without a residual.
    """

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array | None


# What a cache may hold -----------------------------------------------------------------------------------------------

_jit = jit(nogil=True, cache=True)

_INTEGER, _FLOAT, _BOOL = (types.Integer, "an integer"), (types.Float, "a float"), (types.Boolean, "a bool")
_NUMBERS = {"axis": _INTEGER, "activation": _INTEGER, "slope": _FLOAT, "frozen": _BOOL}


@by_type
def _expect_types_of(cache: Any) -> Any:
    """Raises unless the fields of a cache have the types that `forward` gives them: a field may have been replaced."""
    if not isinstance(cache, types.NamedTuple) or cache.instance_class is not Cache:
        refuse("cache", cache, "the cache that forward returned")
    given = dict(zip(cache.fields, cache.types, strict=True))
    expect_batch("cache.x", given["x"])
    expect_array("cache.saved", given["saved"], (types.float64,), "float64")
    if given["saved"].ndim != 2:
        refuse("cache.saved", f"{given['saved'].ndim} dimensions", "2")
    for name, (kind, allowed) in _NUMBERS.items():
        if not isinstance(given[name], kind):
            refuse(f"cache.{name}", given[name], allowed)
    return lambda cache: None


@_jit
def _expect_cache(
    saved: tuple[int, int], activation: int, slope: float, frozen: bool, channels: int, values: int
) -> None:
    """Raises unless a cache has values that `forward` may give. `saved` is the shape of cache.saved."""
    rows, columns = saved
    if rows != _ROWS or columns != channels:
        raise ValueError(f"cache.saved: got shape ({rows}, {columns}); allowed: ({_ROWS}, {channels}) for this x")
    if not 0 <= activation < len(ACTIVATION_NAMES):
        raise ValueError(f"cache.activation: got {activation}; allowed: 0 to {len(ACTIVATION_NAMES) - 1}")
    if not np.isfinite(slope):
        raise ValueError("cache.slope: got a number that is not finite; allowed: a finite number")
    if values < 2 and not frozen:
        raise ValueError(f"cache.x: got {values} values per channel; allowed: 2 or more where frozen is False")


_ROWS = len(SAVED_ROWS)

# The functions -------------------------------------------------------------------------------------------------------


@_jit
def infer(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | tuple[str, float] | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """Batch normalization with given statistics, in jitted code: `fastbn.infer`.

    Parameters
    ----------
    x : C-contiguous array of float32 or float64, at least 2-D
    gamma, beta : arrays of shape (C,) in x's dtype, or None for ones and zeros
    running_mean, running_var : arrays of shape (C,) in x's dtype
    eps, axis, activation
        As in `fastbn.infer`.
    residual : array of x's shape and dtype, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where to write y: x itself, or memory that no input shares.
    threads : int, 1 to 1024
        The most threads that the call may use.

    Returns
    -------
    array
        y, of x's shape and dtype; it is `out` if that is given.

    Raises
    ------
    TypingError
        When the calling function is compiled: a wrong dtype, memory layout or number of dimensions.
    ValueError
        When it runs: a wrong shape or value. Nothing has been changed.

    >>> import numba, numpy as np, fastbn.numba
    >>> @numba.njit
    ... def relu_of_norm(x, mean, var):
    ...     return fastbn.numba.infer(x, None, None, mean, var, eps=0.0, activation="relu")
    >>> mean, var = np.array([2.0, 20.0]), np.array([1.0, 100.0])
    >>> relu_of_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), mean, var)
    array([[0., 0.],
           [1., 1.]])
    """
    dtype = dtype_code(x)
    outer, channels, inner = three_of(x, axis)
    expect_threads(threads)
    code, slope = code_and_slope_of(activation)
    g, b = gamma_at(gamma, x, channels), beta_at(beta, x, channels)
    mean, var = mean_at(running_mean, x, channels), var_at(running_var, x, channels)
    added = residual_at(residual, x)
    if running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: got None; allowed: arrays for both")
    parameters = ("gamma", extent(gamma)), ("beta", extent(beta))
    statistics = ("running_mean", extent(running_mean)), ("running_var", extent(running_var))
    expect_apart("out", extent(out), parameters + statistics)
    y: Array = result_for(out, x)
    at, to = address_of(x), address_of(y)
    expect_ok(c_infer(dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, to, 0))
    return y


@_jit
def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | tuple[str, float] | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    threads: int = 1,
) -> Forward:
    """Batch normalization, ready for `backward`, in jitted code: `fastbn.forward`.

    Parameters
    ----------
    x : C-contiguous array of float32 or float64, at least 2-D
    gamma, beta : arrays of shape (C,) in x's dtype, or None for ones and zeros
    running_mean, running_var : arrays of shape (C,) in x's dtype, both or neither
        Training updates them in place, the variance with the unbiased one of the batch.
    training : bool
        False normalizes with the running statistics, which are then required and do not change.
    momentum, eps, axis, activation
        As in `fastbn.forward`.
    residual : array of x's shape and dtype, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where to write y: memory that no input shares.
    threads : int, 1 to 1024
        The most threads that the call may use.

    Returns
    -------
    Forward
        Unpacks as (y, cache).

    Raises
    ------
    TypingError
        When the calling function is compiled: a wrong dtype, memory layout or number of dimensions.
    ValueError
        When it runs: a wrong shape or value, and in training fewer than 2 values per channel. Nothing has been changed.

    >>> import numba, numpy as np, fastbn.numba
    >>> @numba.njit
    ... def normalized(x):
    ...     y, cache = fastbn.numba.forward(x, eps=0.0)
    ...     return y
    >>> normalized(np.array([[1.0, 10.0], [3.0, 30.0]]))
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    dtype = dtype_code(x)
    outer, channels, inner = three_of(x, axis)
    expect_threads(threads)
    code, slope = code_and_slope_of(activation)
    g, b = gamma_at(gamma, x, channels), beta_at(beta, x, channels)
    mean, var = mean_at(running_mean, x, channels), var_at(running_var, x, channels)
    added = residual_at(residual, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: got one of them; allowed: both or neither")
    parameters = ("gamma", extent(gamma)), ("beta", extent(beta))
    statistics = ("running_mean", extent(running_mean)), ("running_var", extent(running_var))
    expect_apart("out", extent(out), parameters + statistics)
    if training:
        if outer * inner < 2:
            too_few(outer * inner)
        if not (is_writable(running_mean) and is_writable(running_var)):
            raise ValueError("running_mean, running_var: got a read-only array; allowed: writable ones")
        inputs = (("x", extent(x)), ("residual", extent(residual)), *parameters)
        expect_apart("running_mean", extent(running_mean), inputs + statistics[1:])
        expect_apart("running_var", extent(running_var), inputs)
    elif running_mean is None:
        raise ValueError("running_mean, running_var: got None; allowed: arrays where training is not True")
    y: Array = result_for(out, x)
    if x.size and address_of(y) == address_of(x):
        raise ValueError("out: got x itself; allowed: an array of its own")
    saved = np.empty((_ROWS, channels))
    at, to, kept = address_of(x), address_of(y), address_of(saved)
    if training:
        status = c_forward(
            dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, momentum, to, kept
        )
    else:
        status = c_infer(dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, to, kept)
    expect_ok(status)
    return Forward(y, Cache(x, or_none(residual), saved, axis, code, slope, not training))


@_jit
def backward(dy: Array, cache: Cache, out: Array | None = None, threads: int = 1) -> Gradients:
    """The exact gradient of the `forward` call that made `cache`, in jitted code: `fastbn.backward`.

    Parameters
    ----------
    dy : C-contiguous array of x's shape and dtype
    cache : Cache
        It may be used more than once.
    out : array of x's shape and dtype, or None
        Where to write dx. It may be dy itself.
    threads : int, 1 to 1024
        The most threads that the call may use.

    Returns
    -------
    Gradients
        Unpacks as (dx, dgamma, dbeta, dresidual).

    Raises
    ------
    TypingError
        When the calling function is compiled: a wrong dtype, memory layout or number of dimensions.
    ValueError
        When it runs: a wrong shape or value, and a cache whose fields were replaced by others that do not fit.

    >>> import numba, numpy as np, fastbn.numba
    >>> @numba.njit
    ... def gradient_of_beta(x, dy):
    ...     cache = fastbn.numba.forward(x).cache
    ...     return fastbn.numba.backward(dy, cache).dbeta
    >>> gradient_of_beta(np.array([[1.0], [3.0]]), np.array([[0.5], [2.0]]))
    array([2.5])
    """
    _expect_types_of(cache)
    x = cache.x
    outer, channels, inner = three_of(x, cache.axis, "cache.axis")
    _expect_cache(cache.saved.shape, cache.activation, cache.slope, cache.frozen, channels, outer * inner)
    expect_threads(threads)
    added, upstream = cached_residual_at(cache.residual, x), dy_at(dy, x)
    expect_apart("out", extent(out), (("cache.saved", extent(cache.saved)),))
    dx, dresidual = result_for(out, x), gradient_of_residual(cache.residual, dy)
    dgamma, dbeta = statistics_like(x, channels), statistics_like(x, channels)
    dtype, code, slope, frozen = dtype_code(x), cache.activation, cache.slope, cache.frozen
    at, kept, to, to_residual = address_of(x), address_of(cache.saved), address_of(dx), address_of(dresidual)
    to_gamma, to_beta = address_of(dgamma), address_of(dbeta)
    status = c_backward(
        dtype, code, slope, outer, channels, inner, threads, upstream, at, added, kept, frozen, to, to_residual,
        to_gamma, to_beta,
    )  # fmt: skip
    expect_ok(status)
    return Gradients(dx, dgamma, dbeta, dresidual)
