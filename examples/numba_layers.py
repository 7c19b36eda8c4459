"""How is a loop over layers jitted with the norms in it? By fastbn.numba. Run: python examples/numba_layers.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

import fastbn
import fastbn.numba

Array = np.ndarray[Any, Any]
ROWS, WIDTH, LAYERS, STEPS, RATE = 64, 32, 8, 300, np.float32(0.1)


def training(forward: Any, backward: Any) -> Callable[..., Array]:
    """The loop over layers, with these functions: jitted code and NumPy code are the same."""

    def train(gamma: Array, beta: Array, mean: Array, var: Array, x: Array, target: Array) -> Array:
        """Steps of gradient descent on |y - target|^2 / 2 through residual layers; gives the last y."""
        y = x
        for _ in range(STEPS):
            y, caches = x, []
            for i in range(LAYERS):
                y, cache = forward(y, gamma[i], beta[i], mean[i], var[i], activation="silu", residual=y)
                caches.append(cache)
            dy = (y - target) / np.float32(ROWS)
            for i in range(LAYERS - 1, -1, -1):
                gradients = backward(dy, caches[i])
                gamma[i] -= RATE * gradients.dgamma
                beta[i] -= RATE * gradients.dbeta
                dy = gradients.dx + gradients.dresidual
        return y

    return train


def problem() -> tuple[Array, ...]:
    """What `train` takes."""
    rng = np.random.default_rng(0)
    gamma, var = np.ones((2, LAYERS, WIDTH), np.float32)
    beta, mean = np.zeros((2, LAYERS, WIDTH), np.float32)
    x, noise = rng.standard_normal((2, ROWS, WIDTH), np.float32)
    return gamma, beta, mean, var, x, np.sin(2 * x) + noise / 4


def main() -> None:
    """Trains with jitted code, and with NumPy code that calls fastbn's own functions."""
    found = {}
    for name, train in (
        ("jitted", numba.njit(nogil=True)(training(fastbn.numba.forward, fastbn.numba.backward))),
        ("NumPy", training(fastbn.forward, fastbn.backward)),
    ):
        train(*problem())  # compiles
        arrays = problem()
        start = time.perf_counter()
        y = train(*arrays)
        each = (time.perf_counter() - start) / STEPS / LAYERS * 1e6
        loss = ((y - arrays[-1]) ** 2).mean() / 2
        print(f"{name}: loss {loss:.4f}, {each:.1f} us for a layer forward and backward")
        found[name] = (y, *arrays)
    same = all(map(np.array_equal, *found.values()))
    print(f"jitted code gives {'the bits' if same else 'NOT THE BITS'} of NumPy code")


if __name__ == "__main__":
    main()
