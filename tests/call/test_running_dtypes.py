"""Do the backends other than C update running statistics in their own dtype, and take given ones exactly?"""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any

import cases
import numpy as np
import pytest

import fastbn
from fastbn._moments import blend
from fastbn.call.dtypes import rounded
from fastbn.call.record import BackwardCall, Call, Options

Array = np.ndarray[Any, Any]
LONG = np.longdouble


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


FLOATS = ("float16", "bfloat16", "float32", "float64")


@pytest.fixture(params=[name for name in fastbn.backends() if name != "c"])
def backend(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(f"fastbn._backends.{request.param}_backend")


@pytest.mark.parametrize("name", FLOATS)
def test_rounded_once(name: str) -> None:
    """Each result is the nearest number of its dtype to the value in float64: no neighbour is nearer."""
    dtype = dtype_of(name)
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal(2000) * 10.0 ** rng.integers(-6, 4, 2000), [0.0, -0.0, np.inf, np.nan]]
    )
    one = np.float64(1)
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[name]
    if name != "float64":  # a midpoint, and what is a little above: rounded by way of float32 it would be the midpoint
        values = np.concatenate([values, [one + step / 2, one + step / 2 + 2.0**-40, one + 1.5 * step - 2.0**-40]])
        assert rounded(values, dtype)[-2:].astype(np.float64).tolist() == [1 + step, 1 + step]
    got = rounded(values, dtype)
    assert got.dtype == dtype
    finite = np.isfinite(values)
    for value, result in zip(values[finite], got[finite].astype(np.float64), strict=True):
        spacing = Fraction(max(abs(float(result)) * step, 2.0**-160))
        assert abs(Fraction(float(value)) - Fraction(float(result))) <= max(spacing / 2, Fraction(2.0**-25))
    assert np.isnan(got[~finite].astype(np.float64)).tolist() == np.isnan(values[~finite]).tolist()


@pytest.mark.parametrize("name", FLOATS)
def test_blend(name: str) -> None:
    """By the formula, in float64, rounded once; NaN and infinities of a batch arrive."""
    dtype = dtype_of(name)
    rng = np.random.default_rng(1)
    rows = np.stack([rng.standard_normal(500), rng.standard_normal(500) * 1e-17, rng.uniform(0, 9, 500)])
    rows[0, :2] = np.nan, np.inf
    mean, var = rng.standard_normal(500).astype(dtype), rng.uniform(0, 2, 500).astype(dtype)
    old = mean.astype(np.float64), var.astype(np.float64)
    blend(Call(rows, running_mean=mean, running_var=var, momentum=0.3, correction=1), rows, 10)
    cases.assert_same_bits(mean, rounded((1 - 0.3) * old[0] + 0.3 * (rows[0] + rows[1]), dtype))
    cases.assert_same_bits(var, rounded((1 - 0.3) * old[1] + 0.3 * (rows[2] / 9), dtype))
    blend(Call(rows, momentum=0.3, correction=1), rows, 10)


@pytest.mark.parametrize("names", [("float16", "float64"), ("bfloat16", "float32"), ("float64", "float16")])
@pytest.mark.parametrize("shape", [(9, 130, 1), (4, 6, 700)], ids=str)
def test_forward_and_infer(backend: Any, names: tuple[str, str], shape: tuple[int, int, int], dtype: str) -> None:
    c = cases.call(shape, dtype)
    mean, var = (a.astype(dtype_of(name)) for a, name in zip((c.running_mean, c.running_var), names, strict=True))
    old = mean.astype(np.float64), var.astype(np.float64)
    y, saved, rows = np.empty_like(c.x), np.empty((6, shape[1])), np.empty((3, shape[1]))
    backend.forward(Call(
        x=c.x, gamma=c.gamma, beta=c.beta, running_mean=mean, running_var=var, momentum=0.1, eps=1e-5, y=y, saved=saved,
    ))  # fmt: skip
    backend.moments(Call(x=c.x, moments=rows))
    count = c.x.size // shape[1]
    cases.assert_same_bits(mean, rounded((1 - 0.1) * old[0] + 0.1 * (rows[0] + rows[1]), mean.dtype))
    cases.assert_same_bits(var, rounded((1 - 0.1) * old[1] + 0.1 * (rows[2] / count), var.dtype))
    found = []
    for given in ((mean, var), (mean.astype(np.float64), var.astype(np.float64))):
        backend.infer(
            Call(
                x=c.x,
                gamma=c.gamma,
                beta=c.beta,
                running_mean=given[0],
                running_var=given[1],
                eps=1e-5,
                options=Options(1),
                y=y,
            )
        )
        found.append(y.copy())
    cases.assert_same_bits(*found)


@pytest.mark.parametrize("shape", [(40, 19, 1), (9, 130, 49), (3, 4, 3000)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_dx_may_be_dy(backend: Any, shape: tuple[int, int, int], masked: bool, frozen: bool, dtype: str) -> None:
    """With every activation the bits are those of an array of its own."""
    c = cases.call(shape, dtype)
    mask = cases.random_mask(shape) if masked else None
    count = c.x.size / shape[1] if mask is None else float(mask.sum())
    saved, y = np.empty((6, shape[1])), np.empty_like(c.x)
    for activation in range(7):
        backend.forward(Call(
            x=c.x, mask=mask, gamma=c.gamma, beta=c.beta, momentum=0.1, correction=1, eps=1e-5,
            options=Options(activation, 0.1), y=y, saved=saved,
        ))  # fmt: skip
        found = []
        for dy, dx in ((c.dy, np.empty_like(c.dy)), (c.dy.copy(), None)):
            out = dy if dx is None else dx
            dresidual = np.empty_like(dy) if activation else None
            dgamma, dbeta = np.empty(shape[1], dtype), np.empty(shape[1], dtype)
            backend.backward(BackwardCall(
                dy=dy, x=c.x, residual=c.residual, mask=mask, saved=saved, counted=count, frozen=frozen,
                options=Options(activation, 0.1), dx=out, dresidual=dresidual, dgamma=dgamma, dbeta=dbeta,
            ))  # fmt: skip
            found.append((out, dresidual, dgamma, dbeta))
        cases.assert_same_bits(*found, f"activation {activation}")
