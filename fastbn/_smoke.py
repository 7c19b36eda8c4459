"""Does the installed fastbn do what it promises, on this machine? What `fastbn.test()` runs, with NumPy alone."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ._backends import backends, get_num_threads, select, use_backend
from ._moments import blended
from .call.dtypes import KINDS, Kind, kind_of
from .config.embed import get_include, get_library
from .config.info import __version__
from .config.thread_count import use_num_threads
from .layer import BatchNorm
from .ops import backward, backward_sums, forward, infer, moments

Array = np.ndarray[Any, Any]
Check = tuple[str, Callable[[], str]]
"""What a check is about, and a function that says what it found, or raises."""

EPS, MOMENTUM = 1e-5, 0.1
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "channels-first": ((16, 12, 9, 7), 1),
    "channels-last": ((16, 9, 7, 12), -1),
}
LARGE = (((32, 48, 28, 28), 1), ((32, 28, 28, 48), -1))
"""Shapes and axes of calls that several threads share."""


def run() -> bool:
    """Runs all checks, prints what they find, and returns whether all is well."""
    start, checks = time.perf_counter(), list(_checks())
    width = max(len(name) for name, _ in checks)
    print(f"fastbn {__version__} on {platform.system()} {platform.machine()}, NumPy {np.__version__}")
    failed = 0
    for name, check in checks:
        print(f"  {name:<{width}}  ", end="", flush=True)
        try:
            print(check())
        except Exception as error:  # whatever is wrong, the other checks go on
            failed += 1
            print(f"FAILED: {type(error).__name__}: {error}")
    found = f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks passed"
    print(f"{found} in {time.perf_counter() - start:.1f} s")
    return not failed


def _checks() -> Iterator[Check]:
    for name in backends():
        yield f"{name}: accuracy", partial(_on, name, partial(_accuracy, _dtypes(name)))
        yield f"{name}: threads", partial(_on, name, _threads)
    if "c" in backends():
        yield "c: instruction sets", _instruction_sets
        yield "c: for compilers", _embedding
    yield "parts of a batch", _parts
    yield "layer and plan", _layer
    yield "bad input", _bad_input


def _on(backend: str, check: Callable[[], str]) -> str:
    with use_backend(backend):
        return check()


def _dtypes(backend: str) -> tuple[str, ...]:
    """All that are usable here; for Numba one, since each takes several seconds to compile."""
    if backend == "numba":
        return ("float32",)
    return tuple(name for name in KINDS if name != "bfloat16" or find_spec("ml_dtypes") is not None)


def _expect(fact: object, otherwise: str) -> None:
    """Raises unless something is as it should be."""
    if not fact:
        raise ArithmeticError(otherwise)


# Accuracy ------------------------------------------------------------------------------------------------------------


class Arguments(NamedTuple):
    """The arrays of a call, with a mean that is 100 times the standard deviation."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    dy: Array

    @classmethod
    def random(cls, shape: tuple[int, ...], axis: int, dtype: str) -> Arguments:
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: F401  # registers the name with NumPy
        data = np.dtype(dtype)
        rng, wide = np.random.default_rng(0), kind_of(data).statistics
        x, dy = (rng.standard_normal(shape) + 100).astype(data), rng.standard_normal(shape).astype(data)
        gamma, beta, mean = (rng.standard_normal(shape[axis]).astype(wide) for _ in range(3))
        return cls(x, gamma, beta, mean, rng.uniform(0.5, 2, shape[axis]).astype(wide), dy)


def _accuracy(dtypes: tuple[str, ...]) -> str:
    """Holds y, the gradients and the running statistics against the formulas, within what fastbn promises."""
    worst = 0.0
    for dtype in dtypes:
        for layout, (shape, axis) in LAYOUTS.items():
            for name, ratio in _errors(Arguments.random(shape, axis, dtype), axis).items():
                _expect(ratio <= 1, f"{name} of {dtype}, {layout}, is off by {ratio:.3g} times what is promised")
                worst = max(worst, ratio)
    return f"{', '.join(dtypes)}: errors are at most {worst:.2f} of what is promised"


