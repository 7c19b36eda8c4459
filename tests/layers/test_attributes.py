"""Does a layer refuse an attribute that it cannot work with where it is assigned?"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import cases
import numpy as np
import pytest
from test_checks import STRIDED, masked, read_only, zeros
from test_layer import BAD_OPTIONS, state_of, trained

import fastbn

Array = np.ndarray[Any, Any]


def attributes(bn: fastbn.BatchNorm) -> dict[str, Any]:
    return dict(vars(bn))


def assert_not_assigned(bn: fastbn.BatchNorm, name: str, value: Any, error: type[Exception], *words: str) -> None:
    """Assigning raises `error` with all words and the name in its message, and changes nothing."""
    before, state = attributes(bn), state_of(bn)
    with pytest.raises(error) as caught:
        setattr(bn, name, value)
    missing = [word for word in (name, *words) if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    now = attributes(bn)
    assert list(now) == list(before)
    assert all(now[key] is before[key] for key in before)
    assert state_of(bn) == state


ARRAYS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "a list": ([1.0] * 5, TypeError, ("list", "NumPy array", "(5,)")),
    "a number": (1.0, TypeError, ("1.0 (float)", "NumPy array")),
    "a string": ("ones", TypeError, ("'ones' (str)", "NumPy array")),
    "None": (None, TypeError, ("None (NoneType)", "NumPy array", "is True")),
    "integers": (np.ones(5, int), TypeError, ("int64", "float")),
    "bools": (np.ones(5, bool), TypeError, ("bool", "float")),
    "complex": (np.ones(5, complex), TypeError, ("complex128", "float")),
    "masked": (masked(5), TypeError, ("masked",)),
    "4 values": (zeros(4), ValueError, ("(4,)", "(5,)")),
    "1 value": (zeros(1), ValueError, ("(1,)", "(5,)")),
    "no dimension": (np.array(1.0), ValueError, ("()", "(5,)")),
    "two dimensions": (zeros((5, 1)), ValueError, ("(5, 1)", "(5,)")),
}
RUNNING = {
    **ARRAYS,
    "read-only": (read_only(zeros(5)), ValueError, ("read-only", "writable")),
    "all in one place": (STRIDED(zeros(1), (5,), (0,)), ValueError, ("strides", "overlap")),
    "longdouble": (zeros(5, np.longdouble), TypeError, (np.dtype(np.longdouble).name, "float64")),
}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("bad", ARRAYS)
def test_bad_parameters(bad: str, name: str) -> None:
    value, error, words = ARRAYS[bad]
    assert_not_assigned(trained(), name, value, error, *words)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("bad", RUNNING)
def test_bad_running_statistics(bad: str, name: str) -> None:
    value, error, words = RUNNING[bad]
    assert_not_assigned(trained(), name, value, error, *words)


@pytest.mark.parametrize(("name", "other"), [
    ("running_mean", "running_var"), ("running_var", "running_mean"), ("running_mean", "weight"),
    ("running_var", "bias"), ("weight", "running_mean"), ("bias", "running_var"),
])  # fmt: skip
def test_shared_arrays(name: str, other: str) -> None:
    """What a call updates is an array of its own."""
    bn = trained()
    assert_not_assigned(bn, name, getattr(bn, other), ValueError, other, "shared")
    assert_not_assigned(bn, name, getattr(bn, other)[::-1], ValueError, other, "shared")


def test_good_arrays(any_backend: cases.Kernel) -> None:
    """Of any float dtype; they are taken as they are, and calls use them."""
    c = cases.call((6, 5, 3))
    bn = trained()
    for weight in (c.gamma, c.gamma.astype(np.float64), c.gamma.astype(np.float16), read_only(c.gamma.copy()), bn.bias):
        bn.weight = weight
        assert bn.weight is weight
        assert bn.parameters()["weight"] is weight
        cases.assert_same_bits(bn(c.x), fastbn.forward(c.x, weight, bn.bias).y)
    bn.running_mean, bn.running_var = mean, var = c.running_mean.copy(), c.running_var.copy()
    wanted = mean.copy(), var.copy()
    bn(c.x)
    fastbn.forward(c.x, None, None, *wanted)
    cases.assert_same_bits((bn.running_mean, bn.running_var), wanted)
    assert bn.running_mean is mean
    assert bn.running_var is var


OTHERS: dict[str, tuple[str, Any, type[Exception], tuple[str, ...]]] = {
    "training 3": ("training", 3, TypeError, ("3", "True or False")),
    "training None": ("training", None, TypeError, ("None", "True or False")),
    "counter -1": ("num_batches_tracked", -1, ValueError, ("-1", "2**63 - 1")),
    "counter 2**63": ("num_batches_tracked", 2**63, ValueError, (str(2**63), "2**63 - 1")),
    "counter 1.0": ("num_batches_tracked", 1.0, TypeError, ("1.0", "integer")),
    "counter None": ("num_batches_tracked", None, TypeError, ("None", "integer")),
    "correction -1": ("correction", -1, ValueError, ("-1", "0 to M - 1")),
    "correction 0.5": ("correction", 0.5, TypeError, ("0.5", "integer")),
    "num_features 6": ("num_features", 6, ValueError, ("6", "5", "made with")),
    "axis 0": ("axis", "x", TypeError, ("'x'", "integer")),
    "momentum 7": ("momentum", 7, ValueError, ("7", "0 to 1")),
    "activation tanh": ("activation", "tanh", ValueError, ("'tanh'", "'relu'")),
    "dtype none": ("dtype", None, TypeError, ("None", "float32")),
    "dtype complex": ("dtype", complex, TypeError, ("complex", "float32")),
    "affine 1": ("affine", 1, TypeError, ("1", "True or False")),
    "track_running_stats none": ("track_running_stats", None, TypeError, ("None", "True or False")),
}


@pytest.mark.parametrize("bad", OTHERS)
def test_bad_values(bad: str) -> None:
    name, value, error, words = OTHERS[bad]
    assert_not_assigned(trained(), name, value, error, *words)


@pytest.mark.parametrize("bad", [bad for bad, (options, *_) in BAD_OPTIONS.items() if len(options) == 1])
def test_what_the_constructor_refuses(bad: str) -> None:
    """With the same error."""
    options, error, words = BAD_OPTIONS[bad]
    ((name, value),) = options.items()
    assert_not_assigned(trained(), name, value, error, *words)


def test_axis_and_virtual_batches() -> None:
    """They cannot be along the channels, whichever is assigned last."""
    assert_not_assigned(
        fastbn.BatchNorm(5, virtual_batch_size=2), "axis", 0, ValueError, "virtual_batch_size", "axis 0"
    )
    assert_not_assigned(fastbn.BatchNorm(5, axis=0), "virtual_batch_size", 2, ValueError, "axis 0")


def test_good_values(any_backend: cases.Kernel) -> None:
    """They are what the next call works with, and what is kept is as the constructor keeps it."""
    c = cases.call((6, 3, 5), axis=-1)
    bn = fastbn.BatchNorm(5)
    bn.eps, bn.momentum, bn.axis, bn.activation, bn.correction = (
        np.float32(0.25),
        1,
        np.int64(-1),
        ("leaky_relu", 0.5),
        2,
    )
    bn.num_features = np.int64(5)
    bn.virtual_batch_size, bn.num_batches_tracked, bn.training = np.int64(3), np.int64(7), np.True_
    kept = (bn.eps, bn.momentum, bn.axis, bn.num_features, bn.virtual_batch_size, bn.num_batches_tracked, bn.training)
    assert kept == (0.25, 1.0, -1, 5, 3, 7, True)
    assert [type(value) for value in kept] == [float, float, int, int, int, int, bool]
    mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
    wanted = fastbn.forward(
        c.x, np.ones(5), np.zeros(5), mean, var, eps=0.25, momentum=1.0, axis=-1, activation=("leaky_relu", 0.5),
        correction=2, virtual_batch_size=3,
    ).y  # fmt: skip
    cases.assert_same_bits(bn(c.x), wanted)
    cases.assert_same_bits((bn.running_mean, bn.running_var), (mean, var))
    assert bn.num_batches_tracked == 8
    bn.num_batches_tracked += 1
    assert bn.num_batches_tracked == 9
    bn.momentum = None
    bn.backend = "numpy"
    bn.backend = None
    bn.dtype = "float64"
    assert bn.dtype == np.dtype("float64")


# None ----------------------------------------------------------------------------------------------------------------


def test_no_running_statistics(any_backend: cases.Kernel) -> None:
    """As test-time adaptation sets PyTorch's layers: the batch's statistics from now on."""
    c = cases.call((6, 5, 3))
    bn = trained()
    wanted = fastbn.forward(c.x, bn.weight, bn.bias).y
    state = bn.state_dict()
    assert_not_assigned(bn, "running_mean", None, TypeError, "track_running_stats is True")
    bn.track_running_stats = False
    cases.assert_same_bits(bn.eval()(c.x), wanted)
    assert set(bn.state_dict()) == set(state), "the running statistics are still there"
    bn.running_mean = None
    bn.running_var = None
    cases.assert_same_bits(bn(c.x), wanted)
    assert set(bn.state_dict()) == {"weight", "bias"}
    bn.load_state_dict(bn.state_dict())
    assert_not_assigned(bn, "track_running_stats", True, ValueError, "running_mean=None", "array")
    bn.running_mean, bn.running_var = state["running_mean"], state["running_var"]
    bn.track_running_stats = True
    cases.assert_same_bits(bn(c.x), fastbn.infer(c.x, bn.weight, bn.bias, bn.running_mean, bn.running_var))


def test_no_parameters(any_backend: cases.Kernel) -> None:
    c = cases.call((6, 5, 3))
    bn = trained()
    assert_not_assigned(bn, "bias", None, TypeError, "affine is True")
    bn.affine = False
    bn.bias = None
    cases.assert_same_bits(bn(c.x), fastbn.forward(c.x, bn.weight).y)
    bn.backward(c.dy)
    assert list(bn.parameters()) == list(bn.gradients()) == ["weight"]
    assert_not_assigned(bn, "affine", True, ValueError, "bias=None", "array")
    bn.load_state_dict(bn.state_dict())
    bn.weight = None
    cases.assert_same_bits(bn(c.x), fastbn.forward(c.x).y)
    assert bn.parameters() == {}
    bn.weight, bn.bias = c.gamma, c.beta
    bn.affine = True
    assert list(bn.parameters()) == ["weight", "bias"]


# Names ---------------------------------------------------------------------------------------------------------------

SLIPS = {
    "wieght": "weight",
    "Weight": "weight",
    "weights": "weight",
    "wight": "weight",
    "bais": "bias",
    "Bias": "bias",
    "biases": "bias",
    "running_men": "running_mean",
    "runing_mean": "running_mean",
    "running_avg_mean": "running_mean",
    "running_variance": "running_var",
    "running_vars": "running_var",
    "epsilon": "eps",
    "Eps": "eps",
    "esp": "eps",
    "sep": "eps",
    "momentun": "momentum",
    "trainning": "training",
    "axes": "axis",
    "activations": "activation",
    "num_batch_tracked": "num_batches_tracked",
    "num_feature": "num_features",
    "track_runing_stats": "track_running_stats",
    "corection": "correction",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_name(name: str) -> None:
    """It would otherwise change nothing, in silence."""
    assert_not_assigned(trained(), name, np.ones(5), AttributeError, "did you mean", repr(SLIPS[name]))


@pytest.mark.parametrize("name", ["name", "label", "index", "hook", "frozen", "layer_id", "comment", "_mine"])
def test_other_names(name: str) -> None:
    """Belong to the user; copies and pickles keep them."""
    bn = trained()
    setattr(bn, name, "mine")
    for other in (copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert getattr(other, name) == "mine"


class Gated(fastbn.BatchNorm):
    """With attributes of its own, one of which is nearly one of the layer's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weights = np.ones(3)
        self.gamma = 0.5


def test_subclasses_are_free(any_backend: cases.Kernel) -> None:
    """To have any attribute; those of the layer are checked as ever."""
    bn = Gated(5)
    bn.wieght = 3
    for other in (copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert type(other) is Gated
        assert (other.wieght, other.gamma, other.weights.tolist()) == (3, 0.5, [1, 1, 1])
        assert other(cases.call((6, 5, 3)).x).shape == (6, 5, 3)
    assert_not_assigned(bn, "weight", [1.0] * 5, TypeError, "list")
    assert_not_assigned(bn, "eps", -1, ValueError, "-1")


def test_methods_and_what_is_private() -> None:
    """Methods may be replaced, as anywhere in Python; a property may not."""
    bn = trained()
    bn.backward = lambda dy: dy
    assert bn.backward(3) == 3
    with pytest.raises(AttributeError, match="dresidual"):
        bn.dresidual = zeros(5)
