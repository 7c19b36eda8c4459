"""Is the input valid? Every validation and every error message; nothing here changes anything."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NoReturn

import numpy as np

from ._activations import BY_NAME, Activation
from ._activations import PLANNED as PLANNED_ACTIVATIONS
from ._dtypes import FLOAT64, PLANNED, STATISTICS, DType, is_float
from ._shape import Layout

Array = np.ndarray[Any, Any]


def _names(choices: Iterable[object]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _refuse(error: type[Exception], name: str, given: str, allowed: str) -> NoReturn:
    raise error(f"{name}: got {given}; allowed: {allowed}")


def _array(name: str, value: object) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        _refuse(TypeError, name, "a masked array", "a plain array (see the argument `mask`)")
    if type(value) is np.ndarray:
        return value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: a NumPy array ({error})") from error


def data(name: str, value: object) -> Array:
    """`value` as an array of a dtype that data can have."""
    array = _array(name, value)
    dtype = array.dtype.newbyteorder("=") if not array.dtype.isnative else array.dtype
    if dtype not in STATISTICS:
        if dtype.name in PLANNED:
            raise NotImplementedError(f"{name}: got dtype {dtype}, which this version does not have yet")
        _refuse(TypeError, name, f"dtype {array.dtype}", _names(str(known) for known in STATISTICS))
    return array


def like(name: str, value: object, x: Array) -> Array:
    """`value` as an array of x's shape and dtype."""
    array = data(name, value)
    if array.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        _refuse(TypeError, name, f"dtype {array.dtype}", f"x's dtype {x.dtype}")
    if array.shape != x.shape:
        _refuse(ValueError, name, f"shape {array.shape}", f"x's shape {x.shape}")
    return array


def axis(value: object, x: Array) -> int:
    """The channel axis, counted from 0."""
    if x.ndim < 2:
        _refuse(ValueError, "x", f"shape {x.shape}", "at least 2 dimensions")
    index = integer("axis", value)
    if not -x.ndim <= index < x.ndim:
        _refuse(ValueError, "axis", str(index), f"{-x.ndim} to {x.ndim - 1} for x of shape {x.shape}")
    return index % x.ndim


def _shape(name: str, array: Array, channels: int) -> None:
    if array.shape != (channels,):
        _refuse(ValueError, name, f"shape {array.shape}", f"({channels},), one value per channel of x")


def parameter(name: str, value: object, channels: int, statistics: DType) -> Array | None:
    """A parameter (gamma or beta), contiguous, in the statistics dtype or, where that would round it, in float64."""
    if value is None:
        return None
    array = _array(name, value)
    if not is_float(array.dtype):
        _refuse(TypeError, name, f"dtype {array.dtype}", "any float dtype, or None")
    _shape(name, array, channels)
    exact = np.can_cast(array.dtype, statistics) or array.dtype.name == "bfloat16"
    return np.ascontiguousarray(array, dtype=statistics if exact else FLOAT64)


def parameters(gamma: object, beta: object, channels: int, statistics: DType) -> tuple[Array | None, Array | None]:
    """Both parameters, gamma and beta, in one dtype."""
    g = parameter("gamma", gamma, channels, statistics)
    b = parameter("beta", beta, channels, statistics)
    if g is not None and b is not None and g.dtype != b.dtype:
        g, b = g.astype(FLOAT64), b.astype(FLOAT64)
    return g, b


def running(
    mean: object, var: object, channels: int, statistics: DType, *, written: bool
) -> tuple[Array | None, Array | None]:
    """The running statistics: both or neither, and writable where they will be written."""
    if mean is None and var is None:
        return None, None
    if mean is None or var is None:
        missing, present = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        _refuse(ValueError, missing, f"None beside {present}", "both running statistics or neither")
    return (
        _statistic("running_mean", mean, channels, statistics, written),
        _statistic("running_var", var, channels, statistics, written),
    )


