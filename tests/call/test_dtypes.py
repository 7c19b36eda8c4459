"""Are float16 and bfloat16 read and rounded exactly, and computed with as float32 is? On every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")
if not cases.isas():
    pytest.skip("the C backend is not usable here", allow_module_level=True)

import c_calls  # noqa: E402 - it needs the C backend

from fastbn._backends.c import bridge  # noqa: E402
from fastbn.call.record import Call  # noqa: E402

Array = np.ndarray[Any, Any]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PLAIN = c_calls.Behind()
SHAPES = ((1, 1, 65536), (65536, 1, 1), (1, 65536, 1), (4096, 16, 1), (64, 16, 64), (1, 2, 32768))
RAGGED = ((5, 3, 49), (70, 19, 1), (2, 5, 3), (1, 1, 1003), (3, 40, 1), (9, 1, 1), (2, 7, 333))


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return HALVES[request.param]


@pytest.fixture(params=cases.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = bridge.isa()
    bridge.select_isa(request.param)
    yield request.param
    bridge.select_isa(before)


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """NumPy warns of casts that overflow and of signalling NaN, which are meant here."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def patterns(half: np.dtype[Any]) -> Array:
    return np.arange(65536, dtype=np.uint16).view(half)


def assert_same(got: Array, wanted: Array, where: str = "") -> None:
    """In every bit, but for which NaN a NaN is; it is a quiet one."""
    one, other = got.view(np.uint16), wanted.view(np.uint16)
    nan = np.isnan(wanted)
    different = np.flatnonzero(~nan & (one != other))
    assert not different.size, f"{got.flat[different[0]]} for {wanted.flat[different[0]]} {where}"
    assert np.isnan(got[nan]).all(), where
    quiet = 0x200 if got.dtype == np.float16 else 0x40
    assert (one[nan] & quiet).all(), f"a signalling NaN {where}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pattern_survives(isa: str, half: np.dtype[Any], shape: tuple[int, int, int]) -> None:
    """Through the identity; -0 becomes 0, as it does when 0 is added."""
    x = patterns(half).reshape(shape)
    wanted = x.copy()
    wanted.view(np.uint16)[x.view(np.uint16) == 0x8000] = 0
    assert_same(c_calls.infer(x, None, None, PLAIN).y, wanted)


def test_every_pattern_is_summed(isa: str, half: np.dtype[Any]) -> None:
    """One channel each: the mean of a value and itself is that value, and its variance is 0."""
    x = np.stack([patterns(half)] * 2)[:, :, np.newaxis]
    done = c_calls.forward(x, None, None, PLAIN)
    exact = x[0, :, 0].astype(np.float64)
    finite = np.isfinite(exact)
    assert (done.saved[0, finite] == exact[finite]).all()
    assert (done.saved[2, finite] == 0).all()
    assert np.isnan(done.y[:, ~finite]).all()
    assert (done.y[:, finite] == 0).all()


# Slopes whose products with a half fall between halves, on ties between them, among subnormals and beyond the largest.
SLOPES = (1 / 3, 1 + 2**-11, 1.5, 1.25, 3.0, 1 - 2**-12, 2**-10 * 1.5, 2**-14 / 3, 2.0**14, 65520 / 65504, 1e-30, 1e30)


@pytest.mark.parametrize("slope", SLOPES)
def test_rounding(isa: str, half: np.dtype[Any], slope: float) -> None:
    """To nearest, ties to even: as NumPy and ml_dtypes round the same products in float32."""
    x, gamma = patterns(half).reshape(1, 1, -1), np.array([slope], np.float32)
    product = x.astype(np.float32) * gamma + np.float32(0)
    assert_same(c_calls.infer(x, gamma, None, PLAIN).y, product.astype(half))


