"""How does jitted code normalize? Functions to call inside @numba.njit, which run the C kernels by their addresses.

`infer`, `forward` and `backward` may be called in nopython mode, in loops and by several threads (nogil=True, prange),
and also from plain Python. They take C-contiguous arrays of float32 and float64 (Numba has no 16-bit floats on CPUs).
Results are those of the functions of `fastbn`, bit for bit, with these differences:

- Parameters and statistics have the statistics dtype: float64 for float64, and float32 for float32.
- `threads=` is how many threads one call may use, by default 1. `fastbn.set_num_threads` has no effect on it.
- `forward` returns (y, cache), where cache is a named tuple of arrays and numbers. It takes no mask, and no out=x.
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

import functools
import os
from collections.abc import Callable, Container
from typing import Any, NamedTuple, NoReturn

import numpy as np

try:
    from numba import types
except ImportError as error:
    raise ImportError('fastbn.numba needs Numba: pip install "fastbn[numba]"') from error
from llvmlite import binding  # type: ignore[import-untyped]
from numba.core.errors import TypingError
from numba.extending import overload

from ._backends import SAVED_ROWS, select
from ._backends.jit import jit
from .call.activations import BY_NAME, DEFAULT_SLOPES, name_and_slope
from .call.checks import ACTIVATIONS as _ALLOWED

Array = np.ndarray

__all__ = ["Cache", "Forward", "Gradients", "backward", "forward", "infer"]


def __dir__() -> list[str]:
    return sorted(__all__)


class Cache(NamedTuple):
    """What `backward` needs of a `forward` call. It refers to x and the residual, which must not change until then.

    `backward` raises if a field was replaced by a value that does not fit. It cannot detect arrays in the other byte
    order: Numba treats them as native if they are in a tuple that comes from Python.
    """

    x: Array
    residual: Array | None
    saved: Array
    """Rows of float64, one value per channel: mean, mean_low, var, 1/sqrt(var + eps), gamma, beta."""
    axis: int
    activation: int
    slope: float
    frozen: bool


class Forward(NamedTuple):
    """What `forward` returns."""

    y: Array
    cache: Cache


class Gradients(NamedTuple):
    """What `backward` returns."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array | None


# The C functions -----------------------------------------------------------------------------------------------------

_BRIDGE: Any = select("c")
_IN_C = _BRIDGE.numbers()


def _external(verb: str) -> Any:
    """The function of flat.pxi for a verb. Its symbol names the signature, so that code on disk finds no other one."""
    address, signature = _BRIDGE.flat()[verb]
    name = f"fastbn_{verb}_{signature}"
    binding.add_symbol(name, address)
    return types.ExternalFunction(name, types.int64(*map(_TYPES.__getitem__, signature)))


_TYPES = {"i": types.int64, "d": types.float64, "p": types.uintp}
_infer, _forward, _backward = map(_external, ("infer", "forward", "backward"))

if hasattr(os, "register_at_fork"):  # in a forked process, GNU OpenMP would wait forever for the parent's threads
    os.register_at_fork(after_in_child=_BRIDGE.use_one_thread)

# What is known when a function is compiled ---------------------------------------------------------------------------

_DTYPES = {types.float32: _IN_C["FBN_F32"], types.float64: _IN_C["FBN_F64"]}
_ACTIVATIONS = tuple(name or "" for name in BY_NAME)  # in the order of their codes
_TAKE_SLOPE = tuple(name in DEFAULT_SLOPES for name in BY_NAME)
_SLOPES = tuple(name_and_slope(name)[1] for name in BY_NAME)


def _by_type(choose: Callable[..., Any]) -> Any:
    """A function for jitted code: `choose` gets the types of its arguments and returns the function to compile."""

    @functools.wraps(choose)
    def function(*arguments: Any) -> Any:
        raise TypeError("only jitted code can call this function")

    overload(function, strict=False)(choose)
    return function


def _refuse(name: str, given: object, allowed: str) -> NoReturn:
    raise TypingError(f"{name}: got {given}; allowed: {allowed}")


def _is_none(given: Any) -> bool:
    return isinstance(given, types.NoneType) or (isinstance(given, types.Omitted) and given.value is None)


def _expect_array(name: str, given: Any, dtypes: Container[Any], allowed: str) -> None:
    if not isinstance(given, types.Array) or given.dtype not in dtypes or given.layout != "C" or not given.aligned:
        _refuse(name, given, f"a C-contiguous array of {allowed}")


def _expect_like(name: str, given: Any, x: Any) -> None:
    _expect_array(name, given, (x.dtype,), f"x's dtype {x.dtype}")
    if given.ndim != x.ndim:
        _refuse(name, f"{given.ndim} dimensions", f"x's {x.ndim}")


def _statistics(x: Any) -> Any:
    return types.float64 if x.dtype == types.float64 else types.float32