def _errors(given: Arguments, axis: int) -> dict[str, float]:
    """The largest error of each result, over the largest that is allowed: see the notes of `forward`."""
    mean, var = given.mean.copy(), given.var.copy()
    y, cache = forward(given.x, given.gamma, given.beta, mean, var, momentum=MOMENTUM, eps=EPS, axis=axis)
    dx, dgamma, dbeta = backward(given.dy, cache)
    x, dy, gamma, beta = _rows(given.x, axis), _rows(given.dy, axis), _column(given.gamma), _column(given.beta)
    centre, values = x.mean(axis=1, keepdims=True), x.shape[1]
    centred = x - centre
    lost = centred.mean(axis=1, keepdims=True)  # of the mean, where long double has no more digits than double
    centre, centred = centre + lost, centred - lost
    square = (centred**2).mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt(square + EPS)
    xhat = centred * scale
    sum_dy, sum_dy_xhat = (terms.sum(axis=1, keepdims=True) for terms in (dy, dy * xhat))
    terms = gamma * scale * np.stack(np.broadcast_arrays(dy, sum_dy / values, xhat * sum_dy_xhat / values))
    exact_y, exact_dx = xhat * gamma + beta, terms[0] - terms[1] - terms[2]
    own, wide = kind_of(given.x.dtype), kind_of(given.gamma.dtype)
    rounded = 32 if wide.name == "float64" else 1  # what float64 data adds up is rounded like the data itself

    def within(got: Array, exact: Array, allowed: Array) -> float:
        return float((abs(got - exact) / allowed).max())

    def halves(exact: Array) -> Array | float:
        return 0 if own is wide else _ulp(exact, own)

    y_allowed = 2 * _ulp(np.maximum(1, abs(xhat)), wide) * abs(gamma) + _ulp(exact_y, wide)
    dx_allowed = 4 * _ulp(abs(terms).max(axis=0), wide)
    found = {
        "y": within(_rows(y, axis), exact_y, rounded * y_allowed + halves(exact_y)),
        "dx": within(_rows(dx, axis), exact_dx, rounded * dx_allowed + halves(exact_dx)),
    }
    for name, got, exact, summed in (
        ("dgamma", dgamma, sum_dy_xhat, dy * xhat),
        ("dbeta", dbeta, sum_dy, dy),
    ):
        _expect(got is not None, f"{name} is missing")
        found[name] = within(_column(got), exact, 1e-6 * abs(summed).sum(axis=1, keepdims=True))
    unbiased = square * values / (values - 1)
    for name, got, old, batch, size in (
        ("running_mean", mean, _column(given.mean), centre, np.sqrt(square)),
        ("running_var", var, _column(given.var), unbiased, square),
    ):
        largest = np.maximum(np.maximum(abs(old), abs(batch)), size)
        exact = blended(old, batch, np.longdouble(MOMENTUM))
        found[name] = within(_column(got), exact, rounded * 2 * _ulp(largest, wide))
    return found


def _rows(array: Array, axis: int) -> Array:
    """An array as (channels, values), in long double."""
    moved = np.moveaxis(array, axis, 0).astype(np.float64).astype(np.longdouble)
    return moved.reshape(moved.shape[0], -1)


def _column(values: Any) -> Array:
    return np.asarray(values).astype(np.longdouble)[:, np.newaxis]


def _ulp(values: Array, kind: Kind) -> Array:
    """The distance to the next number of this kind."""
    _, exponent = np.frexp(np.maximum(abs(values), kind.tiny))
    distance: Array = np.ldexp(np.longdouble(kind.eps), exponent - 1)
    return distance


# Bits ----------------------------------------------------------------------------------------------------------------


