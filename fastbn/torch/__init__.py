"""PyTorch's BatchNorm1d, 2d and 3d on fastbn's kernels: drop-in replacements, and the way to them and back.

A layer is computed by the kernels, or left to torch's own layer, always one of the two and never half: what a call
sees depends on who else looks at it.

| who calls, or looks on                            | what computes, and what is seen                                 |
|---------------------------------------------------|-----------------------------------------------------------------|
| eager code, with gradients and without; AMP;      | the kernels; autograd sees one node                             |
| checkpointing; DDP; hooks of modules, of nodes    |                                                                 |
| and of saved tensors                              |                                                                 |
| a backward pass with create_graph=True or         | the kernels computed y; torch's differentiable operators, in    |
| is_grads_batched=True, jacobian(vectorize=True),  | float64, compute the gradient                                   |
| forward over reverse, or that a mode records      |                                                                 |
| torch.compile                                     | the operator fastbn::batch_norm: the kernels (torch 2.7 tells   |
|                                                   | compiled code that it is exported: torch's layer)               |
| modes of torch functions (set_default_device)     | the operator fastbn::batch_norm: the kernels                    |
| torch.func (grad, vmap, jvp, ...), compiled too   | torch's layer                                                   |
| forward-mode AD (torch.autograd.forward_ad)       | torch's layer                                                   |
| make_fx, FakeTensorMode, FlopCounterMode, other   | torch's layer; with make_fx(pre_dispatch=True) it may be the    |
| dispatch modes, selective checkpointing           | operator                                                        |
| torch.export, torch.onnx.export, torch.jit.trace  | torch's layer: what is exported runs without fastbn             |
| torch.fx.symbolic_trace                           | the layer itself, a leaf (call_module), as torch's is           |
| other devices, dtypes, layouts, subclasses of     | torch's layer, which refuses some of them                       |
| Tensor, empty batches, one value per channel in   |                                                                 |
| training, an eps below 0 or, in training, of 0    |                                                                 |
| torch.jit.script                                  | a TypeError: call revert_batchnorm(model) first                 |
| tools that look layers up by class, such as       | they leave the layers alone or fail: call                       |
| ao.quantization and fx.experimental.optimization  | revert_batchnorm(model) first                                   |

Where torch's layer computes, its accuracy counts; in float32 that is none where the mean is 1e6 times the deviation.
Names that torch does not publish, and the versions that they were tried on, are listed in watchers.py.
"""

from __future__ import annotations

try:
    import ml_dtypes  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('fastbn.torch needs torch and ml_dtypes: pip install "fastbn[torch]"') from error

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm, revert_batchnorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert_batchnorm", "revert_batchnorm"]


def __dir__() -> list[str]:
    return sorted(__all__)
