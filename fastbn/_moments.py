"""What can be added up over the parts of a batch? Moments before `forward`, sums before `backward`."""

from typing import Any, ClassVar, Self

import numpy as np

from .call import check_parts, checks
from .call.dtypes import FLOAT64, DType, rounded
from .call.pickles import owned, packed, unpacked
from .call.record import Call

Array = np.ndarray


def merged(a: Array, a_count: int, b: Array, b_count: int) -> Array:
    """Merges the rows mean, mean_low and m2 of two disjoint sets of values.

    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances", (2.1).
    The mean is in two pieces, which are added with Knuth's two-sum, so that no offset costs digits.
    """
    with np.errstate(all="ignore"):
        delta = (b[0] - a[0]) + (b[1] - a[1])
        step = delta * (b_count / (a_count + b_count))
        mean, low = _two_sum(a[0], step)
        mean, low = _two_sum(mean, low + a[1])
        return np.stack((mean, low, a[2] + b[2] + delta * step * a_count))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The sum in float64, and its rounding error."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


class _Summed:
    """A count, and rows of float64 with a column per channel. Instances never change, so they can be hashed."""

    __slots__ = ("_count", "_dtype", "_rows")

    _NAME: ClassVar[str]
    """The name of the argument that takes such an object."""
    _ROWS: ClassVar[int]

    _count: int
    _dtype: DType
    _rows: Array

    @classmethod
    def _of(cls, count: int, rows: Array, dtype: DType) -> Self:
        self = cls.__new__(cls)
        self._count, self._rows, self._dtype = count, rows, dtype
        return self

    def _check(self) -> Self:
        """Returns self, or raises if the contents are not valid: a pickle or an assignment may have changed them."""
        count, dtype, rows = (getattr(self, name, None) for name in ("_count", "_dtype", "_rows"))
        check_parts.contents(self._NAME, count, dtype, rows, self._ROWS)
        return self

    def __getstate__(self) -> object:
        return packed((self._count, self._dtype.name, self._rows))

    def __setstate__(self, state: object) -> None:
        with unpacked(type(self).__name__, state) as contents:
            self._count, name, rows = contents
            self._rows, self._dtype = owned(rows), np.dtype(name)
            self._check()

    def __eq__(self, other: object) -> bool:
        """Whether the contents have the same bits: a NaN equals itself, and 0.0 does not equal -0.0."""
        if not isinstance(other, _Summed) or type(other) is not type(self):
            return NotImplemented
        return self._bits() == other._bits()

    def __hash__(self) -> int:
        return hash(self._bits())

    def _bits(self) -> tuple[Any, ...]:
        return self._count, self._dtype.name, self._rows.shape, self._rows.tobytes()

    @property
    def count(self) -> int:
        """The number of values per channel."""
        return self._count

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return int(self._rows.shape[1])

    @property
    def dtype(self) -> DType:
        """The statistics dtype."""
        return self._dtype

    def _rounded(self, terms: Array, by: float = 1) -> Array:
        """The sum of the rows, divided, in the statistics dtype."""
        with np.errstate(all="ignore"):
            rounded: Array = (terms.sum(axis=0) / by).astype(self._dtype)
        return rounded

    def to_buffer(self) -> Array:
        """The contents as one float64 array, of shape (1 + rows * C,): the count and then the rows.

        The rows are mean, mean_low and m2 of Moments, sum_dy and sum_dy_xhat of Sums. `from_buffer` restores the
        contents without loss, so that they can be sent to another process.

        Raises ValueError for a count above 2**53, which float64 cannot hold.
        """
        check_parts.counts_in_a_float(self._NAME, self._check()._count)
        return np.concatenate(([float(self._count)], self._rows.reshape(-1)))

    @classmethod
    def from_buffer(cls, buffer: Array, dtype: str | type | np.dtype) -> Self:
        """What `to_buffer` was called on, whose statistics dtype must be given: float32 or float64.

        The contents are copied. Raises TypeError or ValueError for an array that `to_buffer` cannot have made.

        >>> import numpy as np, fastbn
        >>> m = fastbn.moments(np.array([[1e6], [1e6 + 1]], np.float32))
        >>> fastbn.Moments.from_buffer(m.to_buffer(), m.dtype) == m
        True
        """
        count, rows = check_parts.buffer(buffer, cls._ROWS)
        self = cls._of(count, rows, check_parts.statistics("dtype", dtype))
        self._check_values()
        return self

    def _check_values(self) -> None:
        """Refuses values that no data can have."""

    def __radd__(self, other: object) -> Self:
        """Accepts the 0 that sum() starts with."""
        return self if type(other) is int and other == 0 else NotImplemented


