"""Can y take x's place in training, and does backward then find the gradient from y alone?"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import cases
import numpy as np
import oracle
import pytest
from test_checks import assert_refused

import fastbn

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)
INVERTIBLE = (None, "leaky_relu", ("leaky_relu", 1.5))
SHAPES = (((40, 19), 1), ((6, 5, 31), 1), ((6, 31, 5), -1), ((3, 4, 7, 6), 2), ((1, 2, 3001), 1))


def call(shape: tuple[int, ...], dtype: Any = "float32", axis: int = 1) -> cases.Call:
    """With a gamma that is nowhere near 0, of either sign."""
    c = cases.call(shape, dtype, axis)
    return c._replace(gamma=c.gamma + np.where(c.gamma < 0, -0.5, 0.5).astype(c.gamma.dtype))


class Solved(NamedTuple):
    """A call, its options, and the oracle's answers."""

    call: cases.Call
    options: dict[str, Any]
    y: oracle.Normalized
    gradients: oracle.Differentiated


@cache
def solved(shape: tuple[int, ...], axis: int, dtype: str, activation: Any, training: bool) -> Solved:
    """Every other shape has a residual and a mask as well; computed once for all kernels."""
    c = call(shape, dtype, axis)
    more = {"residual": c.residual, "mask": cases.random_mask(shape, axis)} if SHAPES.index((shape, axis)) % 2 else {}
    options = {"axis": axis, "activation": activation, **more}
    at = oracle.forward(c.x, c.gamma, c.beta, *(() if training else (c.running_mean, c.running_var)), **options)
    off = oracle.found_again(at, c.gamma, axis=axis, activation=activation, dtype=dtype)
    wanted = oracle.backward(
        c.dy, at, c.gamma, axis=axis, activation=activation, mask=options.get("mask"), frozen=not training, off=off
    )
    return Solved(c, options, at, wanted)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_against_the_oracle(kernel: cases.Kernel, dtype: str, activation: Any, training: bool) -> None:
    """The same y and running statistics as in an array of its own, bit for bit, and the gradient."""
    for shape, axis in SHAPES:
        c, options, at, wanted = solved(shape, axis, dtype, activation, training)
        where = f"for {shape}, axis {axis}"
        mean, var = c.running_mean.copy(), c.running_var.copy()
        apart = fastbn.forward(c.x, c.gamma, c.beta, mean, var, training=training, **options).y
        x, in_mean, in_var = c.x.copy(), c.running_mean.copy(), c.running_var.copy()
        y, cache = fastbn.forward(x, c.gamma, c.beta, in_mean, in_var, training=training, out=x, **options)
        assert y is x
        cases.assert_y(y, at, c.gamma, axis=axis, activation=activation, where=where)
        cases.assert_same_bits((y, in_mean, in_var), (apart, mean, var), where)
        got = fastbn.backward(c.dy, cache)
        cases.assert_gradients(got, wanted, where)
        cases.assert_same_bits(tuple(fastbn.backward(c.dy, cache)), tuple(got), where)


