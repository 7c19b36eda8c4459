"""Do masked positions stay out of the statistics, and get the gradient that follows from that?"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)
SHAPES = (((40, 19), 1), ((6, 5, 31), 1), ((6, 31, 5), -1), ((3, 4, 7, 6), 1), ((5, 2, 700), 0), ((700, 3, 2), 1))


def masks(shape: tuple[int, ...], axis: int) -> dict[str, Array]:
    """Of every kind; shape is x's."""
    rest = tuple(np.delete(shape, axis))
    one_off, two, runs, images = np.ones(rest, bool), *(np.zeros(rest, bool) for _ in range(3))
    one_off.flat[one_off.size // 2] = False
    two.flat[[0, -1]] = True
    runs.flat[runs.size // 3 : runs.size // 3 * 2] = True
    images[::2] = True
    return {
        "random": cases.random_mask(shape, axis, seed=1),
        "padded": np.broadcast_to(np.arange(rest[-1]) < rest[-1] // 2 + 1, rest).copy(),
        "all but one": one_off,
        "two": two,
        "a run": runs,
        "images": images,
        "every second": np.arange(one_off.size).reshape(rest) % 2 == 0,
    }


@pytest.mark.parametrize("dtype", FLOATS)
def test_against_the_oracle(any_backend: cases.Kernel, dtype: str) -> None:
    activations = cycle((None, "relu", "silu"))
    for shape, axis in SHAPES:
        c = cases.call(shape, dtype, axis)
        for (kind, mask), activation in zip(masks(shape, axis).items(), activations, strict=False):
            cases.check(
                c, axis=axis, mask=mask, activation=activation, residual=activation == "relu", eps=1e-3,
                where=f"for {shape}, axis {axis}, mask {kind}, {activation}",
            )  # fmt: skip


def test_with_given_statistics_a_mask_changes_no_value(any_backend: cases.Kernel, dtype: str) -> None:
    """It says where dx is 0 if dy is; the sums are those of all positions, in another order."""
    c = cases.call((6, 5, 31), dtype)
    arguments = (c.x, c.gamma, c.beta, c.running_mean, c.running_var)
    wanted, cache = fastbn.forward(*arguments, training=False)
    dx = fastbn.backward(c.dy, cache).dx
    for mask in masks(c.x.shape, 1).values():
        y, cache = fastbn.forward(*arguments, training=False, mask=mask)
        cases.assert_same_bits(y, wanted)
        cases.assert_same_bits(fastbn.backward(c.dy, cache).dx, dx)
        cases.check(c, training=False, mask=mask)


def test_at_an_offset(any_backend: cases.Kernel) -> None:
    for shape, axis in SHAPES:
        for kind, mask in masks(shape, axis).items():
            c = cases.call(shape, "float32", axis, offset=1e6)
            cases.check(c, axis=axis, mask=mask, where=f"for {shape}, axis {axis}, mask {kind}")


def test_shapes_that_broadcast(any_backend: cases.Kernel, dtype: str) -> None:
    """NumPy's rules, against the positions: x's shape without the channels."""
    c = cases.call((6, 5, 4, 7), dtype)
    whole = np.zeros((6, 4, 7), bool)
    for shape in ((), (7,), (4, 7), (1, 4, 7), (6, 1, 1), (6, 4, 1), (1, 1, 7), (1, 1, 1), (6, 4, 7)):
        mask = np.ones(shape, bool)
        mask.flat[: mask.size // 2] = False
        wanted = fastbn.forward(c.x, c.gamma, c.beta, mask=np.ascontiguousarray(np.broadcast_to(mask, whole.shape)))
        got = fastbn.forward(c.x, c.gamma, c.beta, mask=mask)
        cases.assert_same_bits(got.y, wanted.y, f"for {shape}")
        cases.assert_same_bits(
            tuple(fastbn.backward(c.dy, got.cache)), tuple(fastbn.backward(c.dy, wanted.cache)), f"for {shape}"
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [2, 33, 1025])
def test_rows_of_any_width(kernel: cases.Kernel, dtype: str, channels: int) -> None:
    """Narrow rows are gathered where the mask changes often, and wide ones are not."""
    c = cases.call((640, channels), dtype)
    for run in (1, 15, 17):
        cases.check(c, mask=np.arange(640) // run % 3 > 0, activation="relu", residual=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_true_is_no_mask(any_backend: cases.Kernel, dtype: str) -> None:
    for shape, axis in SHAPES:
        c = cases.call(shape, dtype, axis)
        wanted = fastbn.forward(c.x, c.gamma, c.beta, axis=axis)
        got = fastbn.forward(c.x, c.gamma, c.beta, axis=axis, mask=np.ones(np.delete(shape, axis), bool))
        cases.assert_same_bits(got.y, wanted.y)
        cases.assert_same_bits(tuple(fastbn.backward(c.dy, got.cache)), tuple(fastbn.backward(c.dy, wanted.cache)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", [np.nan, 60000.0])
def test_what_is_masked_does_not_matter(any_backend: cases.Kernel, dtype: str, poison: float) -> None:
    """Not even NaN: the statistics, and y where the mask is True, keep every bit."""
    for shape, axis in SHAPES:
        c = cases.call(shape, dtype, axis)
        for kind, mask in masks(shape, axis).items():
            where = f"for {shape}, mask {kind}"
            kept = np.broadcast_to(np.expand_dims(mask, axis), shape)
            spoilt = np.where(kept, c.x, np.array(poison, dtype))
            found = []
            for x in (c.x, spoilt):
                mean, var = c.running_mean.copy(), c.running_var.copy()
                y, cache = fastbn.forward(x, c.gamma, c.beta, mean, var, axis=axis, mask=mask)
                moments = fastbn.moments(x, axis=axis, mask=mask)
                found.append((y[kept], mean, var, cache.mean, cache.var, moments.mean, moments.m2))
            cases.assert_same_bits(*found, where)


def test_without_a_gradient_from_masked_positions_they_might_as_well_be_gone(
    any_backend: cases.Kernel, dtype: str
) -> None:
    """Padded sequences give what their values give when packed."""
    c = cases.call((6, 31, 5), dtype, axis=-1)
    mask = np.arange(31) < np.array([31, 4, 17, 1, 30, 9])[:, np.newaxis]
    dy = np.where(mask[..., np.newaxis], c.dy, 0).astype(dtype)
    packed, cache = fastbn.forward(c.x[mask], c.gamma, c.beta, axis=-1, activation="relu")
    wanted = fastbn.backward(c.dy[mask], cache)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, axis=-1, activation="relu", mask=mask)
    got = fastbn.backward(dy, cache)
    assert not got.dx[~mask].any()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(y[mask], packed, **close)
    np.testing.assert_allclose(got.dx[mask], wanted.dx, **close)
    np.testing.assert_allclose(got.dgamma, wanted.dgamma, **close)
    np.testing.assert_allclose(got.dbeta, wanted.dbeta, **close)


def test_masks_lie_anywhere_in_memory(any_backend: cases.Kernel) -> None:
    c = cases.call((6, 5, 8, 7))
    mask = cases.random_mask(c.x.shape)
    wanted = fastbn.forward(c.x, mask=mask).y
    doubled = np.repeat(mask, 2, axis=-1)[..., ::2]
    reversed_ = np.ascontiguousarray(mask[:, ::-1])[:, ::-1]
    read_only = mask.copy()
    read_only.flags.writeable = False
    for given in (np.asfortranarray(mask), doubled, reversed_, read_only, mask.tolist()):
        cases.assert_same_bits(fastbn.forward(c.x, mask=given).y, wanted)
    for place in cases.PLACEMENTS.values():
        got = fastbn.forward(place(c.x), mask=mask).y
        exact = oracle.forward(c.x, mask=mask)
        cases.assert_y(got, exact)


def test_the_fewest_that_train(any_backend: cases.Kernel, dtype: str) -> None:
    """Two; any number where the statistics are given."""
    c = cases.call((6, 5, 3), dtype)
    for count in (0, 1, 2):
        mask = np.zeros((6, 3), bool)
        mask.flat[:count] = True
        before = c.running_mean.copy(), c.running_var.copy()
        arguments = (c.x, c.gamma, c.beta, c.running_mean, c.running_var)
        fastbn.forward(*arguments, mask=mask, training=False)
        if count < 2:
            with pytest.raises(ValueError, match=rf"mask.*{count}.*2 or more"):
                fastbn.forward(*arguments, mask=mask)
            cases.assert_same_bits((c.running_mean, c.running_var), before)
        else:
            fastbn.forward(*arguments, mask=mask)


def test_the_cache_keeps_what_it_needs_of_the_mask(any_backend: cases.Kernel) -> None:
    """A cache may be used twice, and masks of one-off shape do not mix."""
    c = cases.call((6, 5, 8))
    masks = [cases.random_mask(c.x.shape, seed=seed) for seed in range(3)]
    caches = [fastbn.forward(c.x, c.gamma, mask=mask).cache for mask in masks]
    for mask, cache in zip(masks, caches, strict=True):
        assert cache.count == mask.sum()
        exact = oracle.forward(c.x, c.gamma, mask=mask)
        wanted = oracle.backward(c.dy, exact, c.gamma, mask=mask)
        for _ in range(2):
            cases.assert_gradients(fastbn.backward(c.dy, cache), wanted)


def test_a_mask_whose_shape_is_changed_afterwards(any_backend: cases.Kernel) -> None:
    """The cache has a view of its own, as of x."""
    c = cases.call((6, 3, 4), "float32", 1)
    mask = cases.random_mask((6, 3, 4), 1)
    cache = fastbn.forward(c.x, c.gamma, c.beta, mask=mask).cache
    expected = fastbn.backward(c.dy, cache)
    mask.shape = (24,)
    for one, same in zip(fastbn.backward(c.dy, cache), expected, strict=True):
        np.testing.assert_array_equal(one, same)
