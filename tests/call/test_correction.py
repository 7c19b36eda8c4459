"""What is the running variance corrected by? correction= of forward and of the layer."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import pytest
from test_checks import assert_refused

import fastbn

Array = np.ndarray[Any, Any]
SHAPE = (6, 5, 3)
M = 18


def running_of(c: cases.Call, correction: Any, **options: Any) -> tuple[Array, Array]:
    """The running statistics after a call."""
    mean, var = c.running_mean.copy(), c.running_var.copy()
    fastbn.forward(c.x, c.gamma, c.beta, mean, var, momentum=0.3, correction=correction, **options)
    return mean, var


@pytest.mark.parametrize("correction", [0, 1, 2, M - 1, np.int64(3)], ids=str)
def test_running_variance(kernel: cases.Kernel, dtype: str, correction: int) -> None:
    """The sum of squares over M - correction; nothing else depends on it."""
    c = cases.call(SHAPE, dtype)
    exact = oracle.forward(c.x)
    batch = exact.var * M / (M - int(correction))
    mean, var = running_of(c, correction)
    cases.assert_running("running_var", var, c.running_var, batch, 0.3, f"correction {correction}")
    cases.assert_same_bits(mean, running_of(c, 1)[0])
    wanted = fastbn.forward(c.x, c.gamma, c.beta).y
    cases.assert_same_bits(fastbn.forward(c.x, c.gamma, c.beta, correction=correction).y, wanted)


def test_the_default_is_unbiased(any_backend: cases.Kernel) -> None:
    c = cases.call(SHAPE)
    cases.assert_same_bits(running_of(c, 1), running_of(c, True + 0))
    mean, var = c.running_mean.copy(), c.running_var.copy()
    fastbn.forward(c.x, c.gamma, c.beta, mean, var, momentum=0.3)
    cases.assert_same_bits((mean, var), running_of(c, 1))


@pytest.mark.parametrize("correction", [0, 1, 3])
def test_values_that_count(any_backend: cases.Kernel, correction: int) -> None:
    """Those of the mask, of the moments, and of each virtual batch."""
    c = cases.call(SHAPE, "float64")
    mask = cases.random_mask(SHAPE, least=9)
    exact = oracle.forward(c.x, mask=mask)
    got = running_of(c, correction, mask=mask)[1]
    batch = exact.var * exact.count / (exact.count - correction)
    cases.assert_running("running_var", got, c.running_var, batch, 0.3, "mask")
    whole = cases.call((12, 5, 3), "float64", seed=1).x
    exact = oracle.forward(whole)
    got = running_of(c, correction, moments=fastbn.moments(whole))[1]
    cases.assert_running("running_var", got, c.running_var, exact.var * 36 / (36 - correction), 0.3, "moments")
    got = running_of(c, correction, virtual_batch_size=2)[1]
    wanted = c.running_var.copy()
    for i in range(0, 6, 2):
        fastbn.forward(c.x[i : i + 2], None, None, c.running_mean.copy(), wanted, momentum=0.3, correction=correction)
    cases.assert_same_bits(got, wanted)


BAD: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "-1": (-1, ValueError, ("-1", "0 to M - 1")),
    "-2**70": (-(2**70), ValueError, ("0 to M - 1",)),
    "1.0": (1.0, TypeError, ("1.0", "integer")),
    "nan": (np.nan, TypeError, ("nan", "integer")),
    "True": (True, TypeError, ("True", "integer")),
    "None": (None, TypeError, ("None", "integer")),
    "'1'": ("1", TypeError, ("'1'", "integer")),
    "[1]": ([1], TypeError, ("[1]", "integer")),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_no_correction(any_backend: cases.Kernel, bad: str, training: bool, tracked: bool) -> None:
    """Whether it is used or not."""
    value, error, words = BAD[bad]
    c = cases.call(SHAPE)
    given: dict[str, Any] = {"x": c.x, "training": training, "out": np.zeros_like(c.x)}
    if tracked or not training:
        given |= {"running_mean": c.running_mean, "running_var": c.running_var}
    assert_refused(fastbn.forward, {**given, "correction": value}, error, "correction", *words)
    assert_refused(fastbn.BatchNorm, {"num_features": 5, "correction": value}, error, "correction", *words)


@pytest.mark.parametrize("correction", [M, M + 1, 2**31, 2**70])
def test_too_many(any_backend: cases.Kernel, correction: int) -> None:
    """M is named; without running statistics too."""
    c = cases.call(SHAPE)
    words = ("correction", str(correction), "M = 18", "here 17")
    given: dict[str, Any] = {"x": c.x, "out": np.zeros_like(c.x), "correction": correction}
    assert_refused(fastbn.forward, given, ValueError, *words)
    given |= {"running_mean": c.running_mean, "running_var": c.running_var}
    assert_refused(fastbn.forward, given, ValueError, *words)
    fastbn.forward(**given, training=False)


def test_too_many_of_what_counts(any_backend: cases.Kernel) -> None:
    """Of a mask, of moments, of the smallest virtual batch; nothing is changed by those before it."""
    c = cases.call(SHAPE)
    given = {"x": c.x, "running_mean": c.running_mean, "running_var": c.running_var, "out": np.zeros_like(c.x)}
    mask = np.zeros((6, 3), bool)
    mask[:2, :2] = True
    assert_refused(fastbn.forward, {**given, "mask": mask, "correction": 4}, ValueError, "correction", "M = 4")
    few = fastbn.moments(c.x[:1])
    assert_refused(fastbn.forward, {**given, "moments": few, "correction": 3}, ValueError, "correction", "M = 3")
    fastbn.forward(c.x[:1], moments=fastbn.moments(c.x), correction=17)
    virtual = {**given, "virtual_batch_size": 4, "correction": 6}
    assert_refused(fastbn.forward, virtual, ValueError, "correction", "M = 6", "virtual batch 4:6")


@pytest.mark.parametrize(
    ("make", "default"), [(fastbn.BatchNorm, 1), (fastbn.BatchNorm.keras, 0), (fastbn.BatchNorm.onnx, 0)]
)
def test_layer(any_backend: cases.Kernel, make: Any, default: int) -> None:
    """An argument, an attribute, and in the repr where it is not that of the convention."""
    c = cases.call(SHAPE)
    for given in ({}, {"correction": 0}, {"correction": 1}, {"correction": 5}):
        bn = make(5, axis=1, momentum=0.5, **given)
        correction = given.get("correction", default)
        assert bn.correction == correction
        assert ("correction" in repr(bn)) == (correction != default)
        bn(c.x)
        mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
        fastbn.forward(c.x, None, None, mean, var, momentum=0.5, correction=correction)
        cases.assert_same_bits((bn.running_mean, bn.running_var), (mean, var))
        bn.correction = 2
        fastbn.recalibrate([bn], [c.x[:2], c.x[2:]], bn)
        np.testing.assert_allclose(bn.running_var, fastbn.moments(c.x).var(2), rtol=1e-6)
        bn.eval()(c.x[:0])


def test_layer_whose_batch_is_too_small(any_backend: cases.Kernel) -> None:
    c = cases.call(SHAPE)
    bn = fastbn.BatchNorm(5, correction=M)
    before = {name: array.tobytes() for name, array in bn.state_dict().items()}
    assert_refused(bn, {"x": c.x}, ValueError, "correction", "M = 18")
    assert {name: array.tobytes() for name, array in bn.state_dict().items()} == before
    assert bn.eval()(c.x).shape == SHAPE
