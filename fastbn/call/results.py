"""What do the calls return? Forward with its cache, and Gradients."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from .._backends import SAVED_ROWS
from .._moments import Moments
from . import check_parts, checks
from .dtypes import DType, kind_of
from .pickles import owned, packed, unpacked
from .record import Options
from .shape import positions_of

Array = np.ndarray


class Parts(NamedTuple):
    """The contents of a cache: a forward call's x and residual, what the backend saved, and how it was called."""

    x: Array
    residual: Array | None
    saved: Array
    axis: int
    frozen: bool
    options: Options
    """As the caller gave them."""
    has_gamma: bool
    has_beta: bool
    mask: Array | None = None
    """The mask, or None if all positions count. With frozen statistics, it tells where a dy of 0 gives a dx of 0."""
    counted: int | None = None
    """The count of the statistics; None if they come from all values of x and from no others."""
    from_y: bool = False
    """Whether x holds y, since the call was in place."""
    virtual: int | None = None
    """How many elements of axis 0 share their statistics; `saved` then has a row per slice: (rows, slices, C)."""

    @property
    def plain(self) -> bool:
        """Whether the fields that have a default have no other value."""
        return self.counted is None and self.mask is None and self.virtual is None and self.from_y is False

    @property
    def channel_axis(self) -> int:
        """The channel axis, counted from 0."""
        return self.axis % self.x.ndim

    @property
    def values(self) -> int:
        """The number of values per channel of x."""
        return math.prod(positions_of(self.x.shape, self.channel_axis))

    @property
    def total(self) -> int:
        """The number of values per channel that the statistics come from."""
        return self.values if self.counted is None else self.counted

    @property
    def statistics(self) -> DType:
        """The statistics dtype."""
        return kind_of(self.x.dtype).statistics

    def slices(self) -> Iterator[tuple[slice, "Parts"]]:
        """The slices of axis 0 that share their statistics, each with its own parts."""
        size = len(self.x) if self.virtual is None else self.virtual
        for i, start in enumerate(range(0, len(self.x), size)):
            rows = slice(start, start + size)
            residual, mask = (None if array is None else array[rows] for array in (self.residual, self.mask))
            count = None if mask is None else int(np.count_nonzero(mask))
            mask, count = (None, None) if mask is None or count == mask.size else (mask, count)
            own = self._replace(x=self.x[rows], residual=residual, mask=mask, counted=count, virtual=None)
            yield rows, own._replace(saved=np.ascontiguousarray(self.saved[:, i]))


def _described(array: Array | None) -> str:
    """The dtype and shape of an array, since its values may be many."""
    return "None" if array is None else f"{array.dtype}{list(array.shape)}"


class Cache:
    """What `backward` needs from a `forward` call, which makes it. It can be pickled.

    It refers to x (which holds y after out=x), residual and mask: do not change them before `backward`.

    Attributes
    ----------
    mean, var, inv_std : arrays of shape (C,), in the statistics dtype
        The statistics that the call normalized with: the batch's mean and biased variance, those of given moments, or
        the running ones; and 1/sqrt(var + eps), 0 where var + eps is 0. Of shape (slices, C) with virtual_batch_size.
    count : int
        The number of values per channel that mean and var come from: those that the mask leaves, or the given moments'
        count; with running statistics, all values of x. With virtual_batch_size it is an array of shape (slices,).

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [3.0]]))
    >>> cache.mean, cache.var, cache.count
    (array([2.]), array([1.]), 2)
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __getstate__(self) -> object:
        return packed(tuple(self._parts))

    def __setstate__(self, state: object) -> None:
        with unpacked("Cache", state) as contents:
            parts = Parts(*contents)
            parts = parts._replace(saved=owned(parts.saved))
            check_parts.cache(parts)
            self._parts = parts

    def __repr__(self) -> str:
        p = self._parts
        told = [f"x={_described(p.x)}", f"axis={p.axis}", f"count={self.count}"]
        told += [f"activation={p.options.activation!r}"] * (p.options.activation is not None)
        told += [f"{name}={_described(a)}" for name, a in (("residual", p.residual), ("mask", p.mask)) if a is not None]
        told += ["training=False"] * p.frozen
        return f"Cache({', '.join(told)})"

    def _row(self, name: str) -> Array:
        with np.errstate(all="ignore"):
            row: Array = self._parts.saved[SAVED_ROWS.index(name)].astype(self._parts.statistics)
        return row

    @property
    def mean(self) -> Array:
        """The mean that the call normalized with, of shape (C,)."""
        return self._row("mean")

    @property
    def var(self) -> Array:
        """The biased variance that the call normalized with, of shape (C,)."""
        return self._row("var")

    @property
    def inv_std(self) -> Array:
        """1/sqrt(var + eps), or 0 where var + eps is 0, of shape (C,)."""
        return self._row("inv_std")

    @property
    def count(self) -> Any:
        """The number of values per channel that the statistics come from."""
        if self._parts.virtual is None:
            return self._parts.total
        return np.array([parts.total for _, parts in self._parts.slices()])

    def _moments(self) -> Moments:
        """The moments that the call normalized with; for virtual batches, those of all of them together."""
        saved = self._parts.saved
        if self._parts.virtual is not None:
            first, *others = (Cache(parts)._moments() for _, parts in self._parts.slices())
            return sum(others, first)
        rows = np.stack((saved[0], saved[1], saved[2] * self.count))
        return Moments._of(self.count, rows, self._parts.statistics)


def parts_of(cache: object) -> Parts:
    """The parts of a cache, checked, since a pickle or an assignment may have changed them."""
    parts = getattr(checks.instance("cache", cache, Cache, check_parts.FROM_FORWARD), "_parts", None)
    if not isinstance(parts, Parts) or len(parts) != len(Parts._fields):
        check_parts.no_parts(parts)
    check_parts.cache(parts)
    return parts


class Forward(NamedTuple):
    """The result of `forward`, which unpacks as (y, cache).

    Attributes
    ----------
    y : array of the shape, dtype and memory order of x
        `out` itself if that was given.
    cache : Cache
        What `backward` needs.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [3.0]]), eps=0.0)
    >>> y.tolist()
    [[-1.0], [1.0]]
    """

    y: Array
    cache: Cache

    def __repr__(self) -> str:
        return f"Forward(y={_described(self.y)}, cache={self.cache!r})"


class _Gradients(NamedTuple):
    dx: Array
    dgamma: Array | None
    dbeta: Array | None


class Gradients(_Gradients):
    """The result of `backward`, which unpacks as (dx, dgamma, dbeta).

    Attributes
    ----------
    dx : array of the shape, dtype and memory order of x
        `out` itself if that was given.
    dgamma, dbeta : arrays of shape (C,) in the statistics dtype
        None where gamma or beta was None.
    dresidual : array like x
        None without a residual.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [3.0]])
    >>> y, cache = fastbn.forward(x, None, np.zeros(1), residual=x)
    >>> gradients = fastbn.backward(np.ones((2, 1)), cache)
    >>> dx, dgamma, dbeta = gradients
    >>> dbeta.tolist(), gradients.dresidual.tolist()
    ([2.0], [[1.0], [1.0]])
    """

    dresidual: Array | None

    def __new__(cls, dx: Array, dgamma: Array | None, dbeta: Array | None, dresidual: Array | None) -> Self:
        self = super().__new__(cls, dx, dgamma, dbeta)
        self.dresidual = dresidual
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.dresidual)

    def __repr__(self) -> str:
        named = {**self._asdict(), "dresidual": self.dresidual}
        return f"Gradients({', '.join(f'{name}={_described(array)}' for name, array in named.items())})"