class Moments(_Summed):
    """The count, mean and sum of squares about the mean of each channel; `+` and sum() merge disjoint batches.

    The merge is that of Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance". Moments,
    their copies and their pickles hold float64 values, and the mean in two pieces. Merged in any order, the moments of
    parts equal those of the whole, up to rounding. Count 0 is the neutral element. `==` compares contents bit for bit.

    Parameters
    ----------
    count : int >= 0
        Values per channel.
    mean, m2 : arrays of shape (C,), float32 or float64
        The mean and the sum of squares about it, such as those of another process.
    mean_low : array of shape (C,), float32 or float64, or None
        What `mean` lost to rounding: the mean is mean + mean_low. None means zeros.
    dtype : float32, float64 or None
        The statistics dtype; by default that of `mean`.

    Attributes
    ----------
    count : int
    mean, m2 : arrays of shape (C,) in the statistics dtype; zeros where count is 0
    mean_low : array of shape (C,), float64
        What `mean` lost to rounding. At a large offset the mean alone is not exact enough to normalize with.
    channels, dtype : C and the statistics dtype

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])
    >>> sum(fastbn.moments(part) for part in (x[:1], x[1:]))
    Moments(count=3, mean=[ 3., 20.], m2=[ 14., 200.])
    >>> fastbn.Moments(3, np.array([3.0, 20.0]), np.array([14.0, 200.0])).var(correction=1)
    array([  7., 100.])
    """

    __slots__ = ()

    _NAME, _ROWS = "moments", 3

    def __init__(
        self,
        count: int,
        mean: Array,
        m2: Array,
        *,
        mean_low: Array | None = None,
        dtype: str | type | np.dtype | None = None,
    ) -> None:
        self._count = checks.natural("count", count)
        given = {"mean": mean, "m2": m2} | ({} if mean_low is None else {"mean_low": mean_low})
        (first, second, *low), self._dtype = check_parts.rows(given)
        if dtype is not None:
            self._dtype = check_parts.statistics("dtype", dtype)
        with np.errstate(all="ignore"):
            total, lost = _two_sum(first, low[0]) if low else (first, np.zeros_like(first))
        self._rows = np.stack((total, np.where(np.isfinite(lost), lost, 0), second))
        self._check_values()

    def _check_values(self) -> None:
        check_parts.not_negative("m2", self._rows[2])
        if not self._count:
            self._rows = np.zeros_like(self._rows)

    @property
    def mean(self) -> Array:
        """The mean of each channel, in the statistics dtype."""
        return self._rounded(self._rows[:2])

    @property
    def mean_low(self) -> Array:
        """What `mean` lost to rounding, in float64."""
        with np.errstate(all="ignore"):
            low: Array = (self._rows[0] - self.mean) + self._rows[1]
        return np.where(np.isfinite(low), low, 0)

    @property
    def m2(self) -> Array:
        """The sum of squares about the mean, in the statistics dtype."""
        return self._rounded(self._rows[2:])

    def var(self, correction: float = 0) -> Array:
        """The variance, m2 / (count - correction), in the statistics dtype.

        Raises ValueError unless 0 <= correction < count.
        """
        return self._rounded(self._rows[2:], self._count - check_parts.below(correction, self._count))

    def __add__(self, other: object) -> "Moments":
        """Those of two disjoint batches. Raises ValueError or TypeError if their channels or dtypes differ."""
        if not isinstance(other, Moments):
            return NotImplemented
        check_parts.summed("moments", other._check(), self._check().channels, self.dtype, "the other's")
        if not self._count or not other._count:
            return self if self._count else other
        count = checks.natural("count", self._count + other._count)
        rows = merged(self._rows, self._count, other._rows, other._count)
        return self._of(count, rows, self._dtype)

    def __repr__(self) -> str:
        return f"Moments(count={self._count}, mean={_short(self.mean)}, m2={_short(self.m2)})"


