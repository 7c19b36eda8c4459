"""How does a batch train whose slices have statistics of their own? Ghost batch norm: Hoffer et al. 2017, algorithm 1.

("Train longer, generalize better: closing the generalization gap in large batch training of neural networks".)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _batch, _check
from ._batch import Wanted
from ._call import Call
from ._dtypes import FLOAT64
from ._moments import Moments
from ._results import Cache, Parts
from .backends import Backend

Array = np.ndarray[Any, Any]


class GhostCache(Cache):
    """The parts of each slice, and those of the whole, whose `saved` has a row per slice."""

    __slots__ = ("_slices",)

    def __init__(self, parts: Parts, slices: Sequence[tuple[slice, Parts]]) -> None:
        super().__init__(parts)
        self._slices = slices

    @property
    def count(self) -> Any:
        return np.array([parts.total for _, parts in self._slices])

    def _moments(self) -> Moments:
        first, *others = (Cache(parts)._moments() for _, parts in self._slices)
        return sum(others, first)


def slices_of(call: Call, size: int) -> list[slice]:
    """Of axis 0; the last may be smaller. All have 2 values per channel or more."""
    length = call.x.shape[0]
    _check.enough(call.x, call.axis, call.mask)
    slices = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    for some in slices:
        _batch.counted(call.rows(some), f" in the virtual batch {some.start}:{some.stop}")
    return slices


def momenta(momentum: float, batches: int | None, slices: int) -> list[float]:
    """The weights of the slices; with `batches`, such that every call so far, and its slices, weigh alike."""
    if batches is None:
        return [momentum] * slices
    return [1 / (batches * slices + i) for i in range(1, slices + 1)]


def train(
    call: Call, slices: Sequence[slice], momenta: Sequence[float], correction: int, backend: Backend, threads: int
) -> GhostCache:
    """Normalizes each slice with its own statistics, and blends them into the running ones slice after slice."""
    done = [
        (some, _batch.train(call.rows(some), momentum, correction, None, backend, threads))
        for some, momentum in zip(slices, momenta, strict=True)
    ]
    saved = np.stack([parts.saved for _, parts in done], axis=1)
    return GhostCache(_batch.parts_of(call, saved, mask=call.mask), done)


def backward(asked: Wanted, cache: GhostCache, backend: Backend, threads: int) -> tuple[Array | None, Array | None]:
    """Fills dx and dresidual; gives dgamma and dbeta, added up in float64."""
    found = [_batch.backward(asked.rows(some), parts, None, backend, threads) for some, parts in cache._slices]
    dgammas, dbetas = zip(*found, strict=True)
    return _total(dgammas), _total(dbetas)


def _total(gradients: Sequence[Array | None]) -> Array | None:
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    with np.errstate(all="ignore"):
        return np.sum(given, axis=0, dtype=FLOAT64).astype(given[0].dtype)
