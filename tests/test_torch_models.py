"""Do whole models run on fastbn.torch's layers, convert to them and back, and hand over what does not run there?"""

from __future__ import annotations

import re
from typing import Any

import cases
import numpy as np
import pytest
from torch_cases import FORMATS, SHAPES, as_found, assert_agree, data, network, pair, torch

import fastbn
import fastbn.torch

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