@pytest.mark.parametrize("activation", INVERTIBLE, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_constant_channel_without_eps_has_no_gradient(kernel: cases.Kernel, dtype: str, activation: Any) -> None:
    c = call((6, 5, 31), dtype)
    c.x[:, 2] = 3
    cache = fastbn.forward(c.x, c.gamma, c.beta, eps=0.0, activation=activation, out=c.x).cache
    dx, dgamma, _ = fastbn.backward(c.dy, cache)
    assert not dx[:, 2].any()
    assert dx[:, 1].any()
    assert np.isfinite(dx.astype(np.float64)).all()
    assert np.isfinite(dgamma).all()


@pytest.mark.parametrize("size", [0, -30, -60, -110, -200])
def test_a_gamma_near_the_end_of_the_range(kernel: cases.Kernel, size: int) -> None:
    """The gain may be beyond it, and dy tiny, or 0 (2^-200)."""
    c = call((40, 19))
    dy = np.ldexp(c.dy, size)
    for gain, spread in product((100, 112, 118, 122), (60, 0, -7, -30)):
        if gain + size - spread > 120:
            continue
        x, gamma, beta = np.ldexp(c.x, spread), np.ldexp(np.sign(c.gamma), gain), np.ldexp(c.beta, gain - 8)
        at = oracle.forward(x, gamma, beta, eps=1e-20)
        off = oracle.found_again(at, gamma, activation=None, dtype="float32")
        wanted = oracle.backward(dy, at, gamma, off=off)
        y, cache = fastbn.forward(x, gamma, beta, eps=1e-20, out=x)
        where = f"gamma 2^{gain}, x 2^{spread}"
        cases.assert_y(y, at, gamma, where=where)
        cases.assert_gradients(fastbn.backward(dy, cache), wanted, where)


def test_close_to_what_x_gives(any_backend: cases.Kernel) -> None:
    """In float64 the way back costs nothing that matters."""
    for activation in INVERTIBLE:
        c = call((6, 5, 31), "float64")
        wanted = fastbn.backward(c.dy, fastbn.forward(c.x, c.gamma, c.beta, activation=activation).cache)
        x = c.x.copy()
        got = fastbn.backward(c.dy, fastbn.forward(x, c.gamma, c.beta, activation=activation, out=x).cache)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", [name for name in cases.PLACEMENTS if name not in ("read-only", "byteswapped")])
def test_placements(any_backend: cases.Kernel, dtype: str, placement: str) -> None:
    place = cases.PLACEMENTS[placement]
    for shape, axis in (((3, 5, 4, 7), 1), ((3, 5, 4, 19), -1), ((9, 19), 1)):
        c = call(shape, dtype, axis)
        plain = c.x.copy()
        wanted = fastbn.forward(plain, c.gamma, c.beta, axis=axis, activation="leaky_relu", out=plain)
        x = place(c.x.copy())
        got = fastbn.forward(x, c.gamma, c.beta, axis=axis, activation="leaky_relu", out=x)
        assert got.y is x
        cases.assert_y(x, oracle.forward(c.x, c.gamma, c.beta, axis=axis, activation="leaky_relu"), c.gamma, axis=axis)
        close = 1e-12 if dtype == "float64" else 2e-5
        dx = fastbn.backward(place(c.dy), got.cache).dx
        np.testing.assert_allclose(dx, fastbn.backward(c.dy, wanted.cache).dx, rtol=close, atol=close)


def test_a_residual_may_come_along(any_backend: cases.Kernel) -> None:
    """And gets its gradient."""
    c = call((6, 5, 31), "float64")
    x = c.x.copy()
    wanted = fastbn.backward(
        c.dy, fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="leaky_relu").cache
    )
    _, cache = fastbn.forward(x, c.gamma, c.beta, residual=c.residual, activation="leaky_relu", out=x)
    got = fastbn.backward(c.dy, cache)
    np.testing.assert_allclose(got.dresidual, wanted.dresidual, rtol=1e-12)
    np.testing.assert_allclose(got.dx, wanted.dx, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "silu", "hardswish", "sigmoid", ("leaky_relu", 0), ("leaky_relu", -0.5)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_what_does_not_invert_is_refused(any_backend: cases.Kernel, activation: Any, training: bool) -> None:
    c = call((6, 5, 3))
    arguments = c._asdict()
    del arguments["dy"], arguments["residual"]
    words = ("activation", "leaky_relu" if isinstance(activation, tuple) else activation, "out")
    arguments |= {"out": arguments["x"], "activation": activation, "training": training}
    assert_refused(fastbn.forward, arguments, ValueError, *words)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("small", [0.0, -0.0, 1e-30, np.nan])
def test_a_gamma_too_small_is_refused(any_backend: cases.Kernel, dtype: str, small: float) -> None:
    """Where xhat would be lost in the last digits of y; the message tells the channel."""
    c = call((6, 5, 3), dtype)
    c.gamma[3] = small
    arguments = c._asdict()
    del arguments["dy"], arguments["residual"]
    for activation in (None, "leaky_relu"):
        refused = arguments | {"out": arguments["x"], "activation": activation}
        assert_refused(fastbn.forward, refused, ValueError, "gamma", "3", "out")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_beta_that_buries_xhat_is_refused(any_backend: cases.Kernel, dtype: str) -> None:
    """Whether gamma is given or not: of 1e7 + xhat no digit of xhat is left in a float32."""
    c = call((6, 5, 3), dtype)
    large = np.array([0, 0, 0, 1e18, 0], c.beta.dtype)
    for gamma in (None, np.ones_like(c.gamma)):
        arguments = {"x": c.x, "gamma": gamma, "beta": large, "out": c.x}
        assert_refused(fastbn.forward, arguments, ValueError, "3", "out")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("large", [1.01, np.inf, np.nan])
def test_a_residual_that_buries_x_is_refused(any_backend: cases.Kernel, dtype: str, large: float) -> None:
    """In units of the least |gamma| over the root of the dtype's eps."""
    c = call((6, 5, 31), dtype)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype) or np.finfo(dtype).eps
    residual = np.zeros_like(c.x)
    residual[2, 3, 4] = -large * np.abs(c.gamma.astype(np.float64)).min() / np.sqrt(eps) * (1 + 2.0**-6)
    arguments = {"x": c.x, "gamma": c.gamma, "residual": residual, "out": c.x}
    assert_refused(fastbn.forward, arguments, ValueError, "residual", "out=x", "sqrt(eps)")


