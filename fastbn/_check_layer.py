"""Is the input of layers and plans valid? Checks of x, of assigned attributes and of loaded states."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any, NoReturn

import numpy as np

from .call import checks
from .call.checks import _array, _names, _refuse, kind, overlaps_itself, shown
from .call.dtypes import KINDS, DType, find, is_float, kind_of, native
from .config.environment import BACKENDS

Array = np.ndarray[Any, Any]

# The input x ---------------------------------------------------------------------------------------------------------


def layer_input(value: object, channels: int, channel_axis: int, layer_dtype: DType) -> Array:
    """Checks x in a call of a layer, which needs the layer's dtype and number of channels."""
    x = checks.data("x", value)
    if native(x.dtype) != layer_dtype:
        _refuse(TypeError, "x", f"dtype {x.dtype}", f"the layer's dtype {layer_dtype}")
    found = x.shape[checks.axis(channel_axis, x)]
    if found != channels:
        _refuse(ValueError, "x", f"shape {x.shape} with {found} channels", f"the layer's {channels} channels")
    return x


def plan_input(value: object, mean: Array, channel_axis: int) -> Array:
    """Checks x in a call of a plan, which needs the plan's number of channels and statistics dtype."""
    x = checks.data("x", value)
    found = x.shape[checks.axis(channel_axis, x)]
    if found != mean.size:
        _refuse(ValueError, "x", f"shape {x.shape} with {found} channels", f"the plan's {mean.size} channels")
    if kind_of(x.dtype).statistics != mean.dtype:
        _refuse(TypeError, "x", f"dtype {x.dtype}", f"one whose statistics dtype is the plan's, {mean.dtype}")
    return x


MOST_BATCHES = 2**63 - 1
"""The largest num_batches_tracked, which is an int64 in a state."""


def too_many_batches() -> NoReturn:
    """Refuses a batch beyond MOST_BATCHES."""
    given = f"{MOST_BATCHES} before another batch"
    _refuse(ValueError, "num_batches_tracked", given, "an integer below 2**63 - 1 (reset_parameters() sets it to 0)")


def planned(mean: Array | None, var: Array | None, statistics: DType) -> tuple[Array, Array]:
    """The running statistics of a layer in the dtype that plans take, without rounding them."""
    if mean is None or var is None:
        _refuse(ValueError, "plan", "a layer without running statistics", "a layer with track_running_stats=True")
    with np.errstate(all="ignore"):
        found = mean.astype(statistics), var.astype(statistics)
    for name, given, cast in zip(("running_mean", "running_var"), (mean, var), found, strict=True):
        if not np.array_equal(given.astype(np.float64), cast.astype(np.float64), equal_nan=True):
            allowed = f"values that {statistics} holds exactly (or call the layer instead of a plan)"
            _refuse(ValueError, name, f"values of {given.dtype} with more digits", allowed)
    return found


def tracked(mean: Array | None, var: Array | None) -> tuple[Array, Array]:
    """The running statistics of a layer, which must have them."""
    if mean is None or var is None:
        _refuse(ValueError, "layers", "a layer without running statistics", "layers with track_running_stats=True")
    return mean, var


def never_called(layer: str) -> NoReturn:
    """Refuses to recalibrate a layer that no batch reached."""
    _refuse(ValueError, "layers", f"{layer}, which forward(batch) never called", "layers that see a batch")


# Attributes that are assigned ----------------------------------------------------------------------------------------


def _features(layer: Any, value: object) -> int:
    count, made_with = checks.count("num_features", value), getattr(layer, "num_features", value)
    if count != made_with:
        _refuse(ValueError, "num_features", shown(count), f"{made_with}, which the layer was made with")
    return count


def _flag(flag: str, names: tuple[str, str]) -> Callable[[Any, object], bool]:
    """Makes the check of affine or track_running_stats, which can be True only while the layer has the arrays."""

    def check(layer: Any, value: object) -> bool:
        result = checks.flag(flag, value)
        missing = [name for name in names if getattr(layer, name, 0) is None]
        if result and missing:
            _refuse(ValueError, flag, f"True beside {missing[0]}=None", f"False, or True once {missing[0]} is an array")
        return result

    return check


