"""Are results as exact as the contract says, for any finite input, and does every channel keep to itself?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
LAYOUTS = ("planes", "rows")


def laid_out(values: Array, layout: str) -> Array:
    """(M, C) values as rows, or as planes (2, C, M / 2); M is even."""
    if layout == "rows":
        return values
    count, channels = values.shape
    return np.ascontiguousarray(values.reshape(2, count // 2, channels).transpose(0, 2, 1))


def as_rows(values: Array, layout: str) -> Array:
    """The inverse of `laid_out`."""
    return values if layout == "rows" else values.transpose(0, 2, 1).reshape(-1, values.shape[1])


class Problem(NamedTuple):
    """Input that is hard in some way; data is (M, C)."""

    x: Array
    gamma: Array | None = None
    beta: Array | None = None
    residual: Array | None = None
    activation: str | None = None
    eps: float = 1e-5


M, C = 400, 300
"""Values and channels of the problems below. Many channels, so that many pairs of mean and spread occur."""


def draw(seed: int, *, offset: Any = 0, spread: Any = 1, gamma: Any = 1, beta: Any = 1, **others: Any) -> Problem:
    """Normal x about `offset` (a number, or one per channel), and normal gamma and beta of the given sizes."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((M, C)) * spread + offset).astype(np.float32)
    parameters = ((rng.standard_normal(C) * size).astype(np.float32) for size in (gamma, beta))
    return Problem(x, *parameters, **others)


def spread_out(seed: int, low: float, high: float) -> Array:
    """One number a channel, of either sign and any magnitude from 10**low to 10**high."""
    rng = np.random.default_rng(seed)
    return rng.choice([-1, 1], C) * 10 ** rng.uniform(low, high, C)


def any_parameters() -> Problem:
    return draw(1, gamma=spread_out(1, -8, 8), beta=spread_out(2, -8, 8))


def any_offset() -> Problem:
    return draw(2, offset=spread_out(3, -3, 7))


def any_spread() -> Problem:
    return draw(3, spread=abs(spread_out(4, -6, 6)), offset=spread_out(5, -3, 3))


def no_parameters() -> Problem:
    return draw(4, offset=spread_out(3, -3, 7))._replace(gamma=None, beta=None)


def large_beta() -> Problem:
    return draw(5, gamma=1e-4, beta=1e4)


def y_below_the_binade_of_beta() -> Problem:
    """Beta is rounded to the last place of its binade, which is two of y's."""
    rng = np.random.default_rng(6)
    problem = draw(6, offset=spread_out(7, 0, 6))
    exponents = 2.0 ** rng.integers(-3, 4, C)
    return problem._replace(
        gamma=(exponents * rng.uniform(0.001, 0.1, C)).astype(np.float32),
        beta=(exponents * rng.uniform(1, 1.1, C)).astype(np.float32),
    )


def with_residual() -> Problem:
    return draw(7, offset=1e3)._replace(residual=draw(8).x)


def residual_cancels_beta() -> Problem:
    problem = draw(9, offset=1e3, beta=1e4)
    return problem._replace(residual=(draw(10).x * 1e-3 - problem.beta).astype(np.float32))


def residual_cancels_all() -> Problem:
    """No more of y remains than what all roundings before it left over."""
    problem = draw(11, offset=1e3, gamma=10, beta=100)
    return problem._replace(residual=-oracle.forward(problem.x, problem.gamma, problem.beta).y.astype(np.float32))


def large_residual() -> Problem:
    return draw(12)._replace(residual=draw(13, spread=1e30).x)


def relu() -> Problem:
    return draw(14, offset=spread_out(15, -3, 7), activation="relu")


def relu_of_residual() -> Problem:
    return with_residual()._replace(activation="relu")


def one_outlier_first() -> Problem:
    problem = draw(16)
    problem.x[0] = spread_out(17, 0, 30)
    return problem


