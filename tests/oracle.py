"""What is the right answer? Textbook batch norm in long double, channel by channel; imports nothing from fastbn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
LONG = np.longdouble

# Arrays as rows, one a channel ---------------------------------------------------------------------------------------


def long(values: Any) -> Array:
    """In long double, exactly; halves go by way of float32, which all of them can."""
    array = np.asarray(values)
    return (array.astype(np.float32) if array.dtype.itemsize == 2 else array).astype(LONG)


def rows_of(array: Array, axis: int) -> Array:
    """(C, M): every channel's values in a row, in long double."""
    moved = np.moveaxis(np.asarray(array), axis, 0)
    return long(moved.reshape(moved.shape[0], -1))


def shaped(rows: Array, like: Array, axis: int) -> Array:
    """The inverse of `rows_of`, for an array shaped like `like`."""
    moved = np.moveaxis(like, axis, 0)
    return np.moveaxis(rows.reshape(moved.shape), 0, axis)


def counted(mask: Array | None, like: Array, axis: int) -> Array:
    """(1, M): 1 at the positions that count towards the statistics and 0 elsewhere."""
    shape = np.moveaxis(like, axis, 0).shape[1:]
    return long(np.broadcast_to(True if mask is None else mask, shape)).reshape(1, -1)


def _column(values: Array | float | None, default: float, channels: int) -> Array:
    filled = np.full(channels, default, LONG) if values is None else long(values)
    return filled[:, np.newaxis]


# Number formats ------------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """The bits of a fraction, the exponent of the smallest normal number, and the dtype that is computed in."""

    fraction: int
    smallest: int
    arithmetic: str

    @property
    def largest(self) -> Any:
        """The largest number, and half a step: what lies beyond rounds to infinity."""
        return np.ldexp(LONG(2) - np.ldexp(LONG(1), -self.fraction - 1), 1 - self.smallest)


FORMATS = {
    "float16": Format(10, -14, "float32"),
    "bfloat16": Format(7, -126, "float32"),
    "float32": Format(23, -126, "float32"),
    "float64": Format(52, -1022, "float64"),
}
ROUNDING = {"float32": 1, "float64": 32}
"""Times the contract's bound. It is met for float32 (and halves), which are computed in float64 where it matters; what
float64 data adds up is rounded like the data itself, and more the longer it is."""


def ulp(values: Array | float, dtype: Any = "float32") -> Array:
    """The distance of neighbouring numbers of `dtype` in the binade of |values|, which need not be of that dtype."""
    form = FORMATS[np.dtype(dtype).name]
    _, exponent = np.frexp(abs(long(values)))
    return np.ldexp(LONG(1), np.maximum(exponent - 1, form.smallest) - form.fraction)


# Activations ---------------------------------------------------------------------------------------------------------


def _sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


class Curve(NamedTuple):
    """An activation of z; `a` is leaky_relu's slope.

    `terms`: the size of what the slope adds up, None if it is exact. `ulps`: how far its own roundings may lead.
    """

    value: Callable[[Array, float], Array]
    slope: Callable[[Array, float], Array]
    terms: Callable[[Array, float], Array] | None = None
    ulps: int = 0


CURVES = {
    None: Curve(lambda z, a: z, lambda z, a: np.ones_like(z)),
    "relu": Curve(lambda z, a: np.maximum(z, 0), lambda z, a: 1 - long(z <= 0)),
    "relu6": Curve(lambda z, a: np.clip(z, 0, 6), lambda z, a: 1 - long((z <= 0) | (z >= 6))),
    "leaky_relu": Curve(
        lambda z, a: np.where(z > 0, z, a * z),
        lambda z, a: np.where(z > 0, LONG(1), LONG(a)),
        lambda z, a: np.where(z > 0, LONG(0), LONG(abs(a))),
        2,
    ),
    "silu": Curve(
        lambda z, a: z * _sigmoid(z),
        lambda z, a: _sigmoid(z) * (1 + z * _sigmoid(-z)),
        lambda z, a: _sigmoid(z) * (1 + abs(z) * _sigmoid(-z)),
        3,
    ),
    "hardswish": Curve(
        lambda z, a: z * np.clip(z + 3, 0, 6) / 6,
        lambda z, a: np.where(z <= -3, LONG(0), np.where(z >= 3, LONG(1), z / 3 + 0.5)),
        lambda z, a: np.where(abs(z) < 3, abs(z) / 3 + 0.5, LONG(0)),
        2,
    ),
    "sigmoid": Curve(
        lambda z, a: _sigmoid(z),
        lambda z, a: _sigmoid(z) * _sigmoid(-z),
        lambda z, a: _sigmoid(z),
        3,
    ),
}
"""At a kink the slope is torch's: that of the left side, but hardswish's at 3. At NaN it is 1 where z is not in it."""


