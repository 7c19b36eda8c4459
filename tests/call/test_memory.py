"""Does a call allocate no more than it must?"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import cases
import numpy as np
import pytest

import fastbn

SHAPE = (8, 16, 100, 100)
WORKSPACE = 1 << 20
"""Bytes that a call may take whatever the size of x, which is several times that."""
PLACES = ("C order", "channels-last seen as channels-first", "Fortran order", "batch innermost")


def peak(call: Callable[[], object], *, warm: bool = True) -> int:
    """The most bytes that NumPy and Python had allocated at a time during the call, which may have run once before."""
    if warm:
        call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def placed(dtype: str, place: str) -> cases.Call:
    move = cases.PLACEMENTS[place]
    x, dy, residual = (move(np.zeros(SHAPE, dtype)) for _ in range(3))
    return cases.Call(x, dy, residual, *np.ones((4, SHAPE[1]), cases.statistics_dtype(dtype)))


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_with_out_nothing_of_the_size_of_x(kernel: cases.Kernel, dtype: str, place: str) -> None:
    """No hidden copy of x in any memory order, and no temporary."""
    c = placed(dtype, place)
    out = np.empty_like(c.x)
    statistics = (c.running_mean, c.running_var)
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual)
    for training in (True, False):
        assert (
            peak(
                lambda training=training: fastbn.forward(
                    c.x,
                    c.gamma,
                    c.beta,
                    *statistics,
                    training=training,
                    residual=c.residual,
                    activation="relu",
                    out=out,
                )
            )
            < WORKSPACE
        )
    assert peak(lambda: fastbn.backward(c.dy, cache, out=out)) < WORKSPACE
    assert peak(lambda: fastbn.infer(c.x, c.gamma, c.beta, *statistics, residual=c.residual, out=out)) < WORKSPACE


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_in_place_nothing_at_all(kernel: cases.Kernel, dtype: str, place: str) -> None:
    """forward(out=x), with a mask as well; backward makes dx alone, or nothing where out is given."""
    c = placed(dtype, place)
    x, out = c.x, np.empty_like(c.x)
    mask = np.ones((SHAPE[0], *SHAPE[2:]), bool)
    mask[0, 0, 0] = False
    for m in (None, mask):
        call = {"mask": m, "activation": "leaky_relu", "residual": c.residual, "out": x}
        assert peak(lambda call=call: fastbn.forward(x, c.gamma, c.beta, **call)) < WORKSPACE + 2 * mask.nbytes
        _, cache = fastbn.forward(x, c.gamma, c.beta, mask=m, out=x)
        assert peak(lambda cache=cache: fastbn.backward(c.dy, cache, out=out)) < WORKSPACE + 2 * mask.nbytes


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
def test_training_in_place_takes_half(inplace: bool) -> None:
    """A chain of layers that are all waiting for backward, each with its linear part before it, as in a network."""
    layers = [fastbn.BatchNorm(SHAPE[1], activation="leaky_relu") for _ in range(6)]

    def train() -> tuple[np.ndarray, int]:
        tracemalloc.start()
        try:
            kept = []  # what the linear parts keep for their own gradient: their input
            y = np.ones(SHAPE, np.float32)
            for layer in layers:
                kept.append(y)
                x = y * np.float32(0.5)
                y = layer(x, out=x if inplace else None)
            del x
            return y, tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    _, held = train()
    size = np.prod(SHAPE) * 4
    wanted = (1 if inplace else 2) * len(layers) + 1
    assert held == pytest.approx(wanted * size, rel=0.02)


@pytest.mark.parametrize("half", cases.HALVES)
@pytest.mark.parametrize("kernel", [kernel for kernel in cases.KERNELS if kernel.isa], ids=str, indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_halves_are_not_cast(kernel: cases.Kernel, half: str, place: str) -> None:
    """No float32 copy of x."""
    c = placed(half, place)
    out = np.empty_like(c.x)
    for activation in (None, "silu"):
        arguments = {"residual": c.residual, "activation": activation}
        _, cache = fastbn.forward(c.x, c.gamma, c.beta, **arguments)
        assert peak(lambda k=arguments: fastbn.forward(c.x, c.gamma, c.beta, out=out, **k)) < WORKSPACE
        results = 0 if activation is None else c.x.nbytes
        assert peak(lambda cache=cache: fastbn.backward(c.dy, cache, out=out)) < WORKSPACE + results


LARGER = (8, 16, 260, 260)
SCRATCH = 16 << 20
"""Bytes that pieces of strided arrays may take; x of LARGER has twice that in float32."""
STRIDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cropped": lambda a: np.concatenate((a, a[..., :1]), axis=-1)[..., 1:],
    "reversed": lambda a: a[:, ::-1, ::-1],
    "repeated": lambda a: np.broadcast_to(a[:1], a.shape),
    "byteswapped": lambda a: a.view(a.dtype.newbyteorder()),
    "unaligned": lambda a: np.ndarray(a.shape, a.dtype, np.zeros(a.nbytes + 1, np.uint8), 1),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_arrays_are_not_copied_whole(any_backend: cases.Kernel, kind: str) -> None:
    x = STRIDED[kind](np.zeros(LARGER, np.float32))
    out = np.zeros(LARGER, np.float32)
    one = np.ones(LARGER[1], np.float32)
    assert x.nbytes > 2 * SCRATCH > 0
    peaks = {
        "moments": peak(lambda: fastbn.moments(x), warm=False),
        "forward": peak(lambda: fastbn.forward(x, one, one, activation="relu", out=out), warm=False),
        "infer": peak(lambda: fastbn.infer(x, one, one, one, one, out=out), warm=False),
    }
    _, cache = fastbn.forward(x, one, one, out=out)
    peaks["backward"] = peak(lambda: fastbn.backward(x, cache, out=out), warm=False)
    large = {name: found >> 20 for name, found in peaks.items() if found > SCRATCH}
    assert not large, f"MiB: {large}"


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_without_out_the_results_alone(kernel: cases.Kernel, dtype: str, place: str) -> None:
    c = placed(dtype, place)
    size = c.x.nbytes
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="relu")
    assert peak(lambda: fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual)) < size + WORKSPACE
    assert peak(lambda: fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var)) < size + WORKSPACE
    # dx and dresidual
    assert peak(lambda: fastbn.backward(c.dy, cache)) < 2 * size + WORKSPACE


def test_numpy_makes_few_temporaries() -> None:
    """At most four arrays of the size of x, beside the results."""
    c = placed("float64", "C order")
    out = np.empty_like(c.x)
    with fastbn.use_backend("numpy"):
        _, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="relu")
        calls: tuple[tuple[int, Callable[[], object]], ...] = (
            (0, lambda: fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="relu", out=out)),
            (
                0,
                lambda: fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var, residual=c.residual, out=out),
            ),
            (1, lambda: fastbn.backward(c.dy, cache, out=out)),
        )
        for results, call in calls:
            assert peak(call) <= (4 + results) * c.x.nbytes + WORKSPACE


def test_a_layer_keeps_one_call() -> None:
    """What the last call needed is let go at the next."""
    bn = fastbn.BatchNorm(SHAPE[1])

    def train() -> None:
        for _ in range(4):
            x = np.zeros(SHAPE, np.float32)
            bn(x)
            bn.backward(x)

    # x, y and dx of one call, while the x, dx of the call before are still held
    assert peak(train) < 5.5 * np.prod(SHAPE) * 4
