"""How does autograd see a call? As a Function in eager code, which costs least, or as the operator fastbn::batch_norm.

torch.compile and modes of torch functions see the operator. In both cases the kernels compute the gradient, unless it
may itself be differentiated, batched or recorded; then torch's own operators compute it (formulas.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backends import SAVED_ROWS
from ..call.activations import as_given, name_and_slope
from ..ops import Activation
from . import formulas
from .formulas import Gradients
from .tensors import (
    STATISTICS,
    Place,
    arranged,
    bridged,
    cast,
    check_saved,
    differentiate,
    lacks_memory,
    normalize,
    place,
    place_of_gradient,
)
from .watchers import has_tangent, transformed, watched

_is_grad_enabled = torch.is_grad_enabled

# In eager code -------------------------------------------------------------------------------------------------------


def _forward(
    ctx: Any, x: Tensor, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None, rest: tuple[Any, ...]
) -> Tensor:
    """Normalization.forward for tensors of any kind."""
    where, mean, var, training, momentum, eps, activation = rest
    y, saved = normalize(where, x, residual, gamma, beta, mean, var, training, momentum, eps, activation)
    ctx.kept = saved, gamma, beta, training, activation, eps, version_of(gamma), version_of(beta)
    ctx.save_for_backward(*((x,) if residual is None else (x, residual)))
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Normalization.backward for tensors of any kind."""
    if _is_grad_enabled() or watched(dy):
        return _recorded(ctx, dy)
    x, residual = (*ctx.saved_tensors, None)[:2]
    other = arranged(dy, x)
    if other is not dy:
        return _node_backward(ctx, other)
    saved, gamma, beta, training, activation, _, _, _ = ctx.kept
    where = place_of_gradient(dy, x, residual)
    if where is None:
        return _recorded(ctx, dy)
    gradients = differentiate(where, dy, x, residual, saved, training, activation, ctx.needs_input_grad)
    return in_dtypes(gradients, gamma, beta)


