"""Which layers take the place of torch's, and how does a call of one run?"""

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Proxy

from ..call import checks
from ..ops import Activation
from .autograd import apply, normalize_by_operator
from .formulas import activated
from .tensors import STATISTICS, bridged, count, normalize, place
from .watchers import transformed_in_compilation, watched

# Looked up once, since looking them up takes about as long as a small call.
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_has_torch_function = torch.overrides.has_torch_function


def _number(value: Any) -> float | None:
    """A momentum or eps as a float; None for a value that torch may refuse."""
    if type(value) is float:
        return value
    if isinstance(value, (int, float, np.floating, np.integer, np.bool_)):
        return float(value)
    if type(value) is Tensor and value.dim() == 0 and not value.requires_grad and not value.is_complex():
        return float(value)
    return None


def _momentum(momentum: Any, number: Tensor | None, compiles: bool) -> Any:
    """The weight of the batch in the running statistics, their average for None; None if torch may refuse it."""
    if momentum is not None:
        return _number(momentum)
    if number is None:
        return 0.0
    return 1 / (number + 1).double() if compiles else 1 / (float(number) + 1)


def _compiled(x: Tensor, residual: Tensor | None, *rest: Any) -> bool | None:
    """Checks what `place` checks, for tensors that torch.compile traces: True, or None to use torch's layer."""
    *parameters, channels, batch = rest
    if torch.compiler.is_exporting() or transformed_in_compilation() or x.dtype not in STATISTICS or x.dim() < 2:
        return None
    if x.shape[1] != channels or x.numel() <= (channels if batch else 0):
        return None
    if any(t is not None and (t.shape != (channels,) or t.dtype not in STATISTICS) for t in parameters):
        return None
    tensors = [t for t in (x, residual, *parameters) if t is not None]
    return True if all(t.device.type == "cpu" and t.layout is torch.strided for t in tensors) else None


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: got {residual.dtype}; allowed: the dtype of the input, {x.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}; allowed: the input's, {tuple(x.shape)}")


