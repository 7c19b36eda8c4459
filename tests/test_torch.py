"""Are fastbn.torch's layers torch's, in every respect but speed and accuracy?"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest

import fastbn

with warnings.catch_warnings():  # torch's own import may warn
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    prune = importlib.import_module("torch.nn.utils.prune")
    import fastbn.torch

EXAMPLE = cases.CHECKOUT / "examples" / "torch_layers.py"
SHAPES = {1: (6, 5, 7), 2: (4, 5, 6, 3), 3: (3, 5, 2, 4, 3)}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
PLACES = [(1, "contiguous"), (2, "contiguous"), (2, "channels_last"), (3, "contiguous"), (3, "channels_last_3d")]
DTYPES = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}
"""And their eps: torch's errors, to which fastbn's are held elsewhere."""
ACTIVATIONS = {
    "relu": torch.nn.ReLU(),
    "relu6": torch.nn.ReLU6(),
    "leaky_relu": torch.nn.LeakyReLU(),
    ("leaky_relu", 0.3): torch.nn.LeakyReLU(0.3),
    "silu": torch.nn.SiLU(),
    "hardswish": torch.nn.Hardswish(),
    "sigmoid": torch.nn.Sigmoid(),
}


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Torch's seed and threads, which are the process's."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def randomized(layer: Any) -> Any:
    """With parameters and statistics other than a new layer's."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))
    return layer


