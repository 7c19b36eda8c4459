"""Are fastbn.torch's layers torch's, in every respect but speed and accuracy?"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
import pickle
from typing import Any

import cases
import numpy as np
import pytest
from ml_dtypes import bfloat16
from torch_cases import (
    ACTIVATIONS,
    DTYPES,
    PLACES,
    SHAPES,
    as_found,
    assert_agree,
    called,
    data,
    pair,
    randomized,
    torch,
    without_bridge,
)

import fastbn
import fastbn.torch
from fastbn.torch import tensors

__all__ = ["as_found"]
prune = importlib.import_module("torch.nn.utils.prune")

# As torch's layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("ndim", "place"), PLACES)
def test_parity(any_backend: cases.Kernel, ndim: int, place: str, dtype: str, training: bool) -> None:
    """Results, all gradients, buffers, and how they lie in memory."""
    theirs, ours = (layer.to(getattr(torch, dtype)).train(training) for layer in pair(ndim, momentum=0.3, eps=0.01))
    x, dy = (data(SHAPES[ndim], place, getattr(torch, dtype)) for _ in range(2))
    assert_agree(called(ours, x, dy), called(theirs, x, dy), 100 * DTYPES[dtype])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("mixed", [True, False], ids=["float32 parameters", "its own"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype: str, place: str, mixed: bool, training: bool) -> None:
    """Against torch's layer in float64 on the same numbers: torch's in halves loses more."""
    half = getattr(torch, dtype)
    theirs, ours = pair(2)
    ours.train(training)
    if not mixed:
        ours.to(half)
        theirs.load_state_dict(ours.state_dict())
    theirs.double().train(training)
    x, dy = (data(SHAPES[2], place, half) for _ in range(2))
    found, exact = called(ours, x, dy), called(theirs, x.double(), dy.double())
    for name, wanted in exact.items():
        assert found[name].stride() == wanted.stride(), name
        kept = name in ("y", "dx") or (not mixed and name != "num_batches_tracked")
        assert found[name].dtype == (half if kept else getattr(ours, name.removeprefix("d")).dtype), name
        tolerance = 3 * DTYPES[dtype] if kept else 2e-5
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: Any, place: str, training: bool) -> None:
    theirs, ours = (layer.train(training) for layer in pair(2, activation=activation))
    x, dy = (data(SHAPES[2], place) for _ in range(2))
    assert_agree(called(ours, x, dy), called(theirs, x, dy, ACTIVATIONS[activation]), 2e-5)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracks", [True, False], ids=["tracking", "not"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "average"])
def test_options(affine: bool, tracks: bool, momentum: float | None) -> None:
    """Over several batches, and then in eval mode; and after a reset."""
    theirs, ours = pair(1, affine=affine, track_running_stats=tracks, momentum=momentum)
    for layer in (theirs, ours):
        layer.reset_running_stats()
    for training in (True, True, True, False):
        x, dy = data((8, 5)), data((8, 5))
        assert_agree(called(ours.train(training), x, dy), called(theirs.train(training), x, dy), 2e-5)
    theirs.reset_parameters()
    ours.reset_parameters()
    assert_agree(ours.state_dict(), theirs.state_dict(), 0)


@pytest.mark.parametrize("momentum", [1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_running_statistics_of_halves_are_rounded_once(dtype: str, momentum: float) -> None:
    """To the nearest: by way of float32 a number a little above a midpoint would be the midpoint, and then even."""
    step, bn = DTYPES[dtype], fastbn.torch.BatchNorm1d(1, momentum=momentum)
    bn.running_mean = bn.running_mean.to(getattr(torch, dtype))
    bn(torch.full((2, 1), 1 + step / 2 + 2**-40, dtype=torch.float64))
    assert bn.running_mean.item() == momentum * (1 + step)


def test_weight_without_bias() -> None:
    """Which newer versions of torch have."""
    if "bias" not in inspect.signature(torch.nn.BatchNorm2d).parameters:
        pytest.skip(f"torch {torch.__version__} has no such layer")
    theirs, ours = pair(2, bias=False)
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    found = called(ours, x, dy)
    assert "dbias" not in found
    assert_agree(found, called(theirs, x, dy), 2e-5)


def test_states_go_both_ways() -> None:
    theirs, ours = pair(2, activation="relu")
    assert isinstance(ours, torch.nn.BatchNorm2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomized(ours)
    theirs.load_state_dict(ours.state_dict())
    assert_agree(theirs.state_dict(), ours.state_dict(), 0)


def test_statistics_without_tracking_are_left_alone() -> None:
    """Torch keeps them where tracking is switched off later."""
    theirs, ours = pair(2)
    theirs.track_running_stats = ours.track_running_stats = False
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    assert_agree(called(ours, x, dy), called(theirs, x, dy), 2e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    """They are whole, and go their own way from then on."""
    _, ours = pair(2, activation=("leaky_relu", 0.2))
    x = data(SHAPES[2])
    ours(x)
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(ours)
    assert repr(other) == repr(ours)
    assert torch.equal(other(x), ours(x))
    before = ours.running_mean.clone()
    other(x + 1)
    assert torch.equal(ours.running_mean, before)


def test_repr() -> None:
    plain, relu = fastbn.torch.BatchNorm1d(3), fastbn.torch.BatchNorm1d(3, momentum=None, activation="relu")
    assert repr(plain) == repr(torch.nn.BatchNorm1d(3))
    assert repr(relu) == repr(torch.nn.BatchNorm1d(3, momentum=None))[:-1] + ", activation='relu')"


def test_hooks_and_in_place_neighbours() -> None:
    """The result may be overwritten: the gradient needs x alone."""
    theirs, ours = pair(2)
    seen = []
    ours.register_forward_hook(lambda layer, args, y: seen.append(y.shape))
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    inplace = torch.nn.ReLU(inplace=True)
    assert_agree(called(ours, x, dy, inplace), called(theirs, x, dy, inplace), 2e-5)
    assert seen == [x.shape]


def test_x_may_not_be_overwritten() -> None:
    """As everywhere in torch, the gradient says so."""
    _, ours = pair(2)
    x = data(SHAPES[2]).requires_grad_() * 1
    y = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_pruned_weights() -> None:
    """They are no parameters any more."""
    theirs, ours = pair(2)
    for layer in (theirs, ours):
        prune.l1_unstructured(layer, "weight", 2)
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    assert_agree(called(ours, x, dy), called(theirs, x, dy), 2e-5)


def test_autocast() -> None:
    """Runs in the dtype of its input, as torch's."""
    theirs, ours = (torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), layer) for layer in pair(2))
    ours[0].load_state_dict(theirs[0].state_dict())
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = ours(x), theirs(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2**-6, atol=2**-6)
    y.backward(dy.bfloat16())
    assert ours[1].weight.grad.dtype == torch.float32