def _statistic(name: str, value: object, channels: int, statistics: DType, written: bool) -> Array:
    if not isinstance(value, np.ndarray):
        _refuse(TypeError, name, type(value).__name__, f"a NumPy array of {statistics}")
    array = _array(name, value)
    if array.dtype != statistics:
        _refuse(TypeError, name, f"dtype {array.dtype}", f"the statistics dtype {statistics}")
    _shape(name, array, channels)
    if written and not array.flags.writeable:
        _refuse(ValueError, name, "a read-only array", "a writable one, since it is updated in place")
    return array


def running_apart(inputs: Mapping[str, Array | None]) -> None:
    """Running statistics that are written share no memory with each other or with another input."""
    for name in ("running_mean", "running_var"):
        statistic = inputs[name]
        for other, array in inputs.items():
            if statistic is None or name == other or not isinstance(array, np.ndarray):
                continue
            if overlap(statistic, array):
                _refuse(ValueError, name, f"memory shared with {other}", "an array of its own")


def statistics_missing() -> NoReturn:
    """Without batch statistics there must be running ones."""
    _refuse(ValueError, "running_mean", "None", "arrays for running_mean and running_var where training is not True")


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; where that is too hard to tell, they count as sharing it."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # any limit will do
    except np.exceptions.TooHardError:
        return True


def same_memory(a: Array, b: Array) -> bool:
    """Whether a and b, of one shape and dtype, are the same elements in the same places."""
    return a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides


def out(value: object, x: Array, inputs: Mapping[str, Array | None], *, may_be: str | None = None) -> Array | None:
    """`out`: x's shape and dtype, writable, apart from every input but, exactly, the one named by `may_be`."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        _refuse(TypeError, "out", type(value).__name__, f"a NumPy array of x's shape {x.shape} and dtype {x.dtype}")
    array = _array("out", value)
    if array.dtype != x.dtype.newbyteorder("="):
        _refuse(TypeError, "out", f"dtype {array.dtype}", f"x's dtype {x.dtype.newbyteorder('=')}")
    if array.shape != x.shape:
        _refuse(ValueError, "out", f"shape {array.shape}", f"x's shape {x.shape}")
    if not array.flags.writeable:
        _refuse(ValueError, "out", "a read-only array", "a writable one")
    if _overlaps_itself(array):
        _refuse(ValueError, "out", f"strides {array.strides}", "an array whose elements do not overlap")
    for name, other in inputs.items():
        if not isinstance(other, np.ndarray) or not overlap(array, other):
            continue
        if name == may_be and same_memory(array, other):
            continue
        _refuse(ValueError, "out", f"memory shared with {name}", _apart(may_be))
    return value


def _overlaps_itself(array: Array) -> bool:
    """Whether two elements share memory, as far as strides that do not nest (slices' and transposes' do) tell."""
    end = array.itemsize
    if array.size:
        for stride, size in sorted(zip(map(abs, array.strides), array.shape, strict=True)):
            if size > 1 and stride < end:
                return True
            end += stride * (size - 1)
    return False


def _apart(may_be: str | None) -> str:
    return f"an array of its own, or {may_be} itself" if may_be else "an array of its own"


def number(name: str, value: object, low: float, high: float) -> float:
    """A real number with low <= value <= high."""
    if not isinstance(value, Real | np.floating) or isinstance(value, bool):
        _refuse(TypeError, name, repr(value), "a real number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not low <= result <= high or math.isinf(result):
        _refuse(ValueError, name, repr(value), f"{low:g} to {high:g}" if high < math.inf else f"finite and >= {low:g}")
    return result


def eps(value: object, name: str = "eps") -> float:
    """A finite eps >= 0."""
    return number(name, value, 0, math.inf)


def momentum(value: object) -> float:
    """A momentum from 0 to 1."""
    return number("momentum", value, 0, 1)


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        _refuse(TypeError, name, repr(value), "True or False")
    return bool(value)


def activation(value: object) -> Activation:
    """The activation's code."""
    if isinstance(value, str) or value is None:
        if value in BY_NAME:
            return BY_NAME[value]
        if value not in PLANNED_ACTIVATIONS:
            _refuse(ValueError, "activation", repr(value), _names(BY_NAME))
    elif not (isinstance(value, tuple) and len(value) == 2 and value[0] == "leaky_relu"):
        _refuse(TypeError, "activation", repr(value), _names(BY_NAME))
    raise NotImplementedError(f"activation: got {value!r}, which this version does not have yet; has {_names(BY_NAME)}")