def test_ties(isa: str, half: np.dtype[Any]) -> None:
    """Half way between each number and the next, and a little to either side."""
    low = patterns(half)[: 0x7C00 if half == np.float16 else 0x7F80].astype(np.float32)
    middle = low[:-1] / 2 + low[1:] / 2
    values = np.concatenate([np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)] + [middle])
    values = np.concatenate([values, -values])
    zeros = np.zeros((1, values.size, 1), half)
    assert_same(c_calls.infer(zeros, None, values, PLAIN).y, values.astype(half).reshape(zeros.shape))


@pytest.mark.parametrize("activation", range(7))
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_computed_as_float32(isa: str, half: np.dtype[Any], activation: int, with_residual: bool) -> None:
    """The same statistics and parameter gradients bit for bit; y, dx and dresidual rounded once more."""
    for shape in RAGGED:
        rng = np.random.default_rng([*shape, activation])
        x, dy, residual = (rng.standard_normal(shape).astype(half) for _ in range(3))
        gamma, beta = (rng.standard_normal(shape[1]).astype(np.float32) for _ in range(2))
        behind = c_calls.Behind(activation, 0.3, residual if with_residual else None)
        wide = behind._replace(residual=residual.astype(np.float32) if with_residual else None)
        for run in (c_calls.forward, c_calls.infer):
            frozen = run is c_calls.infer
            got, wanted = run(x, gamma, beta, behind), run(x.astype(np.float32), gamma, beta, wide)
            where = f"for {shape}, {'frozen' if frozen else 'training'}"
            cases.assert_same_bits(tuple(got)[1:], tuple(wanted)[1:], where)
            assert_same(got.y, wanted.y.astype(half), where)
            back = c_calls.backward(dy, x, got.saved, behind, frozen=frozen)
            exact = c_calls.backward(dy.astype(np.float32), x.astype(np.float32), got.saved, wide, frozen=frozen)
            cases.assert_same_bits((back.dgamma, back.dbeta), (exact.dgamma, exact.dbeta), where)
            assert_same(back.dx, exact.dx.astype(half), where)
            if back.dresidual is not None and exact.dresidual is not None:
                assert_same(back.dresidual, exact.dresidual.astype(half), where)


def test_tails_touch_nothing_else(isa: str, half: np.dtype[Any]) -> None:
    """Every length and address: what lies around an array is neither read nor written."""
    for length in range(1, 40):
        for start in range(1, 18):
            room = np.full(80, np.nan, half)
            x = room[start : start + length]
            x[...] = np.arange(1, length + 1)
            outside = np.full(80, 7, half)
            y = outside[start : start + length].reshape(1, 1, length)
            mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
            bridge.infer(Call(x=x.reshape(1, 1, length), running_mean=mean, running_var=var, y=y))
            assert (y == x).all()
            assert (outside[:start] == 7).all()
            assert (outside[start + length :] == 7).all()


def test_any_number_of_threads(isa: str, half: np.dtype[Any]) -> None:
    for shape in ((2, 3, 50_001), (8, 24, 4096), (40_001, 10, 1)):
        rng = np.random.default_rng(shape)
        x, dy = (rng.standard_normal(shape).astype(half) for _ in range(2))
        behind = c_calls.Behind(4)
        one = c_calls.forward(x, None, None, behind)
        more = c_calls.forward(x, None, None, behind, threads=3)
        cases.assert_same_bits(tuple(one), tuple(more))
        cases.assert_same_bits(
            tuple(c_calls.backward(dy, x, one.saved, behind)),
            tuple(c_calls.backward(dy, x, one.saved, behind, threads=3)),
        )


def test_dtypes_are_named() -> None:
    assert frozenset(cases.DTYPES) | HALVES.keys() == bridge.DTYPES


def test_no_other_dtype() -> None:
    """The front desk never passes one; the bridge says so rather than read it as another."""
    x = np.zeros((1, 2, 3), np.int16)
    with pytest.raises(TypeError, match="int16"):
        c_calls.infer(x, None, None, PLAIN)
