"""How does a batch train whose slices have statistics of their own? Ghost batch norm: Hoffer et al. 2017, algorithm 1.

("Train longer, generalize better: closing the generalization gap in large batch training of neural networks".)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _batch, _check, _check_parts
from ._batch import Wanted
from ._call import Call
from ._dtypes import FLOAT64
from ._results import Parts
from .backends import Backend

Array = np.ndarray[Any, Any]


def slices_of(call: Call, size: int, correction: int) -> list[slice]:
    """Of axis 0; the last may be smaller. All have 2 values per channel or more, and more than `correction`."""
    length = call.x.shape[0]
    _check.enough(call.x, call.axis, call.mask)
    slices = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    for some in slices:
        _batch.counted(call.rows(some), correction, f" in the virtual batch {some.start}:{some.stop}")
    return slices


def momenta(momentum: float, batches: int | None, slices: int) -> list[float]:
    """The weights of the slices; with `batches`, such that every call so far, and its slices, weigh alike."""
    if batches is None:
        return [momentum] * slices
    return [1 / (batches * slices + i) for i in range(1, slices + 1)]


def train(
    call: Call, size: int, batches: int | None, momentum: float, correction: int, backend: Backend, threads: int
) -> Parts:
    """Normalizes each slice with its own statistics, and blends them into the running ones slice after slice."""
    slices = slices_of(call, size, correction)
    done = [
        _batch.train(call.rows(some), weight, correction, None, backend, threads).saved
        for some, weight in zip(slices, momenta(momentum, batches, len(slices)), strict=True)
    ]
    count = None if call.mask is None else int(np.count_nonzero(call.mask))
    parts = _batch.parts_of(call, np.stack(done, axis=1), mask=call.mask, count=count)
    return parts._replace(virtual=size)


def backward(asked: Wanted, whole: Parts, backend: Backend, threads: int) -> tuple[Array | None, Array | None]:
    """Fills dx and dresidual; gives dgamma and dbeta, added up in float64."""
    slices = list(whole.slices())
    for _, parts in slices:  # of which a mask may have become another since the call
        _check_parts.cache(parts)
    found = [_batch.backward(asked.rows(some), parts, None, backend, threads) for some, parts in slices]
    dgammas, dbetas = zip(*found, strict=True)
    return _total(dgammas), _total(dbetas)


def _total(gradients: Sequence[Array | None]) -> Array | None:
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    with np.errstate(all="ignore"):
        return np.sum(given, axis=0, dtype=FLOAT64).astype(given[0].dtype)
