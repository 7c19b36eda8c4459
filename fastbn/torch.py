"""How does a PyTorch model run on fastbn? By its BatchNorm1d, 2d and 3d, drop-in replacements for torch's.

What a layer computes is in `_forward` and `_backward`, on the memory of the tensors. An autograd.Function wraps them,
the cheapest way for eager code, and so does the operator fastbn::batch_norm, which torch.compile can trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from . import _check
from ._activations import DEFAULT_SLOPE
from ._config import get_num_threads, use_num_threads
from ._results import Cache, Parts
from .backends import SAVED_ROWS
from .ops import backward, backward_sums, forward, infer

try:
    import torch
    from ml_dtypes import bfloat16
    from torch import Tensor
except ImportError as error:
    raise ImportError('fastbn.torch needs torch and ml_dtypes: pip install "fastbn[torch]"') from error

Array = np.ndarray[Any, Any]
Activation = str | tuple[str, float] | None

_STATISTICS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtypes of data that run here, and their statistics dtypes."""

_CHANNELS_LAST = {ndim: (0, *range(2, ndim), 1) for ndim in (3, 4, 5)}
"""The axes with channels behind all others, by the number of axes."""

_HUGE = 1 << 22
"""Bytes from which NumPy asks the system for huge pages. Fresh memory costs half the time with them."""

_FREE = nullcontext()


# On the memory of tensors --------------------------------------------------------------------------------------------


def _cast(tensor: Tensor | None, dtype: Any) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _array(tensor: Tensor | None) -> Any:
    """The tensor's memory, as NumPy sees it."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:  # which is no dtype of NumPy's own
        return tensor.detach().view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy(force=True)


def _channels_together(x: Tensor, *tensors: Tensor | None) -> tuple[int, list[Any]]:
    """The channel axis of the arrays of these tensors, which are those of x's shape; it is moved where x has it."""
    arrays = [_array(tensor) for tensor in tensors]
    if x.ndim == 2 or x.stride(1) != 1:
        return 1, arrays
    order = _CHANNELS_LAST[x.ndim]
    return -1, [None if array is None else array.transpose(order) for array in arrays]


def _empty_like(x: Tensor) -> Tensor:
    """Memory in x's memory format; a large one is NumPy's, who asks for huge pages."""
    if x.nbytes < _HUGE:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    memory = torch.from_numpy(np.empty(x.nbytes, np.uint8)).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, strides)


def _threads() -> AbstractContextManager[None]:
    """No more threads than torch has, nor than fastbn has."""
    most = torch.get_num_threads()
    return use_num_threads(most) if most < get_num_threads() else _FREE


def _forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    keeps: bool = True,
) -> tuple[Tensor, Any]:
    """The result and, if it keeps them, the rows that `_backward` needs.

    In training, mean and var are updated. They, gamma and beta may have any dtype.
    """
    y = _empty_like(x)
    axis, (x_, y_) = _channels_together(x, x, y)
    gamma_, beta_, statistics = _array(gamma), _array(beta), _STATISTICS[x.dtype]
    mean_, var_ = _array(_cast(mean, statistics)), _array(_cast(var, statistics))
    options: dict[str, Any] = {"eps": eps, "axis": axis, "activation": activation, "out": y_}
    with _threads():
        if not training and not keeps:
            infer(x_, gamma_, beta_, mean_, var_, **options)
            return y, None
        cache = forward(x_, gamma_, beta_, mean_, var_, training=training, momentum=momentum, **options).cache
    for given, updated in ((mean, mean_), (var, var_)):
        if training and given is not None and given.dtype is not statistics:
            given.copy_(torch.from_numpy(updated))
    return y, cache._parts.saved


