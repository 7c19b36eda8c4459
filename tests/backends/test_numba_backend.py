"""Does the Numba backend fill what the protocol says, on every path of its own: its splits, its threads, its cache?"""

from __future__ import annotations

import os
import textwrap
from functools import lru_cache
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest

numba = pytest.importorskip("numba", reason='Numba is not installed: pip install "fastbn[numba]"')

from fastbn._backends import SAVED_ROWS, numba_backend  # noqa: E402
from fastbn.call import record  # noqa: E402
from fastbn.call.record import Options  # noqa: E402

Array = np.ndarray[Any, Any]
LONG = np.longdouble
EPS = 1e-5
ROUNDING = {"float32": 1, "float64": 32}  # the sums of float64 data round like the data itself
IDENTITY, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, SIGMOID = range(7)
ACTIVATIONS = {
    "identity": (IDENTITY, 0.0),
    "relu": (RELU, 0.0),
    "relu6": (RELU6, 0.0),
    "leaky_relu": (LEAKY_RELU, 0.01),
    "leaky_relu, steep": (LEAKY_RELU, 1.5),
    "silu": (SILU, 0.0),
    "hardswish": (HARDSWISH, 0.0),
    "sigmoid": (SIGMOID, 0.0),
}
KINKS = {RELU: (0,), RELU6: (0, 6), LEAKY_RELU: (0,), HARDSWISH: (-3, 3)}
SHAPES = {
    "rows that recur": (3000, 37, 1),
    "rows, the last unit ragged": (1031, 50, 1),
    "rows, by channels": (150, 1030, 1),
    "wide rows": (300, 700, 1),  # which are read twice: see `small_strips`
    "one channel": (70_001, 1, 1),
    "few values": (3, 5, 2),
    "small planes": (9, 130, 49),
    "small planes, many samples": (500, 6, 15),
    "planes": (16, 6, 1763),
    "planes that are cut": (2, 3, 30_301),
}


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than the cache, and is reduced as a whole before it is mapped, is so from half a MiB on."""
    monkeypatch.setattr(numba_backend, "STRIP_BYTES", 1 << 19)


def at_shapes(*names: str) -> Any:
    return pytest.mark.parametrize("shape", [SHAPES[name] for name in names or SHAPES], ids=names or tuple(SHAPES))


# ---- what is right: textbook batch norm in long double ----


def column(per_channel: Array) -> Array:
    return per_channel[:, np.newaxis]


def total(terms: Array) -> Array:
    return terms.sum(axis=(0, 2))


def activated(activation: int, slope: float, z: Array) -> Array:
    gate = np.clip(z + 3, 0, 6) / 6
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-z))
    leaky = np.where(z > 0, z, slope * z)
    return (z, np.maximum(z, 0), np.clip(z, 0, 6), leaky, z * sigmoid, z * gate, sigmoid)[activation]


def steepness(activation: int, slope: float, z: Array) -> Array:
    """The activation's derivative; at a kink that of its left side, or of the side without slope."""
    with np.errstate(over="ignore"):
        up, down = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    hard = np.where(z <= -3, 0, np.where(z < 3, z / 3 + LONG(0.5), 1))
    leaky = np.where(z > 0, LONG(1), LONG(slope))
    inside = (z > 0) & (z < 6)
    return (np.ones_like(z), z > 0, inside, leaky, up * (1 + z * down), hard, up * down)[activation] * LONG(1)


def ulp(values: Array, dtype: Any) -> Array:
    return np.spacing(np.maximum(abs(values), np.finfo(dtype).tiny).astype(dtype)).astype(LONG)


class Call(NamedTuple):
    """The arrays of one call."""

    x: Array
    dy: Array
    residual: Array
    gamma: Array
    beta: Array
    mask: Array


@lru_cache(maxsize=2)
def call(shape: tuple[int, int, int], dtype: str, offset: float = 0.5, seed: int = 0) -> Call:
    """Random arrays, read-only, since tests that follow each other share them."""
    rng = np.random.default_rng([seed, *shape])
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    gamma, beta = (2 * rng.standard_normal((2, shape[1]))).astype(dtype)
    mask = rng.random((shape[0], shape[2])) < 0.7
    mask[0, 0] = mask[-1, -1] = True
    made = Call(x + np.asarray(offset, dtype), dy, residual, gamma, beta, mask)
    for array in made:
        array.flags.writeable = False
    return made


