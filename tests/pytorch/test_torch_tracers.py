"""Do those who trace, transform or record a model get right numbers of fastbn.torch's layers?"""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("torch")
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
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


@pytest.fixture
def operator(lenient: None) -> None:
    """For tests of what the operator alone gives: the bits of eager code, and graphs where torch's layer has none."""
    torch.compiler.reset()
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager", fullgraph=True)
    if exporting(torch.zeros(1)):
        pytest.skip(f"torch {torch.__version__} tells compiled code that it is exported: torch's layer runs")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compile(operator: None, dtype: str, training: bool) -> None:
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
def test_compile_with_residual(operator: None, activation: Any) -> None:
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


def test_compile_for_any_size(operator: None) -> None:
    """One graph serves batches of several sizes."""
    ours = fastbn.torch.BatchNorm1d(5, momentum=0.3)
    other = copy.deepcopy(ours)
    torch.compiler.reset()
    graph = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 7, 9):
        x = data((n, 5, 3))
        assert torch.equal(graph(x), ours(x))
    assert_agree(other.state_dict(), ours.state_dict(), 0)


def test_compile_of_frozen_parts(operator: None) -> None:
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


TOGGLED = [(True, 4), (False, 7), (True, 9), (False, 4)]


def test_compile_toggled(operator: None) -> None:
    """Training and evaluation in turns, batches of several sizes: the bits of eager code."""
    ours = fastbn.torch.BatchNorm1d(5, activation="silu")
    other = copy.deepcopy(ours)
    torch.compiler.reset()
    graph = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    for training, n in TOGGLED:
        x = data((n, 5, 3))
        found = []
        for layer, call in ((ours, ours), (other, graph)):
            layer.train(training)
            one = x.clone().requires_grad_()
            y = call(one)
            found.append((y, *torch.autograd.grad(y.pow(2).sum(), (one, *layer.parameters()))))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert_agree(other.state_dict(), ours.state_dict(), 0)


@pytest.mark.parametrize("momentum", [-1.2, 2, torch.tensor(0.3), None], ids=str)
def test_compile_of_momenta(operator: None, momentum: Any) -> None:
    theirs, ours = pair(1, momentum=momentum)
    graph = compiled(ours, "aot_eager")
    for _ in range(2):
        x = data((8, 5))
        torch.testing.assert_close(graph(x), theirs(x), rtol=2e-5, atol=2e-5)
    assert_agree(ours.state_dict(), theirs.state_dict(), 2e-5)


@pytest.mark.parametrize("way", ["func.grad", "func.vmap", "second", "batched", "dual", "checkpoint"])
def test_compile_with_derivatives(lenient: None, way: str) -> None:
    """As far as torch's own layer goes; torch refuses second derivatives of what AOTAutograd compiled."""
    theirs, ours = (layer.double() for layer in pair(1, affine=way != "dual", track_running_stats=way == "second"))
    x, tangent = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)

    def run(layer: Any) -> Any:
        torch.compiler.reset()
        one = x.clone().requires_grad_()
        if way == "func.grad":
            return torch.compile(torch.func.grad(lambda x: layer(x).pow(3).sum()), backend="aot_eager")(x)
        if way == "func.vmap":
            return torch.compile(torch.func.vmap(layer), backend="aot_eager")(tangent)
        if way == "checkpoint":
            graph = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager")
            return torch.autograd.grad(graph(one).pow(3).sum(), one)[0]
        graph = torch.compile(layer, backend="eager" if way == "second" else "aot_eager")
        if way == "second":
            (dx,) = torch.autograd.grad(graph(one).pow(3).sum(), one, create_graph=True)
            return torch.autograd.grad(dx.pow(2).sum(), one)[0]
        if way == "batched":
            return torch.autograd.grad(graph(one), one, tangent, is_grads_batched=True)[0]
        graph(x)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(graph(forward_ad.make_dual(x, tangent[0]))).tangent

    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiled_autograd(lenient: None, training: bool) -> None:
    """The backward pass of eager code, compiled, for batches of several sizes."""
    compiled_autograd = importlib.import_module("torch._dynamo.compiled_autograd")
    theirs, ours = (layer.double().train(training) for layer in pair(1))
    xs, found = [data((size, 5)).double() for size in (6, 7, 9)], list[list[torch.Tensor]]()
    for layer in (ours, theirs):
        torch.compiler.reset()
        found.append([])
        for x in xs:
            one = x.clone().requires_grad_()
            y = layer(one)
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                y.pow(3).sum().backward()
            assert one.grad is not None
            found[-1].append(one.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_operator_refuses_forward_mode(lenient: None) -> None:
    """It would lose the tangent without a word."""
    x = data((4, 3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="fastbn::batch_norm has no forward-mode AD"):
            torch.ops.fastbn.batch_norm(dual, None, None, None, None, None, 1e-5, None, 0.01)


# Traced and recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before_dispatch", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_make_fx(lenient: None, training: bool, before_dispatch: bool) -> None:
    """The graph computes for any input, and updates the running statistics."""
    theirs, ours = (layer.double().train(training) for layer in pair(1, activation=None))
    x, found = torch.randn(6, 5, dtype=torch.float64), []
    for layer in (ours, theirs):
        graph = make_fx(layer, pre_dispatch=before_dispatch)(x.clone())
        found.append({"y": graph(x + x.pow(2)), **layer.state_dict()})
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-9, atol=1e-9)


def gradients_of(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
    y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    return torch.autograd.grad(y.pow(3).sum(), (x, weight, bias))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_a_step(lenient: None, mode: str) -> None:
    """Forward and backward in one graph; and of the backward pass of a graph that was there before."""
    theirs, ours = (layer.double() for layer in pair(1, track_running_stats=False))
    x, v, found = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64), []
    for layer in (ours, theirs):
        inputs = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
        step = make_fx(partial(gradients_of, layer), tracing_mode=mode)(*inputs)
        results = list(step(x + v, layer.weight, layer.bias))
        if mode == "real":
            y = layer(inputs[0])
            grad = partial(torch.autograd.grad, y, inputs[0], retain_graph=True)
            results += make_fx(grad)(torch.ones_like(v))(v)
        found.append(results)
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["all", "backward"])
def test_counting_flops(lenient: None, where: str) -> None:
    """A dispatch mode, around all or around the backward pass alone."""
    theirs, ours = (torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), layer).double() for layer in pair(2))
    ours[0].load_state_dict(theirs[0].state_dict())
    x, found = data(SHAPES[2], dtype=torch.float64), []
    for layer in (ours, theirs):
        counter = FlopCounterMode(display=False)
        with counter if where == "all" else contextlib.nullcontext():
            loss = layer(x).pow(3).sum()
        with counter:
            grads = torch.autograd.grad(loss, list(layer.parameters()))
        found.append((counter.get_total_flops(), grads))
    assert found[0][0] == found[1][0]
    for got, wanted in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_modes_of_functions(lenient: None) -> None:
    """With a default device, say: they see the operator, which the kernels compute."""
    seen: list[str] = []

    class Watching(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    _, ours = pair(2, activation="relu")
    x, dy = data(SHAPES[2]), data(SHAPES[2])
    found = []
    for mode in (contextlib.nullcontext(), Watching(), torch.device("meta")):
        layer, one = copy.deepcopy(ours), x.clone().requires_grad_()
        with mode:
            y = layer(one)
            grads = torch.autograd.grad(y, (one, *layer.parameters()), dy, retain_graph=True)
            (dx,) = torch.autograd.grad(y, one, dy, create_graph=True)
            found.append((y, *grads, *torch.autograd.grad(dx.sum(), (one, layer.weight)), layer.running_var))
    for other_found in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other_found, strict=True))
    assert any("fastbn" in name and "batch_norm" in name for name in seen)


