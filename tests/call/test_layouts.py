"""Are results right for every shape, every channel axis and every way for an array to lie in memory?"""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import oracle
import pytest

import fastbn

# An AVX-512 vector holds 16 float32: up to two vectors and one element.
RAGGED = range(1, 34)

# Shapes that take different ways through the blocking: planes and rows, few and many, on either side of a boundary.
SHAPES = (
    (2, 1),
    (2, 1, 1),
    (1, 1, 2),
    (1, 1, 1, 5),
    (1, 7, 9),
    (1, 13, 1, 2),
    (127, 3),
    (128, 3),
    (129, 3),
    (3, 1, 129),
    (2, 97, 1, 1),
    (700, 31),
    (8193, 2),
    (20001, 17),
    (601, 509),
    (3, 67, 7, 7),
    (2, 300, 28),
    (17, 3, 1001),
    (1, 2, 65536),
    (1, 2, 65537),
    (1, 2, 131073),
    (2, 40000),
    (2, 9000, 3),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(kernel: cases.Kernel, dtype: str, shape: tuple[int, ...]) -> None:
    cases.check(cases.call(shape, dtype), activation="relu", residual=True)


def test_ragged_planes(kernel: cases.Kernel, dtype: str) -> None:
    for inner in RAGGED:
        shape = (3, 5, inner)
        cases.check(cases.call(shape, dtype), residual=True, activation="relu", where=f"for {shape}")
        cases.check(cases.call(shape, dtype), where=f"for {shape}")


def test_ragged_rows(kernel: cases.Kernel, dtype: str) -> None:
    for channels in RAGGED:
        shape = (13, channels)
        cases.check(cases.call(shape, dtype), residual=True, activation="relu", where=f"for {shape}")
        cases.check(cases.call(shape, dtype), where=f"for {shape}")


def test_ragged_counts(kernel: cases.Kernel, dtype: str) -> None:
    for count in range(2, 19):
        cases.check(cases.call((count, 3), dtype), residual=True, where=f"for {count} rows")
        cases.check(cases.call((count, 2, 3), dtype), residual=True, where=f"for {count} planes")


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("placement", cases.PLACEMENTS)
def test_placements_of_data(kernel: cases.Kernel, dtype: str, placement: str, training: bool) -> None:
    place = cases.PLACEMENTS[placement]
    for shape, axis in (((3, 5, 4, 7), 1), ((3, 5, 4, 19), -1), ((3, 5, 4, 7), 0), ((6, 9), 1), ((2, 1, 5, 3), -3)):
        c = cases.call(shape, dtype, axis)
        placed = c._replace(x=place(c.x), dy=place(c.dy), residual=place(c.residual))
        where = f"for {shape}, axis {axis}"
        cases.check(placed, axis=axis, training=training, residual=True, activation="relu", where=where)
        cases.check(
            placed._replace(dy=c.dy, residual=c.residual), axis=axis, training=training, residual=True, where=where
        )


@pytest.mark.parametrize("placement", cases.PLACEMENTS)
def test_placements_of_parameters(kernel: cases.Kernel, dtype: str, placement: str) -> None:
    place = cases.PLACEMENTS[placement]
    for shape in ((4, 19, 3), (9, 19)):
        c = cases.call(shape, dtype)
        cases.check(c._replace(gamma=place(c.gamma), beta=place(c.beta)), where=f"for {shape}")


@pytest.mark.parametrize("placement", [name for name in cases.PLACEMENTS if name not in ("read-only", "byteswapped")])
def test_placements_of_running_statistics(kernel: cases.Kernel, dtype: str, placement: str) -> None:
    """They are updated in place wherever they lie, and what lies between them is not."""
    place = cases.PLACEMENTS[placement]
    c = cases.call((4, 19, 3), dtype)
    mean, var = place(c.running_mean), place(c.running_var)
    wanted = c.running_mean.copy(), c.running_var.copy()
    fastbn.forward(c.x, None, None, *wanted)
    fastbn.forward(c.x, None, None, mean, var)
    cases.assert_same_bits((mean, var), wanted)
    y = fastbn.infer(c.x, c.gamma, c.beta, mean, var)
    cases.assert_same_bits(y, fastbn.infer(c.x, c.gamma, c.beta, *wanted))


def test_columns_of_one_array_as_running_statistics(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((4, 7, 3), dtype)
    table = np.zeros((7, 3), dtype)
    table[:, 1] = 1
    mean, var = np.zeros(7, dtype), np.ones(7, dtype)
    fastbn.forward(c.x, None, None, table[:, 0], table[:, 1])
    fastbn.forward(c.x, None, None, mean, var)
    cases.assert_same_bits(np.ascontiguousarray(table[:, 0]), mean)
    cases.assert_same_bits(np.ascontiguousarray(table[:, 1]), var)
    assert not table[:, 2].any()


OUTS = [name for name in cases.PLACEMENTS if name not in ("read-only", "byteswapped")]


@pytest.mark.parametrize("placement", OUTS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (9, 19)], ids=str)
def test_placements_of_out(kernel: cases.Kernel, dtype: str, placement: str, shape: tuple[int, ...]) -> None:
    """`out` gets the same bits as a fresh result, and its neighbours in memory keep theirs."""
    place = cases.PLACEMENTS[placement]
    c = cases.call(shape, dtype)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta)
    dx = fastbn.backward(c.dy, cache).dx
    inferred = fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var)

    def run(wanted: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> None:
        out = place(np.full_like(c.x, 7))
        base = out
        while isinstance(base.base, np.ndarray):
            base = base.base
        guards = base.copy()
        assert compute(out) is out
        assert np.array_equal(out, wanted)
        out[...] = 7
        assert base.tobytes() == guards.tobytes(), "memory beside out was written"

    run(y, lambda out: fastbn.forward(c.x, c.gamma, c.beta, out=out).y)
    run(dx, lambda out: fastbn.backward(c.dy, cache, out=out).dx)
    run(inferred, lambda out: fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, out=out))


