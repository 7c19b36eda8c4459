"""How is one batch normalized whose parts several processes have? Over torch.distributed, as if by one process.

Each call in training gathers the moments of all shares, and each backward pass their sums: one message of a rank each.
A gradient that may itself be differentiated is computed by torch's operators and a differentiable sum over the ranks.
"""

import inspect
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import Proxy

from .._backends import SAVED_ROWS
from .._moments import Moments, save
from .._ranks import HEADER, Exchange
from ..call import check_parts, checks
from ..ops import Activation
from . import formulas
from .autograd import check_unchanged, in_dtypes, version_of
from .formulas import activated
from .layers import _LAYERS, _TORCHS, _check_residual, _Layer, _momentum, _number
from .tensors import STATISTICS, arranged, check_saved, count, differentiate_share, is_readable, normalize_share
from .tensors import moments_of_share as moments_of
from .tensors import sums_of_share as sums_of
from .watchers import observed, watched

_is_compiling = torch.compiler.is_compiling

_LEAST = 1 << 14
"""The bytes of a message, in which up to 679 channels find room: gloo needs the same size on all ranks, and aborts the
process otherwise. So ranks whose layers differ can tell each other."""


def _exchange(group: Any, channels: int, call: str) -> Exchange:
    """An exchange of messages over a process group. Their size depends on the channels alone, so that it is known."""
    needed = HEADER.itemsize + 8 * (1 + 3 * channels)
    size = max(_LEAST, 1 << (needed - 1).bit_length())

    def gather(message: Any) -> list[Any]:
        sent = np.zeros(size, np.uint8)
        sent[: message.size] = message
        received = [np.empty_like(sent) for _ in range(dist.get_world_size(group))]
        if observed():  # where only errors are sent, by a thread of their own, which nothing observes
            with ThreadPoolExecutor(1) as other:
                other.submit(_all_gather, received, sent, group).result()
        else:
            _all_gather(received, sent, group)
        return received

    return Exchange(gather, call, "input", size)


def _all_gather(received: list[Any], sent: Any, group: Any) -> None:
    dist.all_gather([torch.from_numpy(array) for array in received], torch.from_numpy(sent), group=group)


# Autograd ------------------------------------------------------------------------------------------------------------


_STEPS = 3
"""How many sums over the ranks a gradient by formulas has."""


class _AllSum(torch.autograd.Function):
    """The sum of all ranks' rows of float64, in rank order. `step` tells sums apart that ranks might confuse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, step: int) -> Tensor:
        ctx.group, ctx.step = group, step
        with _exchange(group, rows.shape[1], "sum") as exchange:
            return torch.from_numpy(exchange.summed(rows.numpy(force=True), {"the order of sums": step}))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _AllSum.apply(gradient, ctx.group, ctx.step + _STEPS), None, None


class _Normalization(torch.autograd.Function):
    """The normalization of a share with the moments of all. All arguments without a gradient are in one tuple."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        rest: tuple[Moments, Any, float, Activation],
    ) -> Tensor:
        moments, ctx.group, eps, activation = rest
        y, saved = normalize_share(moments, x, residual, gamma, beta, eps, activation)
        ctx.kept = saved, moments.count, gamma, beta, version_of(gamma), version_of(beta), eps, activation
        ctx.save_for_backward(x, residual)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, values, gamma, beta, of_gamma, of_beta, eps, activation = ctx.kept
        wanted, recorded = ctx.needs_input_grad, torch.is_grad_enabled()
        if not recorded and not wanted[0]:
            x, residual = ctx.saved_tensors
            found = _gradients(dy, x, residual, saved, values, activation, wanted)
            return in_dtypes(found, gamma, beta)
        with _exchange(ctx.group, saved.shape[1], "backward") as exchange:
            x, residual = ctx.saved_tensors  # an error here is told to the other ranks, too
            if not recorded:
                found = _gradients(dy, x, residual, saved, values, activation, wanted, exchange)
                return in_dtypes(found, gamma, beta)
            _check_gradient(dy, x, residual)
            check_unchanged(gamma, None if activation is None else beta, of_gamma, of_beta)
        rows, means = torch.from_numpy(saved), _MeansOverRanks(ctx.group, values)
        found = formulas.gradients(dy, x, residual, gamma, beta, rows, True, eps, activation, wanted, means)
        return in_dtypes(found, gamma, beta)


