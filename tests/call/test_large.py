"""Do arrays, and channels, of more elements than 32-bit integers count come out right?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.slow
LARGE = 2**31
BEST = tuple(kernel for kernel in cases.BACKENDS if kernel in cases.COMPILED)
SHAPES = {
    "one channel": (LARGE + 5, 1),
    "planes": (2, 2, LARGE // 4 + 8),
    "rows": (LARGE // 512 + 1, 512),
}


def needs(gibibytes: float) -> None:
    """Skips the test where less memory than that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0
    if free < gibibytes:
        pytest.skip(f"{free:.1f} of {gibibytes} GiB are free")


@pytest.fixture
def two_threads() -> Iterator[None]:
    with fastbn.use_num_threads(2):
        yield


@pytest.mark.parametrize("kernel", BEST, ids=str, indirect=True)
@pytest.mark.parametrize("kind", SHAPES)
def test_training(kernel: cases.Kernel, kind: str, two_threads: None) -> None:
    """x, dy and one array for y and then dx, all in float16: 12 GiB. Only the last few values are not 0."""
    needs(14)
    shape = SHAPES[kind]
    channels, count = shape[1], int(np.prod(shape)) // shape[1]
    x, dy, out = (np.zeros(shape, np.float16) for _ in range(3))
    ones = _last(x, 1000)
    ones[...] = 1
    _last(dy, 10)[...] = 2
    y, cache = fastbn.forward(x, np.full(channels, 0.5, np.float32), out=out, eps=1.0)
    mean = 1000 / count
    inv_std = 1 / np.sqrt(mean * (1 - mean) + 1)
    np.testing.assert_allclose(cache.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(cache.var, mean * (1 - mean), rtol=1e-6)
    np.testing.assert_allclose(_last(y, 1000), 0.5 * inv_std * (1 - mean), rtol=1e-3)
    np.testing.assert_allclose(_first(y), -0.5 * inv_std * mean, rtol=1e-3, atol=6e-8)
    dx, dgamma, _ = fastbn.backward(dy, cache, out=out)
    xhat = inv_std * (1 - mean)
    np.testing.assert_allclose(dgamma, 20 * xhat, rtol=1e-6)
    np.testing.assert_allclose(_last(dx, 10), 0.5 * inv_std * 2, rtol=1e-3)
    elsewhere = 0.5 * inv_std * (inv_std * mean * 20 * xhat - 20) / count
    np.testing.assert_allclose(_first(dx), elsewhere, rtol=1e-3, atol=6e-8)


def _last(a: Array, count: int) -> Array:
    """The last values of every channel."""
    return a[-count:] if a.ndim == 2 else a[-1, :, -count:]


def _first(a: Array) -> Array:
    return a[:1] if a.ndim == 2 else a[0, :, :1]


@pytest.mark.parametrize("kernel", BEST, ids=str, indirect=True)
def test_strided_and_masked(kernel: cases.Kernel, two_threads: None) -> None:
    """Every second of 2**32 values, in place, block by block: 8 GiB and no copy."""
    needs(10)
    base = np.zeros((1, 1, 2 * LARGE + 20), np.float16)
    x = base[..., ::2]
    x[..., -1000:] = 1
    x[..., -1] = 7
    mask = np.ones((1, x.shape[-1]), bool)
    mask[..., -1] = False
    moments = fastbn.moments(x, mask=mask)
    assert moments.count == x.size - 1
    mean = 999 / moments.count
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(moments.m2, 999 * (1 - mean), rtol=1e-6)
    y = fastbn.infer(x, None, None, np.ones(1, np.float32), np.full(1, 4, np.float32), eps=0, out=x)
    assert y is x
    assert (y[0, 0, 0], y[0, 0, -2], y[0, 0, -1]) == (-0.5, 0, 3)
    assert not base[..., 1::2].any()


@pytest.mark.parametrize("kernel", cases.COMPILED, ids=str, indirect=True)
def test_float32_in_place(kernel: cases.Kernel) -> None:
    """9 GB: a row more than 32-bit integers can count, whose last values must come out right."""
    needs(10)
    x = np.zeros((2, 1, 2**30 + 16), np.float32)
    x[0] = 1
    x[:, :, -1] = 3
    mean, var = np.array([1], np.float32), np.array([4], np.float32)
    y = fastbn.infer(x, None, None, mean, var, eps=0, out=x)
    assert y[0, 0, 0] == 0
    assert y[1, 0, 0] == -0.5
    assert y[1, 0, -2] == -0.5
    assert y[1, 0, -1] == 1
