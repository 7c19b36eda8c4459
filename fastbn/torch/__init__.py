"""PyTorch's batch norms on fastbn's kernels: drop-in replacements, and functions that convert a model.

A call of a layer runs either on the kernels or on torch's own layer, never partly on both. Which one it is depends on
how the layer is called, and on what else observes the call:

+---------------------------------------------------+-----------------------------------------------------------------+
| the call, or what observes it                     | what computes, and what is observed                             |
+===================================================+=================================================================+
| eager code, with or without gradients; AMP;       | the kernels; autograd sees one node                             |
| checkpointing; DDP; hooks of modules, of nodes    |                                                                 |
| and of saved tensors                              |                                                                 |
+---------------------------------------------------+-----------------------------------------------------------------+
| a backward pass with create_graph=True or         | the kernels have computed y; torch's differentiable operators,  |
| is_grads_batched=True, jacobian(vectorize=True),  | in float64, compute the gradient                                |
| forward over reverse, or recorded by a mode       |                                                                 |
+---------------------------------------------------+-----------------------------------------------------------------+
| torch.compile                                     | the operator fastbn::batch_norm: the kernels (in torch 2.7,     |
|                                                   | whose compiled code looks exported: torch's layer)              |
+---------------------------------------------------+-----------------------------------------------------------------+
| modes of torch functions (set_default_device)     | the operator fastbn::batch_norm: the kernels                    |
+---------------------------------------------------+-----------------------------------------------------------------+
| torch.func (grad, vmap, jvp, ...), compiled too   | torch's layer                                                   |
+---------------------------------------------------+-----------------------------------------------------------------+
| forward-mode AD (torch.autograd.forward_ad)       | torch's layer                                                   |
+---------------------------------------------------+-----------------------------------------------------------------+
| make_fx, FakeTensorMode, FlopCounterMode, other   | torch's layer; with make_fx(pre_dispatch=True) it may be the    |
| dispatch modes, selective checkpointing           | operator                                                        |
+---------------------------------------------------+-----------------------------------------------------------------+
| torch.export, torch.onnx.export, torch.jit.trace  | torch's layer: the exported model runs without fastbn           |
+---------------------------------------------------+-----------------------------------------------------------------+
| torch.fx.symbolic_trace                           | the layer itself is a leaf (call_module), as torch's layer is   |
+---------------------------------------------------+-----------------------------------------------------------------+
| other devices, dtypes, layouts, subclasses of     | torch's layer, which refuses some of them                       |
| Tensor, empty batches, one value per channel in   |                                                                 |
| training, an eps below 0 or, in training, of 0    |                                                                 |
+---------------------------------------------------+-----------------------------------------------------------------+
| torch.jit.script                                  | a TypeError: call revert_batchnorm(model) first                 |
+---------------------------------------------------+-----------------------------------------------------------------+
| tools that look layers up by class, such as       | these tools ignore the layers, or fail: call                    |
| ao.quantization and fx.experimental.optimization  | revert_batchnorm(model) first                                   |
+---------------------------------------------------+-----------------------------------------------------------------+

SyncBatchNorm in training over several processes has no torch's layer for a CPU to go to: there, gradients that are
recorded are right by torch's operators, torch.compile leaves the call to eager code, and calls that torch.func, other
modes, tracers and forward-mode AD observe are refused, on all ranks. Otherwise the table holds for it, too.

Norms of timm and torchvision that were converted are subject to the same table. What `convert_batchnorm(fuse=True)` has
fused is computed with the norm in the cases of the first two rows; in all others it runs after the norm, as the model
wrote it.

Results of 4 MiB or more, and some smaller gradients, are in memory from NumPy, which has huge pages. Their storage
cannot be resized: code that frees activations by untyped_storage().resize_(0) gets an error.

The results of torch's layer are as accurate as torch's: in float32, no digit is correct if the mean is 1e6 times the
deviation.
"""

from __future__ import annotations

try:
    import ml_dtypes  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('fastbn.torch needs torch and ml_dtypes: pip install "fastbn[torch]"') from error

from .convert import convert_batchnorm, revert_batchnorm
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "revert_batchnorm",
]


def __dir__() -> list[str]:
    return sorted(__all__)
