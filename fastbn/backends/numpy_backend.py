"""What does batch norm compute? The readable reference: NumPy alone, in float64, for any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._activations import Activation

Array = np.ndarray[Any, Any]


def _column(per_channel: Array) -> Array:
    """(channels,) -> (channels, 1), which broadcasts over (outer, channels, inner)."""
    return per_channel[:, np.newaxis]


def _mean(a: Array) -> Array:
    mean: Array = a.mean(axis=(0, 2), dtype=np.float64)
    return mean


def _save(
    saved: Array, mean: Array, low: Array | float, var: Array, eps: float, g: Array | None, b: Array | None
) -> None:
    std = np.sqrt(var + eps)
    saved[0], saved[1], saved[2] = mean, low, var
    saved[3] = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
    saved[4] = 1 if g is None else g
    saved[5] = 0 if b is None else b


def _centred(x: Array, saved: Array) -> Array:
    """Centred x, in float64: the mean in two pieces, so that its own rounding does not matter."""
    centred = np.subtract(x, _column(saved[0]), dtype=np.float64)
    centred -= _column(saved[1])
    return centred


def _preactivation(centred: Array, residual: Array | None, saved: Array) -> Array:
    """Overwrites `centred` with what the activation gets."""
    z = np.multiply(centred, _column(saved[3] * saved[4]), out=centred)
    z += _column(saved[5])
    if residual is not None:
        z += residual
    return z


def _activate(z: Array, activation: int, y: Array) -> None:
    if activation == Activation.RELU:
        np.maximum(z, 0, out=z)
    y[...] = z


def forward(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    correction: int,
    eps: float,
    activation: int,
    y: Array,
    saved: Array,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, algorithm 1."""
    count = x.shape[0] * x.shape[2]
    with np.errstate(all="ignore"):
        mean = _mean(x)
        centred = x - _column(mean)
        low = _mean(centred)
        centred -= _column(low)
        m2 = np.einsum("nci,nci->c", centred, centred)
        _save(saved, mean, low, m2 / count, eps, gamma, beta)
        _activate(_preactivation(centred, residual, saved), activation, y)
        if running_mean is not None and running_var is not None:
            running_mean[...] = (1 - momentum) * running_mean + momentum * (mean + low)
            running_var[...] = (1 - momentum) * running_var + momentum * m2 / (count - correction)


def infer(
    x: Array,
    residual: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    var: Array,
    eps: float,
    activation: int,
    y: Array,
    saved: Array | None,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, algorithm 2."""
    constants = np.empty((6, x.shape[1])) if saved is None else saved
    with np.errstate(all="ignore"):
        _save(constants, mean, 0, var.astype(np.float64), eps, gamma, beta)
        _activate(_preactivation(_centred(x, constants), residual, constants), activation, y)


def backward(
    dy: Array,
    x: Array,
    residual: Array | None,
    saved: Array,
    frozen: bool,
    activation: int,
    dx: Array,
    dresidual: Array | None,
    dgamma: Array | None,
    dbeta: Array | None,
    threads: int,
) -> None:
    """Ioffe & Szegedy 2015, section 3, the gradients gathered by input."""
    count = x.shape[0] * x.shape[2]
    inv_std, gamma = saved[3], saved[4]
    with np.errstate(all="ignore"):
        dz = dy
        if activation == Activation.RELU:
            z = _preactivation(_centred(x, saved), residual, saved)
            dz = np.where(z <= 0, 0, dy)
        if dresidual is not None:
            dresidual[...] = dz
        xhat = _centred(x, saved)
        xhat *= _column(inv_std)
        sum_dz = dz.sum(axis=(0, 2), dtype=np.float64)
        sum_dz_xhat = np.einsum("nci,nci->c", dz, xhat, dtype=np.float64, casting="same_kind")
        if dgamma is not None:
            dgamma[...] = sum_dz_xhat
        if dbeta is not None:
            dbeta[...] = sum_dz
        if frozen:
            dx[...] = _column(gamma * inv_std) * dz
            return
        # xhat becomes dx: gamma inv_std (dz - sum_dz / M - xhat sum_dz_xhat / M)
        xhat *= _column(-sum_dz_xhat / count)
        xhat += dz
        xhat -= _column(sum_dz / count)
        dx[...] = np.multiply(xhat, _column(gamma * inv_std), out=xhat)


def describe() -> dict[str, str]:
    """For show_config()."""
    return {"version": np.__version__}