def _expect_batch(name: str, x: Any) -> None:
    _expect_array(name, x, _DTYPES, "float32 or float64")
    if x.ndim < 2:
        _refuse(name, f"{x.ndim} dimensions", "2 or more")


@_by_type
def _dtype_code(x: Any) -> Any:
    """The number of x's dtype in fastbn.h."""
    _expect_batch("x", x)
    code = _DTYPES[x.dtype]
    return lambda x: code


_INTEGER, _FLOAT, _BOOL = (types.Integer, "an integer"), (types.Float, "a float"), (types.Boolean, "a bool")
_NUMBERS = {"axis": _INTEGER, "activation": _INTEGER, "slope": _FLOAT, "frozen": _BOOL}


@_by_type
def _expect_types_of(cache: Any) -> Any:
    """Raises unless the fields of a cache have the types that `forward` gives them: a field may have been replaced."""
    if not isinstance(cache, types.NamedTuple) or cache.instance_class is not Cache:
        _refuse("cache", cache, "the cache that forward returned")
    given = dict(zip(cache.fields, cache.types, strict=True))
    _expect_batch("cache.x", given["x"])
    _expect_array("cache.saved", given["saved"], (types.float64,), "float64")
    if given["saved"].ndim != 2:
        _refuse("cache.saved", f"{given['saved'].ndim} dimensions", "2")
    for name, (kind, allowed) in _NUMBERS.items():
        if not isinstance(given[name], kind):
            _refuse(f"cache.{name}", given[name], allowed)
    return lambda cache: None


@_by_type
def _address_of(array: Any) -> Any:
    """The address of an array's first element; 0 for None."""
    return (lambda array: 0) if _is_none(array) else (lambda array: array.ctypes.data)


@_by_type
def _extent(array: Any) -> Any:
    """The addresses where an array begins and ends; (0, 0) for None."""
    if _is_none(array):
        return lambda array: (np.uint64(0), np.uint64(0))
    return lambda array: (np.uint64(array.ctypes.data), np.uint64(array.ctypes.data + array.nbytes))


@_by_type
def _or_none(array: Any) -> Any:
    """The array itself, or None for an argument that was left out."""
    return (lambda array: None) if _is_none(array) else (lambda array: array)


@_by_type
def _is_writable(array: Any) -> Any:
    """Whether jitted code may write to an array; True for None."""
    writable = _is_none(array) or array.mutable
    return lambda array: writable


@_by_type
def _result(out: Any, x: Any) -> Any:
    """The array for y or dx: out, or a new array if out is None."""
    if _is_none(out):
        return lambda out, x: np.empty_like(x)
    _expect_like("out", out, x)
    if not out.mutable:
        _refuse("out", "a read-only array", "a writable one")

    def result(out: Array, x: Array) -> Array:
        if out.shape != x.shape:
            raise ValueError("out: got another shape; allowed: x's shape")
        return out

    return result


@_by_type
def _gradient_of_residual(residual: Any, dy: Any) -> Any:
    """The array for the residual's gradient: a copy of dy, which it is without an activation; None for None."""
    return (lambda residual, dy: None) if _is_none(residual) else (lambda residual, dy: dy.copy())


@_by_type
def _statistics_like(x: Any, channels: Any) -> Any:
    """A new array of one value per channel, in x's statistics dtype."""
    dtype = np.float64 if _statistics(x) == types.float64 else np.float32
    return lambda x, channels: np.empty(channels, dtype)


def _per_channel(name: str) -> Any:
    """A function that checks an array of one value per channel, in x's statistics dtype, and returns its address."""

    def choose(array: Any, x: Any, channels: Any) -> Any:
        if _is_none(array):
            return lambda array, x, channels: 0
        dtype = _statistics(x)
        _expect_array(name, array, (dtype,), f"x's statistics dtype {dtype}")
        if array.ndim != 1:
            _refuse(name, f"{array.ndim} dimensions", "1")

        def address(array: Array, x: Array, channels: int) -> Any:
            if array.size != channels:
                _wrong_size(name, array.size, channels)
            return array.ctypes.data

        return address

    return _by_type(choose)


def _like_x(name: str) -> Any:
    """A function that checks an array of x's shape and dtype, and returns its address."""

    def choose(array: Any, x: Any) -> Any:
        if _is_none(array):
            return lambda array, x: 0
        _expect_like(name, array, x)

        def address(array: Array, x: Array) -> Any:
            if array.shape != x.shape:
                raise ValueError(f"{name}: got another shape; allowed: x's shape")
            return array.ctypes.data

        return address

    return _by_type(choose)


_gamma, _beta, _mean, _var = map(_per_channel, ("gamma", "beta", "running_mean", "running_var"))
_residual, _dy, _residual_in_cache = map(_like_x, ("residual", "dy", "cache.residual"))


