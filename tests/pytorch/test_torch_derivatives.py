"""Are the derivatives of fastbn.torch's layers right, of any order, in both modes, alone and in batches?"""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("torch")
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch_cases import ACTIVATIONS, DTYPES, SHAPES, as_found, assert_agree, data, pair, randomized, torch

import fastbn
import fastbn.torch
from fastbn.torch import formulas

__all__ = ["as_found"]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of what is its own

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


# Of higher order, in both modes, in batches --------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def double_pair(training: bool, options: dict[str, Any], ndim: int = 1) -> tuple[Any, Any]:
    theirs, ours = (layer.double().train(training) for layer in pair(ndim, 3, **options))
    return theirs, ours


def directions(x: Any) -> Any:
    return torch.randn(4, *x.shape, dtype=x.dtype)


def second(layer: Any, x: Any) -> Any:
    """Through what is before the layer, too."""
    factor = torch.randn_like(x).requires_grad_()
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(layer(x * factor).pow(3).sum(), [x, *parameters], create_graph=True)
    return *grads, *torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, factor, *parameters))


def of_the_sum(layer: Any) -> Any:
    return lambda x: layer(x).pow(3).sum()


def through_hooks(layer: Any, x: Any) -> Any:
    """What unpacks has other strides than what was packed."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.t().contiguous().t())
    with hooks:
        y = layer(x)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    return dx, torch.autograd.grad(dx.pow(2).sum(), x)[0]


def saved_on_cpu(layer: Any, x: Any) -> Any:
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    return torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters()))


def mutated(layer: Any, x: Any) -> Any:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        z = x * 1
        y = layer(z)
        z.zero_()
        return torch.autograd.grad(y.pow(3).sum(), x)


def hooked(layer: Any, x: Any) -> Any:
    """By hooks of the node and of several tensors."""
    seen: list[Any] = []
    torch.autograd.graph.register_multi_grad_hook((x, *layer.parameters()), lambda grads: seen.extend(grads))
    y = layer(x)
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    y.pow(3).sum().backward()
    return seen


def batched(layer: Any, x: Any) -> Any:
    y = layer(x)
    return torch.autograd.grad(y, (x, *layer.parameters()), directions(x), is_grads_batched=True)


def vmapped(layer: Any, x: Any) -> Any:
    y = layer(x)
    return torch.func.vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(directions(x))


def dual_numbers(layer: Any, x: Any) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), directions(x)[0]))))


def dual_numbers_without_gradients(layer: Any, x: Any) -> Any:
    with torch.no_grad():
        return dual_numbers(layer, x)


def dual_weight(layer: Any, x: Any) -> Any:
    if layer.weight is None:
        return ()
    with forward_ad.dual_level(), torch.no_grad():
        weight = forward_ad.make_dual(layer.weight.detach(), torch.randn_like(layer.weight))
        return tuple(forward_ad.unpack_dual(torch.func.functional_call(layer, {"weight": weight}, (x,))))


def dual_gradient(layer: Any, x: Any) -> Any:
    """Of a graph that was made before."""
    y = layer(x)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(directions(x)[0], directions(x)[0])
        grads = torch.autograd.grad(y, (x, *layer.parameters()), dy)
        return tuple(forward_ad.unpack_dual(grad).tangent for grad in grads)


def negative_views(layer: Any, x: Any) -> Any:
    """Memory holds the negative of what these tensors are."""
    odd = torch.complex(x, x).conj().imag
    assert odd.is_neg()
    y = layer(odd)
    return y, *torch.autograd.grad(layer(x), (x, *layer.parameters()), odd.detach())


def zeros_without_memory(layer: Any, x: Any) -> Any:
    zeros = torch._efficientzerotensor(tuple(x.shape), dtype=x.dtype)
    return layer(zeros), *torch.autograd.grad(layer(x), (x, *layer.parameters()), zeros)


def changed_bias(layer: Any, x: Any) -> Any:
    """The gradient does not need it."""
    y = layer(x)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.add_(1)
    return torch.autograd.grad(y.pow(3).sum(), x)


def checkpointed(reentrant: bool) -> Any:
    def run(layer: Any, x: Any) -> Any:
        y = checkpoint(layer, x * 1, use_reentrant=reentrant)
        y.pow(3).sum().backward()
        return x.grad, *(parameter.grad for parameter in layer.parameters())

    return run


def second_when_checkpointed(layer: Any, x: Any) -> Any:
    y = checkpoint(layer, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    return dx, *torch.autograd.grad(dx.pow(2).sum(), x)


functional, func = torch.autograd.functional, torch.func
WAYS: dict[str, Any] = {
    "second": second,
    "jvp": lambda layer, x: functional.jvp(layer, x, directions(x)[0]),
    "vjp": lambda layer, x: functional.vjp(layer, x, directions(x)[0]),
    "hvp": lambda layer, x: functional.hvp(of_the_sum(layer), x, directions(x)[0]),
    "vhp": lambda layer, x: functional.vhp(of_the_sum(layer), x, directions(x)[0]),
    "jacobian": functional.jacobian,
    "jacobian, vectorized": lambda layer, x: functional.jacobian(layer, x, vectorize=True),
    "jacobian, to differentiate": lambda layer, x: functional.jacobian(layer, x, vectorize=True, create_graph=True),
    "jacobian, forward": lambda layer, x: functional.jacobian(layer, x, vectorize=True, strategy="forward-mode"),
    "hessian": lambda layer, x: functional.hessian(of_the_sum(layer), x),
    "hessian, vectorized": lambda layer, x: functional.hessian(of_the_sum(layer), x, vectorize=True),
    "hessian, forward": lambda layer, x: functional.hessian(
        of_the_sum(layer), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "func.grad": lambda layer, x: func.grad(of_the_sum(layer))(x),
    "func.vjp": lambda layer, x: func.vjp(layer, x)[1](directions(x)[0])[0],
    "func.jvp": lambda layer, x: func.jvp(layer, (x,), (directions(x)[0],)),
    "func.linearize": lambda layer, x: func.linearize(layer, x)[1](directions(x)[0]),
    "func.hessian": lambda layer, x: func.hessian(of_the_sum(layer))(x),
    "func.jacrev of jacrev": lambda layer, x: func.jacrev(func.jacrev(of_the_sum(layer)))(x),
    "func.jacfwd of jacfwd": lambda layer, x: func.jacfwd(func.jacfwd(of_the_sum(layer)))(x),
    "func.vmap of grad": lambda layer, x: func.vmap(func.grad(of_the_sum(layer)))(torch.stack([x, 2 * x])),
    "func.functionalize": lambda layer, x: func.functionalize(layer)(x),
    "func.grad of another": lambda layer, x: func.grad(lambda s: (layer(x.detach()) * s).sum())(x.detach()[0]),
    "through hooks": through_hooks,
    "saved on cpu": saved_on_cpu,
    "mutated": mutated,
    "hooked": hooked,
    "batched": batched,
    "vmapped": vmapped,
    "dual": dual_numbers,
    "dual, no_grad": dual_numbers_without_gradients,
    "dual weight": dual_weight,
    "dual gradient": dual_gradient,
    "negative views": negative_views,
    "zeros": zeros_without_memory,
    "changed bias": changed_bias,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "checkpointed, second": second_when_checkpointed,
}


def flat(found: Any) -> list[Any]:
    if isinstance(found, (tuple, list)):
        return [tensor for some in found for tensor in flat(some)]
    return [found]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_a_derivative(way: str, options: str, training: bool) -> None:
    """Each gives what it gives with torch's layer, to 1e-9, and leaves the same buffers; None where that does."""
    theirs, ours = double_pair(training, OPTIONS[options])
    if way.startswith("func.") and training and theirs.running_mean is not None:
        for layer in (theirs, ours):  # torch.func refuses to update them
            layer.track_running_stats = False
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        found.append(flat(WAYS[way](layer, x.clone().requires_grad_())))
    assert len(found[0]) == len(found[1])
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert_agree(ours.state_dict(), theirs.state_dict(), 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
def test_gradgradcheck(activation: Any, with_residual: bool, affine: bool, training: bool) -> None:
    """By differences: of second order, reverse over reverse and forward over reverse, batched, and forward mode."""
    _, ours = pair(2, 2, activation=activation, affine=affine)
    ours.double().train(training)
    inputs = [data((3, 2, 2, 1), "channels_last", torch.float64) for _ in range(1 + with_residual)]
    names = [name for name, _ in ours.named_parameters()]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, *ours.parameters())]

    def function(*given: Any) -> Any:
        parameters = dict(zip(names, given[1 + with_residual :], strict=True))
        return torch.func.functional_call(ours, parameters, given[: 1 + with_residual])

    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradient_penalty(ndim: int, training: bool) -> None:
    """The gradient of a gradient in which the norm has a part, for every layer."""
    theirs, ours = (layer.double().train(training) for layer in pair(ndim))
    first = torch.nn.Conv1d(5, 5, 1).double() if ndim == 1 else getattr(torch.nn, f"Conv{ndim}d")(5, 5, 1).double()
    x = data(SHAPES[ndim], dtype=torch.float64)
    found = []
    for layer in (ours, theirs):
        loss = layer(first(x)).pow(3).sum() + first.weight.pow(2).sum()
        (grad,) = torch.autograd.grad(loss, first.weight, create_graph=True)
        found.append(torch.autograd.grad(grad.sum(), first.weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_third_derivative() -> None:
    """By differences: torch's own layer takes the statistics for constants from the second derivative on."""
    layer = fastbn.torch.BatchNorm1d(2).double()
    x = torch.randn(4, 2, dtype=torch.float64)

    def second_derivative(x: Any) -> Any:
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second_derivative, x.requires_grad_())


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_second_derivative_at_an_offset(offset: float) -> None:
    """In float32, against float64: the differentiable gradient is as exact as the kernels'."""
    _, ours = pair(1)
    x = (data((8, 5)) + offset).requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = copy.deepcopy(ours).double()
    found = []
    for layer, one in ((ours, x), (exact, wide)):
        (dx,) = torch.autograd.grad(layer(one).pow(3).sum(), one, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.pow(2).sum(), (one, layer.weight))))
    for got, wanted in zip(*found, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * scale)


def test_second_derivative_without_eps() -> None:
    """Where the running variance is 0, too: nothing is NaN. In training newer versions of torch refuse it."""
    layer = fastbn.torch.BatchNorm1d(2, eps=0).eval()
    layer.running_var[0] = 0
    x = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
    assert torch.isfinite(dx).all()
    assert torch.isfinite(ddx).all()
    assert not dx[:, 0].any()


def test_first_derivative_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asks for more."""

    def never(*_: Any) -> Any:
        raise AssertionError("torch's operators computed the gradient")

    monkeypatch.setattr(formulas, "gradients", never)
    _, ours = pair(2, activation="relu")
    ours(data(SHAPES[2]).requires_grad_(), data(SHAPES[2])).sum().backward()
    with pytest.raises(AssertionError, match="torch's operators"):
        torch.autograd.grad(ours(data(SHAPES[2])).sum(), ours.weight, create_graph=True)


def test_a_hook_that_changes_what_was_saved() -> None:
    """Never reads past the end of a tensor that came back smaller."""
    _, ours = pair(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:2] if t.ndim > 1 else t):
        y = ours(data((6, 5)).requires_grad_())
    with pytest.raises(RuntimeError):
        y.sum().backward()