def _array_of(name: str, flag: str) -> Callable[[Any, object], Array | None]:
    """Makes the check of weight, bias or a running statistic; calls update the latter in place."""
    updated = name.startswith("running")

    def check(layer: Any, value: object) -> Array | None:
        shape = (layer.num_features,)
        allowed = f"a NumPy array of shape {shape} and any float dtype"
        if value is None and not getattr(layer, flag):
            return None
        if not isinstance(value, np.ndarray) and not checks.exports(value):
            checks.in_memory(name, value)
            allowed += f", since {flag} is True" if value is None else "" if getattr(layer, flag) else ", or None"
            _refuse(TypeError, name, kind(value), allowed)
        array = _array(name, value)
        if not (find(array.dtype) if updated else is_float(array.dtype)):
            _refuse(TypeError, name, f"dtype {array.dtype}", _names(KINDS) if updated else "any float dtype")
        if array.shape != shape:
            _refuse(ValueError, name, f"shape {array.shape}", f"{shape}, one value per channel of the layer")
        if updated:
            _writable(name, array)
        for other in _ARRAYS if updated else _ARRAYS[2:]:
            held = getattr(layer, other, None)
            if held is not None and other != name and checks.overlap(array, held):
                _refuse(ValueError, name, f"memory shared with {other}", "an array of its own")
        return value if isinstance(value, np.ndarray) else array

    return check


def _writable(name: str, array: Array) -> None:
    if not array.flags.writeable:
        _refuse(ValueError, name, "a read-only array", "a writable one, since it is written to")
    if overlaps_itself(array):
        _refuse(ValueError, name, f"strides {array.strides}", "an array whose elements do not overlap")


def _axis(layer: Any, value: object) -> int:
    index = checks.integer("axis", value)
    checks.virtual_batch(getattr(layer, "virtual_batch_size", None), index)
    return index


def _activation(layer: Any, value: object) -> object:
    checks.activation(value)
    return value


ASSIGNED: dict[str, Callable[[Any, Any], object]] = {
    "num_features": _features,
    "eps": lambda layer, value: checks.eps(value),
    "momentum": lambda layer, value: None if value is None else checks.momentum(value),
    "correction": lambda layer, value: checks.correction(value),
    "affine": _flag("affine", ("weight", "bias")),
    "track_running_stats": _flag("track_running_stats", ("running_mean", "running_var")),
    "axis": _axis,
    "activation": _activation,
    "dtype": lambda layer, value: checks.dtype("dtype", value),
    "backend": lambda layer, value: None if value is None else checks.choice("backend", value, BACKENDS),
    "virtual_batch_size": lambda layer, value: checks.virtual_batch(value, layer.axis),
    "training": lambda layer, value: checks.flag("training", value),
    "weight": _array_of("weight", "affine"),
    "bias": _array_of("bias", "affine"),
    "running_mean": _array_of("running_mean", "track_running_stats"),
    "running_var": _array_of("running_var", "track_running_stats"),
    "num_batches_tracked": lambda layer, value: checks.natural("num_batches_tracked", value),
}
"""The check of each attribute, which returns the value to keep. All attributes can be assigned in this order."""

_ARRAYS = ("weight", "bias", "running_mean", "running_var")

ELSEWHERE = {
    "gamma": "weight",
    "beta": "bias",
    "epsilon": "eps",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
    "moving_variance": "running_var",
}
"""Names that functions of fastbn, and other libraries, have for attributes of a layer."""


def refuse_misspelled(name: str) -> None:
    """Raises AttributeError if the name of a new attribute looks like a misspelled one of BatchNorm."""
    lower = name.lower()
    close = difflib.get_close_matches(lower, ASSIGNED, n=1, cutoff=0.75)
    close += [own for own in ASSIGNED if sorted(own) == sorted(lower)]  # swapped letters
    meant = ELSEWHERE.get(lower) or (close[0] if close else None)
    if meant is not None:
        raise AttributeError(f"BatchNorm has no attribute {shown(name)}; did you mean {meant!r}?")