@_by_type
def _code_and_slope(activation: Any) -> Any:
    """The number in fastbn.h and the slope of an activation."""
    if _is_none(activation):
        return lambda activation: (0, 0.0)
    text = (types.UnicodeType, types.StringLiteral)
    if isinstance(activation, text):

        def code_and_usual_slope(activation: str) -> tuple[int, float]:
            code = _code(activation)
            return code, _SLOPES[code]

        return code_and_usual_slope
    pair = isinstance(activation, types.BaseTuple) and len(activation) == 2
    if not pair or not isinstance(activation[0], text) or not isinstance(activation[1], types.Number):
        _refuse("activation", activation, _ALLOWED)

    def code_and_slope(activation: Any) -> tuple[int, float]:
        code = _code(activation[0])
        if not _TAKE_SLOPE[code]:
            raise ValueError(f"activation: got ({activation[0]}, slope); allowed: {_ALLOWED}")
        return code, float(activation[1])

    return code_and_slope


# What is known when it runs ------------------------------------------------------------------------------------------

_jit = jit(nogil=True, cache=True)


@_jit
def _wrong_size(name: str, got: int, allowed: int) -> None:
    raise ValueError(f"{name}: got {got} values; allowed: {allowed}, one per channel of x")


@_jit
def _wrong_axis(name: str, axis: int, dimensions: int) -> None:
    raise ValueError(f"{name}: got {axis}; allowed: {-dimensions} to {dimensions - 1}")


@_jit
def _too_few(values: int) -> None:
    raise ValueError(f"x: got {values} values per channel; allowed: 2 or more to train")


@_jit
def _expect_threads(threads: int) -> None:
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"threads: got {threads}; allowed: 1 to {_MOST_THREADS}")


_MOST_THREADS = _IN_C["FBN_MOST_THREADS"]


@_jit
def _expect_apart(name: str, written: Any, others: Any) -> None:
    """Raises if memory that is written overlaps one of the others, which are pairs of a name and an extent."""
    for other, extent in others:
        if max(written[0], extent[0]) < min(written[1], extent[1]):
            raise ValueError(f"{name}: got memory shared with {other}; allowed: an array of its own")


@_jit
def _code(name: str) -> int:
    for code in range(1, len(_ACTIVATIONS)):
        if name == _ACTIVATIONS[code]:
            return code
    raise ValueError(f"activation: got {name}; allowed: {_ALLOWED}")


@_jit
def _three_of(x: Array, axis: int, name: str = "axis") -> tuple[int, int, int]:
    """The sizes (outer, channels, inner) of x, as in call/shape.py."""
    at = axis + x.ndim if axis < 0 else axis
    if not 0 <= at < x.ndim:
        _wrong_axis(name, axis, x.ndim)
    if x.shape[at] == 1:
        return 1, 1, x.size
    outer = inner = 1
    for i in range(x.ndim):
        if i < at:
            outer *= x.shape[i]
        elif i > at:
            inner *= x.shape[i]
    return outer, x.shape[at], inner


@_jit
def _expect_cache(
    saved: tuple[int, int], activation: int, slope: float, frozen: bool, channels: int, values: int
) -> None:
    """Raises unless a cache has values that `forward` may give. `saved` is the shape of cache.saved."""
    rows, columns = saved
    if rows != _ROWS or columns != channels:
        raise ValueError(f"cache.saved: got shape ({rows}, {columns}); allowed: ({_ROWS}, {channels}) for this x")
    if not 0 <= activation < len(_ACTIVATIONS):
        raise ValueError(f"cache.activation: got {activation}; allowed: 0 to {len(_ACTIVATIONS) - 1}")
    if not np.isfinite(slope):
        raise ValueError("cache.slope: got a number that is not finite; allowed: a finite number")
    if values < 2 and not frozen:
        raise ValueError(f"cache.x: got {values} values per channel; allowed: 2 or more where frozen is False")


_ROWS = len(SAVED_ROWS)


@_jit
def _expect(status: int) -> None:
    """Raises an error for a status of the C API other than FBN_OK."""
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    if status == _MISALIGNED:  # Numba does not notice this for arrays in a tuple that comes from Python
        raise ValueError("x, cache: got an array that is not aligned; allowed: aligned ones")
    if status == _OVERLAP:
        raise ValueError("out: got memory shared with an input; allowed: an array of its own, or x itself for infer")
    if status == _BAD_ACTIVATION:
        raise ValueError("activation: got a slope that is not finite; allowed: a finite number")
    if status == _BAD_EPS:
        raise ValueError("eps: got a number that is negative or not finite; allowed: finite and >= 0")
    if status == _BAD_MOMENTUM:
        raise ValueError("momentum: got a number outside 0 to 1; allowed: 0 to 1")
    if status:
        raise RuntimeError("fastbn.h refuses the call")


