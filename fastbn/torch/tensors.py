"""How do fastbn's functions run on the memory of tensors? Autograd is not involved here.

A plain call goes to the C backend by the tensors' addresses. Other calls go to fastbn's functions, with NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from torch import Tensor
from torch.nn import Parameter

from .._backends import get_num_threads, select
from .._moments import Moments, Sums
from ..call.record import options_of
from ..call.results import Cache, Parts
from ..config import environment
from ..config.thread_count import use_num_threads
from ..ops import Activation, backward, backward_sums, forward, infer, moments
from .formulas import Gradients, blend
from .watchers import WATCHERS

bridge: Any
try:
    from .._backends.c import bridge
except ImportError:  # a build without the extension
    bridge = None

_increment_version = torch.autograd.graph.increment_version

Array = np.ndarray[Any, Any]

Place = tuple[tuple[int, ...], tuple[int, ...] | None, int] | Any
"""The addresses of tensors, the shape of the data in memory (None if the express lane cannot take it), and its axis.

Of plain tensors it is a Place of the bridge.
"""

_PLAIN = frozenset((Tensor, Parameter))
"""The classes of tensors that may be nothing but their memory; subclasses may be more."""

STATISTICS = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""The dtypes that data may have, and their statistics dtypes."""

_NUMBERS = {
    torch.float16: np.dtype(np.float16).num,
    torch.bfloat16: np.dtype(bfloat16).num,
    torch.float32: np.dtype(np.float32).num,
    torch.float64: np.dtype(np.float64).num,
}
"""NumPy's numbers of the dtypes that data may have."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last memory format for each number of axes."""

AXES = {
    torch.nn.BatchNorm1d._check_input_dim: (2, 3),
    torch.nn.BatchNorm2d._check_input_dim: (4,),
    torch.nn.BatchNorm3d._check_input_dim: (5,),
}
"""The numbers of axes that torch's checks allow. A call of a check would take longer."""

_LOW = 1 << 32
"""Memory is hardly ever at a lower address. A tensor whose storage was freed is: its address is its offset."""

_SMALL = 1 << 14
"""The number of values up to which a call's own cost is larger than that of its work on the values."""

_HUGE = 1 << 22
"""The size in bytes from which NumPy asks the system for huge pages, which halve the cost of new memory."""


