"""Does fastbn.torch refuse memory that is not there, and leave to torch what its kernels may not decide?"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from torch_cases import torch

import fastbn.torch


def layer(channels: int = 3, **options: Any) -> Any:
    return fastbn.torch.BatchNorm1d(channels, **options)


def test_freed_storage() -> None:
    """With an offset into it the address is not 0."""
    x = torch.randn(50)[20:32].view(4, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        layer()(x)
    weight = torch.randn(50)[20:23]
    weight.untyped_storage().resize_(0)
    bn = layer()
    bn.weight.data = weight
    with pytest.raises(RuntimeError):
        bn(torch.randn(5, 3))


def test_storage_that_is_freed_before_the_backward_pass() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    z = x * 1
    y = layer()(z)
    z.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        y.sum().backward()


@pytest.mark.parametrize(
    "residual", [torch.zeros(2, 2), torch.zeros(64, 64, dtype=torch.bfloat16)], ids=["shape", "dtype"]
)
def test_the_operator_refuses_a_residual_that_does_not_fit(residual: Any) -> None:
    x = torch.randn(64, 64)
    with pytest.raises(TypeError, match="fastbn::batch_norm"):
        torch.ops.fastbn.batch_norm(x, residual, None, None, None, None, 1e-5, None, 0.01)


def test_counting_is_a_modification() -> None:
    """Which autograd sees, as that of torch's layer."""
    x = torch.randn(5, 3)
    for bn in (torch.nn.BatchNorm1d(3), layer()):
        first = bn(x) * bn.num_batches_tracked
        second = bn(x) * bn.num_batches_tracked
        with pytest.raises(RuntimeError, match="inplace operation"):
            (first.sum() + second.sum()).backward()


def test_statistics_that_require_a_gradient_are_torchs() -> None:
    """Who refuses to differentiate by them."""
    for bn in (torch.nn.BatchNorm1d(3).eval(), layer().eval()):
        bn.running_mean = torch.zeros(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="running_mean"):
            bn(torch.randn(5, 3)).sum().backward()