def test_fake_and_odd_tensors(lenient: None) -> None:
    """Fake tensors, subclasses and tensors of a default device stay what they are."""
    with FakeTensorMode() as mode:
        layer = fastbn.torch.BatchNorm2d(5, activation="relu")
        fake = mode.from_tensor(data(SHAPES[2]))
        y = layer(fake, fake)
        assert type(y) is type(fake)
        y.sum().backward()
        assert type(layer.weight.grad) is type(fake)

    class Odd(torch.Tensor):  # type: ignore[misc]
        pass

    theirs, ours = pair(2)
    x = data(SHAPES[2])
    y = ours(x.as_subclass(Odd))
    assert type(y) is Odd
    torch.testing.assert_close(y.as_subclass(torch.Tensor), theirs(x), rtol=2e-5, atol=2e-5)


def test_composite_compliance(lenient: None) -> None:
    """Torch's own check that nothing goes past a tensor subclass."""
    composite_compliance = importlib.import_module("torch.testing._internal.composite_compliance")
    _, ours = pair(1, track_running_stats=False)
    x = data((6, 5)).requires_grad_()
    composite_compliance.check_with_mode(ours, (x,), {}, torch.testing.assert_close)
    for check in (composite_compliance.check_backward_formula, composite_compliance.check_forward_ad_formula):
        check(ours, (x,), {}, assert_equal_fn=torch.testing.assert_close)


def test_symbolic_trace(lenient: None) -> None:
    """The layer is a leaf, with a residual too; and the graph can be traced again."""

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norms = torch.nn.ModuleList([fastbn.torch.BatchNorm1d(5), fastbn.torch.BatchNorm1d(5)])

        def forward(self, x: Any) -> Any:
            return self.norms[1](torch.relu(self.norms[0](x)), residual=x)

    model = Block()
    other = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(torch.fx.symbolic_trace(other))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["norms.0", "norms.1"]
    for training in (True, False):
        x = data((6, 5))
        assert torch.equal(graph.train(training)(x), model.train(training)(x))
    assert_agree(other.state_dict(), model.state_dict(), 0)


def test_selective_checkpointing(lenient: None) -> None:
    theirs, ours = (layer.double() for layer in pair(1))
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.pow.Tensor_Scalar])
    x, found = torch.randn(6, 5, dtype=torch.float64), []
    for layer in (ours, theirs):
        one = x.clone().requires_grad_()
        y = checkpoint(lambda x, layer=layer: layer(x).pow(3), one, use_reentrant=False, context_fn=context)
        found.append(torch.autograd.grad(y.sum(), (one, *layer.parameters())))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert_agree(ours.state_dict(), theirs.state_dict(), 1e-12)


def test_jit_script_names_the_way(lenient: None) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), fastbn.torch.BatchNorm2d(5))
    with pytest.raises(TypeError, match=r"torch.jit.script.*fastbn.torch.revert_batchnorm\(model\)"):
        torch.jit.script(model)
    assert type(model[1]) is fastbn.torch.BatchNorm2d
