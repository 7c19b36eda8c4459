"""What does batch norm compute? A readable reference in NumPy alone, which computes in float64 for any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._moments import blend, save, save_parameters
from ..call.activations import Activation
from ..call.record import BackwardCall, Call, Options

Array = np.ndarray[Any, Any]

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


def _column(per_channel: Array) -> Array:
    """(channels,) -> (channels, 1), which broadcasts over (outer, channels, inner)."""
    return per_channel[:, np.newaxis]


def _truth(mask: Array | None) -> Array | None:
    """A mask of the bytes 0 and 1 from one in which any byte but 0 is True."""
    return None if mask is None else mask.view(np.uint8) != 0


def _where(mask: Array | None) -> Any:
    """The argument `where` of NumPy's sums for a mask (outer, inner)."""
    return True if mask is None else mask[:, np.newaxis, :]


def _sum(a: Array, mask: Array | None = None) -> Array:
    total: Array = a.sum(axis=(0, 2), dtype=np.float64, where=_where(mask))
    return total


def _centred(x: Array, mean: Array, low: Array) -> Array:
    """Subtracts the mean, in float64. It comes in two pieces, so that its own rounding does not matter."""
    centred = np.subtract(x, _column(mean), dtype=np.float64)
    centred -= _column(low)
    return centred


def _moments(x: Array, mask: Array | None, into: Array) -> Array:
    """Fills the rows mean, mean_low and m2, and returns x centred."""
    count = x.shape[0] * x.shape[2] if mask is None else np.count_nonzero(mask)
    n, i = (0, 0) if mask is None else divmod(int(mask.argmax()), mask.shape[1])
    first = x[n, :, i].astype(np.float64)
    origin = np.where(np.isfinite(first), first, 0)  # sums about one of the values do not overflow if all are equal
    into[0] = origin + _sum(_centred(x, origin, np.zeros_like(origin)), mask) / count
    into[1] = 0
    centred = _centred(x, into[0], into[1])
    into[1] = _sum(centred, mask) / count
    centred -= _column(into[1])
    into[1] = np.where(np.isfinite(into[0]), into[1], 0)  # an infinite mean has no second piece
    into[2] = np.einsum("nci,nci->c", centred, centred) if mask is None else _sum(np.square(centred), mask)
    into[2] = np.where(into[2] < np.inf, into[2], np.nan)  # as `save` says
    return centred


def _times_gain(values: Array, saved: Array) -> Array:
    """Multiplies `values` by gamma / std, in two steps where float64 cannot hold that as a normal number."""
    inv_std, gamma = saved[3], saved[4]
    gain = inv_std * gamma
    size, limits = abs(gain), np.finfo(gain.dtype)
    held = (gamma == 0) | (inv_std == 0) | ((size >= limits.tiny) & (size <= limits.max))
    values *= _column(np.where(held, gain, inv_std))
    if not held.all():
        values *= _column(np.where(held, 1, gamma))
    return values


def _preactivation(centred: Array, residual: Array | None, saved: Array) -> Array:
    """Overwrites `centred` with z, the argument of the activation. Beta and a residual may cancel, and come first."""
    z, shift = _times_gain(centred, saved), _column(saved[5])
    z += shift if residual is None else np.add(residual, shift, dtype=np.float64)
    return z


def _sigmoid(z: Array) -> Array:
    """The sigmoid, without overflow for either sign: 1 / (1 + e) or e / (1 + e) with e = exp(-|z|)."""
    e = np.abs(z)
    np.exp(np.negative(e, out=e), out=e)
    result = np.where(z < 0, e, 1)
    e += 1
    return np.divide(result, e, out=result)


def _pointwise(z: Array, options: Options, dy: Array | None = None) -> Array:
    """The activation of z or, with dy, dy times its derivative at z, which at kinks is PyTorch's. Overwrites z.

    Where z is NaN, the gradient is dy, unless the formula of the derivative contains z.
    """
    activation = options.activation
    if activation == Activation.RELU:
        return np.maximum(z, 0, out=z) if dy is None else _but(dy, z, z <= 0)
    if activation == Activation.RELU6:
        return np.clip(z, 0, 6, out=z) if dy is None else _but(dy, z, (z <= 0) | (z >= 6))
    if activation == Activation.LEAKY_RELU:
        if dy is None:
            return np.multiply(z, options.slope, out=z, where=z <= 0)
        return _but(dy, z, ~(z > 0), options.slope)  # NaN included
    if activation == Activation.HARDSWISH:
        if dy is None:
            z *= np.clip(z + 3, 0, 6) / 6
            return z
        between = z / 3 + 0.5
        np.copyto(between, 1, where=z >= 3)
        between *= dy
        return _but(between, z, z <= -3)
    if activation == Activation.SILU:
        return np.multiply(z, _sigmoid(z), out=z) if dy is None else _smooth_gradient(dy, z, times_z=True)
    if activation == Activation.SIGMOID:
        return _sigmoid(z) if dy is None else _smooth_gradient(dy, z, times_z=False)
    return z


def _but(dy: Array, z: Array, where: Array, slope: float | None = None) -> Array:
    """Overwrites z with dy, and with 0, or dy * slope, at some positions."""
    np.copyto(z, dy)
    if slope is None:
        np.copyto(z, 0, where=where)
    else:
        np.multiply(z, slope, out=z, where=where)
    return z


