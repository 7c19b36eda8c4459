"""Is what a mask leaves out nothing to the gradients where its dy is 0, whatever lies there? And what is True?"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
SHAPES = (((40, 19), 1), ((6, 31, 5), -1), ((6, 5, 31), 1), ((3, 4, 30, 60), 1), ((700, 3, 2), 1))
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid")


def odd(mask: Array) -> Array:
    """The same mask, whose True are other bytes than 1, as those of an image's mask."""
    bytes_ = np.where(mask, np.arange(1, mask.size + 1, dtype=np.uint32).reshape(mask.shape) % 255 + 1, 0)
    return bytes_.astype(np.uint8).view(np.bool_)


def everything(c: cases.Call, axis: int, **options: Any) -> tuple[Any, ...]:
    """What calls with a mask return and update."""
    mean, var = c.running_mean.copy(), c.running_var.copy()
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, mean, var, axis=axis, residual=c.residual, **options)
    moments, sums = fastbn.moments(c.x, axis=axis, mask=options["mask"]), fastbn.backward_sums(c.dy, cache)
    got = fastbn.backward(c.dy, cache)
    counts = np.array([cache.count, moments.count, sums.count])
    return (y, mean, var, counts, moments.mean, moments.m2, sums.sum_dy, sums.sum_dy_xhat, *got, got.dresidual)


@pytest.mark.parametrize("dtype", [*cases.DTYPES, "float16"])
@pytest.mark.parametrize("training", [True, False])
def test_any_byte_but_0_is_true(kernel: cases.Kernel, dtype: str, training: bool) -> None:
    for shape, axis in SHAPES:
        c, mask = cases.call(shape, dtype, axis), cases.random_mask(shape, axis, seed=3)
        c.dy[...] = np.where(np.expand_dims(mask, axis) | (c.dy > 0), c.dy, 0)
        wanted, got = (
            everything(c, axis, mask=some, training=training, activation="relu") for some in (mask, odd(mask))
        )
        cases.assert_same_bits(got, wanted, f"for {shape}")


def test_any_byte_but_0_is_true_in_virtual_batches(any_backend: cases.Kernel) -> None:
    c = cases.call((24, 5, 7))
    mask = cases.random_mask((24, 5, 7), seed=1) | (np.arange(7) < 2)
    for some in (mask, odd(mask)):
        y, cache = fastbn.forward(c.x, c.gamma, c.beta, mask=some, virtual_batch_size=8)
        found = (y, cache.mean, *fastbn.backward(c.dy, cache)[:3])
        if some is mask:
            wanted = found
    cases.assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [*cases.DTYPES, "float16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_is_nothing(kernel: cases.Kernel, dtype: str, training: bool, activation: str | None) -> None:
    """Where dy is 0: NaN, infinities and huge numbers there change no bit of any gradient, and have none."""
    for shape, axis in SHAPES:
        c, mask = cases.call(shape, dtype, axis), cases.random_mask(shape, axis, seed=2)
        out = np.broadcast_to(~np.expand_dims(mask, axis), shape)
        padding = out & (np.random.default_rng(0).random(shape) < 0.8)  # the rest counts as it did
        dy = np.where(padding, 0, c.dy).astype(dtype)
        found = []
        for value in (1.0, np.nan, np.inf, -60000.0):
            x, residual = (np.where(padding, value, a).astype(dtype) for a in (c.x, c.residual))
            _, cache = fastbn.forward(
                x, c.gamma, c.beta, c.running_mean.copy(), c.running_var.copy(), axis=axis, mask=mask,
                training=training, activation=activation, residual=residual,
            )  # fmt: skip
            got, sums = fastbn.backward(dy, cache), fastbn.backward_sums(dy, cache)
            given = fastbn.backward(dy, cache, sums=sums)
            assert got.dresidual is not None
            for result in (got.dx, got.dresidual, given.dx):
                assert not result[padding].any(), f"padding has a gradient for {shape}, {value}"
            found.append((*got, got.dresidual, sums.sum_dy, sums.sum_dy_xhat, given.dx))
        for other in found[1:]:
            cases.assert_same_bits(other, found[0], f"for {shape}")


def test_padding_is_nothing_where_statistics_are_nan(kernel: cases.Kernel, dtype: str) -> None:
    """Given ones, of a channel all of which is left out; its parameters get no gradient."""
    for shape, axis in SHAPES:
        c = cases.call(shape, dtype, axis)
        mean = np.full_like(c.running_mean, np.nan)
        mask = np.zeros(np.delete(shape, axis), bool)
        for activation in ACTIVATIONS:
            _, cache = fastbn.forward(
                c.x, c.gamma, c.beta, mean, c.running_var, training=False, axis=axis, mask=mask, activation=activation,
                residual=c.residual,
            )  # fmt: skip
            got = fastbn.backward(np.zeros_like(c.dy), cache)
            for result in (*got, got.dresidual):
                assert not result.any(), f"for {shape}, {activation}"


def test_the_example(kernel: cases.Kernel) -> None:
    """Channels-last, one channel, and NaN where the sequence has ended."""
    x, mask = np.array([[[1.0], [2.0], [3.0], [np.nan]]]), np.array([[1, 1, 1, 0]], bool)
    dy = np.array([[[1.0], [-1.0], [2.0], [0.0]]])
    _, cache = fastbn.forward(x, np.ones(1), np.zeros(1), axis=-1, mask=mask)
    got = fastbn.backward(dy, cache)
    exact = oracle.forward(x[:, :3], np.ones(1), axis=-1)
    wanted = oracle.backward(dy[:, :3], exact, np.ones(1), axis=-1)
    packed = fastbn.Gradients(got.dx[:, :3], got.dgamma, got.dbeta, got.dresidual)
    cases.assert_gradients(packed, wanted)
    assert got.dx[0, 3, 0] == 0


def test_in_place_from_y(kernel: cases.Kernel, dtype: str) -> None:
    """Where y stands for x, the padding of x makes NaN of y."""
    for shape, axis in SHAPES:
        c, mask = cases.call(shape, dtype, axis), cases.random_mask(shape, axis, seed=2)
        gamma = np.sign(c.gamma) + c.gamma if c.gamma is not None else None
        padding = np.broadcast_to(~np.expand_dims(mask, axis), shape)
        dy, found = np.where(padding, 0, c.dy).astype(dtype), []
        for value in (1.0, np.nan):
            x = np.where(padding, value, c.x).astype(dtype)
            _, cache = fastbn.forward(x, gamma, c.beta, axis=axis, mask=mask, activation=("leaky_relu", 0.5), out=x)
            got = fastbn.backward(dy, cache)
            assert not got.dx[padding].any()
            found.append(tuple(got))
        cases.assert_same_bits(found[1], found[0], f"for {shape}")
