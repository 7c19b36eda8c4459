"""What is the right answer? Textbook batch norm in long double, channel by channel; imports nothing from fastbn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LONG = np.longdouble


def rows_of(array: Array, axis: int) -> Array:
    """(C, M): every channel's values in a row, in long double."""
    moved = np.moveaxis(np.asarray(array), axis, 0)
    return moved.reshape(moved.shape[0], -1).astype(LONG)


def shaped(rows: Array, like: Array, axis: int) -> Array:
    """The inverse of `rows_of`, for an array shaped like `like`."""
    moved = np.moveaxis(like, axis, 0)
    return np.moveaxis(rows.reshape(moved.shape), 0, axis)


def _column(values: Array | float | None, default: float, channels: int) -> Array:
    filled = np.full(channels, default, LONG) if values is None else np.asarray(values).astype(LONG)
    return filled[:, np.newaxis]


@dataclass(frozen=True)
class Normalized:
    """Of a forward call: y and xhat in x's shape; mean, the biased var and inv_std per channel."""

    y: Array
    xhat: Array
    mean: Array
    var: Array
    inv_std: Array


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    residual: Array | None = None,
) -> Normalized:
    """Ioffe & Szegedy 2015, algorithm 1; with mean and var given, algorithm 2."""
    rows = rows_of(x, axis)
    channels = rows.shape[0]
    if mean is None or var is None:
        mean_ = rows.mean(axis=1, keepdims=True)
        centred = rows - mean_
        rest = centred.mean(axis=1, keepdims=True)  # what the rounding of the first mean left over
        centred -= rest
        mean_ = mean_ + rest
        var_ = (centred * centred).mean(axis=1, keepdims=True)
    else:
        mean_, var_ = _column(mean, 0, channels), _column(var, 1, channels)
        centred = rows - mean_
    with np.errstate(divide="ignore"):
        inv_std = np.where(var_ + LONG(eps) == 0, LONG(0), 1 / np.sqrt(var_ + LONG(eps)))
    xhat = centred * inv_std
    y = xhat * _column(gamma, 1, channels) + _column(beta, 0, channels)
    if residual is not None:
        y = y + rows_of(residual, axis)
    if activation == "relu":
        y = np.maximum(y, 0)
    return Normalized(shaped(y, x, axis), shaped(xhat, x, axis), mean_[:, 0], var_[:, 0], inv_std[:, 0])


@dataclass(frozen=True)
class Differentiated:
    """Of a backward call: the gradients, and for each the size of the terms that were added up to it."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array
    dx_terms: Array
    dgamma_terms: Array
    dbeta_terms: Array


def backward(
    dy: Array,
    x: Array,
    at: Normalized,
    gamma: Array | None = None,
    *,
    axis: int = 1,
    passed: Array | None = None,
    frozen: bool = False,
) -> Differentiated:
    """Ioffe & Szegedy 2015, section 3. `passed`: where a relu let its input through (None: no activation)."""
    dz = rows_of(dy, axis)
    if passed is not None:
        dz = np.where(rows_of(passed, axis) != 0, dz, LONG(0))
    xhat = rows_of(at.xhat, axis)
    count = dz.shape[1]
    slope = _column(gamma, 1, dz.shape[0]) * at.inv_std[:, np.newaxis]
    dbeta = dz.sum(axis=1, keepdims=True)
    dgamma = (dz * xhat).sum(axis=1, keepdims=True)
    dbeta_terms = abs(dz).sum(axis=1, keepdims=True)
    dgamma_terms = (abs(dz) * np.maximum(1, abs(xhat))).sum(axis=1, keepdims=True)
    if frozen:
        dx = slope * dz
        terms = abs(dx)
    else:
        dx = slope * (dz - dbeta / count - xhat * dgamma / count)
        means = dbeta_terms / count, dgamma_terms / count
        terms = abs(slope) * (abs(dz) + means[0] + abs(xhat) * means[1])
    return Differentiated(
        dx=shaped(dx, x, axis),
        dgamma=dgamma[:, 0],
        dbeta=dbeta[:, 0],
        dresidual=shaped(dz, x, axis),
        dx_terms=shaped(terms, x, axis),
        dgamma_terms=dgamma_terms[:, 0],
        dbeta_terms=dbeta_terms[:, 0],
    )


def blended(old: Array, batch: Array, momentum: float) -> Array:
    """A running statistic after one more batch."""
    return (1 - LONG(momentum)) * old.astype(LONG) + LONG(momentum) * batch


def unbiased(var: Array, count: int) -> Array:
    """The variance over M - 1 from the variance over M."""
    return var * (LONG(count) / LONG(count - 1))


def ulp(values: Array | float, dtype: Any = np.float32) -> Array:
    """The distance of neighbouring numbers of `dtype` in the binade of |values|, which need not be of that dtype."""
    info = np.finfo(dtype)
    _, exponent = np.frexp(np.abs(np.asarray(values, LONG)))
    return np.ldexp(LONG(1), np.maximum(exponent - 1, info.minexp) - info.nmant)


def bound(at: Normalized, gamma: Array | None = None, *, axis: int = 1, dtype: Any = np.float32) -> Array:
    """The error that the contract allows in y: 2 ulp of max(1, |xhat|) times |gamma|, plus 1 ulp of |y|."""
    slope = _column(gamma, 1, at.mean.shape[0])
    scaled = shaped(2 * ulp(np.maximum(1, abs(rows_of(at.xhat, axis))), dtype) * abs(slope), at.xhat, axis)
    return scaled + ulp(at.y, dtype)