def test_an_attribute_of_the_users_own() -> None:
    """It is no activation of fastbn's."""
    plain = torch.nn.BatchNorm1d(3)
    plain.activation = "relu"
    x = torch.randn(5, 3)
    wanted = copy.deepcopy(plain)(x)
    assert type(fastbn.torch.convert_batchnorm(plain)) is torch.nn.BatchNorm1d
    assert torch.equal(plain(x), wanted)
    assert fastbn.torch.revert_batchnorm(plain).activation == "relu"


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "sigmoid"])
def test_nan_in_every_gradient(activation: str) -> None:
    """The plain one and the one that can be differentiated are as torch's."""
    x = torch.randn(5, 3, dtype=torch.float64)
    x[1, 0] = math.nan
    ours, torchs = layer(activation=activation).double(), torch.nn.BatchNorm1d(3).double()
    functions = torch.nn.functional
    found = [
        torch.autograd.grad(y.sum(), [bn.weight, bn.bias], create_graph=create)
        for bn, act in ((ours, lambda y: y), (torchs, getattr(functions, activation)))
        for create in (False, True)
        for y in [act(bn(x))]
    ]
    for some in found[:-1]:
        for one, other in zip(some, found[-1], strict=True):
            assert torch.allclose(one, other, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid"])
def test_slopes_at_nan_and_infinity(activation: str, training: bool) -> None:
    """The plain gradient and the one that can be differentiated are torch's, but where its own loops differ."""
    x, residual = torch.randn(50, 3), torch.tensor([math.nan, math.inf, -math.inf, 0.5]).repeat(38)[:150].view(50, 3)
    x.requires_grad_(), residual.requires_grad_()
    ours, torchs = layer(activation=activation).train(training), torch.nn.BatchNorm1d(3).train(training)

    def gradients(y: Any, create_graph: bool) -> list[Any]:
        found = torch.autograd.grad(y.sum(), [residual, x], create_graph=create_graph)
        return [gradient.detach() for gradient in found[: 1 if training else 2]]  # of x one NaN makes all NaN

    plain, differentiable = (gradients(ours(x, residual), create) for create in (False, True))
    wanted = gradients(getattr(torch.nn.functional, activation)(torchs(x) + residual), False)
    known = ~residual.isnan() if activation in ("relu6", "hardswish") else torch.ones_like(x, dtype=torch.bool)
    for one, other, theirs in zip(plain, differentiable, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
        torch.testing.assert_close(one[known], theirs[known], equal_nan=True)
    if activation in ("relu6", "hardswish"):  # 0 or dy, NaN or dy; here no NaN vanishes
        at_nan = torch.tensor(1.0 if activation == "relu6" else math.nan).expand(38)
        torch.testing.assert_close(plain[0][~known], at_nan, equal_nan=True)


def test_a_hook_that_changes_a_shape() -> None:
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dim() == 4 else t):
        y = fastbn.torch.BatchNorm2d(3)(x)
    with pytest.raises(RuntimeError, match="shape"):
        y.sum().backward()


@pytest.mark.parametrize("which", ["x", "weight", "running_var", "dy"])
def test_memory_that_is_not_aligned(which: str) -> None:
    """Goes by way of arrays, with the same result."""

    def shifted(tensor: Any) -> Any:
        raw = bytearray(b"\0" + tensor.detach().contiguous().numpy().tobytes())
        return torch.frombuffer(raw, dtype=torch.float32, offset=1, count=tensor.numel()).view(tensor.shape)

    x, dy, bn = torch.randn(5, 3), torch.randn(5, 3), layer()
    wanted = copy.deepcopy(bn)
    y = wanted(x)
    y.backward(dy)
    if which == "weight":
        bn.weight.data = shifted(bn.weight)
    if which == "running_var":
        bn.running_var = shifted(bn.running_var)
    got = bn(shifted(x) if which == "x" else x)
    got.backward(shifted(dy) if which == "dy" else dy)
    assert torch.equal(got, y)
    assert torch.equal(bn.weight.grad, wanted.weight.grad)
    assert torch.equal(bn.running_var, wanted.running_var)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardswish"])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_that_are_0_are_there(activation: str, training: bool) -> None:
    """By bias and residual, which a piecewise linear activation leaves without influence."""
    x, residual = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    bn = layer(activation=activation).train(training)
    (g,) = torch.autograd.grad(bn(x, residual).sum(), bn.weight, create_graph=True)
    for gradient in torch.autograd.grad(g.sum(), [bn.bias, residual, x]):
        assert torch.isfinite(gradient).all()


def test_hooks_of_a_traced_layer_are_refused() -> None:
    """They would run twice: while torch.fx traces, and when the graph calls the layer."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    fastbn.torch.convert_batchnorm(model)
    with pytest.raises(TypeError, match="revert_batchnorm"):
        torch.fx.symbolic_trace(model)
    x = torch.randn(5, 3)
    wanted = model(x)
    assert torch.allclose(torch.fx.symbolic_trace(fastbn.torch.revert_batchnorm(model))(x), wanted)


@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_gradient_in_another_order(shape: tuple[int, ...], order: torch.memory_format) -> None:
    """It may be one value for all, as the gradient of a sum is; the bits are those of a dense one."""
    if len(shape) == 2 and order is torch.channels_last:
        pytest.skip("channels_last has four axes")
    x = torch.randn(shape).to(memory_format=order).requires_grad_()
    bn = (fastbn.torch.BatchNorm1d if len(shape) == 2 else fastbn.torch.BatchNorm2d)(6)
    wanted = (x, bn.weight, bn.bias)
    for dy in (
        torch.full((), 0.75).expand(shape),
        torch.randn(shape),
        torch.randn(shape[::-1]).permute(*range(x.ndim)[::-1]),
    ):
        dense = dy.contiguous(memory_format=order).clone(memory_format=torch.preserve_format)
        found, expected = (torch.autograd.grad(bn(x), wanted, given) for given in (dy, dense))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert found[0].is_contiguous(memory_format=order)