def _recorded(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Normalization.backward by torch's operators, which may be differentiated, batched or recorded."""
    x, residual = (*ctx.saved_tensors, None)[:2]
    saved, gamma, beta, training, activation, eps, *versions = ctx.kept
    check_saved(dy, x, residual)
    check_unchanged(gamma, None if activation is None else beta, *versions)
    rows = torch.from_numpy(saved)
    wanted = ctx.needs_input_grad
    found = formulas.gradients(dy, x, residual, gamma, beta, rows, training, eps, activation, wanted)
    return in_dtypes(found, gamma, beta)


def version_of(tensor: Tensor | None) -> int:
    """How often a tensor has been modified in place; 0 for inference tensors, which have no count and no gradient."""
    try:
        return 0 if tensor is None else tensor._version
    except RuntimeError:
        return 0


def check_unchanged(gamma: Tensor | None, beta: Tensor | None, of_gamma: int, of_beta: int) -> None:
    """Raises if a parameter has changed since the forward pass: the differentiable gradient reads the parameters."""
    for name, tensor, version in (("weight", gamma, of_gamma), ("bias", beta, of_beta)):
        if tensor is not None and version_of(tensor) != version:
            raise RuntimeError(
                f"{name}: got values modified by an inplace operation since the forward pass; allowed: the same "
                "values, since the gradient that can be differentiated needs them"
            )


_node_forward, _node_backward = (_forward, _backward) if bridged is None else bridged.node(_forward, _backward)


class Normalization(torch.autograd.Function):
    """`normalize` with its gradient. All arguments without a gradient are in one tuple, since each argument costs time.

    gamma and beta are not saved for the backward pass, since they may change before one that does not read them.
    """

    forward = staticmethod(_node_forward)
    backward = staticmethod(_backward)  # which torch.compile traces with compiled autograd


apply = super(torch.autograd.Function, Normalization).apply
"""Normalization.apply without torch's checks for torch.func, which is never at work here. It takes half the time."""
if bridged is not None:
    bridged.apply = apply

# Autograd calls this method. The original looks for a vjp, and for gradients in a list, at each call.
Normalization._backward_cls.apply = _node_backward


def in_dtypes(found: Gradients, gamma: Any, beta: Any) -> tuple[Tensor | None, ...]:
    """Casts the parameters' gradients to the parameters' dtypes, and adds a None for the fifth argument."""
    dx, dresidual, dgamma, dbeta = found
    if dgamma is not None and dgamma.dtype is not gamma.dtype:
        dgamma = dgamma.to(gamma.dtype)
    if dbeta is not None and dbeta.dtype is not beta.dtype:
        dbeta = dbeta.to(beta.dtype)
    return dx, dresidual, dgamma, dbeta, None


# As an operator ------------------------------------------------------------------------------------------------------


def _checked_place(where: Place | None, *tensors: Tensor | None) -> Place:
    """The place of an operator's tensors; raises if the operators cannot take them."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            "fastbn::batch_norm has no forward-mode AD; allowed: fastbn.torch's layers, which support it"
        )
    if where is None:
        raise TypeError("fastbn::batch_norm: got tensors that the layers of fastbn.torch would leave to torch's layers")
    return where


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def operator(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Returns the result and `saved` of `normalize`: with batch statistics if mean is None, else with those given."""
    training = mean is None
    where = place(x, residual, gamma, beta, mean, var, x.shape[1], training)
    where, given = _checked_place(where, x, residual, gamma, beta, mean, var), as_given(activation, slope)
    y, saved = normalize(where, x, residual, gamma, beta, mean, var, training, 0.0, eps, given)
    return y, torch.from_numpy(saved)


@operator.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(SAVED_ROWS), x.shape[1]), dtype=torch.float64)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    saved: Tensor,
    training: bool,
    activation: str | None,
    slope: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, residual, gamma and beta. A gradient that is not wanted is an empty tensor."""
    where = _checked_place(place_of_gradient(dy, x, residual), dy, x, residual)
    found = differentiate(where, dy, x, residual, saved.numpy(), training, as_given(activation, slope), wanted)
    dx, dresidual, dgamma, dbeta = (x.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, dresidual, dgamma, dbeta


@_operator_backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for_x, for_residual, for_gamma, for_beta = rest[-1]

    def like_x(wanted: bool) -> Tensor:
        return torch.empty_like(x) if wanted else x.new_empty(0)

    def per_channel(wanted: bool) -> Tensor:
        return x.new_empty(x.shape[1], dtype=STATISTICS[x.dtype]) if wanted else x.new_empty(0)

    return like_x(for_x), like_x(for_residual), per_channel(for_gamma), per_channel(for_beta)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, gamma, beta, mean, _, ctx.eps, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(x, residual, gamma, None if ctx.activation is None else beta, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.training, ctx.beta_dtype = mean is None, None if beta is None else beta.dtype


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, residual, gamma, beta, saved = ctx.saved_tensors
    for_x, for_residual, for_gamma, for_beta = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() or transformed() or lacks_memory(dy) or has_tangent(dy):
        check_saved(dy, x, residual)
        wanted = for_x, for_residual, for_gamma, for_beta
        activation = as_given(ctx.activation, ctx.slope)
        found = formulas.gradients(dy, x, residual, gamma, beta, saved, ctx.training, ctx.eps, activation, wanted)
    else:
        asked = [for_x, for_residual and ctx.activation is not None, for_gamma, for_beta]
        some = _operator_backward(dy, x, residual, saved, ctx.training, ctx.activation, ctx.slope, asked)
        dx, dresidual, dgamma, dbeta = (one if given else None for one, given in zip(some, asked, strict=True))
        found = dx, dy if for_residual and ctx.activation is None else dresidual, dgamma, dbeta
    dgamma, dbeta = cast(found[2], None if gamma is None else gamma.dtype), cast(found[3], ctx.beta_dtype)
    return found[0], found[1], dgamma, dbeta, *[None] * 5


operator.register_autograd(_differentiate, setup_context=_keep)


def normalize_by_operator(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: Any,
    eps: float,
    activation: Activation,
) -> Tensor:
    """`normalize` by the operator. Running statistics are updated here, since an operator with a gradient may not."""
    given_mean, given_var = (None, None) if training else (mean, var)
    name, slope = name_and_slope(activation)
    y, saved = operator(x, residual, gamma, beta, given_mean, given_var, eps, name, slope)
    if training and mean is not None and var is not None:
        formulas.blend(mean, var, saved, x.numel() // x.shape[1], momentum)
    return y
