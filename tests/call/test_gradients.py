"""Is `backward` the gradient of `forward` as it was called?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
SHAPES = ((7, 5), (40, 33), (3, 5, 9), (2, 3, 4, 17))
HOW = pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])


@HOW
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
def test_against_the_oracle(kernel: cases.Kernel, dtype: str, activation: Any, residual: bool, training: bool) -> None:
    either = ((True, True), (True, False), (False, True), (False, False))
    for shape, (has_gamma, has_beta) in product(SHAPES, either if activation in (None, "relu") else either[:1]):
        c = cases.call(shape, dtype)
        c = c._replace(gamma=c.gamma if has_gamma else None, beta=c.beta if has_beta else None)
        where = f"for {shape}, gamma {has_gamma}, beta {has_beta}"
        cases.check(c, activation=activation, residual=residual, training=training, where=where)


@HOW
def test_against_the_oracle_at_an_offset(kernel: cases.Kernel, dtype: str, training: bool) -> None:
    """The statistics that are given lie at the offset, too."""
    for shape, offset in product(SHAPES, (1e3, 1e6)):
        c = cases.call(shape, dtype, offset=offset)
        c = c._replace(running_mean=c.running_mean + np.asarray(offset, dtype))
        cases.check(c, activation="relu", residual=True, training=training, where=f"for {shape} at {offset:g}")


def _spread(c: cases.Call, scale: float) -> cases.Call:
    return c._replace(x=c.x * np.float32(scale))


def _along(c: cases.Call, scale: float, size: float) -> cases.Call:
    """With a dy that goes along with x, so that the sum of dz * xhat is as large as it can be."""
    return _spread(c._replace(dy=c.x * np.float32(size)), scale)


def _outliers(c: cases.Call) -> cases.Call:
    c.x[0] = 1e6
    return c


EXTREMES: dict[str, Callable[[cases.Call], cases.Call]] = {
    "spread 1e-30": lambda c: _spread(c, 1e-30),
    "spread 1e-17": lambda c: _spread(c, 1e-17),
    "spread 1e-10": lambda c: _spread(c, 1e-10),
    "spread 1e10": lambda c: _spread(c, 1e10),
    "spread 1e17": lambda c: _spread(c, 1e17),
    "spread 1e30": lambda c: _spread(c, 1e30),
    "spread 1e-17, gamma 1e8": lambda c: _spread(c._replace(gamma=c.gamma * np.float32(1e8)), 1e-17),
    "spread 1e17, gamma 1e-8": lambda c: _spread(c._replace(gamma=c.gamma * np.float32(1e-8)), 1e17),
    "spread 1e-18, dy 1e3 along x": lambda c: _along(c, 1e-18, 1e3),
    "spread 1e17, dy 1e-6 along x": lambda c: _along(c, 1e17, 1e-6),
    "spread 1e12, dy 1e-20 along x": lambda c: _along(c, 1e12, 1e-20),
    "outliers": _outliers,
}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(kernel: cases.Kernel, extreme: str) -> None:
    for shape in SHAPES:
        c = EXTREMES[extreme](cases.call(shape))
        _, cache = fastbn.forward(c.x, c.gamma, c.beta, eps=0, activation="relu")
        exact = oracle.forward(c.x, c.gamma, c.beta, eps=0, activation="relu")
        wanted = oracle.backward(c.dy, exact, c.gamma, activation="relu")
        cases.assert_gradients(fastbn.backward(c.dy, cache), wanted, f"for {shape}")


def _difference(loss: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """The gradient of `loss` by central differences, element by element."""
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    return gradient


@HOW
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_against_finite_differences(
    kernel: cases.Kernel, shape: tuple[int, ...], activation: Any, masked: bool, training: bool
) -> None:
    c = cases.call(shape, "float64", seed=3)
    c = c._replace(residual=4 * c.residual)  # so that z has all bends of the activations about it
    mask = cases.random_mask(shape, seed=3) if masked else None
    inputs = {"x": c.x, "gamma": c.gamma, "beta": c.beta, "residual": c.residual}

    def forward(activation: Any = activation, **changed: Array) -> fastbn.Forward:
        given = {**inputs, **changed}
        statistics = (None, None) if training else (c.running_mean, c.running_var)
        return fastbn.forward(
            given["x"], given["gamma"], given["beta"], *statistics,
            training=training, residual=given["residual"], activation=activation, mask=mask,
        )  # fmt: skip

    nearest = min(abs(forward(None).y - kink).min() for kink in (-3, 0, 3, 6))
    assert nearest > 1e-3, "the differences would cross a kink"
    dx, dgamma, dbeta = got = fastbn.backward(c.dy, forward().cache)
    found = {"x": dx, "gamma": dgamma, "beta": dbeta, "residual": got.dresidual}
    for name, array in inputs.items():
        wanted = _difference(lambda value, name=name: float((forward(**{name: value}).y * c.dy).sum()), array)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-7, atol=1e-8, err_msg=name)


@HOW
def test_slope_of_relu_at_zero_is_zero(kernel: cases.Kernel, dtype: str, training: bool) -> None:
    """Gamma = beta = 0 puts every position on the kink; with a positive residual none is."""
    c = cases.call((6, 5), dtype)
    zeros = np.zeros(5, dtype)
    statistics = (c.running_mean, c.running_var)
    for residual, slope in ((np.zeros_like(c.x), 0), (np.ones_like(c.x), 1)):
        y, cache = fastbn.forward(
            c.x, zeros, zeros, *statistics, training=training, activation="relu", residual=residual
        )
        assert np.array_equal(y, residual)
        got = fastbn.backward(c.dy, cache)
        assert np.array_equal(got.dresidual, slope * c.dy)
        assert not got.dx.any()


def test_gradients_have_the_statistics_dtype(kernel: cases.Kernel, dtype: str) -> None:
    """Whatever the dtype of gamma and beta."""
    c = cases.call((6, 5, 3), dtype)
    for given in (np.float16, np.float32, np.float64, np.longdouble):
        _, cache = fastbn.forward(c.x, c.gamma.astype(given), c.beta.astype(given), residual=c.residual)
        dx, dgamma, dbeta = got = fastbn.backward(c.dy, cache)
        assert {a.dtype.name for a in (dx, dgamma, dbeta, got.dresidual)} == {dtype}
        exact = oracle.forward(c.x, c.gamma.astype(given), c.beta.astype(given))
        cases.assert_gradients(got, oracle.backward(c.dy, exact, c.gamma.astype(given)))


def test_a_cache_may_be_used_again(kernel: cases.Kernel, dtype: str) -> None:
    """And calls in between do not matter."""
    c, other = cases.call((6, 5, 3), dtype), cases.call((6, 5, 3), dtype, seed=1)
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, activation="relu")
    first = tuple(fastbn.backward(c.dy, cache))
    _, another = fastbn.forward(other.x, other.gamma, other.beta, activation="relu")
    fastbn.backward(other.dy, another)
    cases.assert_same_bits(tuple(fastbn.backward(c.dy, cache)), first)


def test_constant_channel_has_finite_gradients(kernel: cases.Kernel, dtype: str) -> None:
    """With eps = 0 the slope is infinite; its documented stand-in is 0."""
    c = cases.call((6, 5), dtype)
    x = c.x.copy()
    x[:, 2] = 7
    _, cache = fastbn.forward(x, c.gamma, c.beta, eps=0)
    assert cache.inv_std[2] == 0
    dx, dgamma, dbeta = fastbn.backward(c.dy, cache)
    assert not dx[:, 2].any()
    assert dgamma[2] == 0
    np.testing.assert_allclose(dbeta[2], c.dy[:, 2].sum(dtype=np.float64), rtol=1e-6)
    assert np.isfinite(dx).all()


RESHAPED = """
import warnings
import numpy as np, fastbn

warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, for setting the shape
with fastbn.use_backend("BACKEND"):
    x = np.random.default_rng(0).random((1_000_000, 2), np.float32)
    dy = np.ones_like(x)
    dy[::3] = 0
    _, cache = fastbn.forward(x, np.ones(2, np.float32))
    wanted = fastbn.backward(dy, cache).dx
    x.shape = (2, 1_000_000)
    for again in dy, dy.reshape(x.shape):
        try:
            dx = fastbn.backward(again, cache).dx
        except ValueError:
            continue
        assert dx.shape == wanted.shape and (dx == wanted).all()
print("done")
"""


@pytest.mark.parametrize("backend", fastbn.backends())
def test_an_x_that_was_reshaped_in_place(backend: str, tmp_path: Path) -> None:
    """Refused, or right; in a process of its own, since a read past the saved statistics would end it."""
    done = cases.run_python(RESHAPED.replace("BACKEND", backend), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
