"""Is the input valid? The checks that calls share, and the form of every message. They never change an argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Number, Real
from typing import Any, NoReturn, TypeVar

import numpy as np

from .activations import BY_NAME, DEFAULT_SLOPES, Activation, name_and_slope
from .dtypes import KINDS, DType, bfloat16, find, is_float, kind_of, native
from .shape import positions_of

Array = np.ndarray[Any, Any]
T = TypeVar("T")


def _names(choices: Iterable[object]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _refuse(error: type[Exception], name: str, given: str, allowed: str) -> NoReturn:
    raise error(f"{name}: got {given}; allowed: {allowed}")


def shown(value: object) -> str:
    """The repr of a value, or its type if the repr fails or is long."""
    try:
        text = repr(value)
    except Exception:  # __repr__ may raise anything; that of an integer with more than 4300 digits fails
        text = ""
    return text if 0 < len(text) <= 300 else f"{type(value).__name__} too long to show"


def kind(value: object) -> str:
    """How messages show a value of the wrong kind: by its type and, if it is a number, string or None, its value."""
    name = type(value).__name__
    return f"{shown(value)} ({name})" if value is None or isinstance(value, str | bytes | Number | np.generic) else name


_LOADED = {
    "dask": "{}.compute(), or fastbn.dask, whose moments and infer take Dask arrays block by block",
    "zarr": "{}[...], or fastbn.dask with dask.array.from_zarr({}), block by block",
    "h5py": "{}[...], or fastbn.dask with dask.array.from_array({}), block by block",
}
"""The packages whose arrays are not in memory, and what is allowed instead of an argument of this name."""


def in_memory(name: str, value: object) -> None:
    """Refuses arrays that are lazy or on disk, which NumPy would load whole. Their packages are not imported."""
    for base in type(value).__mro__:
        allowed = _LOADED.get(str(base.__module__).partition(".")[0])
        if allowed is not None:
            given = f"{qualified(base)}, which is not in memory"
            _refuse(TypeError, name, given, f"a NumPy array, such as {allowed.format(name, name)}")


def qualified(cls: type) -> str:
    """The name of a class with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _array(name: str, value: object, *, loads: bool = False) -> Array:
    """`value` as an array; one on disk only if the caller `loads` values, of which there are few."""
    if isinstance(value, np.ma.MaskedArray):
        _refuse(TypeError, name, "a masked array", "a plain array (see the argument `mask`)")
    if type(value) is np.ndarray:
        return value
    if exports(value):
        from . import dlpack

        return dlpack.array_of(name, value)
    if not loads:
        in_memory(name, value)
    try:
        return np.asarray(value)
    except Exception as error:  # __array__ may raise anything
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: a NumPy array ({error})") from error


def exports(value: object) -> bool:
    """Whether an object that is not an array offers its memory by DLPack, as tensors do."""
    return hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray)


def _ndarray(name: str, value: object, such: str = "") -> Array:
    """`value`, which may be written to, as an array that shares its memory: an array already, or a tensor's."""
    if not isinstance(value, np.ndarray) and not exports(value):
        in_memory(name, value)
        _refuse(TypeError, name, type(value).__name__, f"a NumPy array or a tensor{such}")
    return _array(name, value)


def data(name: str, value: object) -> Array:
    """`value` as an array of a dtype that data can have."""
    array = _array(name, value)
    if find(array.dtype) is None:
        _refuse(TypeError, name, f"dtype {array.dtype}", _names(KINDS))
    return array


def like(name: str, value: object, x: Array) -> Array:
    """`value` as an array of x's shape and dtype, in any byte order."""
    array = data(name, value)
    if native(array.dtype) != native(x.dtype):
        _refuse(TypeError, name, f"dtype {array.dtype}", f"x's dtype {x.dtype}")
    if array.shape != x.shape:
        _refuse(ValueError, name, f"shape {array.shape}", f"x's shape {x.shape}")
    return array


