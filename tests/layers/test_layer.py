"""Does BatchNorm behave as torch's layers do, but in NumPy?"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cases
import numpy as np
import oracle
import pytest
from test_checks import assert_refused

import fastbn

Array = np.ndarray[Any, Any]


def trained(**options: Any) -> fastbn.BatchNorm:
    """A layer of 5 channels that has seen two batches and has parameters of its own."""
    bn = fastbn.BatchNorm(5, **options)
    for seed in (1, 2):
        bn(cases.call((6, 5, 3), bn.dtype, seed=seed).x)
    c = cases.call((6, 5, 3), bn.dtype)
    for array, values in zip(bn.parameters().values(), (c.gamma, c.beta), strict=False):
        array[...] = values
    return bn


def state_of(bn: fastbn.BatchNorm) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in bn.state_dict().items()}


def test_first_state(dtype: str) -> None:
    bn = fastbn.BatchNorm(5, dtype=dtype)
    wanted = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
    for name, value in wanted.items():
        array = getattr(bn, name)
        assert (array.dtype, array.shape) == (np.dtype(dtype), (5,))
        assert (array == value).all()
    assert bn.num_batches_tracked == 0
    assert bn.training is True


def test_a_call_is_forward(kernel: cases.Kernel, dtype: str) -> None:
    """With the layer's arrays and options, in training and after it; and backward is its gradient."""
    c = cases.call((6, 3, 5), dtype, axis=-1)
    options: dict[str, Any] = {"eps": 0.01, "axis": -1, "activation": "relu"}
    bn = fastbn.BatchNorm(5, momentum=0.3, dtype=dtype, **options)
    bn.weight[...], bn.bias[...] = c.gamma, c.beta
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    for training in (True, False):
        assert bn.train(training) is bn
        wanted, cache = fastbn.forward(
            c.x, c.gamma, c.beta, mean, var, training=training, momentum=0.3, residual=c.residual, **options
        )
        cases.assert_same_bits(bn(c.x, residual=c.residual), wanted)
        cases.assert_same_bits((bn.running_mean, bn.running_var), (mean, var))
        gradients = fastbn.backward(c.dy, cache)
        cases.assert_same_bits(bn.backward(c.dy), gradients.dx)
        cases.assert_same_bits(bn.gradients()["weight"], gradients.dgamma)
        cases.assert_same_bits(bn.gradients()["bias"], gradients.dbeta)
        cases.assert_same_bits(bn.dresidual, gradients.dresidual)
    assert bn.num_batches_tracked == 1


def test_out(kernel: cases.Kernel) -> None:
    c = cases.call((6, 5, 3))
    bn = trained()
    y, dx = np.empty_like(c.x), np.empty_like(c.x)
    assert bn(c.x, out=y) is y
    assert bn.backward(c.dy, out=dx) is dx
    cases.assert_same_bits(y, bn(c.x))
    cases.assert_same_bits(dx, bn.backward(c.dy))


def test_backend_of_the_layer() -> None:
    """It goes before the one that the context asks for."""
    c = cases.call((6, 5, 3))
    wanted = fastbn.forward(c.x, np.ones(5, np.float32), np.zeros(5, np.float32), backend="numpy").y
    bn = fastbn.BatchNorm(5, backend="numpy")
    with fastbn.use_backend(fastbn.backends()[0]):
        cases.assert_same_bits(bn(c.x), wanted)


def test_train_and_eval() -> None:
    bn = trained()
    assert bn.eval() is bn
    assert bn.training is False
    before = state_of(bn)
    x = cases.call((6, 5, 3), seed=7).x
    y = bn(x)
    assert state_of(bn) == before
    cases.assert_same_bits(y, bn(x))
    assert bn.train() is bn
    assert bn.training is True
    bn(x)
    assert state_of(bn) != before


def test_one_value_and_none_after_training() -> None:
    bn = trained().eval()
    assert bn(np.zeros((1, 5), np.float32)).shape == (1, 5)
    assert bn(np.zeros((0, 5), np.float32)).shape == (0, 5)


