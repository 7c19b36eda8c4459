"""Do masks count by any byte but 0, and does padding that nobody wrote add nothing to gradients?"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
LAYOUTS = (((6, 5, 40), 1), ((6, 40, 5), -1), ((3, 20, 7, 7), 1), ((2, 3, 1000), 1), ((90, 17), 1), ((5, 33, 4), 0))


def bytes_of(mask: Array, byte: int) -> Array:
    """The same mask, whose True is another byte."""
    view = (mask * np.uint8(byte)).view(bool)
    assert np.array_equal(mask, view)
    return view


def mixed(mask: Array) -> Array:
    return (mask * np.random.default_rng(3).integers(1, 256, mask.shape).astype(np.uint8)).view(bool)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
@pytest.mark.parametrize("byte", [255, 2, 128, None])
def test_any_byte_but_0_is_true(kernel: cases.Kernel, shape: tuple[int, ...], axis: int, byte: int | None) -> None:
    c, mask = cases.call(shape, axis=axis), cases.random_mask(shape, axis)
    other = mixed(mask) if byte is None else bytes_of(mask, byte)
    found = []
    for given in (mask, other):
        mean, var = c.running_mean.copy(), c.running_var.copy()
        y, cache = fastbn.forward(c.x, c.gamma, c.beta, mean, var, axis=axis, mask=given, activation="silu")
        sums, m = fastbn.backward_sums(c.dy, cache), fastbn.moments(c.x, axis=axis, mask=given)
        found.append((y, mean, var, *fastbn.backward(c.dy, cache), sums.sum_dy_xhat, m.mean, m.m2))
        assert cache.count == sums.count == m.count == np.count_nonzero(mask)
    cases.assert_same_bits(*found)


def test_masks_of_images(kernel: cases.Kernel) -> None:
    """0 and 255: the C core added the bytes up."""
    x = np.random.default_rng(0).normal(5, 1, (64, 16)).astype("f4")
    good = np.arange(64) % 3 > 0
    var = fastbn.forward(x, mask=bytes_of(good, 255)).cache.var
    exact = oracle.forward(x, mask=good).var
    assert (abs(var - exact) <= oracle.ulp(exact)).all()


def test_bytes_in_virtual_batches(any_backend: cases.Kernel) -> None:
    c = cases.call((12, 5, 9))
    mask = cases.random_mask(c.x.shape, least=100)
    wanted, got = (fastbn.forward(c.x, mask=given, virtual_batch_size=4) for given in (mask, bytes_of(mask, 200)))
    cases.assert_same_bits((wanted.y, wanted.cache.var), (got.y, got.cache.var))
    cases.assert_same_bits(tuple(fastbn.backward(c.dy, wanted.cache)), tuple(fastbn.backward(c.dy, got.cache)))


NAMES = ("dx", "dgamma", "dbeta", "dresidual", "sum_dy", "sum_dy_xhat")

# Padding ------------------------------------------------------------------------------------------------------------


def spoiled(array: Array, outside: Array, axis: int) -> Array:
    """The array with values in its padding that were never written: NaN, infinities, the largest numbers."""
    with np.errstate(all="ignore"):
        junk = np.array([np.nan, np.inf, -np.inf, 3e38, -np.nan]).astype(array.dtype)
    copy = array.copy()
    positions = np.broadcast_to(np.expand_dims(outside, axis), array.shape)
    copy[positions] = np.resize(junk, np.count_nonzero(positions))
    return copy


def first_and_last(shape: tuple[int, ...], axis: int) -> Array:
    """A mask in which the first and the last image count, and the others are padding."""
    mask = np.zeros(np.delete(shape, axis), bool)
    mask[[0, -1]] = True
    return mask


@pytest.mark.parametrize(("shape", "axis"), [*LAYOUTS, ((20, 3, 9, 9), 1)], ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mask_of", [cases.random_mask, first_and_last])
def test_padding_adds_nothing(
    kernel: cases.Kernel, shape: tuple[int, ...], axis: int, activation: Any, dtype: str, mask_of: Any
) -> None:
    """All gradients are those of padding that is 0, and what they have in the padding is 0."""
    c, mask = cases.call(shape, dtype, axis=axis), mask_of(shape, axis)
    dy = np.where(np.expand_dims(mask, axis), c.dy, 0).astype(dtype)
    options = {"axis": axis, "mask": mask, "activation": activation}

    def gradients(x: Array, residual: Array | None) -> Any:
        cache = fastbn.forward(x, c.gamma, c.beta, residual=residual, **options).cache
        got, sums = fastbn.backward(dy, cache), fastbn.backward_sums(dy, cache)
        return (*got, got.dresidual, sums.sum_dy, sums.sum_dy_xhat)

    for residual in (None, c.residual):
        zeros = [
            None if a is None else np.where(np.expand_dims(mask, axis), a, 0).astype(dtype) for a in (c.x, residual)
        ]
        junk = [None if a is None else spoiled(a, ~mask, axis) for a in (c.x, residual)]
        wanted, got = gradients(*zeros), gradients(*junk)
        outside = np.broadcast_to(~np.expand_dims(mask, axis), shape)
        for name, one, other in zip(NAMES, wanted, got, strict=True):
            if one is not None:
                assert np.array_equal(one, other), f"{name} depends on the padding"
        assert (got[0][outside] == 0).all()
        assert got[3] is None or (got[3][outside] == 0).all()


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
def test_padding_of_frozen_statistics(
    kernel: cases.Kernel, shape: tuple[int, ...], axis: int, activation: str | None
) -> None:
    """And of statistics that are no numbers."""
    c, mask = cases.call(shape, axis=axis), cases.random_mask(shape, axis)
    dy = np.where(np.expand_dims(mask, axis), c.dy, 0).astype("f4")
    options = {"axis": axis, "activation": activation, "training": False}
    found = []
    for x in (np.where(np.expand_dims(mask, axis), c.x, 0).astype("f4"), spoiled(c.x, ~mask, axis)):
        cache = fastbn.forward(x, c.gamma, c.beta, c.running_mean, c.running_var, mask=mask, **options).cache
        found.append(tuple(fastbn.backward(dy, cache)))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
    bad = np.full_like(c.running_mean, np.nan)
    cache = fastbn.forward(c.x, c.gamma, c.beta, bad, bad, mask=mask, residual=c.residual, **options).cache
    got, outside = fastbn.backward(dy, cache), np.broadcast_to(~np.expand_dims(mask, axis), shape)
    assert (got.dx[outside] == 0).all()
    assert (got.dresidual[outside] == 0).all()


def test_padding_of_a_channel_without_numbers(kernel: cases.Kernel) -> None:
    """A NaN that counts is in all of its channel, but for dx in the padding."""
    c, mask = cases.call((8, 6, 30)), cases.random_mask((8, 6, 30))
    x, dy = c.x.copy(), np.where(mask[:, np.newaxis], c.dy, 0).astype("f4")
    mask[3, 4] = True
    x[3, 2, 4] = np.nan
    dx, dgamma, _ = fastbn.backward(dy, fastbn.forward(x, c.gamma, c.beta, mask=mask).cache)
    outside = np.broadcast_to(~mask[:, np.newaxis], x.shape)
    assert (dx[outside] == 0).all()
    assert np.isnan(dx[:, 2][mask]).all()
    assert np.isfinite(np.delete(dx, 2, axis=1)).all()
    assert np.isnan(dgamma[2])


def test_padding_with_given_moments_and_sums(kernel: cases.Kernel) -> None:
    c, mask = cases.call((8, 6, 30)), cases.random_mask((8, 6, 30))
    dy = np.where(mask[:, np.newaxis], c.dy, 0).astype("f4")
    m = fastbn.moments(c.x, mask=mask)
    found = []
    for x in (c.x, spoiled(c.x, ~mask, 1)):
        cache = fastbn.forward(x, c.gamma, c.beta, moments=m, mask=mask).cache
        sums = fastbn.backward_sums(dy, cache)
        found.append((sums.sum_dy_xhat, *fastbn.backward(dy, cache, sums=sums)))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)
    assert np.isfinite(found[1][1]).all()


@pytest.mark.parametrize("activation", [None, ("leaky_relu", 0.5)], ids=str)
def test_padding_in_place(kernel: cases.Kernel, activation: Any) -> None:
    """Where x is had back from y."""
    c, mask = cases.call((8, 6, 30)), cases.random_mask((8, 6, 30))
    dy, gamma = np.where(mask[:, np.newaxis], c.dy, 0).astype("f4"), np.full(6, 1.5, "f4")
    found = []
    for x in (np.where(mask[:, np.newaxis], c.x, 0).astype("f4"), spoiled(c.x, ~mask, 1)):
        cache = fastbn.forward(x, gamma, None, mask=mask, activation=activation, out=x).cache
        found.append(tuple(fastbn.backward(dy, cache)[:2]))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_padding_whose_dy_is_not_0_counts(kernel: cases.Kernel) -> None:
    """It moves gamma and beta, and its dx is that of frozen statistics."""
    c, mask = cases.call((8, 6, 30)), cases.random_mask((8, 6, 30))
    cases.check(c, mask=mask, activation="relu", residual=True)
    dy = c.dy.copy()
    dy[..., ::2] = 0
    cases.check(c._replace(dy=dy), mask=mask, activation="silu")


def test_a_bad_dy_in_the_padding_shows(kernel: cases.Kernel) -> None:
    """NaN is not 0."""
    c, mask = cases.call((8, 6, 30)), cases.random_mask((8, 6, 30))
    mask[0, 0] = False
    dy = np.where(mask[:, np.newaxis], c.dy, 0).astype("f4")
    dy[0, 2, 0] = np.nan
    dx, dgamma, dbeta = fastbn.backward(dy, fastbn.forward(c.x, c.gamma, c.beta, mask=mask).cache)
    assert np.isnan(dx[0, 2, 0])
    assert np.isnan([dgamma[2], dbeta[2]]).all()
    assert np.isfinite(np.delete(dx, 2, axis=1)).all()


def test_the_last_place_of_a_sequence(kernel: cases.Kernel) -> None:
    x, mask = np.array([[[1.0], [2.0], [3.0], [np.nan]]]), np.array([[True, True, True, False]])
    cache = fastbn.forward(x, np.ones(1), np.zeros(1), axis=-1, mask=mask).cache
    dx, dgamma, dbeta = fastbn.backward(np.array([[[1.0], [2.0], [4.0], [0.0]]]), cache)
    exact = oracle.forward(x[:, :3], axis=-1)
    wanted = oracle.backward(np.array([[[1.0], [2.0], [4.0]]]), exact, axis=-1).exact
    assert np.allclose(dx[:, :3], wanted.dx.astype(float), rtol=1e-13, atol=1e-15)
    assert dx[0, 3, 0] == 0
    assert np.allclose([dgamma[0], dbeta[0]], [float(wanted.dgamma[0]), 7.0], rtol=1e-13)
