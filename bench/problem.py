"""What do all contestants work on? The arrays of one shape, layout and variant, and the contestant itself."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np

from fastbn.call.activations import BY_NAME

from .shapes import Shape

Array = np.ndarray[Any, Any]
Clock = Callable[[], int]

PASSES = ("forward", "backward", "infer")
LAYOUTS = ("nchw", "nhwc")
DTYPES = ("float32", "float64", "float16", "bfloat16")
ACTIVATIONS = tuple(name or "none" for name in BY_NAME)
STRIDES = ("dense", "cropped", "stepped", "reversed", "middle", "broadcast")

CROPPED = 3
"""Elements of a cropped array's last axis, in memory, that are not part of it."""

EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class Variant:
    """What is normalized, and what follows. The plain one has the defaults."""

    dtype: str = "float32"
    activation: str = "none"
    strides: str = "dense"

    @property
    def extras(self) -> str:
        """What it has besides its dtype, in words; nothing if it is unfused and dense."""
        return " ".join(word for word in (self.activation, self.strides) if word not in ("none", "dense"))

    def __str__(self) -> str:
        return f"{self.dtype} {self.extras}".rstrip()

    def bases(self) -> dict[str, Variant]:
        """What it is held against: itself in float32, without the activation, dense; each where it is not so."""
        bases = {
            "float32": replace(self, dtype="float32"),
            "unfused": replace(self, activation="none"),
            "dense": replace(self, strides="dense"),
        }
        return {name: base for name, base in bases.items() if base != self}


@dataclass(kw_only=True)
class Contestant:
    """One way to run one pass.

    `results` turns what `call` returned into channels-first arrays: y, or dx, dgamma and dbeta.
    `within` is the context, entered and left untimed, of each of its turns: it sets what contestants otherwise share.
    """

    name: str
    call: Callable[[], Any]
    results: Callable[[Any], tuple[Array, ...]]
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def seconds(self, calls: int, clock: Clock) -> float:
        """The time of each of `calls` calls in a row, by a clock in nanoseconds."""
        call = self.call
        start = clock()
        for _ in repeat(None, calls):
            call()
        return (clock() - start) / calls / 1e9