def outliers_first_middle_last() -> Problem:
    problem = draw(18)
    problem.x[[0, M // 4, M // 2, -1]] = 1e8
    return problem


def two_values() -> Problem:
    """Far from zero and one spacing apart, each once or nearly always."""
    problem = draw(19)
    low = spread_out(20, -3, 7).astype(np.float32)
    problem.x[...] = low
    for channel in range(C):
        problem.x[: 1 + channel % (M - 1), channel] = np.nextafter(low[channel], np.float32(np.inf))
    return problem._replace(eps=0)


def tiny_spread() -> Problem:
    return draw(21, spread=1e-30, eps=0)


def denormal() -> Problem:
    steps = np.random.default_rng(22).integers(-50, 50, (M, C)).astype(np.float32)
    return draw(22, eps=0)._replace(x=steps * np.finfo(np.float32).smallest_subnormal)


def huge() -> Problem:
    """float32 sums overflow, and so do differences of two values."""
    rng = np.random.default_rng(23)
    signs = np.where(rng.random((M, C)) < np.linspace(0.05, 0.95, C), 1, -1)
    return draw(23, eps=0)._replace(x=(signs * rng.uniform(1e38, 3.4e38, (M, C))).astype(np.float32))


def steep() -> Problem:
    """A slope, gamma / std, that overflows float32, while y does not."""
    return draw(24, spread=1e-10, gamma=1e30, eps=0)


def flat() -> Problem:
    """A slope that is a denormal float32, while y is not."""
    return draw(25, spread=1e6, gamma=1e-34, beta=0)


def float64_parameters() -> Problem:
    problem = draw(26)
    rng = np.random.default_rng(26)
    return problem._replace(gamma=rng.standard_normal(C), beta=rng.standard_normal(C))


def float16_parameters() -> Problem:
    problem = draw(27)
    return problem._replace(gamma=problem.gamma.astype(np.float16), beta=problem.beta.astype(np.float16))


PROBLEMS: tuple[Callable[[], Problem], ...] = (
    any_parameters,
    any_offset,
    any_spread,
    no_parameters,
    large_beta,
    y_below_the_binade_of_beta,
    with_residual,
    residual_cancels_beta,
    residual_cancels_all,
    large_residual,
    relu,
    relu_of_residual,
    one_outlier_first,
    outliers_first_middle_last,
    two_values,
    tiny_spread,
    denormal,
    huge,
    steep,
    flat,
    float64_parameters,
    float16_parameters,
)


class Solved(NamedTuple):
    """An exact y, and the error that the contract allows in it."""

    y: Array
    bound: Array


@cache
def solved(make: Callable[[], Problem]) -> tuple[Problem, Array, Array, dict[str, Solved]]:
    """A problem, float32 statistics near its own, and the answers with either; computed once for all kernels."""
    p = make()
    options: dict[str, Any] = {"eps": p.eps, "residual": p.residual, "activation": p.activation}
    batch = oracle.forward(p.x, p.gamma, p.beta, **options)
    mean = batch.mean.astype(np.float32)
    var = np.minimum(batch.var, np.finfo(np.float32).max).astype(np.float32)
    given = oracle.forward(p.x, p.gamma, p.beta, mean, var, **options)
    answers = {
        name: Solved(exact.y, oracle.bound(exact, p.gamma, activation=p.activation).astype(np.float64))
        for name, exact in (("batch", batch), ("given", given))
    }
    return p, mean, var, answers


@pytest.mark.parametrize("statistics", ["batch", "given"])
@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)
def test_bound(kernel: cases.Kernel, make: Callable[[], Problem], statistics: str) -> None:
    p, mean, var, answers = solved(make)
    exact = answers[statistics]
    for layout in LAYOUTS:
        y, _ = fastbn.forward(
            laid_out(p.x, layout),
            p.gamma,
            p.beta,
            mean.copy(),
            var.copy(),
            training=statistics == "batch",
            eps=p.eps,
            activation=p.activation,
            residual=None if p.residual is None else laid_out(p.residual, layout),
        )
        error = abs(as_rows(y, layout) - exact.y) / exact.bound
        worst = np.nanargmax(np.where(np.isnan(error), np.inf, error))
        assert error.flat[worst] <= 1, (
            f"{float(error.flat[worst]):.3g} times the bound at {divmod(worst, C)} in {layout}"
        )


# A million values per channel, one channel an offset.
OFFSETS = (0, 1e3, 1e6)


@cache
def million() -> tuple[Array, oracle.Normalized, Array]:
    rng = np.random.default_rng(100)
    x = (rng.standard_normal((1_000_000, len(OFFSETS))) + OFFSETS).astype(np.float32)
    exact = oracle.forward(x)
    return x, exact, oracle.bound(exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_million_values_at_any_offset(kernel: cases.Kernel, layout: str) -> None:
    x, exact, bound = million()
    y, _ = fastbn.forward(laid_out(x, layout))
    error = abs(as_rows(y, layout) - exact.y) / bound
    assert float(error.max()) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e12])
