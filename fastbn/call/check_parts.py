"""Are the parts of a batch valid? Checks of moments and sums, and of the contents of a cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import numpy as np

from .._backends import SAVED_ROWS
from .activations import Activation
from .checks import _array, _refuse, dtype, kind, number, shown
from .dtypes import FLOAT32, FLOAT64, DType, find, kind_of, native
from .record import Options
from .shape import positions_of

Array = np.ndarray[Any, Any]

# Moments and sums ----------------------------------------------------------------------------------------------------


class _Summed(Protocol):
    """Moments or Sums."""

    @property
    def count(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def dtype(self) -> DType: ...


def rows(given: Mapping[str, object]) -> tuple[Array, DType]:
    """Arrays of one value per channel as rows of float64, and the statistics dtype, which is that of the first."""
    arrays = {name: _array(name, value) for name, value in given.items()}
    first, *_ = arrays.values()
    for name, array in arrays.items():
        if native(array.dtype) not in (FLOAT32, FLOAT64):
            _refuse(TypeError, name, f"dtype {array.dtype}", "'float32', 'float64'")
        if array.ndim != 1 or array.shape != first.shape:
            _refuse(ValueError, name, f"shape {array.shape}", "(C,), one value per channel, for all")
    return np.array(list(arrays.values()), FLOAT64), native(first.dtype)


def statistics(name: str, value: object) -> DType:
    """A statistics dtype."""
    found = dtype(name, value)
    if found not in (FLOAT32, FLOAT64):
        _refuse(TypeError, name, f"dtype {found}", "'float32', 'float64'")
    return found


def buffer(value: object, row_count: int) -> tuple[int, Array]:
    """The count and the rows of a buffer, copied."""
    array = _array("buffer", value)
    if native(array.dtype) != FLOAT64:
        _refuse(TypeError, "buffer", f"dtype {array.dtype}", "'float64'")
    if array.ndim != 1 or array.size % row_count != 1 % row_count:
        _refuse(ValueError, "buffer", f"shape {array.shape}", f"(1 + {row_count} * C,)")
    count = float(array[0])
    if not (count.is_integer() and 0 <= count <= 2**53):
        _refuse(ValueError, "buffer", f"the count {count}", "an integer from 0 to 2**53")
    return int(count), array[1:].astype(FLOAT64).reshape(row_count, -1)


def counts_in_a_float(name: str, count: int) -> None:
    """Refuses a count that float64 cannot hold."""
    if count > 2**53:
        _refuse(ValueError, name, f"the count {count}", "at most 2**53 in a buffer")


def not_negative(name: str, values: Array) -> None:
    """Refuses values below 0, but not NaN."""
    if (values < 0).any():
        _refuse(ValueError, name, f"{values.min()}", "values >= 0")


def below(value: object, counted: int) -> float:
    """The correction of a variance of Moments: any number >= 0 and below the count."""
    result = number("correction", value, 0, math.inf)
    if result >= counted:
        _refuse(ValueError, "correction", f"{shown(value)} with count {counted}", "a number below the count")
    return result


def contents(name: str, count: object, dtype: object, found: object, row_count: int) -> None:
    """Checks the contents of Moments or Sums, which a pickle or an assignment may have changed."""
    if type(count) is not int:
        _refuse(TypeError, name, f"the count {kind(count)}", "an integer from 0 to 2**63 - 1")
    if not 0 <= count < 2**63:
        _refuse(ValueError, name, f"the count {shown(count)}", "an integer from 0 to 2**63 - 1")
    if not isinstance(dtype, np.dtype) or dtype not in (FLOAT32, FLOAT64):
        _refuse(TypeError, name, f"the dtype {shown(dtype)}", "'float32', 'float64'")
    allowed = f"{row_count} rows of float64, C-contiguous, with a column per channel"
    if type(found) is not np.ndarray or found.dtype != FLOAT64:
        _refuse(TypeError, name, _described("rows", found), allowed)
    if found.ndim != 2 or found.shape[0] != row_count or not _is_ready(found):
        _refuse(ValueError, name, _described("rows", found), allowed)


def summed(name: str, value: _Summed, channels: int, statistics: DType, whose: str = "x's") -> None:
    """Checks that moments or sums fit x, or fit others of their kind."""
    if value.channels != channels:
        _refuse(ValueError, name, f"{value.channels} channels", f"{whose} {channels} channels")
    if value.dtype != statistics:
        _refuse(TypeError, name, f"dtype {value.dtype}", f"{whose} statistics dtype {statistics}")


def moments(value: _Summed, channels: int, statistics: DType, *, training: bool, virtual: int | None) -> None:
    """Checks the moments with which `forward` is to normalize x."""
    summed("moments", value, channels, statistics)
    if not training:
        _refuse(ValueError, "moments", "moments with training=False", "None, since running statistics are used")
    if virtual is not None:
        _refuse(ValueError, "moments", f"moments with virtual_batch_size={shown(virtual)}", "one of the two")
    if value.count < 2:
        _refuse(ValueError, "moments", f"count {value.count}", "2 or more to train")


def sums(value: _Summed, channels: int, statistics: DType, most: int | None) -> None:
    """Checks sums for the gradients of x. Its statistics come from `most` values per channel, or None if frozen."""
    summed("sums", value, channels, statistics)
    if most is not None and value.count > most:
        _refuse(ValueError, "sums", f"count {value.count}", f"at most {most}, the count of the cache's statistics")


def enough_together(name: str, count: int) -> None:
    """Checks that all ranks together have enough values per channel."""
    if count < 2:
        given = f"{count} value{'s' * (count != 1)} per channel on all ranks together"
        _refuse(ValueError, name, given, "2 or more to train")


def all_of(value: _Summed, count: int) -> None:
    """Checks that all ranks' sums come from as many values as the cache's statistics do, or 0 if frozen."""
    if count and value.count != count:
        given = f"a count of {count}, where all ranks together have {value.count} values per channel"
        _refuse(ValueError, "cache", given, "the caches that one forward call on all ranks returned")


# Caches --------------------------------------------------------------------------------------------------------------

FROM_FORWARD = "the cache that fastbn.forward returned"


def no_parts(found: object) -> NoReturn:
    """Refuses a cache that does not hold `Parts`."""
    _refuse(TypeError, "cache", f"a cache that holds {kind(found)}", FROM_FORWARD)


def whole(name: str, virtual: int | None) -> None:
    """Refuses a cache of virtual batches, which are not parts of a larger batch."""
    if virtual is not None:
        _refuse(ValueError, name, "a cache of virtual batches", "one that forward returned without virtual_batch_size")


def cache(parts: tuple[Any, ...]) -> None:
    """Checks that the parts of a cache are such as `forward` makes.

    Backends trust these arrays. No other check stands between them and a cache that was unpickled or tampered with.
    """
    x, residual, saved, axis, frozen, options, has_gamma, has_beta, mask, counted, from_y, virtual = parts
    if type(x) is not np.ndarray or find(x.dtype) is None:
        _refuse_part(TypeError, "x", x, "an array of float16, bfloat16, float32 or float64")
    if x.ndim < 2:
        _refuse_part(ValueError, "x", x, "an array of at least 2 dimensions")
    _fits("residual", residual, x.dtype, x.shape, optional=True)
    if type(axis) is not int:
        _refuse_part(TypeError, "axis", axis, "an integer")
    if not -x.ndim <= axis < x.ndim:
        _refuse_part(ValueError, "axis", axis, f"{-x.ndim} to {x.ndim - 1}")
    for name, flag in (("frozen", frozen), ("has_gamma", has_gamma), ("has_beta", has_beta), ("from_y", from_y)):
        if type(flag) is not bool:
            _refuse_part(TypeError, name, flag, "True or False")
    _options(options, from_y, x.dtype)
    _slices(virtual, len(x) if axis % x.ndim and not frozen else 0)
    positions, slices = positions_of(x.shape, axis % x.ndim), () if virtual is None else (-(-len(x) // virtual),)
    _fits("saved", saved, FLOAT64, (len(SAVED_ROWS), *slices, x.shape[axis]))
    if saved.dtype != FLOAT64 or not _is_ready(saved):
        _refuse_part(ValueError, "saved", saved, "a C-contiguous, aligned array in native byte order")
    _fits("mask", mask, _BOOL, positions, optional=True)
    _counted(counted, math.prod(positions), frozen, mask is not None)


_BOOL = np.dtype(np.bool_)


def _options(value: object, from_y: bool, dtype: DType) -> None:
    if type(value) is not Options:
        _refuse_part(TypeError, "options", value, "Options")
    try:
        options = value.checked()
    except (TypeError, ValueError) as error:
        given, _, allowed = str(error).replace(": got ", " ", 1).partition("; allowed: ")
        _refuse(type(error), "cache", f"a cache with {given}", allowed)
    leaky = options.activation == Activation.LEAKY_RELU and options.slope >= kind_of(dtype).tiny
    if from_y and not leaky and options.activation != Activation.IDENTITY:
        given = f"a cache of a call in place with activation {shown(value.activation)}"
        _refuse(ValueError, "cache", given, "None or leaky_relu with a slope > 0")


def _slices(virtual: object, elements: int) -> None:
    if virtual is None:
        return
    if type(virtual) is not int:
        _refuse_part(TypeError, "virtual_batch_size", virtual, "a positive integer, or None")
    if virtual < 1 or not elements:
        _refuse_part(ValueError, "virtual_batch_size", virtual, "None; or, for batches along axis 0, 1 or more")


def _counted(counted: object, values: int, frozen: bool, masked: bool) -> None:
    if counted is None:
        if masked and not frozen:
            _refuse_part(TypeError, "count", counted, "an integer, beside a mask")
        if values < 2 and not frozen:
            _refuse_part(ValueError, "count", values, "2 or more")
    elif type(counted) is not int:
        _refuse_part(TypeError, "count", counted, "an integer, or None")
    elif not 2 <= counted < 2**63:
        _refuse_part(ValueError, "count", counted, "2 to 2**63 - 1")


def _fits(name: str, value: object, dtype: DType, shape: tuple[int, ...], *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not np.ndarray or (value.dtype != dtype and native(value.dtype) != native(dtype)):
        _refuse_part(TypeError, name, value, f"an array of {native(dtype)}{', or None' * optional}")
    if value.shape != shape:
        _refuse_part(ValueError, name, value, f"shape {shape}")


def _is_ready(array: Array) -> bool:
    """Whether the C backend can read the array without a copy."""
    return array.flags.c_contiguous and array.flags.aligned


def _refuse_part(error: type[Exception], name: str, value: object, allowed: str) -> NoReturn:
    _refuse(error, "cache", f"a cache with {_described(name, value)}", f"{allowed}, as {FROM_FORWARD} has it")


def _described(name: str, value: object) -> str:
    if not isinstance(value, np.ndarray):
        return f"{name} {kind(value)}"
    order = "" if value.flags.c_contiguous else ", not C-contiguous"
    return f"{name} of dtype {value.dtype} and shape {value.shape}{order}"