def axis(value: object, x: Array, name: str = "x") -> int:
    """The channel axis, counted from 0, of the argument of this name."""
    if x.ndim < 2:
        _refuse(ValueError, name, f"shape {x.shape}", "at least 2 dimensions")
    index = integer("axis", value)
    if not -x.ndim <= index < x.ndim:
        _refuse(ValueError, "axis", shown(index), f"{-x.ndim} to {x.ndim - 1} for {name} of shape {x.shape}")
    return index % x.ndim


def _shape(name: str, array: Array, channels: int, each: str = "channel of x") -> None:
    if array.shape != (channels,):
        _refuse(ValueError, name, f"shape {array.shape}", f"({channels},), one value per {each}")


def parameter(name: str, value: object, channels: int, each: str = "channel of x") -> Array | None:
    """A parameter (gamma or beta) as an array."""
    if value is None:
        return None
    array = _array(name, value)
    if not is_float(array.dtype):
        _refuse(TypeError, name, f"dtype {array.dtype}", "any float dtype, or None")
    _shape(name, array, channels, each)
    return array


def running(mean: object, var: object, channels: int, *, written: bool) -> tuple[Array | None, Array | None]:
    """The running statistics: both or neither, and writable if they will be written."""
    if mean is None and var is None:
        return None, None
    _both(mean, var)
    return (
        _statistic("running_mean", mean, channels, written),
        _statistic("running_var", var, channels, written),
    )


def _both(mean: object, var: object) -> None:
    if mean is None or var is None:
        missing, present = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        _refuse(ValueError, missing, f"None beside {present}", "both running statistics or neither")


def both_statistics(mean: object, var: object) -> None:
    """Checks that both running statistics are given."""
    if mean is None and var is None:
        statistics_missing("")
    _both(mean, var)


def given_statistics(mean: object, var: object) -> tuple[Array, Array]:
    """Checks running statistics that determine which dtypes and number of channels the data can have."""
    both_statistics(mean, var)
    mean = _ndarray("running_mean", mean)
    if mean.ndim != 1:
        _refuse(ValueError, "running_mean", f"shape {mean.shape}", "(C,), one value per channel")
    first = _statistic("running_mean", mean, mean.size, written=False)
    second = _statistic("running_var", var, mean.size, written=False)
    if kind_of(first.dtype).statistics != kind_of(second.dtype).statistics:
        _refuse(TypeError, "running_var", f"dtype {second.dtype}", f"running_mean's dtype {first.dtype}")
    return first, second


def outputs(weight: Array, output_axis: object, mean: object) -> tuple[int, int, int]:
    """The axis of a weight's output channels, the groups of a transposed convolution (else 1), and the channels.

    The groups follow from the size of `mean`, which has one value per output channel.
    """
    index = integer("output_axis", output_axis)
    if not -weight.ndim <= index < weight.ndim:
        allowed = f"{-weight.ndim} to {weight.ndim - 1} for weight of shape {weight.shape}" if weight.ndim else "none"
        _refuse(ValueError, "output_axis", shown(index), allowed)
    at = index % weight.ndim
    channels, found = weight.shape[at], 0 if mean is None else _array("running_mean", mean).size
    if at != 1 or weight.ndim < 3 or not channels or found <= channels or found % channels:
        return at, 1, channels
    groups = found // channels
    if weight.shape[0] % groups:
        allowed = f"({channels},), or ({channels} * groups,) if groups divides weight.shape[0], {weight.shape[0]}"
        _refuse(ValueError, "running_mean", f"shape ({found},) for weight of shape {weight.shape}", allowed)
    return at, groups, found


def _statistic(name: str, value: object, channels: int, written: bool) -> Array:
    array = data(name, _ndarray(name, value))
    _shape(name, array, channels)
    if written and not array.flags.writeable:
        _refuse(ValueError, name, "a read-only array", "a writable one, since it is updated in place")
    if written and overlaps_itself(array):
        _refuse(ValueError, name, f"strides {array.strides}", "an array whose elements do not overlap")
    return array


