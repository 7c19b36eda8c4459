"""The layer: holds gamma, beta and the running statistics, and calls ops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import _check
from ._config import BACKENDS
from ._dtypes import kind_of
from ._results import Cache, Gradients
from .ops import Activation, forward_as
from .ops import backward as backward_of

Array = np.ndarray[Any, Any]


class BatchNorm:
    """Batch normalization with its parameters and running statistics, as PyTorch's BatchNorm1d/2d/3d.

    In training (the state it starts in) a call normalizes with the batch's statistics, blends them into the running
    ones and keeps what `backward` needs; after `eval()` it normalizes with the running statistics.

    Parameters
    ----------
    num_features : int
        C, the channels.
    eps : float, finite and >= 0
    momentum : float from 0 to 1, or None
        The weight of the new value in the running statistics; None is the average over all batches so far.
    affine : bool
        Whether to have weight (gamma, which starts as ones) and bias (beta, zeros).
    track_running_stats : bool
        Without running statistics, batch statistics are used after `eval()` too.
    axis : int
        The channel axis.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
    dtype : float16, bfloat16, float32 or float64
        That of the inputs. Parameters and running statistics have its statistics dtype: float64 for float64, else
        float32. "bfloat16" needs ml_dtypes: pip install "fastbn[bfloat16]".
    backend : "c", "numba", "numpy" or None
    virtual_batch_size : int or None
        In training, how many elements of axis 0 share their statistics; see fastbn.forward.

    Attributes
    ----------
    weight, bias : arrays of shape (C,), or None
    running_mean, running_var : arrays of shape (C,), or None
    num_batches_tracked : int
        Calls in training; virtual batches of one call count as one.
    training : bool

    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3, dtype="float64")
    >>> x = np.arange(12.0).reshape(4, 3)
    >>> bn(x).mean(axis=0).round(6).tolist()
    [0.0, 0.0, 0.0]
    >>> dx = bn.backward(np.ones_like(x))
    >>> bn.gradients()["bias"].tolist()
    [4.0, 4.0, 4.0]
    >>> bn.eval()(x).shape
    (4, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        activation: Activation = None,
        dtype: Any = "float32",
        backend: str | None = None,
        virtual_batch_size: int | None = None,
    ) -> None:
        self.num_features = _check.count("num_features", num_features)
        self.eps = _check.eps(eps)
        self.momentum = None if momentum is None else _check.momentum(momentum)
        self.affine = _check.flag("affine", affine)
        self.track_running_stats = _check.flag("track_running_stats", track_running_stats)
        self.axis = _check.integer("axis", axis)
        _check.activation(activation)
        self.activation = activation
        self.dtype = _check.dtype("dtype", dtype)
        self.backend = backend if backend is None else _check.choice("backend", backend, BACKENDS)
        self.virtual_batch_size = _check.virtual_batch(virtual_batch_size, self.axis)
        self.training = True
        self._correction = 1
        self._cache: Cache | None = None
        self._gradients: Gradients | None = None
        self._watch: Callable[[Cache], None] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight ones, bias zeros, and the running statistics as before any batch."""
        size, statistics = self.num_features, kind_of(self.dtype).statistics
        self.weight = np.ones(size, statistics) if self.affine else None
        self.bias = np.zeros(size, statistics) if self.affine else None
        self.running_mean = np.zeros(size, statistics) if self.track_running_stats else None
        self.running_var = np.ones(size, statistics) if self.track_running_stats else None
        self.num_batches_tracked = 0

    @classmethod
    def keras(
        cls, num_features: int, *, momentum: float = 0.99, epsilon: float = 1e-3, axis: int = -1, **kwargs: Any
    ) -> BatchNorm:
        """A layer with the conventions of keras.layers.BatchNormalization.

        `momentum` multiplies the OLD value, the running variance is the biased one, channels come last, and
        epsilon is 1e-3. Other arguments are those of BatchNorm.

        >>> import fastbn
        >>> bn = fastbn.BatchNorm.keras(8)
        >>> bn.axis, bn.eps, round(bn.momentum, 2)
        (-1, 0.001, 0.01)
        """
        eps = _check.eps(epsilon, "epsilon")
        bn = cls(num_features, momentum=1 - _check.momentum(momentum), eps=eps, axis=axis, **kwargs)
        bn._correction = 0
        return bn

    @classmethod
    def onnx(
        cls, num_features: int, *, momentum: float = 0.9, epsilon: float = 1e-5, axis: int = 1, **kwargs: Any
    ) -> BatchNorm:
        """A layer with the conventions of ONNX's BatchNormalization (opset 15).

        `momentum` multiplies the OLD value and the running variance is the biased one. Other arguments are those of
        BatchNorm.

        >>> import fastbn
        >>> bn = fastbn.BatchNorm.onnx(8)
        >>> bn.axis, bn.eps, round(bn.momentum, 2)
        (1, 1e-05, 0.1)
        """
        eps = _check.eps(epsilon, "epsilon")
        bn = cls(num_features, momentum=1 - _check.momentum(momentum), eps=eps, axis=axis, **kwargs)
        bn._correction = 0
        return bn

    def __call__(
        self, x: Array, *, residual: Array | None = None, out: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Normalizes x, with x's channels as the layer's; see fastbn.forward for residual, out and mask.

        Raises TypeError if x has not the layer's dtype, ValueError if it has not its channels, and whatever
        `forward` and `infer` raise; then nothing has been changed.
        """
        x = _check.of_layer(x, self.num_features, self.axis, self.dtype)
        batch = self.training or not self.track_running_stats
        tracks = self.training and self.track_running_stats
        statistics = (self.running_mean, self.running_var) if tracks or not batch else (None, None)
        batches = self.num_batches_tracked if self.momentum is None else None
        y, self._cache = forward_as(
            *(self._correction, batches, x, self.weight, self.bias, *statistics, batch),
            1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum,
            *(self.eps, self.axis, mask, self.activation, residual, out, self.backend, None),
            self.virtual_batch_size if self.training else None,
        )
        self.num_batches_tracked += tracks
        if tracks and self._watch is not None:
            self._watch(self._cache)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """Gives dx for the last call, in training mode or not; `gradients()` then gives those of weight and bias.

        Raises RuntimeError if there was no call yet, and whatever fastbn.backward raises.
        """
        if self._cache is None:
            raise RuntimeError("backward: no call of the layer came before it")
        self._gradients = backward_of(dy, self._cache, out=out, backend=self.backend)
        return self._gradients.dx

    @property
    def dresidual(self) -> Array | None:
        """The residual's gradient from the last `backward`, or None."""
        return None if self._gradients is None else self._gradients.dresidual

    def train(self, mode: bool = True) -> BatchNorm:
        """Use batch statistics from now on (mode=False: running ones). Returns the layer."""
        self.training = _check.flag("mode", mode)
        return self

    def eval(self) -> BatchNorm:
        """Use the running statistics from now on. Returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The arrays to train, by name: "weight" and "bias", themselves and not copies. Empty without affine."""
        if self.weight is None or self.bias is None:
            return {}
        return {"weight": self.weight, "bias": self.bias}

    def gradients(self) -> dict[str, Array]:
        """The gradients of `parameters()` from the last `backward`, by the same names."""
        if self._gradients is None or self._gradients.dgamma is None or self._gradients.dbeta is None:
            return {}
        return {"weight": self._gradients.dgamma, "bias": self._gradients.dbeta}

    def state_dict(self) -> dict[str, Array]:
        """Copies of all arrays, under the names and in the dtypes of torch's BatchNorm1d/2d/3d."""
        state = {name: array.copy() for name, array in self._state().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def _state(self) -> dict[str, Array]:
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of the same layer, or of torch's, whose values may be tensors.

        Raises ValueError or TypeError, with nothing changed, if a name is missing or unknown or a shape or kind is
        another. As in torch, num_batches_tracked may be missing.
        """
        arrays = self._state()
        tracked = "num_batches_tracked" if self.track_running_stats else None
        found = _check.state("state", state, arrays, optional=tracked)
        batches = found.pop("num_batches_tracked", None)
        for name, array in found.items():
            arrays[name][...] = array
        if batches is not None:
            self.num_batches_tracked = int(batches)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the state of the layer, not what a pending `backward` needs."""
        return {**self.__dict__, "_cache": None, "_gradients": None, "_watch": None}

    def __copy__(self) -> BatchNorm:
        """A layer with arrays of its own: two that train must not share them."""
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        virtual = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis}, activation={self.activation!r}, "
            f"dtype={str(self.dtype)!r}{virtual})"
        )
