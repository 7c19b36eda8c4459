"""How does jitted code check the arguments of a call, and reach the C functions? What `fastbn.numba` is made of.

A wrong type is refused when a function is compiled, and a wrong shape or value when it runs.
"""

import functools
import os
from collections.abc import Callable, Container
from typing import Any, NoReturn

import numpy as np
from llvmlite import binding  # type: ignore[import-untyped]
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

from ..call.activations import BY_NAME, DEFAULT_SLOPES, name_and_slope
from ..call.checks import ACTIVATIONS as _ALLOWED
from . import select
from .jit import jit

Array = np.ndarray

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
c_infer, c_forward, c_backward = map(_external, ("infer", "forward", "backward"))

if hasattr(os, "register_at_fork"):  # in a forked process, GNU OpenMP would wait forever for the parent's threads
    os.register_at_fork(after_in_child=_BRIDGE.use_one_thread)

# What is known when a function is compiled ---------------------------------------------------------------------------

_DTYPES = {types.float32: _IN_C["FBN_F32"], types.float64: _IN_C["FBN_F64"]}
ACTIVATION_NAMES = tuple(name or "" for name in BY_NAME)  # in the order of their codes
_TAKE_SLOPE = tuple(name in DEFAULT_SLOPES for name in BY_NAME)
_SLOPES = tuple(name_and_slope(name)[1] for name in BY_NAME)


def by_type(choose: Callable[..., Any]) -> Any:
    """A function for jitted code: `choose` gets the types of its arguments and returns the function to compile."""

    @functools.wraps(choose)
    def function(*arguments: Any) -> Any:
        raise TypeError("only jitted code can call this function")

    overload(function, strict=False)(choose)
    return function


def refuse(name: str, given: object, allowed: str) -> NoReturn:
    raise TypingError(f"{name}: got {given}; allowed: {allowed}")


def _is_none(given: Any) -> bool:
    return isinstance(given, types.NoneType) or (isinstance(given, types.Omitted) and given.value is None)


def expect_array(name: str, given: Any, dtypes: Container[Any], allowed: str) -> None:
    if not isinstance(given, types.Array) or given.dtype not in dtypes or given.layout != "C" or not given.aligned:
        refuse(name, given, f"a C-contiguous array of {allowed}")


def _expect_like(name: str, given: Any, x: Any) -> None:
    expect_array(name, given, (x.dtype,), f"x's dtype {x.dtype}")
    if given.ndim != x.ndim:
        refuse(name, f"{given.ndim} dimensions", f"x's {x.ndim}")


def _statistics(x: Any) -> Any:
    return types.float64 if x.dtype == types.float64 else types.float32


def expect_batch(name: str, x: Any) -> None:
    expect_array(name, x, _DTYPES, "float32 or float64")
    if x.ndim < 2:
        refuse(name, f"{x.ndim} dimensions", "2 or more")


@by_type
def dtype_code(x: Any) -> Any:
    """The number of x's dtype in fastbn.h."""
    expect_batch("x", x)
    code = _DTYPES[x.dtype]
    return lambda x: code


@by_type
def address_of(array: Any) -> Any:
    """The address of an array's first element; 0 for None."""
    return (lambda array: 0) if _is_none(array) else (lambda array: array.ctypes.data)


@by_type
def extent(array: Any) -> Any:
    """The addresses where an array begins and ends; (0, 0) for None."""
    if _is_none(array):
        return lambda array: (np.uint64(0), np.uint64(0))
    return lambda array: (np.uint64(array.ctypes.data), np.uint64(array.ctypes.data + array.nbytes))


@by_type
def or_none(array: Any) -> Any:
    """The array itself, or None for an argument that was left out."""
    return (lambda array: None) if _is_none(array) else (lambda array: array)


@by_type
def is_writable(array: Any) -> Any:
    """Whether jitted code may write to an array; True for None."""
    writable = _is_none(array) or array.mutable
    return lambda array: writable


@by_type
def result_for(out: Any, x: Any) -> Any:
    """The array for y or dx: out, or a new array if out is None."""
    if _is_none(out):
        return lambda out, x: np.empty_like(x)
    _expect_like("out", out, x)
    if not out.mutable:
        refuse("out", "a read-only array", "a writable one")

    def result(out: Array, x: Array) -> Array:
        if out.shape != x.shape:
            raise ValueError("out: got another shape; allowed: x's shape")
        return out

    return result


@by_type
def gradient_of_residual(residual: Any, dy: Any) -> Any:
    """The array for the residual's gradient: a copy of dy, which it is without an activation; None for None."""
    return (lambda residual, dy: None) if _is_none(residual) else (lambda residual, dy: dy.copy())


@by_type
def statistics_like(x: Any, channels: Any) -> Any:
    """A new array of one value per channel, in x's statistics dtype."""
    dtype = np.float64 if _statistics(x) == types.float64 else np.float32
    return lambda x, channels: np.empty(channels, dtype)


def _per_channel(name: str) -> Any:
    """A function that checks an array of one value per channel, in x's statistics dtype, and returns its address."""

    def choose(array: Any, x: Any, channels: Any) -> Any:
        if _is_none(array):
            return lambda array, x, channels: 0
        dtype = _statistics(x)
        expect_array(name, array, (dtype,), f"x's statistics dtype {dtype}")
        if array.ndim != 1:
            refuse(name, f"{array.ndim} dimensions", "1")

        def address(array: Array, x: Array, channels: int) -> Any:
            if array.size != channels:
                _wrong_size(name, array.size, channels)
            return array.ctypes.data

        return address

    return by_type(choose)


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

    return by_type(choose)


gamma_at, beta_at, mean_at, var_at = map(_per_channel, ("gamma", "beta", "running_mean", "running_var"))
residual_at, dy_at, cached_residual_at = map(_like_x, ("residual", "dy", "cache.residual"))


@by_type
def code_and_slope_of(activation: Any) -> Any:
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
        refuse("activation", activation, _ALLOWED)

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
def too_few(values: int) -> None:
    raise ValueError(f"x: got {values} values per channel; allowed: 2 or more to train")


@_jit
def expect_threads(threads: int) -> None:
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"threads: got {threads}; allowed: 1 to {_MOST_THREADS}")


_MOST_THREADS = _IN_C["FBN_MOST_THREADS"]


@_jit
def expect_apart(name: str, written: Any, others: Any) -> None:
    """Raises if memory that is written overlaps one of the others, which are pairs of a name and an extent."""
    for other, extent in others:
        if max(written[0], extent[0]) < min(written[1], extent[1]):
            raise ValueError(f"{name}: got memory shared with {other}; allowed: an array of its own")


@_jit
def _code(name: str) -> int:
    for code in range(1, len(ACTIVATION_NAMES)):
        if name == ACTIVATION_NAMES[code]:
            return code
    raise ValueError(f"activation: got {name}; allowed: {_ALLOWED}")


@_jit
def three_of(x: Array, axis: int, name: str = "axis") -> tuple[int, int, int]:
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
def expect_ok(status: int) -> None:
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
