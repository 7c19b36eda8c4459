"""What do torch's own operators compute? Gradients that can be differentiated, activations, and unusual momenta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._backends import SAVED_ROWS
from .._moments import blended
from ..call.activations import DEFAULT_SLOPES, name_and_slope
from ..ops import Activation

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The gradients of x, residual, gamma and beta; None for each that is not wanted."""


def activated(y: Tensor, activation: Activation) -> Tensor:
    """The activation of y."""
    name, slope = name_and_slope(activation)
    if name is None:
        return y
    function = getattr(torch.nn.functional, name)
    return function(y, slope) if name in DEFAULT_SLOPES else function(y)


def _activation_gradient(dy: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """Multiplies dy by the activation's derivative at z, which at kinks and at NaN is torch's.

    Where torch's vector code and scalar code differ at NaN, the gradient is dy for relu6 (not 0) and NaN for hardswish
    (not dy), so that no NaN is lost.
    """
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, dy)
    if activation == "hardswish":
        return torch.where(z <= -3, 0, torch.where(z >= 3, dy, dy * (z / 3 + 0.5)))
    if activation in ("sigmoid", "silu"):  # torch's 1 - sigmoid(z) loses digits
        high, low = torch.sigmoid(z), torch.sigmoid(-z)
        return dy * (high * low if activation == "sigmoid" else high + z * high * low)
    return torch.func.vjp(lambda z: activated(z, activation), z)[1](dy)[0]


def gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
    activation: Activation,
    wanted: Sequence[bool],
    means: Callable[..., list[Tensor]] | None = None,
) -> Gradients:
    """The gradients that fastbn.backward documents, in float64, by operators that autograd and torch.func can follow.

    `saved` has the rows that the forward pass kept. With batch statistics, the mean is computed again, as the saved
    mean plus a difference, so that no digits are lost and the gradient through the mean is kept. beta may be None
    without an activation. `means` gives the means per channel of tensors of x's shape, if x is a part of the batch.
    """
    for_x, for_residual, for_gamma, for_beta, *_ = wanted
    others = (0, *range(2, x.ndim))
    if means is None:

        def means(*terms: Tensor) -> list[Tensor]:
            return [term.mean(others, keepdim=True) for term in terms]

    rows = dict(zip(SAVED_ROWS, saved.view(len(SAVED_ROWS), 1, -1, *[1] * (x.ndim - 2)), strict=True))
    centered = x.double() - rows["mean"]
    if training:
        centered = centered - means(centered)[0]
        inv_std = (means(centered.square())[0] + eps).rsqrt()
    else:
        centered, inv_std = centered - rows["mean_low"], rows["inv_std"]
    xhat = centered * inv_std
    scale = None if gamma is None else _by_channel(gamma, x)
    dz = dy.double()
    if activation is not None:
        z = xhat if scale is None else xhat * scale
        z = z if beta is None else z + _by_channel(beta, x)
        dz = _activation_gradient(dz, z if residual is None else z + residual.double(), activation)
    dx = dresidual = dgamma = dbeta = None
    read = (x, gamma) if activation is None else (x, gamma, beta, residual)
    if for_x:
        dx = dz
        if training:
            of_dz, of_product = means(dz, dz * xhat)
            dx = dz - of_dz - xhat * of_product
        dx = _linked(dx * inv_std if scale is None else dx * inv_std * scale, *read).to(x.dtype)
    if for_residual:
        dresidual = _linked(dz, *read).to(x.dtype)
    if for_gamma and gamma is not None:
        dgamma = _linked((dz * xhat).sum(others), *read).to(gamma.dtype)
    if for_beta:
        dbeta = _linked(dz.sum(others), *read)
    return dx, dresidual, dgamma, dbeta


def _linked(gradient: Tensor, *read: Tensor | None) -> Tensor:
    """The gradient with all of `read` in its graph, as in torch's; its derivative by those it does not use is 0."""
    for tensor in read:
        if tensor is not None and tensor.requires_grad:
            always = torch.ones((), dtype=torch.bool, device=tensor.device)
            some = tensor[(0,) * tensor.ndim] if tensor.numel() else tensor.sum()
            gradient = torch.where(always, gradient, some.double())
    return gradient


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.double().view(-1, *[1] * (x.ndim - 2))


def blend(mean: Tensor, var: Tensor, saved: Tensor, count: Any, momentum: Any) -> None:
    """Updates running statistics of any dtype, with any momentum, and rounds once."""
    rows = dict(zip(SAVED_ROWS, saved.unbind(), strict=True))
    batch = rows["mean"] + rows["mean_low"], rows["var"] * (count / (count - 1))
    for running, new in zip((mean, var), batch, strict=True):
        running.copy_(_rounded(blended(running.double(), new, momentum), running.dtype))


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds once, as `rounded` in call/dtypes.py does; torch would round to a 16-bit dtype twice, through float32."""
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    single = values.float()
    even = single.view(torch.int32) & 1 == 0
    inward = torch.nextafter(single, torch.where(values > single, math.inf, -math.inf))
    return torch.where((single != values) & even & values.isfinite(), inward, single).to(dtype)