def test_cumulative_average(dtype: str) -> None:
    """momentum=None weighs all batches alike."""
    bn = fastbn.BatchNorm(5, momentum=None, dtype=dtype)
    batches = [oracle.forward(cases.call((6, 5, 3), dtype, seed=seed, offset=seed).x) for seed in range(5)]
    for seed in range(5):
        bn(cases.call((6, 5, 3), dtype, seed=seed, offset=seed).x)
    rtol = 8 * np.finfo(dtype).eps
    np.testing.assert_allclose(bn.running_mean, sum(b.mean for b in batches) / 5, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(bn.running_var, sum(oracle.unbiased(b.var, 18) for b in batches) / 5, rtol=rtol)
    assert bn.num_batches_tracked == 5


def test_without_running_statistics() -> None:
    bn = fastbn.BatchNorm(5, track_running_stats=False)
    assert bn.running_mean is None
    assert bn.running_var is None
    x = cases.call((6, 5, 3)).x
    y = bn(x)
    cases.assert_same_bits(bn.eval()(x), y)
    assert bn.num_batches_tracked == 0
    assert set(bn.state_dict()) == {"weight", "bias"}


def test_without_parameters() -> None:
    bn = fastbn.BatchNorm(5, affine=False)
    assert bn.weight is None
    assert bn.bias is None
    c = cases.call((6, 5, 3))
    cases.assert_same_bits(bn(c.x), fastbn.forward(c.x).y)
    bn.backward(c.dy)
    assert bn.parameters() == {}
    assert bn.gradients() == {}
    assert set(bn.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_parameters_are_the_arrays_themselves() -> None:
    """A step that an optimizer takes on them is seen by the next call."""
    bn = trained()
    parameters = bn.parameters()
    assert list(parameters) == ["weight", "bias"]
    assert parameters["weight"] is bn.weight
    assert parameters["bias"] is bn.bias
    c = cases.call((6, 5, 3))
    bn(c.x)
    bn.backward(c.dy)
    for name, gradient in bn.gradients().items():
        parameters[name] -= np.float32(0.1) * gradient
    cases.assert_same_bits(bn(c.x), fastbn.forward(c.x, parameters["weight"], parameters["bias"]).y)


def test_gradients_before_backward() -> None:
    bn = trained()
    assert bn.gradients() == {}
    assert bn.dresidual is None


def test_backward_before_any_call() -> None:
    with pytest.raises(RuntimeError, match="backward"):
        fastbn.BatchNorm(5).backward(np.zeros((2, 5), np.float32))


def test_reset() -> None:
    bn = trained()
    bn.reset_parameters()
    assert state_of(bn) == state_of(fastbn.BatchNorm(5))


def test_learns() -> None:
    """Gradient descent through a chain of two layers lowers the loss."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((64, 5)), rng.standard_normal((64, 5))
    layers = [fastbn.BatchNorm(5, dtype="float64", activation=activation) for activation in ("relu", None)]
    losses = []
    for _ in range(300):
        y = x
        for layer in layers:
            y = layer(y)
        losses.append(((y - target) ** 2).sum())
        d = 2 * (y - target) / len(x)
        for layer in reversed(layers):
            d = layer.backward(d)
            for name, gradient in layer.gradients().items():
                layer.parameters()[name] -= 0.05 * gradient
        x = x - 0.5 * d
    assert losses[-1] < losses[0] / 2


# Copies and states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "make", [fastbn.BatchNorm, fastbn.BatchNorm.keras, fastbn.BatchNorm.onnx], ids=["torch", "keras", "onnx"]
)
def test_duplicates(make: Any, duplicate: Any) -> None:
    """They start from the same state, compute the same, and then go their own way; also while a backward is pending."""
    bn = make(5, axis=1, momentum=0.7, activation="relu")
    c = cases.call((6, 5, 3))
    bn(c.x)
    other = duplicate(bn)
    assert state_of(other) == state_of(bn)
    assert repr(other) == repr(bn)
    cases.assert_same_bits(bn.backward(c.dy), (bn(c.x), bn.backward(c.dy))[1])
    other(c.x)
    assert state_of(other) == state_of(bn)
    cases.assert_same_bits(other.backward(c.dy), bn.backward(c.dy))
    before = state_of(bn)
    other(c.residual)
    other.weight[...] = 9
    assert state_of(bn) == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_has_arrays_of_its_own(copied: Any) -> None:
    bn = trained()
    before = state_of(bn)
    other = copied(bn)
    assert state_of(other) == before
    for name in (*bn.parameters(), "running_mean", "running_var"):
        getattr(other, name)[...] = 9
    assert state_of(bn) == before


def test_state_dict_is_a_copy() -> None:
    bn = trained()
    before = state_of(bn)
    for array in bn.state_dict().values():
        array[...] = 9
    assert state_of(bn) == before


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": "float64"}], ids=str
)
def test_state_round_trip(options: dict[str, Any]) -> None:
    bn, other = trained(**options), fastbn.BatchNorm(5, **options)
    arrays = {id(array) for array in other.parameters().values()}
    assert other.load_state_dict(bn.state_dict()) is None
    assert state_of(other) == state_of(bn)
    assert other.num_batches_tracked == bn.num_batches_tracked
    assert arrays == {id(array) for array in other.parameters().values()}, "parameters were replaced, not filled"


def test_state_may_lack_the_count() -> None:
    """As states of torch before 0.4.1 do."""
    bn, other = trained(), trained()
    state = bn.state_dict()
    del state["num_batches_tracked"]
    other.load_state_dict(state)
    assert other.num_batches_tracked == 2


def test_state_of_another_float_dtype() -> None:
    state = trained(dtype="float64").state_dict()
    bn = fastbn.BatchNorm(5)
    bn.load_state_dict(state)
    assert np.array_equal(bn.weight, state["weight"].astype(np.float32))


FIVE = np.zeros(5, np.float32)
BAD_STATES = {
    "not a mapping": (lambda s: [1], TypeError, ("state", "list", "mapping")),
    "none": (lambda s: None, TypeError, ("state", "NoneType", "mapping")),
    "empty": (lambda s: {}, ValueError, ("state", "weight", "running_var")),
    "a name is missing": (lambda s: {k: v for k, v in s.items() if k != "bias"}, ValueError, ("state", "bias")),
    "a name is unknown": (lambda s: {**s, "gamma": FIVE}, ValueError, ("state", "gamma", "weight")),
    "a name is no string": (lambda s: {**s, 1: FIVE}, (TypeError, ValueError), ("state", "1", "weight")),
    "a shape is another": (lambda s: {**s, "running_var": np.ones(4)}, ValueError, ("running_var", "(4,)", "(5,)")),
    "a shape broadcasts": (lambda s: {**s, "running_var": np.ones(1)}, ValueError, ("running_var", "(1,)", "(5,)")),
    "a scalar": (lambda s: {**s, "weight": 1.0}, ValueError, ("weight", "()", "(5,)")),
    "integers": (lambda s: {**s, "running_var": np.ones(5, int)}, TypeError, ("running_var", "int64", "float")),
    "strings": (lambda s: {**s, "running_var": ["a"] * 5}, TypeError, ("running_var", "U1", "float")),
    "none among them": (lambda s: {**s, "running_var": None}, TypeError, ("running_var", "object", "float")),
    "the count is a float": (
        lambda s: {**s, "num_batches_tracked": 1.5},
        TypeError,
        ("num_batches_tracked", "1.5", "integer"),
    ),
    "the count is negative": (lambda s: {**s, "num_batches_tracked": -1}, ValueError, ("num_batches_tracked", "-1")),
    "the count is two": (
        lambda s: {**s, "num_batches_tracked": np.array([1, 2])},
        ValueError,
        ("num_batches_tracked", "(2,)"),
    ),
    "the count is a bool": (
        lambda s: {**s, "num_batches_tracked": True},
        TypeError,
        ("num_batches_tracked", "integer"),
    ),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_bad_state_changes_nothing(bad: str) -> None:
    """Not even the arrays that come before the bad one."""
    make, error, words = BAD_STATES[bad]
    bn = trained()
    before = state_of(bn)
    other = fastbn.BatchNorm(5)
    other.weight[...] = 7
    state = make(other.state_dict())
    with pytest.raises(error) as caught:
        bn.load_state_dict(state)
    assert state_of(bn) == before
    assert all(word in str(caught.value) for word in words), caught.value


def test_state_that_overflows_is_loaded_whole_or_not_at_all() -> None:
    """NumPy warns of the overflow, and a warning may be an error, as it is here."""
    bn = trained()
    before = state_of(bn)
    state = {**fastbn.BatchNorm(5).state_dict(), "running_var": np.full(5, 1e300)}
    try:
        bn.load_state_dict(state)
    except (RuntimeWarning, ValueError):
        assert state_of(bn) == before
    else:
        assert np.isinf(bn.running_var).all()
        assert bn.num_batches_tracked == 0


# Bad arguments -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "num_features 0": ({"num_features": 0}, ValueError, ("num_features", "0", "positive")),
    "num_features -1": ({"num_features": -1}, ValueError, ("num_features", "-1", "positive")),
    "num_features 1.5": ({"num_features": 1.5}, TypeError, ("num_features", "1.5", "integer")),
    "num_features True": ({"num_features": True}, TypeError, ("num_features", "True", "integer")),
    "num_features None": ({"num_features": None}, TypeError, ("num_features", "None", "integer")),
    "eps -1": ({"eps": -1.0}, ValueError, ("eps", "-1.0", "finite")),
    "eps nan": ({"eps": float("nan")}, ValueError, ("eps", "nan", "finite")),
    "eps text": ({"eps": "x"}, TypeError, ("eps", "'x'", "number")),
    "momentum 2": ({"momentum": 2.0}, ValueError, ("momentum", "2.0", "0 to 1")),
    "momentum nan": ({"momentum": float("nan")}, ValueError, ("momentum", "nan", "0 to 1")),
    "momentum text": ({"momentum": "x"}, TypeError, ("momentum", "'x'", "number")),
    "affine 1": ({"affine": 1}, TypeError, ("affine", "1", "True")),
    "track_running_stats None": ({"track_running_stats": None}, TypeError, ("track_running_stats", "None", "True")),
    "axis 1.0": ({"axis": 1.0}, TypeError, ("axis", "1.0", "integer")),
    "activation gelu": ({"activation": "gelu"}, ValueError, ("activation", "'gelu'", "'relu'")),
    "activation gelu with a slope": ({"activation": ("gelu", 0.1)}, ValueError, ("activation", "'gelu'", "leaky_relu")),
    "slope nan": ({"activation": ("leaky_relu", np.nan)}, ValueError, ("slope", "nan", "finite")),
    "slope text": ({"activation": ("leaky_relu", "x")}, TypeError, ("slope", "'x'", "number")),
    "dtype int": ({"dtype": "int32"}, TypeError, ("dtype", "int32", "float32")),
    "dtype unknown": ({"dtype": "float33"}, TypeError, ("dtype", "'float33'", "float32")),
    "virtual_batch_size 0": ({"virtual_batch_size": 0}, ValueError, ("virtual_batch_size", "0", "positive")),
    "virtual_batch_size on the channels": ({"virtual_batch_size": 2, "axis": 0}, ValueError, ("axis 0",)),
    "backend": ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "'numpy'")),
    "backend 1": ({"backend": 1}, TypeError, ("backend", "1", "'numpy'")),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options(bad: str) -> None:
    options, error, words = BAD_OPTIONS[bad]
    assert_refused(fastbn.BatchNorm, {"num_features": 5, **options}, error, *words)


@pytest.mark.parametrize("make", [fastbn.BatchNorm.keras, fastbn.BatchNorm.onnx], ids=["keras", "onnx"])
def test_bad_options_of_other_conventions(make: Any) -> None:
    assert_refused(make, {"num_features": 5, "momentum": 1.5}, ValueError, "momentum", "1.5", "0 to 1")
    assert_refused(make, {"num_features": 5, "momentum": None}, TypeError, "momentum", "None", "number")
    assert_refused(make, {"num_features": 5, "epsilon": -1.0}, ValueError, "-1.0", "finite", "epsilon")


BAD_CALLS = {
    "float64": ({"x": np.zeros((6, 5))}, TypeError, ("x", "float64", "float32")),
    "integers": ({"x": np.zeros((6, 5), int)}, TypeError, ("x", "int64", "float32")),
    "channels": ({"x": np.zeros((6, 4), np.float32)}, ValueError, ("x", "(6, 4)", "4 channels", "5 channels")),
    "dimensions": ({"x": FIVE}, ValueError, ("x", "(5,)", "2 dimensions")),
    "one value": ({"x": np.zeros((1, 5), np.float32)}, ValueError, ("x", "(1, 5)", "2 or more")),
    "residual": ({"x": np.zeros((6, 5), np.float32), "residual": FIVE}, ValueError, ("residual", "(5,)", "(6, 5)")),
    "out": ({"x": np.zeros((6, 5), np.float32), "out": FIVE}, ValueError, ("out", "(5,)", "(6, 5)")),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_call_changes_nothing(bad: str) -> None:
    """Neither the state nor the backward pass that is pending."""
    arguments, error, words = BAD_CALLS[bad]
    c = cases.call((6, 5, 3))
    bn = trained()
    bn(c.x)
    wanted, before = bn.backward(c.dy), state_of(bn)
    assert_refused(bn, arguments, error, *words)
    assert state_of(bn) == before
    cases.assert_same_bits(bn.backward(c.dy), wanted)


def test_axis_that_x_does_not_have() -> None:
    bn = fastbn.BatchNorm(5, axis=3)
    assert_refused(bn, {"x": np.zeros((6, 5), np.float32)}, ValueError, "axis", "3", "-2 to 1")


def test_bad_dy_keeps_the_gradients() -> None:
    c = cases.call((6, 5, 3))
    bn = trained()
    bn(c.x)
    bn.backward(c.dy)
    before = {name: gradient.copy() for name, gradient in bn.gradients().items()}
    assert_refused(bn.backward, {"dy": FIVE}, ValueError, "dy", "(5,)", "(6, 5, 3)")
    for name, gradient in bn.gradients().items():
        cases.assert_same_bits(gradient, before[name])


def test_mode_must_be_a_bool() -> None:
    assert_refused(fastbn.BatchNorm(5).train, {"mode": 1}, TypeError, "mode", "1", "True")