@pytest.mark.parametrize(("dtype", "slope"), [("float32", 1e-40), ("float64", 1e-310), ("float16", 1e-7)])
def test_a_slope_that_loses_digits_is_refused(any_backend: cases.Kernel, dtype: str, slope: float) -> None:
    """Times it, what is negative becomes a denormal number, or 0."""
    x = cases.call((6, 5, 3), dtype).x
    arguments = {"x": x, "out": x, "activation": ("leaky_relu", slope)}
    assert_refused(fastbn.forward, arguments, ValueError, "slope", "out")


def test_infer_may_be_in_place_whatever_the_activation(any_backend: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    gamma = np.zeros_like(c.gamma)
    for activation in cases.ACTIVATIONS:
        for parameters in ((c.gamma, c.beta), (gamma, c.beta)):
            wanted = fastbn.infer(c.x, *parameters, c.running_mean, c.running_var, activation=activation)
            x = c.x.copy()
            assert fastbn.infer(x, *parameters, c.running_mean, c.running_var, activation=activation, out=x) is x
            cases.assert_same_bits(x, wanted)


def test_another_view_of_the_same_memory_is_x_itself(any_backend: cases.Kernel) -> None:
    """Same address, shape and strides; the gradient does not mistake it for an array apart."""
    c = call((6, 5, 31), "float64")
    x = c.x.copy()
    out = x[:]
    _, cache = fastbn.forward(x, c.gamma, c.beta, out=out)
    wanted = fastbn.backward(c.dy, fastbn.forward(c.x, c.gamma, c.beta).cache).dx
    np.testing.assert_allclose(fastbn.backward(c.dy, cache).dx, wanted, rtol=1e-12, atol=1e-12)


def test_layer(any_backend: cases.Kernel) -> None:
    c = call((6, 5, 31), "float64")
    layers = [fastbn.BatchNorm(5, dtype="float64", activation="leaky_relu") for _ in range(2)]
    x = c.x.copy()
    cases.assert_same_bits(layers[0](x, out=x), layers[1](c.x))
    np.testing.assert_allclose(layers[0].backward(c.dy), layers[1].backward(c.dy), rtol=1e-12, atol=1e-12)
    cases.assert_same_bits(layers[0].running_var, layers[1].running_var)
