"""Do forward, infer and backward take and return what the contract says?"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest

import fastbn
from fastbn.call.record import USUAL, Options

Array = np.ndarray[Any, Any]

SIGNATURES = {
    "forward": "(x, gamma=None, beta=None, running_mean=None, running_var=None, *, training=True, momentum=0.1, "
    "correction=1, eps=1e-05, axis=1, mask=None, activation=None, residual=None, out=None, backend=None, moments=None, "
    "virtual_batch_size=None)",
    "backward": "(dy, cache, *, out=None, backend=None, sums=None)",
    "moments": "(x, *, axis=1, mask=None, backend=None)",
    "backward_sums": "(dy, cache, *, backend=None)",
    "recalibrate": "(layers, batches, forward)",
    "infer": "(x, gamma, beta, running_mean, running_var, *, eps=1e-05, axis=1, activation=None, residual=None, "
    "out=None, backend=None)",
    "BatchNorm": "(num_features, *, eps=1e-05, momentum=0.1, correction=1, affine=True, "
    "track_running_stats=True, axis=1, activation=None, dtype='float32', backend=None, virtual_batch_size=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    found = inspect.signature(getattr(fastbn, name))
    bare = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    assert str(found.replace(parameters=bare, return_annotation=found.empty)) == SIGNATURES[name]


def test_results_unpack(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    forward = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual)
    y, cache = forward
    assert isinstance(forward, fastbn.Forward)
    assert isinstance(cache, fastbn.Cache)
    assert y is forward.y
    assert cache is forward.cache
    gradients = fastbn.backward(c.dy, cache)
    dx, dgamma, dbeta = gradients
    assert isinstance(gradients, fastbn.Gradients)
    assert (dx is gradients.dx, dgamma is gradients.dgamma, dbeta is gradients.dbeta) == (True, True, True)
    assert np.array_equal(gradients.dresidual, c.dy)


def test_dtypes_and_shapes(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var, residual=c.residual)
    dx, dgamma, dbeta = gradients = fastbn.backward(c.dy, cache)
    inferred = fastbn.infer(c.x, c.gamma, c.beta, c.running_mean, c.running_var)
    for array in (y, dx, gradients.dresidual, inferred):
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape) == (np.dtype(dtype), c.x.shape)
    for array in (dgamma, dbeta, cache.mean, cache.var, cache.inv_std, c.running_mean, c.running_var):
        assert (array.dtype, array.shape) == (np.dtype(dtype), (5,))


def test_cache_tells_the_statistics(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((60, 5, 3), dtype)
    exact = oracle.forward(c.x)
    _, cache = fastbn.forward(c.x, c.gamma, c.beta)
    for name in ("mean", "var", "inv_std"):
        np.testing.assert_allclose(
            getattr(cache, name),
            getattr(exact, name).astype(dtype),
            rtol=2 * cases.ROUNDING[dtype] * np.finfo(dtype).eps,
            err_msg=name,
        )
    _, cache = fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var, training=False)
    cases.assert_same_bits((cache.mean, cache.var), (c.running_mean, c.running_var))


def test_absent_parameters_are_ones_and_zeros(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    ones, zeros = np.ones(5, dtype), np.zeros(5, dtype)
    cases.assert_same_bits(fastbn.forward(c.x).y, fastbn.forward(c.x, ones, zeros).y)
    cases.assert_same_bits(fastbn.forward(c.x, None, c.beta).y, fastbn.forward(c.x, ones, c.beta).y)
    cases.assert_same_bits(fastbn.forward(c.x, c.gamma).y, fastbn.forward(c.x, c.gamma, zeros).y)
    statistics = (c.running_mean, c.running_var)
    cases.assert_same_bits(fastbn.infer(c.x, None, None, *statistics), fastbn.infer(c.x, ones, zeros, *statistics))


@pytest.mark.parametrize("given", ["float16", "float32", "float64", "longdouble", "bfloat16", "list"])
def test_parameters_of_any_float_dtype(kernel: cases.Kernel, dtype: str, given: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    if given == "list":
        gamma, beta = c.gamma.tolist(), c.beta.tolist()
    else:
        kind = pytest.importorskip("ml_dtypes").bfloat16 if given == "bfloat16" else given
        gamma, beta = c.gamma.astype(kind), c.beta.astype(kind)
    y, _ = fastbn.forward(c.x, gamma, beta)
    g, b = (np.asarray(p).astype(np.longdouble) for p in (gamma, beta))
    cases.assert_y(y, oracle.forward(c.x, g, b), g)
    mixed, _ = fastbn.forward(c.x, gamma, c.beta)
    cases.assert_y(mixed, oracle.forward(c.x, g, c.beta), g)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, np.float32(0.25), 1])
def test_running_statistics_blend(kernel: cases.Kernel, dtype: str, momentum: float) -> None:
    """With the unbiased variance, over several batches, and alike for a batch of two values."""
    for shape in ((2, 5), (6, 5, 3)):
        c = cases.call(shape, dtype)
        mean, var = c.running_mean.copy(), c.running_var.copy()
        for seed in range(3):
            x = cases.call(shape, dtype, seed=seed, offset=100).x
            exact, old = oracle.forward(x), (mean.copy(), var.copy())
            fastbn.forward(x, None, None, mean, var, momentum=momentum)
            count = x.size // 5
            cases.assert_running("running_mean", mean, old[0], exact.mean, float(momentum))
            cases.assert_running("running_var", var, old[1], oracle.unbiased(exact.var, count), float(momentum))
        if momentum == 0:
            cases.assert_same_bits((mean, var), (c.running_mean, c.running_var))


def test_given_statistics_are_left_alone(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    mean, var = c.running_mean.copy(), c.running_var.copy()
    mean.flags.writeable = var.flags.writeable = False
    frozen, _ = fastbn.forward(c.x, c.gamma, c.beta, mean, var, training=False, activation="relu", residual=c.residual)
    inferred = fastbn.infer(c.x, c.gamma, c.beta, mean, var, activation="relu", residual=c.residual)
    cases.assert_same_bits(frozen, inferred)
    cases.assert_same_bits((mean, var), (c.running_mean, c.running_var))
    exact = oracle.forward(c.x, c.gamma, c.beta, mean, var, activation="relu", residual=c.residual)
    cases.assert_y(inferred, exact, c.gamma, activation="relu")


def test_statistics_do_not_change_y(kernel: cases.Kernel, dtype: str) -> None:
    c = cases.call((6, 5, 3), dtype)
    plain = fastbn.forward(c.x, c.gamma, c.beta).y
    cases.assert_same_bits(fastbn.forward(c.x, c.gamma, c.beta, c.running_mean, c.running_var).y, plain)


def test_one_value_per_channel_with_given_statistics(kernel: cases.Kernel, dtype: str) -> None:
    cases.check(cases.call((1, 5), dtype), training=False, activation="relu", residual=True)
    cases.check(cases.call((1, 5, 1, 1), dtype), training=False)


def test_lists_of_floats_are_arrays(kernel: cases.Kernel) -> None:
    x = [[1.0, 10.0], [3.0, 30.0]]
    y, cache = fastbn.forward(x, [1.0, 2.0], [0.0, 1.0], eps=0)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, [[-1, -1], [1, 3]], rtol=1e-15)
    dx, dgamma, dbeta = fastbn.backward([[1.0, 0.0], [1.0, 0.0]], cache)
    np.testing.assert_allclose(dx, np.zeros((2, 2)), atol=1e-15)
    np.testing.assert_allclose(dgamma, [0, 0], atol=1e-15)
    np.testing.assert_allclose(dbeta, [2, 0], atol=1e-15)


def test_subclasses_count_as_plain_arrays(kernel: cases.Kernel, tmp_path: Path) -> None:
    c = cases.call((6, 5))
    wanted = fastbn.forward(c.x, c.gamma, c.beta).y
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=c.x.shape)
    mapped[...] = c.x
    cases.assert_same_bits(fastbn.forward(mapped, c.gamma, c.beta).y, wanted)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=c.x.shape)
    y = fastbn.forward(c.x, c.gamma, c.beta, out=out).y
    assert y is out
    assert np.array_equal(out, wanted)


def test_results_are_fresh(kernel: cases.Kernel, dtype: str) -> None:
    """No result shares memory with an argument, or with the result of another call."""
    c = cases.call((6, 5, 3), dtype)
    y, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual, activation="relu")
    gradients = fastbn.backward(c.dy, cache)
    again = fastbn.backward(c.dy, cache)
    results = [y, *gradients, gradients.dresidual, *again, again.dresidual]
    for i, result in enumerate(results):
        for other in (c.x, c.dy, c.residual, c.gamma, c.beta, *results[:i]):
            assert not np.shares_memory(result, other)


def test_disjoint_parts_of_one_buffer(kernel: cases.Kernel, dtype: str) -> None:
    """x, dy, residual and out may alternate in memory as long as no element is shared."""
    c = cases.call((4, 6, 8), dtype)
    wanted, cache = fastbn.forward(c.x, c.gamma, c.beta, residual=c.residual)
    dx = fastbn.backward(c.dy, cache).dx
    for part in (
        lambda a, i: a.reshape(4, 6, 8, 4)[..., i],
        lambda a, i: a.reshape(4, 4, 6, 8)[:, i],
        lambda a, i: a.reshape(4, 6, 4, 8)[:, :, i],
    ):
        buffer = np.zeros(4 * c.x.size, dtype)
        x, dy, residual, out = (part(buffer, i) for i in range(4))
        x[...], dy[...], residual[...] = c.x, c.dy, c.residual
        y, cache = fastbn.forward(x, c.gamma, c.beta, residual=residual, out=out)
        assert y is out
        assert np.array_equal(out, wanted)
        fastbn.backward(dy, cache, out=out)
        assert np.array_equal(out, dx)
        assert np.array_equal(x, c.x)
    large = np.zeros((32, 28, 28, 128), dtype)
    fastbn.infer(large[..., :64], None, None, np.zeros(64, dtype), np.ones(64, dtype), axis=-1, out=large[..., 64:])


EMPTY = ((0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0, 5), (2, 1, 0))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_no_values_per_channel(kernel: cases.Kernel, dtype: str, shape: tuple[int, ...]) -> None:
    """An empty y from infer, and from forward with given statistics, whose gradients are zero."""
    c = cases.call(shape, dtype)
    arguments = (c.x, c.gamma, c.beta, c.running_mean, c.running_var)
    y = fastbn.infer(*arguments)
    assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
    out = np.empty(shape, dtype)
    assert fastbn.infer(*arguments, residual=c.residual, activation="relu", out=out) is out
    assert fastbn.infer(*arguments, out=c.x) is c.x
    y, cache = fastbn.forward(*arguments, training=False)
    dx, dgamma, dbeta = fastbn.backward(c.dy, cache)
    assert y.shape == dx.shape == shape
    assert not dgamma.any()
    assert not dbeta.any()


NO_CHANNELS = """
import numpy as np, fastbn
for dtype in ("float32", "float64"):
    for shape, axis in ((4, 0), 1), ((0, 4), 0), ((4, 0, 3), 1), ((1, 0, 5), 1), ((3, 2, 0), -1):
        x, none = np.zeros(shape, dtype), np.zeros(0, dtype)
        with fastbn.use_backend("BACKEND"):
            y, cache = fastbn.forward(x, none, none, none, none, axis=axis)
            dx, dgamma, dbeta = fastbn.backward(x, cache)
            inferred = fastbn.infer(x, none, none, none, none, axis=axis)
        assert y.shape == dx.shape == inferred.shape == shape
        assert dgamma.shape == dbeta.shape == (0,)
print("done")
"""


@pytest.mark.parametrize("backend", fastbn.backends())
def test_no_channels(backend: str, tmp_path: Path) -> None:
    """Empty results; in a process of its own, since a division by zero would end it."""
    done = cases.run_python(NO_CHANNELS.replace("BACKEND", backend), tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


@pytest.mark.parametrize("given", [*USUAL, ("leaky_relu", 0.3), ("leaky_relu", 0.01)])
def test_options_of_a_cache(given: Any) -> None:
    """They are as the caller gave them. Usual ones are those that the express lane knows, by either way."""
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    for mask in (None, np.ones(4, bool)):
        options = fastbn.forward(x, activation=given, mask=mask).cache._parts.options
        assert options.checked() == Options(given).checked()
        if given in USUAL:
            assert options is USUAL[given]
