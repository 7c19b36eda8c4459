"""What do the tests run on, and when is a result right? Kernels, data, places in memory; the oracle's tolerances."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import oracle

import fastbn

Array = np.ndarray[Any, Any]
CHECKOUT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "float64")
if find_spec("ml_dtypes"):
    import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16

    HALVES: tuple[str, ...] = ("float16", "bfloat16")
else:
    HALVES = ("float16",)
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", ("leaky_relu", 0.2), "silu", "hardswish", "sigmoid")


class Kernel(NamedTuple):
    """A backend, and the instruction set it runs with where it has several."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend


def isas() -> tuple[str, ...]:
    """The instruction sets that the C backend has on this processor."""
    if "c" not in fastbn.backends():
        return ()
    from fastbn._backends.c import bridge

    return tuple(bridge.isas())


KERNELS = tuple(
    Kernel(backend, isa) for backend in fastbn.backends() for isa in (isas() if backend == "c" else (None,))
)
BACKENDS = tuple(next(kernel for kernel in KERNELS if kernel.backend == backend) for backend in fastbn.backends())
"""Every backend once, with its best instruction set."""
COMPILED = tuple(kernel for kernel in KERNELS if kernel.backend != "numpy")
"""Those that use several threads, and make no temporaries."""


@contextmanager
def running_on(kernel: Kernel) -> Iterator[None]:
    """Within the block, calls that name no backend run on this one."""
    with fastbn.use_backend(kernel.backend):
        if kernel.isa is None:
            yield
            return
        from fastbn._backends.c import bridge

        before = bridge.isa()
        bridge.select_isa(kernel.isa)
        try:
            yield
        finally:
            bridge.select_isa(before)


class Call(NamedTuple):
    """The arrays of one forward and backward call."""

    x: Array
    dy: Array
    residual: Array
    gamma: Array | None
    beta: Array | None
    running_mean: Array
    running_var: Array


def statistics_dtype(dtype: Any) -> str:
    """What the contract keeps the statistics of data of that dtype in."""
    return "float64" if np.dtype(dtype) == np.float64 else "float32"


def call(
    shape: tuple[int, ...], dtype: Any = "float32", axis: int = 1, offset: float = 0.5, seed: int = 0, spread: float = 1
) -> Call:
    """Random arrays for x of `shape`."""
    channels = shape[axis]
    rng = np.random.default_rng([seed, *shape])
    x, dy, residual = (rng.standard_normal(shape) for _ in range(3))
    gamma, beta, mean = (rng.standard_normal(channels) for _ in range(3))
    var = rng.uniform(0.5, 2, channels)
    wide = statistics_dtype(dtype)
    data = ((x * spread).astype(wide) + np.asarray(offset, wide), dy.astype(wide), residual.astype(wide))
    return Call(*(a.astype(dtype) for a in data), *(a.astype(wide) for a in (gamma, beta, mean, var)))


def random_mask(shape: tuple[int, ...], axis: int = 1, seed: int = 0, least: int = 2) -> Array:
    """A mask for x of `shape`, of any kind of runs, with at least `least` True where there is room for them."""
    rng = np.random.default_rng([seed, *shape])
    rest = tuple(np.delete(shape, axis))
    mask = rng.random(rest) < rng.choice([0.1, 0.5, 0.9])
    if rng.random() < 0.5 and len(rest) > 1:  # padded sequences: the first few of each
        mask = np.arange(rest[-1]) < rng.integers(0, rest[-1] + 1, (*rest[:-1], 1))
    mask.flat[rng.permutation(mask.size)[:least]] = True
    return mask


# How far results may be from the oracle ------------------------------------------------------------------------------

ROUNDING = oracle.ROUNDING


def _worst(got: Array, exact: Array, allowed: Array) -> float:
    """The largest error, in units of what is allowed; an infinity is right where the exact value rounds to it."""
    assert not np.isnan(got).any(), "NaN among the results"
    with np.errstate(invalid="ignore"):
        error = abs(oracle.long(got) - exact)
    beyond = abs(exact) + allowed >= oracle.FORMATS[got.dtype.name].largest
    error[np.isinf(got) & beyond & (np.sign(exact) == np.sign(got))] = 0
    return float((error / allowed).max(initial=0))


