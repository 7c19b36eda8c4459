"""Does every virtual batch have statistics of its own, as if it were alone? (Hoffer et al. 2017)"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from test_checks import assert_refused

import fastbn

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)
SIZES = (1, 2, 3, 4, 7, 8, 9, 100)


@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_are_batches(any_backend: cases.Kernel, dtype: str) -> None:
    """Values, gradients and running statistics to the bit; dgamma and dbeta are the slices' sums."""
    for shape, axis in (((8, 5, 3), 1), ((8, 4, 5), -1), ((8, 5, 300), 1), ((8, 3, 2, 33), 2)):
        c = cases.call(shape, dtype, axis)
        mask = np.ones(np.delete(shape, axis), bool)
        mask[:, 0] = False
        for size in SIZES:
            for m in (None, mask):
                _compare(c, axis, size, m)


def _compare(c: cases.Call, axis: int, size: int, mask: Array | None) -> None:
    where = f"for {c.x.shape}, axis {axis}, size {size}, mask {mask is not None}"
    options = {"axis": axis, "activation": "silu", "momentum": 0.3, "eps": 0.01}
    if mask is not None and mask[:size].sum() < 2:
        return
    mean, var = c.running_mean.copy(), c.running_var.copy()
    y, cache = fastbn.forward(
        c.x, c.gamma, c.beta, mean, var, residual=c.residual, mask=mask, virtual_batch_size=size, **options
    )
    got = fastbn.backward(c.dy, cache)
    own_mean, own_var = c.running_mean.copy(), c.running_var.copy()
    gradients = []
    for start in range(0, len(c.x), size):
        some = slice(start, start + size)
        wanted, own = fastbn.forward(
            c.x[some], c.gamma, c.beta, own_mean, own_var, residual=c.residual[some],
            mask=None if mask is None else mask[some], **options,
        )  # fmt: skip
        gradients.append(fastbn.backward(c.dy[some], own))
        cases.assert_same_bits(y[some], wanted, where)
        cases.assert_same_bits((got.dx[some], got.dresidual[some]), (gradients[-1].dx, gradients[-1].dresidual), where)
    cases.assert_same_bits((mean, var), (own_mean, own_var), where)
    for name in ("dgamma", "dbeta"):
        parts = [getattr(gradient, name).astype(np.float64) for gradient in gradients]
        allowed = sum(map(abs, parts)) * 2 * np.finfo(own_mean.dtype).eps
        assert (abs(getattr(got, name) - sum(parts)) <= allowed).all(), f"{name} {where}"


def test_one_slice_is_the_whole_batch(any_backend: cases.Kernel, dtype: str) -> None:
    c = cases.call((8, 5, 3), dtype)
    wanted, cache = fastbn.forward(c.x, c.gamma, c.beta)
    gradients = tuple(fastbn.backward(c.dy, cache))
    for size in (8, 9, 10**9, np.int64(8)):
        y, cache = fastbn.forward(c.x, c.gamma, c.beta, virtual_batch_size=size)
        cases.assert_same_bits(y, wanted)
        cases.assert_same_bits(tuple(fastbn.backward(c.dy, cache)), gradients)


def test_out_and_placements(any_backend: cases.Kernel) -> None:
    """Slices of any strides, also in place."""
    c = cases.call((8, 5, 4, 3))
    wanted, cache = fastbn.forward(c.x, c.gamma, c.beta, virtual_batch_size=3, activation="relu")
    dx = fastbn.backward(c.dy, cache).dx
    for name, place in cases.PLACEMENTS.items():
        if name in ("read-only", "byteswapped"):
            continue
        out = place(np.zeros_like(c.x))
        y, cache = fastbn.forward(place(c.x), c.gamma, c.beta, virtual_batch_size=3, activation="relu", out=out)
        assert y is out
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fastbn.backward(place(c.dy), cache).dx, dx, rtol=1e-4, atol=1e-5)
    x, gamma = c.x.astype(np.float64), np.ones(5)
    wanted, cache = fastbn.forward(x.copy(), gamma, virtual_batch_size=3)
    dx = fastbn.backward(c.dy.astype(np.float64), cache).dx
    y, cache = fastbn.forward(x, gamma, virtual_batch_size=3, out=x)
    assert y is x
    cases.assert_same_bits(y, wanted)
    np.testing.assert_allclose(fastbn.backward(c.dy.astype(np.float64), cache).dx, dx, rtol=1e-10, atol=1e-12)