def _gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    saved: Any,
    values: int,
    activation: Activation,
    wanted: tuple[bool, ...],
    exchange: Exchange | None = None,
) -> formulas.Gradients:
    """The gradients by the kernels: those of x with the sums of all ranks, those of gamma and beta of this share."""
    _check_gradient(dy, x, residual)
    dy = arranged(dy, x)
    own = sums_of(dy, x, residual, saved, values, activation)
    total = own if exchange is None else exchange.total(own, {"the count of the statistics": values})
    if exchange is not None:
        check_parts.all_of(total, values)
    dx, dresidual = differentiate_share(total, dy, x, residual, saved, values, activation, wanted)
    dgamma = torch.from_numpy(own.sum_dy_xhat) if wanted[2] else None
    return dx, dresidual, dgamma, torch.from_numpy(own.sum_dy) if wanted[3] else None


def _check_gradient(dy: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """Raises unless the tensors can be read, which hooks of saved tensors and observers of the call may prevent."""
    if watched(dy):
        raise NotImplementedError(
            "SyncBatchNorm: got a backward pass that torch.func, a dispatch mode or forward-mode AD observes; allowed "
            "over several processes: backward passes in eager code"
        )
    check_saved(dy, x, residual)
    for name, tensor in (("gradient", dy), ("input", x), ("residual", residual)):
        if tensor is not None and not (is_readable(tensor) and tensor.dtype is x.dtype):
            raise TypeError(
                f"{name}: got {tensor.dtype} on {tensor.device}, a {type(tensor).__name__}; allowed: a plain tensor of "
                "the input's dtype in memory"
            )


class _MeansOverRanks:
    """Means over all positions of all ranks, for `formulas.gradients`: of each tensor of x's shape that it is given."""

    def __init__(self, group: Any, values: int) -> None:
        self.group, self.values, self.step = group, values, 0

    def __call__(self, *terms: Tensor) -> list[Tensor]:
        self.step += 1
        first = terms[0]
        others = (0, *range(2, first.ndim))
        rows = torch.stack([term.sum(others) for term in terms])
        means = _AllSum.apply(rows, self.group, self.step) / self.values
        return [row.view(1, -1, *[1] * (first.ndim - 2)) for row in means]


# The layer -----------------------------------------------------------------------------------------------------------


class SyncBatchNorm(_Layer, torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm on fastbn's kernels, for CPU tensors of shape (N, C, ...).

    In training, the batch statistics are those of all processes of the group, whose shares of the batch may have any
    sizes; some may be empty. One message of each process is gathered forward, and one backward. y, dx and the running
    statistics are those of one process with the whole batch, to the accuracy of fastbn.forward, with the same bits on
    every rank and on every run. The gradients of weight and bias are those of this process's share, which
    DistributedDataParallel reduces over the processes, as those of torch's layer.

    After `eval()`, without an initialized process group, with a single process, and in a process that is not in the
    group, it is batch normalization like fastbn.torch.BatchNorm2d's, and communicates nothing. Tensors on a GPU go to
    torch's layer.

    All processes of the group must make the same calls, in the same mode and order, and backward passes likewise: the
    others would wait for one that does not, until the group's timeout. An error on one of them, such as that of a bad
    argument, raises on all. Derivatives of any order are supported. torch.compile leaves a call in training over
    several processes to eager code; torch.func, forward-mode AD and tracers are refused there.

    It is not a subclass of torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on a CPU.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype
        As torch's. The default process group is that of all processes.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Applied to the result in the same pass over memory.

    A call takes the input and, optionally, a `residual` of the input's shape and dtype, which is added before the
    activation.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        For an input, residual, eps or momentum that does not fit, on all ranks; those of another rank say its number.
        ValueError also if ranks differ in the number of channels, eps or momentum, or in whether the input has a
        gradient, and if all shares together have fewer than 2 values per channel. Nothing has been changed then.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    >>> type(fastbn.torch.convert_sync_batchnorm(model)[1])
    <class 'fastbn.torch.SyncBatchNorm'>
    """

    __module__ = "fastbn.torch"  # where users, and pickles, find it

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Activation = None,
        **others: Any,
    ) -> None:
        others |= {"device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, activation=activation, **others)
        self.process_group = _checked(process_group)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        self._check_non_zero_input_channels(input)

    def _check_non_zero_input_channels(self, input: Tensor) -> None:  # torch's forward calls it
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    # The other layers' third argument is for `fuse`, which leaves layers with a forward of their own alone.
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        group = self._group()
        if group is None or isinstance(input, Proxy):
            return super().forward(input, residual)
        if isinstance(input, Tensor) and input.device.type not in ("cpu", "meta"):
            if residual is not None:
                _check_residual(residual, input)
            y = torch.nn.SyncBatchNorm.forward(self, input)
            return activated(y if residual is None else y + residual, self.activation)
        return (_in_eager_code if _is_compiling() else _synchronized)(self, input, residual, group)

    def _group(self) -> Any:
        """The process group, or None if there is nothing to synchronize."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None


def _synchronized(layer: SyncBatchNorm, x: Tensor, residual: Tensor | None, group: Any) -> Tensor:
    """A call in training, over several processes."""
    with _exchange(group, layer.num_features, "forward") as exchange:
        gamma, beta, mean, var, number = layer._tensors(False)
        checks.activation(layer.activation)
        _check_call(layer, x, residual)
        eps = _checked_eps(layer.eps)
        if not layer.track_running_stats:
            mean = var = number = None
        momentum = _momentum(layer.momentum, number, False)
        if momentum is None or not math.isfinite(momentum):
            raise ValueError(f"momentum: got {layer.momentum!r}; allowed: a finite number, or None")
        _check_channels(layer.num_features, weight=gamma, bias=beta, running_mean=mean, running_var=var)
        _check_writable(running_mean=mean, running_var=var, num_batches_tracked=number)
        recorded = torch.is_grad_enabled() and x.requires_grad
        agreed = {"eps": eps, "momentum": momentum, "whether the input requires a gradient": recorded}
        moments = exchange.total(moments_of(x), agreed)
    check_parts.enough_together("input", moments.count)
    if number is not None:  # before the call, which checkpointing may leave once it has the tensors that it needs
        count(number)
    if mean is not None:
        rows = np.zeros((len(SAVED_ROWS), layer.num_features))
        save(moments._rows, moments.count, rows)
        formulas.blend(mean, var, torch.from_numpy(rows), moments.count, momentum)
    tensors = x, residual, gamma, beta
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        y: Tensor = _Normalization.apply(*tensors, (moments, group, eps, layer.activation))
        return y
    return normalize_share(moments, *tensors, eps, layer.activation)[0]


_in_eager_code = torch._disable_dynamo(_synchronized)
"""What torch.compile calls, but does not trace. torch.compiler.disable would import torch._dynamo here."""


def _check_call(layer: SyncBatchNorm, x: Tensor, residual: Tensor | None) -> None:
    """Raises unless the kernels can take the input and the residual, and nothing else observes the call."""
    for name, tensor in (("input", x), ("residual", residual)):
        if tensor is None and name == "residual":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {checks.kind(tensor)}; allowed: a tensor")
        if tensor.dtype not in STATISTICS:
            allowed = ", ".join(map(str, STATISTICS))
            raise TypeError(f"{name}: got {tensor.dtype}; allowed: {allowed}")
    if watched(x):
        raise NotImplementedError(
            "SyncBatchNorm: got a call that torch.func, a dispatch mode, a tracer or forward-mode AD observes; allowed "
            "over several processes: calls in eager code and in torch.compile, or layers in evaluation mode"
        )
    for name, tensor in (("input", x), ("residual", residual)):
        if tensor is not None and not is_readable(tensor):
            raise TypeError(
                f"{name}: got a {type(tensor).__name__} on {tensor.device}, {tensor.layout}; allowed over several "
                "processes: a plain, strided tensor on the CPU"
            )
    layer._check_input_dim(x)
    if x.shape[1] != layer.num_features:
        raise ValueError(f"input: got {x.shape[1]} channels; allowed: the layer's {layer.num_features}")
    if residual is not None:
        _check_residual(residual, x)


def _checked_eps(eps: Any) -> float:
    number = _number(eps)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"eps: got {eps!r}; allowed over several processes: a finite number above 0")
    return number


def _check_channels(channels: int, **tensors: Tensor | None) -> None:
    """Raises unless weight, bias and running statistics fit the kernels: one value per channel each."""
    if (tensors["running_mean"] is None) is not (tensors["running_var"] is None):
        raise ValueError("running_mean: got one running statistic; allowed: both or neither")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not is_readable(tensor) or tensor.dtype not in STATISTICS or tensor.shape != (channels,):
            raise ValueError(
                f"{name}: got {tensor.dtype}{list(tensor.shape)} on {tensor.device}; allowed: a plain tensor of shape "
                f"({channels},) on the CPU, of {', '.join(map(str, STATISTICS))}"
            )
        if name.startswith("running") and tensor.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient; allowed: one that does not")


def _check_writable(**tensors: Tensor | None) -> None:
    """Raises unless torch lets these be modified. Its own error would come on one rank, after the others' update."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}: got an inference tensor; allowed outside inference mode: a normal tensor")
        if tensor.numel() > 1 and 0 in tensor.stride():
            raise ValueError(f"{name}: got an expanded tensor; allowed: one with memory for each of its values")


# Conversion ----------------------------------------------------------------------------------------------------------

_LAYERS[torch.nn.SyncBatchNorm] = SyncBatchNorm
_TORCHS[SyncBatchNorm] = torch.nn.SyncBatchNorm

_ProcessGroup: Any = dist.ProcessGroup if dist.is_available() else object

_parameters = dict(inspect.signature(torch.nn.SyncBatchNorm).parameters)  # of this version of torch
_parameters["process_group"] = _parameters["process_group"].replace(annotation=_ProcessGroup | None)
_parameters["activation"] = inspect.signature(SyncBatchNorm).parameters["activation"]
setattr(SyncBatchNorm, "__signature__", inspect.Signature(list(_parameters.values())))  # noqa: B010


def _checked(group: Any) -> Any:
    """Checks a process group, in a process that may not be in it."""
    if group is None or (dist.is_available() and (group is dist.GroupMember.NON_GROUP_MEMBER)):
        return group
    if not dist.is_available() or not isinstance(group, _ProcessGroup):
        raise TypeError(f"process_group: got {checks.kind(group)}; allowed: a torch.distributed.ProcessGroup, or None")
    return group


def convert_sync_batchnorm(model: torch.nn.Module, process_group: _ProcessGroup | None = None) -> torch.nn.Module:
    """Converts the batch norms in the model to fastbn.torch.SyncBatchNorm, in place, and returns the model.

    These are torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm, and fastbn's. The layers stay the same objects, with their
    parameters, buffers, hooks, mode and, of fastbn's, activation. `revert_batchnorm` is the inverse.

    Parameters
    ----------
    model : torch.nn.Module
    process_group : torch.distributed.ProcessGroup or None
        None keeps the group of layers that have one; for the others it is the group of all processes.

    Raises TypeError if `model` is not a torch.nn.Module or process_group is no process group. Warns of other subclasses
    of torch's batch norms, and of layers whose instances have a `forward` of their own or, of torch's, an attribute
    `activation`. They are left as they are, and normalize this process's share alone.

    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    >>> isinstance(fastbn.torch.convert_sync_batchnorm(model)[1], fastbn.torch.SyncBatchNorm)
    True
    """
    named = list(checks.instance("model", model, torch.nn.Module, "a torch.nn.Module").named_modules())
    group, left = _checked(process_group), []
    for name, module in named:
        kind = type(module)
        own = {"forward", *(() if kind in _TORCHS else ("activation",))}  # which would have another meaning
        if (kind in _TORCHS or kind in _LAYERS) and own.isdisjoint(vars(module)):
            if kind not in (SyncBatchNorm, torch.nn.SyncBatchNorm):
                vars(module)["_reverts_to"] = _TORCHS.get(kind, kind)
            module.__class__ = SyncBatchNorm
            if group is not None or "process_group" not in vars(module):
                module.process_group = group
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            left.append(f"{name!r} ({kind.__qualname__})")
    if left:
        warnings.warn(f"convert_sync_batchnorm leaves layers unsynchronized: {', '.join(left)}", stacklevel=2)
    return model
