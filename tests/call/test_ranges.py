"""Is every activation right over the whole range of numbers, in value and in slope?"""

from __future__ import annotations

from functools import cache
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)
NAMED = [activation for activation in cases.ACTIVATIONS if activation is not None]


@cache
def every(dtype: str) -> Array:
    """All finite numbers of a half; of others the same number in every binade, zeros and denormals included."""
    if dtype in cases.HALVES:
        bits = np.arange(2**16, dtype=np.uint16)
    elif dtype == "float32":
        bits = (np.arange(2**16, dtype=np.uint32) << 16) + np.arange(2**16, dtype=np.uint32) * 40503 % 2**16
    else:
        bits = np.arange(2**16, dtype=np.uint64) << 48
        bits += np.arange(2**16, dtype=np.uint64) * 2654435761 * 40503 % 2**48
    values = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
    near = np.linspace(-20, 20, 2001).astype(dtype)  # where most of an activation's bend is
    with np.errstate(invalid="ignore"):
        finite = values[np.isfinite(values)]
    return np.concatenate((finite, near, np.array([-3, 0, -0.0, 3, 6], dtype)))


@cache
def exact(dtype: str, activation: Any) -> tuple[Array, Array]:
    """The activation's values and slopes, to what a long double holds."""
    f, a = oracle.curve(activation)
    z = oracle.long(every(dtype))
    return f.value(z, a), f.slope(z, a)


def as_it_is(x: Array, activation: Any) -> tuple[Array, fastbn.Cache]:
    """The activation of x itself: normalized with mean 0, variance 1 and eps 0."""
    statistics = np.zeros(1, cases.statistics_dtype(x.dtype)), np.ones(1, cases.statistics_dtype(x.dtype))
    return fastbn.forward(x[:, np.newaxis], None, None, *statistics, training=False, eps=0, activation=activation)


def assert_near(name: str, x: Array, got: Array, wanted: Array, allowed: Array) -> None:
    error = abs(oracle.long(got) - wanted)
    beyond = abs(wanted) >= oracle.FORMATS[got.dtype.name].largest
    error[np.isinf(got) & beyond] = 0
    off = error / allowed
    worst = int(off.argmax())
    assert off[worst] <= 1, f"{name} at {x[worst]!r}: {off[worst]:.3g} times as far from exact as allowed"