def _backward(
    dy: Tensor,
    x: Tensor,
    saved: Array,
    training: bool,
    activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gamma and beta, those of the last two in the statistics dtype; None where not wanted."""
    for_x, for_gamma, for_beta = wanted
    dx = _empty_like(x) if for_x else None
    axis, (dy_, x_, dx_) = _channels_together(x, dy, x, dx)
    cache = Cache(Parts(x_, None, saved, axis, not training, activation, for_gamma, for_beta))
    with _threads():
        if for_x:
            _, dgamma, dbeta = backward(dy_, cache, out=dx_)
        else:
            sums = backward_sums(dy_, cache)
            dgamma, dbeta = sums.sum_dy_xhat, sums.sum_dy
    return (
        dx,
        torch.from_numpy(dgamma) if for_gamma else None,
        torch.from_numpy(dbeta) if for_beta else None,
    )


# Differentiated: in eager code ---------------------------------------------------------------------------------------


class _Normalization(torch.autograd.Function):
    """`_forward` with its gradient; what needs none is one argument, since each costs time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
        y, ctx.saved = _forward(x, gamma, beta, *rest)
        ctx.save_for_backward(x)
        ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in (gamma, beta)]
        ctx.training, ctx.activation = rest[2], rest[5]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _refusing_a_second(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dx, *gradients = _backward(dy, x, ctx.saved, ctx.training, ctx.activation, ctx.needs_input_grad[:3])
    return dx, *map(_cast, gradients, ctx.dtypes), None


_refusing_a_second = torch.autograd.function.once_differentiable(_gradients)


# And as an operator, for torch.compile -------------------------------------------------------------------------------


def _split(activation: Activation) -> tuple[str | None, float]:
    return activation if isinstance(activation, tuple) else (activation, DEFAULT_SLOPE)


def _named(activation: str | None, slope: float) -> Activation:
    return (activation, slope) if activation == "leaky_relu" else activation


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The result and what `_forward` keeps, in training where no statistics are given."""
    y, saved = _forward(x, gamma, beta, mean, var, mean is None, 0.0, eps, _named(activation, slope))
    return y, torch.from_numpy(saved)


@_operator.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(SAVED_ROWS), x.shape[1]), dtype=torch.float64)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    dy: Tensor,
    x: Tensor,
    saved: Tensor,
    training: bool,
    activation: str | None,
    slope: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Those of the gradients of x, gamma and beta that are wanted."""
    gradients = _backward(dy, x, _array(saved), training, _named(activation, slope), wanted)
    return [gradient for gradient in gradients if gradient is not None]


@_operator_backward.register_fake
def _(
    dy: Tensor, x: Tensor, saved: Tensor, training: bool, activation: str | None, slope: float, wanted: list[bool]
) -> list[Tensor]:
    likes = (torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=_STATISTICS[x.dtype]) for _ in range(2)))
    return [like for like, some in zip(likes, wanted, strict=True) if some]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, mean, _, _, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.training = mean is None
    ctx.dtypes = [x.dtype, *(None if parameter is None else parameter.dtype for parameter in (gamma, beta))]


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, saved = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(_operator_backward(dy, x, saved, ctx.training, ctx.activation, ctx.slope, wanted))
    gradients = (next(found).to(dtype) if some else None for some, dtype in zip(wanted, ctx.dtypes, strict=True))
    return *gradients, *[None] * 5


_operator.register_autograd(_differentiate, setup_context=_keep)


def _traced(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> Tensor:
    """What `_forward` does, by the operator. That may not change the running statistics, or it has no gradient."""
    given = (None, None) if training else (mean, var)
    y, saved = _operator(x, gamma, beta, *given, eps, *_split(activation))
    if training and mean is not None and var is not None:
        count = x.numel() // x.shape[1]
        batch = saved[SAVED_ROWS.index("mean")], saved[SAVED_ROWS.index("var")] * (count / (count - 1))
        for running, new in zip((mean, var), batch, strict=True):
            running.copy_((1 - momentum) * running.double() + momentum * new)
    return y


# The layers ----------------------------------------------------------------------------------------------------------


def _activated(y: Tensor, activation: Activation) -> Tensor:
    """By torch."""
    name, slope = _split(activation)
    if name is None:
        return y
    return getattr(torch.nn.functional, name)(y, *[slope] * (name == "leaky_relu"))


def _is_traced() -> bool:
    """Whether others should see torch's own operators: torch.export, torch.jit.trace, and torch.func's transforms."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _runs_here(x: Tensor, channels: int, batch: bool) -> bool:
    """Whether fastbn's kernels take x. Torch's layer takes the rest, or refuses it."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and x.dtype in _STATISTICS
        and x.dim() > 1
        and x.shape[1] == channels
        and x.numel() > (channels if batch else 0)
        and not _is_traced()
    )