# In memory -----------------------------------------------------------------------------------------------------------


def strided(shape: tuple[int, ...]) -> dict[str, Any]:
    """Tensors of any strides."""
    wide = torch.randn(*(2 * n for n in shape))
    return {
        "steps": wide[tuple(slice(None, None, 2) for _ in shape)],
        "transposed": torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))),
        "expanded": torch.randn(1, *shape[1:]).expand(shape),
        "cropped channels_last": data((shape[0], 2 * shape[1], *shape[2:]), "channels_last")[:, 1 : 1 + shape[1]],
        "offset": torch.randn(1 + math.prod(shape))[1:].reshape(shape),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("which", strided((1, 1, 1, 1)))
def test_any_strides(which: str, training: bool) -> None:
    """Of x, and of the gradient that comes back."""
    theirs, ours = (layer.train(training) for layer in pair(2))
    odd, plain = strided(SHAPES[2])[which], data(SHAPES[2])
    for x, dy in ((odd, plain), (plain, odd), (data(SHAPES[2], "channels_last"), odd)):
        found, wanted = called(ours, x, dy), called(theirs, x.contiguous(), dy.contiguous())
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("which", ["steps", "cropped channels_last", "offset"])
def test_small_tensors_of_any_strides_are_copied(which: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call by way of arrays takes longer. Results lie in memory as torch.compile expects."""
    for name in ("forward", "infer", "backward"):
        monkeypatch.delattr(tensors, name)
    ours = pair(2)[1].train(training)
    x, dy = strided(SHAPES[2])[which], strided(SHAPES[2])[which]
    assert called(ours, x, dy)["y"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_strided_parameters(training: bool) -> None:
    """Every second value of a tensor, statistics included, which are updated there and only there."""
    theirs, ours = (layer.train(training) for layer in pair(2))
    wide = {name: torch.rand(10) + 0.5 for name in ("weight", "bias", "running_mean", "running_var")}
    memory = copy.deepcopy(wide)
    for name, tensor in wide.items():
        parameter = torch.nn.Parameter if name in ("weight", "bias") else torch.clone
        setattr(theirs, name, parameter(tensor[::2].clone()))
        setattr(
            ours, name, torch.nn.Parameter(memory[name][::2]) if parameter is not torch.clone else memory[name][::2]
        )
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    found, wanted = called(ours, x, dy), called(theirs, x, dy)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-5, atol=2e-5)
    for name, tensor in wide.items():
        assert torch.equal(memory[name][1::2], tensor[1::2])
        torch.testing.assert_close(memory[name][::2], getattr(theirs, name), rtol=2e-5, atol=2e-5, check_stride=False)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("shape", [(6, 0), (6, 0, 1), (6, 0, 1, 1), (1, 0, 4, 4)], ids=str)
def test_shapes_whose_format_is_ambiguous(shape: tuple[int, ...], channels: int) -> None:
    theirs, ours = pair(max(1, len(shape) - 2), channels)
    shape = (shape[0], channels, *shape[2:])
    for place in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        x, dy = data(shape, place), data(shape, place)
        found, wanted = called(ours, x, dy), called(theirs, x, dy)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_copied(any_backend: cases.Kernel, place: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the tensors' own memory, of either size class, also where torch lacks DLPack's exchange API."""
    without_bridge(monkeypatch)
    fastbn.moments(np.ones((2, 1), bfloat16))  # the C backend knows NumPy's number of bfloat16 from the first array
    seen: list[int] = []

    def watched(function: Any) -> Any:
        def watching(*args: Any, **options: Any) -> Any:
            arrays = [a for a in (*args, *options.values()) if isinstance(a, np.ndarray) and a.ndim == 4]
            if function.__name__ == "backward":
                arrays.insert(1, args[1]._parts.x)
            seen.extend(array.ctypes.data for array in arrays)
            return function(*args, **options)

        return watching

    def watched_at(function: Any) -> Any:
        def watching(number: int, shape: Any, axis: int, addresses: Any, *rest: Any) -> Any:
            seen.extend([*addresses[: 1 if len(addresses) == 6 else 2], rest[0]])
            done = function(number, shape, axis, addresses, *rest)
            assert done is not None
            return done

        return watching

    for verb in ("forward", "backward", "infer"):
        monkeypatch.setattr(tensors, verb, watched(getattr(tensors, verb)))
    if any_backend.backend == "c":
        backend = importlib.import_module("fastbn._backends.c.bridge")
        for verb in ("forward_at", "backward_at"):
            monkeypatch.setattr(backend, verb, watched_at(getattr(backend, verb)))
    _, ours = pair(2)
    for shape in (SHAPES[2], (4, 5, 512, 256)):
        x = data(shape, place, getattr(torch, dtype)).requires_grad_()
        dy = data(shape, place, getattr(torch, dtype))
        seen.clear()
        y = ours(x)
        assert seen == [x.data_ptr(), y.data_ptr()]
        (dx,) = torch.autograd.grad(y, x, dy)
        assert seen[2:] == [dy.data_ptr(), x.data_ptr(), dx.data_ptr()]
        assert y.stride() == dx.stride() == x.stride()
        assert not y._is_view()
        seen.clear()
        with torch.no_grad():
            y = ours.eval()(x)
        assert seen == [x.data_ptr(), y.data_ptr()]
        ours.train()


by_the_bridge = pytest.mark.skipif(
    tensors.bridged is None or fastbn.get_backend() != "c", reason="needs the C backend, and a torch of DLPack 1.2"
)


@by_the_bridge
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")], ids=str)
def test_plain_calls_only_allocate(place: str, dtypes: tuple[str, str]) -> None:
    """No operator of torch runs but those that make the results, and no result is made by way of arrays."""
    dtype, of_parameters = (getattr(torch, name) for name in dtypes)
    _, ours = pair(2)
    ours.to(of_parameters)
    for shape in (SHAPES[2], (4, 5, 512, 256)):
        x, dy = data(shape, place, dtype).requires_grad_(), data(shape, place, dtype)
        for training in (True, False):
            ours.train(training)
            with torch.autograd.profiler.profile() as profile:
                y = ours(x)
                found = torch.autograd.grad(y, (x, ours.weight, ours.bias), dy)
            ran = {event.name for event in profile.function_events if event.name.startswith("aten::")}
            made = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::set_", "aten::lift_fresh"}
            assert ran <= {*made, "aten::detach"}
            assert y.stride() == found[0].stride() == x.stride()
            assert [gradient.dtype for gradient in found] == [dtype, of_parameters, of_parameters]


@by_the_bridge
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float64"), ("float16", "float16")], ids=str)
def test_the_short_way_gives_the_bits_of_the_long_one(
    dtypes: tuple[str, str],
    training: bool,
    place: str,
    activation: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, of_parameters = (getattr(torch, name) for name in dtypes)
    layer = randomized(fastbn.torch.BatchNorm2d(5, activation=activation)).to(of_parameters).train(training)
    x, dy = data(SHAPES[2], place, dtype), data(SHAPES[2], place, dtype)
    found = called(copy.deepcopy(layer), x, dy)
    without_bridge(monkeypatch)
    wanted = called(layer, x, dy)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@by_the_bridge
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("weight", "bias"), ("residual",)], ids=str)
def test_gradients_without_that_of_the_input(
    wanted: tuple[str, ...], dtype: str, training: bool, activation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the parameters alone, which needs no map, and of the residual alone: the bits of the long way."""
    layer = randomized(fastbn.torch.BatchNorm2d(5, activation=activation)).to(getattr(torch, dtype)).train(training)
    x, residual, dy = (data(SHAPES[2], "contiguous", getattr(torch, dtype)) for _ in range(3))
    named = {**dict(layer.named_parameters()), "residual": residual}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)

    def gradients() -> tuple[Any, ...]:
        return torch.autograd.grad(layer(x, residual), [named[name] for name in wanted], dy)

    found = gradients()
    without_bridge(monkeypatch)
    for one, other in zip(found, gradients(), strict=True):
        assert torch.equal(one, other)


def test_the_numbers_of_axes_that_torch_allows() -> None:
    for check, allowed in tensors.AXES.items():
        for axes in range(8):
            if axes in allowed:
                check(None, torch.zeros((1,) * axes))
            else:
                with pytest.raises(ValueError, match="expected"):
                    check(None, torch.zeros((1,) * axes))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_what_a_subclass_says_counts(training: bool) -> None:
    """Its properties and its checks, also in calls that the bridge takes whole."""

    class Steady(fastbn.torch.BatchNorm1d):
        momentum = property(lambda self: 0.5, lambda self, value: None)
        eps = property(lambda self: 1.0, lambda self, value: None)

        def _check_input_dim(self, input: Any) -> None:
            if input.shape[0] == 7:
                raise ValueError("seven")

    ours, theirs = Steady(3).train(training), torch.nn.BatchNorm1d(3, momentum=0.5, eps=1.0).train(training)
    x = torch.randn(5, 3)
    assert_agree({"y": ours(x), **ours.state_dict()}, {"y": theirs(x), **theirs.state_dict()}, 1e-6)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="seven"):
        ours(torch.randn(7, 3))
    assert_agree(ours.state_dict(), before, 0)


def test_large_results_are_tensors_like_others() -> None:
    """They are of NumPy's memory, and live as long as they are used."""
    _, ours = pair(2)
    x = data((4, 5, 512, 256), "channels_last")
    with torch.no_grad():
        y = ours(x)
        kept, half = y.clone(), y[1:, 2]
        y.add_(1)
        del y
    torch.testing.assert_close(half, kept[1:, 2] + 1)
    assert half.untyped_storage().nbytes() == x.nbytes