# States that are loaded ----------------------------------------------------------------------------------------------


def state(value: Mapping[str, Any], prefix: str, arrays: Mapping[str, Array], optional: str | None) -> dict[str, Any]:
    """Returns the values to write into `arrays`, by name, and the integer `optional` if the state has it.

    The names in `value` begin with `prefix`. If there is a prefix, other names are ignored; else they are errors.
    """
    if not isinstance(value, Mapping):
        _refuse(TypeError, "state", kind(value), "a mapping from names to arrays")
    names = [key for key in value if not prefix or (isinstance(key, str) and key.startswith(prefix))]
    _names_of_state(names, prefix, arrays, optional)
    _targets(arrays)
    found: dict[str, Any] = {}
    for key in names:
        name, given = f"state[{key!r}]", _loadable(f"state[{key!r}]", value[key])
        own = key[len(prefix) :]
        found[own] = _counter(name, given) if own == optional else _state_array(name, given, arrays[own])
    return found


def _names_of_state(names: list[Any], prefix: str, arrays: Iterable[str], optional: str | None) -> None:
    required = [prefix + name for name in arrays]
    if set(names) - ({prefix + optional} if optional else set()) == set(required):
        return
    given = f"the names {_names(names)}" if names else "no name"
    beside = f" with the prefix {prefix!r}" if prefix else ""
    other = f"; {prefix}{optional} is optional" if optional else ""
    _refuse(ValueError, "state", given + beside, f"{_names(required)}{other}")


def prefixed(prefix: object) -> str:
    """Checks the prefix of the names in a state."""
    if not isinstance(prefix, str):
        _refuse(TypeError, "prefix", kind(prefix), 'a string such as "layer1.bn."')
    return prefix


def _targets(arrays: Mapping[str, Array]) -> None:
    """Checks that a state can be written into the layer's arrays."""
    for name, array in arrays.items():
        _writable(name, array)
    for one, other in combinations(arrays, 2):
        if checks.overlap(arrays[one], arrays[other]):
            _refuse(ValueError, one, f"memory shared with {other}", "an array of its own, to load a state into")


def _loadable(name: str, value: Any) -> Array:
    """Makes an array of a value in a state, which may be a torch tensor on any device, with or without gradient."""
    try:
        if callable(getattr(value, "detach", None)) and callable(getattr(value, "is_floating_point", None)):
            value = value.detach().cpu()
            value = value.double() if value.is_floating_point() else value  # NumPy has no bfloat16
    except Exception as error:  # such as that of a tensor without data
        raise TypeError(f"{name}: got {type(value).__name__}; allowed: an array or a tensor ({error})") from error
    return _array(name, value, loads=True)


def _state_array(name: str, value: Array, like: Array) -> Array:
    if not is_float(value.dtype):
        _refuse(TypeError, name, f"dtype {value.dtype}", "any float dtype")
    if value.shape != like.shape:
        _refuse(ValueError, name, f"shape {value.shape}", f"shape {like.shape}")
    with np.errstate(all="ignore"):
        cast = value.astype(like.dtype)
    if (np.isinf(cast) & ~np.isinf(value)).any():
        _refuse(ValueError, name, f"values up to {abs(value).max()}", f"values that {like.dtype} can hold")
    return cast


def _counter(name: str, value: Array) -> int:
    """Returns the integer in an array of one element, which may be a float with an integer value."""
    if value.size != 1:
        is_number = is_float(value.dtype) or np.issubdtype(value.dtype, np.integer)
        _refuse(ValueError if is_number else TypeError, name, f"shape {value.shape}", "one integer >= 0")
    given = value.item()
    if is_float(value.dtype) and float(given).is_integer():
        given = int(given)
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        _refuse(TypeError, name, shown(given), "one integer >= 0")
    if not 0 <= operator.index(given) < 2**63:
        _refuse(ValueError, name, shown(given), "one integer from 0 to 2**63 - 1")
    return operator.index(given)
