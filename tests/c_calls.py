"""How do tests call the C backend's own functions? On arrays of (outer, channels, inner), with results allocated."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn._backends import SAVED_ROWS
from fastbn._backends.c import bridge
from fastbn.call.record import BackwardCall, Call, Options

Array = np.ndarray[Any, Any]


def statistics(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


class Behind(NamedTuple):
    """What follows the normalization."""

    activation: int = 0
    slope: float = 0.0
    residual: Array | None = None


class Forward(NamedTuple):
    y: Array
    saved: Array
    running_mean: Array | None
    running_var: Array | None


class Backward(NamedTuple):
    dx: Array
    dresidual: Array | None
    dgamma: Array
    dbeta: Array


def forward(
    x: Array, gamma: Array | None, beta: Array | None, behind: Behind, *, eps: float = 1e-5, threads: int = 1
) -> Forward:
    channels, dtype = x.shape[1], statistics(x.dtype)
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    y, saved = np.empty_like(x), np.empty((len(SAVED_ROWS), channels))
    bridge.forward(Call(
        x=x, residual=behind.residual, gamma=gamma, beta=beta, running_mean=mean, running_var=var, momentum=0.1,
        correction=1, eps=eps, options=Options(behind.activation, behind.slope), y=y, saved=saved, threads=threads,
    ))  # fmt: skip
    return Forward(y, saved, mean, var)


def infer(
    x: Array, gamma: Array | None, beta: Array | None, behind: Behind, *, eps: float = 0.0, threads: int = 1
) -> Forward:
    """With mean 0 and variance 1, so that with eps 0 and without gamma and beta z is x + residual."""
    channels, dtype = x.shape[1], statistics(x.dtype)
    y, saved = np.empty_like(x), np.empty((len(SAVED_ROWS), channels))
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    bridge.infer(Call(
        x=x, residual=behind.residual, gamma=gamma, beta=beta, running_mean=mean, running_var=var, eps=eps,
        options=Options(behind.activation, behind.slope), y=y, saved=saved, threads=threads,
    ))  # fmt: skip
    return Forward(y, saved, None, None)


def backward(
    dy: Array,
    x: Array,
    saved: Array,
    behind: Behind,
    *,
    frozen: bool = False,
    from_y: bool = False,
    threads: int = 1,
) -> Backward:
    dtype = statistics(x.dtype)
    dx, dgamma, dbeta = np.empty_like(x), np.empty(x.shape[1], dtype), np.empty(x.shape[1], dtype)
    dresidual = np.empty_like(x) if behind.residual is not None and behind.activation else None
    bridge.backward(BackwardCall(
        dy=dy, x=x, residual=behind.residual, saved=saved, counted=float(x.shape[0] * x.shape[2]), frozen=frozen,
        options=Options(behind.activation, behind.slope), from_y=from_y, dx=dx, dresidual=dresidual, dgamma=dgamma,
        dbeta=dbeta, threads=threads,
    ))  # fmt: skip
    return Backward(dx, dresidual, dgamma, dbeta)