def assert_y(
    y: Array,
    at: oracle.Normalized,
    gamma: Array | None = None,
    *,
    axis: int = 1,
    activation: Any = None,
    where: str = "",
) -> None:
    """Is y within the contract's bound?"""
    allowed = oracle.bound(at, gamma, axis=axis, activation=activation, dtype=y.dtype)
    worst = _worst(y, at.y, allowed)
    assert worst <= 1, f"|y - exact| is {worst:.3g} times what the contract allows {where}"


def assert_sum(name: str, got: Array, exact: Array, terms: Array, slack: Array | float = 0, where: str = "") -> None:
    """A sum over a channel, kept in float64 and rounded once to its dtype."""
    worst = _worst(got, exact, oracle.ulp(exact, got.dtype) + terms * 1e-14 + slack)
    assert worst <= 1, f"{name} is {worst:.3g} times as far from exact as allowed {where}"


def assert_gradients(got: Any, wanted: oracle.Differentiated, where: str = "") -> None:
    """Is dx within 2 epsilon of the terms that it adds up, are dgamma and dbeta rounded once, dresidual not at all?

    All of that beyond what a slope that is not exact may pass on; and halves round once more.
    """
    exact, terms, slack = wanted
    arithmetic = oracle.FORMATS[got.dx.dtype.name].arithmetic
    epsilon = oracle.ulp(1, arithmetic)
    allowed = 2 * ROUNDING[arithmetic] * epsilon * terms.dx + 4 * oracle.ulp(0, arithmetic) + slack.dx
    worst = _worst(got.dx, exact.dx, allowed + _half(exact.dx, got.dx.dtype))
    assert worst <= 1, f"dx is {worst:.3g} times as far from exact as allowed {where}"
    if got.dgamma is not None:
        assert_sum("dgamma", got.dgamma, exact.dgamma, terms.dgamma, slack.dgamma, where)
    if got.dbeta is not None:
        assert_sum("dbeta", got.dbeta, exact.dbeta, terms.dbeta, slack.dbeta, where)
    if got.dresidual is not None:
        off = abs(oracle.long(got.dresidual) - exact.dresidual)
        rounded = np.where(slack.dresidual > 0, _half(exact.dresidual, got.dx.dtype) + oracle.ulp(0, arithmetic), 0)
        assert (off <= slack.dresidual + rounded).all(), f"dresidual is not dy times the activation's slope {where}"


def _half(exact: Array, dtype: Any) -> Array | float:
    """The last rounding of a half."""
    return oracle.ulp(exact, dtype) if np.dtype(dtype).itemsize == 2 else 0


def assert_running(
    name: str, got: Array, old: Array, batch: Array, momentum: float, where: str = "", *, size: Any = 0
) -> None:
    """A running statistic after one more batch, within 2 ulp of the terms that it blends.

    `size` is that of the values whose sum, kept in float64, the batch's statistic is.
    """
    exact = oracle.blended(old, batch, momentum)
    terms = oracle.blended(abs(old), abs(batch), momentum)
    worst = _worst(got, exact, 2 * oracle.ulp(terms, got.dtype) + np.maximum(terms, momentum * size) * 1e-14)
    assert worst <= 1, f"{name} is {worst:.3g} times as far from exact as allowed {where}"


def assert_moments(got: Any, at: oracle.Normalized, x: Array, where: str = "") -> None:
    """Moments: the mean and the sum of squares around it, kept in float64 and rounded once."""
    size = np.full_like(at.mean, abs(oracle.long(x)).max(initial=0))
    assert_sum("mean", got.mean, at.mean, size, where=where)
    assert_sum("m2", got.m2, at.var * at.count, 10 * at.var * at.count, where=where)
    assert_sum("var", got.var(), at.var, 10 * at.var, where=where)