def test_layer(any_backend: cases.Kernel) -> None:
    """In training each slice counts; afterwards the size does not matter, and one call is one batch."""
    c = cases.call((8, 5, 3))
    bn, plain = fastbn.BatchNorm(5, virtual_batch_size=3), fastbn.BatchNorm(5)
    y = bn(c.x)
    dx = bn.backward(c.dy)
    for some in (slice(3), slice(3, 6), slice(6, 8)):
        cases.assert_same_bits(y[some], plain(c.x[some]))
        cases.assert_same_bits(dx[some], plain.backward(c.dy[some]))
    cases.assert_same_bits((bn.running_mean, bn.running_var), (plain.running_mean, plain.running_var))
    assert bn.num_batches_tracked == 1
    cases.assert_same_bits(bn.eval()(c.x), plain.eval()(c.x))
    assert bn(c.x[:1]).shape == (1, 5, 3)


def test_cumulative_average(any_backend: cases.Kernel) -> None:
    """momentum=None weighs all virtual batches of all calls alike."""
    bn = fastbn.BatchNorm(5, momentum=None, dtype="float64", virtual_batch_size=3)
    data = [cases.call((6, 5, 3), "float64", seed=seed, offset=seed).x for seed in range(4)]
    for x in data:
        bn(x)
    parts = [x[some] for x in data for some in (slice(3), slice(3, 6))]
    np.testing.assert_allclose(bn.running_mean, np.mean([part.mean(axis=(0, 2)) for part in parts], axis=0), rtol=1e-12)
    variances = [part.var(axis=(0, 2), ddof=1) for part in parts]
    np.testing.assert_allclose(bn.running_var, np.mean(variances, axis=0), rtol=1e-12)


BAD_SIZES: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "0": ({"virtual_batch_size": 0}, ValueError, ("0", "positive")),
    "-3": ({"virtual_batch_size": -3}, ValueError, ("-3", "positive")),
    "2.0": ({"virtual_batch_size": 2.0}, TypeError, ("2.0", "integer")),
    "True": ({"virtual_batch_size": True}, TypeError, ("True", "integer")),
    "'4'": ({"virtual_batch_size": "4"}, TypeError, ("'4'", "integer")),
    "channels on axis 0": ({"virtual_batch_size": 4, "axis": 0, "x": np.ones((5, 8, 3), np.float32)}, ValueError, ()),
}


@pytest.mark.parametrize("bad", BAD_SIZES)
def test_bad_sizes(bad: str) -> None:
    changed, error, words = BAD_SIZES[bad]
    c = cases.call((8, 5, 3))
    good = {"x": c.x, "running_mean": c.running_mean, "running_var": c.running_var, "out": np.zeros_like(c.x)}
    if "x" in changed:
        good["out"] = np.zeros_like(changed["x"])
    assert_refused(fastbn.forward, good | changed, error, "virtual_batch_size", *words)
    if "x" not in changed:
        with pytest.raises(error, match="virtual_batch_size"):
            fastbn.BatchNorm(5, **changed)


def test_a_slice_of_one_value_is_refused_before_anything_is_changed() -> None:
    """The last one, when all that came before it could have been done."""
    c = cases.call((7, 5))
    good = {"x": c.x, "running_mean": c.running_mean, "running_var": c.running_var, "out": np.zeros_like(c.x)}
    assert_refused(fastbn.forward, {**good, "virtual_batch_size": 3}, ValueError, "x", "(1, 5)", "1 value", "2 or more")
    mask = np.ones(7, bool)
    mask[3:5] = False
    assert_refused(fastbn.forward, {**good, "mask": mask, "virtual_batch_size": 3}, ValueError, "mask", "2 or more")
    for shape in ((0, 5, 3), (1, 5)):
        c = cases.call(shape)
        assert_refused(fastbn.forward, {"x": c.x, "virtual_batch_size": 3}, ValueError, "x", str(shape), "2 or more")


def test_moments_of_a_batch_of_batches_are_refused() -> None:
    """Given moments are one set, virtual batches are many; and their gradient sums are nobody else's."""
    c = cases.call((8, 5, 3))
    good = {"x": c.x, "moments": fastbn.moments(c.x), "virtual_batch_size": 4}
    assert_refused(fastbn.forward, good, ValueError, "moments", "virtual_batch_size")
    cache = fastbn.forward(c.x, virtual_batch_size=4).cache
    sums = fastbn.backward_sums(c.dy, fastbn.forward(c.x).cache)
    assert_refused(fastbn.backward_sums, {"dy": c.dy, "cache": cache}, ValueError, "virtual")
    assert_refused(fastbn.backward, {"dy": c.dy, "cache": cache, "sums": sums}, ValueError, "virtual")