def pair(ndim: int, channels: int = 5, *, activation: Any = None, **options: Any) -> tuple[Any, Any]:
    """Torch's layer and fastbn's, in one state."""
    theirs = randomized(getattr(torch.nn, f"BatchNorm{ndim}d")(channels, **options))
    ours = getattr(fastbn.torch, f"BatchNorm{ndim}d")(channels, activation=activation, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def data(shape: tuple[int, ...], place: str = "contiguous", dtype: Any = torch.float32) -> Any:
    return torch.randn(shape).to(dtype).contiguous(memory_format=FORMATS[place])


def called(layer: Any, x: Any, dy: Any, after: Any = None) -> dict[str, Any]:
    """The output, the gradients and the buffers, of one pass each way."""
    x = x.clone().requires_grad_()
    y = layer(x) if after is None else after(layer(x))
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        assert ours[name].shape == wanted.shape, name
        assert ours[name].stride() == wanted.stride(), name
        torch.testing.assert_close(
            ours[name], wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


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
def test_nothing_is_copied(place: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the tensors' own memory, of either size class."""
    seen: list[int] = []

    def watched(function: Any) -> Any:
        def watching(*args: Any, **options: Any) -> Any:
            seen.extend(a.ctypes.data for a in (*args, *options.values()) if isinstance(a, np.ndarray) and a.ndim == 4)
            return function(*args, **options)

        return watching

    for verb in ("forward", "backward", "infer"):
        monkeypatch.setattr(fastbn.torch, verb, watched(getattr(fastbn.torch, verb)))
    _, ours = pair(2)
    for shape in (SHAPES[2], (4, 5, 512, 256)):
        x = data(shape, place, getattr(torch, dtype)).requires_grad_()
        dy = data(shape, place, getattr(torch, dtype))
        seen.clear()
        y = ours(x)
        assert seen == [x.data_ptr(), y.data_ptr()]
        (dx,) = torch.autograd.grad(y, x, dy)
        assert seen[2:] == [dy.data_ptr(), dx.data_ptr()]
        assert y.stride() == dx.stride() == x.stride()
        assert not y._is_view()
        seen.clear()
        with torch.no_grad():
            y = ours.eval()(x)
        assert seen == [x.data_ptr(), y.data_ptr()]
        ours.train()


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


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
def test_gradcheck(activation: Any, place: str, training: bool) -> None:
    """Also where torch's gradient comes late, or not at all."""
    _, ours = pair(2, activation=activation)
    ours.double().train(training)
    x = data((3, 5, 2, 2), place, torch.float64).requires_grad_()

    def function(x: Any, weight: Any, bias: Any) -> Any:
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, ours.weight, ours.bias))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight bias", "x bias", ""])
def test_gradients_for_what_needs_them(wanted: str, training: bool) -> None:
    theirs, ours = (layer.train(training) for layer in pair(2, activation=None))
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    found = []
    for layer in (ours, theirs):
        layer.weight.requires_grad_("weight" in wanted)
        layer.bias.requires_grad_("bias" in wanted)
        one = x.clone().requires_grad_("x" in wanted)
        y = layer(one)
        assert y.requires_grad == bool(wanted)
        if wanted:
            y.backward(dy)
        found.append([one.grad, layer.weight.grad, layer.bias.grad])
    for ours_, theirs_ in zip(*found, strict=True):
        assert (ours_ is None) == (theirs_ is None)
        if theirs_ is not None:
            torch.testing.assert_close(ours_, theirs_, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual(place: str, activation: Any, dtype: str, training: bool) -> None:
    """Against the sum that torch makes in float64; every choice of what needs a gradient."""
    half = getattr(torch, dtype)
    theirs, ours = (layer.train(training) for layer in pair(2, activation=activation))
    theirs.double()
    after = ACTIVATIONS.get(activation, torch.nn.Identity())
    x, residual, dy = (data(SHAPES[2], place, half) for _ in range(3))
    for needs_x, needs_residual in ((True, True), (False, True), (True, False)):
        found = []
        for layer, wide in ((ours, half), (theirs, torch.float64)):
            ones = [x.to(wide).requires_grad_(needs_x), residual.to(wide).requires_grad_(needs_residual)]
            ones = [t.detach().clone().requires_grad_(t.requires_grad) for t in ones]
            layer.zero_grad()
            y = ours(*ones) if layer is ours else after(layer(ones[0]) + ones[1])
            y.backward(dy.to(wide))
            found.append([y, *(t.grad for t in ones), layer.weight.grad, layer.bias.grad])
        for got, wanted in zip(*found, strict=True):
            assert (got is None) == (wanted is None)
            if wanted is not None:
                assert got.stride() == wanted.stride()
                torch.testing.assert_close(got.double(), wanted, rtol=8 * DTYPES[dtype], atol=20 * DTYPES[dtype])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_of_residual(activation: Any) -> None:
    _, ours = pair(2, activation=activation)
    x, residual = (data((3, 5, 2, 2), "channels_last", torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(ours.double(), (x, residual))
    alone = randomized(fastbn.torch.BatchNorm2d(5, affine=False, activation=activation)).double().eval()
    assert torch.autograd.gradcheck(lambda residual: alone(x.detach(), residual), (residual,))


def test_bad_residual() -> None:
    """Changes nothing, the count included."""
    theirs, ours = pair(2)
    with pytest.raises(ValueError, match="residual: got"):
        ours(data(SHAPES[2]), data((4, 5, 6, 2)))
    with pytest.raises(TypeError, match="residual: got"):
        ours(data(SHAPES[2]), data(SHAPES[2]).double())
    assert_agree(ours.state_dict(), theirs.state_dict(), 0)


def test_second_derivative() -> None:
    """Is refused when it is asked for, and not before."""
    _, ours = pair(2)
    x = data(SHAPES[2]).requires_grad_()
    (dx,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_twice() -> None:
    theirs, ours = pair(2)
    x, dy = data(SHAPES[2]).requires_grad_(), data(SHAPES[2])
    grads = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for y in [ours(x)] for _ in range(2)]
    assert torch.equal(*grads)
    torch.testing.assert_close(grads[0], torch.autograd.grad(theirs(x), x, dy)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_without_gradients(mode: Any, training: bool) -> None:
    theirs, ours = (layer.train(training) for layer in pair(2, activation=None))
    x = data(SHAPES[2]).requires_grad_()
    with mode():
        y, wanted = ours(x), theirs(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_checkpointing() -> None:
    """Saved tensors go through torch's hooks."""
    theirs, ours = pair(2)
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    checkpoint = torch.utils.checkpoint.checkpoint

    def again(layer: Any) -> Any:
        return lambda x: checkpoint(layer, x, use_reentrant=False)

    found = []
    for layer in (ours, theirs):
        one = x.clone().requires_grad_()
        again(layer)(one).backward(dy)
        found.append((one.grad, layer.weight.grad, layer.running_mean))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# Whole networks ------------------------------------------------------------------------------------------------------


class Residual(torch.nn.Module):  # type: ignore[misc]
    """Two convolutions, with their norms, and the input beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList([torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
        self.norms = torch.nn.ModuleDict({name: torch.nn.BatchNorm2d(channels) for name in ("first", "second")})

    def forward(self, x: Any) -> Any:
        z = torch.relu(self.norms["first"](self.inner[0](x)))
        return torch.relu(self.norms["second"](self.inner[1](z)) + x)


def network() -> Any:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        Residual(8),
        torch.nn.Sequential(Residual(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 6), torch.nn.BatchNorm1d(6)),
    )


def norms(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]


def test_convert() -> None:
    """Every layer of torch's, which stays the same object with the same tensors; and no other."""
    model = network()
    shared = norms(model)[0]
    model.append(torch.nn.ModuleList([shared, torch.nn.SyncBatchNorm(3), torch.nn.BatchNorm3d(2, affine=False)]))
    model.double().eval()
    before = [id(layer) for layer in norms(model)], [tensor.data_ptr() for tensor in model.state_dict().values()]
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    text = repr(model)
    assert fastbn.torch.convert_batchnorm(model) is model
    assert before == (
        [id(layer) for layer in norms(model)],
        [tensor.data_ptr() for tensor in model.state_dict().values()],
    )
    assert repr(model) == text
    found = [type(layer) for layer in norms(model)]
    assert found.count(fastbn.torch.BatchNorm2d) == 5
    assert found.count(fastbn.torch.BatchNorm1d) == found.count(fastbn.torch.BatchNorm3d) == 1
    assert found.count(torch.nn.SyncBatchNorm) == 1
    assert not any(layer.training for layer in norms(model))
    assert model[5][0](data((2, 8, 3, 3)).double()).dtype == torch.float64
    assert calls == [1]
    assert fastbn.torch.convert_batchnorm(model)[1] is shared  # again


def test_convert_one_layer() -> None:
    layer = torch.nn.BatchNorm1d(3, momentum=None)
    assert fastbn.torch.convert_batchnorm(layer) is layer
    assert type(layer) is fastbn.torch.BatchNorm1d
    assert layer.activation is None


@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
def test_training_of_a_network(place: str) -> None:
    """Step by step torch's loss, in float64, where rounding has no time to grow."""
    losses, states = [], []
    for converted in (False, True):
        torch.manual_seed(1)
        model = network().double().to(memory_format=FORMATS[place])
        if converted:
            fastbn.torch.convert_batchnorm(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
        losses.append([])
        for _ in range(30):
            x, labels = data((16, 3, 8, 8), place, torch.float64), torch.randint(6, (16,))
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        states.append(model.state_dict())
    np.testing.assert_allclose(*losses, rtol=1e-9)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-7, atol=1e-9)


# Compiled ------------------------------------------------------------------------------------------------------------


def compiled(model: Any, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.fixture
def lenient() -> Iterator[None]:
    """Torch may warn of what is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compile(lenient: None, dtype: str, training: bool) -> None:
    """The whole network in one graph, with the same bits as without, running statistics and all gradients included."""
    eager = randomized(fastbn.torch.convert_batchnorm(network())).to(getattr(torch, dtype)).train(training)
    eager[1].activation = ("leaky_relu", 0.2)
    other = copy.deepcopy(eager)
    graph = compiled(other, "aot_eager")
    for place in ("contiguous", "channels_last", "contiguous"):
        x = data((4, 3, 8, 8), place, getattr(torch, dtype))
        found = []
        for model, call in ((eager, eager), (other, graph)):
            model.zero_grad()
            call(x).square().mean().backward()
            found.append([parameter.grad for parameter in model.parameters()] + list(model.buffers()))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("activation", [None, "hardswish"])
def test_compile_with_residual(lenient: None, activation: Any) -> None:
    _, ours = pair(2, activation=activation)
    other = copy.deepcopy(ours)
    x, residual, dy = (data(SHAPES[2], "channels_last") for _ in range(3))
    found = []
    for call in (ours, compiled(other, "aot_eager")):
        ones = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        call(*ones).backward(dy)
        found.append([one.grad for one in ones])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compile_for_any_size(lenient: None) -> None:
    """One graph serves batches of several sizes."""
    ours = fastbn.torch.BatchNorm1d(5, momentum=0.3)
    other = copy.deepcopy(ours)
    torch.compiler.reset()
    graph = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7, 9):
        x = data((n, 5, 3))
        assert torch.equal(graph(x), ours(x))
    assert_agree(other.state_dict(), ours.state_dict(), 0)


def test_compile_of_frozen_parts(lenient: None) -> None:
    """No affine parameters, no running statistics, no gradient of x."""
    layers = [fastbn.torch.BatchNorm1d(5, affine=affine, track_running_stats=not affine) for affine in (True, False)]
    layers[0].weight.requires_grad_(False)
    for layer in layers:
        other = copy.deepcopy(layer)
        x = data((6, 5))
        for _ in range(2):
            y, z = layer(x), compiled(other, "aot_eager")(x)
            assert torch.equal(y, z)
        if layer.affine:
            y.square().sum().backward()
            z.square().sum().backward()
            assert torch.equal(layer.bias.grad, other.bias.grad)
        assert_agree(other.state_dict(), layer.state_dict(), 0)


def test_the_operator_keeps_its_promises(lenient: None) -> None:
    """Torch's own checks of an operator: schema, fake tensors, gradients under tracing."""
    x = data((4, 3, 2, 2)).double().requires_grad_()
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    operator = torch.ops.fastbn.batch_norm.default
    torch.library.opcheck(operator, (x, x.detach() + 1, weight, weight.detach(), None, None, 1e-5, "silu", 0.01))
    torch.library.opcheck(operator, (x, None, weight, None, mean, var, 1e-5, None, 0.01))


@pytest.mark.parametrize("way", ["export", "trace"])
def test_others_see_torch(lenient: None, way: str) -> None:
    """What is exported runs where fastbn is not."""
    model = torch.nn.Sequential(fastbn.torch.BatchNorm2d(5, activation="hardswish")).eval()
    randomized(model)
    x = data(SHAPES[2])
    if way == "export":
        exported = torch.export.export(model, (x,))
        text, found = str(exported.graph), exported.module()(x)
    else:
        traced = torch.jit.trace(model, x)
        text, found = str(traced.inlined_graph), traced(x)
    assert "batch_norm" in text
    assert "fastbn::" not in text
    torch.testing.assert_close(found, model(x), rtol=2e-5, atol=2e-5)


def test_transforms_see_torch(lenient: None) -> None:
    """torch.func's, of which torch's own layer has them all."""
    theirs, ours = (layer.eval() for layer in pair(2))
    x = data(SHAPES[2])
    for transform in (
        lambda layer: torch.func.grad(lambda x: layer(x).square().sum())(x),
        lambda layer: torch.func.vmap(lambda x: layer(x[None])[0])(x),
        lambda layer: torch.func.jvp(layer, (x,), (x,))[1],
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


# Threads, and what does not run here ---------------------------------------------------------------------------------


def test_threads_are_the_fewer(monkeypatch: pytest.MonkeyPatch, settings: None) -> None:
    _, ours = pair(2)
    seen: list[int] = []

    def forward(*args: Any, **options: Any) -> Any:
        seen.append(fastbn.get_num_threads())
        return fastbn.forward(*args, **options)

    monkeypatch.setattr(fastbn.torch, "forward", forward)
    for torchs, ours_ in ((1, 4), (3, 2), (2, 2)):
        torch.set_num_threads(torchs)
        fastbn.set_num_threads(ours_)
        ours(data(SHAPES[2]))
        assert fastbn.get_num_threads() == ours_
    assert seen == [1, 2, 2]


def test_other_devices_are_torchs() -> None:
    """And a residual and an activation follow, all the same."""
    layer = fastbn.torch.BatchNorm2d(5, activation="relu", device="meta")
    x = torch.empty(SHAPES[2], device="meta")
    for y in (layer(x), layer(x, x)):
        assert y.device.type == "meta"
        assert y.shape == SHAPES[2]


def test_torch_adds_and_activates() -> None:
    """Where it runs in the place of fastbn."""
    _, ours = pair(2, activation=("leaky_relu", 0.3))
    ours.eval()
    x, residual = data(SHAPES[2]), data(SHAPES[2])
    y = torch.func.vmap(lambda x, residual: ours(x[None], residual[None])[0])
    torch.testing.assert_close(y(x, residual), ours(x, residual))


def test_empty_batches() -> None:
    theirs, ours = pair(2, activation="relu")
    for training in (True, False):
        found = [layer.train(training)(torch.empty(0, 5, 2, 2)) for layer in (ours, theirs)]
        assert found[0].shape == found[1].shape
    assert_agree(ours.state_dict(), theirs.state_dict(), 0)


@pytest.mark.parametrize(
    ("ndim", "x"),
    [
        (1, torch.randn(1, 5)),
        (2, torch.randn(1, 5, 1, 1)),
        (1, torch.randn(5)),
        (1, torch.randn(2, 5, 2, 2)),
        (2, torch.randn(3, 5)),
        (2, torch.randn(2, 4, 3, 3)),
        (3, torch.randn(2, 5, 3, 3)),
        (1, torch.ones(4, 5, dtype=torch.int64)),
        (1, torch.ones(4, 5, dtype=torch.complex64)),
        (1, np.ones((4, 5), np.float32)),
    ],
    ids=lambda value: str(tuple(value.shape)) if hasattr(value, "shape") else str(value),
)
def test_errors_are_torchs(ndim: int, x: Any) -> None:
    theirs, ours = pair(ndim)
    with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError)) as wanted:
        theirs(x)
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value))):
        ours(x)
    assert_agree(ours.state_dict(), theirs.state_dict(), 0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        fastbn.torch.BatchNorm2d(3, activation="tanh")
    with pytest.raises(TypeError, match=r"model: got list; allowed: a torch.nn.Module"):
        fastbn.torch.convert_batchnorm([])


def test_without_torch(tmp_path: Any) -> None:
    """`import fastbn` works, and the extra is named."""
    script = "import sys; sys.modules['torch'] = None; import fastbn; print('there'); import fastbn.torch"
    done = cases.run_python(script, tmp_path)
    assert 'ImportError: fastbn.torch needs torch and ml_dtypes: pip install "fastbn[torch]"' in done.stderr
    assert done.stdout == "there\n"


@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples are not beside the tests: no checkout")
def test_example(tmp_path: Any) -> None:
    """Its losses and results are torch's."""
    done = cases.run_python(f"import runpy; runpy.run_path({str(EXAMPLE)!r}, None, '__main__')", tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"largest difference of the \w+: (\S+)", done.stdout)
    assert len(found) == 2, done.stdout
    assert all(float(apart) < 1e-4 for apart in found)
