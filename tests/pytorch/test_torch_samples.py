"""Do torch's own samples for its BatchNorm modules hold for fastbn.torch's layers, and magnitudes that torch's lose?"""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import cache
from typing import Any

import pytest

pytest.importorskip("torch")
from torch.autograd import forward_ad
from torch_cases import PLACES, SHAPES, as_found, assert_agree, data, torch

import fastbn
import fastbn.torch

__all__ = ["as_found"]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of what is its own

pytest.importorskip("expecttest")  # which torch's module needs

DTYPES = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2**-6}
"""And how far results may be apart, gradients in terms of the largest: the errors of torch's layer, not fastbn's."""
NAMES = {f"BatchNorm{n}d": getattr(torch.nn, f"BatchNorm{n}d") for n in (1, 2, 3)}


@cache
def info_of(name: str) -> Any:
    """What torch's tests know of a module. Its import takes seconds, which only a process that runs this spends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_modules
    (found,) = (info for info in common_modules.module_db if info.module_cls is NAMES[name])
    return found


def samples(name: str, dtype: str, training: bool) -> list[Any]:
    """As torch's tests make them."""
    info = info_of(name)
    return list(info.module_inputs_func(info, "cpu", getattr(torch, dtype), requires_grad=True, training=training))


def layers(name: str, sample: Any, dtype: str, training: bool) -> tuple[Any, Any]:
    """Torch's, and fastbn's with the same arguments and state."""
    given = sample.constructor_input
    theirs, ours = (
        getattr(home, name)(*given.args, **given.kwargs).to(getattr(torch, dtype)).train(training)
        for home in (torch.nn, fastbn.torch)
    )
    with torch.no_grad():
        for tensor_name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in tensor_name else torch.randn_like(tensor))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def values(layer: Any, x: Any) -> dict[str, Any]:
    y = layer(x)
    return {"y": y.detach(), **layer.state_dict()}


def first(layer: Any, x: Any) -> dict[str, Any]:
    grads = torch.autograd.grad(layer(x), (x, *layer.parameters()), direction(x))
    return {str(i): grad for i, grad in enumerate(grads)}


def second(layer: Any, x: Any) -> dict[str, Any]:
    """With terms of the inputs' own, since with some samples there is no second derivative to ask for."""
    inputs = x, *layer.parameters()
    grads = torch.autograd.grad(layer(x), inputs, direction(x), create_graph=True)
    total = sum((grad * direction(grad)).sum() for grad in grads) + sum(tensor.pow(2).sum() for tensor in inputs)
    grads += torch.autograd.grad(total, inputs)
    return {str(i): grad.detach() for i, grad in enumerate(grads)}


def tangent(layer: Any, x: Any) -> dict[str, Any]:
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), direction(x))))
        return {"y": primal.detach(), "tangent": tangent.detach()}


def without_gradients(layer: Any, x: Any) -> dict[str, Any]:
    with torch.no_grad():
        return values(layer, x) | tangent(layer, x)


def pickled(layer: Any, x: Any) -> dict[str, Any]:
    return values(pickle.loads(pickle.dumps(layer)), x)


def copied(layer: Any, x: Any) -> dict[str, Any]:
    layer(x)
    return values(copy.deepcopy(layer), x)


def direction(x: Any) -> Any:
    return torch.linspace(-1, 2, x.numel()).to(x.dtype).reshape(x.shape) if x.numel() else torch.zeros_like(x)


CHECKS = {check.__name__: check for check in (values, first, second, tangent, without_gradients, pickled, copied)}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, check: str, dtype: str, training: bool) -> None:
    """Values, strides and dtypes, of results, gradients and buffers: torch's, for every sample."""
    found = samples(name, dtype, training)
    assert len(found) >= 4
    for sample in found:
        theirs, ours = layers(name, sample, dtype, training)
        (x,) = sample.forward_input.args
        got, wanted = (CHECKS[check](layer, x) for layer in (ours, theirs))
        scale = max([1.0, *(float(t.abs().max()) for t in wanted.values() if t.numel())])
        assert_agree(got, wanted, DTYPES[dtype] * (scale if check in ("first", "second") else 1))


@pytest.mark.parametrize("name", NAMES)
def test_errors(name: str) -> None:
    """Torch's samples of what its layers refuse, in the same words."""
    info = info_of(name)
    if info.module_error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has no such samples")
    found = list(info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True))
    assert found
    for error in found:
        given = error.module_error_input
        layer = getattr(fastbn.torch, name)(*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*given.forward_input.args, **given.forward_input.kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize(("ndim", "place"), PLACES)
def test_magnitudes(ndim: int, place: str, offset: float, dtype: str) -> None:
    """Where torch's layer is the one that is wrong: against float64 on the same numbers."""
    layer = getattr(fastbn.torch, f"BatchNorm{ndim}d")(5)
    exact = copy.deepcopy(layer).double()
    x = (data(SHAPES[ndim], place) * (1 if dtype == "float32" else offset / 8) + offset).to(getattr(torch, dtype))
    dy, wide = data(SHAPES[ndim], place).to(x.dtype), x.double().requires_grad_()
    x.requires_grad_()
    y, wanted = layer(x), exact(wide)
    eps = 2**-23 if dtype == "float32" else 2**-7
    torch.testing.assert_close(y.double(), wanted, rtol=2 * eps, atol=2 * eps)
    grads = torch.autograd.grad(y, (x, *layer.parameters()), dy)
    exact_grads = torch.autograd.grad(wanted, (wide, *exact.parameters()), dy.double())
    for got, right in zip(grads, exact_grads, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(got.double(), right, rtol=0, atol=(8 if got.dtype is x.dtype else 20) * eps * scale)
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=2**-22, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=2**-21, atol=0)