def _digest(shape: tuple[int, ...], axis: int, dtypes: tuple[str, ...]) -> str:
    """A hash of the bits of all results."""
    told = hashlib.sha256()
    for dtype in dtypes:
        x, gamma, beta, mean, var, dy = Arguments.random(shape, axis, dtype)
        y, cache = forward(x, gamma, beta, mean, var, axis=axis)
        results = y, mean, var, *backward(dy, cache), infer(x, gamma, beta, mean, var, axis=axis)
        for array in results:
            told.update(np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def _threads() -> str:
    """The same bits for one, two and three threads, and for as many as are used by default."""
    digests, counts = set(), set()
    for count in sorted({1, 2, 3, get_num_threads()}):
        with use_num_threads(count):
            counts.add(get_num_threads())  # which is 1 in a build without OpenMP
            for shape, axis in LARGE:
                digests.add((shape, _digest(shape, axis, ("float32",))))
    told = ", ".join(map(str, sorted(counts)))
    _expect(len(digests) == 2, f"the bits depend on the number of threads, among {told}")
    return f"the same bits for {told}" if len(counts) > 1 else "only one can be used here"


def _instruction_sets() -> str:
    """The same bits with each that runs here, except for the baseline, which has no fused multiply-add."""
    bridge: Any = select("c")
    before, digests = bridge.isa(), {}
    with use_backend("c"):
        try:
            for name in bridge.isas():
                bridge.select_isa(name)
                _accuracy(_dtypes("c"))
                digests[name] = [_digest(shape, axis, _dtypes("c")) for shape, axis in LAYOUTS.values()]
        finally:
            bridge.select_isa(before)
    baseline = digests.pop("baseline", None)
    same = list(digests)
    _expect(all(digests[name] == digests[same[0]] for name in same), f"{' and '.join(same)} give other bits")
    told = [f"the same bits with {' and '.join(same)}"] * (len(same) > 1) + same * (len(same) == 1)
    return "; ".join([*told, *["baseline within what is promised"] * (baseline is not None)]) + f" (used: {before})"


def _embedding() -> str:
    get_include(), get_library()
    return "fastbn.h and the static library are there"


# What is built on the calls ------------------------------------------------------------------------------------------


def _parts() -> str:
    """Moments and sums of parts give what the whole batch gives."""
    x, gamma, beta, *_, dy = Arguments.random((16, 12, 9, 7), 1, "float32")
    whole = forward(x, gamma, beta)
    gradients = backward(dy, whole.cache)
    cuts = [slice(0, 3), slice(3, 16)]
    merged = moments(x[cuts[0]]) + moments(x[cuts[1]])
    caches = [forward(x[cut], gamma, beta, moments=merged) for cut in cuts]
    sums = backward_sums(dy[cuts[0]], caches[0].cache) + backward_sums(dy[cuts[1]], caches[1].cache)
    y = np.concatenate([part.y for part in caches])
    dx = np.concatenate([backward(dy[cut], part.cache, sums=sums).dx for cut, part in zip(cuts, caches, strict=True)])
    for name, got, wanted in (("y", y, whole.y), ("dx", dx, gradients.dx)):
        off = float(abs(got - wanted).max() / abs(wanted).max())
        _expect(off <= 4 * kind_of(x.dtype).eps, f"{name} of the parts is off by {off:.3g} of the largest value")
    return "moments and sums of two parts give what the whole gives"


def _layer() -> str:
    """A layer trains; afterwards its plan, and `infer`, give its bits."""
    x, _, _, _, _, dy = Arguments.random((16, 12, 9, 7), 1, "float32")
    bn: Any = BatchNorm(12, activation="relu")
    bn(x)
    bn.backward(dy)
    _expect(set(bn.gradients()) == {"weight", "bias"}, "gradients are missing")
    y = bn.eval()(x)
    other = infer(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, activation="relu")
    _expect(y.tobytes() == other.tobytes() == bn.plan()(x).tobytes(), "layer, plan and infer differ")
    return "the same bits as infer"


def _bad_input() -> str:
    """Is refused, by a message that names it, and nothing changes."""
    x, mean, var = np.ones((4, 3), np.float32), np.zeros(3), np.ones(3)
    for error, options in ((TypeError, {"activation": 3}), (ValueError, {"momentum": 2.0}), (ValueError, {"axis": 2})):
        try:
            forward(x, None, None, mean, var, **options)
        except error as refused:
            (name,) = options
            _expect(str(refused).startswith(f"{name}: got "), f"{name} is refused by {refused}")
        else:
            raise ArithmeticError(f"{options} is not refused")
    _expect((mean == 0).all() and (var == 1).all(), "a call that raised has changed running statistics")
    return "is refused, and nothing changes"
