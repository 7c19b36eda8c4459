"""Are the C kernels' activations and their slopes right, over the whole range of every dtype and instruction set?

z is x (mean 0, variance 1, eps 0) or the residual; the formulas are PyTorch's, in long double.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest

if not cases.isas():
    pytest.skip("the C backend is not usable here", allow_module_level=True)

import c_calls

from fastbn._backends.c import bridge
from fastbn.call.activations import Activation

Array = np.ndarray[Any, Any]
LONG = np.longdouble
SLOPE = 0.0625  # exact in every dtype


def dtype_named(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def data_dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    if request.param == "float64" and np.finfo(LONG).nmant < 60:
        pytest.skip("long double is no longer than float64 here")
    return dtype_named(request.param)


@pytest.fixture(params=cases.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = bridge.isa()
    bridge.select_isa(request.param)
    yield request.param
    bridge.select_isa(before)


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """The ranges below overflow and hold infinities and NaN."""
    with np.errstate(all="ignore"):
        yield


@cache
def points(dtype: np.dtype[Any]) -> Array:
    """Every half; for others bit patterns evenly through all of them, more where exp is not constant, and ends."""
    rng = np.random.default_rng(0)
    if dtype.itemsize == 2:
        return np.arange(65536, dtype=np.uint16).view(dtype)
    info, kinks = np.finfo(dtype), np.array([0, 3, 6], dtype)
    beside = [np.nextafter(kinks, dtype.type(to)) for to in (-np.inf, np.inf)]
    ends = np.concatenate([kinks, *beside, [np.inf, np.nan, info.max, info.tiny]])
    least = 105 if dtype == np.float32 else 760
    spread = [rng.uniform(-1, 1, 200_000), rng.uniform(-20, 20, 200_000), rng.uniform(-least, least, 200_000)]
    if dtype == np.float32:
        bits = np.arange(0, 2**32, 10_007).astype(np.uint32).view(dtype)
    else:
        bits = np.arange(0, 2**64, 2**64 // 300_000, dtype=np.uint64).view(dtype)
    return np.concatenate([bits, *(part.astype(dtype) for part in (*spread, ends, -ends))])


def _sigmoids(z: Array) -> tuple[Array, Array]:
    """Of z, and of its opposite."""
    small = np.exp(-abs(z))
    large, small = 1 / (1 + small), small / (1 + small)
    return np.where(z < 0, small, large), np.where(z < 0, large, small)


def _sigmoid(z: Array) -> Array:
    return _sigmoids(z)[0]


def _relu6(z: Array) -> Array:
    return np.minimum(np.maximum(z, 0), 6)


def _silu(z: Array) -> Array:
    return np.where(np.isneginf(z), np.nan, z * _sigmoid(z))


FUNCTIONS: dict[Activation, tuple[Callable[[Array], Array], float]] = {
    Activation.IDENTITY: (lambda z: z, 0.5),
    Activation.RELU: (lambda z: np.maximum(z, 0), 0.5),
    Activation.RELU6: (_relu6, 0.5),
    Activation.LEAKY_RELU: (lambda z: np.where(z > 0, z, z * LONG(SLOPE)), 0.5),
    Activation.SILU: (_silu, 3),
    Activation.HARDSWISH: (lambda z: z * (_relu6(z + 3) / 6), 2),
    Activation.SIGMOID: (_sigmoid, 2.5),
}
"""What each is, and how many ulp of the result it may be off."""

Pieces = tuple[Array, Array]


def _whole(slope: Array) -> Pieces:
    return slope, abs(slope)


def _silu_slope(z: Array) -> Pieces:
    s, t = _sigmoids(z)
    grown = np.where(np.isinf(z), np.nan, z * s * t)
    return s + grown, s + abs(grown)


def _hardswish_slope(z: Array) -> Pieces:
    between = np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + LONG(0.5)))
    return between, np.where(abs(z) < 3, abs(z / 3) + LONG(0.5), abs(between))


SLOPES: dict[Activation, tuple[Callable[[Array], Pieces], float]] = {
    Activation.IDENTITY: (lambda z: _whole(np.ones_like(z)), 0.5),
    Activation.RELU: (lambda z: _whole(np.where(z <= 0, LONG(0), 1)), 0.5),  # 1 at NaN: it passes
    Activation.RELU6: (lambda z: _whole(np.where((z <= 0) | (z >= 6), LONG(0), 1)), 0.5),
    Activation.LEAKY_RELU: (lambda z: _whole(np.where(z > 0, 1, LONG(SLOPE))), 0.5),
    Activation.SILU: (_silu_slope, 4.5),
    Activation.HARDSWISH: (_hardswish_slope, 1.5),
    Activation.SIGMOID: (lambda z: _whole(np.multiply(*_sigmoids(z))), 4.5),
}
"""The slope and the sum of its terms' magnitudes, and how many ulp of that sum it may be off."""