def _dz(call: BackwardCall) -> Array:
    """The gradient of z. With from_y, x is y, which has the sign of z."""
    dy, x, saved = call.dy, call.x, call.saved
    if call.options.activation == Activation.IDENTITY:
        return dy.astype(np.float64)
    z = x.astype(np.float64) if call.from_y else _preactivation(_centred(x, saved[0], saved[1]), call.residual, saved)
    return _pointwise(z, call.options, dy)


def _smooth_gradient(dy: Array, z: Array, *, times_z: bool) -> Array:
    """Multiplies dy by s(1 - s) for the sigmoid s, and by s + z s(1 - s) for the SiLU; overwrites z.

    s(1 - s) is e / (1 + e)^2, e = exp(-|z|).
    """
    smaller: Array = np.abs(z)
    np.exp(np.negative(smaller, out=smaller), out=smaller)
    larger = smaller + 1
    np.divide(1, larger, out=larger)
    smaller *= larger  # one of the two is s, the other is 1 - s
    if times_z:
        z *= smaller
        z *= larger
        np.copyto(larger, smaller, where=np.signbit(z))
        larger += z
    else:
        larger *= smaller
    larger *= dy
    return larger


def _xhat(call: BackwardCall) -> Array:
    """Normalized x. With from_y, x holds y, from which xhat is computed: Rota Bulo et al. 2018, section 3.2."""
    x, saved = call.x, call.saved
    if not call.from_y:
        xhat = _centred(x, saved[0], saved[1])
        xhat *= _column(saved[3])
        return xhat
    xhat = x.astype(np.float64)
    if call.options.activation == Activation.LEAKY_RELU:
        np.divide(xhat, call.options.slope, out=xhat, where=x <= 0)
    if call.residual is not None:
        xhat -= call.residual
    xhat -= _column(saved[5])
    xhat /= _column(saved[4])
    return xhat


def _normalize(call: Call, saved: Array, centred: Array | None = None) -> None:
    """Fills y and the last three rows of saved from its first three; overwrites `centred`."""
    std = np.sqrt(saved[2] + call.eps)
    saved[3] = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
    save_parameters(call, saved)
    if centred is None:
        centred = _centred(call.x, saved[0], saved[1])
    call.y[...] = _pointwise(_preactivation(centred, call.residual, saved), call.options)


def forward(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 1."""
    mask = _truth(call.mask)
    count = call.x.shape[0] * call.x.shape[2] if mask is None else int(np.count_nonzero(mask))
    rows = np.empty((3, call.x.shape[1]))
    with np.errstate(all="ignore"):
        centred = _moments(call.x, mask, rows)
        save(rows, count, call.saved)
        _normalize(call, call.saved, centred)
    blend(call, rows, count)


def infer(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 2."""
    saved = np.empty((6, call.x.shape[1])) if call.saved is None else call.saved
    saved[0], saved[1], saved[2] = call.running_mean, 0, call.running_var
    with np.errstate(all="ignore"):
        _normalize(call, saved)


def apply(call: Call) -> None:
    """Ioffe & Szegedy 2015, algorithm 2, with the statistics in the first three rows of saved."""
    with np.errstate(all="ignore"):
        _normalize(call, call.saved)


def moments(call: Call) -> None:
    """Fills the mean, in two pieces, and the sum of squares about it, of the values where mask is True."""
    with np.errstate(all="ignore"):
        _moments(call.x, _truth(call.mask), call.moments)


def backward_sums(call: BackwardCall) -> None:
    """Sums dz, which is dbeta, and dz * xhat, which is dgamma: Ioffe & Szegedy 2015, section 3."""
    with np.errstate(all="ignore"):
        dz, xhat = _dz_and_xhat(call, _left_out(call))
        _add_up(dz, xhat, call.sums)


def _left_out(call: BackwardCall) -> Array | None:
    """Where the mask is False and dy is 0: these positions add nothing to any gradient, whatever x is there."""
    mask = _truth(call.mask)
    return None if mask is None else (call.dy == 0) & ~_where(mask)


def _dz_and_xhat(call: BackwardCall, left_out: Array | None) -> tuple[Array, Array]:
    """Computes dz and xhat, which are both 0 at the positions that are left out."""
    dz, xhat = _dz(call), _xhat(call)
    if left_out is not None:
        np.copyto(dz, 0, where=left_out)
        np.copyto(xhat, 0, where=left_out)
    return dz, xhat


def _add_up(dz: Array, xhat: Array, sums: Array) -> None:
    sums[0] = _sum(dz)
    sums[1] = np.einsum("nci,nci->c", dz, xhat)


def backward(call: BackwardCall) -> None:
    """Ioffe & Szegedy 2015, section 3, solved for dx; values where mask is False have no influence on the others."""
    with np.errstate(all="ignore"):
        mask, left_out = _truth(call.mask), _left_out(call)
        dz, xhat = _dz_and_xhat(call, left_out)
        if call.dresidual is not None:
            call.dresidual[...] = dz
        sums = call.sums
        if sums is None:
            sums = np.empty((2, call.x.shape[1]))
            _add_up(dz, xhat, sums)
        if call.dbeta is not None:
            call.dbeta[...] = sums[0]
        if call.dgamma is not None:
            call.dgamma[...] = sums[1]
        if not call.frozen:
            xhat *= _column(sums[1] / call.counted)
            xhat += _column(sums[0] / call.counted)
            if mask is not None:
                np.copyto(xhat, 0, where=~_where(mask))
            dz -= xhat
        _times_gain(dz, call.saved)
        if left_out is not None:
            np.copyto(dz, 0, where=left_out)
        call.dx[...] = dz


def describe() -> dict[str, str]:
    """What show_config() prints about this backend."""
    return {"version": np.__version__}