class Answers(NamedTuple):
    """What the oracle says of a forward and a backward call."""

    forward: oracle.Normalized
    backward: oracle.Differentiated


_ANSWERS: OrderedDict[bytes, Answers] = OrderedDict()
_ANSWERS_KEPT = Lock()  # pytest-run-parallel runs a test in several threads


def answers(
    c: Call, axis: int, training: bool, mask: Array | None, activation: Any, residual: Array | None, eps: float
) -> Answers:
    """The oracle's, which takes long; the last few are kept for the other kernels, by the values that were given."""
    told = sha1(repr((axis, training, activation, eps)).encode(), usedforsecurity=False)
    for array in (*c, residual, mask):
        if array is None:
            told.update(b"None")
        else:
            told.update(f"{array.shape} {array.dtype.str} {array.dtype.name}".encode())
            told.update(array.tobytes())
    key = told.digest()
    with _ANSWERS_KEPT:
        if key not in _ANSWERS:
            statistics = (None, None) if training else (c.running_mean, c.running_var)
            exact = oracle.forward(
                c.x,
                c.gamma,
                c.beta,
                *statistics,
                eps=eps,
                axis=axis,
                mask=mask,
                activation=activation,
                residual=residual,
            )
            wanted = oracle.backward(
                c.dy, exact, c.gamma, axis=axis, mask=mask, activation=activation, frozen=not training
            )
            _ANSWERS[key] = Answers(exact, wanted)
            while len(_ANSWERS) > 1 and sum(kept.forward.y.size for kept in _ANSWERS.values()) > 1_000_000:
                _ANSWERS.popitem(last=False)
        return _ANSWERS[key]


def check(
    c: Call,
    *,
    axis: int = 1,
    training: bool = True,
    mask: Array | None = None,
    activation: Any = None,
    residual: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.1,
    out: Callable[[Array], Array] | None = None,
    where: str = "",
) -> None:
    """Runs forward and backward, and holds everything that they return or update against the oracle.

    `out` places an array in memory, and both results then go there.
    """
    mean, var = c.running_mean.copy(), c.running_var.copy()
    before = c.x.tobytes(), c.dy.tobytes(), c.residual.tobytes()
    added = c.residual if residual else None
    target = None if out is None else out(np.zeros(c.x.shape, native(c.x.dtype)))
    y, cache = fastbn.forward(
        c.x, c.gamma, c.beta, mean, var,
        training=training, momentum=momentum, eps=eps, axis=axis, mask=mask, activation=activation, residual=added,
        out=target,
    )  # fmt: skip
    exact, wanted = answers(c, axis, training, mask, activation, added, eps)
    assert_placed(y, c.x, target, where)
    assert_y(y, exact, c.gamma, axis=axis, activation=activation, where=where)
    if training:
        size = abs(oracle.long(c.x)).max(initial=0)
        assert_running("running_mean", mean, c.running_mean, exact.mean, momentum, where, size=size)
        assert_running("running_var", var, c.running_var, oracle.unbiased(exact.var, exact.count), momentum, where)
    else:
        assert_same_bits((mean, var), (c.running_mean, c.running_var), where)
    got = fastbn.backward(c.dy, cache, out=target)
    assert_placed(got.dx, c.x, target, where)
    given = (c.gamma is not None, c.beta is not None, residual)
    assert tuple(gradient is not None for gradient in (got.dgamma, got.dbeta, got.dresidual)) == given, where
    assert_gradients(got, wanted, where)
    assert before == (c.x.tobytes(), c.dy.tobytes(), c.residual.tobytes()), f"an input was changed {where}"


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def assert_placed(result: Array, x: Array, out: Array | None, where: str = "") -> None:
    """A result is `out`, or a fresh array in x's memory order."""
    assert result.dtype == native(x.dtype), where
    if out is not None:
        assert result is out, where
        return
    squeezed = result.squeeze()
    assert squeezed.strides == np.empty_like(squeezed).strides, f"a result is not dense {where}"
    told = [axis for axis, size in enumerate(x.shape) if size > 1 and x.strides[axis]]
    orders = (sorted(told, key=lambda axis, a=a: -abs(a.strides[axis])) for a in (x, result))
    assert len(set(map(tuple, orders))) == 1, f"a result is in another memory order than x {where}"


