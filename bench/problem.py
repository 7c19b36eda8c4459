"""What do all contestants work on? The arrays of a shape, layout and variant. Contestants are defined here, too."""

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
RESULTS = ("out", "fresh", "inplace")
"""Where y or dx goes: to an array that is there (out=), to a new one, or over x or dy."""

CROPPED = 3
"""The number of elements along the last axis that are in memory, but are not part of a cropped array."""

EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True)
class Variant:
    """The dtype and the strides of the arrays, and what is asked of a call. The defaults are the plain variant."""

    dtype: str = "float32"
    activation: str = "none"
    strides: str = "dense"
    result: str = "out"
    mask: bool = False
    residual: bool = False

    @property
    def extras(self) -> str:
        """What differs from the plain variant, but for the dtype, in words."""
        words = (self.activation, self.strides, self.result, "mask" * self.mask, "residual" * self.residual)
        return " ".join(word for word in words if word not in ("none", "dense", "out", ""))

    def __str__(self) -> str:
        return f"{self.dtype} {self.extras}".rstrip()

    def bases(self) -> dict[str, Variant]:
        """The variants to compare it with: each differs from it in one respect, in which it is the plain one."""
        bases = {
            "float32": replace(self, dtype="float32"),
            "unfused": replace(self, activation="none"),
            "dense": replace(self, strides="dense"),
            "out=": replace(self, result="out"),
            "unmasked": replace(self, mask=False),
            "no residual": replace(self, residual=False),
        }
        return {name: base for name, base in bases.items() if base != self}


@dataclass(kw_only=True)
class Contestant:
    """One way to run one pass.

    `results` turns the value that `call` returned into channels-first arrays: y, or dx, dgamma and dbeta. `within`
    makes the context of each turn, which sets what contestants otherwise share; entering and leaving it is not timed.
    """

    name: str
    call: Callable[[], Any]
    results: Callable[[Any], tuple[Array, ...]]
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def seconds(self, calls: int, clock: Clock) -> float:
        """The time per call, in seconds, of `calls` calls in a row. The clock counts nanoseconds."""
        call = self.call
        start = clock()
        for _ in repeat(None, calls):
            call()
        return (clock() - start) / calls / 1e9


def layouts_of(shape: Shape, layouts: tuple[str, ...]) -> tuple[str, ...]:
    """The layouts that a shape has: a matrix has only one, "nc"."""
    return ("nc",) if len(shape) == 2 else layouts


def passes_of(shape: Shape, passes: Sequence[str], masked: bool = False) -> tuple[str, ...]:
    """The passes that a shape has: with one value per channel, only inference, which in turn takes no mask."""
    alone = math.prod(shape) == shape[1]
    return tuple(pass_ for pass_ in passes if not (masked if pass_ == "infer" else alone))


def variants_of(shape: Shape, variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The variants that a shape has: "middle" needs a spatial axis, and "broadcast" also more than one example.

    What works in place is only timed on dense arrays.
    """
    senseless = {"middle": len(shape) == 2, "broadcast": len(shape) == 2 or shape[0] == 1}
    return tuple(
        variant
        for variant in variants
        if not senseless.get(variant.strides, False) and (variant.result != "inplace" or variant.strides == "dense")
    )


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of this name, of NumPy or, for bfloat16, of ml_dtypes."""
    try:
        dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    except ImportError as error:
        raise ImportError("--dtypes bfloat16 needs ml_dtypes: pip install ml_dtypes") from error
    return dtype


def _within(array: Array, memory_shape: Shape, part: slice) -> Array:
    """A copy of the array that is this part of the last axis of a larger array."""
    view = np.zeros(memory_shape, array.dtype)[..., part]
    view[...] = array
    return view


def _laid_out(array: Array, strides: str, axis: int) -> Array:
    """A copy of a dense array with these strides; with "broadcast", only of its first example."""
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
    """The arrays of one shape, layout, dtype and strides. `x`, `dy` and `out` have this layout and these strides.

    cropped: part of a longer last axis; stepped: every second element of it; reversed: the last axis runs backwards;
    middle: the channels come before the last spatial axis, which is cropped; broadcast: all examples share one memory.

    NumPy allocates the arrays, as it does for users. All contestants write to the same `out`: only one runs at a time.
    """

    def __init__(self, shape: Shape, layout: str, dtype: str, strides: str = "dense", seed: int = 0) -> None:
        self.shape, self.layout, self.dtype, self.strides = shape, layout, dtype, strides
        self._asked = Variant(dtype, strides=strides)
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

    def varied(self, variant: Variant) -> Problem:
        """The same arrays for a variant of this dtype and these strides.

        What works in place works on its own results again and again. Its parameters are therefore those of the
        batch, so that y is x, and values neither grow nor vanish.
        """
        problem = copy.copy(self)
        problem._asked = variant
        if variant.result == "inplace":
            problem.mean, problem.var = self.batch
            problem.beta, problem.gamma = problem.mean.copy(), np.sqrt(problem.var + self.statistics.type(EPS))
        return problem

    @cached_property
    def residual(self) -> Array:
        """What is added before the activation."""
        values = (self._normal(np.random.default_rng(1)) / 2).astype(self.x.dtype)
        return _laid_out(values, self.strides, self.axis)

    @cached_property
    def mask(self) -> Array:
        """True but for the last quarter of the last axis: padding."""
        shape = (*(size for axis, size in enumerate(self.x.shape) if axis != self.axis % self.x.ndim),)
        return np.broadcast_to(np.arange(shape[-1]) < math.ceil(0.75 * shape[-1]), shape).copy()

    def bytes_moved(self, pass_: str) -> int:
        """The bytes that the pass must at least move: x and y, or dy, x and dx. Broadcast arrays are moved once."""
        moved = [self.x, self.out, *([self.dy] if pass_ == "backward" else [])]
        moved += [self.residual] if self._asked.residual else []
        moved += [self.mask] if self._asked.mask else []
        return sum(array.nbytes // (self.shape[0] if array.strides[0] == 0 else 1) for array in moved)

    @property
    def variant(self) -> Variant:
        """What is asked of a call."""
        return self._asked

    @property
    def activation(self) -> str:
        """The activation's name."""
        return self._asked.activation

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes over which statistics are computed."""
        return tuple(a for a in range(self.x.ndim) if a != self.axis % self.x.ndim)

    def along_channels(self, vector: Array) -> Array:
        """The vector, shaped to broadcast against x."""
        shape = [1] * self.x.ndim
        shape[self.axis] = self.channels
        return vector.reshape(shape)

    def channels_first(self, array: Array) -> Array:
        """A view of an array with x's layout as (N, C, ...)."""
        return np.moveaxis(array, self.axis, 1)

    def running(self) -> tuple[Array, Array]:
        """New copies of the running statistics, which a contestant may update."""
        return self.mean.copy(), self.var.copy()

    @cached_property
    def batch(self) -> tuple[Array, Array]:
        """The batch's mean and biased variance."""
        x = self.x.astype(self.statistics, copy=False)
        mean = x.mean(self.axes, dtype=np.float64)
        square = np.square(x - self.along_channels(mean.astype(self.statistics))).mean(self.axes, dtype=np.float64)
        return mean.astype(self.statistics), square.astype(self.statistics)


TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""The largest difference allowed, relative to the largest value. It is loose: rounding passes, a wrong result fails."""


def disagreement(results: tuple[Array, ...], reference: tuple[Array, ...]) -> float:
    """The largest difference between two sets of results, relative to the largest value of each reference array."""
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
