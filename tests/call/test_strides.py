"""Are arrays that no backend takes as they lie cut into blocks, converted and put together again without a trace?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn
from fastbn.call import blocks

Array = np.ndarray[Any, Any]
FLOATS = (*cases.DTYPES, *cases.HALVES)
PLACES = {name: place for name, place in cases.PLACEMENTS.items() if name != "byteswapped"}
WRITABLE = {name: place for name, place in PLACES.items() if name != "read-only"}


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("half", cases.HALVES)
def test_placements_of_halves(any_backend: cases.Kernel, half: str, placement: str) -> None:
    place = cases.PLACEMENTS[placement]
    for shape, axis in (((3, 5, 4, 7), 1), ((3, 5, 4, 19), -1), ((6, 9), 1)):
        c = cases.call(shape, half, axis)
        placed = c._replace(x=place(c.x), dy=place(c.dy), residual=place(c.residual))
        cases.check(placed, axis=axis, residual=True, activation="silu", where=f"for {shape}, axis {axis}")


def test_every_array_in_its_own_order(any_backend: cases.Kernel, dtype: str) -> None:
    """x, dy, residual and out each lie another way."""
    places = list(WRITABLE.values())
    for shift in range(len(places)):
        x, dy, residual, out = (places[(shift + 3 * i) % len(places)] for i in range(4))
        for shape, axis in (((3, 5, 4, 7), 1), ((3, 5, 4, 7), 2)):
            c = cases.call(shape, dtype, axis)
            mask = cases.random_mask(shape, axis, seed=shift)
            c = c._replace(x=x(c.x), dy=dy(c.dy), residual=residual(c.residual))
            cases.check(c, axis=axis, mask=mask, residual=True, activation="hardswish", out=out, where=f"for {shift}")


@pytest.mark.parametrize("piece", [1, 7, 60])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pieces_of_any_size(any_backend: cases.Kernel, dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one channel or several, and channels that are cut along their positions, with masks and in place."""
    monkeypatch.setattr(blocks, "PIECE", piece)
    monkeypatch.setattr(blocks, "RUN", 1 + piece % 5)
    for shape, axis, kind in (
        ((3, 4, 2, 5), 1, "every second element"),
        ((3, 5, 4, 7), 2, "negative strides"),
        ((13, 9), 1, "every second element"),
        ((2, 3, 50), 0, "negative strides"),
    ):
        if np.prod(shape) < 200 * piece:
            c, place = cases.call(shape, dtype, axis), cases.PLACEMENTS[kind]
            mask = cases.random_mask(shape, axis)
            placed = c._replace(x=place(c.x))
            for m, activation in ((None, None), (mask, "relu"), (mask, "silu")):
                where = f"for {shape}, axis {axis}, pieces of {piece}, {activation}"
                cases.check(
                    placed, axis=axis, mask=m, residual=m is not None, activation=activation, eps=0.01, where=where,
                    out=place if activation else None,
                )  # fmt: skip
            x = place(c.x)
            y, cache = fastbn.forward(x, None, c.beta, axis=axis, activation="leaky_relu", out=x)
            exact = oracle.forward(c.x, None, c.beta, axis=axis, activation="leaky_relu")
            cases.assert_y(y, exact, axis=axis, activation="leaky_relu")
            off = oracle.found_again(exact, axis=axis, activation="leaky_relu", dtype=dtype)
            wanted = oracle.backward(c.dy, exact, axis=axis, activation="leaky_relu", off=off)
            cases.assert_gradients(fastbn.backward(c.dy, cache), wanted)