def test_float64_at_any_offset(kernel: cases.Kernel, layout: str, offset: float) -> None:
    rng = np.random.default_rng(101)
    x = laid_out(rng.standard_normal((2000, 7)) + offset, layout)
    gamma, beta = rng.standard_normal((2, 7))
    y, _ = fastbn.forward(x, gamma, beta)
    cases.assert_y(y, oracle.forward(x, gamma, beta), gamma)


# Constant channels ---------------------------------------------------------------------------------------------------

CONSTANTS = (0.0, -0.0, 1.0, 0.1, 1 / 3, -1e-3, 1e6 + 0.1, 16777217.0, 1e-40, 1e-45, 3e38, -3e38)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 6, 1000, 10002])
def test_constant_channel_gives_beta(kernel: cases.Kernel, dtype: str, count: int, layout: str, eps: float) -> None:
    constants = np.array(CONSTANTS).astype(dtype)
    x = laid_out(np.tile(constants, (count, 1)), layout)
    rng = np.random.default_rng(0)
    gammas = (None, rng.standard_normal(len(constants)), np.zeros(len(constants)))
    betas = (None, rng.standard_normal(len(constants)), np.full(len(constants), -3e38), np.full(len(constants), 1e-42))
    for gamma in gammas:
        for beta in betas:
            g, b = (None if p is None else p.astype(dtype) for p in (gamma, beta))
            y, _ = fastbn.forward(x, g, b, eps=eps)
            wanted = np.zeros(len(constants), dtype) if b is None else b
            differs = (as_rows(y, layout) != wanted).any(axis=0)
            wrong = [constant for constant, wrong in zip(CONSTANTS, differs, strict=True) if wrong]
            assert not wrong, f"for the constants {wrong}, gamma {gamma}, beta {beta}"