def running_apart(inputs: Mapping[str, Array | None]) -> None:
    """Checks that running statistics to update share no memory with each other or with another input."""
    for name in ("running_mean", "running_var"):
        statistic = inputs.get(name)
        for other, array in inputs.items():
            if statistic is None or name == other or not isinstance(array, np.ndarray):
                continue
            if overlap(statistic, array):
                _refuse(ValueError, name, f"memory shared with {other}", "an array of its own")


def statistics_missing(where: str = " where training is not True") -> NoReturn:
    """Refuses a call that has no statistics to normalize with."""
    _refuse(ValueError, "running_mean", "None", f"arrays for running_mean and running_var{where}")


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; True if that is too hard to tell."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # any limit will do
    except np.exceptions.TooHardError:
        return True


def same_memory(a: Array, b: Array) -> bool:
    """Whether a and b, which have the same shape, are the same elements in memory."""
    if a.size and not np.may_share_memory(a, b):  # which is found sooner than their addresses
        return False
    return a is b or (a.ctypes.data == b.ctypes.data and a.strides == b.strides and a.dtype == b.dtype)


def out(value: object, x: Array, inputs: Mapping[str, Array | None], *, may_be: str | None = None) -> Array | None:
    """Checks `out`: x's shape and dtype, any byte order, writable, and apart from the inputs or equal to `may_be`."""
    if value is None:
        return None
    such = "" if isinstance(value, np.ndarray) else f" of x's shape {x.shape} and dtype {x.dtype}"
    array = _ndarray("out", value, such)
    if native(array.dtype) != native(x.dtype):
        _refuse(TypeError, "out", f"dtype {array.dtype}", f"x's dtype {x.dtype}")
    if array.shape != x.shape:
        _refuse(ValueError, "out", f"shape {array.shape}", f"x's shape {x.shape}")
    if not array.flags.writeable:
        _refuse(ValueError, "out", "a read-only array", "a writable one")
    if overlaps_itself(array):
        _refuse(ValueError, "out", f"strides {array.strides}", "an array whose elements do not overlap")
    for name, other in inputs.items():
        if not isinstance(other, np.ndarray) or not overlap(array, other):
            continue
        if name == may_be and same_memory(array, other):
            continue
        _refuse(ValueError, "out", f"memory shared with {name}", _apart(may_be))
    return array


def overlaps_itself(array: Array) -> bool:
    """Whether elements may share memory, since the strides do not nest as those of slices and transposes do."""
    end = array.itemsize
    if array.size and not array.flags.c_contiguous:
        for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
            if size > 1 and stride < end:
                return True
            end += stride * (size - 1)
    return False


def _apart(may_be: str | None) -> str:
    return f"an array of its own, or {may_be} itself" if may_be else "an array of its own"


