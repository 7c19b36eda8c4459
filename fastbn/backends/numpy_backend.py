"""What does batch norm compute? The readable reference: NumPy alone, in float64, for any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._activations import Activation
from .._moments import blend

Array = np.ndarray[Any, Any]

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


def _column(per_channel: Array) -> Array:
    """(channels,) -> (channels, 1), which broadcasts over (outer, channels, inner)."""
    return per_channel[:, np.newaxis]


def _truth(mask: Array | None) -> Array | None:
    """A mask of which any byte but 0 is True, as one of True and False."""
    return None if mask is None else mask.view(np.uint8) != 0


def _where(mask: Array | None) -> Any:
    """A mask (outer, inner) as the `where` of NumPy's sums."""
    return True if mask is None else mask[:, np.newaxis, :]


def _sum(a: Array, mask: Array | None = None) -> Array:
    total: Array = a.sum(axis=(0, 2), dtype=np.float64, where=_where(mask))
    return total


def _save(
    saved: Array, mean: Array, low: Array | float, var: Array, eps: float, g: Array | None, b: Array | None
) -> None:
    std = np.sqrt(var + eps)
    saved[0], saved[1], saved[2] = mean, low, var
    saved[3] = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
    saved[4] = 1 if g is None else g
    saved[5] = 0 if b is None else b


def _centred(x: Array, mean: Array, low: Array) -> Array:
    """Centred x, in float64: the mean in two pieces, so that its own rounding does not matter."""
    centred = np.subtract(x, _column(mean), dtype=np.float64)
    centred -= _column(low)
    return centred


def _moments(x: Array, mask: Array | None, into: Array) -> Array:
    """Fills the rows mean, mean_low and m2, and returns x centred."""
    count = x.shape[0] * x.shape[2] if mask is None else np.count_nonzero(mask)
    n, i = (0, 0) if mask is None else divmod(int(mask.argmax()), mask.shape[1])
    first = x[n, :, i].astype(np.float64)
    origin = np.where(np.isfinite(first), first, 0)  # sums about one of the values do not overflow where all are alike
    into[0] = origin + _sum(_centred(x, origin, np.zeros_like(origin)), mask) / count
    into[1] = 0
    centred = _centred(x, into[0], into[1])
    into[1] = _sum(centred, mask) / count
    centred -= _column(into[1])
    into[2] = np.einsum("nci,nci->c", centred, centred) if mask is None else _sum(np.square(centred), mask)
    return centred


def _preactivation(centred: Array, residual: Array | None, saved: Array) -> Array:
    """Overwrites `centred` with what the activation gets."""
    z = np.multiply(centred, _column(saved[3] * saved[4]), out=centred)
    z += _column(saved[5])
    if residual is not None:
        z += residual
    return z


def _sigmoid(z: Array) -> Array:
    """Of either sign without overflow: 1 / (1 + e) or e / (1 + e) with e = exp(-|z|)."""
    e = np.abs(z)
    np.exp(np.negative(e, out=e), out=e)
    result = np.where(z < 0, e, 1)
    e += 1
    return np.divide(result, e, out=result)


def _activate(z: Array, activation: int, slope: float, y: Array) -> None:
    """Into y; overwrites z."""
    if activation == Activation.RELU:
        np.maximum(z, 0, out=z)
    elif activation == Activation.RELU6:
        np.clip(z, 0, 6, out=z)
    elif activation == Activation.LEAKY_RELU:
        np.multiply(z, slope, out=z, where=z <= 0)
    elif activation == Activation.SILU:
        z *= _sigmoid(z)
    elif activation == Activation.HARDSWISH:
        gate = z + 3
        np.clip(gate, 0, 6, out=gate)
        gate /= 6
        z *= gate
    elif activation == Activation.SIGMOID:
        z = _sigmoid(z)
    y[...] = z


def _dz(
    dy: Array, x: Array, residual: Array | None, saved: Array, activation: int, slope: float, from_y: bool
) -> Array:
    """The gradient before the activation, whose slope at kinks is PyTorch's.

    At NaN dy passes, unless z is in the formula of the slope there.
    """
    if activation == Activation.IDENTITY:
        return dy.astype(np.float64)
    # Where y stands in for x it has the sign of z.
    z = x.astype(np.float64) if from_y else _preactivation(_centred(x, saved[0], saved[1]), residual, saved)
    if activation in (Activation.SIGMOID, Activation.SILU):
        dz = _smooth_slopes(z, activation)
        dz *= dy
        return dz
    flat, slopes = z <= 0, None
    if activation == Activation.RELU6:
        flat |= z >= 6
    elif activation == Activation.LEAKY_RELU:
        flat = ~(z > 0)  # at NaN, too
    elif activation == Activation.HARDSWISH:
        flat, slopes = z <= -3, z / 3
        slopes += 0.5
        np.copyto(slopes, 1, where=z >= 3)
    dz = z
    np.copyto(dz, dy)
    if slopes is not None:
        dz *= slopes
    if activation == Activation.LEAKY_RELU:
        np.multiply(dz, slope, out=dz, where=flat)
    else:
        np.copyto(dz, 0, where=flat)
    return dz


