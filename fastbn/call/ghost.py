"""How is a batch normalized in slices with their own statistics? Ghost batch norm: Hoffer et al. 2017, algorithm 1.

("Train longer, generalize better: closing the generalization gap in large batch training of neural networks".)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._backends import Backend
from . import batch, check_parts, checks
from .dtypes import FLOAT64
from .record import Average, BackwardCall, Call, rows_of
from .results import Parts

Array = np.ndarray[Any, Any]


def slices_of(call: Call, size: int) -> list[slice]:
    """The slices of axis 0; the last may be smaller. Checks that enough values per channel count in each."""
    length = call.x.shape[0]
    checks.enough(call.x, call.axis, call.mask)
    slices = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    for rows in slices:
        batch.counted(rows_of(call, rows), f" in the virtual batch {rows.start}:{rows.stop}")
    return slices


def momenta(momentum: float, slices: int) -> list[float]:
    """The momentum for each slice. For an average, all slices of this call and of those before it weigh the same."""
    if not isinstance(momentum, Average):
        return [momentum] * slices
    return [1 / (momentum.batches * slices + i) for i in range(1, slices + 1)]


def train(call: Call, size: int, backend: Backend) -> Parts:
    """Normalizes each slice with its own statistics, and blends them into the running ones slice after slice."""
    slices = slices_of(call, size)
    done = [
        batch.train(rows_of(call, rows)._replace(momentum=weight), None, backend).saved
        for rows, weight in zip(slices, momenta(call.momentum, len(slices)), strict=True)
    ]
    count = None if call.mask is None else int(np.count_nonzero(call.mask))
    parts = batch.parts_of(call._replace(saved=np.stack(done, axis=1)), count=count)
    return parts._replace(virtual=size)


def backward(call: BackwardCall, whole: Parts, backend: Backend) -> tuple[Array | None, Array | None]:
    """Fills dx and dresidual; returns dgamma and dbeta, added up in float64."""
    slices = list(whole.slices())
    for _, parts in slices:  # the mask may have changed since the call
        check_parts.cache(parts)
    found = [
        batch.backward(
            rows_of(call, rows)._replace(mask=parts.mask, saved=parts.saved, counted=float(parts.total)), parts, backend
        )
        for rows, parts in slices
    ]
    dgammas, dbetas = zip(*found, strict=True)
    return _total(dgammas), _total(dbetas)


def _total(gradients: Sequence[Array | None]) -> Array | None:
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    with np.errstate(all="ignore"):
        return np.sum(given, axis=0, dtype=FLOAT64).astype(given[0].dtype)