def number(name: str, value: object, low: float, high: float) -> float:
    """A real number with low <= value <= high."""
    if type(value) is not float and (not isinstance(value, Real | np.floating) or isinstance(value, bool)):
        _refuse(TypeError, name, shown(value), "a real number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not low <= result <= high or math.isinf(result):
        finite = "a finite number" if low == -math.inf else f"finite and >= {low:g}"
        _refuse(ValueError, name, shown(value), f"{low:g} to {high:g}" if high < math.inf else finite)
    return result


def eps(value: object, name: str = "eps") -> float:
    """A finite eps >= 0."""
    return number(name, value, 0, math.inf)


def momentum(value: object) -> float:
    """A momentum from 0 to 1."""
    return number("momentum", value, 0, 1)


def correction(value: object) -> int:
    """The correction of a running variance; `correctable` checks that it is below the count."""
    result = integer("correction", value)
    if result < 0:
        _refuse(ValueError, "correction", shown(value), "an integer from 0 to M - 1, M being the values per channel")
    return result


def correctable(correction: int, counted: int, where: str = "") -> None:
    """Checks that the correction is below the number of values that count."""
    if correction >= counted:
        given = f"{shown(correction)} with M = {counted} values per channel that count{where}"
        _refuse(ValueError, "correction", given, f"an integer from 0 to M - 1, here {counted - 1}")


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        _refuse(TypeError, name, shown(value), "True or False")
    return bool(value)


def activation(value: object) -> tuple[Activation, float]:
    """The activation's code and its slope, which is 0 if it has none."""
    if isinstance(value, str) or value is None:
        if value not in BY_NAME:
            _refuse(ValueError, "activation", shown(value), ACTIVATIONS)
        name, slope = name_and_slope(value)
        return BY_NAME[name], slope
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
        _refuse(TypeError, "activation", shown(value), ACTIVATIONS)
    if value[0] not in DEFAULT_SLOPES:
        _refuse(ValueError, "activation", shown(value), ACTIVATIONS)
    return BY_NAME[value[0]], number("activation's slope", value[1], -math.inf, math.inf)


ACTIVATIONS = ", ".join([_names(BY_NAME), *(f"({name!r}, slope)" for name in DEFAULT_SLOPES)])
"""The activations that are allowed, as messages list them."""


def mask(value: object, x: Array, channel_axis: int) -> Array | None:
    """A mask of the shape of x's positions, or None."""
    if value is None:
        return None
    array = _array("mask", value)
    if array.dtype != np.bool_:
        _refuse(TypeError, "mask", f"dtype {array.dtype}", "bool, or None")
    positions = positions_of(x.shape, channel_axis)
    if array.shape == positions:
        return booleans(array).view()  # a caller may change the shape of the array itself
    try:
        return np.broadcast_to(booleans(array), positions)
    except ValueError:
        allowed = f"one that broadcasts to {positions}, x's shape {x.shape} without its channel axis"
        _refuse(ValueError, "mask", f"shape {array.shape}", allowed)


def booleans(array: Array) -> Array:
    """The array with all nonzero bytes set to 1, since some functions of NumPy do not take others for True."""
    octets = array.view(np.uint8)
    return array if octets.max(initial=0) <= 1 else octets != 0


def enough(x: Array, channel_axis: int, mask: Array | None, where: str = "") -> int:
    """How many values per channel count; training needs 2. `mask` has the shape of the positions, or is None."""
    values = math.prod(positions_of(x.shape, channel_axis))
    if values < 2:
        given = f"shape {x.shape} with {values} value{'s' * (values != 1)} per channel{where}"
        _refuse(ValueError, "x", given, "2 or more to train")
    counted = values if mask is None else int(np.count_nonzero(mask))
    if counted < 2:
        given = f"one that leaves {counted} of the {values} values per channel for x of shape {x.shape}{where}"
        _refuse(ValueError, "mask", given, "2 or more to train")
    return counted


def invertible(
    code: Activation,
    slope: float,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    channels: int,
    dtype: DType,
) -> None:
    """Checks that x can be computed from y, which replaces it if out is x."""
    kind = kind_of(dtype)
    if code is Activation.LEAKY_RELU and slope < kind.tiny:
        allowed = f"a slope >= {kind.tiny:.2g}{_FROM_Y}"
        _refuse(ValueError, "activation", f"leaky_relu's slope {slope:g} with out=x", allowed)
    if code not in (Activation.LEAKY_RELU, Activation.IDENTITY):
        _refuse(ValueError, "activation", f"{code.name.lower()} with out=x", f"None or leaky_relu{_FROM_Y}")
    scale = np.ones(channels) if gamma is None else gamma
    least = math.sqrt(kind.eps) * np.maximum(1, np.zeros(channels) if beta is None else abs(beta))
    exact = (abs(scale) >= least) & np.isfinite(scale)
    if not exact.all():
        channel = int(np.argmin(exact))
        allowed = f"finite and |gamma| >= sqrt(eps) * max(1, |beta|), here {least[channel]:.3g}{_FROM_Y}"
        _refuse(ValueError, "gamma", f"{scale[channel]:g} in channel {channel} with out=x", allowed)
    if residual is not None and channels:
        most, largest = float(abs(scale).min()) / math.sqrt(kind.eps), _magnitude(residual)
        if not largest <= most:
            allowed = f"|residual| <= |gamma| / sqrt(eps), here {most:.3g}{_FROM_Y}"
            _refuse(ValueError, "residual", f"values up to {largest:g} with out=x", allowed)


def _magnitude(array: Array) -> float:
    """The largest absolute value, or NaN if there is one, without an array of absolute values."""
    with np.errstate(all="ignore"):
        return max(abs(float(array.min())), abs(float(array.max()))) if array.size else 0.0


_FROM_Y = ", since backward gets x from y"


def instance(name: str, value: object, of: type[T], allowed: str) -> T:
    """An object of the class `of`."""
    if not isinstance(value, of):
        _refuse(TypeError, name, kind(value), allowed)
    return value


def iterable(name: str, value: Iterable[T], of: str) -> Iterable[T]:
    """Checks that the value is iterable."""
    if not isinstance(value, Iterable):
        _refuse(TypeError, name, kind(value), f"an iterable of {of}")
    return value


def function(name: str, value: object) -> None:
    """Checks that the value is callable."""
    if not callable(value):
        _refuse(TypeError, name, kind(value), "a callable")


def virtual_batch(value: object, channel_axis: int) -> int | None:
    """How many elements of axis 0 share their statistics; None if all do."""
    if value is None:
        return None
    if channel_axis == 0:
        _refuse(
            ValueError, "virtual_batch_size", f"{shown(value)} with the channels on axis 0", "None, or another axis"
        )
    return count("virtual_batch_size", value)


def integer(name: str, value: object) -> int:
    """An integer; True and False are refused."""
    if isinstance(value, bool | np.bool_):
        _refuse(TypeError, name, shown(value), "an integer")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        _refuse(TypeError, name, shown(value), "an integer")


def opset(operator: str, version: int, oldest: int) -> None:
    """Checks that fastbn supports the operator of an ONNX opset."""
    if version < oldest:
        raise NotImplementedError(f"{operator}: got opset {version}; allowed: {oldest} or later")


def count(name: str, value: object) -> int:
    """A positive integer."""
    result = integer(name, value)
    if result < 1:
        _refuse(ValueError, name, shown(value), "a positive integer")
    return result


def between(name: str, value: object, low: int, high: int) -> int:
    """An integer from low to high."""
    result = integer(name, value)
    if not low <= result <= high:
        positive = "a positive integer up to" if low == 1 else f"an integer from {low} to"
        _refuse(ValueError, name, shown(value), f"{positive} {high}")
    return result


def natural(name: str, value: object) -> int:
    """An integer >= 0 that fits into int64."""
    result = integer(name, value)
    if not 0 <= result < 2**63:
        _refuse(ValueError, name, shown(value), "an integer from 0 to 2**63 - 1")
    return result


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str):
        _refuse(TypeError, name, shown(value), _names(choices))
    if value not in choices:
        _refuse(ValueError, name, shown(value), _names(choices))
    return value


def dtype(name: str, value: object) -> DType:
    """A dtype that data can have, in native byte order."""
    if value is None:
        _refuse(TypeError, name, "None", _names(KINDS))
    if isinstance(value, str) and value == "bfloat16":
        return bfloat16(name)
    try:
        found = np.dtype(value)  # type: ignore[call-overload]
    except TypeError:
        _refuse(TypeError, name, shown(value), _names(KINDS))
    return native(data(name, np.empty(0, found)).dtype)