class Sums(_Summed):
    """The sums over a batch that its gradients need; `+` and sum() add those of its parts.

    `==` compares contents bit for bit.

    Parameters
    ----------
    count : int >= 0
        Values per channel that counted towards the statistics.
    sum_dy, sum_dy_xhat : arrays of shape (C,), float32 or float64; the dtype of sum_dy is the statistics dtype
        The sums of dz and dz * xhat, where dz is the gradient before the activation (dy without one).

    Attributes
    ----------
    count : int
    sum_dy, sum_dy_xhat : arrays of shape (C,) in the statistics dtype (held in float64, in copies and pickles too)
    channels, dtype : C and the statistics dtype

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [3.0]]), eps=0.0)
    >>> sums = fastbn.backward_sums(np.array([[1.0], [2.0]]), cache)
    >>> sums + sums
    Sums(count=4, sum_dy=[6.], sum_dy_xhat=[2.])
    """

    __slots__ = ()

    _NAME, _ROWS = "sums", 2

    def __init__(self, count: int, sum_dy: Array, sum_dy_xhat: Array) -> None:
        self._count = checks.natural("count", count)
        self._rows, self._dtype = check_parts.rows({"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat})

    @property
    def sum_dy(self) -> Array:
        """The sum of dz of each channel, in the statistics dtype."""
        return self._rounded(self._rows[:1])

    @property
    def sum_dy_xhat(self) -> Array:
        """The sum of dz * xhat of each channel, in the statistics dtype."""
        return self._rounded(self._rows[1:])

    def __add__(self, other: object) -> "Sums":
        """Those of two parts. Raises ValueError or TypeError if their channels or dtypes differ."""
        if not isinstance(other, Sums):
            return NotImplemented
        check_parts.summed("sums", other._check(), self._check().channels, self.dtype, "the other's")
        count = checks.natural("count", self._count + other._count)
        with np.errstate(all="ignore"):
            return self._of(count, self._rows + other._rows, self._dtype)

    def __repr__(self) -> str:
        return f"Sums(count={self._count}, sum_dy={_short(self.sum_dy)}, sum_dy_xhat={_short(self.sum_dy_xhat)})"


def _short(values: Array) -> str:
    return np.array2string(values, separator=", ", threshold=8)


def blended(old: Any, batch: Any, momentum: Any) -> Any:
    """The new value of a running statistic, from float64 arrays or torch tensors."""
    return (1 - momentum) * old + momentum * batch


def save(rows: Array, count: int, saved: Array) -> None:
    """Writes the mean, in two pieces, and the variance to the rows of `saved` that `apply` reads.

    With an infinite variance all of x would be the mean: squares that overflow make their channel NaN.
    """
    with np.errstate(all="ignore"):
        saved[0], saved[1], saved[2] = rows[0], rows[1], np.where(rows[2] < np.inf, rows[2] / count, np.nan)


def save_parameters(call: Call, saved: Array) -> None:
    """Writes the rows gamma and beta of `saved`; where they are absent, ones and zeros."""
    saved[4], saved[5] = 1 if call.gamma is None else call.gamma, 0 if call.beta is None else call.beta


def blend(call: Call, rows: Array | tuple[Array, ...], count: int) -> None:
    """Updates the call's running statistics, if it has any.

    The rows are mean, mean_low and m2 of the batch, whose variance is m2 / (count - correction). The new values are
    computed in float64 and rounded once, to the dtype of each running statistic: any float dtype in native byte order.
    """
    if call.running_mean is None or call.running_var is None:
        return
    with np.errstate(all="ignore"):
        batch = rows[0] + rows[1], rows[2] / (count - call.correction)
        for running, new in zip((call.running_mean, call.running_var), batch, strict=True):
            running[...] = rounded(blended(running.astype(FLOAT64), new, call.momentum), running.dtype)
