"""The layer: holds gamma, beta and the running statistics, and calls ops."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from . import _check_layer
from .call import checks
from .call.dtypes import DType, kind_of
from .call.pickles import packed, unpacked
from .call.record import Average
from .call.results import Cache, Gradients
from .ops import Activation, forward
from .ops import backward as backward_of

Array = np.ndarray

_set = object.__setattr__
"""For what is known to be right."""


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
    correction : int >= 0
        The running variance is over M - correction, M being the values per channel of a batch: unbiased by default.
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
    weight, bias : arrays of shape (C,), any float dtype
        None only while `affine` is False.
    running_mean, running_var : arrays of shape (C,), any float dtype
        None only while `track_running_stats` is False.
    num_batches_tracked : int
        Calls in training; virtual batches of one call count as one.
    training : bool

    All parameters are attributes, too, and what is assigned to an attribute is checked as the argument is, with the
    same errors; num_features stays as it is. A name with a slip in it (`wieght`) raises AttributeError, but in
    subclasses, which may have attributes of any name.

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

    _cache: Cache | None = None
    _gradients: Gradients | None = None
    _convention: str = ""
    """Of the constructor that made the layer: "keras", "onnx", or none."""
    _watch: Callable[[Cache], None] | None = None
    """Called with the cache of each call in training, by `recalibrate`."""

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        correction: int = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        activation: Activation = None,
        dtype: str | type | np.dtype = "float32",
        backend: str | None = None,
        virtual_batch_size: int | None = None,
    ) -> None:
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.correction = correction
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.activation = activation
        self.dtype: DType = dtype  # type: ignore[assignment]  # which __setattr__ makes one
        self.backend = backend
        self.virtual_batch_size = virtual_batch_size
        self.training = True
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns what the layer can work with, or raises and changes nothing. Reading costs nothing."""
        check = _check_layer.ASSIGNED.get(name)
        if check is not None:
            value = check(self, value)
        elif type(self) is BatchNorm and not hasattr(self, name):
            _check_layer.unlike_an_attribute(name)
        _set(self, name, value)

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
        cls,
        num_features: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        axis: int = -1,
        correction: int = 0,
        **kwargs: Any,
    ) -> Self:
        """A layer with the conventions of keras.layers.BatchNormalization.

        `momentum` multiplies the OLD value, the running variance is the biased one (correction=1 is for the fused
        kernels of TensorFlow, which have the unbiased one), channels come last, and epsilon is 1e-3. Other arguments
        are those of BatchNorm.

        >>> import fastbn
        >>> bn = fastbn.BatchNorm.keras(8)
        >>> bn.axis, bn.eps, round(bn.momentum, 2)
        (-1, 0.001, 0.01)
        """
        return cls._of_convention("keras", num_features, momentum, epsilon, axis, correction, kwargs)

    @classmethod
    def onnx(
        cls,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis: int = 1,
        correction: int = 0,
        **kwargs: Any,
    ) -> Self:
        """A layer with the conventions of ONNX's BatchNormalization (opset 15).

        `momentum` multiplies the OLD value and the running variance is the biased one (opsets before 14 leave that
        open: correction=1 is the unbiased one). Other arguments are those of BatchNorm.

        >>> import fastbn
        >>> bn = fastbn.BatchNorm.onnx(8)
        >>> bn.axis, bn.eps, round(bn.momentum, 2)
        (1, 1e-05, 0.1)
        """
        return cls._of_convention("onnx", num_features, momentum, epsilon, axis, correction, kwargs)

    @classmethod
    def _of_convention(
        cls,
        name: str,
        num_features: int,
        momentum: float,
        epsilon: float,
        axis: int,
        correction: int,
        others: dict[str, Any],
    ) -> Self:
        """A layer whose momentum is given as the weight of the old value."""
        eps = checks.eps(epsilon, "epsilon")
        new = 1 - checks.momentum(momentum)
        bn = cls(num_features, momentum=new, eps=eps, axis=axis, correction=correction, **others)
        bn._convention = name
        return bn

    def __call__(
        self, x: Array, *, residual: Array | None = None, out: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Normalizes x, with x's channels as the layer's; see fastbn.forward for residual, out and mask.

        Raises TypeError if x has not the layer's dtype, ValueError if it has not its channels, and whatever
        `forward` and `infer` raise; then nothing has been changed.
        """
        x = _check_layer.of_layer(x, self.num_features, self.axis, self.dtype)
        batch = self.training or not self.track_running_stats
        tracks = self.training and self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracks or not batch else (None, None)
        virtual = self.virtual_batch_size if self.training else None
        momentum = self.momentum
        if momentum is None:
            tracked = self.num_batches_tracked
            momentum = 1 / (tracked + 1) if virtual is None else Average(tracked)
        y, cache = forward(
            x,
            self.weight,
            self.bias,
            mean,
            var,
            training=batch,
            momentum=momentum,
            correction=self.correction,
            eps=self.eps,
            axis=self.axis,
            mask=mask,
            activation=self.activation,
            residual=residual,
            out=out,
            backend=self.backend,
            virtual_batch_size=virtual,
        )
        _set(self, "_cache", cache)
        if tracks:
            _set(self, "num_batches_tracked", self.num_batches_tracked + 1)
            if self._watch is not None:
                self._watch(cache)
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

    def train(self, mode: bool = True) -> Self:
        """Use batch statistics from now on (mode=False: running ones). Returns the layer."""
        self.training = checks.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Use the running statistics from now on. Returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The arrays to train, by name: "weight" and "bias", themselves and not copies. Empty without affine."""
        return {name: array for name, array in self._state().items() if name in ("weight", "bias")}

    def gradients(self) -> dict[str, Array]:
        """The gradients of `parameters()` from the last `backward`, by the same names."""
        if self._gradients is None:
            return {}
        found = {"weight": self._gradients.dgamma, "bias": self._gradients.dbeta}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """Copies of all arrays, under the names of torch's BatchNorm1d/2d/3d behind the prefix.

        >>> import fastbn
        >>> list(fastbn.BatchNorm(3, track_running_stats=False).state_dict("layer1.bn."))
        ['layer1.bn.weight', 'layer1.bn.bias']
        """
        prefix = _check_layer.prefixed(prefix)
        state = {prefix + name: array.copy() for name, array in self._state().items()}
        if self._counter() is not None:
            state[f"{prefix}{self._counter()}"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def _counter(self) -> str | None:
        """The name of the counter in a state that has one: beside running statistics, as in torch."""
        return None if self.running_mean is None and self.running_var is None else "num_batches_tracked"

    def _state(self) -> dict[str, Array]:
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, object], prefix: str = "") -> None:
        """Takes over a state of the same layer, or of torch's, whose values may be tensors of any float dtype.

        With a prefix such as "layer1.bn.", the state of a whole network, of which the names behind the prefix count.
        As in torch, num_batches_tracked may be missing, and may have shape (1,); it may be a float that is whole.

        Raises ValueError or TypeError, with nothing changed, if a name is missing or unknown, a shape or kind is
        another, a value too large for the layer's dtype, or an array of the layer read-only.

        >>> import numpy as np, fastbn
        >>> network = {"bn.weight": np.full(3, 2.0), "bn.bias": np.zeros(3), "linear.weight": np.ones((3, 3))}
        >>> bn = fastbn.BatchNorm(3, track_running_stats=False)
        >>> bn.load_state_dict(network, prefix="bn.")
        >>> bn.weight
        array([2., 2., 2.], dtype=float32)
        """
        arrays = self._state()
        found = _check_layer.state(state, _check_layer.prefixed(prefix), arrays, self._counter())
        batches = found.pop("num_batches_tracked", self.num_batches_tracked)
        for name, array in found.items():
            np.copyto(np.asarray(arrays[name]), array)
        self.num_batches_tracked = batches

    def __getstate__(self) -> object:
        """Copies and pickles carry the state of the layer, not what a pending `backward` needs."""
        pending = ("_cache", "_gradients", "_watch")
        return packed({name: value for name, value in self.__dict__.items() if name not in pending})

    def __setstate__(self, state: object) -> None:
        with unpacked(type(self).__name__, state) as contents:
            others = dict(contents)
            for name in _check_layer.ASSIGNED:
                setattr(self, name, others.pop(name))
            self.__dict__.update(others)

    def __copy__(self) -> Self:
        """A layer with arrays of its own: two that train must not share them."""
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        name, numbers = "BatchNorm", f"eps={self.eps}, momentum={self.momentum}"
        if self._convention:  # whose momentum is the weight of the old value
            old = None if self.momentum is None else round(1 - self.momentum, 15)
            name, numbers = f"BatchNorm.{self._convention}", f"epsilon={self.eps}, momentum={old}"
        usual = 0 if self._convention else 1
        correction = "" if self.correction == usual else f", correction={self.correction}"
        virtual = "" if self.virtual_batch_size is None else f", virtual_batch_size={self.virtual_batch_size}"
        return (
            f"{name}({self.num_features}, {numbers}{correction}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"activation={self.activation!r}, dtype={str(self.dtype)!r}{virtual})"
        )