class Normalized(NamedTuple):
    """What the statistics make of x; and twice the last place of xhat, but at least of 1."""

    mean: Array
    var: Array
    inv_std: Array
    xhat: Array
    places: Array


_LAST: dict[bytes, Normalized] = {}


def normalized(c: Call, mask: Array | None, given: tuple[Array, Array] | None) -> Normalized:
    """That of the last call is kept: tests ask for it with one activation after the other."""
    told = sha1(repr((c.x.shape, c.x.dtype)).encode() + c.x.tobytes(), usedforsecurity=False)
    for array in (mask, *(given or (None, None))):
        told.update(b"None" if array is None else array.tobytes())
    key = told.digest()
    if key not in _LAST:
        x = c.x.astype(LONG)
        if given is None:
            kept = np.ones(()) if mask is None else mask[:, np.newaxis]
            count = x.size // x.shape[1] if mask is None else mask.sum()
            mean = total(np.where(kept, x, 0)) / LONG(count)
            var = total(np.where(kept, x - column(mean), 0) ** 2) / LONG(count)
        else:
            mean, var = (row.astype(LONG) for row in given)
        inv_std = 1 / np.sqrt(var + LONG(EPS))
        xhat = (x - column(mean)) * column(inv_std)
        _LAST.clear()
        _LAST[key] = Normalized(mean, var, inv_std, xhat, 2 * ulp(np.maximum(1, abs(xhat)), c.x.dtype))
    return _LAST[key]


class Exact(NamedTuple):
    """Of a forward call; and how far y may be from it."""

    mean: Array
    var: Array
    inv_std: Array
    xhat: Array
    z: Array
    y: Array
    allowed: Array


def exact_forward(
    c: Call, activation: int, slope: float, residual: bool, mask: Array | None, given: tuple[Array, Array] | None = None
) -> Exact:
    *known, xhat, places = normalized(c, mask, given)
    z = xhat * column(c.gamma.astype(LONG)) + column(c.beta.astype(LONG)) + (c.residual if residual else 0)
    y = activated(activation, slope, z)
    dtype = c.x.dtype
    allowed = places * column(abs(c.gamma)) + ulp(z, dtype)  # the contract's
    if activation not in (IDENTITY, RELU):
        allowed = max(1.1, slope) * allowed + 4 * ulp(y, dtype)
    return Exact(*known, xhat, z, y, ROUNDING[dtype.name] * allowed)


def exact_gradients(
    c: Call, exact: Exact, dy: Array, activation: int, slope: float, mask: Array | None, frozen: bool
) -> dict[str, tuple[Array, Array]]:
    """Each gradient, and how far it may be from that."""
    dz = dy * steepness(activation, slope, exact.z)
    count = total(np.ones_like(dz)) if mask is None else LONG(mask.sum())
    kept = LONG(1) if mask is None else mask[:, np.newaxis].astype(LONG)
    factor = column(exact.inv_std * c.gamma.astype(LONG))
    sum_dz, sum_dz_xhat = total(dz), total(dz * exact.xhat)
    rest = LONG(0) if frozen else kept * (column(sum_dz / count) + exact.xhat * column(sum_dz_xhat / count))
    dx = factor * (dz - rest)
    eps = 8 * ROUNDING[c.x.dtype.name] * np.finfo(c.x.dtype).eps
    size, xhat = abs(dy.astype(LONG)), np.maximum(1, abs(exact.xhat))
    if activation in (IDENTITY, RELU, RELU6):
        size = abs(dz)
    sizes = total(size), total(size * xhat)
    terms = size if frozen else size + column(sizes[0] / count) + xhat * column(sizes[1] / count)
    smooth = eps if activation not in (IDENTITY, RELU, RELU6) else 1e-14
    return {
        "dx": (dx, eps * abs(factor) * terms),
        "dresidual": (dz, (0 if smooth < eps else eps) * size),
        "dgamma": (sum_dz_xhat, ulp(sum_dz_xhat, c.x.dtype) + smooth * sizes[1]),
        "dbeta": (sum_dz, ulp(sum_dz, c.x.dtype) + smooth * sizes[0]),
    }