@pytest.mark.parametrize("activation", ["silu", "sigmoid", "relu"])
@pytest.mark.parametrize("shape", [(2, 3, 7), (5, 3), (3, 3, 35)], ids=str)
def test_gradient_of_constant_channels_near_the_largest_float(
    kernel: cases.Kernel, dtype: str, shape: tuple[int, ...], activation: str
) -> None:
    """Where what pads a vector, 0, is far from the mean."""
    x = np.full(shape, np.finfo(dtype).max / 2, dtype)
    y, cache = fastbn.forward(x, beta=np.ones(3, dtype), activation=activation)
    dbeta = fastbn.backward(np.ones_like(x), cache).dbeta
    sigmoid = 1 / (1 + math.exp(-1))
    slope = {"silu": sigmoid * (2 - sigmoid), "sigmoid": sigmoid * (1 - sigmoid), "relu": 1}[activation]
    np.testing.assert_allclose(dbeta, x[:, 0].size * slope, rtol=1e-6)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channel_gives_beta_under_a_steep_gamma(kernel: cases.Kernel, layout: str) -> None:
    """The slope, gamma / sqrt(eps), overflows float32."""
    x = laid_out(np.tile(np.array(CONSTANTS, np.float32), (50, 1)), layout)
    parameters = np.full((2, len(CONSTANTS)), 3e38, np.float32)
    assert (fastbn.forward(x, *parameters).y == parameters[1, 0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channel_with_residual_gives_their_sum(kernel: cases.Kernel, dtype: str, layout: str) -> None:
    constants = np.array(CONSTANTS).astype(dtype)
    rng = np.random.default_rng(1)
    x = laid_out(np.tile(constants, (50, 1)), layout)
    residual = laid_out(rng.standard_normal((50, len(constants))).astype(dtype), layout)
    beta = rng.standard_normal(len(constants)).astype(dtype)
    y, _ = fastbn.forward(x, None, beta, eps=0, residual=residual)
    shape = (1, -1) if layout == "rows" else (1, -1, 1)
    assert np.array_equal(y, residual + beta.reshape(shape))


# Channels that are not finite ----------------------------------------------------------------------------------------

POISONS = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}
SHAPES = ((40, 19), (4, 19, 30), (3, 5, 1000), (1500, 33), (4, 9000), (1, 3, 140001))


def everything(c: cases.Call, *, training: bool, activation: str | None) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Every array that has x's shape, and every one that has a value per channel, from forward and backward."""
    mean, var = c.running_mean.copy(), c.running_var.copy()
    y, cache = fastbn.forward(
        c.x, c.gamma, c.beta, mean, var, training=training, activation=activation, residual=c.residual
    )
    dx, dgamma, dbeta = got = fastbn.backward(c.dy, cache)
    assert dgamma is not None
    assert dbeta is not None
    assert got.dresidual is not None
    return (y, dx, got.dresidual), (mean, var, dgamma, dbeta, cache.mean, cache.var, cache.inv_std)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_poison_stays_in_its_channel(kernel: cases.Kernel, dtype: str, shape: tuple[int, ...], training: bool) -> None:
    clean = cases.call(shape, dtype)
    channels = shape[1]
    for activation in (None, "relu"):
        wanted = everything(clean, training=training, activation=activation)
        for number, (field, poison) in enumerate(product(("x", "dy", "residual", "gamma", "beta"), POISONS)):
            channel = (0, channels // 2, channels - 1)[number % 3]
            if clean.x.size > 100_000 and (number % 3 or activation):
                continue
            spoilt = clean._replace(**{field: getattr(clean, field).copy()})
            array = getattr(spoilt, field)
            if array.ndim == 1:
                array[channel] = POISONS[poison]
            else:
                array[(number % shape[0], channel, *(-1,) * (array.ndim - 2))] = POISONS[poison]
            got = everything(spoilt, training=training, activation=activation)
            where = f"{poison} in {field}, channel {channel} of {shape}, {activation}"
            for a, b in zip(got[0], wanted[0], strict=True):
                cases.assert_same_bits(np.delete(a, channel, axis=1), np.delete(b, channel, axis=1), where)
            for a, b in zip(got[1], wanted[1], strict=True):
                cases.assert_same_bits(np.delete(a, channel), np.delete(b, channel), where)


@pytest.mark.parametrize("poison", POISONS)
def test_poison_in_x_makes_its_channel_nan(kernel: cases.Kernel, dtype: str, poison: str) -> None:
    """Whatever the position, the activation included: a NaN is not rectified away."""
    for shape in ((9, 5), (2, 5, 9)):
        for position in range(9):
            c = cases.call(shape, dtype)
            c.x[(position, 2) if len(shape) == 2 else (1, 2, position)] = POISONS[poison]
            for activation in (None, "relu"):
                y, cache = fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var, activation=activation)
                assert np.isnan(y[:, 2]).all()
                assert np.isnan(cache.var[2])
                assert not np.isfinite(c.running_mean[2])
                assert np.isnan(c.running_var[2])
                dx, dgamma, _ = fastbn.backward(c.dy, cache)
                assert np.isnan(dx[:, 2]).all()
                assert np.isnan(dgamma[2])


def test_poison_with_given_statistics_stays_at_its_position(kernel: cases.Kernel, dtype: str) -> None:
    for shape in ((40, 19), (4, 19, 30)):
        c = cases.call(shape, dtype)
        wanted = fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, residual=c.residual)
        c.x.flat[::7] = np.nan
        y = fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, residual=c.residual)
        assert np.array_equal(y, np.where(np.isnan(c.x), np.nan, wanted), equal_nan=True)


