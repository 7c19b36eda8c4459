"""Are float16 and bfloat16 read exactly, rounded to nearest even, and kept in float32 or wider in between?"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]


@pytest.fixture(params=cases.HALVES)
def half(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def every(half: str) -> Array:
    """All numbers of a half, infinities and NaNs included."""
    return np.arange(2**16, dtype=np.uint16).view(half)


STANDARD = np.zeros(1, np.float32), np.ones(1, np.float32)


def assert_equal(got: Array, wanted: Array) -> None:
    """In every bit, but the sign and payload of a NaN and the sign of zero."""
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        wrong = ~((got == wanted) | (np.isnan(got) & np.isnan(wanted)))
    assert not wrong.any(), f"{got[wrong][:5]} instead of {wanted[wrong][:5]}"


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_every_number_is_read_and_written_as_it_is(kernel: cases.Kernel, half: str, layout: str) -> None:
    x = every(half)
    x = x[:, np.newaxis] if layout == "rows" else x.reshape(1, 1, -1)
    assert_equal(fastbn.infer(x, None, None, *STANDARD, eps=0), x)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_every_gradient_is_passed_on_as_it_is(kernel: cases.Kernel, half: str, layout: str) -> None:
    """Where relu passes it: a NaN remains one, whatever its payload."""
    dy = every(half)
    dy = dy[:, np.newaxis] if layout == "rows" else dy.reshape(1, 1, -1)
    one = np.ones_like(dy)
    _, cache = fastbn.forward(one, None, None, *STANDARD, training=False, activation="relu", residual=one, eps=0)
    with np.errstate(invalid="ignore"):
        got = fastbn.backward(dy, cache)
    assert_equal(got.dresidual, dy)
    assert_equal(got.dx, dy)


# Their products with any half are exact in float32, so that all that is rounded is the result.
FACTORS = (1 + 2**-4, 1 + 2**-9, 1 - 2**-10, 3 * 2**-3, 2**-9, 3 * 2**-16, 5 * 2**-24, 2.0**10, 1 / 3)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_results_are_rounded_to_nearest_even(kernel: cases.Kernel, half: str, layout: str) -> None:
    """For every number: ties, denormals, and what overflows."""
    factors = np.array(FACTORS, np.float16).astype(np.float32)
    x = np.tile(every(half)[:, np.newaxis], len(factors))
    with np.errstate(all="ignore"):
        wanted = (x.astype(np.float32) * factors).astype(half)
    statistics = np.zeros(len(factors), np.float32), np.ones(len(factors), np.float32)
    if layout == "rows":
        assert_equal(fastbn.infer(x, factors, None, *statistics, eps=0), wanted)
    else:
        y = fastbn.infer(np.ascontiguousarray(x.T)[np.newaxis], factors, None, *statistics, eps=0)
        assert_equal(y[0].T, wanted)


@cache
def activated(half: str, activation: Any) -> tuple[Array, oracle.Normalized]:
    """Every finite number, a row each, and the exact activation of it."""
    x = every(half)
    x = x[np.isfinite(x.astype(np.float32))][:, np.newaxis]
    return x, oracle.forward(x, None, None, *STANDARD, eps=0, activation=activation)


@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
def test_every_number_through_every_activation(kernel: cases.Kernel, half: str, activation: Any) -> None:
    """And NaN stays one; test_activations.py has infinities and slopes."""
    x, exact = activated(half, activation)
    y = fastbn.infer(x, None, None, *STANDARD, eps=0, activation=activation)
    cases.assert_y(y, exact, activation=activation)
    nan = np.full((19, 1), np.nan, half)
    assert np.isnan(fastbn.infer(nan, None, None, *STANDARD, eps=0, activation=activation)).all()


def test_sums_are_wider(kernel: cases.Kernel, half: str) -> None:
    """Of 60,000 values, which would stop growing in the half itself, and overflow float16."""
    for shape in ((60_000, 2), (1, 2, 60_000)):
        c = cases.call(shape, half, offset=1000, spread=3)
        y, cache = fastbn.forward(c.x, c.gamma, c.beta)
        wide = c.x.astype(np.float64).reshape(60_000, 2) if len(shape) == 2 else c.x[0].astype(np.float64).T
        np.testing.assert_allclose(cache.mean, wide.mean(axis=0), rtol=1e-7)
        np.testing.assert_allclose(cache.var, wide.var(axis=0), rtol=1e-6)
        dbeta = fastbn.backward(np.ones_like(c.x), cache).dbeta
        np.testing.assert_array_equal(dbeta, 60_000)
        assert np.isfinite(y).all()


def test_the_ends_of_the_range(kernel: cases.Kernel, half: str) -> None:
    """The largest numbers, whose squares overflow float32 for bfloat16, and the smallest."""
    largest = float(np.nextafter(every(half)[0x7C00 if half == "float16" else 0x7F80], np.array(0, half)))
    rng = np.random.default_rng(0)
    for shape in ((50, 7), (2, 7, 30)):
        for values in (
            rng.choice([-1, 1], shape) * largest * rng.uniform(0.5, 1, shape),
            rng.integers(-20, 20, shape) * float(every(half)[1]),
        ):
            c = cases.call(shape, half)._replace(x=values.astype(half))
            cases.check(c, eps=0 if largest > 1e30 else 1e-5, where=f"for {shape}")


def test_statistics_are_float32(any_backend: cases.Kernel, half: str) -> None:
    c = cases.call((6, 5, 3), half)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var, residual=c.residual)
    dx, dgamma, dbeta = got = fastbn.backward(c.dy, cache)
    for array in (y, dx, got.dresidual):
        assert array.dtype == np.dtype(half)
    for array in (dgamma, dbeta, cache.mean, cache.var, cache.inv_std, c.running_mean, c.running_var):
        assert array.dtype == np.float32
    moments = fastbn.moments(c.x)
    for array in (moments.mean, moments.m2, moments.var()):
        assert array.dtype == np.float32
    mean, var = np.zeros(5, half), np.ones(5, half)
    fastbn.forward(c.x, None, None, mean, var)
    assert mean.any()
    assert mean.dtype == var.dtype == np.dtype(half)


def test_layer(any_backend: cases.Kernel, half: str) -> None:
    """Weight and bias have the statistics dtype, as in mixed-precision training."""
    c = cases.call((6, 5, 3), half)
    bn = fastbn.BatchNorm(5, dtype=half, activation="silu")
    cases.assert_same_bits(bn(c.x), fastbn.forward(c.x, np.ones(5, np.float32), activation="silu").y)
    assert bn.backward(c.dy).dtype == np.dtype(half)
    assert bn.running_mean.dtype == bn.gradients()["weight"].dtype == np.float32
    again = fastbn.BatchNorm(5, dtype=half)
    again.load_state_dict(bn.state_dict())
    cases.assert_same_bits(again.running_var, bn.running_var)
    with pytest.raises(TypeError, match=r"x.*float32"):
        bn(c.x.astype(np.float32))


def test_they_do_not_mix(half: str) -> None:
    c = cases.call((6, 5, 3), half)
    other = c.residual.astype(np.float32)
    with pytest.raises(TypeError, match="residual"):
        fastbn.forward(c.x, residual=other)
    with pytest.raises(TypeError, match="dy"):
        fastbn.backward(other, fastbn.forward(c.x).cache)
    with pytest.raises(TypeError, match="out"):
        fastbn.forward(c.x, out=other)


MISSING = """
import sys
sys.modules["ml_dtypes"] = None
import numpy as np, fastbn
fastbn.forward(np.ones((4, 3), np.float16))
for call in (lambda: fastbn.BatchNorm(3, dtype="bfloat16"),):
    try:
        call()
    except ImportError as error:
        assert "ml_dtypes" in str(error) and "pip install" in str(error), error
    else:
        raise AssertionError("no error")
