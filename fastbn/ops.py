"""The front desk: forward, infer, backward and what they are built of. Checks, finds who does the work, hands over."""

from typing import cast

import numpy as np

from ._backends import get_num_threads, select, threads_of
from ._moments import Moments, Sums
from .call import batch, check_parts, checks, ghost
from .call.record import Call, check
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
        Any strides. Dense arrays (channels-first, channels-last, transposed) are not copied, others block by block.
        The statistics dtype is float64 for float64, else float32.
    gamma, beta : arrays of shape (C,), any float dtype, or None
        Scale and shift; None means ones and zeros.
    running_mean, running_var : arrays of shape (C,), each of any float dtype, both or neither
        In training, updated in place: (1 - momentum) * old + momentum * batch.
    training : bool
        False normalizes with the running statistics, which are then required and left alone.
    momentum : float, 0 to 1
    correction : int, 0 to M - 1
        The running variance gets the sum of squares over M - correction, for the M values per channel that count (of
        the moments, if given; of each virtual batch): the unbiased variance by default, as in PyTorch, and the biased
        one with 0, as in Keras, ONNX and Flax. With training=False it is not used.
    eps : float, finite and >= 0
        With eps == 0 a constant channel still gives beta exactly.
    axis : int
        The channel axis.
    mask : array of bool that broadcasts to x's shape without the channel axis, or None
        Only positions that are True count towards the statistics: 2 or more in training. All are normalized.
    activation : None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or ("leaky_relu", slope)
        "leaky_relu" alone has slope 0.01.
    residual : array like x, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Where y goes, with any strides. It may be x itself (the same memory, shape and strides), and may share no
        memory with an input otherwise. With out=x the gradient comes from y, as in in-place activated batch norm
        (Rota Bulo et al. 2018): so only without an activation or with leaky_relu of a slope > 0 (and not so small
        that x's dtype has it with fewer digits), and where |gamma| is at least sqrt(eps of x's dtype) * max(1, |beta|)
        in every channel, and no residual is larger than |gamma| / sqrt(eps). The cache then refers to y: leave that
        as it is.
    backend : "c", "numba", "numpy" or None
    moments : Moments or None
        Normalizes with these instead of the batch's own, in training; the running statistics get these, too. A mask
        then says which positions they count.
    virtual_batch_size : int or None
        In training, that many elements of axis 0 (the last time, what is left) share their statistics: ghost batch
        norm (Hoffer et al. 2017). The running statistics are updated after each.

    Returns
    -------
    Forward
        Unpacks as (y, cache). y has the dtype and memory order of x.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is allowed; nothing has been changed. Among them: fewer than 2
        values per channel in training, be it of x, of the mask, of the moments or of a virtual batch.

    Notes
    -----
    For finite float32 input y is within 2 ulp of max(1, |xhat|) times |gamma| plus 1 ulp of |y|, at any offset, with
    every backend and layout. Sums are kept in float64: those of the largest float32 do not overflow, and denormal
    numbers count like others; the squares of float64 overflow beyond 1e154. A constant channel gives beta exactly,
    for eps == 0 too, where xhat is 0. A NaN or infinity makes its own channel NaN and no other. Without channels
    (C == 0) but with values per channel, y is empty, in training as well.

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
        if done is not None:
            y, saved = done
            kept, added = batch.own(x, residual)
            has_gamma, has_beta = gamma is not None, beta is not None
            return Forward(y, Cache(Parts(kept, added, saved, axis, not training, activation, has_gamma, has_beta)))
    training = checks.flag("training", training)
    call = Call(
        x=x,
        gamma=gamma,
        beta=beta,
        running_mean=running_mean,
        running_var=running_var,
        momentum=momentum,
        correction=correction,
        eps=eps,
        axis=axis,
        mask=mask,
        activation=activation,
        residual=residual,
        out=out,
        threads=threads_of(chosen),
    )
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
    """Batch normalization with given statistics, nothing kept for a backward pass.

    y = activation((x - running_mean) / sqrt(running_var + eps) * gamma + beta + residual): Ioffe & Szegedy 2015,
    algorithm 2. Arguments, accuracy and errors are those of `forward`, but any call may be in place (out=x), one value
    per channel is enough, and an x without values gives an empty y.

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
        if y is not None:
            return cast(Array, y)
    call = Call(
        x=x,
        gamma=gamma,
        beta=beta,
        running_mean=running_mean,
        running_var=running_var,
        eps=eps,
        axis=axis,
        activation=activation,
        residual=residual,
        out=out,
        threads=threads_of(chosen),
    )
    call = check(call, updates=False, keeps=False)
    batch.infer(call, chosen)
    return cast(Array, call.out)


def backward(
    dy: Array, cache: Cache, *, out: Array | None = None, backend: str | None = None, sums: Sums | None = None
) -> Gradients:
    """The exact gradient of the `forward` call that made `cache`.

    With dz the gradient before the activation (dy without one), in training, after Ioffe & Szegedy 2015, section 3:

        dbeta = sum(dz),  dgamma = sum(dz * xhat)
        dx = gamma / sqrt(var + eps) * (dz - dbeta / M - xhat * dgamma / M)

    and dx = gamma / sqrt(var + eps) * dz with frozen statistics (training=False), and where a mask is False: M is the
    number of values that it leaves, while the sums are over all. Where the activation has a kink the slope is torch's:
    that of its flat side, and leaky_relu's slope at 0. Where it gets a NaN, dz is dy for relu and relu6, dy times the
    slope for leaky_relu, and NaN for the others.

    Parameters
    ----------
    dy : array of x's shape and dtype, any strides
    cache : Cache
        It may be used more than once.
    out : array of x's shape and dtype, or None
        Where dx goes, with any strides. It may be dy itself (the same memory, shape and strides), and may share no
        memory with dy, x, the residual or the mask otherwise.
    backend : "c", "numba", "numpy" or None
    sums : Sums or None
        Those of all the batches whose moments the forward call was given, this one's included: sums of
        `backward_sums`. dx then counts what this batch does to the others, and dgamma, dbeta are those of all.

    Returns
    -------
    Gradients
        Unpacks as (dx, dgamma, dbeta); dgamma and dbeta are in the statistics dtype, and None where gamma and beta
        were. `.dresidual` is the residual's gradient, or None; without an activation it is dy itself, or with out=dy a
        copy of it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was given and what is allowed; nothing has been changed.

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
        gradients = express(dy, parts.x, parts.residual, parts.saved, parts.axis, parts.frozen, parts.activation,
                            parts.has_gamma, parts.has_beta, out, get_num_threads)  # fmt: skip
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
    """The Moments of x: count, mean and sum of squares around it, per channel.

    Those of the parts of a batch merge into those of the whole, which `forward(moments=...)` normalizes with. x and
    mask are as in `forward`, and may leave no value: count is then 0.

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
    """What one of several batches, normalized with the moments of all, adds to the sums that their gradients need.

    Their total goes to the `backward` of each. `.count` is what the batch added to the count of the moments.

    Raises TypeError or ValueError as `backward` does, and ValueError for a cache of virtual batches.

    >>> import numpy as np, fastbn
    >>> x, dy = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> parts = [(x[:1], dy[:1]), (x[1:], dy[1:])]
    >>> m = sum(fastbn.moments(part) for part, _ in parts)
    >>> caches = [fastbn.forward(part, moments=m).cache for part, _ in parts]
    >>> sums = sum(fastbn.backward_sums(part, cache) for (_, part), cache in zip(parts, caches))
    >>> dx = np.concatenate([fastbn.backward(part, cache, sums=sums).dx for (_, part), cache in zip(parts, caches)])
    >>> bool(np.allclose(dx, fastbn.backward(dy, fastbn.forward(x).cache).dx))
    True
    """
    chosen = select(backend)
    parts = parts_of(cache)
    check_parts.whole("cache", parts.virtual)
    return batch.backward_sums(dy, parts, chosen, threads_of(chosen))