def assert_close(name: str, got: Array, exact: Array, allowed: Array) -> None:
    assert not np.isnan(got).any(), f"NaN in {name}"
    worst = float(np.max(abs(got - exact) / (allowed + np.finfo(LONG).tiny), initial=0))
    assert worst <= 1, f"{name} is {worst:.3g} times as far from exact as allowed"


# ---- what the backend says ----


class Forward(NamedTuple):
    y: Array
    saved: Array
    running_mean: Array
    running_var: Array


def forward(
    c: Call,
    activation: int = IDENTITY,
    slope: float = 0.0,
    residual: bool = False,
    mask: Array | None = None,
    eps: float = EPS,
    threads: int = 1,
) -> Forward:
    channels = c.x.shape[1]
    got = Forward(np.empty_like(c.x), np.empty((6, channels)), np.full(channels, 3, c.x.dtype), np.ones_like(c.gamma))
    numba_backend.forward(record.Call(
        x=c.x, residual=c.residual if residual else None, mask=mask, gamma=c.gamma, beta=c.beta,
        running_mean=got.running_mean, running_var=got.running_var, momentum=0.1, correction=1, eps=eps,
        options=Options(activation, slope), y=got.y, saved=got.saved, threads=threads,
    ))  # fmt: skip
    return got


def infer(
    c: Call, mean: Array | None, var: Array | None, saved: Array | None, activation: int = IDENTITY, slope: float = 0.0,
    residual: bool = False, threads: int = 1,
) -> Array:  # fmt: skip
    y = np.empty_like(c.x)
    verb = numba_backend.apply if mean is None else numba_backend.infer
    verb(record.Call(
        x=c.x, residual=c.residual if residual else None, gamma=c.gamma, beta=c.beta, running_mean=mean,
        running_var=var, eps=EPS, options=Options(activation, slope), y=y, saved=saved, threads=threads,
    ))  # fmt: skip
    return y


