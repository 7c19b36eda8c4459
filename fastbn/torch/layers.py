"""What are the layers that take the place of torch's, and how does a model get them and give them back?"""

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
from .tensors import STATISTICS, count, normalize, place
from .watchers import transformed_in_compilation, watched

# Looked up once: a small call takes not much longer than it takes to find these.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_has_torch_function = torch.overrides.has_torch_function


def _number(value: Any) -> float | None:
    """A momentum or eps as torch takes it; None for what torch may refuse."""
    if type(value) is float:
        return value
    if isinstance(value, (int, float, np.floating, np.integer, np.bool_)):
        return float(value)
    if type(value) is Tensor and value.dim() == 0 and not value.requires_grad and not value.is_complex():
        return float(value)
    return None


def _momentum(momentum: Any, number: Tensor | None, compiles: bool) -> Any:
    """The share of the batch in the running statistics, with None their average; None where torch may refuse it."""
    if momentum is not None:
        return _number(momentum)
    if number is None:
        return 0.0
    return 1 / (number + 1).double() if compiles else 1 / (float(number) + 1)


def _compiled(x: Tensor, residual: Tensor | None, *rest: Any) -> bool | None:
    """What `place` tells, of the tensors that torch.compile traces with: True, or None for torch's operators."""
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
    """What the layers do that torch's, the other base of each, do otherwise."""

    activation: Activation = None

    def __init__(self, num_features: int, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        checks.activation(activation)
        super().__init__(num_features, *args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        compiles = _is_compiling()
        gamma, beta, mean, var, number = self._tensors(compiles)
        training, eps = self.training, self.eps
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
            return self._by_torch(input, residual)
        if not (training and self.track_running_stats):
            number = None
        momentum = self.momentum
        if type(momentum) is not float:
            momentum = _momentum(momentum, number, compiles)
            if momentum is None:
                return self._by_torch(input, residual)
        self._check_input_dim(input)
        if residual is not None:
            _check_residual(residual, input)
        if training and not self.track_running_stats and mean is not None:
            mean = var = None
            where = compiles or place(input, residual, gamma, beta, None, None, self.num_features, batch)
        seen = compiles or _has_torch_function((input,))
        if number is not None:  # before the call, which checkpointing may leave as soon as it has what it looks for
            number.add_(1) if seen else count(number)
        activation = self.activation
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
        """Weight, bias, running statistics and their number: in eager code not by Module.__getattr__, which is slow."""
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
            except KeyError:  # parametrized or pruned, it is another attribute
                pass
        return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _by_torch(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """By torch's layer and operators; under torch.fx's tracing this layer is a leaf, as torch's is."""
        for given in (input, residual):
            if isinstance(given, Proxy):
                tracer = given.tracer
                if self._forward_hooks or self._forward_pre_hooks:
                    raise TypeError(
                        f"torch.fx cannot trace {type(self).__name__} of fastbn.torch with hooks: each runs twice; "
                        "allowed: torch's layers, which fastbn.torch.revert_batchnorm(model) gives back"
                    )
                arguments = (input,) if residual is None else (input, residual)
                return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
        if residual is not None:
            _check_residual(residual, input)
        y = super().forward(input)
        return activated(y if residual is None else y + residual, self.activation)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for."""
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__} of fastbn.torch; "
            "allowed: torch's layers, which fastbn.torch.revert_batchnorm(model) gives back"
        )

    def extra_repr(self) -> str:
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
    are as accurate as fastbn.forward's, and have the memory format of the input, which is not copied: contiguous,
    channels_last or any other. Float16 and bfloat16 go with parameters of float32 or of their own.

    Derivatives of any order are right. What the kernels do not take, or may not compute unseen, goes to torch's layer:
    the table in fastbn.torch's docstring says what each tool of torch sees. As many threads work as
    torch.get_num_threads() tells, or fastbn.get_num_threads() if that is less. A small call takes as long as
    torch's, and with its backward pass, which goes through Python, some 5 microseconds more.

    eps and momentum are as torch takes them: a momentum of any sign, and ints and tensors of one value.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As torch's.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Follows, in the same pass over memory. Tools that put other layers in the place of torch's, such as
        torch.nn.SyncBatchNorm.convert_sync_batchnorm or torch.nn.utils.fusion, do not know of it.

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

for _ours, _theirs in _TORCHS.items():  # what this version's layers take, and an activation
    _parameters = [*inspect.signature(_theirs).parameters.values(), inspect.signature(_ours).parameters["activation"]]
    setattr(_ours, "__signature__", inspect.Signature(_parameters))  # noqa: B010


def convert_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Makes each torch.nn.BatchNorm1d, 2d and 3d in the model one of fastbn's, in place, and returns the model.

    The layers stay the same objects: parameters, buffers, hooks, mode, device and dtype are as they were, and an
    optimizer that has the parameters keeps them. Subclasses, such as SyncBatchNorm, stay what they are; so do layers
    that were given an attribute `activation`, which means something to fastbn's. `revert_batchnorm` is the way back.

    Raises TypeError if `model` is no torch.nn.Module.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> isinstance(fastbn.torch.convert_batchnorm(model)[1], fastbn.torch.BatchNorm2d)
    True
    """
    for module in checks.instance("model", model, torch.nn.Module, "a torch.nn.Module").modules():
        if type(module) in _LAYERS and "activation" not in vars(module):
            module.__class__ = _LAYERS[type(module)]
    return model


def revert_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Makes each BatchNorm1d, 2d and 3d of fastbn in the model torch's, in place, and returns the model.

    It undoes `convert_batchnorm`, and does the same to layers that were fastbn's from the start: for torch.jit.script,
    and for tools that look layers up by their class, such as torch.ao.quantization.fuse_modules. The layers stay the
    same objects. Subclasses stay what they are, and a residual that the model passes to a layer is then refused by it.

    Raises
    ------
    TypeError
        If `model` is no torch.nn.Module.
    ValueError
        If a layer has an activation, which torch's layers have not; nothing has been changed.

    >>> import torch, fastbn.torch
    >>> model = fastbn.torch.convert_batchnorm(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)))
    >>> type(fastbn.torch.revert_batchnorm(model)[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    named = checks.instance("model", model, torch.nn.Module, "a torch.nn.Module").named_modules()
    layers = [(name, module) for name, module in named if type(module) in _TORCHS]
    for name, layer in layers:
        if layer.activation is not None:
            where = f"the layer {name!r} in it" if name else "a layer"
            raise ValueError(
                f"model: got {where} with activation={layer.activation!r}; allowed: layers without one, since torch's "
                "have none: set the layer's activation to None and put a module with that activation behind it"
            )
    for _, layer in layers:
        vars(layer).pop("activation", None)
        layer.__class__ = _TORCHS[type(layer)]
    return model