def layouts_of(shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
    """A matrix has one layout, whatever is asked for."""
    return ("nc",) if len(shape) == 2 else layouts


def passes_of(shape: Shape, passes: Sequence[str]) -> tuple[str, ...]:
    """One value a channel has no variance to train with: inference alone."""
    alone = math.prod(shape) == shape[1]
    return tuple(pass_ for pass_ in passes if pass_ == "infer" or not alone)


def variants_of(shape: Shape, variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """A matrix has no axis to put beside its channels, and one element of a batch is not broadcast."""
    senseless = {"middle": len(shape) == 2, "broadcast": len(shape) == 2 or shape[0] == 1}
    return tuple(variant for variant in variants if not senseless.get(variant.strides, False))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is ml_dtypes'."""
    try:
        dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    except ImportError as error:
        raise ImportError("--dtypes bfloat16 needs ml_dtypes: pip install ml_dtypes") from error
    return dtype


def _within(array: Array, memory_shape: Shape, part: slice) -> Array:
    """The array's values as that part of the last axis of a larger array."""
    view = np.zeros(memory_shape, array.dtype)[..., part]
    view[...] = array
    return view


def _laid_out(array: Array, strides: str, axis: int) -> Array:
    """The dense array's values, with the strides asked for; broadcast, those of its first element alone."""
    *leading, last = array.shape
    if strides == "cropped":
        return _within(array, (*leading, last + CROPPED), slice(last))
    if strides == "stepped":
        return _within(array, (*leading, 2 * last), slice(None, None, 2))
    if strides == "reversed":
        return _within(array, array.shape, slice(None, None, -1))
    if strides == "middle":
        return np.moveaxis(_laid_out(np.moveaxis(array, axis, -2), "cropped", -2), -2, axis)
    return np.broadcast_to(array[:1], array.shape) if strides == "broadcast" else array


class Problem:
    """The arrays of one shape, layout, dtype and strides. `x`, `dy` and `out` lie in memory as these say.

    cropped: part of a wider last axis; stepped: every second element of it; reversed: backwards along it; middle: the
    channels lie before the last of the spatial axes, which is cropped; broadcast: all of the batch is one element.

    They are NumPy's own allocations, as users have them, and `out` is shared: only one contestant runs at a time.
    """

    def __init__(self, shape: Shape, layout: str, dtype: str, strides: str = "dense", seed: int = 0) -> None:
        self.shape, self.layout, self.dtype, self.strides = shape, layout, dtype, strides
        self.activation = "none"
        self.channels = shape[1]
        self.axis = -1 if layout == "nhwc" else 1
        self.memory_shape = (shape[0], *shape[2:], shape[1]) if layout == "nhwc" else shape
        self.statistics = np.dtype("float64" if dtype == "float64" else "float32")
        rng = np.random.default_rng(seed)
        element = numpy_dtype(dtype)
        self.x = self._normal(rng).astype(element, copy=False)
        self.dy = self._normal(rng).astype(element, copy=False)
        self.x += element.type(1)  # so that a wrong mean shows
        self.out = _laid_out(np.zeros_like(self.x), "dense" if strides == "broadcast" else strides, self.axis)
        self.x, self.dy = (_laid_out(array, strides, self.axis) for array in (self.x, self.dy))
        self.gamma, self.var = (rng.uniform(0.5, 1.5, self.channels).astype(self.statistics) for _ in range(2))
        self.beta, self.mean = (rng.standard_normal(self.channels).astype(self.statistics) for _ in range(2))

    def _normal(self, rng: np.random.Generator) -> Array:
        return rng.standard_normal(self.memory_shape, np.float64 if self.dtype == "float64" else np.float32)

    def activated(self, activation: str) -> Problem:
        """The same arrays, with that activation to follow."""
        problem = copy.copy(self)
        problem.activation = activation
        return problem

    def bytes_moved(self, pass_: str) -> int:
        """What the pass must move at the least: x and y, or dy, x and dx. What is broadcast is moved once."""
        moved = (self.x, self.out, self.dy) if pass_ == "backward" else (self.x, self.out)
        return sum(array.nbytes // (self.shape[0] if array.strides[0] == 0 else 1) for array in moved)

    @property
    def variant(self) -> Variant:
        """What is normalized, and what follows."""
        return Variant(self.dtype, self.activation, self.strides)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that statistics are taken over."""
        return tuple(a for a in range(self.x.ndim) if a != self.axis % self.x.ndim)

    def along_channels(self, vector: Array) -> Array:
        """The vector, shaped to broadcast against x."""
        shape = [1] * self.x.ndim
        shape[self.axis] = self.channels
        return vector.reshape(shape)

    def channels_first(self, array: Array) -> Array:
        """The array that lies in memory as x does, seen as (N, C, ...)."""
        return np.moveaxis(array, self.axis, 1)

    def running(self) -> tuple[Array, Array]:
        """Running statistics of one's own to update."""
        return self.mean.copy(), self.var.copy()

    @cached_property
    def batch(self) -> tuple[Array, Array]:
        """The batch's mean and biased variance."""
        x = self.x.astype(self.statistics, copy=False)
        mean = x.mean(self.axes, dtype=np.float64)
        square = np.square(x - self.along_channels(mean.astype(self.statistics))).mean(self.axes, dtype=np.float64)
        return mean.astype(self.statistics), square.astype(self.statistics)


TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""Of the largest value. Loose: it tells another function or a broken result from rounding, no more."""


def disagreement(results: tuple[Array, ...], reference: tuple[Array, ...]) -> float:
    """The largest difference between two sets of results, each array measured by the reference's largest value."""
    worst = 0.0
    for ours, theirs in zip(results, reference, strict=True):
        wide = theirs.dtype if theirs.dtype == np.float64 else np.dtype("float32")
        a, b = ours.astype(wide, copy=False), theirs.astype(wide, copy=False)
        if a.shape != b.shape:
            raise ValueError(f"results: got the shape {a.shape}; allowed: {b.shape}")
        if a.size:
            error = float(np.abs(a - b).max()) / max(1.0, float(np.abs(b).max()))
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst
