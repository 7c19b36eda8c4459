"""Are the derivatives of fastbn.torch's layers right, of any order, in both modes, alone and in batches?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import cases
import numpy as np
import pytest
import torch_cases
from torch_cases import (
    ACTIVATIONS,
    DTYPES,
    FORMATS,
    PLACES,
    SHAPES,
    assert_agree,
    called,
    data,
    pair,
    randomized,
    torch,
)

import fastbn
import fastbn.torch


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Torch's seed and threads, which are the process's."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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
