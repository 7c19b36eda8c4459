"""What would the running statistics be over all of the data? Precise batch norm: Wu & Johnson 2021, section 3.

("Rethinking 'Batch' in BatchNorm".)
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from . import _check_layer
from ._moments import Moments
from .call import checks
from .call.checks import _refuse
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


def _in_turn(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. Those of Dask, and Dask collections in a tuple, list or dict, are computed when their turn comes."""
    dask: Any = sys.modules.get("dask")
    if dask is None:  # then none of the objects can be of Dask
        yield from batches
        return
    for batch in _split(batches, dask):
        inside = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else (batch,)
        yield dask.compute(batch)[0] if any(map(dask.is_dask_collection, inside)) else batch


def _split(batches: Any, dask: Any) -> Iterator[Any]:
    """The batches in a Dask collection: an array's blocks along axis 0, or a bag's items, a partition in memory."""
    package, _, module = type(batches).__module__.partition(".")
    if package != "dask":
        yield from batches
    elif module.startswith("array."):
        yield from (batches.blocks[i] for i in range(batches.numblocks[0]))
    elif module.startswith("bag."):
        for partition in batches.to_delayed():
            yield from dask.compute(partition)[0]
    else:
        allowed = "a Dask array or bag, or an iterable of what forward takes, Dask collections included"
        _refuse(TypeError, "batches", checks.qualified(type(batches)), allowed)


def recalibrate(layers: Iterable[BatchNorm], batches: Iterable[Batch], forward: Callable[[Batch], object]) -> None:
    """Sets running statistics to those of all the values that each layer gets, instead of to a moving average.

    Calls forward(batch) for each batch, with the layers in training mode, and merges the moments of all their calls,
    so the variance includes that between batches. It is the sum of squares over M - correction, for the layer's
    correction and M values per channel in all. The statistics are exact for these values, which are those that the
    model computes in training mode: behind another norm, they depend on how the data is cut into batches. Nothing else
    about the layers changes: neither their mode and num_batches_tracked nor what a pending `backward` needs.

    Parameters
    ----------
    layers : iterable of BatchNorm
        Layers with running statistics.
    batches : iterable
        The arguments for `forward`. A Dask collection among them, or in a tuple, list or dict among them, is computed
        when its turn comes, so that one batch is in memory at a time. A Dask array gives its blocks along axis 0 as
        batches, and a Dask bag its items.
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
        for batch in _in_turn(batches):
            forward(batch)
        found = [entry.statistics() for entry in watched]
    finally:
        for entry in watched:
            entry.restore()
    for entry, statistics in zip(watched, found, strict=True):
        entry.set(statistics)
