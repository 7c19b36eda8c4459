"""Does a folded layer compute what the layer and its norm did?"""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest

import fastbn

Array = np.ndarray[Any, Any]
EXAMPLE = cases.CHECKOUT / "examples" / "fold.py"


class Norm(NamedTuple):
    gamma: Array | None
    beta: Array | None
    running_mean: Array
    running_var: Array


def norm_of(channels: int, dtype: Any = "float64") -> Norm:
    rng = np.random.default_rng(channels)
    gamma, beta, mean = rng.standard_normal((3, channels))
    return Norm(*(array.astype(dtype) for array in (gamma, beta, mean, rng.uniform(0.5, 2, channels))))


def random(*shape: int, dtype: Any = "float64") -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def convolution(x: Array, weight: Array, bias: Array | None, groups: int = 1) -> Array:
    """Of any rank: x (N, in, ...), weight (out, in / groups, ...); no padding."""
    outputs, inputs, *kernel = weight.shape
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axes)
    per_group = outputs // groups
    parts = []
    for group in range(groups):
        some = windows[:, group * inputs : (group + 1) * inputs]
        mine = weight[group * per_group : (group + 1) * per_group]
        taken = (1, *range(x.ndim, x.ndim + len(kernel)))
        y = np.tensordot(some, mine, (taken, (1, *range(2, weight.ndim))))
        parts.append(np.moveaxis(y, -1, 1))
    return add_bias(np.concatenate(parts, axis=1), bias)


def transposed(x: Array, weight: Array, bias: Array | None, groups: int = 1) -> Array:
    """Weight is (in, out / groups, ...): the convolution of the turned kernel, over padded x."""
    kernel = weight.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((size - 1, size - 1) for size in kernel)])
    flipped = np.flip(weight, tuple(range(2, weight.ndim)))
    grouped = flipped.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    return convolution(padded, grouped.reshape(-1, *grouped.shape[2:]), bias, groups)


def add_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in y.shape[2:]))


def test_signature() -> None:
    found = inspect.signature(fastbn.fold)
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    assert str(found.replace(parameters=parameters, return_annotation=found.empty)) == (
        "(weight, bias, gamma, beta, running_mean, running_var, *, eps=1e-05, output_axis=0)"
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["one group", "two groups", "depthwise"])
@pytest.mark.parametrize("size", [(9,), (7, 8), (4, 5, 6)], ids=["1d", "2d", "3d"])
def test_convolution(size: tuple[int, ...], groups: int, with_bias: bool) -> None:
    x, weight = random(2, 6, *size), random(12, 6 // groups, *(3 for _ in size))
    bias, norm = random(12) if with_bias else None, norm_of(12)
    wanted = fastbn.infer(convolution(x, weight, bias, groups), *norm)
    w, b = fastbn.fold(weight, bias, *norm)
    assert (w.shape, b.shape) == (weight.shape, (12,))
    np.testing.assert_allclose(convolution(x, w, b, groups), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(9,), (7, 8)], ids=["1d", "2d"])
