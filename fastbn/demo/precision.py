"""How accurate and how fast is y, beside two formulas in NumPy, where the mean of the data is far from zero?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..ops import forward
from .networks import Array, one_thread

OFFSETS = (0.0, 1e3, 1e6)
EPS = 1e-5
SHAPE = (4096, 64)
METHODS = {
    "one pass": "E(x\u00b2) - mean\u00b2",
    "two passes": "NumPy's mean and var",
    "fastbn": "fastbn",
}
"""The formulas, with the words for them."""


@dataclass(frozen=True)
class Precision:
    """For each formula the error of y in units in the last place of the exact y, and the seconds of a call."""

    offset: float
    ulp: dict[str, float]
    """The median over all values."""
    largest_ulp: dict[str, float]
    seconds: dict[str, float]


def _one_pass(x: Array) -> Array:
    mean = x.mean(axis=0)
    return np.asarray((x - mean) / np.sqrt((x * x).mean(axis=0) - mean * mean + np.float32(EPS)))


def _two_passes(x: Array) -> Array:
    return np.asarray((x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + np.float32(EPS)))


def _fastbn(x: Array) -> Array:
    return forward(x, axis=-1, eps=EPS).y


_FORMULAS: dict[str, Callable[[Array], Array]] = {
    "one pass": _one_pass,
    "two passes": _two_passes,
    "fastbn": _fastbn,
}


def _exact(x: Array, offset: float) -> Array:
    """The exact y, of the data without its offset, which is subtracted exactly."""
    shifted = x.astype(np.float64) - offset
    shifted -= shifted.mean(axis=0)
    return np.asarray(shifted / np.sqrt((shifted * shifted).mean(axis=0) + EPS))


def _ulps(y: Array, exact: Array) -> tuple[float, float]:
    """The median and the largest error; infinity if a value is not finite."""
    if not np.isfinite(y).all():
        return float("inf"), float("inf")
    errors = np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float32))
    return float(np.median(errors)), float(errors.max())


def measure(turns: int = 15) -> list[Precision]:
    """Errors, and the minimum of the times of several turns, taken alternately, on one thread."""
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    found = []
    with one_thread(), np.errstate(all="ignore"):
        for offset in OFFSETS:
            x = (noise + offset).astype(np.float32)
            exact = _exact(x, offset)
            ulps = {name: _ulps(formula(x), exact) for name, formula in _FORMULAS.items()}
            seconds = dict.fromkeys(_FORMULAS, float("inf"))
            for _ in range(turns):
                for name, formula in _FORMULAS.items():
                    start = time.perf_counter()
                    formula(x)
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
            middle, largest = ({name: ulp[i] for name, ulp in ulps.items()} for i in range(2))
            found.append(Precision(offset, middle, largest, seconds))
    return found