def no_mask(value: object) -> None:
    """`mask` is in the contract, but not in this version."""
    if value is not None:
        raise NotImplementedError("mask: this version has None only")


def enough(x: Array, layout: Layout) -> None:
    """Training needs a variance."""
    values = layout.values
    if values < 2:
        given = f"shape {x.shape} with {values} value{'s' * (values != 1)} per channel"
        _refuse(ValueError, "x", given, "2 or more to train")


def integer(name: str, value: object) -> int:
    """An integer; True and False are none."""
    if isinstance(value, bool | np.bool_):
        _refuse(TypeError, name, repr(value), "an integer")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        _refuse(TypeError, name, repr(value), "an integer")


def count(name: str, value: object) -> int:
    """A positive integer."""
    result = integer(name, value)
    if result < 1:
        _refuse(ValueError, name, repr(value), "a positive integer")
    return result


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of `choices`."""
    if not isinstance(value, str):
        _refuse(TypeError, name, repr(value), _names(choices))
    if value not in choices:
        _refuse(ValueError, name, repr(value), _names(choices))
    return value


def dtype(name: str, value: object) -> DType:
    """A dtype that data can have."""
    try:
        found = np.dtype(value)  # type: ignore[call-overload]
    except TypeError:
        _refuse(TypeError, name, repr(value), _names(str(known) for known in STATISTICS))
    result: DType = data(name, np.empty(0, found)).dtype
    return result


def of_layer(value: object, channels: int, channel_axis: int, layer_dtype: DType) -> Array:
    """An x for a layer: of its dtype, with its channels."""
    x = data("x", value)
    if x.dtype.newbyteorder("=") != layer_dtype:
        _refuse(TypeError, "x", f"dtype {x.dtype}", f"the layer's dtype {layer_dtype}")
    found = x.shape[axis(channel_axis, x)]
    if found != channels:
        _refuse(ValueError, "x", f"shape {x.shape} with {found} channels", f"the layer's {channels} channels")
    return x


def state(name: str, value: Mapping[str, Any], arrays: Mapping[str, Array], optional: str | None) -> dict[str, Array]:
    """`value` as arrays that fit `arrays`, name by name; `optional` is an integer that may be missing."""
    if not isinstance(value, Mapping):
        _refuse(TypeError, name, type(value).__name__, "a mapping from names to arrays")
    if set(value) - {optional} != set(arrays):
        _refuse(ValueError, name, f"the names {_names(value)}", _names(arrays))
    found = {key: _array(f"{name}[{key!r}]", value[key]) for key in value}
    for key, array in arrays.items():
        found[key] = _state_array(f"{name}[{key!r}]", found[key], array)
    if optional in found:
        counted = found[optional]
        if counted.dtype.kind not in "iu" or counted.size != 1:
            _refuse(TypeError, f"{name}[{optional!r}]", repr(value[optional]), "one integer >= 0")
        if counted.item() < 0:
            _refuse(ValueError, f"{name}[{optional!r}]", repr(value[optional]), "one integer >= 0")
    return found


def _state_array(name: str, value: Array, like: Array) -> Array:
    if not is_float(value.dtype):
        _refuse(TypeError, name, f"dtype {value.dtype}", "any float dtype")
    if value.shape != like.shape:
        _refuse(ValueError, name, f"shape {value.shape}", f"shape {like.shape}")
    with np.errstate(over="ignore"):
        cast = value.astype(like.dtype)
    if (np.isinf(cast) & ~np.isinf(value)).any():
        _refuse(ValueError, name, f"values up to {abs(value).max()}", f"what {like.dtype} can hold")
    return cast
