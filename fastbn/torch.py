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
from ._results import Cache, Parts
from ._threads import use_num_threads
from .backends import SAVED_ROWS, get_num_threads
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


def _tensor(array: Array | None, axis: int, x: Tensor) -> Any:
    """The tensor of x's shape and dtype that has an array's memory; the array's channels are on `axis`."""
    if array is None:
        return None
    tensor = torch.from_numpy(array.view(np.int16) if x.dtype is torch.bfloat16 else array).view(x.dtype)
    return tensor if axis == 1 else tensor.movedim(-1, 1)


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
    residual: Tensor | None,
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
    axis, (x_, residual_, y_) = _channels_together(x, x, residual, y)
    gamma_, beta_, statistics = _array(gamma), _array(beta), _STATISTICS[x.dtype]
    mean_, var_ = _array(_cast(mean, statistics)), _array(_cast(var, statistics))
    options: dict[str, Any] = {"eps": eps, "axis": axis, "activation": activation, "residual": residual_, "out": y_}
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
    residual: Tensor | None,
    saved: Array,
    training: bool,
    activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, residual, gamma and beta; None where not wanted.

    Those of the last two are in the statistics dtype. The residual's is not asked for where it is dy.
    """
    for_x, for_residual, for_gamma, for_beta = wanted
    dx = _empty_like(x) if for_x or for_residual else None
    axis, (dy_, x_, residual_, dx_) = _channels_together(x, dy, x, residual, dx)
    cache = Cache(Parts(x_, residual_, saved, axis, not training, activation, for_gamma, for_beta))
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None
    with _threads():
        if dx is None:
            sums = backward_sums(dy_, cache)
            dgamma, dbeta, dresidual = sums.sum_dy_xhat, sums.sum_dy, None
        else:
            gradients = backward(dy_, cache, out=dx_)
            dgamma, dbeta, dresidual = gradients.dgamma, gradients.dbeta, gradients.dresidual
    return (
        dx if for_x else None,
        _tensor(dresidual, axis, x) if for_residual else None,
        torch.from_numpy(dgamma) if for_gamma else None,
        torch.from_numpy(dbeta) if for_beta else None,
    )


# Differentiated: in eager code ---------------------------------------------------------------------------------------


class _Normalization(torch.autograd.Function):
    """`_forward` with its gradient; what needs none is one argument, since each costs time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        y, ctx.saved = _forward(x, residual, gamma, beta, *rest)
        ctx.save_for_backward(x, residual)
        ctx.dtypes = _dtypes(gamma, beta)
        ctx.training, ctx.activation = rest[2], rest[5]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _refusing_a_second(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


def _dtypes(*parameters: Tensor | None) -> list[Any]:
    return [None if parameter is None else parameter.dtype for parameter in parameters]


def _asked(ctx: Any) -> tuple[bool, bool, bool, bool]:
    """What `_backward` is asked for."""
    for_x, for_residual, for_gamma, for_beta = ctx.needs_input_grad[:4]
    return for_x, for_residual and ctx.activation is not None, for_gamma, for_beta


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x, residual), wanted = ctx.saved_tensors, _asked(ctx)
    dx, dresidual, dgamma, dbeta = _backward(dy, x, residual, ctx.saved, ctx.training, ctx.activation, wanted)
    if ctx.activation is None and ctx.needs_input_grad[1]:
        dresidual = dy
    return dx, dresidual, _cast(dgamma, ctx.dtypes[0]), _cast(dbeta, ctx.dtypes[1]), None


_refusing_a_second = torch.autograd.function.once_differentiable(_gradients)


# And as an operator, for torch.compile -------------------------------------------------------------------------------


def _split(activation: Activation) -> tuple[str | None, float]:
    return activation if isinstance(activation, tuple) else (activation, DEFAULT_SLOPE)


def _named(activation: str | None, slope: float) -> Activation:
    return (activation, slope) if activation == "leaky_relu" else activation


@torch.library.custom_op("fastbn::batch_norm", mutates_args=(), device_types="cpu")
def _operator(
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
    """The result and what `_forward` keeps, in training where no statistics are given."""
    y, saved = _forward(x, residual, gamma, beta, mean, var, mean is None, 0.0, eps, _named(activation, slope))
    return y, torch.from_numpy(saved)


@_operator.register_fake
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
    gradients = _backward(dy, x, residual, _array(saved), training, _named(activation, slope), wanted)
    return [gradient for gradient in gradients if gradient is not None]


@_operator_backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    of_x, of_residual, *of_parameters = rest[-1]
    likes = [torch.empty_like(x) for some in (of_x, of_residual) if some]
    return likes + [x.new_empty(x.shape[1], dtype=_STATISTICS[x.dtype]) for some in of_parameters if some]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, gamma, beta, mean, _, _, ctx.activation, ctx.slope = inputs
    ctx.save_for_backward(x, residual, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.training, ctx.dtypes = mean is None, _dtypes(x, residual, gamma, beta)


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = _asked(ctx)
    found = iter(_operator_backward(dy, *ctx.saved_tensors, ctx.training, ctx.activation, ctx.slope, list(wanted)))
    gradients = [_cast(next(found), dtype) if some else None for some, dtype in zip(wanted, ctx.dtypes, strict=True)]
    if ctx.activation is None and ctx.needs_input_grad[1]:
        gradients[1] = dy
    return *gradients, *[None] * 5


_operator.register_autograd(_differentiate, setup_context=_keep)


def _traced(
    x: Tensor,
    residual: Tensor | None,
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
    y, saved = _operator(x, residual, gamma, beta, *given, eps, *_split(activation))
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


def _runs_here(x: Tensor, tensors: tuple[Tensor | None, ...], channels: int, batch: bool) -> bool:
    """Whether fastbn's kernels take x, with the tensors beside it. Torch's layer takes the rest, or refuses it."""
    return (
        all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu) for t in (x, *tensors))
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

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        gamma, beta, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        batch = self.training or (mean is None and var is None)
        if not _runs_here(input, (residual, gamma, beta, mean, var), self.num_features, batch):
            y = super().forward(input)
            return _activated(y if residual is None else y + residual, self.activation)
        self._check_input_dim(input)
        counts = self.training and self.track_running_stats and self.num_batches_tracked is not None
        momentum = self.momentum or 0.0
        if counts and self.momentum is None:
            momentum = 1 / (float(self.num_batches_tracked) + 1)
        if self.training and not self.track_running_stats:
            mean = var = None
        arguments = input, residual, gamma, beta, mean, var, batch, momentum, self.eps, self.activation
        if torch.compiler.is_compiling():
            y = _traced(*arguments)
        elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
            y = _Normalization.apply(*arguments[:4], arguments[4:])
        else:
            y, _ = _forward(*arguments, keeps=False)
        if counts:
            self.num_batches_tracked.add_(1)
        return y

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
    tells, or fastbn.get_num_threads() if that is less. Each pass takes some tens of microseconds more in Python than
    torch's, which tells up to some 100,000 values.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As torch's.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Follows, in the same pass over memory. Tools that put other layers in the place of torch's, such as
        SyncBatchNorm or torch.nn.utils.fusion, do not know of it.

    A call takes the input and, if there is one, a `residual` of its shape and dtype, which is added before the
    activation.

    Raises
    ------
    TypeError, ValueError
        For an unknown activation, or a residual unlike the input; otherwise what torch's layer raises.

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
