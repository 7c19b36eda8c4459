"""Who else observes a call? The kernels cannot serve calls that are traced or transformed; torch's operators can.

Names that torch does not publish are used here, in autograd.py, layers.py and tensors.py, since no public name tells
the same:

- torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack, torch._C._is_tracing (below);
- torch.autograd.forward_ad._current_level (below, and in tensors.pxi of the C backend), which is quick, while
  torch.compile cannot trace unpack_dual;
- torch._disable_dynamo, which is torch.compiler.disable without the import of torch._dynamo (sync.py);
- the _backward_cls of a torch.autograd.Function, whose method `apply` is called by autograd (autograd.py), and the
  `to_save` of its context, which save_for_backward sets (tensors.pxi);
- torch.overrides.has_torch_function_unary, which is has_torch_function of one tensor, but quicker (tensors.py);
- torch.nn.modules.batchnorm._BatchNorm._check_input_dim, with which torch's layers refuse an input (layers.py,
  tensors.py);
- the dictionaries of hooks, of a module and of torch.nn.modules.module (others.py), and those of its parameters,
  buffers and modules (pending.py, proof.py, follow.py);
- torch.nn.Module._call_impl, _wrapped_call_impl, _compiled_call_impl, by which calls are known (pending.py, proof.py);
- torch.nn.modules.conv._ConvNd, the class of all convolutions (follow.py);
- torch._C._is_alias_of, whether tensors share memory, which is quicker than to ask for it (pending.py, proof.py);
- torch._C._log_api_usage_once, which torchvision calls (follow.py).

They were tried with torch 2.7.1, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing  # torch.jit.is_tracing takes twice as long
_unpack_dual = forward_ad.unpack_dual

WATCHERS = _modes, _are_transforms_active, _is_tracing
"""One of these is true where the operators of this thread are recorded or transformed, except by forward-mode AD."""


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is active."""
    return bool(_are_transforms_active())


def observed() -> bool:
    """Whether a dispatch mode, torch.func or torch.jit.trace records or transforms the operators of this thread."""
    return _modes() != 0 or _are_transforms_active() or _is_tracing()


def watched(x: Tensor) -> bool:
    """Whether the operators that run are recorded or transformed.

    A dispatch mode, torch.func and torch.jit.trace do so, and forward-mode AD, in which x is unpacked to a view.
    """
    return (
        _modes() != 0  # as in `observed`, whose call would cost time here
        or _are_transforms_active()
        or _is_tracing()
        or (forward_ad._current_level >= 0 and _unpack_dual(x).primal is not x)
    )


def transformed_in_compilation() -> bool:
    """The part of `watched` that torch.compile can trace."""
    return transformed() or forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent of forward-mode AD."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