def test_transposed_convolution(size: tuple[int, ...], groups: int) -> None:
    """With output_axis=1, where the output channels of the groups recur."""
    x, weight = random(2, 6, *size), random(6, 4, *(3 for _ in size))
    bias, norm = random(4 * groups), norm_of(4 * groups)
    wanted = fastbn.infer(transposed(x, weight, bias, groups), *norm)
    w, b = fastbn.fold(weight, bias, *norm, output_axis=1)
    assert (w.shape, b.shape) == (weight.shape, bias.shape)
    np.testing.assert_allclose(transposed(x, w, b, groups), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_linear(axis: int) -> None:
    weight, x, norm, bias = random(7, 5), random(4, 5), norm_of(7), random(7)
    given = weight if axis in (0, -2) else np.ascontiguousarray(weight.T)
    w, b = fastbn.fold(given, bias, *norm, output_axis=axis)
    w = w if axis in (0, -2) else w.T
    np.testing.assert_allclose(x @ w.T + b, fastbn.infer(x @ weight.T + bias, *norm), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("absent", ["gamma", "beta", "both"])
def test_absent_parameters(absent: str) -> None:
    norm, weight, x = norm_of(7), random(7, 5), random(4, 5)
    norm = norm._replace(**{name: None for name in ("gamma", "beta") if absent in (name, "both")})
    w, b = fastbn.fold(weight, None, *norm, eps=0.5)
    np.testing.assert_allclose(x @ w.T + b, fastbn.infer(x @ weight.T, *norm, eps=0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [*cases.DTYPES, *cases.HALVES])
def test_rounded_once(kind: str) -> None:
    """The nearest number of weight's dtype to what float64 gives."""
    weight, bias, norm = random(40, 50, dtype=kind), random(40, dtype="float32"), norm_of(40, "float32")
    w, b = fastbn.fold(weight, bias, *norm)
    gamma, beta, mean, var = (array.astype(np.float64) for array in norm)
    slope = gamma / np.sqrt(var + 1e-5)
    for got, exact in ((w, weight.astype(np.float64) * slope[:, None]), (b, (bias - mean) * slope + beta)):
        assert got.dtype == np.dtype(kind)
        unit = cases.oracle.ulp(exact, got.dtype)
        worst = abs(got.astype(np.float64) - exact) / unit.astype(np.float64)
        assert worst.max() <= 0.5 + 1e-9
        assert worst.max() > 0.3 or kind == "float64"


@pytest.mark.skipif("bfloat16" not in cases.HALVES, reason="needs ml_dtypes")
def test_bfloat16_is_not_rounded_twice() -> None:
    """Just above a tie, which float32 would have rounded to the tie."""
    exact = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8 - 2.0**-40, 1 + 3 * 2.0**-8])
    w, _ = fastbn.fold(np.ones((4, 1), "bfloat16"), None, exact, None, np.zeros(4), np.ones(4), eps=0)
    assert w.astype(float).ravel().tolist() == [1 + 2.0**-7, 1, 1 + 2.0**-7, 1 + 2.0**-6]


def test_given_arrays_stay_and_results_are_fresh() -> None:
    weight, bias, norm = random(7, 5), random(7), norm_of(7)
    before = [array.tobytes() for array in (weight, bias, *norm)]
    w, b = fastbn.fold(weight, bias, *norm)
    assert before == [array.tobytes() for array in (weight, bias, *norm)]
    for made in (w, b):
        assert made.flags.writeable
        assert not any(np.shares_memory(made, array) for array in (weight, bias, *norm))


@pytest.mark.parametrize("place", cases.PLACEMENTS)
def test_weight_of_any_strides(place: str) -> None:
    weight, norm = random(4, 3, 2, 2, dtype="float32"), norm_of(4)
    w, b = fastbn.fold(cases.PLACEMENTS[place](weight), None, *norm)
    wanted = fastbn.fold(weight, None, *norm)
    assert w.dtype == np.float32
    assert np.array_equal(w, wanted[0])
    assert np.array_equal(b, wanted[1])


# Warnings ------------------------------------------------------------------------------------------------------------


def folded(weight: Array, **changes: Any) -> str:
    """The warning of a fold of 3 channels."""
    given: dict[str, Any] = {"bias": None, "gamma": np.ones(3), "beta": None}
    given |= {"running_mean": np.zeros(3), "running_var": np.ones(3)} | changes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastbn.fold(weight, **given)
    assert [type(warning.message) for warning in caught] in ([], [fastbn.FoldWarning])
    assert all(warning.filename == __file__ for warning in caught)
    return str(caught[0].message) if caught else ""


LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "tiny variance": ({"running_var": [1, 1e-12, 1]}, "variance 1e-12 is below 1% of eps 1e-05"),
    "no variance": ({"running_var": [1, 0, 1]}, "variance 0 is below 1% of eps 1e-05"),
    "negative variance": ({"running_var": [1, -1, 1]}, "w or b is not finite in float32"),
    "huge slope": ({"gamma": [1, 5000, 1]}, "gamma / sqrt(variance + eps) is 5e+03"),
    "no eps": ({"running_var": [1, 1e-8, 1], "eps": 0.0}, "gamma / sqrt(variance + eps) is 1e+04"),
    "far mean": ({"running_mean": [0, 1e6, 0]}, "the mean is 1e+06 standard deviations away"),
    "overflow": ({"gamma": [1, 1e39, 1]}, "w or b is not finite in float32"),
    "overflow of the bias": ({"beta": [1, 1e39, 1]}, "w or b is not finite in float32"),
    "underflow": ({"gamma": [1, 1e-39, 1]}, "the largest weight, 1e-39, is not a normal number of float32"),
    "a NaN": ({"running_mean": [0, np.nan, 0]}, "w or b is not finite in float32"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_named(loss: str) -> None:
    changes, reason = LOSSES[loss]
    arrays = {name: np.array(value, float) if isinstance(value, list) else value for name, value in changes.items()}
    assert folded(np.ones((3, 4), np.float32), **arrays) == f"fold: accuracy is lost in channel 1 ({reason})"


def test_the_loss_is_real() -> None:
    """What a layer adds up to a far mean has lost digits, which a norm of the exact sums has not."""
    x, weight = random(500, 50, dtype="float32"), random(2, 50, dtype="float32")
    x[:, 25:] += 10_000
    weight[0, 25:] = weight[1, :25] = 0
    exact = x.astype(float) @ weight.astype(float).T
    norm = (None, None, exact.mean(axis=0), exact.var(axis=0))
    with pytest.warns(
        fastbn.FoldWarning, match=r"^fold: accuracy is lost in channel 1 \(the mean is \S+ st\w+ d\w+ away\)$"
    ):
        w, b = fastbn.fold(weight, None, *norm)
    off = abs(x @ w.T + b - fastbn.infer(exact, *norm)).max(axis=0)
    assert off[0] < 1e-5
    assert off[1] > 1e-4


def test_no_loss_no_warning() -> None:
    weight = np.ones((3, 4), np.float32)
    assert folded(weight) == ""
    assert folded(weight, running_var=np.full(3, 1e-5)) == ""
    assert folded(weight, gamma=np.zeros(3), running_var=np.zeros(3)) == ""  # y is beta, as before
    assert folded(weight, running_var=np.zeros(3), eps=0.0) == ""  # and here
    assert folded(weight, running_mean=np.full(3, 1e6), bias=np.full(3, 1e6)) == ""
    assert folded(np.zeros((3, 4), np.float32)) == ""


def test_many_channels_are_listed() -> None:
    with pytest.warns(fastbn.FoldWarning) as caught:
        fastbn.fold(np.ones((20, 2)), None, None, None, np.zeros(20), np.zeros(20))
    text = str(caught[0].message)
    assert text.count("is below") == 8
    assert text.endswith("channel 7 (variance 0 is below 1% of eps 1e-05), and in channels "
                         "8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19")  # fmt: skip


def test_constant_channel_without_eps() -> None:
    """Is beta, as infer has it."""
    w, b = fastbn.fold(np.ones((2, 2)), None, None, np.array([3.0, 4]), np.ones(2), np.array([0.0, 1]), eps=0)
    assert w.tolist() == [[0, 0], [1, 1]]
    assert b.tolist() == [3, 3]


# Bad input -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight of integers": ({"weight": np.ones((3, 2), int)}, TypeError, "weight: got dtype int64"),
    "weight of strings": ({"weight": ["a", "b"]}, TypeError, "weight: got dtype"),
    "weight without axes": ({"weight": np.float32(1)}, ValueError, "output_axis: got 0"),
    "bias of integers": ({"bias": np.ones(3, int)}, TypeError, "bias: got dtype int64"),
    "short bias": ({"bias": np.ones(2)}, ValueError, r"bias: got shape \(2,\)"),
    "long gamma": ({"gamma": np.ones(4)}, ValueError, r"gamma: got shape \(4,\)"),
    "beta of two axes": ({"beta": np.ones((1, 3))}, ValueError, r"beta: got shape \(1, 3\)"),
    "no statistics": ({"running_mean": None, "running_var": None}, ValueError, "running_mean: got None"),
    "no mean": ({"running_mean": None}, ValueError, "running_mean: got None"),
    "no variance": ({"running_var": None}, ValueError, "running_var: got None"),
    "other channels": ({"running_mean": np.ones(6), "running_var": np.ones(6)}, ValueError, "running_mean: got shape"),
    "mean of strings": ({"running_mean": ["a"] * 3}, TypeError, "running_mean: got dtype"),
    "eps": ({"eps": -1.0}, ValueError, "eps: got -1.0"),
    "axis": ({"output_axis": 2}, ValueError, "output_axis: got 2"),
    "negative axis": ({"output_axis": -3}, ValueError, "output_axis: got -3"),
    "axis of another kind": ({"output_axis": "0"}, TypeError, "output_axis: got '0'"),
    "groups of a linear layer": (
        {"weight": np.ones((6, 3)), "running_mean": np.ones(6), "running_var": np.ones(6), "output_axis": 1},
        ValueError,
        "running_mean: got shape",
    ),
    "groups that do not divide": (
        {"weight": np.ones((5, 3, 2)), "running_mean": np.ones(6), "running_var": np.ones(6), "output_axis": 1},
        ValueError,
        r"running_mean: got shape \(6,\) for weight of shape \(5, 3, 2\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    changes, error, message = BAD[bad]
    given: dict[str, Any] = {"weight": np.ones((3, 2)), "bias": None, "gamma": None, "beta": None}
    given |= {"running_mean": np.zeros(3), "running_var": np.ones(3)} | changes
    with pytest.raises(error, match=f"^{message}.*; allowed: "):
        fastbn.fold(**given)


# Real layers ---------------------------------------------------------------------------------------------------------

LAYERS = {
    "Linear": ((5, 6), 0),
    "Conv1d": ((6, 8, 3), 0),
    "Conv2d": ((6, 8, 3), 0),
    "Conv3d": ((6, 8, 3), 0),
    "ConvTranspose1d": ((6, 8, 3), 1),
    "ConvTranspose2d": ((6, 8, 3), 1),
    "ConvTranspose3d": ((6, 8, 3), 1),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_torch_layers(layer: str, groups: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    arguments, axis = LAYERS[layer]
    rank = 0 if layer == "Linear" else int(layer[-2])
    options = {} if layer == "Linear" else {"groups": groups, "stride": 2, "dilation": 1}
    plain = getattr(torch.nn, layer)(*arguments, **options)
    norm = getattr(torch.nn, f"BatchNorm{max(rank, 1)}d")(arguments[1])
    x = torch.randn(8, arguments[0], *(7 for _ in range(rank)))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        for _ in range(30):
            norm(plain(x))
        wanted = norm.eval()(plain(x)).numpy()
        state = [tensor.numpy() for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
        w, b = fastbn.fold(plain.weight.numpy(), plain.bias.numpy(), *state, eps=norm.eps, output_axis=axis)
        plain.weight.copy_(torch.from_numpy(w))
        plain.bias.copy_(torch.from_numpy(b))
        np.testing.assert_allclose(plain(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples are not beside the tests: no checkout")
def test_example(tmp_path: Path) -> None:
    done = cases.run_python(EXAMPLE.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"at most (\S+) apart", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 1e-4