print("done")
"""


def test_without_ml_dtypes(tmp_path: Path) -> None:
    """float16 is NumPy's own; who asks for bfloat16 is told what to install."""
    done = cases.run_python(MISSING, tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("shape", [(127, 3), (3, 67, 7, 7), (13, 33), (2, 5, 1001), (2, 300, 28), (601, 50)], ids=str)
def test_shapes(kernel: cases.Kernel, half: str, shape: tuple[int, ...], training: bool) -> None:
    activation = (None, "relu", "silu")[sum(shape) % 3]
    cases.check(cases.call(shape, half), activation=activation, residual=True, training=training)


def test_ragged(kernel: cases.Kernel, half: str) -> None:
    """Up to two vectors and one element."""
    for size in range(1, 34):
        for shape in ((2, 3, size), (7, size)):
            cases.check(cases.call(shape, half), activation="relu", where=f"for {shape}")


def test_offset(any_backend: cases.Kernel, half: str) -> None:
    """As far as a half can tell values apart at all."""
    for offset in (100, -1000):
        c = cases.call((200, 7), half, offset=offset, spread=abs(offset) / 20)
        exact = oracle.forward(c.x, c.gamma, c.beta)
        cases.assert_y(fastbn.forward(c.x, c.gamma, c.beta).y, exact, c.gamma)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001, 0xFFFF8000])
@pytest.mark.parametrize("shape", [(40, 5), (3, 5, 9), (2, 5, 700)], ids=str)
def test_any_nan_among_parameters(kernel: cases.Kernel, half: str, shape: tuple[int, ...], bits: int) -> None:
    """Its last bits, which a half has no room for, do not turn it into a number, nor touch another channel."""
    c = cases.call(shape, half)
    for place in range(4):
        parameters = [a.copy() for a in (c.gamma, c.beta, c.running_mean, c.running_var) if a is not None]
        wanted = fastbn.infer(c.x, *parameters)
        parameters[place].view(np.uint32)[1] = bits
        y, made = fastbn.forward(c.x, *(a.copy() for a in parameters), training=False, residual=c.residual)
        y, dx = (a.astype(np.float32) for a in (fastbn.infer(c.x, *parameters), fastbn.backward(c.dy, made).dx))
        assert np.isnan(y[:, 1]).all()
        assert place in (1, 2) or np.isnan(dx[:, 1]).all()
        others = [0, 2, 3, 4]
        cases.assert_same_bits(y[:, others], wanted.astype(np.float32)[:, others])
        assert not np.isnan(dx[:, others]).any()
