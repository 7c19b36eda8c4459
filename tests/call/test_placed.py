"""Where may results go, and in which dtype are running statistics updated? Byte orders, out=dy, every float dtype."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
STATISTICS = ("float16", "float32", "float64", *cases.HALVES[1:])


def swapped(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder())


# Byte orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_out_in_the_other_byte_order(kernel: cases.Kernel, axis: int, dtype: str) -> None:
    """For an x of either: the same numbers."""
    c = cases.call((5, 6, 7), dtype, axis=axis)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, axis=axis)
    dx = fastbn.backward(c.dy, cache).dx
    for x, out in ((swapped(c.x), swapped(c.x)), (swapped(c.x), c.x.copy()), (c.x, swapped(c.x))):
        got, other = fastbn.forward(x, c.gamma, c.beta, axis=axis, out=out)
        assert got is out
        assert np.array_equal(got, y)
        target = np.zeros_like(out)
        assert fastbn.backward(swapped(c.dy), other, out=target).dx is target
        assert np.array_equal(target, dx)
        z = fastbn.infer(x, c.gamma, c.beta, c.running_mean, c.running_var, axis=axis, out=np.zeros_like(out))
        assert np.array_equal(z, fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, axis=axis))


def test_in_place_in_the_other_byte_order(kernel: cases.Kernel) -> None:
    c = cases.call((5, 6, 7))
    statistics = c.running_mean, c.running_var
    x = swapped(c.x)
    assert fastbn.infer(x, c.gamma, c.beta, *statistics, activation="relu", out=x) is x
    assert np.array_equal(x, fastbn.infer(c.x, c.gamma, c.beta, *statistics, activation="relu"))
    x, gamma = swapped(c.x), np.full(6, 1.5, "f4")
    y, cache = fastbn.forward(x, gamma, c.beta, out=x)
    assert y is x
    native = c.x.copy()
    wanted = fastbn.forward(native, gamma, c.beta, out=native)
    assert np.array_equal(y, wanted.y)
    assert np.array_equal(fastbn.backward(c.dy, cache).dx, fastbn.backward(c.dy, wanted.cache).dx)


def test_the_same_memory_in_the_other_byte_order_is_refused(any_backend: cases.Kernel) -> None:
    """It is no array of its own, and not x itself."""
    c = cases.call((5, 6, 7))
    other, before = c.x.view(c.x.dtype.newbyteorder()), c.x.copy()
    with pytest.raises(ValueError, match="out: got memory shared with x"):
        fastbn.infer(c.x, None, None, c.running_mean, c.running_var, out=other)
    assert np.array_equal(c.x, before)


# out=dy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", cases.PLACEMENTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_dx_into_dy(kernel: cases.Kernel, place: str, residual: bool, activation: str | None) -> None:
    if place == "read-only":
        pytest.skip("cannot be written to")
    c = cases.call((4, 6, 5, 7))
    added = c.residual if residual else None
    cache = fastbn.forward(c.x, c.gamma, c.beta, residual=added, activation=activation).cache
    wanted = fastbn.backward(c.dy.copy(), cache)
    dy = cases.PLACEMENTS[place](c.dy)
    got = fastbn.backward(dy, cache, out=dy)
    assert got.dx is dy
    cases.assert_same_bits(got.dx.astype(c.x.dtype), wanted.dx)
    cases.assert_same_bits((got.dgamma, got.dbeta), (wanted.dgamma, wanted.dbeta))
    if residual:
        assert not np.shares_memory(got.dresidual, dy)
        assert np.array_equal(got.dresidual, wanted.dresidual)


@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (64, 200, 7, 7), (300, 1000)])
def test_dx_into_dy_of_large_arrays(kernel: cases.Kernel, shape: tuple[int, ...]) -> None:
    """With several threads, streams and blocks."""
    c = cases.call(shape)
    cache = fastbn.forward(c.x, c.gamma, c.beta, activation="relu").cache
    wanted = fastbn.backward(c.dy, cache)
    cases.assert_same_bits(tuple(fastbn.backward(c.dy, cache, out=c.dy)), tuple(wanted))


@pytest.mark.parametrize(
    "options", [{"virtual_batch_size": 3}, {"mask": np.arange(12).reshape(4, 3, 1) % 5 > 0}], ids=str
)
def test_dx_into_dy_of_parts(any_backend: cases.Kernel, options: dict[str, Any]) -> None:
    c = cases.call((4, 6, 3, 7))
    cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, **options).cache
    before = c.dy.copy()
    wanted, got = fastbn.backward(c.dy, cache), fastbn.backward(before, cache, out=before)
    cases.assert_same_bits((*got, got.dresidual), (*wanted, wanted.dresidual))


# Running statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_mean", STATISTICS)
@pytest.mark.parametrize("of_var", STATISTICS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_running_statistics_in_their_own_dtype(kernel: cases.Kernel, of_mean: str, of_var: str, dtype: str) -> None:
    """Blended in float64 and rounded once; in training and frozen."""
    c = cases.call((40, 300), dtype)
    mean, var = c.running_mean.astype(of_mean), c.running_var.astype(of_var)
    old = mean.copy(), var.copy()
    y = fastbn.infer(c.x, c.gamma, c.beta, mean, var)
    at = oracle.forward(c.x, c.gamma, c.beta, oracle.long(mean), oracle.long(var))
    cases.assert_y(y, at, c.gamma)
    cases.assert_same_bits(fastbn.forward(c.x, c.gamma, c.beta, mean, var, training=False).y, y)
    cases.assert_same_bits((mean, var), old)
    fastbn.forward(c.x, c.gamma, c.beta, mean, var, momentum=0.25)
    exact = oracle.forward(c.x)
    batch = exact.mean, oracle.unbiased(exact.var, exact.count)
    for got, before, new in zip((mean, var), old, batch, strict=True):
        blended = oracle.blended(before, new, 0.25)
        half = oracle.ulp(blended, got.dtype) / 2
        size = np.maximum(abs(oracle.long(before)), abs(new)) * 1e-14
        assert (abs(oracle.long(got) - blended) <= half + size).all()


@pytest.mark.parametrize("statistics", ["float16", "float32", "float64"])
def test_running_statistics_of_the_other_byte_order(kernel: cases.Kernel, statistics: str) -> None:
    c = cases.call((40, 300))
    mean, var = c.running_mean.astype(statistics), c.running_var.astype(statistics)
    others = swapped(mean), swapped(var)[::1]
    fastbn.forward(c.x, None, None, mean, var)
    fastbn.forward(c.x, None, None, *others)
    assert np.array_equal(mean, others[0])
    assert np.array_equal(var, others[1])


def test_running_statistics_of_any_strides(kernel: cases.Kernel) -> None:
    c, room = cases.call((40, 30)), np.zeros((2, 90), np.float16)
    room[1] = 1
    mean, var = np.zeros(30, np.float16), np.ones(30, np.float16)
    fastbn.forward(c.x, None, None, mean, var)
    fastbn.forward(c.x, None, None, room[0, ::3], room[1, ::3])
    assert np.array_equal(room[:, ::3], [mean, var])
    assert not room[0, 1::3].any()


def test_rounded_once(kernel: cases.Kernel) -> None:
    """To bfloat16: by way of float32 1 + 2**-8 + 2**-30 would become 1."""
    if "bfloat16" not in cases.HALVES:
        pytest.skip("ml_dtypes is not installed")
    wanted = 1 + 2.0**-8 + 2.0**-30
    x = np.array([[wanted, 0.0], [wanted, 0.0]])
    mean, var = np.zeros(2, "bfloat16"), np.ones(2, "bfloat16")
    fastbn.forward(x, None, None, mean, var, momentum=1.0)
    assert float(mean[0]) == 1 + 2.0**-7


# Nothing to do -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2**51, 0), (2**60, 0), (3, 0, 2**40), (0, 0), (5, 0)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_channels(kernel: cases.Kernel, shape: tuple[int, ...], dtype: str) -> None:
    """An empty result, however many values a channel would have."""
    x, nothing = np.empty(shape, dtype), np.empty(0, "f4")
    assert fastbn.infer(x, None, None, nothing, nothing).shape == shape
    assert fastbn.moments(x).channels == 0
    if shape[0]:
        y, cache = fastbn.forward(x, running_mean=nothing.copy(), running_var=nothing.copy())
        assert y.shape == shape
        assert fastbn.backward(x, cache).dx.shape == shape
        assert fastbn.backward_sums(x, cache).channels == 0


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2**50), (2**50, 3, 0), (2**51, 3, 0), (0, 3, 2**51)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_no_values(kernel: cases.Kernel, shape: tuple[int, ...], dtype: str) -> None:
    x, c = np.empty(shape, dtype), cases.call((4, 3))
    assert fastbn.infer(x, c.gamma, c.beta, c.running_mean, c.running_var).shape == shape
    y, cache = fastbn.forward(x, c.gamma, c.beta, moments=fastbn.moments(c.x))
    assert y.shape == shape
    dx, dgamma, dbeta = fastbn.backward(x, cache)
    assert dx.shape == shape
    assert not dgamma.any()
    assert not dbeta.any()
    frozen = fastbn.forward(x, c.gamma, c.beta, c.running_mean, c.running_var, training=False).cache
    cases.assert_same_bits(frozen.mean, c.running_mean)
    assert not fastbn.backward_sums(x, frozen).sum_dy.any()
    plan = fastbn.InferencePlan(c.gamma, c.beta, c.running_mean, c.running_var)
    assert plan(x).shape == shape
    with pytest.raises(ValueError, match="2 or more to train"):
        fastbn.forward(x)
