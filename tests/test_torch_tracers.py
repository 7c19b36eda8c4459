"""Do those who trace, transform or record a model get right numbers of fastbn.torch's layers?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from torch_cases import SHAPES, as_found, assert_agree, data, network, pair, randomized, torch

import fastbn
import fastbn.torch

__all__ = ["as_found"]

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
