"""JAX: jit-compiled functions on XLA's CPU client; a call waits for the result."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..problem import EPS, MOMENTUM, Array, Contestant, Problem


class Rival:
    """Batch norm as users would write it in jax.numpy. Each pass is one compiled function."""

    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._jax: Any = importlib.import_module("jax")
        self._numpy: Any = importlib.import_module("jax.numpy")
        self._backend: Any = importlib.import_module("jax.extend.backend")
        self._jax.config.update("jax_platforms", "cpu")
        self._jax.config.update("jax_enable_x64", True)
        self.version = str(self._jax.__version__)
        self._possible = True

    def set_threads(self, threads: int) -> None:
        """Makes a new client, since XLA takes its number of threads from the process's affinity at that time."""
        if not hasattr(os, "sched_setaffinity"):
            self._possible = threads == os.cpu_count()
            return
        allowed = os.sched_getaffinity(0)
        self._possible = threads <= len(allowed)
        os.sched_setaffinity(0, sorted(allowed)[:threads])
        try:
            self._jax.clear_caches()
            self._backend.clear_backends()
            self._jax.devices()
        finally:
            os.sched_setaffinity(0, allowed)

    def _function(self, problem: Problem, pass_: str) -> Callable[..., Any]:
        np_, axes, wide = self._numpy, problem.axes, problem.statistics
        shaped = problem.along_channels

        def infer(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            scale = shaped(gamma / np_.sqrt(var + EPS))
            return ((x - shaped(mean)) * scale + shaped(beta)).astype(x.dtype)

        def forward(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            own = x.astype(wide)
            batch_mean, batch_var = own.mean(axes), own.var(axes)
            m = x.size / problem.channels
            mean = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
            var = (1 - MOMENTUM) * var + MOMENTUM * batch_var * (m / (m - 1))
            return infer(x, gamma, beta, batch_mean, batch_var), mean, var

        def backward(dy: Any, x: Any, gamma: Any, mean: Any, var: Any) -> Any:
            inverse = 1 / np_.sqrt(var + EPS)
            xhat = (x.astype(wide) - shaped(mean)) * shaped(inverse)
            dbeta, dgamma = dy.sum(axes, dtype=wide), (dy * xhat).sum(axes)
            m = x.size / problem.channels
            dx = shaped(gamma * inverse) * (dy - shaped(dbeta / m) - xhat * shaped(dgamma / m))
            return dx.astype(x.dtype), dgamma, dbeta

        return {"infer": infer, "forward": forward, "backward": backward}[pass_]

    def prepare(self, problem: Problem, pass_: str) -> list[Contestant]:
        if not self._possible:
            return []
        p = problem
        own = (p.dy, p.x, p.gamma, *p.batch) if pass_ == "backward" else (p.x, p.gamma, p.beta, *p.running())
        arguments = tuple(map(self._numpy.asarray, own))
        function, wait = self._jax.jit(self._function(p, pass_)), self._jax.block_until_ready

        def results(value: Any) -> tuple[Array, ...]:
            if pass_ == "infer":
                return (p.channels_first(np.asarray(value)),)
            first, *others = map(np.asarray, value)
            return (p.channels_first(first), *(others if pass_ == "backward" else ()))

        return [Contestant(name="JAX", call=lambda: wait(function(*arguments)), results=results)]