FRACTION = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}
"""Bits after the point, and the exponent of the least normal number."""


def ulp(exact: Array, dtype: np.dtype[Any]) -> Array:
    bits, least = FRACTION[dtype.name]
    _, exponent = np.frexp(np.where(np.isfinite(exact), abs(exact), 1))
    return np.ldexp(exact.dtype.type(1), np.maximum(exponent - 1, least) - bits)


def allowed_for(ulps: float, dtype: np.dtype[Any]) -> float:
    """Halves are computed in float32 and rounded once more."""
    return ulps if dtype.itemsize > 2 else 0.5 + ulps * 2.0 ** (FRACTION[dtype.name][0] - 23)


class Answer(NamedTuple):
    """Exact results, the size of the terms that they add up, and how far they may be off in ulp of those."""

    exact: Array
    terms: Array
    ulps: float


class Expected:
    """An answer, ready to be compared with what each instruction set and layout gives: mostly the same bits."""

    def __init__(self, answer: Answer, dtype: np.dtype[Any]) -> None:
        exact, terms, ulps = answer
        self.exact, self.nan, self.dtype, self.ulps = exact, np.isnan(exact), dtype, ulps
        finite = np.isfinite(exact) & ~np.isinf(exact.astype(np.float64).astype(dtype))
        self.places, self.bound = np.flatnonzero(finite), ulp(terms[finite], dtype)
        self.right: set[bytes] = set()

    def check(self, got: Array, z: Array, where: str) -> None:
        """Within that many ulp of the terms; NaN where it should be, infinite only past the largest number."""
        got, filled_up = np.split(got.reshape(-1), [self.exact.size])
        assert np.array_equal(filled_up, got[: filled_up.size], equal_nan=True), where
        bits = got.tobytes()
        if bits in self.right:
            return
        nan = np.isnan(got)
        assert np.array_equal(nan, self.nan), f"{z[nan != self.nan][:5]} {where}"
        assert (got[np.isposinf(self.exact)] == np.inf).all(), where
        assert (got[np.isneginf(self.exact)] == -np.inf).all(), where
        error = abs(got[self.places].astype(self.exact.dtype) - self.exact[self.places]) / self.bound
        if error.size:
            worst = int(np.argmax(error))
            allowed = allowed_for(self.ulps, self.dtype)
            assert error[worst] <= allowed, f"{float(error[worst]):.4g} ulp off at {z[self.places][worst]!r} {where}"
        self.right.add(bits)