@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
def test_poison_stays_in_its_channel_whatever_follows(kernel: cases.Kernel, kind: str, activation: Any) -> None:
    """After every activation, for every dtype; and under a mask that leaves the poison out, where only y has it."""
    for shape in ((40, 19), (4, 19, 30)):
        c = cases.call(shape, kind)
        wanted = everything(c, training=True, activation=activation)
        spoilt = c._replace(x=c.x.copy())
        spoilt.x[(1, 7, *(3,) * (len(shape) - 2))] = np.nan
        got = everything(spoilt, training=True, activation=activation)
        for a, b in zip(got[0], wanted[0], strict=True):
            cases.assert_same_bits(np.delete(a, 7, axis=1), np.delete(b, 7, axis=1))
        for a, b in zip(got[1], wanted[1], strict=True):
            cases.assert_same_bits(np.delete(a, 7), np.delete(b, 7))
        assert np.isnan(got[0][0][:, 7]).all()
        y, cache = fastbn.forward(spoilt.x, c.gamma, mask=~np.isnan(spoilt.x[:, 7]), activation=activation)
        assert np.array_equal(np.isnan(y), np.isnan(spoilt.x))
        assert np.isfinite(cache.var).all()


@pytest.mark.parametrize("half", cases.HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_halves_give_beta(kernel: cases.Kernel, half: str, layout: str) -> None:
    constants = np.array([0.0, -0.0, 1.0, 0.1, 1 / 3, 60000.0, -60000.0, 6e-8, 1e-38]).astype(half)
    rng = np.random.default_rng(0)
    beta = rng.standard_normal(len(constants)).astype(np.float32)
    for count in (2, 6, 10002):
        x = laid_out(np.tile(constants, (count, 1)), layout)
        for eps in (0.0, 1e-5):
            y = as_rows(fastbn.forward(x, 1e30 * beta if half == "bfloat16" else beta, beta, eps=eps).y, layout)
            assert (y == beta.astype(half)).all()


@cache
def solved_with(make: Callable[[], Problem], activation: str) -> tuple[Problem, Solved]:
    """Every fifth channel of a problem with that activation."""
    p = make()
    some = {
        name: None if array is None else array[..., ::5].copy() for name, array in p._asdict().items() if name in ARRAYS
    }
    p = p._replace(**some)
    exact = oracle.forward(p.x, p.gamma, p.beta, eps=p.eps, activation=activation, residual=p.residual)
    return p, Solved(exact.y, oracle.bound(exact, p.gamma, activation=activation).astype(np.float64))


ARRAYS = ("x", "gamma", "beta", "residual")
HARD = (any_offset, with_residual, residual_cancels_all, large_beta, huge, denormal, float64_parameters)


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu", "silu", "hardswish", "sigmoid"])
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_bound_with_activations(kernel: cases.Kernel, make: Callable[[], Problem], activation: str) -> None:
    p, exact = solved_with(make, activation)
    y, _ = fastbn.forward(p.x, p.gamma, p.beta, eps=p.eps, activation=activation, residual=p.residual)
    error = abs(y - exact.y) / exact.bound
    assert error.max() <= 1, f"{float(error.max()):.3g} times the bound"


# Statistics of other values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", *cases.HALVES])
def test_x_far_from_the_mean(dtype: str, layout: str, activation: str | None, kernel: cases.Kernel) -> None:
    """By any number of standard deviations: x - mean, and xhat, may overflow float32 where y, as for gamma 0, does not.

    And nothing is NaN.
    """
    if kernel.backend == "numba" and dtype in cases.HALVES:
        pytest.skip("the Numba backend has no halves")
    largest = float(oracle.FORMATS[dtype].largest) * (1 - 2.0**-8)
    values = np.array([largest, -largest, largest / 3, -largest / 2, 1, -1e-3, 0, 5]).astype(dtype)
    means, variances = (0, 1, 3e38, -3e38, 1e36, -3e31), (0, 1e-45, 1e-38, 1e-20, 1, 3e38)
    mean, var, gamma, beta = np.array(
        list(product(means, variances, (0, 1, -1e-10, 1e-30, 1e-45, 3e38), (0, -3, 3e38))), np.float32
    ).T
    x = laid_out(np.repeat(values[:, np.newaxis], mean.size, axis=1), layout)
    dy = np.random.default_rng(0).standard_normal(x.shape).astype(dtype)
    for eps in (0.0, 1e-60, 1e-5):
        cases.check(cases.Call(x, dy, dy, gamma, beta, mean, var), training=False, eps=eps, activation=activation)


def test_gamma_times_xhat_overflows_where_y_does_not(kernel: cases.Kernel) -> None:
    x, zero = np.linspace(2.5e38, 3.3e38, 105, dtype="f4").reshape(1, 3, 35), np.zeros(3, "f4")
    for beta, residual in ((zero - np.float32(3e38), None), (zero, np.full_like(x, -3e38))):
        given: Any = (zero + 1.5, beta, zero, zero + 1)
        y = fastbn.infer(x, *given, eps=0, residual=residual)
        cases.assert_y(y, oracle.forward(x, *given, eps=0, residual=residual), given[0])
        assert (fastbn.infer(x * np.float32(np.inf), *given, eps=0, residual=residual) == np.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_where_neither_spread_nor_gain_is_usual(layout: str, kernel: cases.Kernel) -> None:
    """The factors of x - mean and of dz may be far beyond float32, or below, where y and dx are not. So may dz be."""
    spreads, gammas, sizes = np.array(
        list(
            product(
                (-146, -140, -124, -100, -81, -61, -14, 0, 20, 61, 100, 125),
                (-146, -130, -100, -81, -40, -5, 0, 14, 61, 100, 120),
                (-146, -139, -126, -100, -60, 0, 60, 100, 110),
            )
        )
    ).T
    fits = gammas - spreads + sizes < 122  # dx does
    rng = np.random.default_rng(0)
    x, dy = rng.uniform(1, 2, (2, 32, int(fits.sum()))) * rng.choice([-1, 1], (2, 32, 1))
    x, dy = np.ldexp(x, spreads[fits]).astype("f4"), np.ldexp(dy, sizes[fits]).astype("f4")
    gamma, nothing = np.ldexp(1.0, gammas[fits]).astype("f4"), np.zeros(x.shape[1], "f4")
    arrays = [laid_out(array, layout) for array in (x, dy)]
    cases.check(cases.Call(*arrays, arrays[1], gamma, nothing, nothing, nothing + 1), eps=0.0)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_where_neither_spread_nor_gain_is_usual(
    layout: str, training: bool, activation: str | None, kernel: cases.Kernel
) -> None:
    """The gain and its product with 1 / std may be beyond float64 where y and dx are not."""
    spreads, gammas, sizes = np.array(
        list(
            product(
                (-490, -400, -100, -3, 0, 100, 330, 490),
                (-1010, -900, -600, -330, 0, 100, 330, 700, 1010),
                (-600, -400, -100, 0, 100, 400, 600),
            )
        )
    ).T
    fits = (gammas - spreads + sizes < 1012) & (abs(spreads + sizes) < 980)  # dx and the sums do
    rng = np.random.default_rng(0)
    x, dy = rng.uniform(1, 2, (2, 32, int(fits.sum()))) * rng.choice([-1, 1], (2, 32, 1))
    x, dy = np.ldexp(x, spreads[fits]), np.ldexp(dy, sizes[fits])
    gamma, nothing = np.ldexp(1.0, gammas[fits]), np.zeros(x.shape[1])
    arrays = [laid_out(array, layout) for array in (x, dy)]
    c = cases.Call(*arrays, arrays[1], gamma, nothing, nothing, np.ldexp(1.5, 2 * spreads[fits]))
    cases.check(c, training=training, activation=activation, eps=0.0)


@pytest.mark.parametrize(
    ("x", "var", "gamma"), [(1e200, 1e-300, 1e-300), (1e250, 1e-200, 1e-250), (1e300, 1e-190, 1e-200)]
)
def test_float64_far_from_the_mean(x: float, var: float, gamma: float, kernel: cases.Kernel) -> None:
    """(x - mean) / std is beyond the range, and y is not."""
    y = fastbn.infer(np.full((2, 1), x), np.array([gamma]), np.zeros(1), np.zeros(1), np.array([var]), eps=0)
    wanted = oracle.long(x) * oracle.long(gamma) / np.sqrt(oracle.long(var))
    assert (abs(oracle.long(y) - wanted) <= 4 * oracle.ulp(wanted, "float64")).all()


@pytest.mark.parametrize(
    ("spread", "gamma", "size"), [(1e90, 1e170, 1e-235), (1e90, 1e90, 1e-230), (1e-85, 1e-85, 1e224)]
)
def test_float64_gradients_whose_factors_are_not_usual(
    spread: float, gamma: float, size: float, kernel: cases.Kernel
) -> None:
    x, dy = np.random.default_rng(0).standard_normal((2, 6, 1)) * np.array([[[spread]], [[size]]])
    nothing = np.zeros(1)
    cases.check(cases.Call(x, dy, dy, np.array([gamma]), nothing, nothing, nothing + 1), eps=0.0)


@pytest.mark.parametrize("gamma", [1e80, 1e100, 1e292, 1.9e299])
def test_gamma_beyond_float32(gamma: float, kernel: cases.Kernel) -> None:
    """Then y is infinite or 0, and never NaN."""
    x = np.array([[2.3283585e-15], [1.7280453e-16]], "f4")
    y, cache = fastbn.forward(x, np.array([gamma]), np.zeros(1), eps=0, activation="relu")
    assert y.ravel().tolist() == [np.inf, 0]
    _, dgamma, dbeta = fastbn.backward(np.ones_like(x), cache)
    for total in (dgamma, dbeta):
        assert total is not None
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_large_gradients_with_tiny_sums(kernel: cases.Kernel) -> None:
    """Sums in which large values of dy cancel do not tell how large dy is; and dy may be a subnormal number."""
    x, zero, one = np.array([[1], [-1], [1], [-1], [0], [0]], "f4"), np.zeros(1, "f4"), np.ones(1, "f4")
    for dy in ([1e30, 1e-30, -1e30, 1e-30, 0, 0], [2**20, 1e-45, -(2**20), 1e-45, 0, 0], [0, 0, 0, 0, 1e-38, -1e-38]):
        for spread in (0, -62, 62):
            given = np.ldexp(x, spread), np.array(dy, "f4")[:, np.newaxis]
            cases.check(cases.Call(*given, given[1], np.ldexp(one, max(spread, 0)), zero, zero, one), eps=0.0)


def test_gradients_that_cancel_under_a_gain_beyond_the_range(kernel: cases.Kernel) -> None:
    """Their sum is 0, and x hardly varies beside eps, so that the sum of products is tiny."""
    x, dy = np.array([[1.0], [2.0]]), np.array([[1.0], [-1.0]])
    zero, one = np.zeros(1, "f4"), np.ones(1, "f4")
    for spread, gain, size in product((-133, -110), (104, 108, 118), (-104, -116)):
        given = np.ldexp(x, spread).astype("f4"), np.ldexp(dy, size).astype("f4")
        cases.check(cases.Call(*given, given[1], np.ldexp(one, gain), zero, zero, one), eps=1e-20)


def test_tiny_gradients_where_a_mask_leaves_out(kernel: cases.Kernel) -> None:
    """The others' gradients do not cost them their digits, whatever the gain is."""
    rng = np.random.default_rng(0)
    mask, zero = np.arange(64) < 50, np.zeros(1, "f4")
    x, dy = rng.standard_normal((2, 64, 1)).astype("f4")
    for spread, size in product((-100, -70, -62, 0, 62), (-120, -100, 0)):
        given = np.ldexp(x, spread), np.where(mask[:, np.newaxis], dy, np.ldexp(dy, size))
        y, cache = fastbn.forward(given[0], zero + 1, zero, eps=0.0, mask=mask)
        at = oracle.forward(given[0], zero + 1, zero, eps=0.0, mask=mask)
        dx = fastbn.backward(given[1], cache).dx
        exact, terms, _ = oracle.backward(given[1], at, zero + 1, mask=mask)
        off = abs(oracle.long(dx) - exact.dx) / oracle.ulp(terms.dx)
        assert off.max() <= 4, f"2^{spread}, 2^{size}: {float(off.max()):.3g} ulp of the terms"
        cases.assert_y(y, at, zero + 1)