class _Layer(torch.nn.Module):
    """What the layers do that torch's, the other base of each, do otherwise."""

    def __init__(self, num_features: int, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        _check.activation(activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        batch = self.training or (self.running_mean is None and self.running_var is None)
        if not _runs_here(input, self.num_features, batch):
            return _activated(super().forward(input), self.activation)
        self._check_input_dim(input)
        parameters, buffers = self._parameters, self._buffers  # as attributes they take ten times as long
        tracks = self.training and self.track_running_stats
        momentum = self.momentum or 0.0
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        mean, var = (buffers["running_mean"], buffers["running_var"]) if tracks or not batch else (None, None)
        gamma, beta = parameters["weight"], parameters["bias"]
        rest = mean, var, batch, momentum, self.eps, self.activation
        if torch.compiler.is_compiling():
            return _traced(input, gamma, beta, *rest)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, gamma, beta)):
            return _Normalization.apply(input, gamma, beta, rest)
        return _forward(input, gamma, beta, *rest, keeps=False)[0]

    def extra_repr(self) -> str:
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{fused}"


class BatchNorm1d(_Layer, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastbn's kernels, for (N, C) and (N, C, L); see BatchNorm2d.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm1d(3)(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """


class BatchNorm2d(_Layer, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastbn's kernels, for (N, C, H, W).

    It is a torch.nn.BatchNorm2d, with its arguments, attributes, state_dict and errors, and one more argument. Results
    are as accurate as fastbn.forward's, and have the memory format of the input, which is not copied: contiguous,
    channels_last or any other. Float16 and bfloat16 go with parameters of float32 or of their own.

    An input on another device, of no dense layout or of another dtype goes to torch's layer; so does each under
    torch.export, torch.jit.trace and torch.func's transforms, which then see torch's operators. Under torch.compile it
    is the operator fastbn::batch_norm. There is no second derivative. As many threads work as torch.get_num_threads()
    tells, or fastbn.get_num_threads() if that is less.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As torch's.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Follows, in the same pass over memory.

    Raises
    ------
    TypeError, ValueError
        For an unknown activation; otherwise what torch's layer raises.

    >>> import torch, fastbn.torch
    >>> bn = fastbn.torch.BatchNorm2d(3, activation="relu")
    >>> y = bn(torch.randn(2, 3, 4, 4, requires_grad=True))
    >>> y.sum().backward()
    >>> bn.bias.grad.shape
    torch.Size([3])
    """


class BatchNorm3d(_Layer, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on fastbn's kernels, for (N, C, D, H, W); see BatchNorm2d.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


_LAYERS: dict[type, type] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}


def convert_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Makes each torch.nn.BatchNorm1d, 2d and 3d in the model one of fastbn's, in place, and returns the model.

    The layers stay the same objects: parameters, buffers, hooks, mode, device and dtype are as they were, and an
    optimizer that has the parameters keeps them. Subclasses, such as SyncBatchNorm, stay what they are.

    Raises TypeError if `model` is no torch.nn.Module.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> isinstance(fastbn.torch.convert_batchnorm(model)[1], fastbn.torch.BatchNorm2d)
    True
    """
    for module in _check.instance("model", model, torch.nn.Module, "a torch.nn.Module").modules():
        if type(module) in _LAYERS:
            module.__class__ = _LAYERS[type(module)]
            module.activation = None
    return model
