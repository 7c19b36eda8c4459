"""Do whole models run on fastbn.torch's layers, convert to them and back, and hand over what does not run there?"""

from __future__ import annotations

import copy
import importlib
import math
import re
from typing import Any

import cases
import numpy as np
import pytest
from torch_cases import FORMATS, SHAPES, as_found, assert_agree, data, network, pair, torch, without_bridge

import fastbn
import fastbn.torch
from fastbn.config import thread_count
from fastbn.torch import tensors

__all__ = ["as_found"]
EXAMPLE = cases.CHECKOUT / "examples" / "torch_layers.py"

# Whole networks ------------------------------------------------------------------------------------------------------


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
    assert found.count(fastbn.torch.SyncBatchNorm) == 1
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


# And back ------------------------------------------------------------------------------------------------------------


def test_revert() -> None:
    """The classes that the model had, on the same objects; state, mode and what else they had are left alone."""
    model = network().eval()
    before = [(id(module), type(module), set(vars(module))) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    assert fastbn.torch.revert_batchnorm(model) is model  # nothing to do
    assert fastbn.torch.revert_batchnorm(fastbn.torch.convert_batchnorm(model)) is model
    assert [(id(module), type(module), set(vars(module))) for module in model.modules()] == before
    assert_agree(model.state_dict(), state, 0)
    own = fastbn.torch.revert_batchnorm(fastbn.torch.BatchNorm1d(3, momentum=None))
    assert type(own) is torch.nn.BatchNorm1d
    assert own.momentum is None


def test_revert_refuses_activations() -> None:
    """By the name of the layer, and before anything changes."""
    model = torch.nn.Sequential(
        fastbn.torch.BatchNorm1d(3), torch.nn.Sequential(fastbn.torch.BatchNorm1d(3, activation=("leaky_relu", 0.2)))
    )
    with pytest.raises(ValueError, match=r"model: got the layer '1.0' in it with activation=\('leaky_relu', 0.2\)"):
        fastbn.torch.revert_batchnorm(model)
    assert type(model[0]) is fastbn.torch.BatchNorm1d
    model[1][0].activation = None
    fastbn.torch.revert_batchnorm(model)
    assert type(model[1][0]) is torch.nn.BatchNorm1d
    with pytest.raises(TypeError, match=r"model: got list; allowed: a torch.nn.Module"):
        fastbn.torch.revert_batchnorm([model])


@pytest.mark.filterwarnings("ignore")
def test_fuse_modules_after_reverting() -> None:
    """torch.ao.quantization looks layers up by their class."""
    fuse_modules = importlib.import_module("torch.ao.quantization").fuse_modules
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5), torch.nn.ReLU())
    fastbn.torch.convert_batchnorm(model)
    model(data((4, 3, 6, 6)))
    x = data((2, 3, 4, 4))
    wanted = model.eval()(x)
    fused = fuse_modules(fastbn.torch.revert_batchnorm(model), [["0", "1", "2"]])
    assert isinstance(fused[1], torch.nn.Identity)
    torch.testing.assert_close(fused(x), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_script_after_reverting() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5), torch.nn.ReLU())
    fastbn.torch.convert_batchnorm(model)
    x = data((4, 3, 8, 8))
    model(x)
    wanted = model.eval()(x)
    scripted = torch.jit.script(fastbn.torch.revert_batchnorm(model))
    torch.testing.assert_close(scripted(x), wanted, rtol=2e-5, atol=2e-5)


# What torch takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("momentum", [-1.2, 0, 1, 2, True, 1.5, np.float32(0.25), torch.tensor(0.3), None], ids=repr)
def test_momenta(momentum: Any, dtype: str) -> None:
    theirs, ours = (layer.to(getattr(torch, dtype)) for layer in pair(1, momentum=momentum))
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = data((8, 5), dtype=getattr(torch, dtype))
        ours(x), theirs(x)
    tolerance = {"float32": 2e-5, "float64": 1e-10, "bfloat16": 2**-6}[dtype]
    assert_agree(ours.state_dict(), theirs.state_dict(), tolerance)


@pytest.mark.parametrize("momentum", [math.nan, math.inf])
def test_momenta_that_are_no_numbers(momentum: float) -> None:
    theirs, ours = pair(1, momentum=momentum)
    x = data((8, 5))
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, equal_nan=True)


@pytest.mark.parametrize("eps", [1, True, np.float64(0.25), torch.tensor(0.5), math.inf], ids=repr)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_eps(eps: Any, training: bool) -> None:
    theirs, ours = (layer.train(training) for layer in pair(1, eps=eps))
    x = data((8, 5))
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    assert_agree(ours.state_dict(), theirs.state_dict(), 2e-5)


@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("value", ["0.1", 1j, torch.tensor([0.1, 0.2])], ids=repr)
def test_what_torch_refuses(name: str, value: Any) -> None:
    theirs, ours = pair(1, **{name: value})
    with pytest.raises((TypeError, RuntimeError)) as wanted:
        theirs(data((8, 5)))
    with pytest.raises(wanted.type, match=re.escape(str(wanted.value)[:40])):
        ours(data((8, 5)))


def test_parameters_of_other_shapes() -> None:
    """Torch decides."""
    theirs, ours = pair(1)
    for layer in (theirs, ours):
        layer.weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError) as wanted:
        theirs(data((8, 5)))
    with pytest.raises(RuntimeError, match=re.escape(str(wanted.value))):
        ours(data((8, 5)))


def test_counter() -> None:
    """Of several dtypes; it is counted before the call, as torch does."""
    for dtype in (torch.int64, torch.int32, torch.float32):
        theirs, ours = pair(1, momentum=None)
        for layer in (theirs, ours):
            layer.num_batches_tracked = layer.num_batches_tracked.to(dtype)
            for _ in range(2):
                torch.manual_seed(0)
                layer(data((8, 5)))
        assert_agree(ours.state_dict(), theirs.state_dict(), 2e-5)
        assert int(ours.num_batches_tracked) == 2


# Threads, and what does not run here ---------------------------------------------------------------------------------


def test_threads_are_the_fewer(any_backend: cases.Kernel, monkeypatch: pytest.MonkeyPatch, settings: None) -> None:
    """In the express lane, and in the general one."""
    _, ours = pair(2)
    seen: list[int] = []
    if any_backend.backend == "c":
        backend = importlib.import_module("fastbn._backends.c.bridge")
        express = backend.forward_at
        monkeypatch.setattr(backend, "forward_at", lambda *args: [seen.append(args[-1]()), express(*args)][1])
        without_bridge(monkeypatch)
    forward = tensors.forward

    def watching(*args: Any, **options: Any) -> Any:
        seen.append(fastbn.get_num_threads())
        return forward(*args, **options)

    monkeypatch.setattr(tensors, "forward", watching)
    for torchs, ours_ in ((1, 4), (3, 2), (2, 2)):
        torch.set_num_threads(torchs)
        fastbn.set_num_threads(ours_)
        ours(data(SHAPES[2]))
        assert thread_count.asked() == ours_  # what fastbn was told stays; torch's number may be a limit for both
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
