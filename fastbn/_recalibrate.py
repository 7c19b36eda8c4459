"""What would the running statistics be over all of the data? Precise batch norm: Wu & Johnson 2021, section 3.

("Rethinking 'Batch' in BatchNorm".)
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from . import _check_layer
from ._moments import Moments
from .call import checks
from .call.results import Cache
from .layer import BatchNorm

Array = np.ndarray
Batch = TypeVar("Batch")


class _Watched:
    """A layer in training mode, the moments of its inputs, and the state to restore."""

    RESTORED = ("training", "num_batches_tracked", "_cache", "_watch")

    def __init__(self, layer: BatchNorm) -> None:
        self.layer = layer
        self.running = _check_layer.tracked(layer.running_mean, layer.running_var)
        self.before = tuple(array.copy() for array in self.running)
        self.state = {name: getattr(layer, name) for name in self.RESTORED}
        self.seen: Moments | None = None

    def watch(self) -> None:
        self.layer.train()
        self.layer.num_batches_tracked = 0  # so that it cannot exceed int64
        self.layer._watch = self._add

    def _add(self, cache: Cache) -> None:
        moments = cache._moments()
        self.seen = moments if self.seen is None else self.seen + moments

    def statistics(self) -> tuple[Array, Array]:
        """The running statistics of all inputs."""
        if self.seen is None:
            _check_layer.never_called(repr(self.layer))
        return self.seen.mean, self.seen.var(self.layer.correction)

    def restore(self) -> None:
        for name, value in self.state.items():
            setattr(self.layer, name, value)
        self.set(self.before)

    def set(self, statistics: tuple[Array, ...]) -> None:
        for array, values in zip(self.running, statistics, strict=True):
            array[...] = values


def recalibrate(layers: Iterable[BatchNorm], batches: Iterable[Batch], forward: Callable[[Batch], object]) -> None:
    """Sets running statistics to the exact ones of all values that the layers get, instead of to a moving average.

    Calls forward(batch) for each batch, with the layers in training mode, and merges the moments of all their calls,
    so the variance includes that between batches. It is the sum of squares over M - correction, for the layer's
    correction and M values per channel in all. Nothing else about the layers changes: neither their mode and
    num_batches_tracked nor what a pending `backward` needs.

    Parameters
    ----------
    layers : iterable of BatchNorm
        Layers with running statistics.
    batches : iterable
        The arguments for `forward`.
    forward : callable
        A function that calls the layers, each at least once in all.

    Raises
    ------
    TypeError, ValueError
        If an object is not a layer with running statistics, and if a layer was never called. After any error,
        including those that `batches` and `forward` raise, the layers are as they were.

    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(1, dtype="float64")
    >>> fastbn.recalibrate([bn], [np.array([[1.0], [2.0]]), np.array([[3.0], [6.0]])], bn)
    >>> bn.running_mean, bn.running_var, bn.num_batches_tracked
    (array([3.]), array([4.66666667]), 0)
    """
    checks.function("forward", forward)
    checks.iterable("batches", batches, "what forward takes")
    layers = checks.iterable("layers", layers, "BatchNorm")
    given = [checks.instance("layers", layer, BatchNorm, "BatchNorm layers only") for layer in layers]
    watched = [_Watched(layer) for layer in dict.fromkeys(given)]
    try:
        for entry in watched:
            entry.watch()
        for batch in batches:
            forward(batch)
        found = [entry.statistics() for entry in watched]
    finally:
        for entry in watched:
            entry.restore()
    for entry, statistics in zip(watched, found, strict=True):
        entry.set(statistics)