class _Layer(torch.nn.Module):
    """What fastbn's layers do differently from torch's layers, from which they are derived, too."""

    activation: Activation = None
    _learns = True
    """Whether the batch's own statistics are used in training."""

    def __init__(self, num_features: int, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        checks.activation(activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None, activation: Activation = None) -> Tensor:
        """Returns y, of the input's shape, dtype and memory format.

        A `residual`, of the input's shape and dtype, is added before the activation. An `activation` takes the place of
        the layer's for this call; None is the layer's own.
        """
        if bridged is not None and not _is_dynamo_compiling():
            y: Tensor | None = bridged.call(self, input, residual, activation)
            if y is not None:
                return y
        compiles = _is_compiling()
        gamma, beta, mean, var, number = self._tensors(compiles)
        training, eps = self.training and self._learns, self.eps
        if type(eps) is not float:
            eps = _number(eps)
        batch = training or (mean is None and var is None)
        find: Any = _compiled if compiles else place
        where = find(input, residual, gamma, beta, mean, var, self.num_features, batch)
        if (
            where is None
            or (not compiles and watched(input))
            or eps is None
            or not (0 < eps < math.inf or (eps == 0 and not batch))
            or (mean is None) is not (var is None)
            or (mean is not None and (mean.requires_grad or var.requires_grad))
        ):
            return self._by_torch(input, residual, activation)
        if not (training and self.track_running_stats):
            number = None
        momentum = self.momentum
        if type(momentum) is not float:
            momentum = _momentum(momentum, number, compiles)
            if momentum is None:
                return self._by_torch(input, residual, activation)
        self._check_input_dim(input)
        if residual is not None:
            _check_residual(residual, input)
        if training and not self.track_running_stats and mean is not None:
            mean = var = None
            where = compiles or place(input, residual, gamma, beta, None, None, self.num_features, batch)
        seen = compiles or _has_torch_function((input,))
        if number is not None:  # before the call, which checkpointing may leave once it has the tensors that it needs
            number.add_(1) if seen else count(number)
        if activation is None:
            activation = self.activation
        elif not compiles:
            checks.activation(activation)
        if seen:
            return normalize_by_operator(input, residual, gamma, beta, mean, var, batch, momentum, eps, activation)
        if _is_grad_enabled() and (
            input.requires_grad
            or (gamma is not None and gamma.requires_grad)
            or (beta is not None and beta.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            rest = where, mean, var, batch, momentum, eps, activation
            return apply(input, residual, gamma, beta, rest)
        return normalize(where, input, residual, gamma, beta, mean, var, batch, momentum, eps, activation, False)[0]

    def _tensors(self, compiles: bool) -> tuple[Any, Any, Any, Any, Any]:
        """Weight, bias, running statistics and num_batches_tracked, read without the slow Module.__getattr__."""
        if not compiles:
            parameters, buffers = self._parameters, self._buffers
            try:
                return (
                    parameters["weight"],
                    parameters["bias"],
                    buffers["running_mean"],
                    buffers["running_var"],
                    buffers["num_batches_tracked"],
                )
            except KeyError:  # a weight that is parametrized or pruned is another kind of attribute
                pass
        return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _by_torch(self, input: Tensor, residual: Tensor | None, activation: Activation = None) -> Tensor:
        """Runs torch's layer and operators. When torch.fx traces, this layer is a leaf, as torch's layer is."""
        for given in (input, residual):
            if isinstance(given, Proxy):
                tracer = given.tracer
                if self._forward_hooks or self._forward_pre_hooks:
                    raise TypeError(
                        f"torch.fx cannot trace {type(self).__name__} of fastbn.torch with hooks: each runs twice; "
                        "allowed: torch's layers, which fastbn.torch.revert_batchnorm(model) gives back"
                    )
                arguments = (input,) if residual is None else (input, residual)
                named = {} if activation in (None, self.activation) else {"activation": activation}
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, named)
        if residual is not None:
            _check_residual(residual, input)
        y = self._normalized_by_torch(input)
        return activated(y if residual is None else y + residual, activation or self.activation)

    def _normalized_by_torch(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def _ends_with_norm(self) -> bool:
        """Whether the layer's result is the normalization's, without an activation of its own."""
        return self.activation is None

    def __prepare_scriptable__(self) -> Any:
        """Raises TypeError: torch.jit.script calls this method before it compiles a module."""
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__} of fastbn.torch; "
            "allowed: torch's layers, which fastbn.torch.revert_batchnorm(model) gives back"
        )

    def extra_repr(self) -> str:
        """Returns torch's description of the layer, with the activation if there is one."""
        fused = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{fused}"


class BatchNorm1d(_Layer, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on fastbn's kernels, for (N, C) and (N, C, L); see BatchNorm2d.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm1d(3)(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """

    __module__ = "fastbn.torch"  # where users, and pickles, find it


class BatchNorm2d(_Layer, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on fastbn's kernels, for (N, C, H, W).

    It is a torch.nn.BatchNorm2d, with its arguments, attributes, state_dict and errors, and one more argument. Results
    are as accurate as those of fastbn.forward. They have the memory format of the input, which is not copied:
    contiguous, channels_last or any other. Parameters of float16 and bfloat16 inputs may be float32 or of that dtype.

    Derivatives of any order are supported. Calls that the kernels cannot take, or that torch must record, go to torch's
    layer: see the table of `fastbn.torch`. The number of threads is the smaller of torch.get_num_threads() and
    fastbn.get_num_threads(). A small call takes no longer than torch's. With its backward pass, which goes through
    Python, it takes up to 5 microseconds longer.

    eps and momentum may be ints, and tensors of one value; momentum may have any sign. torch's layers allow the same.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, and bias where torch has it
        As torch's.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Applied to the result in the same pass over memory. Tools that replace torch's layers by others, such as
        torch.nn.SyncBatchNorm.convert_sync_batchnorm or torch.nn.utils.fusion, ignore it.

    A call takes the input and, optionally, a `residual` of the input's shape and dtype, which is added before the
    activation, and an `activation` that takes the place of the layer's for this call.

    Raises
    ------
    TypeError, ValueError
        For an unknown activation, and a residual of another shape or dtype than the input. Others are torch's errors.

    >>> import torch, fastbn.torch
    >>> bn = fastbn.torch.BatchNorm2d(3, activation="relu")
    >>> y = bn(torch.randn(2, 3, 4, 4, requires_grad=True))
    >>> y.sum().backward()
    >>> bn.bias.grad.shape
    torch.Size([3])
    """

    __module__ = "fastbn.torch"  # where users, and pickles, find it


class BatchNorm3d(_Layer, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on fastbn's kernels, for (N, C, D, H, W); see BatchNorm2d.

    >>> import torch, fastbn.torch
    >>> fastbn.torch.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """

    __module__ = "fastbn.torch"  # where users, and pickles, find it


_LAYERS: dict[type, type] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_TORCHS = {ours: theirs for theirs, ours in _LAYERS.items()}
"""Torch's layers and fastbn's, each by the other; sync.py adds SyncBatchNorm."""

for _ours, _theirs in _TORCHS.items():  # the parameters of this version of torch, and the activation
    _parameters = [*inspect.signature(_theirs).parameters.values(), inspect.signature(_ours).parameters["activation"]]
    setattr(_ours, "__signature__", inspect.Signature(_parameters))  # noqa: B010