def shaped(z: Array, by_rows: bool) -> Array:
    """In three dimensions, with an end that fills no vector; rows are filled up by values from the beginning."""
    if not by_rows:
        return z.reshape(1, 1, -1)
    padded = np.resize(z, (z.size // 19 + 1) * 19)
    return padded.reshape(-1, 19, 1)


class Way(NamedTuple):
    """How z comes to an instruction set: in planes or rows, as x or as the residual beside x of 0."""

    isa: str
    x: Array
    residual: Array | None

    def __str__(self) -> str:
        rows = "rows" if self.x.shape[-1] == 1 else "planes"
        return f"on {self.isa} in {rows}, as {'x' if self.residual is None else 'the residual'}"


def ways(
    values: Array, *, layouts: tuple[bool, ...] = (False, True), as_residual: tuple[bool, ...] = (False, True)
) -> Iterator[Way]:
    """All of them, with the instruction set selected."""
    before = bridge.isa()
    try:
        for name in cases.isas():
            bridge.select_isa(name)
            for by_rows, residual in product(layouts, as_residual):
                z = shaped(values, by_rows)
                yield Way(name, np.zeros_like(z), z) if residual else Way(name, z, None)
    finally:
        bridge.select_isa(before)


@pytest.mark.parametrize("activation", Activation)
def test_forward(data_dtype: np.dtype[Any], activation: Activation) -> None:
    z = points(data_dtype)
    function, ulps = FUNCTIONS[activation]
    exact = function(z.astype(LONG))
    expected = Expected(Answer(exact, exact, ulps), data_dtype)
    for way in ways(z):
        got = c_calls.infer(way.x, None, None, c_calls.Behind(activation, SLOPE, way.residual)).y
        expected.check(got, z, str(way))


@pytest.mark.parametrize("activation", Activation)
def test_gradient(data_dtype: np.dtype[Any], activation: Activation) -> None:
    """Dx is dy times the slope, here of a dy that is a power of two, as frozen statistics have it."""
    z = points(data_dtype)
    slope, ulps = SLOPES[activation]
    exact, terms = slope(z.astype(LONG))
    expected = Expected(Answer(-2 * exact, 2 * terms, ulps), data_dtype)
    for way in ways(z):
        behind = c_calls.Behind(activation, SLOPE, way.residual)
        saved = c_calls.infer(way.x, None, None, behind).saved
        got = c_calls.backward(np.full_like(way.x, -2), way.x, saved, behind, frozen=True)
        expected.check(got.dx, z, str(way))
        if got.dresidual is not None:
            cases.assert_same_bits(got.dresidual, got.dx)


def test_gradient_of_silu_where_it_is_least_exact(isa: str) -> None:
    """Where z e dwarfs 1 + e: the baseline was 4.77 ulp off there when it added these two last."""
    z = np.array([-16.7555771, -16.7589169], np.float32)
    x, behind = z.reshape(1, 1, -1), c_calls.Behind(Activation.SILU)
    dx = c_calls.backward(np.ones_like(x), x, c_calls.infer(x, None, None, behind).saved, behind, frozen=True).dx
    Expected(Answer(*_silu_slope(z.astype(LONG)), 4.5), z.dtype).check(dx, z, f"on {isa}")


@pytest.mark.parametrize("slope", [0.01, 1 / 3, -0.5, 3.0])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_slopes_of_leaky_relu(half: str, slope: float) -> None:
    """Of every half. The slope itself is rounded to float32."""
    dtype = dtype_named(half)
    z = points(dtype)
    wide = z.astype(LONG)
    exact = np.where(wide > 0, wide, wide * LONG(slope))
    gradient = np.where(wide > 0, LONG(1), LONG(slope))
    expected, expected_slope = (Expected(Answer(each, each, 2), dtype) for each in (exact, gradient))
    for way in ways(z):
        behind = c_calls.Behind(Activation.LEAKY_RELU, slope, way.residual)
        got = c_calls.infer(way.x, None, None, behind)
        expected.check(got.y, z, str(way))
        back = c_calls.backward(np.ones_like(way.x), way.x, got.saved, behind, frozen=True)
        expected_slope.check(back.dx, z, str(way))


@pytest.mark.slow
@pytest.mark.parametrize("activation", Activation)
def test_every_float32(activation: Activation) -> None:
    """All 2**32 of them, against the formula in float64."""
    dtype, size = np.dtype(np.float32), 1 << 21
    function, ulps = FUNCTIONS[activation]
    for start in range(0, 1 << 32, size):
        z = np.arange(start, start + size, dtype=np.uint64).astype(np.uint32).view(dtype)
        exact = function(z.astype(np.float64)).astype(np.float64)
        expected = Expected(Answer(exact, exact, ulps), dtype)
        for way in ways(z, layouts=(False,), as_residual=(False,)):
            got = c_calls.infer(way.x, None, None, c_calls.Behind(activation, SLOPE)).y
            expected.check(got, z, str(way))


ENDS = {
    Activation.RELU6: {0.0: 0.0, np.inf: 6.0, -np.inf: 0.0},
    Activation.SILU: {0.0: 0.0, np.inf: np.inf, -np.inf: np.nan, -1e4: 0.0, 1e4: 1e4},
    Activation.HARDSWISH: {0.0: 0.0, np.inf: np.inf, -np.inf: np.nan, -3.0: 0.0, 3.0: 3.0},
    Activation.SIGMOID: {0.0: 0.5, np.inf: 1.0, -np.inf: 0.0, -1e4: 0.0, 1e4: 1.0},
}


@pytest.mark.parametrize("activation", ENDS)
def test_ends(isa: str, data_dtype: np.dtype[Any], activation: Activation) -> None:
    for z, wanted in ENDS[activation].items():
        got = c_calls.infer(np.full((1, 1, 33), z, data_dtype), None, None, c_calls.Behind(activation)).y
        assert np.array_equal(got, np.full_like(got, wanted), equal_nan=True), f"{got.flat[0]} at {z}"


def test_sigmoid_of_z_and_of_its_opposite(isa: str, data_dtype: np.dtype[Any]) -> None:
    """Their sum is 1, and so neither leaves [0, 1]."""
    z = points(data_dtype)
    z = z[~np.isnan(z)].reshape(1, 1, -1)
    one, other = (c_calls.infer(a, None, None, c_calls.Behind(Activation.SIGMOID)).y for a in (z, -z))
    assert ((one >= 0) & (one <= 1)).all()
    assert (abs(one.astype(LONG) + other.astype(LONG) - 1) <= 2 * ulp(np.ones((), LONG), data_dtype)).all()


FUSED = tuple(isa for isa in cases.isas() if isa != "baseline")


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with a fused multiply-add here")
@pytest.mark.parametrize("activation", Activation)
def test_same_bits_on_every_instruction_set(data_dtype: np.dtype[Any], activation: Activation) -> None:
    """That has a fused multiply-add."""
    z = points(data_dtype)
    z = z[~np.isnan(z)].reshape(1, 1, -1)
    behind, before = c_calls.Behind(activation, SLOPE), bridge.isa()
    found = []
    for isa in FUSED:
        bridge.select_isa(isa)
        done = c_calls.infer(z, None, None, behind)
        dx = c_calls.backward(np.ones_like(z), z, done.saved, behind, frozen=True).dx
        found.append(tuple(np.where(np.isnan(a), 0, a) for a in (done.y, dx)))
    bridge.select_isa(before)
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])