_NO_MEMORY, _MISALIGNED, _OVERLAP = (_IN_C[name] for name in ("NO_MEMORY", "FBN_MISALIGNED", "FBN_OVERLAP"))
_BAD_ACTIVATION, _BAD_EPS, _BAD_MOMENTUM = (_IN_C[f"FBN_BAD_{name}"] for name in ("ACTIVATION", "EPS", "MOMENTUM"))


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
    """`fastbn.infer` in jitted code: returns y. `out` may be x itself. See help(fastbn.numba)."""
    dtype = _dtype_code(x)
    outer, channels, inner = _three_of(x, axis)
    _expect_threads(threads)
    code, slope = _code_and_slope(activation)
    g, b = _gamma(gamma, x, channels), _beta(beta, x, channels)
    mean, var = _mean(running_mean, x, channels), _var(running_var, x, channels)
    added = _residual(residual, x)
    if running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: got None; allowed: arrays for both")
    parameters = ("gamma", _extent(gamma)), ("beta", _extent(beta))
    statistics = ("running_mean", _extent(running_mean)), ("running_var", _extent(running_var))
    _expect_apart("out", _extent(out), parameters + statistics)
    y: Array = _result(out, x)
    at, to = _address_of(x), _address_of(y)
    _expect(_infer(dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, to, 0))
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
    """`fastbn.forward` in jitted code: returns (y, cache). See help(fastbn.numba)."""
    dtype = _dtype_code(x)
    outer, channels, inner = _three_of(x, axis)
    _expect_threads(threads)
    code, slope = _code_and_slope(activation)
    g, b = _gamma(gamma, x, channels), _beta(beta, x, channels)
    mean, var = _mean(running_mean, x, channels), _var(running_var, x, channels)
    added = _residual(residual, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: got one of them; allowed: both or neither")
    parameters = ("gamma", _extent(gamma)), ("beta", _extent(beta))
    statistics = ("running_mean", _extent(running_mean)), ("running_var", _extent(running_var))
    _expect_apart("out", _extent(out), parameters + statistics)
    if training:
        if outer * inner < 2:
            _too_few(outer * inner)
        if not (_is_writable(running_mean) and _is_writable(running_var)):
            raise ValueError("running_mean, running_var: got a read-only array; allowed: writable ones")
        inputs = (("x", _extent(x)), ("residual", _extent(residual)), *parameters)
        _expect_apart("running_mean", _extent(running_mean), inputs + statistics[1:])
        _expect_apart("running_var", _extent(running_var), inputs)
    elif running_mean is None:
        raise ValueError("running_mean, running_var: got None; allowed: arrays where training is not True")
    y: Array = _result(out, x)
    if x.size and _address_of(y) == _address_of(x):
        raise ValueError("out: got x itself; allowed: an array of its own")
    saved = np.empty((_ROWS, channels))
    at, to, kept = _address_of(x), _address_of(y), _address_of(saved)
    if training:
        status = _forward(
            dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, momentum, to, kept
        )
    else:
        status = _infer(dtype, code, slope, outer, channels, inner, threads, at, added, g, b, eps, mean, var, to, kept)
    _expect(status)
    return Forward(y, Cache(x, _or_none(residual), saved, axis, code, slope, not training))


@_jit
def backward(dy: Array, cache: Cache, out: Array | None = None, threads: int = 1) -> Gradients:
    """`fastbn.backward` in jitted code: returns (dx, dgamma, dbeta, dresidual). See help(fastbn.numba)."""
    _expect_types_of(cache)
    x = cache.x
    outer, channels, inner = _three_of(x, cache.axis, "cache.axis")
    _expect_cache(cache.saved.shape, cache.activation, cache.slope, cache.frozen, channels, outer * inner)
    _expect_threads(threads)
    added, upstream = _residual_in_cache(cache.residual, x), _dy(dy, x)
    _expect_apart("out", _extent(out), (("cache.saved", _extent(cache.saved)),))
    dx, dresidual = _result(out, x), _gradient_of_residual(cache.residual, dy)
    dgamma, dbeta = _statistics_like(x, channels), _statistics_like(x, channels)
    dtype, code, slope, frozen = _dtype_code(x), cache.activation, cache.slope, cache.frozen
    at, kept, to, to_residual = _address_of(x), _address_of(cache.saved), _address_of(dx), _address_of(dresidual)
    to_gamma, to_beta = _address_of(dgamma), _address_of(dbeta)
    status = _backward(
        dtype, code, slope, outer, channels, inner, threads, upstream, at, added, kept, frozen, to, to_residual,
        to_gamma, to_beta,
    )  # fmt: skip
    _expect(status)
    return Gradients(dx, dgamma, dbeta, dresidual)
