"""Who else looks at a call? What kernels cannot work on, or may not work on unseen, is for torch's own operators.

Names that torch does not publish, here, in autograd.py and in layers.py, since no public one tells the same:

- torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack (below);
- torch.autograd.forward_ad._current_level (below): it is quick, and torch.compile cannot trace unpack_dual;
- the _backward_cls of a torch.autograd.Function, whose method apply autograd calls (autograd.py);
- torch.nn.modules.batchnorm._BatchNorm._check_input_dim, by which torch's layers refuse an input.

They were tried with torch 2.7.1, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch.jit.is_tracing
_unpack_dual = forward_ad.unpack_dual


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work."""
    return bool(_are_transforms_active())


def watched(x: Tensor) -> bool:
    """Whether somebody records or transforms the operators that run.

    A dispatch mode, a transform of torch.func, torch.jit.trace or forward-mode AD, in which x is unpacked to a view.
    """
    return (
        _modes() != 0
        or _are_transforms_active()
        or _is_tracing()
        or (forward_ad._current_level >= 0 and _unpack_dual(x).primal is not x)
    )


def transformed_in_compilation() -> bool:
    """What `watched` tells, as far as torch.compile can trace it."""
    return transformed() or forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD follows one of the tensors."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
