"""Are results right where parameters, statistics or their products are beyond the range of the data's dtype?

Nothing here is near the end of a range in y or dx, unless that is said: what overflows is on the way.
"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
X = np.array([[-5.0], [1.0]], np.float32)
CONSTANT = np.full((4, 1), 0.1, np.float32)
ZERO, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("activation", "beta", "wanted"),
    [("relu", -1e39, 0), ("relu6", 1e39, 6), ("relu6", -1e300, 0), ("sigmoid", -1e39, 0), ("sigmoid", 1e300, 1),
     (None, 1e39, np.inf), (None, -1e300, -np.inf)],
)  # fmt: skip
def test_beta_beyond_float32(kernel: cases.Kernel, activation: str | None, beta: float, wanted: float) -> None:
    """The activation's limit; with none, y itself is beyond the range."""
    for residual in (None, X):
        options: dict[str, Any] = {"activation": activation, "residual": residual, "eps": 0.0}
        y, cache = fastbn.forward(X, None, np.array([beta]), ZERO, ONE, training=False, **options)
        assert (y == wanted).all()
        assert np.array_equal(fastbn.infer(X, None, np.array([beta]), ZERO, ONE, **options), y)
        dx = fastbn.backward(ONE * X, cache).dx
        assert np.array_equal(dx, X if activation is None else np.zeros_like(X))


def test_gamma_and_beta_beyond_float32(kernel: cases.Kernel) -> None:
    """Beta is the larger by far, so that no x matters."""
    x = np.array([[-1.0], [1.0], [0.5], [-0.5]], np.float32)
    for residual in (None, x):
        y, cache = fastbn.forward(
            x, np.array([1e60]), np.array([-1e80]), ZERO, ONE, training=False, activation="relu", residual=residual
        )
        assert not y.any()
        assert all(not gradient.any() for gradient in fastbn.backward(np.ones_like(x), cache) if gradient is not None)


@pytest.mark.parametrize("mean", [1e39, -1e100])
def test_a_mean_beyond_float32(kernel: cases.Kernel, mean: float) -> None:
    """Of a distribution to which x does not belong: x is as good as 0, one standard deviation from the mean."""
    sign = -np.sign(mean)
    y, cache = fastbn.forward(X, None, None, np.array([mean]), np.array([mean**2]), training=False, eps=0.0)
    assert (y == sign).all()
    assert np.isfinite(fastbn.backward(X, cache).dx).all()
    moments = fastbn.Moments(4, np.array([mean]), np.array([4 * mean**2]), dtype="float32")
    y, cache = fastbn.forward(X, moments=moments, eps=0.0)
    assert (y == sign).all()
    gradients = fastbn.backward(X, cache)
    assert all(np.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("gamma", "eps"), [(1e300, 1e-300), (-1e300, 1e-320), (1e30, 1e-250), (1.0, 1e-250)])
def test_constant_channels(kernel: cases.Kernel, dtype: str, gamma: float, eps: float) -> None:
    """They are beta, however steep gamma / sqrt(eps) is, and equal dy have no effect on them."""
    x = CONSTANT.astype(dtype)
    beta = np.array([7.0])
    for activation in (None, "relu"):
        y, cache = fastbn.forward(x, np.array([gamma]), beta, eps=eps, activation=activation)
        assert (y == 7).all()
        assert not fastbn.backward(np.ones_like(x), cache).dx.any()
    y, cache = fastbn.forward(x, np.array([gamma]), -beta, eps=eps, activation="relu")
    assert not y.any()
    assert not fastbn.backward(np.ones_like(x), cache).dx.any()


def test_constant_channels_of_the_largest_float64(kernel: cases.Kernel) -> None:
    x = np.full((4, 1), 1.7e308)
    assert (fastbn.forward(x, np.array([1e300]), np.array([7.0]), eps=1e-320).y == 7).all()


def test_equal_dy_near_the_largest_float32(kernel: cases.Kernel) -> None:
    """Their terms in dx are beyond the range, and cancel."""
    x = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)
    dx = fastbn.backward(np.full_like(x, 3e38), fastbn.forward(x, np.array([2.0], np.float32)).cache).dx
    assert (abs(dx) <= 4 * np.spacing(np.float32(3e38)) * 2).all()


@pytest.mark.parametrize("values", [(1e160, 2e160, 4e160), (0, 0, 1.5e154)])
def test_squares_that_overflow_float64_are_no_numbers(kernel: cases.Kernel, values: tuple[float, ...]) -> None:
    """Rather than values of a channel that looks constant; a backend that does without these squares is right."""
    x = np.array(values)[:, np.newaxis]
    scaled = oracle.long(x) / 2.0**500
    wanted = oracle.forward(scaled, eps=0.0).y
    for given in (None, fastbn.moments(x)):
        mean, var = np.zeros(1), np.ones(1)
        y = fastbn.forward(x, None, None, mean, var, eps=0.0, moments=given).y
        assert np.isnan(y).all() or np.allclose(y, wanted.astype(float), rtol=1e-14)
        assert np.isnan(var).all() == np.isnan(y).all()


@pytest.mark.parametrize("beta", [2.0**17, 2.0**40, 1e30])
def test_a_residual_that_cancels_beta(kernel: cases.Kernel, beta: float) -> None:
    """What is left is gamma * xhat, with all its digits."""
    x = np.random.default_rng(1).standard_normal((64, 1)).astype(np.float32)
    gamma, shift = np.array([1e-6], np.float32), np.array([beta], np.float32)
    y = fastbn.forward(x, gamma, shift, residual=np.full_like(x, -shift[0])).y
    wanted = oracle.forward(x, gamma).y
    size = np.spacing(np.maximum(1, abs(wanted / gamma)).astype(np.float32)) * gamma
    assert (abs(y - wanted) <= 2 * size + np.spacing(abs(wanted).astype(np.float32))).all()


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_channel_that_is_no_number_leaves_the_others_every_bit(kernel: cases.Kernel, poison: float) -> None:
    """Also where it is masked out. Loops for channels that need powers of two round like those that need none."""
    for seed in (3, 4, 13, 17):  # in which Numba's did not
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((34, 130, 8))
        dy, mask = rng.standard_normal(x.shape), rng.random(x.shape[:2]) < 0.7
        spoilt = x.copy()
        spoilt[3, 5, 6] = poison
        for counts in (mask[3, 5], True):
            mask[3, 5] = counts
            found = []
            for values in (x, spoilt):
                y, cache = fastbn.forward(values, axis=-1, mask=mask)
                found.append((y[..., :6], fastbn.backward(dy, cache).dx[..., :6]))
            cases.assert_same_bits(*found, f"for seed {seed}")