@pytest.mark.parametrize("activation", NAMED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_values(any_backend: cases.Kernel, dtype: str, activation: Any) -> None:
    """Within 2 ulp, or 3 with an exp; halves are computed in float32 and then rounded once.

    The sigmoid that silu multiplies by x may be a denormal number, which has few digits.
    """
    x = every(dtype)
    wanted, _ = exact(dtype, activation)
    y, _ = as_it_is(x, activation)
    arithmetic = oracle.FORMATS[dtype].arithmetic
    f, _ = oracle.curve(activation)
    allowed = max(f.ulps, 1) * oracle.ulp(wanted, arithmetic)
    if activation == "silu":
        allowed = allowed + abs(oracle.long(x)) * oracle.ulp(0, arithmetic)
    if arithmetic != dtype:
        allowed = allowed + oracle.ulp(wanted, dtype) / 2
    assert_near("y", x, y[:, 0], wanted, allowed)


@pytest.mark.parametrize("activation", NAMED, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slopes(any_backend: cases.Kernel, dtype: str, activation: Any) -> None:
    """Within 2 epsilon of the terms that they add up, or 3 with an exp."""
    x = every(dtype)
    _, wanted = exact(dtype, activation)
    f, a = oracle.curve(activation)
    _, made = as_it_is(x, activation)
    dx = fastbn.backward(np.ones((x.size, 1), dtype), made).dx
    arithmetic = oracle.FORMATS[dtype].arithmetic
    terms = np.zeros_like(wanted) if f.terms is None else f.terms(oracle.long(x), a)
    allowed = max(f.ulps, 1) * oracle.ulp(1, arithmetic) * terms + (1 + abs(oracle.long(x))) * oracle.ulp(0, arithmetic)
    if arithmetic != dtype:
        allowed = allowed + oracle.ulp(wanted, dtype) / 2
    assert_near("dx", x, dx[:, 0], wanted, allowed)


KINKS = {
    "relu": {0.0: 0},
    "relu6": {0.0: 0, 6.0: 0},
    "leaky_relu": {0.0: 0.01},
    "hardswish": {-3.0: 0, 3.0: 1},
}


@pytest.mark.parametrize("activation", KINKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_kinks(kernel: cases.Kernel, dtype: str, activation: str, training: bool) -> None:
    """There the slope is torch's; gamma = 0 puts every position on the kink."""
    for kink, slope in KINKS[activation].items():
        c = cases.call((6, 5), dtype)
        statistics = (c.running_mean, c.running_var)
        beta = np.full(5, kink, dtype)
        _, made = fastbn.forward(
            c.x, np.zeros(5, dtype), beta, *statistics, training=training, activation=activation,
            residual=np.zeros_like(c.x),
        )  # fmt: skip
        got = fastbn.backward(c.dy, made)
        np.testing.assert_allclose(got.dresidual, c.dy * np.asarray(slope, dtype), rtol=1e-6, err_msg=str(kink))
        assert not got.dx.any()


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_relu_passes_the_gradient_where_y_is_positive(kernel: cases.Kernel, dtype: str, training: bool) -> None:
    """Exactly there: backward recomputes the very same y."""
    for shape in ((40, 33), (3, 5, 200), (3, 1000, 7)):
        c = cases.call(shape, dtype, offset=1e6)
        c = c._replace(running_mean=c.running_mean + np.asarray(1e6, dtype))
        for activation in ("relu", "relu6", "leaky_relu"):
            y, made = fastbn.forward(
                c.x, c.gamma, c.beta, c.running_mean, c.running_var, training=training, activation=activation,
                residual=c.residual,
            )  # fmt: skip
            dresidual = fastbn.backward(c.dy, made).dresidual
            passed = (y > 0) & (y < 6) if activation == "relu6" else y > 0
            assert np.array_equal(dresidual == c.dy, passed)
            if activation != "leaky_relu":
                assert not dresidual[~passed].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", NAMED, ids=str)
def test_nan_stays_nan(any_backend: cases.Kernel, dtype: str, activation: Any) -> None:
    """And infinities give the limits, where there is one."""
    x = np.array([np.nan, np.inf, -np.inf, 1], dtype)
    y, _ = as_it_is(x, activation)
    assert np.isnan(y[0, 0])
    name = activation[0] if isinstance(activation, tuple) else activation
    assert y[1, 0] == {"relu6": 6, "sigmoid": 1}.get(name, np.inf)
    if name in ("relu", "relu6", "sigmoid"):
        assert y[2, 0] == 0
    elif name == "leaky_relu":
        assert y[2, 0] == -np.inf
    assert np.isfinite(y[3, 0])


SLOPES = {  # at NaN, inf and -inf
    "relu": (1, 1, 0),
    "relu6": (1, 0, 0),
    ("leaky_relu", 0.25): (0.25, 1, 0.25),
    "silu": (np.nan, np.nan, np.nan),
    "hardswish": (np.nan, 1, 0),
    "sigmoid": (np.nan, 0, 0),
}
"""Torch's. At NaN its loops over vectors and what they leave over differ: relu6 has 0 or 1, hardswish NaN or 1. A NaN
that vanishes is no right gradient, so it is relu's 1 for relu6, and NaN for hardswish, whose slope has z in it."""


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("activation", SLOPES, ids=str)
def test_slopes_at_nan_and_infinity(kernel: cases.Kernel, kind: str, activation: Any) -> None:
    """Of x where statistics are frozen, each position by itself, and of the residual."""
    for shape in ((3, 5, 43), (70, 5), (2, 5, 3, 3)):
        x, c = np.zeros(shape, kind), cases.call(shape, kind)
        x.flat[:] = np.resize([np.nan, np.inf, -np.inf, 0.5], x.size)
        slopes = np.resize(np.array([*SLOPES[activation], np.nan]), x.size).reshape(shape)
        dy = np.where(c.dy < 0, -2, 0.5).astype(kind)
        statistics = np.zeros(5, c.gamma.dtype), np.ones(5, c.gamma.dtype)
        frozen = fastbn.forward(x, None, None, *statistics, training=False, eps=0, activation=activation)
        added = [
            fastbn.forward(c.x, c.gamma, c.beta, *statistics, training=training, activation=activation, residual=x)
            for training in (True, False)
        ]
        known = np.resize([True, True, True, False], x.size).reshape(shape)
        dx, *dresiduals = fastbn.backward(dy, frozen.cache).dx, *(fastbn.backward(dy, y.cache).dresidual for y in added)
        for dz in (gradient.astype(np.float64) for gradient in (dx, *dresiduals)):
            np.testing.assert_array_equal(dz[known], (dy.astype(np.float64) * slopes)[known])
            assert np.isfinite(dz[~known]).all()


def test_slopes_of_leaky_relu(kernel: cases.Kernel) -> None:
    """0 is relu, 1 is nothing at all, and any finite number will do."""
    c = cases.call((6, 5, 3), "float64")

    def run(activation: Any) -> tuple[Array, ...]:
        y, made = fastbn.forward(c.x, c.gamma, c.beta, activation=activation)
        return (y, *fastbn.backward(c.dy, made))

    for got, wanted in zip(run(("leaky_relu", 0)), run("relu"), strict=True):
        np.testing.assert_array_equal(got, wanted)
    cases.assert_same_bits(run(("leaky_relu", 1.0)), run(None))
    cases.assert_same_bits(run(("leaky_relu", 0.01)), run("leaky_relu"))
    for slope in (-0.5, 1e-30, 1e30, np.float32(0.25), -3):
        cases.check(c, activation=("leaky_relu", slope))
