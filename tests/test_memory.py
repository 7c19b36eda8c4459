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


def peak(call: Callable[[], object]) -> int:
    """The most bytes that NumPy and Python had allocated at a time during the call, which has run once before."""
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
    return cases.Call(x, dy, residual, *np.ones((4, SHAPE[1]), dtype))


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