def curve(activation: Any) -> tuple[Curve, float]:
    """The curve that an argument `activation` names, and leaky_relu's slope."""
    name, a = activation if isinstance(activation, tuple) else (activation, 0.01)
    return CURVES[name], a


def _change(f: Callable[[Array, float], Array], a: float, z: Array, by: Array) -> Array:
    """How much f changes where z does not come out exactly."""
    at = f(z, a)
    return np.maximum(abs(f(z + by, a) - at), abs(f(z - by, a) - at))


# Forward -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalized:
    """Of a forward call: y, z (before the activation), the size of what z adds up, and xhat, all in x's shape.

    And mean, biased var, inv_std per channel.
    """

    y: Array
    z: Array
    terms: Array
    xhat: Array
    mean: Array
    var: Array
    inv_std: Array
    count: float


def _mean(rows: Array, weight: Array) -> Array:
    return np.where(weight > 0, rows, LONG(0)).sum(axis=1, keepdims=True) / weight.sum()


def moments(x: Array, *, axis: int = 1, mask: Array | None = None) -> tuple[Array, Array, float]:
    """Mean and biased variance of each channel, and how many values they come from."""
    at = forward(x, axis=axis, mask=mask)
    return at.mean, at.var, at.count


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Array | None = None,
    activation: Any = None,
    residual: Array | None = None,
    count: float | None = None,
) -> Normalized:
    """Ioffe & Szegedy 2015, algorithm 1; with mean and var given (of `count` values), algorithm 2."""
    rows = rows_of(x, axis)
    channels = rows.shape[0]
    if mean is None or var is None:
        weight = counted(mask, x, axis)
        pivot = rows[:, [weight.argmax()]]  # the first value that counts: so a constant channel has exactly no variance
        centred = rows - pivot
        mean_ = _mean(centred, weight)
        centred -= mean_
        rest = _mean(centred, weight)  # what the rounding of the mean left over
        centred -= rest
        mean_, var_, count = pivot + mean_ + rest, _mean(centred * centred, weight), float(weight.sum())
    else:
        mean_, var_ = _column(mean, 0, channels), _column(var, 1, channels)
        centred = rows - mean_
    with np.errstate(divide="ignore"):
        inv_std = np.where(var_ + LONG(eps) == 0, LONG(0), 1 / np.sqrt(var_ + LONG(eps)))
    xhat = centred * inv_std
    added = [xhat * _column(gamma, 1, channels), _column(beta, 0, channels)]
    if residual is not None:
        added.append(rows_of(residual, axis))
    z, terms = sum(added), sum(map(abs, added))
    f, a = curve(activation)
    parts = (shaped(part, x, axis) for part in (f.value(z, a), z, terms, xhat))
    count = float(rows.shape[1]) if count is None else count
    return Normalized(*parts, mean_[:, 0], var_[:, 0], inv_std[:, 0], count)


def _bound(at: Normalized, size: Array, gamma: Array | None, axis: int, arithmetic: str) -> Array:
    slope = abs(_column(gamma, 1, at.mean.shape[0]))
    scaled = shaped(2 * ulp(np.maximum(1, abs(rows_of(at.xhat, axis))), arithmetic) * slope, at.xhat, axis)
    size = at.terms if arithmetic == "float64" else size
    return ROUNDING[arithmetic] * (scaled + ulp(size, arithmetic))