@pytest.mark.parametrize("placement", OUTS)
def test_infer_in_place(kernel: cases.Kernel, dtype: str, placement: str) -> None:
    place = cases.PLACEMENTS[placement]
    for shape, axis in (((3, 5, 4, 7), 1), ((3, 5, 4, 19), -1), ((9, 19), 1), ((40, 3, 1000), 1)):
        c = cases.call(shape, dtype, axis)
        arguments = (c.gamma, c.beta, c.running_mean, c.running_var)
        wanted = fastbn.infer(c.x, *arguments, axis=axis, residual=c.residual, activation="relu")
        x = place(c.x)
        assert fastbn.infer(x, *arguments, axis=axis, residual=c.residual, activation="relu", out=x) is x
        assert np.array_equal(x, wanted)


def test_every_axis_of_every_dimension(kernel: cases.Kernel) -> None:
    sizes = (3, 2, 4, 5, 2, 3)
    for ndim in range(2, 7):
        for axis in range(-ndim, ndim):
            c = cases.call(sizes[:ndim], "float64", axis)
            cases.check(c, axis=axis, residual=True, activation="relu", where=f"for {sizes[:ndim]}, axis {axis}")


def test_axis_may_be_a_numpy_integer() -> None:
    x = cases.call((3, 4, 5)).x
    cases.assert_same_bits(fastbn.forward(x, axis=np.int64(-1)).y, fastbn.forward(x, axis=2).y)


def test_broadcast_data(kernel: cases.Kernel, dtype: str) -> None:
    """Strides of 0 in x, dy and the residual."""
    c = cases.call((4, 5, 6), dtype)
    for cut in (np.s_[:1], np.s_[:, :1], np.s_[:, :, :1]):
        x, dy, residual = (np.broadcast_to(a[cut], a.shape) for a in (c.x, c.dy, c.residual))
        cases.check(c._replace(x=x, dy=dy, residual=residual), residual=True, eps=0.1, where=f"for {cut}")


def test_residual_may_be_x(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((4, 5, 6), dtype)
    cases.check(c._replace(residual=c.x), residual=True, activation="relu")


def test_more_values_than_caches_hold(kernel: cases.Kernel) -> None:
    """Above half of the last cache level the C backend streams its stores past the caches."""
    shared = _shared_cache_bytes()
    if shared > 256 << 20:
        pytest.skip(f"the last cache level has {shared >> 20} MiB: too large a test")
    rows = shared // 2 // 4 // 48 + 7
    rng = np.random.default_rng(0)
    for shape in ((2, 48, rows // 2 + 3), (rows, 48), (rows, 47)):
        x, dy = rng.random(shape, np.float32), rng.random(shape, np.float32)
        y, cache = fastbn.forward(x, activation="relu")
        dx, _, _ = fastbn.backward(dy, cache)
        for channel in (0, shape[1] - 1):
            one = np.s_[:, channel : channel + 1]
            exact = oracle.forward(x[one], activation="relu")
            cases.assert_y(y[one], exact, activation="relu", where=f"for {shape}, channel {channel}")
            wanted = oracle.backward(dy[one], exact, activation="relu")
            cases.assert_gradients(
                fastbn.Gradients(dx[one], None, None, None), wanted, f"for {shape}, channel {channel}"
            )
        # All channels: with given statistics the parts of x, which are small enough for the caches, give the whole.
        mean, var = cache.mean, cache.var
        y = fastbn.infer(x, None, None, mean, var)
        parts = np.array_split(x, 4 if x.ndim == 2 else 2)
        assert np.array_equal(y, np.concatenate([fastbn.infer(part, None, None, mean, var) for part in parts]))


def _shared_cache_bytes() -> int:
    if "c" not in fastbn.backends():
        return 0
    from fastbn._backends.c import bridge

    found = bridge.describe()["caches"]
    kibibytes = int(found.split("L3 ")[1].split(" KiB")[0])
    return (kibibytes or 8192) << 10