# In place ------------------------------------------------------------------------------------------------------------


def _exact_from_y(
    dy: Array, y: Array, saved: Array, behind: c_calls.Behind, frozen: bool
) -> tuple[Array, Array, Array, Array, Array]:
    """dx, dgamma, dbeta, dz of the definition, and the sum of the magnitudes of dx's terms."""
    _, _, _, inv_std, gamma, beta = (row[np.newaxis, :, np.newaxis].astype(LONG) for row in saved)
    y_, dz = y.astype(LONG), dy.astype(LONG)
    z = y_
    if behind.activation:
        z = np.where(y_ > 0, y_, y_ / LONG(behind.slope))
        dz = np.where(y_ > 0, dz, dz * LONG(behind.slope))
    if behind.residual is not None:
        z = z - behind.residual.astype(LONG)
    xhat = (z - beta) / gamma
    count = y.size // y.shape[1]
    dbeta, dgamma = dz.sum((0, 2), keepdims=True), (dz * xhat).sum((0, 2), keepdims=True)
    scale = gamma * inv_std
    if frozen:
        return scale * dz, dgamma, dbeta, dz, abs(scale * dz)
    means = abs(dz).sum((0, 2), keepdims=True) / count, abs(dz * xhat).sum((0, 2), keepdims=True) / count
    reach = abs(xhat) + (abs(z) + abs(beta)) / abs(gamma)  # what xhat was the difference of
    terms = abs(scale) * (abs(dz) + means[0] + reach * means[1])
    return scale * (dz - dbeta / count - xhat * dgamma / count), dgamma, dbeta, dz, terms


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("activation", "slope"), [(0, 0.0), (3, 0.01), (3, 2.5)], ids=["identity", "leaky", "steep"])
def test_backward_from_y(
    isa: str, data_dtype: np.dtype[Any], activation: int, slope: float, with_residual: bool, frozen: bool
) -> None:
    """It is the definition's gradient at the x that y tells of; gamma may be negative."""
    dtype = c_calls.statistics(data_dtype)
    for shape in ((6, 5, 49), (3, 2, 1000), (64, 19, 1), (400, 3, 1), (2, 1, 40_000)):
        rng = np.random.default_rng([*shape, activation])
        x, dy, residual = (rng.standard_normal(shape).astype(data_dtype) for _ in range(3))
        gamma = (rng.uniform(0.5, 2, shape[1]) * rng.choice([-1, 1], shape[1])).astype(dtype)
        beta = rng.standard_normal(shape[1]).astype(dtype)
        behind = c_calls.Behind(activation, slope, residual if with_residual else None)
        run = c_calls.infer if frozen else c_calls.forward
        done = run(x, gamma, beta, behind)
        got = c_calls.backward(dy, done.y, done.saved, behind, frozen=frozen, from_y=True)
        dx, dgamma, dbeta, dz, terms = _exact_from_y(dy, done.y, done.saved, behind, frozen)
        computed = float(np.finfo(dtype).eps)
        assert (abs(got.dx - dx) <= ulp(dx, data_dtype) + 8 * computed * terms).all(), shape
        for one, exact in ((got.dgamma, dgamma), (got.dbeta, dbeta)):
            reach = 8 * computed * np.sqrt(dz[:, 0].size) * (1 + abs(dz).max())
            assert (abs(one - exact[0, :, 0]) <= reach).all(), shape
        if activation and with_residual:
            assert got.dresidual is not None
            assert (abs(got.dresidual - dz) <= ulp(dz, data_dtype)).all()


@pytest.mark.parametrize("activation", [0, 3], ids=["identity", "leaky"])
def test_backward_from_y_is_near_that_from_x(isa: str, activation: int) -> None:
    """As near as y, rounded to float64, tells of x."""
    shape = (8, 6, 100)
    rng = np.random.default_rng(activation)
    x, dy = (rng.standard_normal(shape) for _ in range(2))
    gamma, beta = rng.uniform(0.5, 2, 6), rng.standard_normal(6)
    behind = c_calls.Behind(activation, 0.1)
    done = c_calls.forward(x, gamma, beta, behind)
    for threads in (1, 3):
        one = c_calls.backward(dy, x, done.saved, behind, threads=threads)
        other = c_calls.backward(dy, done.y, done.saved, behind, from_y=True, threads=threads)
        np.testing.assert_allclose(other.dx, one.dx, rtol=0, atol=1e-13)
        np.testing.assert_allclose(other.dgamma, one.dgamma, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other.dbeta, one.dbeta, rtol=0, atol=1e-12)