def _smooth_slopes(z: Array, activation: int) -> Array:
    """Of the sigmoid, s(1 - s) = e / (1 + e)^2 with e = exp(-|z|), and of the SiLU, s + z s(1 - s); overwrites z."""
    smaller: Array = np.abs(z)
    np.exp(np.negative(smaller, out=smaller), out=smaller)
    larger = smaller + 1
    np.divide(1, larger, out=larger)
    smaller *= larger  # one of them is s, the other 1 - s
    if activation == Activation.SIGMOID:
        smaller *= larger
        return smaller
    z *= smaller
    z *= larger
    np.copyto(larger, smaller, where=np.signbit(z))
    larger += z
    return larger


def _xhat(x: Array, residual: Array | None, saved: Array, activation: int, slope: float, from_y: bool) -> Array:
    """Normalized x; from_y by way of y, which x then holds: Rota Bulo et al. 2018, section 3.2."""
    if not from_y:
        xhat = _centred(x, saved[0], saved[1])
        xhat *= _column(saved[3])
        return xhat
    xhat = x.astype(np.float64)
    if activation == Activation.LEAKY_RELU:
        np.divide(xhat, slope, out=xhat, where=x <= 0)
    if residual is not None:
        xhat -= residual
    xhat -= _column(saved[5])
    xhat /= _column(saved[4])
    return xhat


def forward(
    x: Array,
    residual: Array | None,
    mask: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: int,
    eps: float,
    activation: int,
    slope: float,
    y: Array,
    saved: Array,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, algorithm 1."""
    mask = _truth(mask)
    count = x.shape[0] * x.shape[2] if mask is None else int(np.count_nonzero(mask))
    rows = np.empty((3, x.shape[1]))
    with np.errstate(all="ignore"):
        centred = _moments(x, mask, rows)
        mean, low, m2 = rows
        _save(saved, mean, low, m2 / count, eps, gamma, beta)
        _activate(_preactivation(centred, residual, saved), activation, slope, y)
    blend(rows, count, running_mean, running_var, momentum, correction)


def infer(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array | None,
    var: Array | None,
    eps: float,
    activation: int,
    slope: float,
    y: Array,
    saved: Array | None,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, algorithm 2."""
    constants = np.zeros((6, x.shape[1])) if saved is None else saved
    if mean is not None and var is not None:
        constants[0], constants[1], constants[2] = mean, 0, var
    with np.errstate(all="ignore"):
        _save(constants, constants[0], constants[1], constants[2], eps, gamma, beta)
        centred = _centred(x, constants[0], constants[1])
        _activate(_preactivation(centred, residual, constants), activation, slope, y)


def moments(x: Array, mask: Array | None, into: Array, threads: int) -> None:
    """Of the values where mask is True; the mean in two pieces."""
    with np.errstate(all="ignore"):
        _moments(x, _truth(mask), into)


def backward_sums(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
    saved: Array,
    activation: int,
    slope: float,
    from_y: bool,
    sums: Array,
    threads: int,
) -> None:
    """Of dz, dbeta, and of dz * xhat, dgamma: Ioffe & Szegedy 2015, section 3."""
    with np.errstate(all="ignore"):
        dz, xhat = _dz_and_xhat(dy, x, residual, _truth(mask), saved, activation, slope, from_y)
        _add_up(dz, xhat, sums)


def _dz_and_xhat(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
    saved: Array,
    activation: int,
    slope: float,
    from_y: bool,
) -> tuple[Array, Array]:
    """Both are 0 where the mask is False and dy is 0: such a position is nothing to any gradient, whatever x may be."""
    dz = _dz(dy, x, residual, saved, activation, slope, from_y)
    xhat = _xhat(x, residual, saved, activation, slope, from_y)
    if mask is not None:
        nothing = (dy == 0) & ~_where(mask)
        np.copyto(dz, 0, where=nothing)
        np.copyto(xhat, 0, where=nothing)
    return dz, xhat


def _add_up(dz: Array, xhat: Array, sums: Array) -> None:
    sums[0] = _sum(dz)
    sums[1] = np.einsum("nci,nci->c", dz, xhat)


def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    mask: Array | None,
    saved: Array,
    count: float,
    frozen: bool,
    sums: Array | None,
    activation: int,
    slope: float,
    from_y: bool,
    dx: Array,
    dresidual: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, section 3, the gradients gathered by input; values that mask leaves out move no other."""
    with np.errstate(all="ignore"):
        mask = _truth(mask)
        dz, xhat = _dz_and_xhat(dy, x, residual, mask, saved, activation, slope, from_y)
        nothing = None if mask is None else (dy == 0) & ~_where(mask)
        if dresidual is not None:
            dresidual[...] = dz
        if sums is None:
            sums = np.empty((2, x.shape[1]))
            _add_up(dz, xhat, sums)
        if dbeta is not None:
            dbeta[...] = sums[0]
        if dgamma is not None:
            dgamma[...] = sums[1]
        if not frozen:
            xhat *= _column(sums[1] / count)
            xhat += _column(sums[0] / count)
            if mask is not None:
                np.copyto(xhat, 0, where=~_where(mask))
            dz -= xhat
        dz *= _column(saved[4] * saved[3])
        if nothing is not None:
            np.copyto(dz, 0, where=nothing)
        dx[...] = dz


def describe() -> dict[str, str]:
    """For show_config()."""
    return {"version": np.__version__}
