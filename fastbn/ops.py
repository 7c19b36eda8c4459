"""What do forward, infer, backward and their building blocks do? They check a call and hand it to a backend."""

from typing import cast

import numpy as np

from ._backends import get_num_threads, select, threads_of
from ._moments import Moments, Sums
from .call import batch, check_parts, checks, ghost
from .call.blocks import can_copy
from .call.record import Call, Options, check, options_of
from .call.results import Cache, Forward, Gradients, Parts, parts_of

Array = np.ndarray
Activation = str | tuple[str, float] | None


def forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    correction: int = 1,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Array | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
    moments: Moments | None = None,
    virtual_batch_size: int | None = None,
) -> Forward:
    """Batch normalization, ready for `backward`.

    y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual), per channel: Ioffe & Szegedy 2015,
    algorithm 1. The mean and the biased variance are those of the batch or, with training=False, the running ones.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, at least 2-D
        Any strides. Dense arrays (channels-first, channels-last, transposed) are not copied; others are copied, large
        ones block by block. The statistics dtype is float64 for float64, else float32.
    gamma, beta : arrays of shape (C,), any float dtype, or None
        Scale and shift; None means ones and zeros.
    running_mean, running_var : arrays of shape (C,), each of any float dtype, both or neither
        Training updates them in place, to (1 - momentum) * old + momentum * batch.
    training : bool
        False normalizes with the running statistics, which are then required and do not change.
    momentum : float, 0 to 1
        The weight of the batch in the running statistics: 0.1 here is 0.9 in Keras and ONNX, where it is that of the
        old value.
    correction : int, 0 to M - 1
        The running variance is updated with the sum of squares over M - correction, for the M values per channel that
        count (of the moments, if given; of each virtual batch). This is the unbiased variance by default, as in
        PyTorch, and the biased one with 0, as in Keras, ONNX and Flax. With training=False it is not used.
    eps : float, finite and >= 0
        Added to the variance. With eps == 0 a constant channel still gives beta exactly.
    axis : int
        The channel axis; negative numbers count from the end.
    mask : array of bool that broadcasts to x's shape without the channel axis, or None
        Only positions where it is True count towards the statistics; training needs 2 or more. All are normalized.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        "leaky_relu" alone has slope 0.01.
    residual : array like x, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where to write y, with any strides. It may be x itself (the same memory, shape and strides); otherwise it must
        not share memory with an input. With out=x the gradient is computed from y, as in in-place activated batch norm
        (Rota Bulo et al. 2018). This requires no activation, or leaky_relu with a slope that is at least the smallest
        normal number of x's dtype; |gamma| >= sqrt(e) * max(1, |beta|) in every channel, where e is the eps of x's
        dtype; and |residual| <= min(|gamma|) / sqrt(e). The cache then refers to y, which must stay as it is. Since y
        is rounded, the gradient's xhat has an error of up to e / 2 * |y / gamma|, and as much again with a residual.
    backend : "c", "numba", "numpy" or None
        None is what `get_backend` returns.
    moments : Moments or None
        In training, normalizes with these instead of the batch's own, and blends them into the running statistics. A
        mask then says which positions of x they include.
    virtual_batch_size : int or None
        In training, how many elements of axis 0 share their statistics (the last virtual batch may be smaller): ghost
        batch norm (Hoffer et al. 2017). The running statistics are updated after each virtual batch.

    Returns
    -------
    Forward
        Unpacks as (y, cache). y has the shape, dtype and memory order of x; it is `out` if that is given.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed; nothing has been changed. Training requires
        at least 2 values per channel: of x, of the mask, of the moments and of each virtual batch.

    Notes
    -----
    Any array may also be a PyTorch tensor, or another object with `__dlpack__`, in the CPU's memory. That memory is
    used, not copied; running statistics are updated in it. What is returned are NumPy arrays, but `out` itself where
    that is given. A tensor that requires a gradient is refused, as that would be lost: pass x.detach(), or use
    fastbn.torch. Tensors of bfloat16 need ml_dtypes: pip install "fastbn[bfloat16]".

    For finite float32 input, the error of y is at most 2 ulp of max(1, |xhat|) times |gamma| plus 1 ulp of |y|, at any
    offset, with every backend and layout. Sums are kept in float64, so those of the largest float32 do not overflow,
    and denormal numbers count like others. The squares of float64 data overflow where x - mean is beyond 1e154, which
    makes their channel NaN, and lose digits where all are below 1e-146. A constant channel gives beta exactly, even if
    eps == 0, where xhat is 0. A NaN or infinity makes its own channel NaN and no other. If there are values per channel
    but no channels (C == 0), y is empty, in training as well.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, cache = fastbn.forward(x, eps=0.0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    chosen = select(backend)
    express = getattr(chosen, "express_forward", None)
    plain = mask is None and moments is None and virtual_batch_size is None
    if express is not None and plain and type(training) is bool:
        done = express(x, gamma, beta, running_mean, running_var, momentum, correction, eps, axis, activation, residual,
                       out, training, get_num_threads)  # fmt: skip
        if done is None and can_copy(out, x, (x, gamma, beta, running_mean, running_var, residual)):
            done = express(x, gamma, beta, running_mean, running_var, momentum, correction, eps, axis, activation,
                           residual, None, training, get_num_threads)  # fmt: skip
            done = done and (_copied(done[0], out), done[1])
        if done is not None:
            y, saved = done
            kept, added = batch.views(x, residual)
            options, has_gamma, has_beta = options_of(activation), gamma is not None, beta is not None
            return Forward(y, Cache(Parts(kept, added, saved, axis, not training, options, has_gamma, has_beta)))
    training = checks.flag("training", training)
    call = Call(x, gamma, beta, running_mean, running_var, momentum, correction, eps, axis, mask, Options(activation),
                residual, out, threads_of(chosen))  # fmt: skip
    call = check(call, updates=training, keeps=True)
    size = checks.virtual_batch(virtual_batch_size, call.axis)
    if moments is not None:
        moments = checks.instance("moments", moments, Moments, "Moments, or None")._check()
        channels = call.x.shape[call.axis]
        check_parts.moments(moments, channels, call.statistics, training=training, virtual=size)
    if not training:
        return Forward(call.out, Cache(batch.freeze(call, chosen)))
    parts = batch.train(call, moments, chosen) if size is None else ghost.train(call, size, chosen)
    call.put_running_back()
    return Forward(call.out, Cache(parts))


def infer(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running_mean: Array,
    running_var: Array,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Activation = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Batch normalization with given statistics, without a backward pass.

    y = activation((x - running_mean) / sqrt(running_var + eps) * gamma + beta + residual): Ioffe & Szegedy 2015,
    algorithm 2. Arguments, accuracy and errors are those of `forward`, except that any call may be in place (out=x),
    one value per channel is enough, and an x without values gives an empty y. `InferencePlan` does the same with its
    constants computed once, which is faster for small arrays.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, at least 2-D, any strides
    gamma, beta : arrays of shape (C,), any float dtype, or None for ones and zeros
    running_mean, running_var : arrays of shape (C,), each of any float dtype
        They do not change.
    eps : float, finite and >= 0
        Added to the variance.
    axis : int
        The channel axis; negative numbers count from the end.
    activation : as in `forward`
    residual : array like x, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where to write y, with any strides: x itself, or memory that no input shares.
    backend : "c", "numba", "numpy" or None

    Returns
    -------
    array
        y, of the shape, dtype and memory order of x; it is `out` if that is given.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed; nothing has been changed.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> fastbn.infer(x, None, None, np.array([2.0, 20.0]), np.array([1.0, 100.0]), eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    chosen = select(backend)
    express = getattr(chosen, "express_infer", None)
    if express is not None:
        y = express(x, gamma, beta, running_mean, running_var, eps, axis, activation, residual, out, get_num_threads)
        if y is None and can_copy(out, x, (gamma, beta, running_mean, running_var, residual), may_be=x):
            y = express(x, gamma, beta, running_mean, running_var, eps, axis, activation, residual, None,
                        get_num_threads)  # fmt: skip
            y = _copied(y, out)
        if y is not None:
            return cast(Array, y)
    call = Call(x, gamma, beta, running_mean, running_var, 0.0, 0, eps, axis, None, Options(activation), residual, out,
                threads_of(chosen))  # fmt: skip
    call = check(call, updates=False, keeps=False)
    batch.infer(call, chosen)
    return cast(Array, call.out)


def backward(
    dy: Array, cache: Cache, *, out: Array | None = None, backend: str | None = None, sums: Sums | None = None
) -> Gradients:
    """The exact gradient of the `forward` call that made `cache`.

    Let dz be the gradient before the activation (dy without one). In training (Ioffe & Szegedy 2015, section 3):

        dbeta = sum(dz),  dgamma = sum(dz * xhat)
        dx = gamma / sqrt(var + eps) * (dz - dbeta / M - xhat * dgamma / M)

    With frozen statistics (training=False), and where a mask is False, dx = gamma / sqrt(var + eps) * dz. M is the
    number of values per channel that count, but the sums are over all. At a kink of the activation, the derivative
    is that of its flat side, and for leaky_relu its slope, as in torch. Where the activation gets a NaN, dz is dy for
    relu and relu6, dy times the slope for leaky_relu, and NaN for the others.

    Parameters
    ----------
    dy : array of x's shape and dtype, any strides
    cache : Cache
        It may be used more than once.
    out : array of x's shape and dtype, or None
        Where to write dx, with any strides. It may be dy itself (the same memory, shape and strides); otherwise it must
        not share memory with dy, x, the residual or the mask.
    backend : "c", "numba", "numpy" or None
    sums : Sums or None
        The total of `backward_sums` over all batches whose moments the forward call was given, including this one. dx
        then includes the effect of x on the results of the others, and dgamma and dbeta are those of all batches.

    Returns
    -------
    Gradients
        Unpacks as (dx, dgamma, dbeta); dgamma and dbeta are in the statistics dtype, and None where gamma and beta
        were. `.dresidual` is the residual's gradient, or None without a residual. Without an activation it is dy
        itself, or a copy of dy if out is dy.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed; nothing has been changed.

    >>> import numpy as np, fastbn
    >>> y, cache = fastbn.forward(np.array([[1.0], [2.0], [6.0]]), np.array([2.0]))
    >>> dx, dgamma, dbeta = fastbn.backward(np.array([[1.0], [0.0], [0.0]]), cache)
    >>> bool(abs(dx.sum()) < 1e-12), dbeta is None
    (True, True)
    """
    chosen = select(backend)
    parts = getattr(cache, "_parts", None)
    express = getattr(chosen, "express_backward", None)
    if express is not None and sums is None and type(cache) is Cache and type(parts) is Parts and parts.plain:
        gradients = express(dy, parts.x, parts.residual, parts.saved, parts.axis, parts.frozen, parts.options,
                            parts.has_gamma, parts.has_beta, out, get_num_threads)  # fmt: skip
        kept = None if parts.residual is None else dy  # which may be the residual's gradient
        if gradients is None and can_copy(out, parts.x, (parts.x, parts.residual, kept), may_be=dy):
            gradients = express(dy, parts.x, parts.residual, parts.saved, parts.axis, parts.frozen, parts.options,
                                parts.has_gamma, parts.has_beta, None, get_num_threads)  # fmt: skip
            gradients = gradients and (_copied(gradients[0], out), *gradients[1:])
        if gradients is not None:
            return Gradients(*gradients)
    parts = parts_of(cache)
    if sums is not None:
        check_parts.whole("sums", parts.virtual)
        sums = checks.instance("sums", sums, Sums, "Sums, or None")._check()
        check_parts.sums(sums, parts.saved.shape[1], parts.statistics, None if parts.frozen else parts.total)
    call = batch.check_backward(dy, parts, out, threads_of(chosen))
    if parts.virtual is not None:
        dgamma, dbeta = ghost.backward(call, parts, chosen)
    else:
        dgamma, dbeta = batch.backward(call, parts, chosen, sums)
    return Gradients(call.out, dgamma, dbeta, call.residual_gradient)


def moments(x: Array, *, axis: int = 1, mask: Array | None = None, backend: str | None = None) -> Moments:
    """The Moments of x: count, mean and sum of squares about the mean, per channel.

    The moments of the parts of a batch merge into those of the whole, with which `forward(moments=...)` normalizes.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, at least 2-D, any strides
        It may have no values; count is then 0.
    axis : int
        The channel axis; negative numbers count from the end.
    mask : array of bool that broadcasts to x's shape without the channel axis, or None
        Only positions where it is True count. It may leave no value.
    backend : "c", "numba", "numpy" or None

    Returns
    -------
    Moments
        With the attributes count, mean, m2 (the sum of squares about the mean) and mean_low, and the method var.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> whole = fastbn.moments(x[:1]) + fastbn.moments(x[1:])
    >>> y, cache = fastbn.forward(x[:1], moments=whole)
    >>> bool(abs(y - fastbn.forward(x).y[:1]) < 1e-15)
    True
    """
    chosen = select(backend)
    return batch.moments(Call(x, axis=axis, mask=mask, threads=threads_of(chosen)), chosen)


def backward_sums(dy: Array, cache: Cache, *, backend: str | None = None) -> Sums:
    """One batch's part of the sums for the gradients of several batches, which are normalized with the moments of all.

    Pass the total of all parts to `backward` for each batch.

    Parameters
    ----------
    dy : array of x's shape and dtype, any strides
    cache : Cache
        That of this batch, from `forward(moments=...)`. One of virtual batches is refused.
    backend : "c", "numba", "numpy" or None

    Returns
    -------
    Sums
        With the attributes count, sum_dy and sum_dy_xhat. The count is the batch's part of the moments' count.

    Raises
    ------
    TypeError, ValueError
        The message names the argument, what was given and what is allowed.

    >>> import numpy as np, fastbn
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> xs, dys = (x[:1], x[1:]), (dy[:1], dy[1:])
    >>> m = sum(fastbn.moments(part) for part in xs)
    >>> caches = [fastbn.forward(part, moments=m).cache for part in xs]
    >>> sums = sum(map(fastbn.backward_sums, dys, caches))
    >>> dxs = [fastbn.backward(part, cache, sums=sums).dx for part, cache in zip(dys, caches)]
    >>> bool(np.allclose(np.concatenate(dxs), fastbn.backward(dy, fastbn.forward(x).cache).dx))
    True
    """
    chosen = select(backend)
    parts = parts_of(cache)
    check_parts.whole("cache", parts.virtual)
    return batch.backward_sums(dy, parts, chosen, threads_of(chosen))


def _copied(result: Array | None, out: Array | None) -> Array | None:
    """`out` with the values of a result, if there is one."""
    if result is None or out is None:
        return None
    np.copyto(out, result)
    return out