def cast(tensor: Tensor | None, dtype: Any) -> Tensor | None:
    """The tensor in another dtype."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def _empty_like(x: Tensor) -> Tensor:
    """A new tensor like x, in x's memory format. Large ones use NumPy's memory, which has huge pages."""
    size = x.numel() * x.element_size()  # compiled autograd knows no x.nbytes where sizes vary
    if size < _HUGE:
        return torch.empty_like(x)
    strides = torch.empty_like(x, device="meta").stride()
    memory = torch.from_numpy(np.empty(size, np.uint8)).untyped_storage()
    return torch.empty(0, dtype=x.dtype, device="cpu").set_(memory, 0, x.shape, strides)


def _threads() -> int:
    """The smaller of torch's and fastbn's numbers of threads."""
    return min(torch.get_num_threads(), get_num_threads())


# By addresses --------------------------------------------------------------------------------------------------------


def _address(tensor: Tensor) -> int:
    """The address of a tensor's first element; 0 unless it is of a plain class, in the CPU's memory and not negated.

    A tensor within vmap looks like any other, but has no memory. Neither has a tensor of zeros that are not stored.
    """
    if type(tensor) in _PLAIN and tensor.is_cpu and not tensor.is_neg():
        try:
            address = int(tensor.data_ptr())
            return address if address >= _LOW or not is_freed(tensor) else 0
        except RuntimeError:
            pass
    return 0


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage of a tensor with values was freed. Its address is then only its offset into the storage."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def check_saved(dy: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """Raises unless torch's operators can read x and residual, which hooks of saved tensors may have changed."""
    for name, tensor in (("input", x), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.shape != dy.shape:
            raise RuntimeError(
                f"{name}: got saved shape {tuple(tensor.shape)}; allowed: the output's, {tuple(dy.shape)}"
            )
        if type(tensor) in _PLAIN and tensor.is_cpu and not is_batched(tensor) and is_freed(tensor):
            raise RuntimeError(
                f"{name}: got a tensor whose storage was freed since the forward pass; allowed: its values"
            )


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its strided values in the CPU's memory, of which there may be none."""
    if tensor.numel():
        return bool(_address(tensor))
    plain = type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided
    return plain and not is_batched(tensor)


def is_batched(tensor: Tensor) -> bool:
    """Whether asking for a tensor's address fails, as it does within vmap."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a tensor is of a plain class but has no memory, as within vmap."""
    return type(tensor) in _PLAIN and not _address(tensor)


def _dense(x: Tensor, *others: Tensor | None) -> tuple[tuple[int, ...] | None, int]:
    """The shape of x in memory order, and its channel axis. The shape is None unless all are dense in one order."""
    if x.is_contiguous():
        for other in others:
            if other is not None and not other.is_contiguous():
                return None, 1
        return x.shape, 1
    if x.ndim == 2 or not all(t is None or t.movedim(1, -1).is_contiguous() for t in (x, *others)):
        return None, 1
    first, channels, *rest = x.shape
    return (first, *rest, channels), -1


def _copied(x: Tensor, *others: Tensor | None) -> tuple[Any, ...] | None:
    """Copies of small tensors in the memory order that results have; None if they are in it, or it is unusual.

    A call by way of arrays would take longer.
    """
    if x.numel() > _SMALL or _dense(x, *others)[0] is not None:
        return None
    like = torch.empty_like(x)
    if like.is_contiguous():
        return tuple(None if t is None else t.contiguous() for t in (x, *others))
    if _dense(like)[0] is None:
        return None
    return tuple(None if t is None else torch.empty_like(like).copy_(t) for t in (x, *others))


def place(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    channels: int,
    batch: bool,
) -> Place | None:
    """The place of these tensors for `normalize`, or None if it cannot take one of them."""
    if bridged is not None and select(None) is bridge:
        found = bridged.place(x, residual, gamma, beta, mean, var, channels, batch)
        if found is not None:
            return found
    statistics = STATISTICS.get(x.dtype)
    if statistics is None or not (first := _address(x)) or x.dim() < 2:
        return None
    if x.shape[1] != channels or (batch and x.numel() <= channels):
        return None
    addresses, expected, plain = [first, 0], (channels,), True
    if residual is not None:
        addresses[1] = _address(residual)
        if not addresses[1] or residual.dtype is not x.dtype or residual.shape != x.shape:
            return None
    try:
        for tensor in (gamma, beta, mean, var):
            if tensor is None:
                addresses.append(0)
                continue
            # The checks of `_address`, without the cost of its call.
            if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.is_neg() or tensor.shape != expected:
                return None
            address = tensor.data_ptr()
            if address < _LOW and (not address or is_freed(tensor)):
                return None
            addresses.append(address)
            if tensor.dtype is not statistics or not tensor.is_contiguous():
                plain = False
                if tensor.dtype not in STATISTICS:
                    return None
    except RuntimeError:  # within vmap a tensor has no memory
        return None
    return tuple(addresses), *(_dense(x, residual) if plain else (None, 1))


def arranged(dy: Tensor, x: Tensor) -> Tensor:
    """Returns dy in the memory order of x: a copy if dy is small, which costs less than a gradient by way of arrays.

    The gradient of a sum, which is one value for all, is such a dy.
    """
    if type(dy) is Tensor and dy.shape == x.shape and dy.stride() != x.stride() and dy.numel() <= _SMALL:
        for order in (torch.contiguous_format, _CHANNELS_LAST.get(x.ndim)):
            if order is not None and x.is_contiguous(memory_format=order):
                return dy.contiguous(memory_format=order)
    return dy


def place_of_gradient(dy: Tensor, x: Tensor, residual: Tensor | None) -> Place | None:
    """The place of these tensors for `differentiate`; None if hooks of saved tensors have made them unfit for it."""
    addresses = _address(dy), _address(x), 0 if residual is None else _address(residual)
    if not addresses[0] or not addresses[1] or x.dtype is not dy.dtype or x.shape != dy.shape:
        return None
    if residual is not None and (not addresses[2] or residual.dtype is not dy.dtype or residual.shape != dy.shape):
        return None
    return addresses, *_dense(x, dy, residual)


def count(number: Tensor) -> None:
    """Adds one to num_batches_tracked. torch takes longer for that than all the rest of a small call."""
    address = _address(number) if number.dtype is torch.int64 and number.numel() == 1 else 0
    if address and bridge is not None and not number.is_inference():
        bridge.add_one_at(address)
        _increment_version(number)
    else:
        number.add_(1)


bridged: Any = None
"""The bridge's functions for plain tensors, if this version of torch has DLPack's exchange API."""
if bridge is not None and hasattr(Tensor, "__dlpack_c_exchange_api__"):
    bridged = bridge.Tensors(
        Tensor,
        Parameter,
        select=select,
        backend=bridge,
        environment=vars(environment),
        empty_like=torch.empty_like,
        large_like=_empty_like,
        threads=_threads,
        count=count,
        axes=AXES,
        watchers=WATCHERS,
        forward_ad=vars(torch.autograd.forward_ad),
        has_modes=torch.overrides.has_torch_function_unary,
        is_grad_enabled=torch.is_grad_enabled,
    )


# By arrays -----------------------------------------------------------------------------------------------------------


def _array(tensor: Tensor | None) -> Any:
    """The tensor as a NumPy array on the same memory, with any strides."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:  # NumPy itself has no such dtype
        return tensor.detach().view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy(force=True)


def _channels_together(x: Tensor, *tensors: Tensor | None) -> tuple[int, list[Any]]:
    """The channel axis, and arrays of these tensors of x's shape, with that axis last if x has it last in memory."""
    arrays = [_array(tensor) for tensor in tensors]
    if x.ndim == 2 or x.stride(1) != 1:
        return 1, arrays
    return -1, [None if array is None else np.moveaxis(array, 1, -1) for array in arrays]


def _tensor(array: Array, axis: int, x: Tensor) -> Tensor:
    """A tensor of x's shape and dtype on the memory of an array, whose channels are on `axis`."""
    tensor = torch.from_numpy(array.view(np.int16) if x.dtype is torch.bfloat16 else array).view(x.dtype)
    return tensor if axis == 1 else tensor.movedim(-1, 1)


# Forward and backward ------------------------------------------------------------------------------------------------


def normalize(
    where: Place,
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
    """Returns y and, if `keeps`, the rows `saved` that `differentiate` needs.

    In training, mean and var are updated. mean, var, gamma and beta may have any dtype. `where` is the tensors' place.
    """
    if type(where) is tuple and (copies := _copied(x, residual)):
        x, residual = copies
        where = place(x, residual, gamma, beta, mean, var, x.shape[1], training) or where
    by_addresses = type(where) is tuple
    if not by_addresses:
        found: tuple[Tensor, Any] | None = bridged.normalize(where, x, momentum, eps, activation, training, keeps)
        if found is not None:
            return found
    y = _empty_like(x)
    addresses, shape, axis = where if by_addresses else ((), None, 1)
    if shape is not None and 0 <= momentum <= 1:
        express = getattr(select(None), "forward_at", None)
        if express is not None:
            number = _NUMBERS[x.dtype]
            # fmt: off
            saved = express(number, shape, axis, addresses, y.data_ptr(), momentum, eps, activation, training, keeps,
                            _threads)
            # fmt: on
            if saved is not None:
                return y, saved
    statistics = STATISTICS[x.dtype]
    axis, (x_, residual_, y_) = _channels_together(x, x, residual, y)
    gamma_, beta_ = _array(gamma), _array(beta)
    options: dict[str, Any] = {"eps": eps, "axis": axis, "activation": activation, "residual": residual_, "out": y_}
    with use_num_threads(_threads()):
        if not training:
            mean_, var_ = _array(cast(mean, statistics)), _array(cast(var, statistics))
            if not keeps:
                infer(x_, gamma_, beta_, mean_, var_, **options)
                return y, None
            return y, forward(x_, gamma_, beta_, mean_, var_, training=False, **options).cache._parts.saved
        saved = forward(x_, gamma_, beta_, **options).cache._parts.saved
    if mean is not None and var is not None:
        blend(mean, var, torch.from_numpy(saved), x.numel() // x.shape[1], momentum)
    return y, saved


def _per_channel(x: Tensor) -> Tensor:
    """A new tensor of one value per channel, in the statistics dtype."""
    return torch.empty(x.shape[1], dtype=STATISTICS[x.dtype], device="cpu")


def differentiate(
    where: Place,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    saved: Array,
    training: bool,
    activation: Activation,
    wanted: Sequence[bool],
) -> Gradients:
    """Returns the gradients of x, residual, gamma and beta, the last two in the statistics dtype.

    `where` is the place of dy, x and residual.
    """
    for_x, for_residual, for_gamma, for_beta, *_ = wanted
    given_dy = dy
    if copies := _copied(x, dy, residual):
        x, dy, residual = copies
        where = place_of_gradient(dy, x, residual) or where
    activates = for_residual and activation is not None
    # If dx is small, computing it although it is not wanted costs less than a call of `backward_sums`.
    dx = _empty_like(x) if for_x or activates or x.numel() <= _SMALL else None
    addresses, shape, axis = where
    if dx is not None and shape is not None:
        express = getattr(select(None), "backward_at", None)
        if express is not None:
            dresidual = None if residual is None or activation is None else _empty_like(x)
            dgamma = _per_channel(x) if for_gamma else None
            dbeta = _per_channel(x) if for_beta else None
            # fmt: off
            done = express(_NUMBERS[x.dtype], shape, axis, addresses, dx.data_ptr(), saved, not training, activation,
                           dgamma.data_ptr() if dgamma is not None else 0, dbeta.data_ptr() if dbeta is not None else 0,
                           dresidual.data_ptr() if dresidual is not None else 0, _threads)
            # fmt: on
            if done is not None:
                if not activates:
                    dresidual = given_dy if for_residual else None
                return dx if for_x else None, dresidual, dgamma, dbeta
    axis, (dy_, x_, residual_, dx_) = _channels_together(x, dy, x, residual, dx)
    options = options_of(activation)
    cache = Cache(Parts(x_, residual_, saved, axis, not training, options, for_gamma, for_beta))
    found: Any
    with use_num_threads(_threads()):
        if dx is None:
            sums = backward_sums(dy_, cache)
            found = sums.sum_dy_xhat, sums.sum_dy, None
        else:
            gradients = backward(dy_, cache, out=dx_)
            found = gradients.dgamma, gradients.dbeta, gradients.dresidual
    of_gamma, of_beta, of_residual = found
    return (
        dx if for_x else None,
        _tensor(of_residual, axis, x) if activates and of_residual is not None else given_dy if for_residual else None,
        torch.from_numpy(of_gamma) if for_gamma else None,
        torch.from_numpy(of_beta) if for_beta else None,
    )


# Shares of a batch, by arrays ----------------------------------------------------------------------------------------


def moments_of_share(x: Tensor) -> Moments:
    """The moments of x, which may be empty."""
    axis, (x_,) = _channels_together(x, x)
    with use_num_threads(_threads()):
        return moments(x_, axis=axis)


def normalize_share(
    total: Moments,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Any]:
    """Normalizes x with the moments of the whole batch; returns y and the rows that `differentiate_share` needs."""
    y = _empty_like(x)
    axis, (x_, residual_, y_) = _channels_together(x, x, residual, y)
    options: dict[str, Any] = {"eps": eps, "axis": axis, "activation": activation, "residual": residual_, "out": y_}
    with use_num_threads(_threads()):
        return y, forward(x_, _array(gamma), _array(beta), moments=total, **options).cache._parts.saved


def sums_of_share(
    dy: Tensor, x: Tensor, residual: Tensor | None, saved: Array, count: int, activation: Activation
) -> Sums:
    """The part of a share in the sums that the gradients need; `count` is that of the whole batch."""
    axis, (dy_, x_, residual_) = _channels_together(x, dy, x, residual)
    options = options_of(activation)
    cache = Cache(Parts(x_, residual_, saved, axis, False, options, False, False, counted=count))
    with use_num_threads(_threads()):
        return backward_sums(dy_, cache)


def differentiate_share(
    total: Sums,
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    saved: Array,
    count: int,
    activation: Activation,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and residual, with the sums of the whole batch."""
    for_x, for_residual, *_ = wanted
    activates = for_residual and activation is not None
    if not for_x and not activates:
        return None, dy if for_residual else None
    dx = _empty_like(x)
    axis, (dy_, x_, residual_, dx_) = _channels_together(x, dy, x, residual, dx)
    options = options_of(activation)
    cache = Cache(Parts(x_, residual_, saved, axis, False, options, False, False, counted=count))
    with use_num_threads(_threads()):
        of_residual = backward(dy_, cache, out=dx_, sums=total).dresidual
    dresidual = _tensor(of_residual, axis, x) if activates and of_residual is not None else dy if for_residual else None
    return dx if for_x else None, dresidual
