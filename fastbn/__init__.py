"""Batch normalization for CPUs: fast, exact at any offset, the same bits for any number of threads."""

from ._config import get_num_threads, set_num_threads, use_num_threads
from ._info import __version__, show_config
from .backends import backends, get_backend, set_backend, use_backend
from .layer import BatchNorm
from .ops import Cache, Forward, Gradients, backward, forward, infer

__all__ = [
    "BatchNorm",
    "Cache",
    "Forward",
    "Gradients",
    "__version__",
    "backends",
    "backward",
    "forward",
    "get_backend",
    "get_num_threads",
    "infer",
    "set_backend",
    "set_num_threads",
    "show_config",
    "use_backend",
    "use_num_threads",
]
