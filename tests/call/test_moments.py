"""Do the parts of a batch add up to the whole, however they are cut and merged, and wherever they come from?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest
from test_checks import assert_refused

import fastbn

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)


def _in_pairs(parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [sum(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


MERGES: dict[str, Callable[[list[Any]], Any]] = {
    "sum": sum,
    "from the left": lambda parts: reduce(lambda a, b: a + b, parts),
    "from the right": lambda parts: reduce(lambda a, b: b + a, reversed(parts)),
    "in pairs": _in_pairs,
}
"""Ways to add up."""


@pytest.mark.parametrize("dtype", FLOATS)
def test_of_a_whole(kernel: cases.Kernel, dtype: str) -> None:
    """Count, mean, m2 and variances, in the statistics dtype."""
    for shape, axis in (((40, 19), 1), ((6, 5, 31), 1), ((6, 31, 5), -1), ((1, 5), 1), ((3, 4, 7, 6), 2)):
        c = cases.call(shape, dtype, axis)
        for mask in (None, cases.random_mask(shape, axis, least=1)):
            got = fastbn.moments(c.x, axis=axis, mask=mask)
            mean, var, count = oracle.moments(c.x, axis=axis, mask=mask)
            assert isinstance(got, fastbn.Moments)
            assert got.count == count
            for array in (got.mean, got.m2, got.var()):
                assert (array.dtype.name, array.shape) == (cases.statistics_dtype(dtype), (shape[axis],))
            cases.assert_moments(got, oracle.forward(c.x, axis=axis, mask=mask), c.x)
            if count > 1:
                cases.assert_sum("var", got.var(correction=1), oracle.unbiased(var, count), 10 * var)
            np.testing.assert_allclose(got.mean, mean.astype(got.mean.dtype), rtol=1e-6, atol=1e-6)


def test_offset(any_backend: cases.Kernel, dtype: str) -> None:
    """Parts whose means lie far apart, and all of them far from zero."""
    rng = np.random.default_rng(0)
    shifts = 1e6 + 1e3 * np.arange(8)
    x = (rng.standard_normal((8, 50, 3)) + shifts[:, np.newaxis, np.newaxis]).astype(dtype).reshape(400, 3)
    exact = oracle.forward(x)
    for merge in MERGES.values():
        cases.assert_moments(merge([fastbn.moments(part) for part in np.split(x, 8)]), exact, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("merge", MERGES)
def test_any_split(any_backend: cases.Kernel, dtype: str, merge: str) -> None:
    """One value at a time included; training on the shards is training on the whole."""
    c = cases.call((24, 5, 3), dtype, offset=30, spread=3)
    mask = cases.random_mask(c.x.shape, seed=4)
    for cuts in ([12], [1], [1, 2, 3, 20], list(range(1, 24)), []):
        for m in (None, mask):
            _compare(c, m, cuts, MERGES[merge])


def _compare(c: cases.Call, mask: Array | None, cuts: list[int], merge: Callable[[list[Any]], Any]) -> None:
    """Shards of c against all of it."""
    where = f"for cuts {cuts}, mask {mask is not None}"
    residual, activation = c.residual, "silu"
    exact = oracle.forward(c.x, c.gamma, c.beta, residual=residual, activation=activation, mask=mask)
    wanted = oracle.backward(c.dy, exact, c.gamma, activation=activation, mask=mask)
    mean, var = c.running_mean.copy(), c.running_var.copy()
    shards = [cases.Call(*arrays, *c[3:]) for arrays in zip(*(np.split(a, cuts) for a in c[:3]), strict=True)]
    masks = [None] * len(shards) if mask is None else np.split(mask, cuts)
    total = merge([fastbn.moments(shard.x, mask=m) for shard, m in zip(shards, masks, strict=True)])
    forwards = [
        fastbn.forward(
            shard.x, c.gamma, c.beta, *((mean, var) if not i else (None, None)), residual=shard.residual,
            activation=activation, mask=m, moments=total,
        )
        for i, (shard, m) in enumerate(zip(shards, masks, strict=True))
    ]  # fmt: skip
    sums = merge([fastbn.backward_sums(shard.dy, f.cache) for shard, f in zip(shards, forwards, strict=True)])
    assert sums.count == total.count == exact.count
    cases.assert_y(np.concatenate([f.y for f in forwards]), exact, c.gamma, activation=activation, where=where)
    cases.assert_running("running_mean", mean, c.running_mean, exact.mean, 0.1, where, size=40)
    cases.assert_running("running_var", var, c.running_var, oracle.unbiased(exact.var, exact.count), 0.1, where)
    gradients = [fastbn.backward(shard.dy, f.cache, sums=sums) for shard, f in zip(shards, forwards, strict=True)]
    got = fastbn.Gradients(
        np.concatenate([g.dx for g in gradients]), gradients[0].dgamma, gradients[0].dbeta,
        np.concatenate([g.dresidual for g in gradients]),
    )  # fmt: skip
    cases.assert_gradients(got, wanted, where)


def test_channels_first_split_along_any_axis(any_backend: cases.Kernel) -> None:
    c = cases.call((3, 5, 8, 6), "float64")
    exact = oracle.forward(c.x)
    for axis in (0, 2, 3):
        total = sum(fastbn.moments(part) for part in np.array_split(c.x, 3, axis))
        cases.assert_moments(total, exact, c.x)


def test_the_batchs_own_moments_change_nothing(any_backend: cases.Kernel, dtype: str) -> None:
    """And its own sums."""
    c = cases.call((24, 5, 3), dtype)
    running = [(c.running_mean.copy(), c.running_var.copy()) for _ in range(2)]
    wanted, cache = fastbn.forward(c.x, c.gamma, c.beta, *running[0])
    got, given = fastbn.forward(c.x, c.gamma, c.beta, *running[1], moments=fastbn.moments(c.x))
    np.testing.assert_array_max_ulp(got + 10, wanted + 10, 2)
    for one, other in zip(*running, strict=True):
        np.testing.assert_array_max_ulp(one, other, 1)
    sums = fastbn.backward_sums(c.dy, given)
    for one, other in zip(fastbn.backward(c.dy, given, sums=sums), fastbn.backward(c.dy, cache), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)


def test_sums(any_backend: cases.Kernel, dtype: str) -> None:
    """What they are, and what they become in backward."""
    c = cases.call((24, 5, 3), dtype)
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, activation="relu")
    wanted = fastbn.backward(c.dy, cache)
    sums = fastbn.backward_sums(c.dy, cache)
    assert sums.count == 72
    for array, gradient in ((sums.sum_dy, wanted.dbeta), (sums.sum_dy_xhat, wanted.dgamma)):
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_allclose(array, gradient, rtol=1e-6)
    twice = sums + sums
    assert twice.count == 144
    np.testing.assert_allclose(twice.sum_dy, 2 * sums.sum_dy, rtol=1e-7)


def test_frozen_sums(any_backend: cases.Kernel) -> None:
    """With given statistics dx needs none, but dgamma and dbeta are those of all workers."""
    c = cases.call((24, 5, 3), "float64")
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var, training=False)
    alone = fastbn.backward(c.dy, cache)
    sums = fastbn.backward_sums(c.dy, cache)
    both = fastbn.backward(c.dy, cache, sums=sums + sums)
    cases.assert_same_bits(both.dx, alone.dx)
    np.testing.assert_allclose(both.dgamma, 2 * alone.dgamma, rtol=1e-12)
    np.testing.assert_allclose(both.dbeta, 2 * alone.dbeta, rtol=1e-12)


def test_nothing_changes_moments(any_backend: cases.Kernel) -> None:
    """Neither merging them nor writing to the arrays that they hand out."""
    x = cases.call((24, 5, 3), "float64").x
    a, b = fastbn.moments(x[:10]), fastbn.moments(x[10:])
    before = a.mean.copy(), a.m2.copy(), a.count
    total = a + b
    total += a
    for array in (a.mean, a.m2, a.var()):
        if array.flags.writeable:
            array[...] = 7
    cases.assert_same_bits((a.mean, a.m2), before[:2])
    assert a.count == before[2]


def test_merging_is_symmetric(any_backend: cases.Kernel, dtype: str) -> None:
    x = cases.call((24, 5, 3), dtype).x
    a, b = fastbn.moments(x[:10]), fastbn.moments(x[10:])
    for one, other in (((a + b).mean, (b + a).mean), ((a + b).m2, (b + a).m2)):
        np.testing.assert_array_max_ulp(one, other, 1)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_they_travel(duplicate: Any) -> None:
    """To other processes, with every digit that merging needs."""
    x = cases.call((24, 5, 3), "float64", offset=1e6).x
    parts = [fastbn.moments(part) for part in np.split(x, 4)]
    wanted, got = sum(parts), sum(duplicate(part) for part in parts)
    cases.assert_same_bits((got.mean, got.m2), (wanted.mean, wanted.m2))
    _, cache = fastbn.forward(x, moments=wanted)
    sums = fastbn.backward_sums(x, cache)
    cases.assert_same_bits(duplicate(sums).sum_dy_xhat, sums.sum_dy_xhat)


def test_empty_parts_count_nothing(any_backend: cases.Kernel, dtype: str) -> None:
    x = cases.call((24, 5, 3), dtype).x
    wanted = fastbn.moments(x)
    nothing = (fastbn.moments(x[:0]), fastbn.moments(x[:4], mask=np.zeros((4, 3), bool)))
    for empty in nothing:
        assert empty.count == 0
        for total in (empty + wanted, wanted + empty, sum((empty, empty, wanted))):
            assert total.count == 72
            cases.assert_same_bits((total.mean, total.m2), (wanted.mean, wanted.m2))


def test_poison_stays_in_its_channel(any_backend: cases.Kernel, dtype: str) -> None:
    x = cases.call((24, 5, 3), dtype).x
    wanted = fastbn.moments(x[:10]) + fastbn.moments(x[10:])
    x[3, 2] = np.nan
    x[20, 4, 1] = np.inf
    got = fastbn.moments(x[:10]) + fastbn.moments(x[10:])
    clean = [0, 1, 3]
    cases.assert_same_bits((got.mean[clean], got.m2[clean]), (wanted.mean[clean], wanted.m2[clean]))
    assert np.isnan(got.m2[[2, 4]]).all()


def test_large_values(any_backend: cases.Kernel) -> None:
    """Whose squares overflow float32 while the variance of the two together does not overflow what it is kept in."""
    x = np.array([[3e38], [-3e38], [1e38], [2e38]], np.float32)
    total = fastbn.moments(x[:2]) + fastbn.moments(x[2:])
    exact = oracle.forward(x)
    y, _ = fastbn.forward(x, moments=total)
    cases.assert_y(y, exact)


def test_data_larger_than_memory(any_backend: cases.Kernel, tmp_path: Path) -> None:
    """A memory map, streamed through moments and then normalized block by block."""
    rng = np.random.default_rng(0)
    data = np.memmap(tmp_path / "data", np.float16, "w+", shape=(1000, 8, 30))
    data[...] = rng.standard_normal(data.shape) * 3 + 20
    out = np.memmap(tmp_path / "out", np.float16, "w+", shape=data.shape)
    blocks = [slice(start, start + 130) for start in range(0, 1000, 130)]
    total = sum(fastbn.moments(data[block]) for block in blocks)
    for block in blocks:
        fastbn.forward(data[block], moments=total, out=out[block])
    cases.assert_y(np.asarray(out), oracle.forward(data))


# Bad arguments -------------------------------------------------------------------------------------------------------


def arguments(**others: Any) -> dict[str, Any]:
    c = cases.call((24, 5, 3))
    return {"x": c.x, "running_mean": c.running_mean, "running_var": c.running_var, **others}


def _moments(shape: tuple[int, ...] = (24, 5, 3), dtype: str = "float32") -> Any:
    return fastbn.moments(cases.call(shape, dtype).x)


BAD_MOMENTS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "channels": (lambda: _moments((24, 4, 3)), ValueError, ("moments", "4", "5")),
    "dtype": (lambda: _moments(dtype="float64"), TypeError, ("moments", "float64", "float32")),
    "a sum of nothing": (lambda: sum([]), TypeError, ("moments", "0 (int)", "Moments, or None")),
    "a number": (lambda: np.float32(1), TypeError, ("moments", "1.0", "float32", "Moments, or None")),
    "a string": (lambda: "m", TypeError, ("moments", "'m' (str)", "Moments, or None")),
    "a class": (lambda: fastbn.Moments, TypeError, ("moments", "type", "Moments, or None")),
    "sums": (lambda: fastbn.Sums(72, np.zeros(5), np.zeros(5)), TypeError, ("moments", "Sums", "Moments, or None")),
    "a tuple": (lambda: (np.zeros(5), np.ones(5)), TypeError, ("moments", "tuple")),
    "one value": (lambda: fastbn.moments(cases.call((1, 5)).x), ValueError, ("moments", "1", "2 or more")),
    "no value": (lambda: fastbn.moments(cases.call((0, 5)).x), ValueError, ("moments", "0", "2 or more")),
}


@pytest.mark.parametrize("bad", BAD_MOMENTS)
def test_bad_moments(bad: str) -> None:
    make, error, words = BAD_MOMENTS[bad]
    assert_refused(fastbn.forward, arguments(moments=make()), error, *words)


def test_moments_are_for_training() -> None:
    assert_refused(fastbn.forward, arguments(moments=_moments(), training=False), ValueError, "moments", "training")


def test_bad_input_of_moments() -> None:
    x = cases.call((24, 5, 3)).x
    bad = {
        "x": (np.zeros((3, 4), int), TypeError, ("int64", "float32")),
        "axis": (3, ValueError, ("3", "-3 to 2")),
        "mask": (np.zeros((24, 5), bool), ValueError, ("(24, 5)", "(24, 3)")),
        "backend": ("cuda", ValueError, ("'cuda'",)),
    }
    for name, (value, error, words) in bad.items():
        assert_refused(fastbn.moments, {"x": x, name: value}, error, name, *words)


def test_bad_sums() -> None:
    c = cases.call((24, 5, 3))
    _, cache = fastbn.forward(c.x, c.gamma, c.beta)
    sums = fastbn.backward_sums(c.dy, cache)
    other = fastbn.backward_sums(c.dy[:, :4].copy(), fastbn.forward(c.x[:, :4].copy()).cache)
    wide = fastbn.backward_sums(c.dy.astype(float), fastbn.forward(c.x.astype(float)).cache)
    for bad, error, words in (
        (other, ValueError, ("4", "5")),
        (wide, TypeError, ("float64", "float32")),
        (0, TypeError, ("int",)),
        ((sums.sum_dy, sums.sum_dy_xhat), TypeError, ("tuple",)),
        (_moments(), TypeError, ("Moments",)),
    ):
        assert_refused(
            fastbn.backward, {"dy": c.dy, "cache": cache, "sums": bad, "out": np.zeros_like(c.x)}, error, "sums", *words
        )
    assert_refused(fastbn.backward_sums, {"dy": c.dy[1:], "cache": cache}, ValueError, "dy", "(23, 5, 3)")
    assert_refused(fastbn.backward_sums, {"dy": c.dy, "cache": None}, TypeError, "cache", "NoneType")


def test_what_does_not_add_up() -> None:
    a = _moments()
    sums = fastbn.backward_sums(cases.call((24, 5, 3)).dy, fastbn.forward(cases.call((24, 5, 3)).x).cache)
    for one, other in ((a, 1), (a, None), (a, np.zeros(5)), (a, sums), (sums, a), (sums, 2.0)):
        with pytest.raises(TypeError):
            one + other
        with pytest.raises(TypeError):
            other + one
    with pytest.raises(ValueError, match=r"4.*5|5.*4"):
        a + _moments((24, 4, 3))
    with pytest.raises(TypeError, match="float64"):
        a + _moments(dtype="float64")


def test_made_from_numbers(any_backend: cases.Kernel) -> None:
    """As another library, or another machine, has them."""
    x = cases.call((24, 5, 3), "float64").x
    rows = x.swapaxes(0, 1).reshape(5, -1)
    made = fastbn.Moments(72, rows.mean(axis=1), rows.var(axis=1) * 72)
    np.testing.assert_allclose(made.var(), fastbn.moments(x).var(), rtol=1e-12)
    got = fastbn.forward(x, moments=made).y
    np.testing.assert_allclose(got, fastbn.forward(x).y, rtol=1e-10, atol=1e-12)
    sums = fastbn.Sums(72, np.ones(5), np.zeros(5))
    assert (sums + sums).sum_dy.tolist() == [2] * 5


@pytest.mark.parametrize("kind", [fastbn.Moments, fastbn.Sums])
def test_bad_numbers(kind: Any) -> None:
    first, second = ("mean", "m2") if kind is fastbn.Moments else ("sum_dy", "sum_dy_xhat")
    good = {"count": 3, first: np.zeros(2, np.float32), second: np.ones(2, np.float32)}
    for name, value, error in (
        ("count", -1, ValueError),
        ("count", 1.5, TypeError),
        ("count", True, TypeError),
        (first, np.zeros(2, int), TypeError),
        (first, np.zeros(2, np.float16), TypeError),
        (second, np.zeros(2, np.float16), TypeError),
        (second, np.zeros(3, np.float32), ValueError),
        (second, np.float32(1), ValueError),
        (first, np.ma.masked_array(np.zeros(2, np.float32)), TypeError),
    ):
        assert_refused(kind, good | {name: value}, error, name if name != first else "")
    if kind is fastbn.Moments:
        assert_refused(kind, good | {"m2": -np.ones(2, np.float32)}, ValueError, "m2", "-1")


def test_sums_of_more_than_the_moments_are_refused() -> None:
    """They cannot belong to the batches that the moments count."""
    c = cases.call((24, 5, 3))
    cache = fastbn.forward(c.x).cache
    sums = fastbn.backward_sums(c.dy, cache)
    assert_refused(fastbn.backward, {"dy": c.dy, "cache": cache, "sums": sums + sums}, ValueError, "sums", "144", "72")


def test_bad_correction() -> None:
    m = _moments()
    for bad in (-1, 72, 100, np.nan, np.inf):
        with pytest.raises(ValueError, match="correction"):
            m.var(correction=bad)
    for wrong in ("1", None, [1]):
        with pytest.raises(TypeError, match="correction"):
            m.var(correction=wrong)


@pytest.mark.parametrize("given", [sum([]), 1.5, "s", b"s", np.int64(3), False], ids=repr)
def test_bad_sums_are_shown(any_backend: cases.Kernel, given: Any) -> None:
    """0 is what sum() gives for no sums at all."""
    c = cases.call((24, 5, 3))
    arguments = {"dy": c.dy, "cache": fastbn.forward(c.x).cache, "sums": given}
    assert_refused(fastbn.backward, arguments, TypeError, "sums", repr(given), type(given).__name__, "Sums, or None")


def test_a_number_that_python_does_not_print() -> None:
    """Of more than 4300 digits: the message is still about the argument."""
    x = np.ones((4, 5))
    for name in ("moments", "eps", "momentum", "axis", "correction", "training", "activation", "mask", "backend"):
        with pytest.raises((TypeError, ValueError), match=f"{name}.*allowed"):
            fastbn.forward(x, **{name: 10**5000})
    with pytest.raises(ValueError, match=r"virtual_batch_size.*allowed"):
        fastbn.forward(x, virtual_batch_size=10**5000, moments=fastbn.moments(x))
    for name in ("num_features", "num_batches_tracked"):
        with pytest.raises(ValueError, match=f"{name}.*allowed"):
            setattr(fastbn.BatchNorm(5), name, 10**5000)


# Equality ------------------------------------------------------------------------------------------------------------


def _pair(kind: type[Any], count: int = 3, first: Any = (1.0, 2.0), second: Any = (3.0, 4.0), dtype: Any = "f8") -> Any:
    return kind(count, np.array(first, dtype), np.array(second, dtype))


@pytest.mark.parametrize("kind", [fastbn.Moments, fastbn.Sums])
def test_equal(kind: Any) -> None:
    """To what has all the same inside, as its hash is."""
    one = _pair(kind)
    for other in (_pair(kind), copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert one == other
        assert (one != other) is False
        assert hash(one) == hash(other)
        assert {one: "found"}[other] == "found"
    nan = _pair(kind, first=(np.nan, 2.0))
    assert nan == _pair(kind, first=(np.nan, 2.0))
    assert hash(nan) == hash(_pair(kind, first=(np.nan, 2.0)))


@pytest.mark.parametrize("kind", [fastbn.Moments, fastbn.Sums])
@pytest.mark.parametrize(
    "changed",
    [
        {"count": 4},
        {"first": (1.0, np.nextafter(2.0, 3))},
        {"second": (3.0, 5.0)},
        {"first": (np.nan, 2.0)},
        {"first": (1.0,), "second": (3.0,)},
        {"dtype": "f4"},
    ],
    ids=str,
)
def test_not_equal(kind: Any, changed: dict[str, Any]) -> None:
    one, other = _pair(kind), _pair(kind, **changed)
    assert one != other
    assert (one == other) is False
    assert hash(one) != hash(other)


def test_equal_to_the_last_digit(any_backend: cases.Kernel) -> None:
    """What is kept beside the mean counts, too; the same batch in the same parts gives the same."""
    x = cases.call((24, 5, 3), offset=1e6).x
    parts = [fastbn.moments(part) for part in np.split(x, 4)]
    assert sum(parts) == sum(fastbn.moments(part) for part in np.split(x.copy(), 4))
    total = fastbn.moments(x)
    rounded = fastbn.Moments(total.count, total.mean, total.m2)
    assert rounded.mean.tolist() == total.mean.tolist()
    assert rounded != total
    assert _pair(fastbn.Sums, first=(0.0, 1.0)) != _pair(fastbn.Sums, first=(-0.0, 1.0))


def test_equal_to_nothing_else() -> None:
    moments, sums = _pair(fastbn.Moments), _pair(fastbn.Sums)
    for one, other in ((moments, sums), (sums, moments), (moments, 0), (moments, None), (sums, "x"), (moments, (3, 1))):
        assert one != other
        assert (one == other) is False
        assert type(one).__eq__(one, other) is NotImplemented


# Between processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_buffers_lose_nothing(dtype: str) -> None:
    x = (1e6 + np.random.default_rng(0).standard_normal((50, 3))).astype(dtype)
    moments, (_, cache) = fastbn.moments(x), fastbn.forward(x)
    sums = fastbn.backward_sums(np.ones_like(x), cache)
    for one in (moments, sums, moments + moments):
        buffer = one.to_buffer()
        rows = 2 if one is sums else 3
        assert (buffer.dtype, buffer.shape) == (np.float64, (1 + rows * 3,))
        assert buffer[0] == one.count
        for given in (buffer, buffer.byteswap().view(buffer.dtype.newbyteorder())):
            assert type(one).from_buffer(given, dtype) == one
    again = fastbn.Moments.from_buffer(moments.to_buffer(), dtype)
    assert np.array_equal(fastbn.forward(x, moments=again).y, fastbn.forward(x, moments=moments).y)


def test_a_buffer_is_copied_both_ways() -> None:
    moments = fastbn.moments(np.arange(6.0).reshape(3, 2))
    buffer = moments.to_buffer()
    again = fastbn.Moments.from_buffer(buffer, "float64")
    buffer[:] = 7
    assert again == moments
    moments.to_buffer()[:] = 7
    assert again == moments


def test_moments_from_public_fields_keep_the_mean() -> None:
    """Their mean alone is off by 0.017 standard deviations at this offset, in float32."""
    x = (1e6 + np.random.default_rng(0).standard_normal((1000, 4))).astype(np.float32)
    m, y = fastbn.moments(x), fastbn.forward(x).y
    again = fastbn.Moments(m.count, m.mean, m.m2, mean_low=m.mean_low)
    assert again.dtype == np.float32
    assert again.mean_low.dtype == np.float64
    exact = x.astype(np.longdouble).mean(axis=0)
    assert (abs(again.mean.astype(np.longdouble) + again.mean_low - exact) <= 1e-9).all()
    assert abs(fastbn.forward(x, moments=again).y - y).max() <= 1e-6
    without = fastbn.Moments(m.count, m.mean, m.m2)
    assert abs(fastbn.forward(x, moments=without).y - y).max() > 1e-3


def test_the_statistics_dtype_of_moments() -> None:
    mean, m2 = np.zeros(2), np.ones(2)
    assert fastbn.Moments(3, mean, m2).dtype == np.float64
    assert fastbn.Moments(3, mean, m2, dtype="float32").dtype == np.float32
    assert fastbn.Moments(3, mean.astype("f4"), m2).dtype == np.float32
    assert fastbn.Moments(3, mean, m2, dtype=np.float32).m2.dtype == np.float32


@pytest.mark.parametrize(
    ("error", "name", "make"),
    [
        (TypeError, "dtype", lambda: fastbn.Moments(3, np.zeros(2), np.ones(2), dtype="float16")),
        (TypeError, "dtype", lambda: fastbn.Moments.from_buffer(np.zeros(4), "int32")),
        (ValueError, "mean_low", lambda: fastbn.Moments(3, np.zeros(2), np.ones(2), mean_low=np.zeros(3))),
        (TypeError, "mean_low", lambda: fastbn.Moments(3, np.zeros(2), np.ones(2), mean_low=np.zeros(2, int))),
        (TypeError, "buffer", lambda: fastbn.Moments.from_buffer(np.zeros(4, "f4"), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.zeros(5), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.zeros(0), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.zeros((4, 1)), "float32")),
        (ValueError, "buffer", lambda: fastbn.Sums.from_buffer(np.zeros(4), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.array([0.5, 0, 0, 0]), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.array([-1.0, 0, 0, 0]), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.array([np.nan, 0, 0, 0]), "float32")),
        (ValueError, "buffer", lambda: fastbn.Moments.from_buffer(np.array([2.0**54, 0, 0, 0]), "float32")),
        (ValueError, "m2", lambda: fastbn.Moments.from_buffer(np.array([2.0, 0, 0, -1]), "float32")),
        (ValueError, "moments", lambda: fastbn.Moments(2**53 + 1, np.zeros(1), np.ones(1)).to_buffer()),
    ],
)
def test_bad_buffers(error: type[Exception], name: str, make: Callable[[], object]) -> None:
    with pytest.raises(error, match=rf"^{name}: got .*; allowed: "):
        make()