def backward(
    c: Call, saved: Array, activation: int = IDENTITY, slope: float = 0.0, residual: bool = False,
    mask: Array | None = None, frozen: bool = False, sums: Array | None = None, from_y: Array | None = None,
    threads: int = 1, dy: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    got = {"dx": np.empty_like(c.x), "dgamma": np.empty_like(c.gamma), "dbeta": np.empty_like(c.beta)}
    if residual and activation != IDENTITY:
        got["dresidual"] = np.empty_like(c.x)
    count = c.x.size / c.x.shape[1] if mask is None else mask.sum()
    numba_backend.backward(record.BackwardCall(
        dy=c.dy if dy is None else dy, x=c.x if from_y is None else from_y, residual=c.residual if residual else None,
        mask=mask, saved=saved, counted=float(count), frozen=frozen, sums=sums, options=Options(activation, slope),
        from_y=from_y is not None, dx=got["dx"], dresidual=got.get("dresidual"), dgamma=got["dgamma"],
        dbeta=got["dbeta"], threads=threads,
    ))  # fmt: skip
    return got


def away_from_kinks(c: Call, exact: Exact, activation: int) -> Array:
    """The dy of a call, but 0 where rounding decides on which side of a kink z is."""
    near = [abs(exact.z - kink) < 1e-3 for kink in KINKS.get(activation, ())]
    return np.where(np.any(near, axis=0), 0, c.dy).astype(c.dy.dtype) if near else c.dy


def check(c: Call, activation: int, slope: float, *, residual: bool, masked: bool, frozen: bool = False) -> None:
    """Holds a forward and a backward call against the exact results."""
    mask = c.mask if masked else None
    given = (c.beta, abs(c.gamma) + 1) if frozen else None
    exact = exact_forward(c, activation, slope, residual, None if frozen else mask, given)
    if frozen:
        saved = np.empty((len(SAVED_ROWS), c.x.shape[1]))
        y = infer(c, *given, saved, activation, slope, residual)
    else:
        y, saved, running_mean, running_var = forward(c, activation, slope, residual, mask)
        count = LONG(c.x.size // c.x.shape[1] if mask is None else mask.sum())
        for name, got, old, new in (
            ("running_mean", running_mean, 3, exact.mean),
            ("running_var", running_var, 1, exact.var * count / (count - 1)),
        ):
            wanted = old * LONG(0.9) + LONG(0.1) * new
            assert_close(name, got, wanted, 2 * ulp(abs(wanted) + 3, got.dtype) + 1e-14)
    assert_close("y", y, exact.y, exact.allowed)
    dy = away_from_kinks(c, exact, activation)
    gradients = backward(c, saved, activation, slope, residual, mask, frozen, dy=dy)
    wanted_gradients = exact_gradients(c, exact, dy, activation, slope, mask, frozen)
    for name, got in gradients.items():
        assert_close(name, got, *wanted_gradients[name])


# ---- the protocol ----


def test_dtypes() -> None:
    assert frozenset({"float32", "float64"}) == numba_backend.DTYPES


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@at_shapes("rows that recur", "small planes", "planes")
def test_activation(activation: str, residual: bool, shape: tuple[int, int, int], dtype: str) -> None:
    check(call(shape, dtype), *ACTIVATIONS[activation], residual=residual, masked=False)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@at_shapes()
def test_split(shape: tuple[int, int, int], masked: bool, frozen: bool, dtype: str) -> None:
    for activation, residual in ((IDENTITY, False), (RELU, True)):
        check(call(shape, dtype), activation, 0.0, residual=residual, masked=masked, frozen=frozen)


@at_shapes("rows that recur", "wide rows", "small planes", "planes", "planes that are cut")
def test_what_the_mask_leaves_out_is_in_no_statistic(shape: tuple[int, int, int], dtype: str) -> None:
    c = call(shape, dtype)
    wild = c._replace(x=np.where(c.mask[:, np.newaxis], c.x, np.asarray(np.nan, dtype)))
    cases.assert_same_bits(forward(wild, mask=c.mask).saved, forward(c, mask=c.mask).saved)


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@at_shapes()
def test_offset(shape: tuple[int, int, int], offset: float) -> None:
    c = call(shape, "float32", offset)
    for residual in (False, True):
        exact = exact_forward(c, IDENTITY, 0, residual, None)
        assert_close("y", forward(c, residual=residual).y, exact.y, exact.allowed)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@at_shapes()
def test_moments(shape: tuple[int, int, int], masked: bool, dtype: str) -> None:
    c = call(shape, dtype, offset=1e4)
    mask = c.mask if masked else None
    exact, into = exact_forward(c, IDENTITY, 0, False, mask), np.empty((3, shape[1]))
    numba_backend.moments(record.Call(x=c.x, mask=mask, moments=into))
    count = c.x.size // shape[1] if mask is None else int(mask.sum())
    assert_close("the mean", into[0].astype(LONG) + into[1], exact.mean, 1e-12 + 0 * exact.mean)
    assert_close("m2", into[2], exact.var * count, 1e-12 * count * (exact.var + 1e-4))
    np.testing.assert_array_equal(into[:2], forward(c, mask=mask).saved[:2])


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_given_rows(activation: str, dtype: str) -> None:
    """With mean None the statistics are those that stand in saved; infer fills the other rows."""
    c = call((9, 130, 49), dtype)
    y, saved, *_ = forward(c, *ACTIVATIONS[activation])
    given = np.full_like(saved, np.nan)
    given[:3] = saved[:3]
    cases.assert_same_bits(infer(c, None, None, given, *ACTIVATIONS[activation]), y)
    np.testing.assert_allclose(given, saved, rtol=1e-15)


@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid"])
@at_shapes("rows that recur", "small planes", "planes that are cut")
def test_sums(activation: str, shape: tuple[int, int, int], dtype: str) -> None:
    """Those of the whole are what backward takes itself; and backward uses what it is given."""
    c = call(shape, dtype)
    activation_, slope = ACTIVATIONS[activation]
    saved = forward(c, activation_, slope, residual=True).saved
    sums = np.empty((2, shape[1]))
    numba_backend.backward_sums(
        record.BackwardCall(
            dy=c.dy, x=c.x, residual=c.residual, saved=saved, options=Options(activation_, slope), sums=sums
        )
    )
    alone = backward(c, saved, activation_, slope, residual=True)
    given = backward(c, saved, activation_, slope, residual=True, sums=sums)
    for name in alone:
        cases.assert_same_bits(given[name], alone[name], name)
    cases.assert_same_bits(alone["dbeta"], sums[0].astype(dtype))
    cases.assert_same_bits(alone["dgamma"], sums[1].astype(dtype))
    other = backward(c, saved, activation_, slope, residual=True, sums=np.zeros_like(sums))
    frozen = backward(c, saved, activation_, slope, residual=True, frozen=True)
    cases.assert_same_bits(other["dgamma"], np.zeros(shape[1], dtype))
    np.testing.assert_allclose(other["dx"], frozen["dx"], rtol=4 * np.finfo(dtype).eps)


def test_parts_of_a_batch(dtype: str) -> None:
    """Their moments and sums, put together, give what the whole gives."""
    c = call((30, 20, 60), dtype)
    parts = [Call(*(a[k : k + 10] for a in c[:3]), c.gamma, c.beta, c.mask[k : k + 10]) for k in (0, 10, 20)]
    whole = forward(c, SILU)
    saved, sums, y = whole.saved.copy(), np.zeros((2, 20)), []
    for part in parts:
        y.append(infer(part, None, None, saved, SILU))
        some = np.empty((2, 20))
        numba_backend.backward_sums(
            record.BackwardCall(dy=part.dy, x=part.x, saved=saved, options=Options(SILU), sums=some)
        )
        sums += some
    cases.assert_same_bits(np.concatenate(y), whole.y)
    wanted = backward(c, whole.saved, SILU)
    got = []
    for part in parts:
        dx, dgamma, dbeta = np.empty_like(part.x), np.empty_like(c.gamma), np.empty_like(c.beta)
        numba_backend.backward(record.BackwardCall(
            dy=part.dy, x=part.x, saved=saved, counted=30.0 * 60, sums=sums, options=Options(SILU), dx=dx,
            dgamma=dgamma, dbeta=dbeta,
        ))  # fmt: skip
        got.append(dx)
    np.testing.assert_allclose(np.concatenate(got), wanted["dx"], rtol=1e-4, atol=16 * np.finfo(dtype).eps)
    terms = total(abs(c.dy) * np.maximum(1, abs(c.x)))
    assert_close("dgamma", dgamma, wanted["dgamma"].astype(LONG), ulp(dgamma, dtype) + 1e-14 * terms)


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "leaky_relu, steep"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@at_shapes("rows that recur", "small planes", "planes")
def test_from_y(activation: str, residual: bool, shape: tuple[int, int, int], dtype: str) -> None:
    """What is found from y differs from what is found from x by no more than the rounding of y makes."""
    c = call(shape, dtype)
    c = c._replace(gamma=np.sign(c.gamma) * (1 + abs(c.gamma)))
    activation_, slope = ACTIVATIONS[activation]
    y, saved, *_ = forward(c, activation_, slope, residual)
    exact = exact_forward(c, activation_, slope, residual, None)
    dy = away_from_kinks(c, exact, activation_)
    wanted = backward(c, saved, activation_, slope, residual, dy=dy)
    got = backward(c, saved, activation_, slope, residual, from_y=y, dy=dy)
    sums = np.empty((2, shape[1]))
    numba_backend.backward_sums(record.BackwardCall(
        dy=dy, x=y, residual=c.residual if residual else None, saved=saved, options=Options(activation_, slope),
        from_y=True, sums=sums,
    ))  # fmt: skip
    cases.assert_same_bits(got["dgamma"], sums[1].astype(dtype))
    parts = abs(exact.z) + abs(column(c.beta)) + (abs(c.residual) if residual else 0)
    off = 4 * np.finfo(dtype).eps * (parts / abs(column(c.gamma)) + abs(exact.xhat))  # in xhat
    dz = abs(dy * steepness(activation_, slope, exact.z))
    count = c.x.size // shape[1]
    allowed = {
        name: further for name, (_, further) in exact_gradients(c, exact, dy, activation_, slope, None, False).items()
    }
    allowed["dgamma"] += total(dz * off)
    more = off * column(total(dz * abs(exact.xhat))) + abs(exact.xhat) * column(total(dz * off))
    allowed["dx"] += abs(column(exact.inv_std * c.gamma)) * more / count
    for name in wanted:
        assert_close(name, got[name], wanted[name].astype(LONG), 2 * allowed[name])


@at_shapes("rows that recur", "small planes", "planes")
def test_in_place(shape: tuple[int, int, int], dtype: str) -> None:
    c = call(shape, dtype)
    wanted = forward(c, SILU, residual=True).y
    y = c.x.copy()
    numba_backend.forward(record.Call(
        x=y, residual=c.residual, gamma=c.gamma, beta=c.beta, momentum=0.1, correction=1, eps=EPS,
        options=Options(SILU), y=y, saved=np.empty((6, shape[1])),
    ))  # fmt: skip
    cases.assert_same_bits(y, wanted)


def test_parameters_may_be_absent_or_wider(dtype: str) -> None:
    c = call((9, 130, 49), dtype)
    y = np.empty_like(c.x)
    saved = np.empty((6, 130))
    numba_backend.forward(record.Call(x=c.x, momentum=0.1, correction=1, eps=EPS, y=y, saved=saved))
    plain = c._replace(gamma=np.ones(130), beta=np.zeros(130))
    cases.assert_same_bits(y, forward(plain).y)
    assert (saved[4] == 1).all()
    assert (saved[5] == 0).all()


@pytest.mark.parametrize("shape", [(0, 7, 5), (4, 7, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], dtype: str) -> None:
    x, sums = np.empty(shape, dtype), np.full((2, 7), np.nan)
    c = Call(x, x, x, np.ones(7, dtype), np.zeros(7, dtype), np.empty((shape[0], shape[2]), np.bool_))
    saved = np.full((6, 7), np.nan)
    infer(c, c.beta, c.gamma, saved)
    np.testing.assert_allclose(saved[3], 1 / np.sqrt(1 + EPS))
    assert (backward(c, saved, frozen=True)["dgamma"] == 0).all()
    numba_backend.backward_sums(record.BackwardCall(dy=x, x=x, saved=saved, sums=sums))
    assert (sums == 0).all()


# ---- activations, value by value ----


def through(activation: int, slope: float, z: Array) -> tuple[Array, Array]:
    """The activation and its derivative: a frozen call whose statistics do nothing."""
    z = z.reshape(1, 1, -1)
    one, zero = np.ones(1), np.zeros(1)
    y, dz, saved = np.empty_like(z), np.empty_like(z), np.empty((6, 1))
    numba_backend.infer(
        record.Call(x=z, running_mean=zero, running_var=one, options=Options(activation, slope), y=y, saved=saved)
    )
    numba_backend.backward(record.BackwardCall(
        dy=np.ones_like(z), x=z, saved=saved, counted=1.0, frozen=True, options=Options(activation, slope), dx=dz,
    ))  # fmt: skip
    return y.ravel(), dz.ravel()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_its_whole_range(activation: str, dtype: str) -> None:
    """Within a few ulp; where the exponential is below the normal numbers (a factor may make more), of those."""
    info = np.finfo(dtype)
    lowest = -np.log(info.smallest_subnormal.astype(LONG))
    z = np.concatenate([np.linspace(-lowest, lowest, 200_001), np.linspace(-8, 8, 100_001), [0, 6, -3, 3, 1e4, -1e4]])
    z = np.concatenate([z, 10 ** np.linspace(-30, 2, 999), -(10 ** np.linspace(-30, 2, 999))]).astype(dtype)
    activation_, slope = ACTIVATIONS[activation]
    exact = z.astype(LONG)
    y, derivative = through(activation_, slope, z)
    wanted = activated(activation_, slope, exact)
    least = info.smallest_subnormal * np.maximum(1, abs(exact))
    assert_close("y", y, wanted, 4 * np.maximum(ulp(wanted, dtype), least))
    wanted = steepness(activation_, slope, exact)
    gate = steepness(SIGMOID, 0, exact)
    terms = {SILU: activated(SIGMOID, 0, exact) + abs(exact) * gate, HARDSWISH: 1 + abs(exact) * (abs(exact) < 3)}
    terms = terms.get(activation_, wanted)  # which may cancel
    assert_close("its derivative", derivative, wanted, 6 * np.maximum(ulp(terms, dtype), least))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_nan(activation: str, dtype: str) -> None:
    """NaN comes out, and where z is not in the derivative's formula dy passes, or takes the slope."""
    activation_, slope = ACTIVATIONS[activation]
    y, derivative = through(activation_, slope, np.array([1, np.nan, 2], dtype))
    assert np.isnan(y).tolist() == [False, True, False]
    wanted = {LEAKY_RELU: slope, SILU: np.nan, HARDSWISH: np.nan, SIGMOID: np.nan}.get(activation_, 1)
    np.testing.assert_allclose(derivative[1], wanted, rtol=1e-6)


# ---- the same bits ----


def everything(c: Call, threads: int) -> tuple[Array, ...]:
    """All that the functions fill."""
    y, saved, *running = forward(c, SILU, residual=True, mask=c.mask, threads=threads)
    into, sums = np.empty((3, c.x.shape[1])), np.empty((2, c.x.shape[1]))
    numba_backend.moments(record.Call(x=c.x, moments=into, threads=threads))
    numba_backend.backward_sums(
        record.BackwardCall(dy=c.dy, x=c.x, saved=saved, options=Options(RELU), sums=sums, threads=threads)
    )
    gradients = backward(c, saved, SILU, residual=True, mask=c.mask, threads=threads)
    inverted = backward(c, saved, IDENTITY, from_y=c.x, threads=threads)
    inferred = infer(c, saved[0], saved[2], None, RELU, threads=threads)
    return (y, saved, *running, into, sums, *gradients.values(), *inverted.values(), inferred)


@at_shapes()
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int], dtype: str) -> None:
    c = call(shape, dtype)
    wanted = everything(c, 1)
    for threads in (2, 3):
        cases.assert_same_bits(everything(c, threads), wanted, f"with {threads} threads")


@at_shapes()
def test_places_in_memory_do_not_change_a_bit(shape: tuple[int, int, int], dtype: str) -> None:
    """Nor does what lies beside the data: vectors at the ends of a run have that in them."""
    c = call(shape, dtype)
    moved = c._replace(**{name: cases.PLACEMENTS["odd address"](getattr(c, name)) for name in ("x", "dy", "residual")})
    cases.assert_same_bits(everything(moved, 1), everything(c, 1))
    y = np.full(c.x.size + 40, 7, dtype)
    for skip in (3, 16, 19):
        out = y[skip : skip + c.x.size].reshape(shape)
        numba_backend.infer(record.Call(
            x=c.x, gamma=c.gamma, beta=c.beta, running_mean=c.beta, running_var=abs(c.gamma), eps=EPS,
            options=Options(RELU), y=out,
        ))  # fmt: skip
        cases.assert_same_bits(out.copy(), infer(c, c.beta, abs(c.gamma), None, RELU))
        assert (y[:skip] == 7).all()
        assert (y[skip + c.x.size :] == 7).all()
        y[...] = 7


def test_large_results_are_streamed_alike() -> None:
    """Around the cache come the same values, at any address."""
    c = call((5, 8, 3136), "float32")
    large = call((40, 64, 3136), "float32")
    y, saved, *_ = forward(large, RELU, residual=True)
    gradients = backward(large, saved, RELU, residual=True)
    for n in (0, 39):
        part = Call(*(a[n : n + 1] for a in large[:3]), large.gamma, large.beta, c.mask)
        cases.assert_same_bits(infer(part, None, None, saved.copy(), RELU, residual=True), y[n : n + 1])
        dz = np.where(y[n : n + 1] > 0, part.dy, 0)
        cases.assert_same_bits(gradients["dresidual"][n : n + 1], dz)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@at_shapes("rows that recur", "rows, by channels", "small planes", "planes")
def test_poison_stays_in_its_channel(poison: float, shape: tuple[int, int, int], dtype: str) -> None:
    c = call(shape, dtype)
    channel = shape[1] // 2
    poisoned = c._replace(x=c.x.copy())
    poisoned.x[1, channel] = poison
    y, saved, *_ = forward(c, RELU, residual=True)
    y_, saved_, *_ = forward(poisoned, RELU, residual=True)
    results = y, *backward(c, saved, RELU, residual=True).values()
    seen = y_, *backward(poisoned, saved_, RELU, residual=True).values()
    for clean, other in zip(results, seen, strict=True):
        axis = 1 if clean.ndim == 3 else 0
        cases.assert_same_bits(np.delete(other, channel, axis), np.delete(clean, channel, axis))
    assert np.isnan(y_[:, channel]).all()


# ---- numbers at the ends of the range ----


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1e38, 0.0), (1e30, 1e37), (1e-30, 0.0), (1e-41, 0.0)],
    ids=["huge", "far", "small", "denormal"],
)
@at_shapes("rows that recur", "small planes", "planes")
def test_extreme_spread(shape: tuple[int, int, int], scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, shape) * scale + offset).astype(np.float32)
    c = call(shape, "float32")._replace(x=x)
    long = x.astype(LONG)
    mean = total(long) / (x.size // shape[1])
    std = np.sqrt(total((long - column(mean)) ** 2) / (x.size // shape[1]))
    xhat = (long - column(mean)) / column(std)
    y = xhat * column(c.gamma.astype(LONG)) + column(c.beta.astype(LONG))
    allowed = 2 * ulp(np.maximum(1, abs(xhat)), np.float32) * column(abs(c.gamma)) + ulp(y, np.float32)
    assert_close("y", forward(c, eps=0.0).y, y, allowed)


@pytest.mark.parametrize("value", [0.0, -7.3, 3e38, 1e-42])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@at_shapes("rows that recur", "small planes", "planes")
def test_constant_channel_gives_beta(shape: tuple[int, int, int], value: float, eps: float) -> None:
    c = call(shape, "float32")._replace(x=np.full(shape, value, np.float32))
    assert (forward(c, eps=eps).y == column(c.beta)).all()


def test_frozen_gradient_does_not_read_x() -> None:
    c = call((40, 60, 1), "float32")._replace(x=np.full((40, 60, 1), np.inf, np.float32))
    saved = np.zeros((6, 60))
    saved[3:5] = 1
    dx = np.empty_like(c.x)
    numba_backend.backward(record.BackwardCall(dy=c.dy, x=c.x, saved=saved, counted=40.0, frozen=True, dx=dx))
    cases.assert_same_bits(dx, c.dy)


# ---- threads and processes, each in a process of its own: what goes wrong there may never return ----


def test_settings_of_numba_are_left_alone() -> None:
    before = numba.get_num_threads()
    forward(call((300, 700, 1), "float32"), threads=2)
    assert numba.get_num_threads() == before


def test_describe() -> None:
    found = numba_backend.describe()
    assert found["version"] == numba.__version__
    assert "without the GIL" in found["threads"]
    assert int(found["most threads"]) >= 1


START = """
import os, threading
import numpy as np
from fastbn.call.record import BackwardCall, Call, Options
from fastbn._backends import numba_backend
x = np.random.default_rng(0).standard_normal((600, 1000, 1)).astype(np.float32)
x.flags.writeable = False

def run(threads):
    y, dx, saved = np.empty_like(x), np.empty_like(x), np.empty((6, 1000))
    numba_backend.forward(Call(x, eps=1e-5, options=Options(1), y=y, saved=saved, threads=threads))
    numba_backend.backward(BackwardCall(x, x, saved, options=Options(1), counted=600.0, dx=dx, threads=threads))
    return y.tobytes() + dx.tobytes()

wanted = run(1)
"""
MANY_THREADS = """
for threads in (2, 3, 4, 5):
    assert run(threads) == wanted, threads
print("done")
"""
TWO_AT_ONCE = """
found = []
together = threading.Barrier(2)

def work():
    together.wait()
    for _ in range(20):
        found.append(run(4) == wanted)

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == [True] * 40, found
print("done")
"""
FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork beside threads
assert run(4) == wanted
child = os.fork()
if child == 0:
    os._exit(0 if run(4) == wanted else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert run(4) == wanted
print("done")
"""
SCRIPTS = {"many threads": MANY_THREADS, "two at once": TWO_AT_ONCE, "a forked child": FORK}


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads(script: str, tmp_path: Path) -> None:
    """The same bits from any number of threads, from two callers at once, and in a forked child."""
    if script == "a forked child" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    done = cases.run_python(START + SCRIPTS[script], tmp_path, timeout=240, NUMBA_NUM_THREADS="4")
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


# ---- compiled code on disk ----

CACHED = f"""
from numba.core import event
with event.install_recorder("numba:compile") as compiled:
{textwrap.indent(START, "    ")}
    assert run(2) == wanted
print(len(compiled.buffer))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Numba's own events tell of no compilation; test_cache_dir.py has the first process."""
    for _ in range(2):
        done = cases.run_python(CACHED, tmp_path, timeout=240, NUMBA_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
