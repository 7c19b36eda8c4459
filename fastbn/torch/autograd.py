"""How does autograd see a call? As a Function in eager code, the cheapest way, and as the operator fastbn::batch_norm.

The operator is what torch.compile and modes of torch functions see. Both give the kernels' gradient where nobody
looks, and the formulas of torch's operators where the gradient may be differentiated, batched or recorded itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import SAVED_ROWS
from . import formulas
from .formulas import Activation, Gradients, split
from .tensors import STATISTICS, Place, cast, differentiate, normalize, place, place_of_gradient
from .watchers import transformed, watched

# In eager code -------------------------------------------------------------------------------------------------------


class Normalization(torch.autograd.Function):
    """`normalize` with its gradient; what needs none is one argument, since each costs time.

    beta is kept where the gradient needs it: otherwise it may change before the backward pass, as with torch's layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        where, mean, var, training, momentum, eps, activation = rest
        y, ctx.saved = normalize(where, x, residual, gamma, beta, mean, var, training, momentum, eps, activation)
        ctx.how = training, eps, activation
        ctx.save_for_backward(x, residual, gamma, None if activation is None else beta)
        ctx.beta_dtype = None if beta is None else beta.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, gamma, beta = ctx.saved_tensors
        training, eps, activation = ctx.how
        wanted = ctx.needs_input_grad[:4]
        where = None if torch.is_grad_enabled() or watched(dy) else place_of_gradient(dy, x, residual)
        if where is None:
            saved = torch.from_numpy(ctx.saved)
            found = formulas.gradients(dy, x, residual, gamma, beta, saved, training, eps, activation, wanted)
        else:
            found = differentiate(where, dy, x, residual, ctx.saved, training, activation, wanted)
        return _in_dtypes(found, None if gamma is None else gamma.dtype, ctx.beta_dtype)


apply = super(torch.autograd.Function, Normalization).apply
"""Normalization.apply without its care for torch.func, which never sees it: half the time."""


def _in_dtypes(found: Gradients, gamma: Any, beta: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the parameters are given in their dtypes; there is none for the fifth argument."""
    dx, dresidual, dgamma, dbeta = found
    return dx, dresidual, cast(dgamma, gamma), cast(dbeta, beta), None


# As an operator ------------------------------------------------------------------------------------------------------


def _named(activation: str | None, slope: float) -> Activation:
    return (activation, slope) if activation == "leaky_relu" else activation


def _known(where: Place | None) -> Place:
    """The place of tensors that the dispatcher handed over."""
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
    """The result and what `normalize` keeps, in training where no statistics are given."""
    tensors = x, residual, gamma, beta, mean, var
    where = _known(place(*tensors, x.shape[1], mean is None))
    y, saved = normalize(where, *tensors, mean is None, 0.0, eps, _named(activation, slope))
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
) -> list[Tensor]:
    """Those of the gradients of x, residual, gamma and beta that are wanted."""
    where = _known(place_of_gradient(dy, x, residual))
    how = training, _named(activation, slope), wanted
    gradients = differentiate(where, dy, x, residual, saved.numpy(), *how)
    return [gradient for gradient in gradients if gradient is not None]


@_operator_backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    of_x, of_residual, *of_parameters = rest[-1]
    likes = [torch.empty_like(x) for some in (of_x, of_residual) if some]
    return likes + [x.new_empty(x.shape[1], dtype=STATISTICS[x.dtype]) for some in of_parameters if some]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, gamma, beta, mean, _, ctx.eps, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(x, residual, gamma, None if ctx.activation is None else beta, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.training, ctx.beta_dtype = mean is None, None if beta is None else beta.dtype


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, residual, gamma, beta, saved = ctx.saved_tensors
    for_x, for_residual, for_gamma, for_beta = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() or transformed():
        wanted = for_x, for_residual, for_gamma, for_beta
        activation = _named(ctx.activation, ctx.slope)
        found = formulas.gradients(dy, x, residual, gamma, beta, saved, ctx.training, ctx.eps, activation, wanted)
    else:
        by_operator = [for_x, for_residual and ctx.activation is not None, for_gamma, for_beta]
        found = _by_operator(dy, x, residual, saved, ctx, by_operator)
        if for_residual and ctx.activation is None:
            found = found[0], dy, *found[2:]
    return *_in_dtypes(found, None if gamma is None else gamma.dtype, ctx.beta_dtype), *[None] * 4


def _by_operator(
    dy: Tensor, x: Tensor, residual: Tensor | None, saved: Tensor, ctx: Any, wanted: Sequence[bool]
) -> Gradients:
    found = iter(_operator_backward(dy, x, residual, saved, ctx.training, ctx.activation, ctx.slope, list(wanted)))
    dx, dresidual, dgamma, dbeta = (next(found) if some else None for some in wanted)
    return dx, dresidual, dgamma, dbeta


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
    """What `normalize` does. The operator may not change the running statistics, or it could have no gradient."""
    given = (None, None) if training else (mean, var)
    y, saved = operator(x, residual, gamma, beta, *given, eps, *split(activation))
    if training and mean is not None and var is not None:
        formulas.blend(mean, var, saved, x.numel() // x.shape[1], momentum)
    return y
