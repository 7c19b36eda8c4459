"""Who else looks at a call? What kernels cannot work on, or may not work on unseen, is for torch's own operators.

Names that torch does not publish, here and in layers.py, since no public one tells the same:

- torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack (below);
- torch.nn.modules.batchnorm._BatchNorm._check_input_dim, by which torch's layers refuse an input.

They were tried with torch 2.7.1, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def watched(x: Tensor) -> bool:
    """Whether somebody records or transforms the operators that run.

    A dispatch mode, a transform of torch.func, torch.jit.trace or forward-mode AD, in which x is unpacked to a view.
    """
    return (
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or unpack_dual(x).primal is not x
    )