def bound(
    at: Normalized, gamma: Array | None = None, *, axis: int = 1, activation: Any = None, dtype: Any = "float32"
) -> Array:
    """The error that the contract allows in y: 2 ulp of max(1, |xhat|) times |gamma|, plus 1 ulp of |y|.

    An activation is given a z with that error, which it may pass on as steep as it is, and adds roundings of its own,
    one of them perhaps of a denormal factor of z. Halves round once more.
    """
    name = np.dtype(dtype).name
    arithmetic = FORMATS[name].arithmetic
    f, a = curve(activation)
    passed_on = _change(f.value, a, at.z, _bound(at, at.z, gamma, axis, arithmetic))
    if f.ulps:
        passed_on = passed_on + f.ulps * ulp(at.y, arithmetic) + abs(at.z) * ulp(0, arithmetic)
    allowed = np.maximum(_bound(at, at.y, gamma, axis, arithmetic), passed_on)
    return allowed if name == arithmetic else allowed + ulp(at.y, name)


# Backward ------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """The gradients, or of each what it adds up in size, or of each how far it may be off for what the slope is off."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array


class Differentiated(NamedTuple):
    """Of a backward call."""

    exact: Parts
    terms: Parts
    slack: Parts


def backward(
    dy: Array,
    at: Normalized,
    gamma: Array | None = None,
    *,
    axis: int = 1,
    mask: Array | None = None,
    activation: Any = None,
    frozen: bool = False,
    off: Array | None = None,
) -> Differentiated:
    """Ioffe & Szegedy 2015, section 3; every position is normalized, those in the mask move the statistics as well.

    `off` is how far each xhat may be off where it has to be found again from y.
    """
    arithmetic = FORMATS[dy.dtype.name].arithmetic
    f, a = curve(activation)
    z, xhat, rows = (rows_of(part, axis) for part in (at.z, at.xhat, dy))
    weight = counted(mask, dy, axis) * (0 if frozen else 1 / LONG(at.count))
    bend = _change(f.slope, a, z, rows_of(_bound(at, at.z, gamma, axis, arithmetic), axis))
    if f.terms is not None:
        bend = bend + f.ulps * ulp(1, arithmetic) * f.terms(z, a) + abs(z) * ulp(0, arithmetic)
    slope = _column(gamma, 1, rows.shape[0]) * at.inv_std[:, np.newaxis]

    def parts(dz: Array, xhat: Array, larger: Array, slope: Array, sign: int) -> Parts:
        dbeta, dgamma = dz.sum(axis=1, keepdims=True), (dz * larger).sum(axis=1, keepdims=True)
        dx = slope * (dz + sign * weight * (dbeta + xhat * dgamma))
        return Parts(shaped(dx, at.y, axis), dgamma[:, 0], dbeta[:, 0], shaped(dz, at.y, axis))

    dz, size = rows * f.slope(z, a), np.maximum(1, abs(xhat))
    terms, slack = (parts(part, abs(xhat), size, abs(slope), 1) for part in (abs(dz), abs(rows) * bend))
    if off is not None:
        away = rows_of(off, axis)
        dgamma = (abs(dz) * away).sum(axis=1)
        dx = abs(slope) * weight * (abs(xhat) * dgamma[:, np.newaxis] + away * terms.dgamma[:, np.newaxis])
        slack = slack._replace(dx=slack.dx + shaped(dx, at.y, axis), dgamma=slack.dgamma + dgamma)
    return Differentiated(parts(dz, xhat, xhat, slope, -1), terms, slack)


def found_again(
    at: Normalized,
    gamma: Array | None = None,
    *,
    axis: int = 1,
    activation: Any = None,
    dtype: Any = "float32",
) -> Array:
    """How far xhat may be off that is found again from y: y's error, and the roundings on the way back, over gamma."""
    f, a = curve(activation)
    error = rows_of(bound(at, gamma, axis=axis, activation=activation, dtype=dtype), axis) / f.slope(
        rows_of(at.z, axis), a
    )
    rounded = 2 * ulp(1, FORMATS[np.dtype(dtype).name].arithmetic) * rows_of(at.terms, axis)
    return shaped((error + rounded) / abs(_column(gamma, 1, at.mean.shape[0])), at.y, axis)


# Running statistics --------------------------------------------------------------------------------------------------


def blended(old: Array, batch: Array, momentum: float) -> Array:
    """A running statistic after one more batch."""
    return (1 - LONG(momentum)) * long(old) + LONG(momentum) * batch


def unbiased(var: Array, count: float) -> Array:
    """The variance over M - 1 from the variance over M."""
    return var * (LONG(count) / LONG(count - 1))