@pytest.mark.parametrize("piece", [1, 60])
def test_shards_in_pieces(any_backend: cases.Kernel, dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and sums of strided arrays."""
    monkeypatch.setattr(blocks, "PIECE", piece)
    c = cases.call((24, 5, 3), dtype)
    place = cases.PLACEMENTS["every second element"]
    x, dy, mask = place(c.x), place(c.dy), cases.random_mask(c.x.shape)
    exact = oracle.forward(c.x, c.gamma, mask=mask)
    cases.assert_moments(fastbn.moments(x, mask=mask), exact, c.x)
    sums = fastbn.backward_sums(dy, fastbn.forward(x, c.gamma, mask=mask).cache)
    wanted = oracle.backward(c.dy, exact, c.gamma, mask=mask)
    cases.assert_sum("sum_dy", sums.sum_dy, wanted.exact.dbeta, wanted.terms.dbeta)
    cases.assert_sum("sum_dy_xhat", sums.sum_dy_xhat, wanted.exact.dgamma, wanted.terms.dgamma)


LONG: dict[str, Callable[[Array], Array]] = {
    "stepped": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "byteswapped": cases.PLACEMENTS["byteswapped"],
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("shape", [(1, 2, 300_001), (2, 3, 100_000), (1400, 401)], ids=str)
def test_more_than_one_piece(any_backend: cases.Kernel, kind: str, shape: tuple[int, ...]) -> None:
    """Channels longer than a piece, and more channels than one holds, at the size that pieces have."""
    assert np.prod(shape) > blocks.PIECE
    c = cases.call(shape, offset=1e3)
    x, dy = LONG[kind](c.x), LONG[kind](c.dy)
    wanted, cache = fastbn.forward(c.x, c.gamma, c.beta, activation="relu")
    gradients = fastbn.backward(c.dy, cache)
    y, cache = fastbn.forward(x, c.gamma, c.beta, activation="relu")
    got = fastbn.backward(dy, cache)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.dx, gradients.dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.dgamma, gradients.dgamma, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(got.dbeta, gradients.dbeta, rtol=1e-5, atol=1e-3)


def test_the_same_bits_for_any_number_of_threads(any_backend: cases.Kernel, dtype: str) -> None:
    for shape in ((1, 2, 300_001), (1400, 401)):
        c = cases.call(shape, dtype)
        x = LONG["stepped"](c.x)
        mask = cases.random_mask(shape)
        found = []
        for threads in (1, 3):
            with fastbn.use_num_threads(threads):
                y, cache = fastbn.forward(x, c.gamma, c.beta, mask=mask, activation="silu")
                found.append((y, *fastbn.backward(c.dy, cache)))
        cases.assert_same_bits(*found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_repeated_values(any_backend: cases.Kernel, dtype: str) -> None:
    """Strides of 0 along any axis, the channels' included, in every array that is read."""
    c = cases.call((4, 5, 6), dtype)
    mask = np.broadcast_to(np.array([True, False, True, True, False, True]), (4, 6))
    for cut in (np.s_[:1], np.s_[:, :1], np.s_[:, :, :1], np.s_[:1, :1], np.s_[:1, :, :1], np.s_[:1, :1, :1]):
        x, dy, residual = (np.broadcast_to(a[cut], a.shape) for a in (c.x, c.dy, c.residual))
        for m in (None, mask):
            cases.check(
                c._replace(x=x, dy=dy, residual=residual), mask=m, residual=True, activation="sigmoid", eps=0.1,
                where=f"for {cut}",
            )  # fmt: skip


@pytest.mark.parametrize("piece", [7, 1 << 19])
def test_one_array_for_all_that_is_read(
    any_backend: cases.Kernel, dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, its residual and dy, whole and in pieces; and y may go into x where there is no residual."""
    monkeypatch.setattr(blocks, "PIECE", piece)
    for name in ("every second element", "negative strides", "C order"):
        c = cases.call((4, 5, 6), dtype)
        x = cases.PLACEMENTS[name](c.x)
        mask = cases.random_mask(x.shape)
        cases.check(c._replace(x=x, dy=x, residual=x), residual=True, mask=mask, activation="silu", where=name)
        cases.check(c._replace(x=x, dy=x), mask=mask, activation="relu", where=name)


def test_windows_that_overlap(any_backend: cases.Kernel, dtype: str) -> None:
    """X may hold an element of memory in several places."""
    signal = cases.call((1, 50), dtype).x[0]
    x = np.lib.stride_tricks.sliding_window_view(signal, 5)
    c = cases.call(x.shape, dtype)
    cases.check(c._replace(x=x), activation="relu")


def test_byteswapped(any_backend: cases.Kernel) -> None:
    """All that is read may be: data, gradients, residual, parameters and given statistics."""
    for dtype in ("float16", "float32", "float64"):
        c = cases.call((4, 5, 6), dtype)
        swapped = cases.Call(*(cases.PLACEMENTS["byteswapped"](array) for array in c))
        wanted = fastbn.forward(*c[:1], *c[3:], residual=c.residual, training=False, activation="silu")
        got = fastbn.forward(
            swapped.x, swapped.gamma, swapped.beta, swapped.running_mean, swapped.running_var,
            residual=swapped.residual, training=False, activation="silu",
        )  # fmt: skip
        assert got.y.dtype.isnative
        cases.assert_same_bits(got.y, wanted.y)
        cases.assert_same_bits(
            tuple(fastbn.backward(swapped.dy, got.cache)), tuple(fastbn.backward(c.dy, wanted.cache))
        )
        moments = fastbn.moments(swapped.x)
        cases.assert_same_bits((moments.mean, moments.m2), (fastbn.moments(c.x).mean, fastbn.moments(c.x).m2))


def test_empty_arrays_of_odd_strides(any_backend: cases.Kernel, dtype: str) -> None:
    c = cases.call((4, 5, 6), dtype)
    odd = np.frombuffer(bytearray(c.x.nbytes + 1), np.uint8, c.x.nbytes, 1).view(c.x.dtype).reshape(c.x.shape)
    for x in (c.x[:0, :, ::2], c.x[::2, :, :0], np.broadcast_to(c.x[:, :, :1], (4, 5, 6))[:0], odd[4:]):
        y, cache = fastbn.forward(x, None, None, c.running_mean, c.running_var, training=False)
        assert y.shape == fastbn.backward(x, cache).dx.shape == x.shape


# ---- small results with `out` that the express lane makes elsewhere


def of_kind(kind: str, c: cases.Call) -> tuple[cases.Call, Callable[[Array], Array]]:
    """A call whose data lies in a way that kernels do not take, and what lays `out` in this way."""
    place = WRITABLE[kind]
    return c._replace(x=place(c.x), dy=place(c.dy), residual=place(c.residual)), place


@pytest.mark.parametrize("limit", [0, blocks.SMALL])
@pytest.mark.parametrize("kind", WRITABLE)
def test_out_has_the_bits_that_a_fresh_result_has(
    any_backend: cases.Kernel, dtype: str, kind: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is filled block by block, or by a copy of a small result."""
    monkeypatch.setattr(blocks, "SMALL", limit)
    for shape, axis in (((8, 20), 1), ((3, 5, 4, 7), -1)):
        c, place = of_kind(kind, cases.call(shape, dtype, axis))
        out, dx = place(np.zeros_like(c.x)), place(np.zeros_like(c.x))
        given = (c.x, c.gamma, c.beta)
        for residual, activation in ((None, None), (c.residual, "relu"), (c.residual, None)):
            options: dict[str, Any] = {"axis": axis, "residual": residual, "activation": activation}
            mean, var = (np.full(c.gamma.shape, value, c.gamma.dtype) for value in (0.5, 2.0))
            fresh = fastbn.infer(*given, mean, var, **options)
            assert fastbn.infer(*given, mean, var, out=out, **options) is out
            np.testing.assert_array_equal(out, fresh, strict=True)
            running = (mean.copy(), var.copy())
            y, cache = fastbn.forward(*given, mean, var, **options)
            again, other = fastbn.forward(*given, *running, out=out, **options)
            assert again is out
            np.testing.assert_array_equal(out, y, strict=True)
            np.testing.assert_array_equal(running, (mean, var))
            expected = fastbn.backward(c.dy, cache)
            got = fastbn.backward(c.dy, other, out=dx)
            assert got.dx is dx
            for one, same in zip((*got, got.dresidual), (*expected, expected.dresidual), strict=True):
                assert one is same is None or np.array_equal(one, same)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", ["every second element", "negative strides"])
def test_small_results_in_place(any_backend: cases.Kernel, kind: str, activation: str | None) -> None:
    """In inference x becomes y, and in the gradient dy becomes dx. The residual's gradient keeps dy's values."""
    c, place = of_kind(kind, cases.call((8, 20), "float32", 1))
    mean, var = np.zeros(20, "f4"), np.ones(20, "f4")
    expected = fastbn.infer(c.x, c.gamma, c.beta, mean, var, activation=activation)
    x = place(c.x.copy())
    assert fastbn.infer(x, c.gamma, c.beta, mean, var, activation=activation, out=x) is x
    np.testing.assert_array_equal(x, expected)
    for residual in (None, c.residual):
        cache = fastbn.forward(c.x, c.gamma, c.beta, residual=residual, activation=activation).cache
        dx, dgamma, dbeta = whole = fastbn.backward(c.dy, cache)
        dy = place(c.dy.copy())
        got = fastbn.backward(dy, cache, out=dy)
        assert got.dx is dy
        for one, same in zip((*got, got.dresidual), (dx, dgamma, dbeta, whole.dresidual), strict=True):
            assert one is same is None or np.array_equal(one, same)


def test_a_small_out_is_checked_before_anything_is_written(any_backend: cases.Kernel) -> None:
    """Whatever is wrong with it: the running statistics are as they were."""
    x = np.arange(80, dtype="f4").reshape(4, 20)[:, ::2]
    gamma, wide = np.ones(10, "f4"), np.zeros((4, 20), "f4")
    mean, var = np.full(10, 3.0, "f4"), np.full(10, 5.0, "f4")
    read_only = np.zeros((4, 10), "f4")
    read_only.flags.writeable = False
    shifted = x.base.reshape(4, 20)[:, 1::2]
    bad = {
        "dtype": np.zeros((4, 10)),
        "shape": np.zeros((4, 11), "f4"),
        "read-only": read_only,
        "elements do not overlap": np.lib.stride_tricks.as_strided(wide, (4, 10), (4, 4)),
        "memory shared with x": x[::-1],
    }
    for words, out in bad.items():
        with pytest.raises((TypeError, ValueError), match=f"^out: .*{words}"):
            fastbn.forward(x, gamma, None, mean, var, out=out)
        with pytest.raises((TypeError, ValueError), match=f"^out: .*{words}"):
            fastbn.infer(x, gamma, None, mean, var, out=out)
    for lying in (x, x.copy()):  # which may be `out`, but not while it is the residual, too
        with pytest.raises(ValueError, match=r"^out: got memory shared with residual"):
            fastbn.infer(lying, gamma, None, mean, var, residual=lying, out=lying)
    assert (mean == 3).all()
    assert (var == 5).all()
    fastbn.infer(x, gamma, None, mean, var, out=shifted)  # between x's elements, but none of them
    np.testing.assert_array_equal(shifted, fastbn.infer(x, gamma, None, mean, var))