def assert_same_bits(a: Any, b: Any, where: str = "") -> None:
    """Arrays (or tuples of them, or None) that agree in every bit, NaN included."""
    if isinstance(a, tuple):
        for one, other in zip(a, b, strict=True):
            assert_same_bits(one, other, where)
    elif a is None or b is None:
        assert a is b, where
    else:
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.tobytes() == b.tobytes(), where


# Ways for an array to lie in memory ----------------------------------------------------------------------------------


def _c_order(a: Array) -> Array:
    return np.ascontiguousarray(a)


def _fortran(a: Array) -> Array:
    return np.asfortranarray(a)


def _in_order(*order: int) -> Callable[[Array], Array]:
    """Axes from the slowest in memory to the fastest, for arrays of four dimensions; others are reversed."""

    def place(a: Array) -> Array:
        chosen = order if a.ndim == len(order) else tuple(reversed(range(a.ndim)))
        return np.ascontiguousarray(a.transpose(chosen)).transpose(np.argsort(chosen))

    return place


def _odd_address(a: Array) -> Array:
    """One element past a vector's boundary, with NaN on both sides."""
    buffer = np.full(a.size + 34, np.nan, a.dtype)
    start = 1 + (-(buffer.ctypes.data // a.itemsize)) % 16
    inner = buffer[start : start + a.size].reshape(a.shape)
    inner[...] = a
    return inner


def _unaligned(a: Array) -> Array:
    """An address that is not a multiple of the element's size."""
    raw = np.zeros(a.nbytes + 1, np.uint8)
    inner = raw[1:].view(a.dtype).reshape(a.shape)
    inner[...] = a
    return inner


def _stepped(a: Array) -> Array:
    buffer = np.full(tuple(2 * n + 1 for n in a.shape), np.nan, a.dtype)
    inner = buffer[tuple(slice(1, None, 2) for _ in a.shape)]
    inner[...] = a
    return inner


def _reversed(a: Array) -> Array:
    back = tuple(slice(None, None, -1) for _ in a.shape)
    return np.ascontiguousarray(a[back])[back]


def _cropped(a: Array) -> Array:
    """Part of the last axis of a larger array."""
    buffer = np.full((*a.shape[:-1], a.shape[-1] + 3), np.nan, a.dtype)
    buffer[..., 2:-1] = a
    return buffer[..., 2:-1]


def _read_only(a: Array) -> Array:
    copy = a.copy()
    copy.flags.writeable = False
    return copy


def _byteswapped(a: Array) -> Array:
    return a.astype(a.dtype.newbyteorder())


PLACEMENTS: dict[str, Callable[[Array], Array]] = {
    "C order": _c_order,
    "Fortran order": _fortran,
    "channels-last seen as channels-first": _in_order(0, 2, 3, 1),
    "channels outermost": _in_order(1, 0, 2, 3),
    "batch innermost": _in_order(1, 2, 3, 0),
    "odd address": _odd_address,
    "unaligned": _unaligned,
    "every second element": _stepped,
    "negative strides": _reversed,
    "cropped": _cropped,
    "read-only": _read_only,
    "byteswapped": _byteswapped,
}
"""How the same values may lie in memory; each returns an array equal to its argument."""

DENSE = tuple(PLACEMENTS)[:5]
"""Without gaps, the axes in one order or another."""


# Other processes -----------------------------------------------------------------------------------------------------


def run_python(script: str, folder: Path, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh interpreter, in `folder`, without the settings of fastbn's but its cache folder."""
    inherited = {
        key: value for key, value in os.environ.items() if not re.match("FASTBN_(?!CACHE_DIR)|OMP_NUM_THREADS", key)
    }
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
