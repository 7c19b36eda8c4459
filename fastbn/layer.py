"""What does a layer keep between calls? Its parameters, its running statistics, and what `backward` needs."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from . import _check_layer
from .call import checks
from .call.dtypes import DType, kind_of
from .call.pickles import owned, packed, unpacked
from .call.record import Average
from .call.results import Cache, Forward, Gradients
from .inference import InferencePlan
from .ops import Activation, forward
from .ops import backward as backward_of

Array = np.ndarray

_set = object.__setattr__
"""Sets an attribute without the checks of `__setattr__`, for values that are known to be valid."""


class BatchNorm:
    """Batch normalization with its parameters and running statistics, like PyTorch's BatchNorm1d/2d/3d.

    In training mode, in which a layer starts, a call normalizes with the batch's statistics and blends them into the
    running ones. After `eval()`, it normalizes with the running statistics. Both keep what `backward` needs.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float, finite and >= 0
        Added to the variance.
    momentum : float from 0 to 1, or None
        The weight of the new value in the running statistics; None gives the average over all batches so far.
    correction : int >= 0
        The running variance is the sum of squares over M - correction, for M values per channel: unbiased by default.
    affine : bool
        Whether to have weight (gamma, initially ones) and bias (beta, initially zeros).
    track_running_stats : bool
        If False, batch statistics are used after `eval()` too.
    axis : int
        The channel axis.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        Applied to the result; "leaky_relu" alone has slope 0.01.
    dtype : float16, bfloat16, float32 or float64
        The dtype of the inputs. Parameters and running statistics start in its statistics dtype: float64 for float64,
        else float32. "bfloat16" needs ml_dtypes: pip install "fastbn[bfloat16]".
    backend : "c", "numba", "numpy" or None
        None is what fastbn.get_backend() returns when the layer is called.
    virtual_batch_size : int or None
        In training, how many elements of axis 0 share their statistics; see fastbn.forward.

    Attributes
    ----------
    weight, bias : arrays of shape (C,), any float dtype
        None only while `affine` is False.
    running_mean, running_var : arrays of shape (C,), any float dtype
        None only while `track_running_stats` is False.
    num_batches_tracked : int
        The number of calls in training; all virtual batches of a call count as one.
    training : bool
        Whether a call normalizes with the batch's statistics; `train()` and `eval()` set it.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    Notes
    -----
    All parameters are attributes, too. A value that is assigned to an attribute is checked like the argument, with the
    same errors; num_features cannot be changed. A misspelled name (`wieght`) raises AttributeError, except in
    subclasses, which may have attributes of any name. An array that is assigned is not copied; of a tensor, the layer
    keeps an array that shares its memory.

    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3, dtype="float64")
    >>> x = np.arange(12.0).reshape(4, 3)
    >>> bn(x).mean(axis=0).round(6).tolist()
    [0.0, 0.0, 0.0]
    >>> dx = bn.backward(np.ones_like(x))
    >>> bn.gradients()["bias"].tolist()
    [4.0, 4.0, 4.0]
    >>> for name, parameter in bn.parameters().items():  # a step of gradient descent
    ...     parameter -= 0.1 * bn.gradients()[name]
    >>> bn.bias.tolist()
    [-0.4, -0.4, -0.4]
    >>> bn.eval()(x).shape
    (4, 3)
    """

    _cache: Cache | None = None
    _gradients: Gradients | None = None
    _convention: str = ""
    """Which constructor made the layer: "keras", "onnx", or "" for neither."""
    _watch: Callable[[Cache], None] | None = None
    """A function that `recalibrate` sets; each call in training passes its cache to it."""

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
        self.dtype: DType = dtype  # type: ignore[assignment]  # __setattr__ converts it
        self.backend = backend
        self.virtual_batch_size = virtual_batch_size
        self.training = True
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns a valid value, or raises and changes nothing. Reading an attribute costs nothing extra."""
        check = _check_layer.ASSIGNED.get(name)
        if check is not None:
            value = check(self, value)
        elif type(self) is BatchNorm and not hasattr(self, name):
            _check_layer.refuse_misspelled(name)
        _set(self, name, value)

    def reset_parameters(self) -> None:
        """Sets weight to ones, bias to zeros, and the running statistics and their counter to those before any batch.

        The arrays are new ones.
        """
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

        `momentum` multiplies the OLD value, the running variance is biased (correction=1 makes it unbiased, as
        TensorFlow's fused kernels do), channels come last (axis=-1), and epsilon is 1e-3. Other arguments, and the
        errors, are those of BatchNorm.

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

        `momentum` multiplies the OLD value and the running variance is biased (opsets before 14 allow either;
        correction=1 makes it unbiased). `epsilon` is added to the variance, and `axis` is that of the channels. Other
        arguments, and the errors, are those of BatchNorm. fastbn.onnx.load_norms makes such layers of a model.

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
        """Returns y, of the shape, dtype and memory order of x; it is `out` if that is given.

        x has the layer's dtype and number of channels. A residual (like x) is added before the activation, a mask says
        which positions count towards the batch's statistics, and `out` is where to write y: see fastbn.forward.

        Raises TypeError if x has another dtype than the layer, ValueError if it has another number of channels or if
        num_batches_tracked would exceed int64, and the errors of fastbn.forward. Then nothing has been changed.
        """
        return self._normalize(forward, x, residual, out, mask)

    def _normalize(
        self, by: Callable[..., Forward], x: Array, residual: Array | None, out: Array | None, mask: Array | None
    ) -> Array:
        """A call, by fastbn.forward or a function with its arguments."""
        x = _check_layer.layer_input(x, self.num_features, self.axis, self.dtype)
        batch = self.training or not self.track_running_stats
        tracks = self.training and self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracks or not batch else (None, None)
        virtual = self.virtual_batch_size if self.training else None
        momentum, tracked = self.momentum, self.num_batches_tracked
        if tracks and tracked >= _check_layer.MOST_BATCHES:
            _check_layer.too_many_batches()
        if momentum is None:
            momentum = 1 / (tracked + 1) if virtual is None else Average(tracked)
        y, cache = by(
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
            _set(self, "num_batches_tracked", tracked + 1)
            if self._watch is not None:
                self._watch(cache)
        return y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
        """Returns dx of the last call, in training mode or not, and sets `gradients()` of weight and bias.

        dy, dx and `out` have the shape and dtype of x. `out`, where to write dx, may be dy itself. `dresidual` is then
        the residual's gradient, if the call had a residual.

        Raises RuntimeError if there was no call yet, and the errors of fastbn.backward.
        """
        return self._differentiate(backward_of, dy, out)

    def _differentiate(self, by: Callable[..., Gradients], dy: Array, out: Array | None) -> Array:
        """A backward pass, by fastbn.backward or a function with its arguments."""
        if self._cache is None:
            raise RuntimeError("backward: the layer has not been called yet")
        self._gradients = by(dy, self._cache, out=out, backend=self.backend)
        return self._gradients.dx

    @property
    def dresidual(self) -> Array | None:
        """The residual's gradient from the last `backward`, or None."""
        return None if self._gradients is None else self._gradients.dresidual

    def train(self, mode: bool = True) -> Self:
        """Use batch statistics from now on (mode=False: running ones). Returns the layer.

        Raises TypeError if mode is not True or False.
        """
        self.training = checks.flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Use the running statistics from now on. Returns the layer."""
        return self.train(False)

    def parameters(self) -> dict[str, Array]:
        """The arrays to train, by name: "weight" and "bias" themselves, not copies. Empty if both are None."""
        return {name: array for name, array in self._state().items() if name in ("weight", "bias")}

    def plan(self) -> InferencePlan:
        """An InferencePlan that gives what the layer gives after `eval()`, with the parameters as they are now.

        Raises ValueError for a layer without running statistics, or whose statistics have more digits than the
        statistics dtype of its inputs.

        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(3).eval()
        >>> x = np.ones((2, 3), np.float32)
        >>> bool(np.array_equal(bn.plan()(x), bn(x)))
        True
        """
        mean, var = _check_layer.planned(self.running_mean, self.running_var, kind_of(self.dtype).statistics)
        constants = self.weight, self.bias, mean, var
        return InferencePlan(*constants, eps=self.eps, axis=self.axis, activation=self.activation)

    def gradients(self) -> dict[str, Array]:
        """The gradients of `parameters()` from the last `backward`, by the same names, in the statistics dtype.

        Empty before the first `backward`. They are not added up over calls.
        """
        if self._gradients is None:
            return {}
        found = {"weight": self._gradients.dgamma, "bias": self._gradients.dbeta}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def state_dict(self, prefix: str = "") -> dict[str, Array]:
        """Copies of all arrays, by the prefix followed by their names in torch's BatchNorm1d/2d/3d.

        Raises TypeError if prefix is not a string.

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
        """The counter's name in a state, or None: as in torch, only running statistics come with a counter."""
        return None if self.running_mean is None and self.running_var is None else "num_batches_tracked"

    def _state(self) -> dict[str, Array]:
        names = ("weight", "bias", "running_mean", "running_var")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, object], prefix: str = "") -> None:
        """Loads a state of fastbn's or torch's layer, whose values may be arrays or tensors of any float dtype.

        With a prefix such as "layer1.bn.", it may be the state of a whole network; other names are then ignored.
        As in torch, num_batches_tracked may be missing or of shape (1,); it may also be a float with an integer value.

        Raises ValueError or TypeError, with nothing changed, if a name is missing or unknown, if an array has another
        shape or kind, if a value is too large for the layer's dtype, or if an array of the layer is read-only.

        >>> import numpy as np, fastbn
        >>> network = {"bn.weight": np.full(3, 2.0), "bn.bias": np.zeros(3), "linear.weight": np.eye(3)}
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
                setattr(self, name, owned(others.pop(name)))
            self.__dict__.update(others)

    def __copy__(self) -> Self:
        """Copies the arrays too: two layers that train must not share them."""
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        name, numbers = "BatchNorm", f"eps={self.eps}, momentum={self.momentum}"
        if self._convention:  # then the momentum is shown as the weight of the old value
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
