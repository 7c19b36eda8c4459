"""NumPy, on one thread: the formulas as in a textbook, and the same with all temporaries reused, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..problem import EPS, MOMENTUM, Array, Contestant, Problem


def _naive(p: Problem, pass_: str) -> Callable[[], tuple[Array, ...]]:
    x, dy, axes, m = p.x, p.dy, p.axes, p.x.size // p.channels
    gamma, beta = p.along_channels(p.gamma), p.along_channels(p.beta)
    running_mean, running_var = map(p.along_channels, p.running())
    mean, var = map(p.along_channels, p.batch)

    def infer() -> tuple[Array, ...]:
        return ((x - running_mean) / np.sqrt(running_var + EPS) * gamma + beta,)

    def forward() -> tuple[Array, ...]:
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * (m / (m - 1))
        return ((x - mean) / np.sqrt(var + EPS) * gamma + beta,)

    def backward() -> tuple[Array, ...]:
        std = np.sqrt(var + EPS)
        xhat = (x - mean) / std
        dbeta, dgamma = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
        return gamma / std * (dy - dbeta / m - xhat * dgamma / m), dgamma.ravel(), dbeta.ravel()

    return {"infer": infer, "forward": forward, "backward": backward}[pass_]


def _careful(p: Problem, pass_: str) -> Callable[[], tuple[Array, ...]]:
    x, dy, axes, y, m = p.x, p.dy, p.axes, p.out, p.x.size // p.channels
    wide = p.statistics
    gamma, beta = p.along_channels(p.gamma), p.along_channels(p.beta)
    running_mean, running_var = map(p.along_channels, p.running())
    mean, var = map(p.along_channels, p.batch)
    scale = (gamma / np.sqrt(running_var + EPS)).astype(x.dtype)
    shift = (beta - running_mean * scale).astype(x.dtype)
    temporary = np.empty_like(x) if pass_ != "infer" else x
    inverse = (1 / np.sqrt(var + EPS)).astype(x.dtype)

    def infer() -> tuple[Array, ...]:
        np.multiply(x, scale, out=y)
        np.add(y, shift, out=y)
        return (y,)

    def forward() -> tuple[Array, ...]:
        mean = np.mean(x, axes, dtype=wide, keepdims=True)
        np.subtract(x, mean, out=y, casting="same_kind")
        np.multiply(y, y, out=temporary)
        var = np.mean(temporary, axes, dtype=wide, keepdims=True)
        np.multiply(y, gamma / np.sqrt(var + EPS), out=y, casting="same_kind")
        np.add(y, beta, out=y, casting="same_kind")
        for running, batch in ((running_mean, mean), (running_var, var * (m / (m - 1)))):
            running *= 1 - MOMENTUM
            running += MOMENTUM * batch
        return (y,)

    def backward() -> tuple[Array, ...]:
        np.subtract(x, mean, out=y, casting="same_kind")
        np.multiply(y, inverse, out=y)
        np.multiply(dy, y, out=temporary)
        dgamma, dbeta = (np.sum(a, axes, dtype=wide, keepdims=True) for a in (temporary, dy))
        np.multiply(y, dgamma / m, out=y, casting="same_kind")
        np.subtract(dy, y, out=y)
        np.subtract(y, dbeta / m, out=y, casting="same_kind")
        np.multiply(y, gamma * inverse, out=y, casting="same_kind")
        return y, dgamma.ravel(), dbeta.ravel()

    return {"infer": infer, "forward": forward, "backward": backward}[pass_]


class Rival:
    """NumPy's ufuncs, which use one thread only."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.version = np.__version__
        self._threads = 1

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if self._threads > 1:
            return []

        def results(value: Any) -> tuple[Array, ...]:
            return problem.channels_first(value[0]), *value[1:]

        ways = {"NumPy naive": _naive, "NumPy careful": _careful}
        return [Contestant(name=name, call=way(problem, pass_), results=results) for name, way in ways.items()]
